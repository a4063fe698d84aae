// m3asr/kernels/clusters/warpgroups.cu on a CPU. Tiles are copied, and products made, as late as may be.
#include <deque>

#define CONSTANT const
struct Matrix { const uint16_t* first; long long inner, count; int rows; };

struct Phased { int arrivals = 0, left = 0, bytes = 0; bool turned = false; int phase = 0; std::vector<std::function<void()>> copies; };
static std::map<Flag*, Phased> of_phased;
static void turn(Phased& flag) {
    if (flag.left || flag.bytes) return;
    for (auto& copy : flag.copies) copy();
    flag.copies.clear(), flag.left = flag.arrivals, flag.phase++;
}
DEVICE void opened(Flag* flag, int arrivals) {
    of_phased[flag] = Phased();
    of_phased[flag].arrivals = of_phased[flag].left = arrivals;
}
DEVICE void expected_here(Flag* flag, int bytes) {
    of_phased[flag].bytes += bytes, of_phased[flag].left--;
    turn(of_phased[flag]);
}
#define expected expected_here
DEVICE void arrived(Flag* flag, int parity) {  // of the phases only the last one that ended can be told from this one
    while (of_phased.at(flag).phase % 2 == parity) yield();
}
DEVICE void arrive_at(Flag* flag, int program) {
    Phased& there = of_phased.at(of(flag, program));
    if (--there.left < 0) abort();
    turn(there);
}

static void bring(void* to, const Matrix& matrix, int column, int row, Flag* flag) {
    if ((uintptr_t)to % 1024) abort();
    Phased& there = of_phased.at(flag);
    there.bytes -= matrix.rows * 128;
    there.copies.push_back([=] {
        for (int r = 0; r < matrix.rows; r++)
            for (int c = 0; c < 64; c++) {
                bool inside = row + r < matrix.count && column + c < matrix.inner;
                ((uint16_t*)to)[r * 64 + (c / 8 ^ r % 8) * 8 + c % 8] =
                    inside ? matrix.first[(row + r) * matrix.inner + column + c] : 0;
            }
    });
    turn(there);
}
DEVICE void tile_copied(void* to, const Matrix& matrix, int column, int row, Flag* flag) {
    bring(to, matrix, column, row, flag);
}
DEVICE void tile_shared(void* to, const Matrix& matrix, int column, int row, Flag* flag) {
    for (int program = 0; program < PROGRAMS; program++) bring(of((char*)to, program), matrix, column, row, of(flag, program));
}

DEVICE const char* operand(const char* tile, int part) { return tile + part * 32; }
static float swizzled(const char* tile_part, int row, int k) {
    const char* tile = (const char*)((uintptr_t)tile_part / 1024 * 1024);  // rows of 128 bytes begin every 1024 / 8
    int byte = (int)(tile_part - tile) + k * 2;
    return from_number(*(const uint16_t*)(tile + row * 128 + (byte / 16 ^ row % 8) * 16 + byte % 16), HALF);
}
struct Batch { std::vector<std::function<void()>> products; };
static std::map<Fibre*, std::deque<Batch>> of_fibre;
DEVICE void products_begin() { of_fibre[here].emplace_back(); }
DEVICE void products_committed() {}
template <int LEFT> DEVICE void products_done() {
    while ((int)of_fibre[here].size() > LEFT) {
        for (auto& product : of_fibre[here].front().products) product();
        of_fibre[here].pop_front();
    }
    for (int i = 0; i < 3; i++) yield();  // whoever does not wait for it runs on
    together();
}
template <int COUNT> DEVICE void multiply_tile(float (&c)[COUNT], const char* a, const char* b, int add) {
    float* sums = c;
    int row = here->thread / 32 % 4 * 16 + here->thread % 32 / 4, column = here->thread % 4 * 2;
    of_fibre[here].back().products.push_back([=] {
        for (int i = 0; i < COUNT; i++) {
            float sum = add ? sums[i] : 0.0f;
            for (int k = 0; k < 16; k++)
                sum += swizzled(a, row + i / 2 % 2 * 8, k) * swizzled(b, i / 4 * 8 + column + i % 2, k);
            sums[i] = sum;
        }
    });
}
DEVICE float2 written_now(const float2* p) { return aligned<float2>(p); }
