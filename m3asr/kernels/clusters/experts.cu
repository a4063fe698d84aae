// Both products of a layer's experts for up to some hundred tokens, in one launch that never lets the memory rest. Work
// comes in slices, of the first product HIDDEN, of the second WIDTH columns of one expert in pieces, and all slices of
// the first product stand in front of the second's. One warp of a program takes the next slice that nobody has and asks
// for its weights, which then come while eight others multiply a slice taken before. A slice of the second product needs
// the whole first one of its tokens: one more warp listens until it is there. Whoever has such a slice takes none of the
// first any more, and those that others took are under way: so no program waits for one that has not begun.

constexpr int MOST_TOKENS = 512, PART = 64, MOST_PARTS = 32 + MOST_TOKENS / PART;
constexpr int WARPS = 8, LANES = WARPS * 2;  // that multiply; of them a row of 16
constexpr int UP_SLICES = HIDDEN / UP_COLUMNS, DOWN_SLICES = WIDTH / DOWN_COLUMNS;
typedef unsigned short Number;  // bfloat16 or float16

// What the programs of a launch tell each other; zeros before it, and behind it again.
struct State {
    int taken, finished, done[MOST_PARTS];  // slices; programs; of each part, slices of the first product
};

struct Part {  // PART tokens of an expert, or what is left: so many of the list from `first` on
    int expert, first, count;
};

struct Routing {
    static constexpr int CHUNKS = MOST_TOKENS / 32;
    Part parts[MOST_PARTS];
    int tokens_of[MOST_TOKENS], before[CHUNKS][32], begins[32], count;  // count: of parts

    // Tokens by expert, in order: all programs must find the same parts.
    DEVICE void read(const int* chosen, int tokens) {
        const int lane = thread() % 32;
        constexpr int EACH = CHUNKS / WARPS;
        int expert[EACH], place[EACH];
        for (int i = thread(); i < CHUNKS * 32; i += THREADS) before[i / 32][i % 32] = 0;
        sync();
        if (thread() < 32 * WARPS) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int t = thread() + i * WARPS * 32;
                expert[i] = t < tokens ? written(chosen + t) : -1;
            }
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const u32 mates = alike(expert[i]);
                place[i] = ones(mates & ((1u << lane) - 1));
                if (expert[i] >= 0 && place[i] == 0) before[thread() / 32 + i * WARPS][expert[i]] = ones(mates);
            }
        }
        sync();
        if (thread() < 32) {
            int all = 0;
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                const int more = before[i][lane];
                before[i][lane] = all, all += more;
            }
            begins[lane] = all;
            together();
            int begin = 0, at = 0;
#pragma unroll
            for (int e = 0; e < 32; e++) {
                const int more = begins[e];
                if (e < lane) begin += more, at += (more + PART - 1) / PART;
            }
            together();
            begins[lane] = begin;
            for (; all > 0; all -= PART, begin += PART) parts[at++] = {lane, begin, all < PART ? all : PART};
            if (lane == 31) count = at;
        }
        sync();
        if (thread() < 32 * WARPS)
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (expert[i] >= 0)
                    tokens_of[begins[expert[i]] + before[thread() / 32 + i * WARPS][expert[i]] + place[i]] =
                        thread() + i * WARPS * 32;
        sync();
    }
};

