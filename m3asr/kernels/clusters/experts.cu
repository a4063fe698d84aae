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
        int expert[EACH], place[EACH], more[CHUNKS];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int t = thread() + i * WARPS * 32;
            expert[i] = thread() < 32 * WARPS && t < tokens ? written(chosen + t) : -1;
        }
        for (int i = thread(); i < CHUNKS * 32; i += THREADS) before[i / 32][i % 32] = 0;
        sync();
        if (thread() < 32 * WARPS) {
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
            for (int i = 0; i < CHUNKS; i++) more[i] = before[i][lane];
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) before[i][lane] = all, all += more[i];
            begins[lane] = all;
            together();
            int begin = 0, at = 0;
#pragma unroll
            for (int e = 0; e < 32; e++) {
                const int its = begins[e];
                if (e < lane) begin += its, at += (its + PART - 1) / PART;
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
// rows. Warps share K in KG parts, 64 bytes of a row at a time, and the columns in WARPS / KG. Of 64 bytes a thread has
// 16 neighbours: the same permutation of the matrix unit's order for both operands. Rows of `a` come straight into
// registers.
constexpr int VECTORS = 2 / WEIGHT_BYTES;  // of eight numbers of `a`, for 64 bytes of weights

template <int K, int N, int KG> struct Slice {
    static constexpr int STEP = 64 / WEIGHT_BYTES, STEPS = (K / STEP + KG - 1) / KG, PITCH = N + 8;
    static constexpr int TILES = (K * WEIGHT_BYTES + 127) / 128, BYTES = TILES * N * 128;
    static constexpr int MINE = N * KG / WARPS;  // columns of a warp
    static constexpr int SUMS = KG * 16 * PITCH;
    static constexpr int EACH = N / LANES < 2 ? 2 : N / LANES;  // columns of a thread; with 16, half of them suffice

    DEVICE static int column() { return thread() % LANES * EACH % N; }  // this thread's first
    DEVICE static bool mine() { return thread() % LANES * EACH < N; }

    DEVICE static void bring(char* to, const Matrix& weights, int row, Flag* flag) {  // by one thread
        expected(flag, BYTES);
        for (int i = 0; i < TILES; i++) tile_copied(to + i * (N * 128), weights, i * 64, row, flag);
    }

    template <int MOST> DEVICE static void load(
        uint4 (&a)[MOST][VECTORS][2], const Number* from, const Routing& routing, const Part& part, int first
    ) {
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
                    const int step = i * KG + thread() / 32 % KG;
                    const int k = step * STEP + t * (8 * VECTORS) + v * 8;
                    a[i][v][half] = make_uint4(0, 0, 0, 0);
                    if (used && step < K / STEP) a[i][v][half] = written((const uint4*)(row + k));
                }
        }
    }

    // -> sums of the parts of K, shared (KG, 16, N) in rows of N + 8
    template <int MOST>
    DEVICE static void multiply(const uint4 (&a)[MOST][VECTORS][2], const char* weights, float* sums) {
        const int warp = thread() / 32, g = thread() % 32 / 4, t = thread() % 4, column = warp / KG * MINE;
        float c[MINE / 8][4] = {};
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int step = i * KG + warp % KG;
            if (step >= K / STEP) break;
#pragma unroll
            for (int tile = 0; tile < MINE / 8; tile++) {
                const int row = column + tile * 8 + g;
                const char* place = weights + step / 2 * (N * 128) + row * 128 + ((step % 2 * 4 + t) ^ g) * 16;
                const uint4 w = *(const uint4*)place;
                const uint4 &low = a[i][0][0], &high = a[i][0][1];
#if WEIGHT_BYTES == 2
                multiply_add(c[tile], low.x, high.x, low.y, high.y, w.x, w.y);
                multiply_add(c[tile], low.z, high.z, low.w, high.w, w.z, w.w);
#else
                const uint4 &low_2 = a[i][1][0], &high_2 = a[i][1][1];
                const uint2 w_0 = halves(w.x), w_1 = halves(w.y), w_2 = halves(w.z), w_3 = halves(w.w);
                multiply_add(c[tile], low.x, high.x, low.y, high.y, w_0.x, w_0.y);
                multiply_add(c[tile], low.z, high.z, low.w, high.w, w_1.x, w_1.y);
                multiply_add(c[tile], low_2.x, high_2.x, low_2.y, high_2.y, w_2.x, w_2.y);
                multiply_add(c[tile], low_2.z, high_2.z, low_2.w, high_2.w, w_3.x, w_3.y);
#endif
            }
        }
        float* to = sums + (warp % KG * 16 + g) * PITCH + column + t * 2;
