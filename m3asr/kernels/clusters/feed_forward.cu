// The feed-forwards, and the projection in front of the attention.

// Two rows of a warp.
DEVICE void normalise_rows(float (&v)[2][WIDTH / 32], float eps) {
    float mean[2] = {}, squares[2] = {};
#pragma unroll
    for (int i = 0; i < WIDTH / 32; i++) mean[0] += v[0][i], mean[1] += v[1][i];
#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
        float a = shuffle(mean[0], mask), b = shuffle(mean[1], mask);
        mean[0] += a, mean[1] += b;
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < WIDTH / 32; i++) {
            v[r][i] -= mean[r] / WIDTH;
            squares[r] += v[r][i] * v[r][i];
        }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
        float a = shuffle(squares[0], mask), b = shuffle(squares[1], mask);
        squares[0] += a, squares[1] += b;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float scale = root_below(squares[r] / WIDTH + eps);
#pragma unroll
        for (int i = 0; i < WIDTH / 32; i++) v[r][i] *= scale;
    }
}

// x += scale * feed_forward(norm(x)); with QKV also qkv = its projection of norm(x), `table` added to the keys.
// With prior_w, x counts as its layer norm with that weight and bias.
template <bool QKV> DEVICE void feed_forward(
    char* memory, float* x, const float* prior_w, const float* prior_b, const Number* up_w, const float* up_b,
    const Number* down_w, const float* down_b, const Number* qkv_w, const float* qkv_b, const Number* table,
    Number* qkv, const float* qkv_sums, int frames, float scale, float eps, float prior_eps
) {
    MARK(0);
    release();
    // First the projection's rows 0 to COLUMNS and all of `up`, then the rest of the projection in the place of that.
    Number *weights = (Number*)memory, *y = weights + 3 * COLUMNS * LINE, *h = y + 16 * LINE;
    float *sums = (float*)(h + 16 * (HIDDEN + 32)), *residual = sums + SUMS;
    float2* inbox = (float2*)(residual + 16 * COLUMNS);
    Flag *flags = (Flag*)(inbox + 16 * PROGRAMS), *h_there = flags + 2, *y_there = flags + 3;
    const int me = rank(), warp = thread() / 32, lane = thread() % 32, row = thread() / LANES, j = thread() % LANES;
    const int first = group() * 16;
    Product<WIDTH, SHARE, 4> up;
    Product<HIDDEN, COLUMNS, 8> down;
    Product<WIDTH, 3 * COLUMNS, 4> projection;
    const Number* mine = qkv_w + me * 3 * COLUMNS * WIDTH;
    if (thread() == 0) {
        for (int i = 0; i < 4; i++) opened(flags + i);
        expected(h_there, 16 * HIDDEN * 2), expected(y_there, 16 * WIDTH * 2 + PARTS);
    }
    arrive();
    sync();
    if (warp == 0) {
        if (lane == 0) expected(flags, (SHARE + (QKV ? COLUMNS : 0)) * WIDTH * 2);
        for (int i = lane; i < SHARE; i += 32)
            copied(weights + (COLUMNS + i) * LINE, up_w + (me * SHARE + i) * WIDTH, WIDTH * 2, flags);
        if (QKV)
            for (int i = lane; i < COLUMNS; i += 32) copied(weights + i * LINE, mine + i * WIDTH, WIDTH * 2, flags);
    }
    down.load(down_w + me * COLUMNS * HIDDEN);
    up.load_bias(up_b + me * SHARE);
    down.load_bias(down_b + me * COLUMNS);
    const int row_first = first + row, column_first = me * 3 * COLUMNS + j * (3 * COLUMNS / 16);
    float factor[WIDTH / 32] = {}, summand[WIDTH / 32] = {}, added[3 * COLUMNS / 16] = {};
    if (prior_w)
#pragma unroll
        for (int i = 0; i < WIDTH / 32; i += 2) {
            int column = i / 4 * 128 + lane * 4 + i % 4;
            float2 w = weights8(prior_w + column), b = weights8(prior_b + column);
            factor[i] = w.x, factor[i + 1] = w.y, summand[i] = b.x, summand[i + 1] = b.y;
        }
    if (QKV) {
        projection.load_bias(qkv_b + me * 3 * COLUMNS);
        projection.load_sums(qkv_sums + me * 3 * COLUMNS);
#pragma unroll
        for (int i = 0; i < 3 * COLUMNS / 16; i += 2) {
            int key = column_first + i - WIDTH;
            if (table && key >= 0 && key < WIDTH) {
                float2 more = floats(weights_pair(table + row_first % frames * WIDTH + key));
                added[i] = more.x, added[i + 1] = more.y;
            }
        }
    }
    if (QKV)
        for (int i = thread(); i < 2 * COLUMNS * WIDTH / 64; i += THREADS) ahead(mine + COLUMNS * WIDTH + i * 64);
    MARK(1);
    wait();
    MARK(2);
    float rows[2][WIDTH / 32];
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < WIDTH / 128; i++) {
            float4 v = written((const float4*)(x + (first + 2 * warp + r) * WIDTH + i * 128 + lane * 4));
            rows[r][4 * i] = v.x, rows[r][4 * i + 1] = v.y, rows[r][4 * i + 2] = v.z, rows[r][4 * i + 3] = v.w;
        }
    if (prior_w) {
        normalise_rows(rows, prior_eps);
#pragma unroll
        for (int i = 0; i < WIDTH / 32; i++) {
            rows[0][i] = rows[0][i] * factor[i] + summand[i];
            rows[1][i] = rows[1][i] * factor[i] + summand[i];
        }
    }
