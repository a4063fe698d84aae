// The convolution, and the router behind it.

// x += pointwise(activate(norm(depthwise(glu)))), nothing past the length; with ROUTER then y = norm(x), and each
// token's expert and gate. norm_w may be missing: batch norms are folded into the weights.
template <bool ROUTER> DEVICE void convolution(
    char* memory, const Number* glu, const float* taps, const float* taps_b, const float* norm_w, const float* norm_b,
    const Number* out_w, const float* out_b, const int* lengths, float* x, const float* router_w,
    const float* router_b, const float* router_sums, const float* heard, int heard_stride, Number* y_out, int* experts,
    float* gates, int frames, int left, float norm_eps, float eps, float router_scale
) {
    MARK(32);
    release();
    Number* inner = (Number*)memory;
    float *sums = (float*)(inner + 16 * LINE), *mine = sums + SUMS, *logits = mine + 16 * (COLUMNS + 4);
    float2 *inbox = (float2*)(logits + 16 * EXPERTS), *second = inbox + 16 * PROGRAMS;
    Flag *norm_there = (Flag*)(second + 16 * PROGRAMS), *inner_there = norm_there + 1, *logits_there = norm_there + 2;
    float* router = (float*)(norm_there + 4);  // (COLUMNS, EXPERTS)
    if (thread() == 0) {
        opened(norm_there), opened(inner_there), opened(logits_there);
        expected(norm_there, PARTS), expected(inner_there, 16 * WIDTH * 2);
        expected(logits_there, 16 * EXPERTS * 4 + PARTS);
    }
    arrive();
    const int me = rank(), row = thread() / LANES, j = thread() % LANES, first = group() * 16;
    const int column = me * COLUMNS + 2 * j, position = (first + row) % frames;
    Product<WIDTH, COLUMNS, 8> pointwise;
    pointwise.load(out_w + me * COLUMNS * WIDTH);
    pointwise.load_bias(out_b + me * COLUMNS);
    if (ROUTER)
        for (int i = thread(); i < COLUMNS * EXPERTS / 4; i += THREADS)
            *(uint4*)(router + i * 4) = weights16(router_w + me * COLUMNS * EXPERTS + i * 4);
    float2 weights[TAPS], v = weights8(taps_b + column), factor = {}, summand = {};
    if (norm_w) factor = weights8(norm_w + column), summand = weights8(norm_b + column);
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) weights[tap] = weights8(taps + tap * WIDTH + column);
    MARK(33);
    wait();
    MARK(34);
    const int length = written(lengths + first / frames);
    const float2 before = written((const float2*)(x + (first + row) * WIDTH + column));
    u32 in[TAPS];
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) {
        int source = position + tap - left;
        in[tap] = 0;
        if (source >= 0 && source < frames)
            in[tap] = written((const u32*)(glu + (first + row + tap - left) * WIDTH + column));
    }
    // What the row that this warp decides on hears, ahead of its logits.
    const int warp = thread() / 32, lane = thread() % 32, token = first + warp % (16 / PROGRAMS) * PROGRAMS + me;
    float hears[(EXPERTS + 31) / 32] = {}, columns[(EXPERTS + 31) / 32] = {};
    if (ROUTER)
#pragma unroll
        for (int i = 0; i < (EXPERTS + 31) / 32; i++)
            if (i * 32 + lane < EXPERTS)
                columns[i] = weights4(router_sums + i * 32 + lane),
                hears[i] = written(heard + (long long)token * heard_stride + i * 32 + lane) +
                           weights4(router_b + i * 32 + lane);
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) {
        float2 each = floats(in[tap]);
        v.x += each.x * weights[tap].x, v.y += each.y * weights[tap].y;
    }
    const bool valid = position < length;
    MARK(35);
    all_here();
    float both[2] = {v.x, v.y};
    if (norm_w) {
        send_parts(inbox, both[0], both[1], norm_there);
        received(norm_there);
        const Norm norm = joined(inbox, row, j, norm_eps);
        both[0] = (both[0] - norm.mean) * norm.scale, both[1] = (both[1] - norm.mean) * norm.scale;
        both[0] = both[0] * factor.x + summand.x, both[1] = both[1] * factor.y + summand.y;
    }
    both[0] = activate(both[0]), both[1] = activate(both[1]);
    MARK(36);
    send<WIDTH, 2>(inner, both, inner_there);
    received(inner_there);
    MARK(37);
    pointwise.multiply(inner, sums);
    sync();
    MARK(38);
    pointwise.result(sums, both);
    both[0] = before.x + (valid ? both[0] : 0.0f), both[1] = before.y + (valid ? both[1] : 0.0f);
    *(float2*)(x + (first + row) * WIDTH + column) = make_float2(both[0], both[1]);
    if (!ROUTER) return;
    send_parts(second, both[0], both[1], logits_there);
    *(float2*)(mine + row * (COLUMNS + 4) + 2 * j) = make_float2(both[0], both[1]);
    MARK(39);
    sync();
    // This program's columns' part of the logits, to the program that has the row: row r is program r's.
    float part[EXPERTS / 16] = {};
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        float in = mine[row * (COLUMNS + 4) + i];
#pragma unroll
        for (int e = 0; e < EXPERTS / 16; e++) part[e] += in * router[i * EXPERTS + e * 16 + j];
    }
