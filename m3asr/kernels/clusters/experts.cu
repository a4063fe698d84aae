// Both products of a layer's experts for up to 256 tokens, in one launch that never lets the memory rest. Work
// comes in slices, of the first product HIDDEN, of the second WIDTH columns of one expert in pieces, and all slices of
// the first product stand in front of the second's. One warp of a program takes the next slice that nobody has and asks
// for its weights; one more brings the rows that they multiply, 16 a pass, of the second product when all of the first
// is there; eight multiply. Whoever has a slice of the second product takes none of the first any more, and those that
// others took are under way: so no program waits for one that has not begun.

constexpr int WARPS = 8, LANES = WARPS * 2;  // that multiply; of them a row of 16
constexpr int MOST_PARTS = MOST_EXPERTS + MOST_TOKENS / PART;
static_assert(MOST_TOKENS == 32 * WARPS && MOST_EXPERTS == 32, "a thread a token, a lane an expert");
constexpr int ROWS_WARP = WARPS, WEIGHTS_WARP = WARPS + 1;
constexpr int UP_SLICES = HIDDEN / UP_COLUMNS, DOWN_SLICES = WIDTH / DOWN_COLUMNS;
constexpr int ROW = (WIDTH > HIDDEN ? WIDTH : HIDDEN) + 8;  // numbers of a row in shared memory
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
    float gate_of[MOST_TOKENS];

    // Tokens by expert, in order: all programs must find the same parts. The list is there for those who meet.
    DEVICE void read(const int* chosen, const float* gates, int tokens) {
        const int t = thread(), lane = t % 32, warp = t / 32;
        const int expert = t < tokens ? written(chosen + t) : -1;
        const float gate = gates && t < tokens ? written(gates + t) : 1.0f;
        int place = 0;
        if (warp < WARPS) before[warp][lane] = 0;
        together();
        if (warp < WARPS && warp * 32 < tokens) {
            const u32 mates = alike(expert);
            place = ones(mates & ((1u << lane) - 1));
            if (expert >= 0 && place == 0) before[warp][expert] = ones(mates);
        }
        sync();
        if (warp == 0) {
            int all = 0, begin = 0, at = 0, more[CHUNKS];
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) more[i] = before[i][lane];
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) before[i][lane] = all, all += more[i];
            begins[lane] = all;
            together();
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
        if (warp == WEIGHTS_WARP) return;
        if (expert >= 0) {
            const int at = begins[expert] + before[warp][expert] + place;
            tokens_of[at] = t, gate_of[at] = gate;
        }
        sync_nine();
    }
};