// N columns of a product over K, weights in shared memory as the copy engine leaves them: in tiles of 128 bytes of all N
// rows. Warps share K, 64 bytes of a row at a time, of which a thread has 16 neighbours' bytes; the same permutation of
// the matrix unit's order for both operands. Rows of `a` come straight into registers, since no two warps read the same
// of them.
template <int K, int N> struct Slice {
    static constexpr int STEP = 64 / WEIGHT_BYTES, STEPS = (K / STEP + WARPS - 1) / WARPS, PITCH = N + 8;
    static constexpr int TILES = (K * WEIGHT_BYTES + 127) / 128, BYTES = TILES * N * 128;
    static constexpr int SUMS = WARPS * 16 * PITCH;
    static constexpr int EACH = N / LANES < 2 ? 2 : N / LANES;  // columns of a thread; with 16, half of them suffice
    static constexpr int VECTORS = 2 / WEIGHT_BYTES;  // of eight numbers of `a`, a step

    DEVICE static void bring(char* to, const Matrix& weights, int row, Flag* flag) {  // by one thread
        expected(flag, BYTES);
        for (int i = 0; i < TILES; i++) tile_copied(to + i * (N * 128), weights, i * 64, row, flag);
    }

    uint4 a[STEPS][VECTORS][2];
    DEVICE void load(const Number* from, const Routing& routing, const Part& part, int first) {
        const int g = thread() % 32 / 4, t = thread() % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int slot = first + half * 8 + g;
            const bool used = slot < part.count;
            const Number* row = from + (long long)routing.tokens_of[part.first + (used ? slot : 0)] * K;
#pragma unroll
            for (int i = 0; i < STEPS; i++)
#pragma unroll
                for (int v = 0; v < VECTORS; v++) {
                    const int step = i * WARPS + thread() / 32;
                    const int k = step * STEP + t * (8 * VECTORS) + v * 8;
                    a[i][v][half] = make_uint4(0, 0, 0, 0);
                    if (used && step < K / STEP) a[i][v][half] = written((const uint4*)(row + k));
                }
        }
    }

    // -> sums of each warp's part of K, shared (WARPS, 16, N) in rows of N + 8
    DEVICE void multiply(const char* weights, float* sums) const {
        const int warp = thread() / 32, g = thread() % 32 / 4, t = thread() % 4;
        float c[N / 8][4] = {};
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int step = i * WARPS + warp;
            if (step >= K / STEP) break;
#pragma unroll
            for (int tile = 0; tile < N / 8; tile++) {
                const int place = step / 2 * (N * 128) + (tile * 8 + g) * 128 + ((step % 2 * 4 + t) ^ g) * 16;
                const uint4 w = *(const uint4*)(weights + place);
#if WEIGHT_BYTES == 2
                const uint4 &low = a[i][0][0], &high = a[i][0][1];
                multiply_add(c[tile], low.x, high.x, low.y, high.y, w.x, w.y);
                multiply_add(c[tile], low.z, high.z, low.w, high.w, w.z, w.w);
#else
                const uint4 &low = a[i][0][0], &high = a[i][0][1], &low_2 = a[i][1][0], &high_2 = a[i][1][1];
                const uint2 w_0 = halves(w.x), w_1 = halves(w.y), w_2 = halves(w.z), w_3 = halves(w.w);
                multiply_add(c[tile], low.x, high.x, low.y, high.y, w_0.x, w_0.y);
                multiply_add(c[tile], low.z, high.z, low.w, high.w, w_1.x, w_1.y);
                multiply_add(c[tile], low_2.x, high_2.x, low_2.y, high_2.y, w_2.x, w_2.y);
                multiply_add(c[tile], low_2.z, high_2.z, low_2.w, high_2.w, w_3.x, w_3.y);
#endif
            }
        }
        float* to = sums + (warp * 16 + g) * PITCH + t * 2;
