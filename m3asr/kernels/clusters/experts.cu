// Both products of a layer's experts for few tokens. Programs walk over the experts that have tokens and slices of
// their columns: a slice's weights are asked for as soon as the routing is known, into registers, and serve the
// expert's tokens 16 at a time. Nothing is sorted.

constexpr int MOST_TOKENS = 128, LINE_H = HIDDEN + 32, UP_COLUMNS = 64, DOWN_COLUMNS = 32;

struct Routing {
    int *chosen, *tokens_of, *present, *count;  // shared
    u32 hit;  // experts that have tokens

    DEVICE Routing(char* memory) {
        chosen = (int*)memory, tokens_of = chosen + MOST_TOKENS, present = tokens_of + MOST_TOKENS;
        count = present + 32;
    }
    DEVICE void read(const int* from, int tokens) {
        if (thread() < 32) present[thread()] = 0;
        sync();
        for (int t = thread(); t < tokens; t += THREADS) {
            int e = written(from + t);
            chosen[t] = e;
            if (e >= 0) present[e] = 1;
        }
        sync();
        hit = ballot(present[thread() % 32] != 0);
    }
    DEVICE int expert(int place) const {  // the place-th of those that have tokens
        u32 left = hit;
        for (int i = 0; i < place; i++) left &= left - 1;
        return ones((left & (0u - left)) - 1);
    }
    // An expert's tokens in order, found by one warp; there behind `sync`.
    DEVICE void list(int expert, int tokens) {
        const int lane = thread() % 32;
        if (thread() / 32 != 0) return;
        int found = 0;
        for (int first = 0; first < tokens; first += 32) {
            int t = first + lane;
            u32 mine = ballot(t < tokens && chosen[t] == expert);
            if (mine >> lane & 1) tokens_of[found + ones(mine & ((1u << lane) - 1))] = t;
            found += ones(mine);
        }
        if (lane == 0) *count = found;
    }
};

// Rows of `from` (., K) for 16 tokens of the list, zeros behind it -> shared, in rows of K + 32.
template <int K> DEVICE void gather(Number* to, const Number* from, const Routing& routing, int first, int count) {
#pragma unroll
    for (int n = 0; n < 16 * K / 8 / THREADS; n++) {
        int i = thread() + n * THREADS, slot = first + i / (K / 8), part = i % (K / 8) * 8;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (slot < count) v = written((const uint4*)(from + routing.tokens_of[slot] * K + part));
        *(uint4*)(to + i / (K / 8) * (K + 32) + part) = v;
    }
}

// h[n] = activate(up_w[e] y[n] + up_b[e]), e = chosen[n]
// Of the second product's weights, those of the same experts come into the L2 cache.
KERNEL experts_up(
    const Number* y, const int* chosen, const Number* up_w, const float* up_b, const Number* down_w, Number* h,
    int tokens
) {
    SHARED(memory);
    MARK(0);
    wait();  // before the release: the second product's programs rely on it
    release();
    MARK(1);
    Number* a = (Number*)memory;
    float* sums = (float*)(a + 16 * LINE);
    typedef Product<WIDTH, UP_COLUMNS, 4> Up;
    Routing routing((char*)(sums + Up::SUMS));
    routing.read(chosen, tokens);
    MARK(2);
    constexpr int SLICES = HIDDEN / UP_COLUMNS;
    for (int item = group(); item < ones(routing.hit) * SLICES; item += groups()) {
        const int expert = routing.expert(item / SLICES), column = item % SLICES * UP_COLUMNS;
        Up up;
        up.load(up_w + ((long long)expert * HIDDEN + column) * WIDTH);
        up.load_bias(up_b + expert * HIDDEN + column);
        const Number* later = down_w + ((long long)expert * HIDDEN + column) * WIDTH;  // as large a part of them
        for (int i = thread(); i < UP_COLUMNS * WIDTH / 64; i += THREADS) ahead(later + i * 64);
        routing.list(expert, tokens);
        sync();
        MARK(3);
        const int count = *routing.count, row = thread() / LANES, j = thread() % LANES;
        for (int first = 0; first < count; first += 16) {
            gather<WIDTH>(a, y, routing, first, count);
            sync();
            MARK(4);
            up.multiply(a, sums);
            sync();
            MARK(5);
            float v[Up::EACH];
            up.result(sums, v);
            if (first + row < count)
                *(uint2*)(h + routing.tokens_of[first + row] * HIDDEN + column + j * Up::EACH) =
                    make_uint2(pair(activate(v[0]), activate(v[1])), pair(activate(v[2]), activate(v[3])));
            MARK(6);
        }
        sync();
    }
}

// x[n] += scale * gates[n] * (down_w[e] h[n] + down_b[e]). The launch before was `experts_up`: all but h is there.
KERNEL experts_down(
    const Number* h, const int* chosen, const float* gates, const Number* down_w, const float* down_b, float* x,
    int tokens, float scale
) {
    SHARED(memory);
    MARK(8);
    release();
    Number* a = (Number*)memory;
    float* sums = (float*)(a + 16 * LINE_H);
    typedef Product<HIDDEN, DOWN_COLUMNS, 8> Down;
    Routing routing((char*)(sums + Down::SUMS));
    routing.read(chosen, tokens);
    MARK(9);
    constexpr int SLICES = WIDTH / DOWN_COLUMNS;
    for (int item = group(); item < ones(routing.hit) * SLICES; item += groups()) {
        const int expert = routing.expert(item / SLICES), column = item % SLICES * DOWN_COLUMNS;
        Down down;
        down.load(down_w + ((long long)expert * WIDTH + column) * HIDDEN);
        down.load_bias(down_b + expert * WIDTH + column);
        routing.list(expert, tokens);
        sync();
        MARK(10);
        const int count = *routing.count, row = thread() / LANES, j = thread() % LANES;
        for (int first = 0; first < count; first += 16) {
            const bool used = first + row < count;
            const int token = routing.tokens_of[used ? first + row : 0];
            const int at = token * WIDTH + column + 2 * j;
            float2 before = written((const float2*)(x + at));
            const float gate = gates ? written(gates + token) * scale : scale;
            wait();
            MARK(11);
            gather<HIDDEN>(a, h, routing, first, count);
            sync();
            MARK(12);
            down.multiply(a, sums);
            sync();
            MARK(13);
            float v[2];
            down.result(sums, v);
            before.x += gate * v[0], before.y += gate * v[1];
            if (used) *(float2*)(x + at) = before;
            MARK(14);
        }
        sync();
    }
    wait();  // also without any work
}
