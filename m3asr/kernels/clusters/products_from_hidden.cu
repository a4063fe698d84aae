// A product over the feed-forward's hidden units, added to x. Its weights leave less room than others' do, and each row is
// twice as long: so x comes straight into registers, and results leave by one place for all groups, one after the other,
// which makes room for one more stage.
template <int K, int N> struct HiddenPlace {
    static constexpr int STEPS = K / 128, STAGES = 5, WEIGHTS = 2 * N * K, MADE = ROWS * N * 4;
    static_assert(WEIGHTS + STAGES * STAGE + MADE + 4 * N + 512 <= SHARED_BYTES, "");

    char *a, *made;
    Flag *full, *empty, *loaded, *turn, *made_turn;
    float* bias;

    DEVICE HiddenPlace(char* memory) {
        a = memory + WEIGHTS, made = a + STAGES * STAGE;
        full = (Flag*)(made + MADE), empty = full + STAGES, loaded = empty + STAGES, turn = loaded + STEPS;
        made_turn = turn + GROUPS, bias = (float*)(made_turn + GROUPS);
    }
    DEVICE void open() const {
        for (int i = 0; i < STAGES; i++) opened(full + i, 1), opened(empty + i, 2 * 4);
        for (int i = 0; i < STEPS; i++) opened(loaded + i, 1);
        for (int i = 0; i < GROUPS; i++) opened(turn + i, 1), opened(made_turn + i, 1);
    }
};

KERNEL product_added_from_hidden(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix out, CONSTANT Matrix x, CONSTANT Layer layer
) {
    SHARED(memory);
    constexpr int K = HIDDEN, N = ADDED_COLUMNS;
    typedef HiddenPlace<K, N> Here;
    constexpr int STEPS = Here::STEPS, STAGES = Here::STAGES;
    release();
    const Here place(memory);
    const int me = rank(), warp = uniform(thread() / 32), lane = thread() % 32, t = lane % 4;
    const int pairs = layer.columns / (2 * N), column = (group() % pairs * 2 + me) * N;
    const int tiles = (layer.tokens + ROWS - 1) / ROWS, first = group() / pairs, stride = groups() / pairs;
    if (thread() == 0) place.open();
    for (int i = thread(); i < N; i += THREADS) place.bias[i] = weights4(layer.bias + column + i);
    arrive();
    all_here();
    if (warp == WARPS && lane == 0) {
        for (int k = 0; k < STEPS; k++) {
            expected(place.loaded + k, N * 256);
            for (int part = 2 * k; part < 2 * k + 2; part++)
                tile_copied(memory + part * N * 128, weights, part * 64, column, place.loaded + k);
        }
        wait();
        int step = 0;
        for (int tile = first; tile < tiles; tile += stride)
            for (int k = 0; k < STEPS; k++, step++) {
                const int stage = step % STAGES;
                arrived(place.empty + stage, step / STAGES % 2 ^ 1);
                expected(place.full + stage, STAGE);
                tile_shared(
                    place.a + stage * STAGE + me * (ROWS * 128), a_rows, (2 * k + me) * 64, tile * ROWS,
                    place.full + stage);
            }
    } else if (warp < WARPS) {
        wait();
        const int mine = warp / 4;
        const Operand kept = operand(memory);
        for (int i = mine, tile = first + mine * stride; tile < tiles; i += GROUPS, tile += GROUPS * stride) {
            const Rows rows(layer, tile * ROWS + warp % 4 * 16 + lane / 4);
            if (i) arrived(place.turn + mine, (i - 1) / GROUPS % 2);
            float c[N / 2];
            float2 before[N / 8][2], add[N / 8];
            int step = i * STEPS, last = 0;
            for (int k = 0; k < STEPS; k++, step++) {
                const int stage = step % STAGES;
                if (i == mine) arrived(place.loaded + k, 0);
                arrived(place.full + stage, step / STAGES % 2);
                products_begin();
                const Operand a = later(kept, Here::WEIGHTS + stage * STAGE), w = later(kept, k * N * 256);
#pragma unroll
                for (int part = 0; part < 8; part++)
                    multiply_tile(
                        c, later(a, part / 4 * (ROWS * 128) + part % 4 * 32),
                        later(w, part / 4 * (N * 128) + part % 4 * 32), k | part);
                products_committed();
                if (k) {
                    products_done<1>();
                    if (lane < 2) arrive_at(place.empty + last, lane);
                }
                last = stage;
            }
            if (thread() % 128 == 0) arrive_at(place.turn + (mine + 1) % GROUPS, me);
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    before[n][half] = written_now(
                        (const float2*)(layer.x + (long long)rows.row[half] * layer.columns + column + n * 8 + 2 * t));
            products_done<0>();
            if (lane < 2) arrive_at(place.empty + last, lane);
            const float scale[2] = {rows.valid(0) ? layer.scale : 0.0f, rows.valid(1) ? layer.scale : 0.0f};
#pragma unroll
            for (int n = 0; n < N / 8; n++) add[n] = *(const float2*)(place.bias + n * 8 + 2 * t);
            if (i) arrived(place.made_turn + mine, (i - 1) / GROUPS % 2);
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float &v = c[n * 4 + half * 2], &w = c[n * 4 + half * 2 + 1];
                    v = before[n][half].x + scale[half] * (v + add[n].x);
                    w = before[n][half].y + scale[half] * (w + add[n].y);
                    *(float2*)in_tiles<float>(place.made, rows.local(half), n * 8 + 2 * t) = make_float2(v, w);
                }
            give_x<N>(layer, rows, column, tile * ROWS, x, out, c, place.made);
            if (thread() % 128 == 0) arrive_at(place.made_turn + (mine + 1) % GROUPS, me);
        }
    }
    together();
    arrive();  // no program ends while the other may still write to it
    all_here();
}