#pragma unroll
    for (int i = 0; i < WIDTH / 128; i++) {
        int column = i * 128 + lane * 4;
        if (column / COLUMNS == me)
            for (int r = 0; r < 2; r++)
                *(float4*)(residual + (2 * warp + r) * COLUMNS + column % COLUMNS) =
                    make_float4(rows[r][4 * i], rows[r][4 * i + 1], rows[r][4 * i + 2], rows[r][4 * i + 3]);
    }
    normalise_rows(rows, eps);
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < WIDTH / 128; i++) {
            const float* v = rows[r] + 4 * i;
            *(uint2*)(y + (2 * warp + r) * LINE + i * 128 + lane * 4) = make_uint2(pair(v[0], v[1]), pair(v[2], v[3]));
        }
    sync();
    MARK(3);
    arrived(flags);
    up.multiply(y, weights + COLUMNS * LINE, sums);
    sync();
    if (QKV && warp == 0) {
        if (lane == 0) expected(flags + 1, 2 * COLUMNS * WIDTH * 2);
        for (int i = COLUMNS + lane; i < 3 * COLUMNS; i += 32)
            copied(weights + i * LINE, mine + i * WIDTH, WIDTH * 2, flags + 1);
    }
    MARK(4);
    float between[SHARE / 16];
    up.result(sums, between);
#pragma unroll
    for (int i = 0; i < SHARE / 16; i++) between[i] = activate(between[i]);
    MARK(5);
    all_here();  // before a program's shared memory is written to, it must have begun
    send<HIDDEN, SHARE / 16>(h, between, h_there);
    received(h_there);
    MARK(6);
    down.multiply(h, sums);
    sync();
    MARK(7);
    float v[2];
    down.result(sums, v);
    float2 before = *(const float2*)(residual + row * COLUMNS + 2 * j);
    v[0] = before.x + scale * v[0], v[1] = before.y + scale * v[1];
    *(float2*)(x + row_first * WIDTH + me * COLUMNS + 2 * j) = make_float2(v[0], v[1]);
    if (!QKV) return;
    send<WIDTH, 2>(y, v, y_there);
    send_parts(inbox, v[0], v[1], y_there);
    MARK(8);
    received(y_there);
    MARK(9);
    arrived(flags + 1);
    projection.multiply(y, weights, sums);
    const Norm norm = joined(inbox, row, j, eps);
    sync();
    MARK(10);
    float out[3 * COLUMNS / 16];
    projection.result(sums, norm, out);
    u32* to = (u32*)(qkv + row_first * (3 * WIDTH) + column_first);
#pragma unroll
    for (int i = 0; i < 3 * COLUMNS / 16; i += 2) to[i / 2] = pair(out[i] + added[i], out[i + 1] + added[i + 1]);
    MARK(11);
}

KERNEL feed_forward_qkv(
    float* x, const float* prior_w, const float* prior_b, const Number* up_w, const float* up_b, const Number* down_w,
    const float* down_b, const Number* qkv_w, const float* qkv_b, const Number* table, Number* qkv,
    const float* qkv_sums,
    int frames, float scale, float eps, float prior_eps
) {
    SHARED(memory);
    feed_forward<true>(
        memory, x, prior_w, prior_b, up_w, up_b, down_w, down_b, qkv_w, qkv_b, table, qkv, qkv_sums, frames,
        scale, eps, prior_eps);
}

KERNEL feed_forward_alone(
    float* x, const Number* up_w, const float* up_b, const Number* down_w, const float* down_b, float scale, float eps
) {
    SHARED(memory);
    feed_forward<false>(
        memory, x, nullptr, nullptr, up_w, up_b, down_w, down_b, nullptr, nullptr, nullptr, nullptr, nullptr, 1,
        scale, eps, 0.0f);
}
