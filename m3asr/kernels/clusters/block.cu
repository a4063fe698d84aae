// A Conformer block in three launches, each one a step or two behind what needs all rows of an utterance.

constexpr int LINE = WIDTH + 32, SUMS = 4 * 16 * (3 * COLUMNS + 8);

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
    arrive();
    Number *y = (Number*)memory, *h = y + 16 * LINE;
    float *sums = (float*)(h + 16 * (HIDDEN + 32)), *residual = sums + SUMS;
    float2* inbox = (float2*)(residual + 16 * COLUMNS);
    const int me = rank(), warp = thread() / 32, lane = thread() % 32, row = thread() / LANES, j = thread() % LANES;
    const int first = group() * 16;
    Product<WIDTH, SHARE, 4> up;
    Product<HIDDEN, COLUMNS, 8> down;
    Product<WIDTH, 3 * COLUMNS, 4> projection;
    up.load(up_w + me * SHARE * WIDTH);
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
        for (int i = thread(); i < 3 * COLUMNS * WIDTH / 64; i += THREADS) ahead(qkv_w + me * 3 * COLUMNS * WIDTH + i * 64);
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
    up.multiply(y, sums);
    sync();
    MARK(4);
    float between[SHARE / 16];
    up.result(sums, between);
#pragma unroll
    for (int i = 0; i < SHARE / 16; i++) between[i] = activate(between[i]);
    MARK(5);
    all_here();  // before a program's shared memory is written to, it must have begun
    send<HIDDEN, SHARE / 16>(h, between);
    arrive();
    if (QKV) projection.load(qkv_w + me * 3 * COLUMNS * WIDTH);  // while the others' results are under way
    all_here();
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
    send<WIDTH, 2>(y, v);
    send_parts(inbox, v[0], v[1]);
    MARK(8);
    barrier();
    MARK(9);
    projection.multiply(y, sums);
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
    const float* down_b, const Number* qkv_w, const float* qkv_b, const Number* table, Number* qkv, const float* qkv_sums,
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
        memory, x, nullptr, nullptr, up_w, up_b, down_w, down_b, nullptr, nullptr, nullptr, nullptr, nullptr, 1, scale, eps, 0.0f);
}

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
    arrive();
    Number *context = (Number*)memory, *y = context + 16 * LINE, *values = y + 16 * LINE;
    float *sums = (float*)(values + KEYS * COLUMNS), *scores = sums + SUMS;
    float2* inbox = (float2*)(scores + 16 * PITCH);
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
    for (int from = 0; from < frames; from += 128) {
        uint4 k[2][HEAD / 32], v[128 * COLUMNS / 8 / THREADS];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int step = 0; step < HEAD / 32; step++) {
                int key = from + (warp + 8 * i) * 8 + g;
                if (key < frames) k[i][step] = written((const uint4*)(keys + key * (3 * WIDTH) + step * 32 + t * 8));
            }
#pragma unroll
        for (int i = 0; i < 128 * COLUMNS / 8 / THREADS; i++) {
            int key = from + (thread() + i * THREADS) / (COLUMNS / 8), part = thread() % (COLUMNS / 8) * 8;
            v[i] = make_uint4(0, 0, 0, 0);
            if (key < frames)
                v[i] = written((const uint4*)(qkv + (begin + key) * (3 * WIDTH) + 2 * WIDTH + me * COLUMNS + part));
        }
#pragma unroll
        for (int i = 0; i < 128 * COLUMNS / 8 / THREADS; i++) {
            int key = from + (thread() + i * THREADS) / (COLUMNS / 8), part = thread() % (COLUMNS / 8) * 8;
            *(uint4*)(values + key * COLUMNS + part) = key < length ? v[i] : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int at = from + (warp + 8 * i) * 8;
            if (at >= frames) continue;
            float c[4] = {};
#pragma unroll
            for (int step = 0; step < HEAD / 32; step++) {
                multiply_add(c, low[step].x, high[step].x, low[step].y, high[step].y, k[i][step].x, k[i][step].y);
                multiply_add(c, low[step].z, high[step].z, low[step].w, high[step].w, k[i][step].z, k[i][step].w);
            }
            *(float2*)(scores + g * PITCH + at + 2 * t) = make_float2(c[0], c[1]);
            *(float2*)(scores + (g + 8) * PITCH + at + 2 * t) = make_float2(c[2], c[3]);
        }
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
    send<WIDTH, 2>(context, v);
    barrier();
    MARK(22);
    attention_out.multiply(context, sums);
    sync();
    MARK(23);
    attention_out.result(sums, v);
    v[0] += before.x, v[1] += before.y;
    *(float2*)(x + (first + row) * WIDTH + me * COLUMNS + 2 * j) = make_float2(v[0], v[1]);
    send<WIDTH, 2>(y, v);
    send_parts(inbox, v[0], v[1]);
    MARK(24);
    barrier();
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

// x += pointwise(activate(norm(depthwise(glu)))), nothing past the length; with ROUTER then y = norm(x), and each
// token's expert and gate. norm_w may be missing: batch norms are folded into the weights.
template <bool ROUTER> DEVICE void convolution(
    char* memory, const Number* glu, const float* taps, const float* taps_b, const float* norm_w, const float* norm_b,
    const Number* out_w, const float* out_b, const int* lengths, float* x, const float* router_w,
    const float* router_b, const float* router_sums, const float* heard, int heard_stride, Number* y_out, int* experts, float* gates, int frames,
    int left, float norm_eps, float eps, float router_scale
) {
    MARK(32);
    release();
    arrive();
    Number* inner = (Number*)memory;
    float *sums = (float*)(inner + 16 * LINE), *mine = sums + SUMS, *logits = mine + 16 * (COLUMNS + 4);
    float2 *inbox = (float2*)(logits + 16 * EXPERTS), *second = inbox + 16 * PROGRAMS;
    float* router = (float*)(second + 16 * PROGRAMS);  // (COLUMNS, EXPERTS)
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
        send_parts(inbox, both[0], both[1]);
        barrier();
        const Norm norm = joined(inbox, row, j, norm_eps);
        both[0] = (both[0] - norm.mean) * norm.scale, both[1] = (both[1] - norm.mean) * norm.scale;
        both[0] = both[0] * factor.x + summand.x, both[1] = both[1] * factor.y + summand.y;
    }
    both[0] = activate(both[0]), both[1] = activate(both[1]);
    MARK(36);
    send<WIDTH, 2>(inner, both);
    barrier();
    MARK(37);
    pointwise.multiply(inner, sums);
    sync();
    MARK(38);
    pointwise.result(sums, both);
    both[0] = before.x + (valid ? both[0] : 0.0f), both[1] = before.y + (valid ? both[1] : 0.0f);
    *(float2*)(x + (first + row) * WIDTH + column) = make_float2(both[0], both[1]);
    if (!ROUTER) return;
    send_parts(second, both[0], both[1]);
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
        *of(logits + (row / PROGRAMS * PROGRAMS + me) * EXPERTS + e * 16 + j, row % PROGRAMS) = part[e];
    MARK(40);
    barrier();
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
    const float* router_b, const float* router_sums, const float* heard, int heard_stride, Number* y_out, int* experts, float* gates, int frames,
    int left, float norm_eps, float eps, float router_scale
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
