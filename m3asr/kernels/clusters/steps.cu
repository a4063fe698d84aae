// Steps of a Conformer block for 16 rows, shared by the PROGRAMS programs of a cluster, THREADS threads each.
//
// A program owns COLUMNS columns of the residual stream. Thread (row, j) of a program, LANES threads a row, owns as
// many of the columns of each product. A product's weights lie in registers or in shared memory, its input, all columns
// of the 16 rows, in each program's shared memory.
typedef unsigned short Number;  // bfloat16 or float16
constexpr int WARPS = THREADS / 32, LANES = THREADS / 16;
constexpr int COLUMNS = WIDTH / PROGRAMS;
constexpr int SHARE = HIDDEN / PROGRAMS;
constexpr int HEAD = WIDTH / HEADS, KEYS = 128;  // at most so many frames an utterance
constexpr int LINE = WIDTH + 32, SUMS = 4 * 16 * (3 * COLUMNS + 8);  // a row in shared memory; a block's largest sums

DEVICE float sum_of_row(float v) {  // over the threads of a row
    for (int mask = LANES / 2; mask; mask /= 2) v += shuffle(v, mask);
    return v;
}

// A row's norm. Of its mean and squares each program knows its columns' part; parts are joined as Chan et al. (1979)
// have it. A product of the row before its norm, minus `mean` times the sums of its weights' rows, times `scale`, is
// the product of the normed row: so the row and its norm's parts go the same way at once.
struct Norm {
    float mean, scale;
};

// inbox: shared (PROGRAMS, 16), PARTS bytes of `flag`. (a, b): this thread's two columns.
constexpr int PARTS = 16 * PROGRAMS * 8;
DEVICE void send_parts(float2* inbox, float a, float b, Flag* flag) {
    int row = thread() / LANES, j = thread() % LANES;
    float mean = sum_of_row(a + b) / COLUMNS;
    float squares = sum_of_row((a - mean) * (a - mean) + (b - mean) * (b - mean));
    if (j < PROGRAMS) sent(inbox + rank() * 16 + row, make_float2(mean, squares), flag, j);
}

DEVICE Norm joined(const float2* inbox, int row, int j, float eps) {  // of LANES threads together
    float2 part = j < PROGRAMS ? inbox[j * 16 + row] : make_float2(0.0f, 0.0f);
    Norm norm;
    norm.mean = sum_of_row(part.x) / PROGRAMS;
    float off = part.x - norm.mean;
    float squares = sum_of_row(j < PROGRAMS ? part.y + COLUMNS * off * off : 0.0f);
    norm.scale = root_below(squares / WIDTH + eps);
    return norm;
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
        multiply(a, sums, [&](int step, int tile) { return w[step][tile]; });
    }
    // The same with weights that lie in shared memory, (N, K) in rows of K + 32.
    DEVICE static void multiply(const Number* a, const Number* weight, float* sums) {
        int warp = thread() / 32, lane = thread() % 32;
        const Number* at = weight + (warp / KG * (TILES * 8) + lane / 4) * (K + 32);
        at += warp % KG * (K / KG) + lane % 4 * 8;
        multiply(a, sums, [&](int step, int tile) { return *(const uint4*)(at + tile * 8 * (K + 32) + step * 32); });
    }
    template <class Weights> DEVICE static void multiply(const Number* a, float* sums, Weights weights) {
        int warp = thread() / 32, lane = thread() % 32, g = lane / 4, t = lane % 4;
        const Number* at = a + g * (K + 32) + warp % KG * (K / KG) + t * 8;
        float c[TILES][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint4 low = *(const uint4*)(at + step * 32), high = *(const uint4*)(at + 8 * (K + 32) + step * 32);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const uint4 b = weights(step, tile);
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

    // This thread's part of the sums of the weights' rows, for `Norm`.
    float2 of_rows[EACH / 2];
    DEVICE void load_sums(const float* from) {
#pragma unroll
        for (int i = 0; i < EACH; i += 2) of_rows[i / 2] = weights8(from + thread() % LANES * EACH + i);
    }
    DEVICE void result(const float* sums, Norm norm, float (&v)[EACH]) const {
        const float off = -norm.mean * norm.scale;
        result(sums, v, norm.scale);
#pragma unroll
        for (int i = 0; i < EACH; i += 2) v[i] += off * of_rows[i / 2].x, v[i + 1] += off * of_rows[i / 2].y;
    }

    // This thread's sums, times `scale` but for the bias.
    DEVICE void result(const float* sums, float (&v)[EACH], float scale = 1.0f) const {
        int row = thread() / LANES, first = thread() % LANES * EACH;
#pragma unroll
        for (int i = 0; i < EACH; i += 2) {
            float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int part = 0; part < KG; part++) {
                float2 s = *(const float2*)(sums + (part * 16 + row) * PITCH + first + i);
                total.x += s.x, total.y += s.y;
            }
            v[i] = scale * total.x + bias[i / 2].x, v[i + 1] = scale * total.y + bias[i / 2].y;
        }
    }
};

// Each thread's COUNT numbers, 2 or 4, go to all programs: (16, K) in rows of K + 32, this program's columns at
// their place; 16 rows of `flag`. Whoever has received them knows that all threads of all programs are so far.
template <int K, int COUNT> DEVICE void send(Number* buffer, const float (&v)[COUNT], Flag* flag) {
    int row = thread() / LANES, j = thread() % LANES, column = (rank() * LANES + j) * COUNT;
    // 8 columns, of 2 or 4 neighbours, in one store; each of the neighbours sends them to some of the programs.
    constexpr int MATES = 8 / COUNT;
    uint4 eight;
    if (COUNT == 4) {
        u32 first = pair(v[0], v[1]), second = pair(v[COUNT - 2], v[COUNT - 1]);
        u32 a = shuffle(first, 1), b = shuffle(second, 1);
        eight = j % 2 ? make_uint4(a, b, first, second) : make_uint4(first, second, a, b);
    } else {
        u32 mine = pair(v[0], v[1]), other = shuffle(mine, 1), x = j % 2 ? other : mine, y = j % 2 ? mine : other;
        u32 p = shuffle(x, 2), q = shuffle(y, 2);
        eight = j / 2 % 2 ? make_uint4(p, q, x, y) : make_uint4(x, y, p, q);
    }
    Number* at = buffer + row * (K + 32) + column / 8 * 8;
#pragma unroll
    for (int i = 0; i < PROGRAMS / MATES; i++)
        sent((uint4*)at, eight, flag, (i * MATES + j % MATES + rank()) % PROGRAMS);
}