#pragma unroll
        for (int tile = 0; tile < N / 8; tile++) {
            *(float2*)(to + tile * 8) = make_float2(c[tile][0], c[tile][1]);
            *(float2*)(to + 8 * PITCH + tile * 8) = make_float2(c[tile][2], c[tile][3]);
        }
    }

    DEVICE static int column() { return thread() % LANES * EACH % N; }  // this thread's first
    DEVICE static bool mine() { return thread() % LANES * EACH < N; }
    float2 bias[EACH / 2], scale[EACH / 2];
    DEVICE void load_bias(const float* from, const float* scales) {  // of the slice's columns
#pragma unroll
        for (int i = 0; i < EACH / 2; i++) {
            bias[i] = weights8(from + column() + 2 * i);
            if (WEIGHT_BYTES == 1) scale[i] = weights8(scales + column() + 2 * i);
        }
    }
    // EACH columns of row thread() / LANES
    DEVICE void result(const float* sums, float (&v)[EACH]) const {
        const float* from = sums + thread() / LANES * PITCH + column();
#pragma unroll
        for (int i = 0; i < EACH / 2; i++) {
            float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int warp = 0; warp < WARPS; warp++) {
                const float2 s = *(const float2*)(from + warp * 16 * PITCH + 2 * i);
                total.x += s.x, total.y += s.y;
            }
            if (WEIGHT_BYTES == 1) total.x *= scale[i].x, total.y *= scale[i].y;
            v[2 * i] = total.x + bias[i].x, v[2 * i + 1] = total.y + bias[i].y;
        }
    }
};
typedef Slice<WIDTH, UP_COLUMNS> Up;
typedef Slice<HIDDEN, DOWN_COLUMNS> Down;

constexpr int STAGE = Up::BYTES > Down::BYTES ? Up::BYTES : Down::BYTES;
constexpr int SUMS = Up::SUMS > Down::SUMS ? Up::SUMS : Down::SUMS;

// What a program has in shared memory, one behind the other.
struct Place {
    char* weights;  // STAGES
    float* sums;
    Flag *full, *empty, *known, *ready;  // of each stage: weights; none; which slice it is; and what it multiplies
    int* taken;                          // slices
    Routing* routing;

    DEVICE Place(char* memory) {
        weights = memory, sums = (float*)(memory + STAGES * STAGE);
        full = (Flag*)(sums + SUMS), empty = full + STAGES, known = empty + STAGES, ready = known + STAGES;
        taken = (int*)(ready + STAGES), routing = (Routing*)(taken + STAGES);
    }
    DEVICE void open() const {
        for (int i = 0; i < STAGES; i++)
            opened(full + i, 1), opened(empty + i, WARPS), opened(known + i, 1), opened(ready + i, 1);
    }
};

