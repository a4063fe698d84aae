// Products of many tokens, a w^T with what follows them, weight-stationary: a program keeps the weights of its N
// columns in shared memory and takes one tile of 64 rows after the other. A cluster of two shares the tiles' copies,
// each of which brings half. One warp asks for copies; GROUPS times four warps multiply in turn, so that the matrix unit
// works on one tile while the results of the others are finished, and leave by the copy engine.
//
// The residual stream is 24 bits a number, `raw` in the compute type and `low`, which come and go in tiles. A norm costs
// no launch: of each row whoever writes the stream leaves its columns' mean and squares (`parts`, joined as Chan et al.,
// 1979, have it), and the next product multiplies `raw` as it is:
// norm(x) w^T = (raw w^T - mean * sums of w's rows) / deviation.

// What a program has in shared memory, one behind the other.
template <int K, int N, Kind KIND> struct Place {
    static constexpr int STEPS = K / 64 / PROGRAMS, WEIGHTS = K * N * 2;
    // Divides STEPS, so that each step has its place.
    static constexpr int STAGES = STEPS % 4 == 0 ? 4 : STEPS % 3 == 0 ? 3 : STEPS % 2 == 0 ? 2 : 1;
    static constexpr int OUT_TILE = ROWS * Result<N, KIND>::MADE * 2;
    static constexpr int X_TILE = OUT_TILE + ROWS * N;  // of x: `raw`, `low`
    // Tiles of results, one a group, or of x.
    static constexpr int SLOTS = KIND != ADDED ? GROUPS : WEIGHTS > 65536 ? 2 : 4;
    static constexpr int SLOT = KIND != ADDED ? OUT_TILE : X_TILE;
    static constexpr int TILES = WEIGHTS + STAGES * STAGE + SLOTS * SLOT;
    static_assert(TILES + 2 * N * 4 + 512 <= SHARED_BYTES && (KIND != ADDED || N <= 64), "");

    char *a, *slots;
    Flag *full, *empty, *loaded, *turn, *x_full, *x_empty;
    float *bias, *sums;

    DEVICE Place(char* memory) {
        a = memory + WEIGHTS, slots = a + STAGES * STAGE;
        full = (Flag*)(slots + SLOTS * SLOT), empty = full + STAGES, loaded = empty + STAGES, turn = loaded + STEPS;
        x_full = turn + GROUPS, x_empty = x_full + SLOTS;
        bias = (float*)(x_empty + SLOTS), sums = bias + N;
    }
    DEVICE void open() const {
        for (int i = 0; i < STAGES; i++) opened(full + i, 1), opened(empty + i, 2 * 4);
        for (int i = 0; i < GROUPS; i++) opened(turn + i, 1);
        for (int i = 0; i < SLOTS; i++) opened(x_full + i, 1), opened(x_empty + i, 1);
        all_opened();
    }
};

// Which pair of programs' columns a cluster makes, and which tiles of rows. Keys, to which a table is added, take
// longer than the rest, so `more` clusters share each pair's tiles there.
struct Share {
    int pair, first, stride;

    DEVICE Share(const Layer& layer, int pairs) {
        const int even = groups() - layer.more * (pairs / 3), beyond = group() - even;
        pair = beyond < 0 ? group() % pairs : pairs / 3 + beyond % (pairs / 3);
        first = beyond < 0 ? group() / pairs : even / pairs + beyond / (pairs / 3);
        stride = even / pairs + (layer.more && pair / (pairs / 3) == 1 ? layer.more : 0);
    }
};