#pragma unroll
    for (int e = 0; e < EXPERTS / 16; e++)
        sent(logits + (row / PROGRAMS * PROGRAMS + me) * EXPERTS + e * 16 + j, part[e], logits_there, row % PROGRAMS);
    MARK(40);
    received(logits_there);
    MARK(41);
    const Norm norm = joined(second, row, j, eps);
    both[0] = (both[0] - norm.mean) * norm.scale, both[1] = (both[1] - norm.mean) * norm.scale;
#if EXPERTS_HALF
    *(u32*)(y_out + (first + row) * WIDTH + column) = pair_half(both[0], both[1]);
#else
    *(u32*)(y_out + (first + row) * WIDTH + column) = pair(both[0], both[1]);
#endif
    if (warp >= 16 / PROGRAMS) return;
    const Norm decided = joined(second, warp * PROGRAMS + me, lane % LANES, eps);
    float top = -1e30f, each[(EXPERTS + 31) / 32];
    int expert = EXPERTS;
#pragma unroll
    for (int i = 0; i < (EXPERTS + 31) / 32; i++) {
        int e = i * 32 + lane;
        float logit = 0.0f;
        if (e < EXPERTS) {
#pragma unroll
            for (int p = 0; p < PROGRAMS; p++) logit += logits[(warp * PROGRAMS + p) * EXPERTS + e];
            logit = decided.scale * (logit - decided.mean * columns[i]) * router_scale + hears[i];
        }
        each[i] = e < EXPERTS ? logit : -1e30f;
        if (each[i] > top) top = each[i], expert = e;
    }
    for (int mask = 16; mask; mask /= 2) {  // the largest, of equals the first
        float other = shuffle(top, mask);
        int at = (int)shuffle((u32)expert, mask);
        if (other > top || (other == top && at < expert)) top = other, expert = at;
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < (EXPERTS + 31) / 32; i++) total += expf(each[i] - top);
    for (int mask = 16; mask; mask /= 2) total += shuffle(total, mask);
    bool counts = token % frames < length;
    if (lane == 0) {
        experts[token] = counts ? min(expert, EXPERTS - 1) : -1;
        gates[token] = counts ? 1.0f / total : 0.0f;
    }
    MARK(42);
}

KERNEL convolution_router(
    const Number* glu, const float* taps, const float* taps_b, const float* norm_w, const float* norm_b,
    const Number* out_w, const float* out_b, const int* lengths, float* x, const float* router_w,
    const float* router_b, const float* router_sums, const float* heard, int heard_stride, Number* y_out, int* experts,
    float* gates, int frames, int left, float norm_eps, float eps, float router_scale
) {
    SHARED(memory);
    convolution<true>(
        memory, glu, taps, taps_b, norm_w, norm_b, out_w, out_b, lengths, x, router_w, router_b, router_sums, heard,
        heard_stride, y_out, experts, gates, frames, left, norm_eps, eps, router_scale);
}

KERNEL convolution_alone(
    const Number* glu, const float* taps, const float* taps_b, const float* norm_w, const float* norm_b,
    const Number* out_w, const float* out_b, const int* lengths, float* x, int frames, int left,
    float norm_eps
) {
    SHARED(memory);
    convolution<false>(
        memory, glu, taps, taps_b, norm_w, norm_b, out_w, out_b, lengths, x, nullptr, nullptr, nullptr, nullptr, 0,
        nullptr, nullptr, nullptr, frames, left, norm_eps, 0.0f, 1.0f);
}
