// Products of many tokens, a w^T with what follows them, weight-stationary: a program keeps the weights of its N columns
// in shared memory and takes one tile of 64 rows after the other. A cluster of two shares the tiles' copies, each of
// which brings half. One warp asks for copies; two times four warps multiply in turn, so that the matrix unit works on
// one tile while the results of the other are finished.
//
// A norm in front costs no launch: whoever writes the residual stream leaves its rows in the compute type as they are
// (`raw`), and of each row its columns' mean and squares (`parts`, joined as Chan et al., 1979, have it). Then
// norm(x) w^T = (raw w^T - mean * sums of w's rows) / deviation.
typedef unsigned short Number;  // bfloat16 or float16
constexpr int ROWS = 64, STAGE = ROWS * 128, WARPS = 8, MOST_PARTS = 8;
#if HALF
constexpr float RAW = 0.0625f;  // so that float16 holds a stream of up to a million
#else
constexpr float RAW = 1.0f;
#endif

struct Layer {
    const float *bias, *sums;  // (columns,)
    const float2* parts;       // of the rows of `a`, (count, tokens); none: `a` is multiplied as it stands
    Number* out;
    const Number* table;       // (>= frames, columns / 3), added to the middle third, or none
    const int* lengths;        // (utterances,), or none: all rows count
    float* x;
    Number* raw;               // none: nobody reads it
    float2* x_parts;
    int tokens, frames, columns, count;
    float eps, scale;
};

// What follows the product: activation; GLU of neighbours, zero past the length; the table; the residual stream.
enum { ACTIVATED, GATED, KEYED, ADDED };

// Of a row, whose four threads ask together: norm(x) = factor * raw + off.
DEVICE void row_norm(const Layer& layer, int row, float& off, float& factor) {
    const int t = thread() % 4, each = WIDTH / layer.count;
    float2 part[MOST_PARTS / 4];
    float mean = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < MOST_PARTS / 4; i++) {
        part[i] = make_float2(0.0f, 0.0f);
        if (4 * i + t < layer.count) part[i] = written_now(layer.parts + (4 * i + t) * layer.tokens + row);
        mean += part[i].x;
    }
    for (int mask = 2; mask; mask /= 2) mean += shuffle(mean, mask);
    mean /= layer.count;
#pragma unroll
    for (int i = 0; i < MOST_PARTS / 4; i++)
        if (4 * i + t < layer.count) squares += part[i].y + each * (part[i].x - mean) * (part[i].x - mean);
    for (int mask = 2; mask; mask /= 2) squares += shuffle(squares, mask);
    const float scale = root_below(squares / WIDTH + layer.eps);
    off = -mean * scale;
    factor = scale / RAW;
}

// A thread's pairs of numbers in 8 neighbouring columns and in the next 8 -> 4 neighbours in one of them, its second if
// the thread's number is odd.
DEVICE uint2 four(u32 here, u32 next) {
    const bool odd = thread() % 2;
    const u32 got = shuffle(odd ? here : next, 1);
    return odd ? make_uint2(got, next) : make_uint2(here, got);
}

// The same of single numbers in four times 8 columns, of whose halves they are one: -> 4 neighbours in one of the four.
DEVICE uint2 four_gated(const float (&v)[4]) {
    const int t = thread() % 4;
    u32 twos[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float got = shuffle(t % 2 ? v[2 * i] : v[2 * i + 1], 1);
        twos[i] = t % 2 ? pair(got, v[2 * i + 1]) : pair(v[2 * i], got);
    }
    const u32 got = shuffle(t / 2 ? twos[0] : twos[1], 2);
    return t / 2 ? make_uint2(got, twos[1]) : make_uint2(twos[0], got);
}

template <int K, int N> DEVICE constexpr int stages() {  // as many as fit, beside weights, flags, biases and sums
    const int room = (SHARED_BYTES - K * N * 2 - N * 8 - 512) / STAGE;
    return room < 12 ? room : 12;
}