#pragma unroll
        for (int tile = 0; tile < MINE / 8; tile++) {
            *(float2*)(to + tile * 8) = make_float2(c[tile][0], c[tile][1]);
            *(float2*)(to + 8 * PITCH + tile * 8) = make_float2(c[tile][2], c[tile][3]);
        }
    }

    // EACH columns of row thread() / LANES; bias and scale of this thread's columns
    DEVICE static void result(const float* sums, const float2* bias, const float2* scale, float (&v)[EACH]) {
        const float* from = sums + thread() / LANES * PITCH + column();
#pragma unroll
        for (int i = 0; i < EACH / 2; i++) {
            float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int part = 0; part < KG; part++) {
                const float2 s = *(const float2*)(from + part * 16 * PITCH + 2 * i);
                total.x += s.x, total.y += s.y;
            }
            if (WEIGHT_BYTES == 1) total.x *= scale[i].x, total.y *= scale[i].y;
            v[2 * i] = total.x + bias[i].x, v[2 * i + 1] = total.y + bias[i].y;
        }
    }
};
typedef Slice<WIDTH, UP_COLUMNS, 4> Up;
typedef Slice<HIDDEN, DOWN_COLUMNS, 8> Down;

DEVICE constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int STAGE = most(Up::BYTES, Down::BYTES), SUMS = most(Up::SUMS, Down::SUMS);

// What a program has in shared memory, one behind the other.
struct Place {
    char* weights;  // STAGES
    float* sums;
    Flag *full, *empty, *known, *ready, *made;  // of each stage: weights; none; which slice, what it multiplies; results
    int* taken;                          // slices
    Routing* routing;