// N columns of a product over K, weights in shared memory as the copy engine leaves them: in tiles of 128 bytes of all
// N rows. Warps share K in KG parts, 64 bytes of a row at a time, and the columns in WARPS / KG. Of 128 bytes a thread
// has a pair of 16, one a step: the same permutation of the matrix unit's order for both operands, and no two threads of
// a request want the same bank.
template <int K, int N, int KG> struct Slice {
    static constexpr int TILES = (K * WEIGHT_BYTES + 127) / 128, BYTES = TILES * N * 128, PITCH = N + 8;
    static constexpr int STEPS = (2 * TILES + KG - 1) / KG, MINE = N * KG / WARPS;  // columns of a warp
    static constexpr int SUMS = KG * 16 * PITCH;
    static constexpr int EACH = N / LANES < 2 ? 2 : N / LANES;  // columns of a thread; with 16, half of them suffice

    DEVICE static int column() { return thread() % LANES * EACH % N; }  // this thread's first
    DEVICE static bool mine() { return thread() % LANES * EACH < N; }

    // Weights to `to`, and what is said of each column to `of_columns`; by one thread.
    DEVICE static void bring(
        char* to, float* of_columns, const Matrix& weights, const float* bias, const float* scale, int row, Flag* flag
    ) {
        expected(flag, BYTES + N * (WEIGHT_BYTES == 1 ? 8 : 4));
        for (int i = 0; i < TILES; i++) tile_copied(to + i * (N * 128), weights, i * 64, row, flag);
        copied(of_columns, bias + row, N * 4, flag);
        if (WEIGHT_BYTES == 1) copied(of_columns + N, scale + row, N * 4, flag);
    }

    // rows: shared (16, K) in rows of ROW -> sums of the parts of K, shared (KG, 16, N) in rows of N + 8
    DEVICE static void multiply(const Number* rows, const char* weights, float* sums) {
        const int warp = thread() / 32, g = thread() % 32 / 4, t = thread() % 4, column = warp / KG * MINE;
        float c[MINE / 8][4] = {};
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int step = i * KG + warp % KG, sixteen = step / 2 * 8 + t * 2 + step % 2;  // of 16 bytes, which
            const int k = sixteen * (16 / WEIGHT_BYTES);
            if (step >= 2 * TILES) break;
            uint4 low[2 / WEIGHT_BYTES], high[2 / WEIGHT_BYTES];
#pragma unroll
            for (int v = 0; v < 2 / WEIGHT_BYTES; v++) {
                low[v] = high[v] = make_uint4(0, 0, 0, 0);
                if (k < K) {
                    low[v] = *(const uint4*)(rows + g * ROW + k + 8 * v);
                    high[v] = *(const uint4*)(rows + (g + 8) * ROW + k + 8 * v);
                }
            }
#pragma unroll
            for (int tile = 0; tile < MINE / 8; tile++) {
                const char* at = weights + step / 2 * (N * 128) + (column + tile * 8 + g) * 128;
                const uint4 w = *(const uint4*)(at + (sixteen % 8 ^ g) * 16);
#if WEIGHT_BYTES == 2
                multiply_add(c[tile], low[0].x, high[0].x, low[0].y, high[0].y, w.x, w.y);
                multiply_add(c[tile], low[0].z, high[0].z, low[0].w, high[0].w, w.z, w.w);
#else
                const uint2 w_0 = halves(w.x), w_1 = halves(w.y), w_2 = halves(w.z), w_3 = halves(w.w);
                multiply_add(c[tile], low[0].x, high[0].x, low[0].y, high[0].y, w_0.x, w_0.y);
                multiply_add(c[tile], low[0].z, high[0].z, low[0].w, high[0].w, w_1.x, w_1.y);
                multiply_add(c[tile], low[1].x, high[1].x, low[1].y, high[1].y, w_2.x, w_2.y);
                multiply_add(c[tile], low[1].z, high[1].z, low[1].w, high[1].w, w_3.x, w_3.y);
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

    // EACH columns of row thread() / LANES
    DEVICE static void result(const float* sums, const float* of_columns, float (&v)[EACH]) {
        const float* from = sums + thread() / LANES * PITCH + column();
#pragma unroll
        for (int i = 0; i < EACH; i += 2) {
            float2 total = make_float2(0.0f, 0.0f), bias = *(const float2*)(of_columns + column() + i);
#pragma unroll
            for (int part = 0; part < KG; part++) {
                const float2 s = *(const float2*)(from + part * 16 * PITCH + i);
                total.x += s.x, total.y += s.y;
            }
            if (WEIGHT_BYTES == 1) {
                const float2 scale = *(const float2*)(of_columns + N + column() + i);
                total.x *= scale.x, total.y *= scale.y;
            }
            v[i] = total.x + bias.x, v[i + 1] = total.y + bias.y;
        }
    }
};
typedef Slice<WIDTH, UP_COLUMNS, 4> Up;
typedef Slice<HIDDEN, DOWN_COLUMNS, 8> Down;

// What a program has in shared memory, one behind the other.
struct Place {
    static constexpr int STAGE = Up::BYTES > Down::BYTES ? Up::BYTES : Down::BYTES;
    static constexpr int SUMS = Up::SUMS > Down::SUMS ? Up::SUMS : Down::SUMS;
    char* memory;
    Number* rows_of;     // BUFFERS
    float *sums, *each;  // each: of the columns of two turns of the stages
    Flag *full, *empty, *known, *made, *rows_full, *rows_empty;  // of each stage; of each buffer of rows
    int* taken;          // slices
    Routing* routing;

    DEVICE Place(char* memory) : memory(memory) {
        rows_of = (Number*)(memory + STAGES * STAGE);
        sums = (float*)(rows_of + BUFFERS * 16 * ROW), each = sums + SUMS;
        full = (Flag*)(each + 2 * STAGES * 2 * UP_COLUMNS), empty = full + STAGES, known = empty + STAGES;
        made = known + STAGES, rows_full = made + STAGES, rows_empty = rows_full + BUFFERS;
        taken = (int*)(rows_empty + BUFFERS), routing = (Routing*)(taken + STAGES);
    }
    DEVICE void open() const {
        for (int i = 0; i < STAGES; i++) {
            opened(full + i, 1), opened(empty + i, 1), opened(known + i, 1), opened(made + i, 1);
        }
        for (int i = 0; i < BUFFERS; i++) opened(rows_full + i, 1), opened(rows_empty + i, 1);
        all_opened();
    }
    DEVICE char* weights(int stage) const { return memory + stage * STAGE; }
    DEVICE float* of_columns(int n) const { return each + n % (2 * STAGES) * 2 * UP_COLUMNS; }
    DEVICE Number* rows(int buffer) const { return rows_of + buffer * 16 * ROW; }
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
    if (warp == WEIGHTS_WARP && lane == 0) described(up_w), described(down_w);
    wait();
    int next = 0;
    if (warp == WEIGHTS_WARP && lane == 0) next = counted_by_all(&state->taken);
    routing.read(chosen, gates, tokens);
    const int ups = routing.count * UP_SLICES, all = ups + routing.count * DOWN_SLICES;
    auto part_of = [&](int slice) { return slice < ups ? slice / UP_SLICES : (slice - ups) / DOWN_SLICES; };

    if (warp == WEIGHTS_WARP) {  // takes slices, brings their weights, and tells of those that are made
        if (lane == 0)
            for (int n = 0, over = 0; over < STAGES; n++) {
                const int stage = n % STAGES;
                int made = all;
                if (n >= STAGES) arrived(place.empty + stage, n / STAGES % 2 ^ 1), made = place.taken[stage];
                const int slice = next;
                // Whoever has none left asks for none: each claim has arrived before the counter is reset.
                next = slice < all ? counted_by_all(&state->taken) : all;
                place.taken[stage] = slice;
                arrive_here(place.known + stage);
                char* to = place.weights(stage);
                float* of_columns = place.of_columns(n);
                if (slice < ups) {
                    const int row = routing.parts[slice / UP_SLICES].expert * HIDDEN + slice % UP_SLICES * UP_COLUMNS;
                    Up::bring(to, of_columns, up_w, up_b, up_s, row, place.full + stage);
                } else if (slice < all) {
                    const int second = slice - ups, expert = routing.parts[second / DOWN_SLICES].expert;
                    const int row = expert * WIDTH + second % DOWN_SLICES * DOWN_COLUMNS;
                    Down::bring(to, of_columns, down_w, down_b, down_s, row, place.full + stage);
                } else {
                    over++;
                }
                if (n >= STAGES) arrived(place.made + stage, n / STAGES % 2 ^ 1);
                if (made < ups) told(state->done + made / UP_SLICES);
            }
        together();
    } else if (warp == ROWS_WARP) {
        for (int n = 0, pass = 0;; n++) {
            const int stage = n % STAGES;
            arrived(place.known + stage, n / STAGES % 2);
            const int slice = place.taken[stage];
            if (slice >= all) break;
            const int number = part_of(slice);
            if (slice >= ups) {
                while (heard_of(state->done + number) < UP_SLICES) {}
                written_seen_by_copies();
            }
            const Part part = routing.parts[number];
            const Number* from = slice < ups ? y : h;
            const int width = slice < ups ? WIDTH : HIDDEN;
            for (int first = 0; first < part.count; first += 16, pass++) {
                const int buffer = pass % BUFFERS, rows = part.count - first < 16 ? part.count - first : 16;
                arrived(place.rows_empty + buffer, pass / BUFFERS % 2 ^ 1);
                if (lane == 0) expected(place.rows_full + buffer, rows * width * 2);
                if (lane < rows) {
                    const int token = routing.tokens_of[part.first + first + lane];
                    copied(place.rows(buffer) + lane * ROW, from + (long long)token * width, width * 2,
                           place.rows_full + buffer);
                }
            }
        }
    } else {
        const int row = thread() / LANES;
        for (int n = 0, pass = 0;; n++) {
            const int stage = n % STAGES, parity = n / STAGES % 2;
            arrived(place.known + stage, parity);
            const int slice = place.taken[stage];
            if (slice >= all) break;
            const bool up = slice < ups;
            const Part part = routing.parts[part_of(slice)];
            for (int first = 0; first < part.count; first += 16, pass++) {
                const int buffer = pass % BUFFERS;
                const bool used = first + row < part.count;
                const int listed = part.first + (used ? first + row : 0), token = routing.tokens_of[listed];
                const float gate = scale * routing.gate_of[listed];
                if (first == 0) arrived(place.full + stage, parity);
                arrived(place.rows_full + buffer, pass / BUFFERS % 2);
                if (up) Up::multiply(place.rows(buffer), place.weights(stage), place.sums);
                else Down::multiply(place.rows(buffer), place.weights(stage), place.sums);
                sync_eight();
                if (thread() == 0) {
                    arrive_here(place.rows_empty + buffer);
                    if (first + 16 >= part.count) arrive_here(place.empty + stage);
                }
                if (up) {
                    float v[Up::EACH];
                    Up::result(place.sums, place.of_columns(n), v);
                    Number* to = h + (long long)token * HIDDEN + slice % UP_SLICES * UP_COLUMNS + Up::column();
                    if (used)
#pragma unroll
                        for (int k = 0; k < Up::EACH; k += 2)
                            *(u32*)(to + k) = pair(activate(v[k]), activate(v[k + 1]));
                } else {
                    float v[Down::EACH];
                    Down::result(place.sums, place.of_columns(n), v);
                    float* to = x + (long long)token * WIDTH + (slice - ups) % DOWN_SLICES * DOWN_COLUMNS;
                    to += Down::column();
                    if (used && Down::mine())
#pragma unroll
                        for (int k = 0; k < Down::EACH; k += 2)
                            add_to((float2*)(to + k), make_float2(gate * v[k], gate * v[k + 1]));
                }
                sync_eight();
            }
            if (thread() == 0) arrive_here(place.made + stage);
        }
    }
    sync();
    if (thread() == 0 && counted_by_all(&state->finished) == groups() - 1) {
        state->taken = state->finished = 0;
        for (int i = 0; i < MOST_PARTS; i++) state->done[i] = 0;
    }
}
