// Steps of a Conformer block for 16 rows, shared by the PROGRAMS programs of a cluster, THREADS threads each.
//
// A program owns COLUMNS columns of the residual stream. Thread (row, j) of a program, LANES threads a row, owns as many
// of the columns of each product. A product's weights lie in registers, its input, all columns of the 16 rows, in each
// program's shared memory.
typedef unsigned short Number;  // bfloat16 or float16
constexpr int WARPS = THREADS / 32, LANES = THREADS / 16;
constexpr int COLUMNS = WIDTH / PROGRAMS;
constexpr int SHARE = HIDDEN / PROGRAMS;
constexpr int HEAD = WIDTH / HEADS;

DEVICE void barrier() {
    arrive();
    all_here();
}

DEVICE float sum_of_row(float v) {  // over the threads of a row
    for (int mask = LANES / 2; mask; mask /= 2) v += shuffle(v, mask);
    return v;
}

DEVICE float activate(float v) {
#if SWISH
    return v * sigmoid(v);
#else
    return fmaxf(v, 0.0f);
#endif
}

// N columns of a product over K, with all their weights: warps share K in KG parts and the columns in WARPS / KG.
// A thread's numbers of 32 neighbours along K are 8 neighbours: of the matrix unit's order that is a permutation, the
// same for both operands, and weights need no packing: 16 bytes a load, and no shared memory.
template <int K, int N, int KG> struct Product {
    static constexpr int STEPS = K / KG / 32, TILES = N * KG / WARPS / 8, PITCH = N + 8;
    static constexpr int SUMS = KG * 16 * PITCH, EACH = N / LANES;
    uint4 w[STEPS][TILES];

    DEVICE void load(const Number* weight) {
        int warp = thread() / 32, lane = thread() % 32;
        const Number* at = weight + (warp / KG * (TILES * 8) + lane / 4) * K + warp % KG * (K / KG) + lane % 4 * 8;
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) w[step][tile] = weights16(at + tile * 8 * K + step * 32);
    }

    // a: shared (16, K) in rows of K + 32 -> sums of the parts of K, shared (KG, 16, N) in rows of N + 8.
    DEVICE void multiply(const Number* a, float* sums) const {
        int warp = thread() / 32, lane = thread() % 32, g = lane / 4, t = lane % 4;
        const Number* at = a + g * (K + 32) + warp % KG * (K / KG) + t * 8;
        float c[TILES][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint4 low = *(const uint4*)(at + step * 32), high = *(const uint4*)(at + 8 * (K + 32) + step * 32);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const uint4 b = w[step][tile];
                multiply_add(c[tile], low.x, high.x, low.y, high.y, b.x, b.y);
                multiply_add(c[tile], low.z, high.z, low.w, high.w, b.z, b.w);
            }
        }
        float* to = sums + (warp % KG * 16 + g) * PITCH + warp / KG * (TILES * 8) + t * 2;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            *(float2*)(to + tile * 8) = make_float2(c[tile][0], c[tile][1]);
            *(float2*)(to + 8 * PITCH + tile * 8) = make_float2(c[tile][2], c[tile][3]);
        }
    }

    // This thread's part of the bias, float32 of the program's N columns: a sum that begins with it waits for nothing.
    float2 bias[EACH / 2];
    DEVICE void load_bias(const float* from) {
#pragma unroll
        for (int i = 0; i < EACH; i += 2) bias[i / 2] = weights8(from + thread() % LANES * EACH + i);
    }

    // This thread's sums.
    DEVICE void result(const float* sums, float (&v)[EACH]) const {
        int row = thread() / LANES, first = thread() % LANES * EACH;
#pragma unroll
        for (int i = 0; i < EACH; i += 2) {
            float2 total = bias[i / 2];
#pragma unroll
            for (int part = 0; part < KG; part++) {
                float2 s = *(const float2*)(sums + (part * 16 + row) * PITCH + first + i);
                total.x += s.x, total.y += s.y;
            }
            v[i] = total.x, v[i + 1] = total.y;
        }
    }
};

// Each thread's COUNT numbers, 2 or 4, go to all programs: (16, K) in rows of K + 32, this program's columns at
// their place. They are there behind a barrier and `received`. By way of each other's shared memory, or, where
// THROUGH_CACHE, of `place` (rows, K) in the L2 cache.
template <int K, int COUNT> DEVICE void send(Number* buffer, Number* place, const float (&v)[COUNT]) {
    int row = thread() / LANES, j = thread() % LANES, column = (rank() * LANES + j) * COUNT;
    u32 mine[COUNT / 2];
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) mine[i] = pair(v[2 * i], v[2 * i + 1]);
#if THROUGH_CACHE
    u32* to = (u32*)(place + (group() * 16 + row) * K + column);
    if (COUNT == 4) *(uint2*)to = make_uint2(mine[0], mine[1 % (COUNT / 2)]);
    else *to = mine[0];
#else
    // 8 columns, of 2 or 4 neighbours, in one store; each of the neighbours sends them to some of the programs.
    constexpr int MATES = 8 / COUNT;
    uint4 eight;
    if (COUNT == 4) {
        u32 first = mine[0], second = mine[1 % (COUNT / 2)], a = shuffle(first, 1), b = shuffle(second, 1);
        eight = j % 2 ? make_uint4(a, b, first, second) : make_uint4(first, second, a, b);
    } else {
        u32 other = shuffle(mine[0], 1), x = j % 2 ? other : mine[0], y = j % 2 ? mine[0] : other;
        u32 p = shuffle(x, 2), q = shuffle(y, 2);
        eight = j / 2 % 2 ? make_uint4(p, q, x, y) : make_uint4(x, y, p, q);
    }
    Number* at = buffer + row * (K + 32) + column / 8 * 8;
#pragma unroll
    for (int i = 0; i < PROGRAMS / MATES; i++)
        *(uint4*)of(at, (i * MATES + j % MATES + rank()) % PROGRAMS) = eight;
#endif
}

template <int K> DEVICE void received(Number* buffer, const Number* place) {
#if THROUGH_CACHE
#pragma unroll
    for (int i = thread(); i < 16 * K / 8; i += THREADS)
        *(uint4*)(buffer + i / (K / 8) * (K + 32) + i % (K / 8) * 8) =
            written((const uint4*)(place + (group() * 16) * K) + i);
    sync();
#endif
}

// (a, b), this thread's two columns, become (v - mean) / sqrt(var + eps) of the whole row, of which each program knows
// its part: mean and squares of all parts are joined as Chan et al. (1979) have it. inbox: shared (PROGRAMS, 16).
DEVICE void normalise(float& a, float& b, float2* inbox, float eps) {
    int row = thread() / LANES, j = thread() % LANES;
    float mean = sum_of_row(a + b) / COLUMNS;
    float squares = sum_of_row((a - mean) * (a - mean) + (b - mean) * (b - mean));
    if (j < PROGRAMS) *of(inbox + rank() * 16 + row, j) = make_float2(mean, squares);
    barrier();
    float2 part = j < PROGRAMS ? inbox[j * 16 + row] : make_float2(0.0f, 0.0f);
    mean = sum_of_row(part.x) / PROGRAMS;
    float off = part.x - mean;
    squares = sum_of_row(j < PROGRAMS ? part.y + COLUMNS * off * off : 0.0f);
    float scale = root_below(squares / WIDTH + eps);
    a = (a - mean) * scale;
    b = (b - mean) * scale;
}
