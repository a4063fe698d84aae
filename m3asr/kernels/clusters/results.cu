// What is made of a product's sums, tile by tile, and how it leaves: see products.cu.
// A stage holds 128 columns of 64 rows: two tiles, one of each program.
constexpr int STAGE = PROGRAMS * ROWS * 128, WARPS = 4 * GROUPS;

// What follows the product: activation; GLU of neighbours, zero past the length; the table; the sum with `x`.
enum Kind { ACTIVATED, GATED, KEYED, ADDED };

// What is made of a product in `out`. `ask` stands at the product's first step, so that `finish` waits for nothing. 32
// columns at a time: what is read of shared memory waits for what was written before, since both might be the same.
template <int N, Kind KIND> struct Result {
    static constexpr int WIDE = KIND != GATED ? 64 : N < 128 ? N : 128;  // columns that make a tile
    static constexpr int MADE = KIND == GATED ? WIDE / 2 : KIND == ADDED ? N : 64;  // of so many results
    RowNorm norm[2];
    uint4 keys[KIND == KEYED ? 4 : 1];  // of the table: 16 bytes of every 16th row of the group's 64
    const Number* table;                // none: these columns are no keys

    DEVICE void ask(const Layer& layer, const Rows& rows, int first, int column) {
        norm[0].ask(layer, rows.row[0]), norm[1].ask(layer, rows.row[1]);
        const int third = layer.columns / 3, key = column - third;  // a program's columns are keys or not
        table = KIND == KEYED && layer.table && key >= 0 && key < third ? layer.table + key : nullptr;
        if (table) ask_keys(layer, first, 0);
    }
    DEVICE void ask_keys(const Layer& layer, int row, int column) {
        const int part = thread() % 8 * 8;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int position = (row + i * 16 + thread() % 128 / 8) % layer.frames;
            keys[KIND == KEYED ? i : 0] = weights16(table + (long long)position * (layer.columns / 3) + column + part);
        }
    }
    // To where the results will be, which are added to them.
    DEVICE void put_keys(char* out) const {
#pragma unroll
        for (int i = 0; i < 4; i++)
            *(uint4*)in_tiles<Number>(out, i * 16 + thread() % 128 / 8, thread() % 8 * 8) = keys[KIND == KEYED ? i : 0];
    }

    // Of WIDE columns from `first` on; `out`: a tile in shared memory.
    template <bool ADDS> DEVICE void finish(
        const Rows& rows, const float* bias, const float* sums, const float (&c)[N / 2], int first, char* out
    ) const {
        const int t = thread() % 4;
        const u32 counts[2] = {rows.valid(0) ? 0xffffu : 0, rows.valid(1) ? 0xffffu : 0};
#pragma unroll
        for (int many = 0; many < WIDE / 8; many += 4) {
            float2 add[4], sum[4], key[4][2];
            u32 made[4][2];
            if (ADDS)
#pragma unroll
                for (int n = 0; n < 4; n++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        key[n][half] = floats(*(u32*)in_tiles<Number>(out, rows.local(half), (many + n) * 8 + 2 * t));
#pragma unroll
            for (int n = 0; n < 4; n++) {
                add[n] = *(const float2*)(bias + first + (many + n) * 8 + 2 * t);
                sum[n] = *(const float2*)(sums + first + (many + n) * 8 + 2 * t);
            }
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int at = (first / 8 + many + n) * 4 + half * 2;
                    float v = norm[half].factor * c[at] + (norm[half].off * sum[n].x + add[n].x);
                    float w = norm[half].factor * c[at + 1] + (norm[half].off * sum[n].y + add[n].y);
                    if (KIND == ACTIVATED) v = activate(v), w = activate(w);
                    if (KIND == GATED) v = v * sigmoid(w), w = 0.0f;
                    if (ADDS) v += key[n][half].x, w += key[n][half].y;
                    made[n][half] = pair(v, w);
                }
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    if (KIND == GATED)
                        *in_tiles<Number, MADE>(out, rows.local(half), (many + n) * 4 + t) =
                            made[n][half] & counts[half];
                    else
                        *(u32*)in_tiles<Number>(out, rows.local(half), (many + n) * 8 + 2 * t) = made[n][half];
        }
    }
};

// The stream += scale * the product, in its tile in shared memory, `raw` and `low`, and in c.
template <int N> DEVICE void add_to_stream(
    const Layer& layer, const Rows& rows, const float* bias, float (&c)[N / 2], char* raw, char* low
) {
    const int t = thread() % 4;
    const float scale[2] = {rows.valid(0) ? layer.scale : 0.0f, rows.valid(1) ? layer.scale : 0.0f};
#pragma unroll
    for (int first = 0; first < N / 8; first += 4) {
        float2 add[4];
        u32 high[4][2], rest[4][2];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int at = (first + n) * 8 + 2 * t;
            add[n] = *(const float2*)(bias + at);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                high[n][half] = *(u32*)in_tiles<Number, N>(raw, rows.local(half), at);
                rest[n][half] = *(Number*)in_tiles<char, N>(low, rows.local(half), at);
            }
        }
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float &v = c[(first + n) * 4 + half * 2], &w = c[(first + n) * 4 + half * 2 + 1];
                const float2 old = joined(high[n][half], rest[n][half]);
                v = old.x + scale[half] * (v + add[n].x), w = old.y + scale[half] * (w + add[n].y);
                split(v, w, high[n][half], rest[n][half]);
            }
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = (first + n) * 8 + 2 * t;
                *(u32*)in_tiles<Number, N>(raw, rows.local(half), at) = high[n][half];
                *(Number*)in_tiles<char, N>(low, rows.local(half), at) = (Number)rest[n][half];
            }
    }
}

// Mean and squares of these columns of the thread's rows.
template <int N> DEVICE void leave_parts(const Layer& layer, const Rows& rows, int column, const float (&c)[N / 2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float mean = 0.0f, squares = 0.0f;
#pragma unroll
        for (int n = 0; n < N / 8; n++) mean += c[n * 4 + half * 2] + c[n * 4 + half * 2 + 1];
        for (int mask = 2; mask; mask /= 2) mean += shuffle(mean, mask);
        mean *= 1.0f / N;
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float away = c[n * 4 + half * 2 + j] - mean;
                squares += away * away;
            }
        for (int mask = 2; mask; mask /= 2) squares += shuffle(squares, mask);
        if (thread() % 4 == 0 && rows.here[half])
            layer.x_parts[column / N * layer.tokens + rows.row[half]] = make_float2(mean, squares);
    }
}

// What this thread's group has written in shared memory goes to tiles of a matrix; to be followed by `stores_read`.
DEVICE void give(const Matrix& matrix, int column, int row, const char* tile) {
    seen_by_copies();
    sync_four(uniform(thread() / 128));
    if (thread() % 128 == 0) tile_stored(matrix, column, row, tile);
}
