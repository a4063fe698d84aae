// A product over the feed-forward's hidden units, added to x: each program of a pair has 128 columns' weights of one half
// of them, so that no row is read twice; sums are swapped through shared memory, and each program finishes 64 columns.
template <int K, int N> struct SplitPlace {
    static constexpr int STEPS = K / 2 / 128, STAGES = STEPS < 4 ? STEPS : 4;
    static constexpr int WEIGHTS = N * K, STAGE_BYTES = ROWS * 256, OTHER = ROWS * (N / 2) * 4;
    static_assert(STEPS % STAGES == 0, "");
    static_assert(WEIGHTS + STAGES * STAGE_BYTES + 2 * OTHER + 4 * N + 512 <= SHARED_BYTES, "");

    char *a, *made, *other;  // `other`: sums of the other program
    Flag *full, *empty, *loaded, *turn, *swap_turn, *swapped, *made_turn;
    float* bias;

    DEVICE SplitPlace(char* memory) {
        a = memory + WEIGHTS, made = a + STAGES * STAGE_BYTES, other = made + OTHER;
        full = (Flag*)(other + OTHER), empty = full + STAGES, loaded = empty + STAGES, turn = loaded + STEPS;
        swap_turn = turn + GROUPS, swapped = swap_turn + GROUPS, made_turn = swapped + GROUPS;
        bias = (float*)(made_turn + GROUPS);
    }
    DEVICE void open() const {
        for (int i = 0; i < STAGES; i++) opened(full + i, 1), opened(empty + i, 4);
        for (int i = 0; i < STEPS; i++) opened(loaded + i, 1);
        for (int i = 0; i < GROUPS; i++)
            opened(turn + i, 1), opened(swap_turn + i, 8), opened(swapped + i, 4), opened(made_turn + i, 1);
    }
};

// The half of c that the other program finishes goes there, this one's to `sum`.
template <int N, class Place> DEVICE void send_half(const Place& place, int i, const float (&c)[N / 2], float (&sum)[N / 4]) {
    const int me = rank(), mine = uniform(thread() / 128);
    if (i) arrived(place.swap_turn + mine, (i - 1) / GROUPS % 2);
    float4* there = (float4*)of(place.other, 1 - me) + thread() % 128;
#pragma unroll
    for (int j = 0; j < N / 4; j += 4) {
        const float *low = c + j, *high = c + N / 4 + j;
        there[j / 4 * 128] = make_float4(
            me ? low[0] : high[0], me ? low[1] : high[1], me ? low[2] : high[2], me ? low[3] : high[3]);
#pragma unroll
        for (int n = 0; n < 4; n++) sum[j + n] = me ? high[n] : low[n];
    }
    together();
    if (thread() % 32 == 0) tell(place.swapped + mine, 1 - me);
}
// What the other program has of `sum` is added.
template <int N, class Place> DEVICE void receive_half(const Place& place, int i, float (&sum)[N / 4]) {
    const int mine = uniform(thread() / 128);
    const float4* here = (float4*)place.other + thread() % 128;
    told(place.swapped + mine, i / GROUPS % 2);
#pragma unroll
    for (int j = 0; j < N / 4; j += 4) {
        const float4 more = here[j / 4 * 128];
        sum[j] += more.x, sum[j + 1] += more.y, sum[j + 2] += more.z, sum[j + 3] += more.w;
    }
    together();
    if (thread() % 32 < 2) arrive_at(place.swap_turn + (mine + 1) % GROUPS, thread() % 32);
}

