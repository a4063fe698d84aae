// The router of a stream, of 24 bits or, with FLOATS, of float32: what it computes is in kernels/router.py. A warp takes
// 16 rows, or a part of their columns where a program's four share them (ROUTED 16), and makes their norm as they come;
// products are three of float16 halves. Which of an inner dimension's numbers stands where is for both operands alike: a
// thread has 16 neighbouring columns of 64, as they lie in memory.
struct Router {
    const Number* raw;    // (tokens, WIDTH)
    const char* low;
    const float* x;       // (tokens, WIDTH), in place of both
    const float* heard;   // (tokens, EXPERTS), rows `stride` apart
    void* y;              // (tokens, WIDTH), of the experts' type
    int* chosen;          // (tokens,)
    float* gate;
    int* counts;          // (tokens / ROUTED, EXPERTS), or none
    int stride;
};

constexpr int CHOICES = (EXPERTS + 7) / 8 * 8, PARTS_OF_ROW = WIDTH / 64, WEIGHTS_TILE = CHOICES * 128;
constexpr int SHARERS = 64 / ROUTED, PARTS_OF_WARP = PARTS_OF_ROW / SHARERS;

// The i-th u32 of 16 bytes.
DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// 16 columns of two rows.
struct Columns {
#if FLOATS
    float4 x[2][4];
#else
    uint4 raw[2][2], low[2];
#endif

    DEVICE void ask(const Router& router, const Rows& rows, int part) {
        const int column = part * 64 + thread() % 4 * 16;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const long long at = (long long)rows.row[half] * WIDTH + column;
#if FLOATS
#pragma unroll
            for (int i = 0; i < 4; i++) x[half][i] = written((const float4*)(router.x + at) + i);
#else
            low[half] = written((const uint4*)(router.low + at));
#pragma unroll
            for (int i = 0; i < 2; i++) raw[half][i] = written((const uint4*)(router.raw + at) + i);
#endif
        }
    }
    // The i-th two of a row.
    DEVICE float2 two(int half, int i) const {
#if FLOATS
        const float4& v = x[half][i / 2];
        return i % 2 ? make_float2(v.z, v.w) : make_float2(v.x, v.y);
#else
        return joined(word(raw[half][i / 4], i % 4), word(low[half], i / 2) >> i % 2 * 16 & 0xffff);
#endif
    }
};

// Eight columns of a row from 8 * eight on, normalised: of the experts' type to y, and as float16 halves.
DEVICE void normalised(
    const RowNorm& norm, const Columns& columns, int half, int eight, uint4* y, u32 (&high)[4], u32 (&rest)[4]
) {
    u32 made[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = columns.two(half, eight * 4 + i);
        const float v = (x.x - norm.mean) * norm.scale, w = (x.y - norm.mean) * norm.scale;
        high[i] = pair_half(v, w);
        const float2 rounded = floats_half(high[i]);
        rest[i] = pair_half(v - rounded.x, w - rounded.y);
#if EXPERTS_HALF
        made[i] = high[i];
#else
        made[i] = pair(v, w);
#endif
    }
    if (y) *y = make_uint4(made[0], made[1], made[2], made[3]);
}

