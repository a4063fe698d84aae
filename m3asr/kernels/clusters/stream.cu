// Rows of the residual stream of many tokens, as all its kernels know them: see products.cu.
typedef unsigned short Number;  // bfloat16 or float16
constexpr int ROWS = 64;
#if FLOATS
constexpr int MOST_PARTS = WIDTH / 16;  // of a row, with a norm each: a tile's columns by Triton
#else
constexpr int MOST_PARTS = WIDTH / DOWN_COLUMNS < 8 ? 8 : WIDTH / DOWN_COLUMNS;
#endif
#if HALF
constexpr float RAW = 0.0625f;  // so that float16 holds a stream of up to a million
#else
constexpr float RAW = 1.0f;
#endif

struct Layer {
    const float *bias, *sums;  // (columns,)
    const float2* parts;       // of the stream's rows, (count, tokens); none: `a` is no stream and multiplied as it is
    const Number* table;       // (>= frames, columns / 3), added to the middle third, or none
    const int* lengths;        // (utterances,), or none: all rows count
    float2* x_parts;           // where those of the stream go, if its norm is wanted
    int tokens, frames, columns, count, more;
    float each, eps, scale;    // each: columns of a part
};

// This thread's two rows, eight apart.
struct Rows {
    int row[2], position[2], length[2];
    bool here[2];

    DEVICE Rows(const Layer& layer, int first) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            here[half] = first + 8 * half < layer.tokens;
            row[half] = min(first + 8 * half, layer.tokens - 1);  // what is past the end is never stored
            position[half] = row[half] % layer.frames;
            length[half] = layer.lengths ? written(layer.lengths + row[half] / layer.frames) : layer.frames;
        }
    }
    DEVICE bool valid(int half) const { return position[half] < length[half]; }
    DEVICE static int local(int half) { return thread() % 128 / 32 * 16 + thread() % 32 / 4 + 8 * half; }
};

// What a row's norm takes, for the four threads that have the row: asked for as the product begins, joined behind it,
// when norm(x) = factor * raw + off.
struct RowNorm {
    float2 part[MOST_PARTS / 4];
    float mean, scale;   // norm(x) = (x - mean) * scale
    float off, factor;

    DEVICE void ask(const Layer& layer, int row) {
        const int t = thread() % 4;
#pragma unroll
        for (int i = 0; i < MOST_PARTS / 4; i++) {
            part[i] = make_float2(0.0f, 0.0f);
            if (4 * i + t < layer.count) part[i] = written_now(layer.parts + (4 * i + t) * layer.tokens + row);
        }
    }
    DEVICE void join(const Layer& layer) {
        mean = 0.0f, scale = 1.0f, off = 0.0f, factor = 1.0f;
        if (!layer.count) return;
        const int t = thread() % 4;
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < MOST_PARTS / 4; i++) mean += part[i].x;
        for (int mask = 2; mask; mask /= 2) mean += shuffle(mean, mask);
        mean *= layer.each / WIDTH;
#pragma unroll
        for (int i = 0; i < MOST_PARTS / 4; i++) {
            const float away = part[i].x - mean;
            if (4 * i + t < layer.count) squares += part[i].y + layer.each * away * away;
        }
        for (int mask = 2; mask; mask /= 2) squares += shuffle(squares, mask);
        // A row of equal numbers has no deviation, and what rounding makes of one is nothing to be divided by.
        const float variance = squares / WIDTH;
        scale = variance > 1e-7f * mean * mean ? root_below(variance + layer.eps) : 0.0f;
        off = -mean * scale;
        factor = scale / RAW;
    }
};

// Where a number is in tiles of 64 rows and WIDE columns, which have the copy engine's order.
template <class T, int WIDE = 64> DEVICE T* in_tiles(char* tiles, int row, int column) {
    constexpr int BYTES_WIDE = WIDE * sizeof(T), EACH = 16 / sizeof(T);
    const int swapped = row / (128 / BYTES_WIDE) % (BYTES_WIDE / 16);
    char* at = tiles + column / WIDE * (ROWS * BYTES_WIDE) + row * BYTES_WIDE;
    return (T*)(at + ((column % WIDE / EACH ^ swapped) * 16 + column % EACH * (int)sizeof(T)));
}

// Two neighbouring numbers of the stream: `raw`, in the compute type, and 8 bits more of each, what that rounds away.
// In bfloat16 both are the upper 24 bits of a float32, to the nearest; in float16 `low` is the upper byte of another.
#if HALF
constexpr float BELOW = 2048.0f;  // makes what float16 rounds away of a number as large as the number, at most
DEVICE float2 joined(u32 raw, u32 low) {
    const float2 high = floats(raw), rest = floats((low & 0xff) << 8 | (low & 0xff00) << 16);
    return make_float2(
        (high.x + rest.x * (1.0f / BELOW)) * (1.0f / RAW), (high.y + rest.y * (1.0f / BELOW)) * (1.0f / RAW));
}
DEVICE void split(float v, float w, u32& raw, u32& low) {
    raw = pair(RAW * v, RAW * w);
    const float2 high = floats(raw);
    const u32 rest = pair((RAW * v - high.x) * BELOW, (RAW * w - high.y) * BELOW) + 0x00800080;
    low = (rest >> 8 & 0xff) | (rest >> 16 & 0xff00);
}
#else
DEVICE float2 joined(u32 raw, u32 low) {
    const u32 v = (raw << 16) + ((int)(low << 24) >> 16);
    const u32 w = (raw & 0xffff0000) + ((int)(low << 16) >> 16 & 0xffffff00);
    return make_float2(float_of(v), float_of(w));
}
DEVICE void split(float v, float w, u32& raw, u32& low) {
    const u32 x = bits_of(v) + 0x80, y = bits_of(w) + 0x80;
    raw = (x + 0x8000) >> 16 | ((y + 0x8000) & 0xffff0000);
    low = (x >> 8 & 0xff) | (y & 0xff00);
}
#endif
