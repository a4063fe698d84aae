// Both products of a layer's experts: a cluster an expert that has tokens, whose weights are asked for as soon as the
// routing is known and stay while the cluster goes through the expert's tokens, 16 at a time.

constexpr int MOST_TOKENS = 1024;

// x[n] += scale * gate[n] * down_w[e] activate(up_w[e] y[n] + up_b[e]) + ..., e = chosen[n]; nothing where e is -1.
KERNEL experts(
    const Number* y, const int* chosen, const float* gates, const Number* up_w, const float* up_b, const Number* down_w,
    const float* down_b, float* x, Number* h_place, int tokens, float scale
) {
    SHARED(memory);
    MARK(0);
    wait();
    MARK(1);
    release();
    arrive();
    typedef Product<WIDTH, SHARE, 4> Up;
    typedef Product<HIDDEN, COLUMNS, 8> Down;
    constexpr int SUMS = Up::SUMS > Down::SUMS ? Up::SUMS : Down::SUMS;
    Number *weights = (Number*)memory, *a = weights + COLUMNS * (HIDDEN + 32), *h = a + 16 * (WIDTH + 32);
    float* sums = (float*)(h + 16 * (HIDDEN + 32));
    int *list = (int*)(sums + SUMS), *present = list + MOST_TOKENS, *found = present + 32;
    const int me = rank(), warp = thread() / 32, lane = thread() % 32, row = thread() / LANES, j = thread() % LANES;
    if (thread() < 32) present[thread()] = 0;
    sync();
    for (int t = thread(); t < tokens; t += THREADS) {
        int e = written(chosen + t);
        list[t] = e;
        if (e >= 0) present[e] = 1;
    }
    sync();
    // The group-th expert of those that have tokens; every warp finds it.
    u32 hit = ballot(present[lane] != 0);
    if (group() >= ones(hit)) {
        all_here();
        return;
    }
    for (int i = 0; i < group(); i++) hit &= hit - 1;
    const int expert = ones((hit & -hit) - 1);
    MARK(2);
    Up up;
    Down down;  // but for its weights
    up.load_bias(up_b + expert * HIDDEN + me * SHARE);
    down.load_bias(down_b + expert * WIDTH + me * COLUMNS);
    up.load(up_w + ((long long)expert * HIDDEN + me * SHARE) * WIDTH);
    const Number* from = down_w + ((long long)expert * WIDTH + me * COLUMNS) * HIDDEN;
    for (int i = thread(); i < COLUMNS * HIDDEN / 8; i += THREADS)
        copy16(weights + i / (HIDDEN / 8) * (HIDDEN + 32) + i % (HIDDEN / 8) * 8, from + i * 8);
    int count = 0;
    if (warp == 0) {  // its tokens in order, in place: none moves to the right
        for (int first = 0; first < tokens; first += 32) {
            int t = first + lane;
            u32 mine = ballot(t < tokens && list[t] == expert);
            if (mine >> lane & 1) list[count + ones(mine & ((1u << lane) - 1))] = t;
            count += ones(mine);
            together();
        }
        if (lane == 0) *found = count;
    }
    sync();
    MARK(3);
    count = *found;
    for (int first = 0; first < count; first += 16) {
        for (int i = thread(); i < 16 * WIDTH / 8; i += THREADS) {
            int slot = first + i / (WIDTH / 8), part = i % (WIDTH / 8) * 8;
            uint4 v = make_uint4(0, 0, 0, 0);
            if (slot < count) v = written((const uint4*)(y + list[slot] * WIDTH + part));
            *(uint4*)(a + i / (WIDTH / 8) * (WIDTH + 32) + part) = v;
        }
        const bool used = first + row < count;
        const int token = used ? list[first + row] : 0;
        float2* out = (float2*)(x + token * WIDTH + me * COLUMNS + 2 * j);
        float2 before = written(out);
        const float gate = gates ? written(gates + token) * scale : scale;
        sync();
        MARK(4);
        up.multiply(a, sums);
        sync();
        MARK(5);
        float between[SHARE / LANES], v[2];
        up.result(sums, between);
#pragma unroll
        for (int i = 0; i < SHARE / LANES; i++) between[i] = activate(between[i]);
        all_here();  // nobody reads h any more
        send<HIDDEN, SHARE / LANES>(h, h_place, between);
        MARK(6);
        if (first == 0) weights_here();
        MARK(7);
        barrier();
        received<HIDDEN>(h, h_place);
        MARK(8);
        Down::multiply_shared(h, weights, sums);
        sync();
        MARK(9);
        if (first + 16 < count) arrive();
        down.result(sums, v);
        before.x += gate * v[0], before.y += gate * v[1];
        if (used) *out = before;
        MARK(10);
    }
}