KERNEL route(
    CONSTANT Matrix weights, CONSTANT Matrix weights_rest, CONSTANT Layer layer, CONSTANT Router router
) {
    SHARED(memory);
    Flag* loaded = (Flag*)(memory + 2 * PARTS_OF_ROW * WEIGHTS_TILE);
    int* chosen = (int*)(loaded + 1);
    float* sums = (float*)(chosen + ROUTED);  // of the warps that share rows, but for the first
    release();
    const int warp = uniform(thread() / 32), t = thread() % 4;
    const int local = (SHARERS == 1 ? warp * 16 : 0) + thread() % 32 / 4;  // row, of the program's
    const int begin = SHARERS == 1 ? 0 : warp * PARTS_OF_WARP, end = begin + PARTS_OF_WARP;
    if (thread() == 0) {
        opened(loaded, 1);
        all_opened();
        expected(loaded, 2 * PARTS_OF_ROW * WEIGHTS_TILE);
        for (int i = 0; i < PARTS_OF_ROW; i++) {
            tile_copied(memory + i * WEIGHTS_TILE, weights, i * 64, 0, loaded);
            tile_copied(memory + (PARTS_OF_ROW + i) * WEIGHTS_TILE, weights_rest, i * 64, 0, loaded);
        }
    }
    float bias[CHOICES / 4];
#pragma unroll
    for (int i = 0; i < CHOICES / 4; i++) {
        const int e = i / 2 * 8 + 2 * t + i % 2;
        bias[i] = e < EXPERTS ? weights4(layer.bias + e) : 0.0f;
    }
    sync();
    wait();
    const Rows rows(layer, group() * ROUTED + local);
    RowNorm norm[2];
    norm[0].ask(layer, rows.row[0]), norm[1].ask(layer, rows.row[1]);
    Columns now, next;
    now.ask(router, rows, begin);
    float c[CHOICES / 8][4], heard[2][CHOICES / 4];
#pragma unroll
    for (int i = 0; i < CHOICES / 4; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int e = i / 2 * 8 + 2 * t + i % 2;
            c[i / 2][half * 2 + i % 2] = 0.0f;
            heard[half][i] = 0.0f;
            if (e < EXPERTS) heard[half][i] = written(router.heard + (long long)rows.row[half] * router.stride + e);
        }
    norm[0].join(layer), norm[1].join(layer);
    arrived(loaded, 0);
    for (int part = begin; part < end; part++) {
        if (part + 1 < end) next.ask(router, rows, part + 1);
        char* tile = memory + part * WEIGHTS_TILE;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 high[2][4], rest[2][4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const long long at = (long long)rows.row[half] * WIDTH + part * 64 + t * 16 + i * 8;
                normalised(
                    norm[half], now, half, i, rows.here[half] ? (uint4*)((Number*)router.y + at) : nullptr, high[half],
                    rest[half]);
            }
#pragma unroll
            for (int n = 0; n < CHOICES / 8; n++) {
                const int e = n * 8 + thread() % 32 / 4;
                const uint4 w = *(const uint4*)in_tiles<Number>(tile, e, t * 16 + i * 8);
                const uint4 w_rest = *(const uint4*)in_tiles<Number>(
                    tile + PARTS_OF_ROW * WEIGHTS_TILE, e, t * 16 + i * 8);
#pragma unroll
                for (int k = 0; k < 4; k += 2) {
                    multiply_add_half(
                        c[n], rest[0][k], rest[1][k], rest[0][k + 1], rest[1][k + 1], word(w, k), word(w, k + 1));
                    multiply_add_half(
                        c[n], high[0][k], high[1][k], high[0][k + 1], high[1][k + 1], word(w_rest, k),
                        word(w_rest, k + 1));
                    multiply_add_half(
                        c[n], high[0][k], high[1][k], high[0][k + 1], high[1][k + 1], word(w, k), word(w, k + 1));
                }
            }
        }
        now = next;
    }
    if (SHARERS > 1) {
        constexpr int MINE = CHOICES / 2;  // sums of a thread
        if (warp)
            for (int i = 0; i < MINE; i++) sums[((warp - 1) * MINE + i) * 32 + thread() % 32] = c[i / 4][i % 4];
        sync();
#pragma unroll
        for (int i = 0; i < MINE; i++)
            for (int other = 0; other < SHARERS - 1; other++)
                c[i / 4][i % 4] += sums[(other * MINE + i) * 32 + thread() % 32];
    }
    const float none = float_of(0xff800000);  // - infinity
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float best = none, sum = 0.0f;
        u32 expert = 0;
#pragma unroll
        for (int i = 0; i < CHOICES / 4; i++) {
            const int e = i / 2 * 8 + 2 * t + i % 2;
            float& logit = c[i / 2][half * 2 + i % 2];
            logit = e < EXPERTS ? logit * layer.scale + bias[i] + heard[half][i] : none;
            if (logit > best) best = logit, expert = e;
        }
        for (int mask = 2; mask; mask /= 2) {
            const float other = shuffle(best, mask);
            const u32 its = shuffle(expert, mask);
            if (other > best || (other == best && its < expert)) best = other, expert = its;
        }
#pragma unroll
        for (int i = 0; i < CHOICES / 4; i++)
            sum += power_of_two((c[i / 2][half * 2 + i % 2] - best) * 1.4426950408889634f);
        for (int mask = 2; mask; mask /= 2) sum += shuffle(sum, mask);
        const bool valid = rows.here[half] && rows.valid(half);
        if (t == 0 && (SHARERS == 1 || warp == 0)) {
            chosen[local + 8 * half] = valid ? (int)expert : -1;
            if (rows.here[half]) {
                router.chosen[rows.row[half]] = valid ? (int)expert : -1;
                router.gate[rows.row[half]] = valid ? 1.0f / sum : 0.0f;
            }
        }
    }
    sync();
    if (!router.counts || thread() >= EXPERTS) return;
    int hits = 0;
    for (int row = 0; row < ROUTED; row++) hits += chosen[row] == thread();
    router.counts[group() * EXPERTS + thread()] = hits;
}