template <int K, int N, int KIND> DEVICE void product(
    char* memory, const Matrix& a_rows, const Matrix& weights, const Layer& layer
) {
    constexpr int STEPS = K / 64, STAGES = stages<K, N>();
    release();
    char* tiles_of_a = memory + K * N * 2;
    Flag *full = (Flag*)(tiles_of_a + STAGES * STAGE), *empty = full + STAGES, *loaded = empty + STAGES;
    Flag* turn = loaded + STEPS;
    float *bias = (float*)(turn + 2), *sums = bias + N;
    const int me = rank(), warp = thread() / 32, lane = thread() % 32, t = lane % 4;
    const int pairs = layer.columns / (2 * N), column = (group() % pairs * 2 + me) * N;
    const int tiles = (layer.tokens + ROWS - 1) / ROWS, first = group() / pairs, stride = groups() / pairs;
    if (thread() == 0) {
        for (int i = 0; i < STAGES; i++) opened(full + i, 1), opened(empty + i, 2 * 4);
        for (int i = 0; i < STEPS; i++) opened(loaded + i, 1);
        opened(turn, 1), opened(turn + 1, 1);
    }
    for (int i = thread(); i < N; i += THREADS) {
        bias[i] = weights4(layer.bias + column + i);
        if (layer.parts) sums[i] = weights4(layer.sums + column + i);
    }
    arrive();
    all_here();
    if (warp == WARPS) {
        if (lane == 0) {
            for (int k = 0; k < STEPS; k++) {
                expected(loaded + k, N * 128);
                tile_copied(memory + k * N * 128, weights, k * 64, column, loaded + k);
            }
            wait();
            int step = 0;
            for (int tile = first; tile < tiles; tile += stride)
                for (int k = 0; k < STEPS; k++, step++) {
                    const int stage = step % STAGES;
                    arrived(empty + stage, step / STAGES % 2 ^ 1);
                    expected(full + stage, STAGE);
                    tile_shared(
                        tiles_of_a + stage * STAGE + me * (STAGE / 2), a_rows, k * 64, tile * ROWS + me * (ROWS / 2),
                        full + stage);
                }
        }
    } else {
        wait();
        const int mine = warp / 4;
        for (int i = mine, tile = first + mine * stride; tile < tiles; i += 2, tile += 2 * stride) {
            const int row = tile * ROWS + warp % 4 * 16 + lane / 4;
            int seen[2];
            float off[2] = {}, factor[2] = {1.0f, 1.0f};
            bool valid[2] = {true, true};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                seen[half] = min(row + 8 * half, layer.tokens - 1);
                if (layer.parts) row_norm(layer, seen[half], off[half], factor[half]);
                if (layer.lengths)
                    valid[half] = seen[half] % layer.frames < written(layer.lengths + seen[half] / layer.frames);
            }
            float2 before[KIND == ADDED ? N / 8 : 1][2];  // asked for ahead of the product
            if (KIND == ADDED)
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        before[n][half] = written_now(
                            (const float2*)(layer.x + (long long)seen[half] * layer.columns + column + n * 8 + 2 * t));
            if (i) arrived(turn + mine, (i - 1) / 2 % 2);
            float c[N / 2];
            int step = i * STEPS, last = 0;
            for (int k = 0; k < STEPS; k++, step++) {
                const int stage = step % STAGES;
                if (i == mine) arrived(loaded + k, 0);
                arrived(full + stage, step / STAGES % 2);
                products_begin();
#pragma unroll
                for (int part = 0; part < 4; part++)
                    multiply_tile(
                        c, operand(tiles_of_a + stage * STAGE, part), operand(memory + k * N * 128, part), k | part);
                products_committed();
                if (k) {
                    products_done<1>();
                    if (lane < 2) arrive_at(empty + last, lane);
                }
                last = stage;
            }
            if (thread() % 128 == 0) arrive_at(turn + 1 - mine, me);
            products_done<0>();
            if (lane < 2) arrive_at(empty + last, lane);

            const bool here[2] = {row < layer.tokens, row + 8 < layer.tokens};
            Number* out = KIND == ADDED ? layer.raw : layer.out;
            const int pitch = KIND == GATED ? layer.columns / 2 : layer.columns;
            const long long start = (long long)row * pitch + (KIND == GATED ? column / 2 : column);
            float mean[2] = {};
#pragma unroll
            for (int many = 0; many < N / 8; many += 4) {
                u32 numbers[2][4];
                float gates[2][4];
#pragma unroll
                for (int n = many; n < many + 4; n++) {
                    const int at = n * 8 + 2 * t;
                    const float2 add = *(const float2*)(bias + at);
                    float2 sum = make_float2(0.0f, 0.0f);
                    if (layer.parts) sum = *(const float2*)(sums + at);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float &v = c[n * 4 + half * 2], &w = c[n * 4 + half * 2 + 1];
                        v = factor[half] * v + (off[half] * sum.x + add.x);
                        w = factor[half] * w + (off[half] * sum.y + add.y);
                        if (KIND == ACTIVATED) v = activate(v), w = activate(w);
                        if (KIND == GATED) gates[half][n - many] = valid[half] ? v * sigmoid(w) : 0.0f;
                        if (KIND == KEYED) {
                            const int third = layer.columns / 3, key = column + at - third;
                            if (layer.table && key >= 0 && key < third) {
                                const Number* of_row = layer.table + seen[half] % layer.frames * third;
                                const float2 more = floats(weights_pair(of_row + key));
                                v += more.x, w += more.y;
                            }
                        }
                        if (KIND == ADDED) {
                            v = before[n][half].x + (valid[half] ? layer.scale * v : 0.0f);
                            w = before[n][half].y + (valid[half] ? layer.scale * w : 0.0f);
                            mean[half] += v + w;
                            float* to = layer.x + (long long)(row + 8 * half) * pitch + column + at;
                            if (here[half]) *(float2*)to = make_float2(v, w);
                        }
                        if (KIND != GATED) numbers[half][n - many] = KIND == ADDED ? pair(RAW * v, RAW * w) : pair(v, w);
                    }
                }
                if (KIND == ADDED && !out) continue;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    Number* to = out + start + 8 * half * pitch;
                    if (KIND == GATED) {
                        const uint2 v = four_gated(gates[half]);
                        if (here[half]) *(uint2*)(to + (many + t) * 4) = v;
                        continue;
                    }
#pragma unroll
                    for (int n = 0; n < 4; n += 2) {
                        const uint2 v = four(numbers[half][n], numbers[half][n + 1]);
                        if (here[half]) *(uint2*)(to + (many + n + t % 2) * 8 + t / 2 * 4) = v;
                    }
                }
            }
            if (KIND != ADDED || !out) continue;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float squares = 0.0f;
                for (int mask = 2; mask; mask /= 2) mean[half] += shuffle(mean[half], mask);
                mean[half] /= N;
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const float away = c[n * 4 + half * 2 + j] - mean[half];
                        squares += away * away;
                    }
                for (int mask = 2; mask; mask /= 2) squares += shuffle(squares, mask);
                if (t == 0 && here[half])
                    layer.x_parts[column / N * layer.tokens + row + 8 * half] = make_float2(mean[half], squares);
            }
        }
    }
    together();
    arrive();  // no program ends while the other may still write to it
    all_here();
}

KERNEL product_activated(CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Layer layer) {
    SHARED(memory);
    product<WIDTH, WIDTH_COLUMNS, ACTIVATED>(memory, a_rows, weights, layer);
}
KERNEL product_gated(CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Layer layer) {
    SHARED(memory);
    product<WIDTH, WIDTH_COLUMNS, GATED>(memory, a_rows, weights, layer);
}
KERNEL product_keyed(CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Layer layer) {
    SHARED(memory);
    product<WIDTH, WIDTH_COLUMNS, KEYED>(memory, a_rows, weights, layer);
}
KERNEL product_added(CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Layer layer) {
    SHARED(memory);
    product<WIDTH, WIDTH_COLUMNS, ADDED>(memory, a_rows, weights, layer);
}
KERNEL product_added_from_hidden(CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Layer layer) {
    SHARED(memory);
    product<HIDDEN, HIDDEN_COLUMNS, ADDED>(memory, a_rows, weights, layer);
}