template <int K, int N, Kind KIND> DEVICE void product(
    char* memory, const Matrix& a_rows, const Matrix& weights, const Matrix& out, const Matrix& low, const Layer& layer
) {
    typedef Place<K, N, KIND> Here;
    constexpr int STEPS = Here::STEPS, STAGES = Here::STAGES, SLOTS = Here::SLOTS;
    release();
    const Here place(memory);
    const int me = rank(), warp = uniform(thread() / 32), lane = thread() % 32;
    const int tiles = (layer.tokens + ROWS - 1) / ROWS;
    const Share share(layer, layer.columns / (2 * N));
    const int column = (share.pair * 2 + me) * N;
    if (warp == WARPS && lane == 0) {  // weights concern no other program: they need not wait until all meet
        for (int k = 0; k < STEPS; k++) opened(place.loaded + k, 1);
        all_opened();
        for (int k = 0; k < STEPS; k++) {
            expected(place.loaded + k, PROGRAMS * N * 128);
            for (int part = k * PROGRAMS; part < (k + 1) * PROGRAMS; part++)
                tile_copied(memory + part * N * 128, weights, part * 64, column, place.loaded + k);
        }
        described(a_rows);
    }
    if (thread() == 0) place.open();
    for (int i = thread(); i < N; i += THREADS) {
        place.bias[i] = weights4(layer.bias + column + i);
        place.sums[i] = layer.parts ? weights4(layer.sums + column + i) : 0.0f;
    }
    arrive();
    all_here();
    if (warp == WARPS) {  // brings rows of `a`; asked of the whole warp, which costs the others fewer registers
        wait();
        int step = 0;
        for (int tile = share.first; lane == 0 && tile < tiles; tile += share.stride)
            for (int k = 0; k < STEPS; k++, step++) {
                const int stage = k % STAGES;
                arrived(place.empty + stage, step / STAGES % 2 ^ 1);
                expected(place.full + stage, STAGE);
                tile_shared(
                    place.a + stage * STAGE + me * (ROWS * 128), a_rows, (k * PROGRAMS + me) * 64, tile * ROWS,
                    place.full + stage);
            }
    } else if (KIND == ADDED && warp == WARPS + 1 && lane == 0) {  // brings tiles of x
        described(out), described(low);
        wait();
        for (int i = 0, tile = share.first; tile < tiles; i++, tile += share.stride) {
            const int slot = i % SLOTS;
            char* raw = place.slots + slot * Here::X_TILE;
            arrived(place.x_empty + slot, i / SLOTS % 2 ^ 1);
            expected(place.x_full + slot, Here::X_TILE);
            tile_copied(raw, out, column, tile * ROWS, place.x_full + slot);
            tile_copied(raw + Here::OUT_TILE, low, column, tile * ROWS, place.x_full + slot);
        }
    } else if (warp < WARPS) {
        if (KIND != ADDED && thread() % 128 == 0) described(out);
        wait();
        const int mine = warp / 4, first = share.first, stride = share.stride;
        const Operand kept = operand(memory);
        for (int i = mine, tile = first + mine * stride; tile < tiles; i += GROUPS, tile += GROUPS * stride) {
            const Rows rows(layer, tile * ROWS + warp % 4 * 16 + lane / 4);
            Result<N, KIND> result;
            if (i) arrived(place.turn + mine, (i - 1) / GROUPS % 2);
            float c[N / 2];
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                const int stage = k % STAGES;
                if (i == mine) arrived(place.loaded + k, 0);
                arrived(place.full + stage, (i * (STEPS / STAGES) + k / STAGES) % 2);
                if (KIND != ADDED && k == 0) result.ask(layer, rows, tile * ROWS, column);
                products_begin();
                const Operand a = later(kept, Here::WEIGHTS + stage * STAGE), w = later(kept, k * PROGRAMS * N * 128);
#pragma unroll
                for (int part = 0; part < 4 * PROGRAMS; part++)
                    multiply_tile(
                        c, later(a, part / 4 * (ROWS * 128) + part % 4 * 32),
                        later(w, part / 4 * (N * 128) + part % 4 * 32), k | part);
                products_committed();
                if (k) {
                    products_done<1>();
                    if (lane < 2) arrive_at(place.empty + (k - 1) % STAGES, lane);
                }
            }
            if (thread() % 128 == 0) arrive_at(place.turn + (mine + 1) % GROUPS, me);
            products_done<0>();
            if (lane < 2) arrive_at(place.empty + STAGES - 1, lane);
            if (KIND != ADDED) {
                constexpr int WIDE = Result<N, KIND>::WIDE;
                char* made = place.slots + mine * Here::OUT_TILE;
                result.norm[0].join(layer), result.norm[1].join(layer);
#pragma unroll
                for (int at = 0; at < N; at += WIDE) {
                    if (thread() % 128 == 0) stores_read();
                    sync_four(mine);
                    if (KIND == KEYED && result.table) {
                        result.put_keys(made);
                        if (at + WIDE < N) result.ask_keys(layer, tile * ROWS, at + WIDE);
                        sync_four(mine);
                        result.template finish<KIND == KEYED>(rows, place.bias, place.sums, c, at, made);
                    } else {
                        result.template finish<false>(rows, place.bias, place.sums, c, at, made);
                    }
                    give(out, KIND == GATED ? column / 2 : column + at, tile * ROWS, made);
                }
                continue;
            }
            const int slot = i % SLOTS;
            char *raw = place.slots + slot * Here::X_TILE, *rest = raw + Here::OUT_TILE;
            arrived(place.x_full + slot, i / SLOTS % 2);
            add_to_stream<N>(layer, rows, place.bias, c, raw, rest);
            give(out, column, tile * ROWS, raw);
            if (thread() % 128 == 0) tile_stored(low, column, tile * ROWS, rest);
            if (layer.x_parts) leave_parts<N>(layer, rows, column, c);
            if (thread() % 128 == 0) stores_read(), arrive_at(place.x_empty + slot, me);
        }
        if (thread() % 128 == 0) stores_read();
    }
    together();
    arrive();  // no program ends while the other may still write to it
    all_here();
}

KERNEL product_activated(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix out, CONSTANT Layer layer
) {
    SHARED(memory);
    product<WIDTH, COLUMNS, ACTIVATED>(memory, a_rows, weights, out, out, layer);
}
KERNEL product_gated(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix out, CONSTANT Layer layer
) {
    SHARED(memory);
    product<WIDTH, COLUMNS, GATED>(memory, a_rows, weights, out, out, layer);
}
KERNEL product_keyed(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix out, CONSTANT Layer layer
) {
    SHARED(memory);
    product<WIDTH, COLUMNS, KEYED>(memory, a_rows, weights, out, out, layer);
}
KERNEL product_added(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix raw, CONSTANT Matrix low, CONSTANT Layer layer
) {
    SHARED(memory);
    product<WIDTH, OUT_COLUMNS, ADDED>(memory, a_rows, weights, raw, low, layer);
}
KERNEL product_added_from_hidden(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix raw, CONSTANT Matrix low, CONSTANT Layer layer
) {
    SHARED(memory);
    product<HIDDEN, DOWN_COLUMNS, ADDED>(memory, a_rows, weights, raw, low, layer);
}
