// The attention, and the gated layer in front of the convolution.

// x += out(attention(qkv)); glu = gated(norm(x)), zero past the length. At most KEYS frames an utterance.
// A program makes 32 columns of its head, and all scores of the head for its rows.
KERNEL attention_gated(
    const Number* qkv, const int* lengths, const float* key_bias, int key_bias_stride, float* x, const Number* out_w,
    const float* out_b, const Number* gated_w, const float* gated_b, Number* glu, const float* gated_sums,
    int frames, float scale, float eps
) {
    SHARED(memory);
    constexpr int PITCH = KEYS + 8;
    MARK(16);
    release();
    Number *context = (Number*)memory, *y = context + 16 * LINE, *values = y + 16 * LINE;
    float *sums = (float*)(values + KEYS * COLUMNS), *scores = sums + SUMS;
    float2* inbox = (float2*)(scores + 16 * PITCH);
    Flag *context_there = (Flag*)(inbox + 16 * PROGRAMS), *y_there = context_there + 1;
    if (thread() == 0) {
        opened(context_there), opened(y_there);
        expected(context_there, 16 * WIDTH * 2), expected(y_there, 16 * WIDTH * 2 + PARTS);
    }
    arrive();
    const int me = rank(), warp = thread() / 32, lane = thread() % 32, row = thread() / LANES, j = thread() % LANES;
    const int first = group() * 16, head = me / (HEAD / COLUMNS);
    Product<WIDTH, COLUMNS, 8> attention_out;
    Product<WIDTH, 2 * COLUMNS, 4> gate;
    attention_out.load(out_w + me * COLUMNS * WIDTH);
    attention_out.load_bias(out_b + me * COLUMNS);
    gate.load(gated_w + me * 2 * COLUMNS * WIDTH);
    gate.load_bias(gated_b + me * 2 * COLUMNS);
    gate.load_sums(gated_sums + me * 2 * COLUMNS);
    float found[KEYS / 16];
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
        int key = i * 16 + j;
        found[i] = key_bias && key < frames ? weights4(key_bias + head * key_bias_stride + key) : 0.0f;
    }
    MARK(17);
    wait();
    MARK(18);
    // All that is read is asked for before any of it is looked at; rows past the length are there, too.
    const int length = written(lengths + first / frames), begin = first / frames * frames;
    const float2 before = written((const float2*)(x + (first + row) * WIDTH + me * COLUMNS + 2 * j));
    const Number* keys = qkv + begin * (3 * WIDTH) + WIDTH + head * HEAD;
    const int g = lane / 4, t = lane % 4;
    uint4 low[HEAD / 32], high[HEAD / 32];
#pragma unroll
    for (int step = 0; step < HEAD / 32; step++) {
        const Number* q = qkv + (first + g) * (3 * WIDTH) + head * HEAD + step * 32 + t * 8;
        low[step] = written((const uint4*)q), high[step] = written((const uint4*)(q + 8 * 3 * WIDTH));
    }
    uint4 k[2][HEAD / 32], staged[KEYS * COLUMNS / 8 / THREADS];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int step = 0; step < HEAD / 32; step++) {
            int key = (warp + 8 * i) * 8 + g;
            if (key < frames) k[i][step] = written((const uint4*)(keys + key * (3 * WIDTH) + step * 32 + t * 8));
        }
#pragma unroll
    for (int i = 0; i < KEYS * COLUMNS / 8 / THREADS; i++) {
        int key = (thread() + i * THREADS) / (COLUMNS / 8), part = thread() % (COLUMNS / 8) * 8;
        staged[i] = make_uint4(0, 0, 0, 0);
        if (key < frames)
            staged[i] = written((const uint4*)(qkv + (begin + key) * (3 * WIDTH) + 2 * WIDTH + me * COLUMNS + part));
    }
#pragma unroll
    for (int i = 0; i < KEYS * COLUMNS / 8 / THREADS; i++) {
        int key = (thread() + i * THREADS) / (COLUMNS / 8), part = thread() % (COLUMNS / 8) * 8;
        *(uint4*)(values + key * COLUMNS + part) = key < length ? staged[i] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int at = (warp + 8 * i) * 8;
        if (at >= frames) break;
        float c[4] = {};
#pragma unroll
        for (int step = 0; step < HEAD / 32; step++) {
            multiply_add(c, low[step].x, high[step].x, low[step].y, high[step].y, k[i][step].x, k[i][step].y);
            multiply_add(c, low[step].z, high[step].z, low[step].w, high[step].w, k[i][step].z, k[i][step].w);
        }
        *(float2*)(scores + g * PITCH + at + 2 * t) = make_float2(c[0], c[1]);
        *(float2*)(scores + (g + 8) * PITCH + at + 2 * t) = make_float2(c[2], c[3]);
    }
    const int seen = first - begin < length ? length : 0;  // nobody reads queries past the length
    sync();
    MARK(19);
    float top = -1e30f, total = 0.0f;
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
        int key = i * 16 + j;
        found[i] = key < seen ? (scores[row * PITCH + key] + found[i]) * scale : -1e30f;
        top = fmaxf(top, found[i]);
    }
    for (int mask = 8; mask; mask /= 2) top = fmaxf(top, shuffle(top, mask));
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
        int key = i * 16 + j;
        float weight = key < seen ? power_of_two(found[i] - top) : 0.0f;
        total += weight;
        scores[row * PITCH + key] = weight;  // zeros behind the length, too
    }
    total = sum_of_row(total);
    sync();
    MARK(20);
    float v[2] = {0.0f, 0.0f};
    for (int key = 0; key < seen; key += 4) {
        float4 weight = *(const float4*)(scores + row * PITCH + key);
        const float each[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 value = floats(*(const u32*)(values + (key + i) * COLUMNS + 2 * j));
            v[0] += each[i] * value.x, v[1] += each[i] * value.y;
        }
    }
    float share = total > 0.0f ? 1.0f / total : 0.0f;
    v[0] *= share, v[1] *= share;
    MARK(21);
    all_here();
    send<WIDTH, 2>(context, v, context_there);
    received(context_there);
    MARK(22);
    attention_out.multiply(context, sums);
    sync();
    MARK(23);
    attention_out.result(sums, v);
    v[0] += before.x, v[1] += before.y;
    *(float2*)(x + (first + row) * WIDTH + me * COLUMNS + 2 * j) = make_float2(v[0], v[1]);
    send<WIDTH, 2>(y, v, y_there);
    send_parts(inbox, v[0], v[1], y_there);
    MARK(24);
    received(y_there);
    MARK(25);
    gate.multiply(y, sums);
    const Norm norm = joined(inbox, row, j, eps);
    sync();
    MARK(26);
    float both[4];
    gate.result(sums, norm, both);
    bool valid = (first + row) % frames < length;
    float a = valid ? both[0] * sigmoid(both[1]) : 0.0f, b = valid ? both[2] * sigmoid(both[3]) : 0.0f;
    *(u32*)(glu + (first + row) * WIDTH + me * COLUMNS + 2 * j) = pair(a, b);
    MARK(27);
}
