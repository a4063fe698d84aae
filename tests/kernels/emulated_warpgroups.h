// m3asr/kernels/clusters/warpgroups.cu on a CPU. Tiles are copied, and products made, as late as may be.
#include <deque>

#define CONSTANT const
DEVICE int uniform(int v) {
    here->given[0] = v;
    together();
    v = mate(0).given[0];
    together();
    return v;
}
struct Matrix { char* first; long long inner, count; int rows, size, columns; };

DEVICE void described(const Matrix&) {}

struct Phased {
    int arrivals = 0, left = 0, bytes = 0, phase = 0;
    std::vector<std::function<void()>> copies;
};
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
DEVICE void all_opened() {}
DEVICE void expected_here(Flag* flag, int bytes) {
    of_phased[flag].bytes += bytes, of_phased[flag].left--;
    turn(of_phased[flag]);
}
#define expected expected_here
DEVICE void copied_here(void* to, const void* from, int bytes, Flag* flag) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) abort();
    Phased& there = of_phased.at(flag);
    there.bytes -= bytes;
    there.copies.push_back([=] { memcpy(to, from, bytes); });
    turn(there);
}
#define copied copied_here
DEVICE void arrived(Flag* flag, int parity) {  // of the phases only the last one that ended can be told from this one
    while (of_phased.at(flag).phase % 2 == parity) yield();
}
DEVICE void arrive_here(Flag* flag) {
    if (--of_phased.at(flag).left < 0) abort();
    turn(of_phased.at(flag));
}
DEVICE void arrive_at(Flag* flag, int program) {
    Phased& there = of_phased.at(of(flag, program));
    if (--there.left < 0) abort();
    turn(there);
}

// visit(place in the tile, place in the matrix, if there is one)
template <class Visit> static void each_of(const void* tile, const Matrix& matrix, int column, int row, Visit visit) {
    const int each = 16 / matrix.size, bytes = matrix.columns * matrix.size;
    for (int r = 0; r < matrix.rows; r++)
        for (int c = 0; c < bytes / matrix.size; c++) {
            bool inside = row + r < matrix.count && column + c < matrix.inner;
            int swapped = r / (128 / bytes) % (bytes / 16);
            visit((char*)tile + r * bytes + (c / each ^ swapped) * 16 + c % each * matrix.size,
                  inside ? matrix.first + ((row + r) * matrix.inner + column + c) * matrix.size : nullptr);
        }
}
static void bring(void* to, const Matrix& matrix, int column, int row, Flag* flag) {
    if ((uintptr_t)to % 1024) abort();
    Phased& there = of_phased.at(flag);
    there.bytes -= matrix.rows * matrix.columns * matrix.size;
    there.copies.push_back([=] { each_of(to, matrix, column, row, [&](char* here, char* there) {
        if (there) memcpy(here, there, matrix.size);
        else memset(here, 0, matrix.size);
    }); });
    turn(there);
}
DEVICE void tile_copied(void* to, const Matrix& matrix, int column, int row, Flag* flag) {
    bring(to, matrix, column, row, flag);
}
DEVICE void tile_shared(void* to, const Matrix& matrix, int column, int row, Flag* flag) {
    for (int program = 0; program < PROGRAMS; program++)
        bring(of((char*)to, program), matrix, column, row, of(flag, program));
}

DEVICE void seen_by_copies() {}
static std::map<Fibre*, std::vector<std::function<void()>>> of_stores;
DEVICE void tile_stored(const Matrix& matrix, int column, int row, const void* from) {
    of_stores[here].push_back([=] {
        each_of(from, matrix, column, row, [&](char* here, char* there) {
            if (there) memcpy(there, here, matrix.size);
        });
    });
}
DEVICE void stores_read() {
    for (int i = 0; i < 3; i++) yield();
    for (auto& store : of_stores[here]) store();
    of_stores[here].clear();
}
static Gate of_four[PROGRAMS][THREADS / 128 + 1];
static Gate of_eight[PROGRAMS], of_nine[PROGRAMS];
DEVICE void sync_eight() { meet(of_eight[here->program], 256); }
DEVICE void sync_nine() { meet(of_nine[here->program], 288); }
DEVICE void written_seen_by_copies() {}
DEVICE void sync_four(int group) { meet(of_four[here->program][group], 128); }

typedef const char* Operand;
DEVICE Operand operand(const char* tile) { return tile; }
DEVICE Operand later(Operand first, int bytes) { return first + bytes; }
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
template <int COUNT> DEVICE void multiply_tile(float (&c)[COUNT], Operand a, Operand b, int add) {
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