// h[n] = activate(up_w[e] y[n] + up_b[e]), x[n] += scale * gates[n] * (down_w[e] h[n] + down_b[e]), e = chosen[n].
// Weights of 8 bits count times up_s[e] and down_s[e], one a column.
KERNEL experts(
    CONSTANT Matrix up_w, CONSTANT Matrix down_w, const Number* y, const int* chosen, const float* gates,
    const float* up_s, const float* up_b, const float* down_s, const float* down_b, Number* h, float* x, State* state,
    int tokens, float scale
) {
    SHARED(memory);
    release();
    const Place place(memory);
    Routing& routing = *place.routing;
    const int warp = uniform(thread() / 32), lane = thread() % 32;
    if (thread() == 0) place.open();
    wait();
    int next = 0;
    if (warp == WARPS && lane == 0) next = counted_by_all(&state->taken, STAGES);
    routing.read(chosen, tokens);
    const int ups = routing.count * UP_SLICES, all = ups + routing.count * DOWN_SLICES;

    if (warp == WARPS) {  // takes slices, brings their weights, and tells of those that are made
        for (int n = 0, over = 0; over < STAGES; n++) {
            const int stage = n % STAGES;
            int made = all;
            if (n >= STAGES) arrived(place.empty + stage, (n / STAGES - 1) % 2), made = place.taken[stage];
            const int slice = n < STAGES ? uniform(next) + n : uniform(next);
            if (lane == 0) {
                if (n >= STAGES - 1) next = counted_by_all(&state->taken, 1);
                place.taken[stage] = slice;
                arrive_here(place.known + stage);
                char* to = place.weights + stage * STAGE;
                if (slice < ups) {
                    const int row = routing.parts[slice / UP_SLICES].expert * HIDDEN + slice % UP_SLICES * UP_COLUMNS;
                    Up::bring(to, up_w, row, place.full + stage);
                } else if (slice < all) {
                    const int second = slice - ups, expert = routing.parts[second / DOWN_SLICES].expert;
                    const int row = expert * WIDTH + second % DOWN_SLICES * DOWN_COLUMNS;
                    Down::bring(to, down_w, row, place.full + stage);
                }
                if (made < ups) told(state->done + made / UP_SLICES);
            }
            over += slice >= all;
        }
    } else if (warp > WARPS) {  // listens
        for (int n = 0;; n++) {
            const int stage = n % STAGES;
            arrived(place.known + stage, n / STAGES % 2);
            const int slice = place.taken[stage];
            if (slice >= ups && slice < all)
                while (heard_of(state->done + (slice - ups) / DOWN_SLICES) < UP_SLICES) {}
            together();
            if (lane == 0) arrive_here(place.ready + stage);
            if (slice >= all) break;
        }
    } else if (warp < WARPS) {
        const int row = thread() / LANES;
        for (int n = 0;; n++) {
            const int stage = n % STAGES, parity = n / STAGES % 2;
            arrived(place.ready + stage, parity);
            const int slice = place.taken[stage];
            if (slice >= all) break;
            const char* weights = place.weights + stage * STAGE;
            if (slice < ups) {
                const Part part = routing.parts[slice / UP_SLICES];
                const int column = slice % UP_SLICES * UP_COLUMNS;
                Up up;
                up.load_bias(up_b + part.expert * HIDDEN + column, up_s + part.expert * HIDDEN + column);
                for (int first = 0; first < part.count; first += 16) {
                    up.load(y, routing, part, first);
                    if (first == 0) arrived(place.full + stage, parity);
                    up.multiply(weights, place.sums);
                    sync_eight();
                    float v[Up::EACH];
                    up.result(place.sums, v);
                    if (first + row < part.count) {
                        Number* to = h + (long long)routing.tokens_of[part.first + first + row] * HIDDEN;
                        to += column + Up::column();
#pragma unroll
                        for (int k = 0; k < Up::EACH; k += 4)
                            *(uint2*)(to + k) = make_uint2(
                                pair(activate(v[k]), activate(v[k + 1])), pair(activate(v[k + 2]), activate(v[k + 3])));
                    }
                    sync_eight();
                }
            } else {
                const Part part = routing.parts[(slice - ups) / DOWN_SLICES];
                const int column = (slice - ups) % DOWN_SLICES * DOWN_COLUMNS;
                Down down;
                down.load_bias(down_b + part.expert * WIDTH + column, down_s + part.expert * WIDTH + column);
                for (int first = 0; first < part.count; first += 16) {
                    const bool used = first + row < part.count;
                    const int token = routing.tokens_of[part.first + (used ? first + row : 0)];
                    float2* to = (float2*)(x + (long long)token * WIDTH + column + Down::column());
                    down.load(h, routing, part, first);
                    float2 before[Down::EACH / 2];
#pragma unroll
                    for (int k = 0; k < Down::EACH / 2; k++) before[k] = written((const float2*)to + k);
                    const float gate = gates ? written(gates + token) * scale : scale;
                    if (first == 0) arrived(place.full + stage, parity);
                    down.multiply(weights, place.sums);
                    sync_eight();
                    float v[Down::EACH];
                    down.result(place.sums, v);
                    if (used && Down::mine())
#pragma unroll
                        for (int k = 0; k < Down::EACH / 2; k++)
                            to[k] = make_float2(before[k].x + gate * v[2 * k], before[k].y + gate * v[2 * k + 1]);
                    sync_eight();
                }
            }
            together();
            if (lane == 0) arrive_here(place.empty + stage);
        }
    }
    sync();
    if (thread() == 0 && counted_by_all(&state->finished, 1) == groups() - 1) {
        state->taken = state->finished = 0;
        for (int i = 0; i < MOST_PARTS; i++) state->done[i] = 0;
    }
}