    DEVICE Place(char* memory) {
        weights = memory, sums = (float*)(memory + STAGES * STAGE);
        full = (Flag*)(sums + SUMS), empty = full + STAGES, known = empty + STAGES, ready = known + STAGES;
        made = ready + STAGES, taken = (int*)(made + STAGES), routing = (Routing*)(taken + STAGES);
    }
    DEVICE void open() const {
        for (int i = 0; i < STAGES; i++)
            opened(full + i, 1), opened(empty + i, 1), opened(known + i, 1), opened(ready + i, 1), opened(made + i, 1);
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
    if (warp == WARPS && lane == 0) next = counted_by_all(&state->taken, 1);
    routing.read(chosen, tokens);
    const int ups = routing.count * UP_SLICES, all = ups + routing.count * DOWN_SLICES;

    if (warp == WARPS) {  // takes slices, brings their weights, and tells of those that are made
        for (int n = 0, over = 0; over < STAGES; n++) {
            const int stage = n % STAGES;
            const int before = n / STAGES - 1;
            int made = all;
            if (n >= STAGES) arrived(place.empty + stage, before % 2), made = place.taken[stage];
            const int slice = uniform(next);
            if (lane == 0) {
                next = counted_by_all(&state->taken, 1);
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
                if (n >= STAGES) arrived(place.made + stage, before % 2);
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
    } else {
        // Rows and what they are added to are asked for one pass ahead, as far as they are there.
        const int row = thread() / LANES;
        uint4 a[most(Up::STEPS, Down::STEPS)][VECTORS][2];
        float2 before[Down::EACH / 2], bias[most(Up::EACH, Down::EACH) / 2], factor[most(Up::EACH, Down::EACH) / 2];
        float2* to = nullptr;
        float gate = 0.0f;
        Part part;
        auto load = [&](int slice, int first) {
            if (slice < ups) return Up::load(a, y, routing, part, first);
            Down::load(a, h, routing, part, first);
            const int token = routing.tokens_of[part.first + (first + row < part.count ? first + row : 0)];
            to = (float2*)(x + (long long)token * WIDTH + (slice - ups) % DOWN_SLICES * DOWN_COLUMNS + Down::column());
#pragma unroll
            for (int k = 0; k < Down::EACH / 2; k++) before[k] = written((const float2*)to + k);
            gate = gates ? written(gates + token) * scale : scale;
        };
        auto begin = [&](int slice) {
            if (slice < all) part = routing.parts[slice < ups ? slice / UP_SLICES : (slice - ups) / DOWN_SLICES];
            if (slice < all) load(slice, 0);
        };
        arrived(place.ready, 0);
        int slice = place.taken[0];
        begin(slice);
        for (int n = 0; slice < all;) {
            const int stage = n % STAGES, count = part.count, listed = part.first;
            const bool up = slice < ups;
            const int column = up ? slice % UP_SLICES * UP_COLUMNS : (slice - ups) % DOWN_SLICES * DOWN_COLUMNS;
            const int columns = up ? part.expert * HIDDEN + column + Up::column()
                                   : part.expert * WIDTH + column + Down::column();
#pragma unroll
            for (int i = 0; i < most(Up::EACH, Down::EACH) / 2; i++)
                if (i < (up ? Up::EACH : Down::EACH) / 2) {
                    bias[i] = weights8((up ? up_b : down_b) + columns + 2 * i);
                    if (WEIGHT_BYTES == 1) factor[i] = weights8((up ? up_s : down_s) + columns + 2 * i);
                }
            arrived(place.full + stage, n / STAGES % 2);
            const char* weights = place.weights + stage * STAGE;
            int next = slice;
            for (int first = 0; first < count; first += 16) {
                const bool used = first + row < count, last = first + 16 >= count;
                float2 added[Down::EACH / 2], *added_to = to;
                const float gated = gate;
#pragma unroll
                for (int k = 0; k < Down::EACH / 2; k++) added[k] = before[k];
                if (up) Up::multiply(a, weights, place.sums);
                else Down::multiply(a, weights, place.sums);
                bool there = true;
                if (last) {
                    n++;
                    there = uniform(is_there(place.ready + n % STAGES, n / STAGES % 2));
                    if (there) begin(next = place.taken[n % STAGES]);
                } else {
                    load(slice, first + 16);
                }
                sync_eight();
                if (last && thread() == 0) arrive_here(place.empty + stage);
                if (up) {
                    float v[Up::EACH];
                    Up::result(place.sums, bias, factor, v);
                    if (used) {
                        Number* made = h + (long long)routing.tokens_of[listed + first + row] * HIDDEN;
#pragma unroll
                        for (int k = 0; k < Up::EACH; k += 4)
                            *(uint2*)(made + column + Up::column() + k) = make_uint2(
                                pair(activate(v[k]), activate(v[k + 1])), pair(activate(v[k + 2]), activate(v[k + 3])));
                    }
                } else {
                    float v[Down::EACH];
                    Down::result(place.sums, bias, factor, v);
                    if (used && Down::mine())
#pragma unroll
                        for (int k = 0; k < Down::EACH / 2; k++)
                            added_to[k] = make_float2(added[k].x + gated * v[2 * k], added[k].y + gated * v[2 * k + 1]);
                }
                sync_eight();
                if (last && thread() == 0) arrive_here(place.made + stage);
                if (!there) {
                    arrived(place.ready + n % STAGES, n / STAGES % 2);
                    begin(next = place.taken[n % STAGES]);
                }
            }
            slice = next;
        }
    }
    sync();
    if (thread() == 0 && counted_by_all(&state->finished, 1) == groups() - 1) {
        state->taken = state->finished = 0;
        for (int i = 0; i < MOST_PARTS; i++) state->done[i] = 0;
    }
}