KERNEL product_added_from_hidden(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix out, CONSTANT Matrix x, CONSTANT Layer layer
) {
    SHARED(memory);
    constexpr int K = HIDDEN, N = COLUMNS;
    typedef SplitPlace<K, N> Here;
    constexpr int STEPS = Here::STEPS, STAGES = Here::STAGES;
    release();
    const Here place(memory);
    const int me = rank(), warp = uniform(thread() / 32), lane = thread() % 32, t = lane % 4;
    const int shares = layer.columns / N, column = group() % shares * N + me * (N / 2);  // of those it finishes
    const int tiles = (layer.tokens + ROWS - 1) / ROWS, first = group() / shares, stride = groups() / shares;
    if (thread() == 0) place.open();
    for (int i = thread(); i < N / 2; i += THREADS) place.bias[i] = weights4(layer.bias + column + i);
    arrive();
    all_here();
    if (warp == WARPS && lane == 0) {
        for (int k = 0; k < STEPS; k++) {
            expected(place.loaded + k, N * 256);
            for (int part = 2 * k; part < 2 * k + 2; part++)
                tile_copied(
                    memory + part * N * 128, weights, me * (K / 2) + part * 64, column - me * (N / 2),
                    place.loaded + k);
        }
        wait();
        int step = 0;
        for (int tile = first; tile < tiles; tile += stride)
            for (int k = 0; k < STEPS; k++, step++) {
                const int stage = k % STAGES;
                arrived(place.empty + stage, step / STAGES % 2 ^ 1);
                expected(place.full + stage, Here::STAGE_BYTES);
                for (int part = 0; part < 2; part++)
                    tile_copied(
                        place.a + (2 * stage + part) * (ROWS * 128), a_rows, me * (K / 2) + (2 * k + part) * 64,
                        tile * ROWS, place.full + stage);
            }
    } else if (warp < WARPS) {
        wait();
        const int mine = warp / 4;
        const Operand kept = operand(memory);
        for (int i = mine, tile = first + mine * stride; tile < tiles; i += GROUPS, tile += GROUPS * stride) {
            const Rows rows(layer, tile * ROWS + warp % 4 * 16 + lane / 4);
            if (i) arrived(place.turn + mine, (i - 1) / GROUPS % 2);
            float c[N / 2], sum[N / 4];
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                const int stage = k % STAGES;
                if (i == mine) arrived(place.loaded + k, 0);
                arrived(place.full + stage, (i * (STEPS / STAGES) + k / STAGES) % 2);
                products_begin();
                const Operand a = later(kept, Here::WEIGHTS + stage * Here::STAGE_BYTES), w = later(kept, k * N * 256);
#pragma unroll
                for (int part = 0; part < 8; part++)
                    multiply_tile(
                        c, later(a, part / 4 * (ROWS * 128) + part % 4 * 32),
                        later(w, part / 4 * (N * 128) + part % 4 * 32), k | part);
                products_committed();
                if (k) {
                    products_done<1>();
                    if (lane == 0) arrive_at(place.empty + (k - 1) % STAGES, me);
                }
            }
            if (thread() % 128 == 0) arrive_at(place.turn + (mine + 1) % GROUPS, me);
            products_done<0>();
            if (lane == 0) arrive_at(place.empty + STAGES - 1, me);

            send_half<N>(place, i, c, sum);
            float2 before[N / 16][2];
#pragma unroll
            for (int n = 0; n < N / 16; n++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    before[n][half] = written_now((const float2*)(
                        layer.x + (long long)rows.row[half] * layer.columns + column + n * 8 + 2 * t));
            receive_half<N>(place, i, sum);
            const float scale[2] = {rows.valid(0) ? layer.scale : 0.0f, rows.valid(1) ? layer.scale : 0.0f};
            float2 add[N / 16];
#pragma unroll
            for (int n = 0; n < N / 16; n++) add[n] = *(const float2*)(place.bias + n * 8 + 2 * t);
            if (i) arrived(place.made_turn + mine, (i - 1) / GROUPS % 2);
#pragma unroll
            for (int n = 0; n < N / 16; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float &v = sum[n * 4 + half * 2], &w = sum[n * 4 + half * 2 + 1];
                    v = before[n][half].x + scale[half] * (v + add[n].x);
                    w = before[n][half].y + scale[half] * (w + add[n].y);
                    *(float2*)in_tiles<float>(place.made, rows.local(half), n * 8 + 2 * t) = make_float2(v, w);
                }
            give_x<N / 2>(layer, rows, column, tile * ROWS, x, out, sum, place.made);
            if (thread() % 128 == 0) arrive_at(place.made_turn + (mine + 1) % GROUPS, me);
        }
    }
    together();
    arrive();  // no program ends while the other may still write to it
    all_here();
}
