// A card on a CPU: each thread of a cluster is a fibre, and whatever threads do together is a meeting of fibres.
// Which fibre runs next is drawn at random (`seed`), so that a missing barrier shows.
#include <setjmp.h>
#include <stdint.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <utility>
#include <vector>

typedef unsigned int u32;
#define DEVICE inline
#define KERNEL extern "C" void
#define SHARED(name) char* name = memory_of(here->program)
#define MARK(i)
using std::min;

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

constexpr int BYTES = 232448;
struct Gate { int count = 0, turn = 0; };
struct Fibre {
    ucontext_t context;  // where it begins; from its first turn on it is where it stopped that counts
    jmp_buf stopped;
    int thread, program, turn = 0;
    bool begun = false, done = false;
    u32 given[6];
};
static std::vector<Fibre> fibres;
static std::vector<char> shared_memory(PROGRAMS * BYTES + 1024), stacks;
static Gate of_cluster, of_program[PROGRAMS], of_warp[PROGRAMS * THREADS / 32];
static Fibre* here;
static int group_now, groups_all;
static jmp_buf scheduler;
static size_t asked;  // bytes of shared memory
static std::function<void()> body;

static char* memory_of(int program) {
    char* first = (char*)(((uintptr_t)shared_memory.data() + 1023) / 1024 * 1024);
    return first + (size_t)program * BYTES;
}
// Jumps, because swapcontext asks the system for its mask of signals each time, and there are millions of turns.
static void yield() {
    if (!_setjmp(here->stopped)) _longjmp(scheduler, 1);
}
static void run_on() {
    if (_setjmp(scheduler)) return;
    if (here->begun) _longjmp(here->stopped, 1);
    here->begun = true;
    setcontext(&here->context);
}
static void meet(Gate& gate, int size) {
    int turn = gate.turn;
    if (++gate.count == size) gate.count = 0, gate.turn++;
    else while (gate.turn == turn) yield();
}
static Gate& warp_gate() { return of_warp[here->program * (THREADS / 32) + here->thread / 32]; }
static Fibre& mate(int lane) { return fibres[here->program * THREADS + here->thread / 32 * 32 + lane]; }

DEVICE int thread() { return here->thread; }
DEVICE int group() { return group_now; }
#ifdef AT_ONCE  // single programs, so many of which run at once
DEVICE int groups() { return groups_all * PROGRAMS; }
#else
DEVICE int groups() { return groups_all; }
#endif
DEVICE int rank() { return here->program; }
DEVICE void sync() { meet(of_program[here->program], THREADS); }
DEVICE void together() { meet(warp_gate(), 32); }
DEVICE void arrive() {
    here->turn = of_cluster.turn;
    if (++of_cluster.count == PROGRAMS * THREADS) of_cluster.count = 0, of_cluster.turn++;
}
DEVICE void all_here() { while (of_cluster.turn == here->turn) yield(); }
DEVICE void release() {}
DEVICE void wait() {}
DEVICE u32 shuffle(u32 v, int mask) {
    here->given[0] = v;
    together();
    u32 other = mate(here->thread % 32 ^ mask).given[0];
    together();
    return other;
}
DEVICE float float_of(u32 bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
DEVICE u32 bits_of(float v) {
    u32 bits;
    memcpy(&bits, &v, 4);
    return bits;
}
DEVICE float shuffle(float v, int mask) { return float_of(shuffle(bits_of(v), mask)); }
DEVICE u32 alike(int v) {
    here->given[0] = v;
    together();
    u32 mask = 0;
    for (int lane = 0; lane < 32; lane++) mask |= (u32)(mate(lane).given[0] == (u32)v) << lane;
    together();
    return mask;
}
DEVICE int ones(u32 v) { return __builtin_popcount(v); }
template <class T> DEVICE T* of(T* place, int program) {
    size_t at = (char*)place - memory_of(here->program);
    if (at >= asked) abort();
    return (T*)(memory_of(program) + at);
}
template <class T> static T aligned(const void* p) {
    if ((uintptr_t)p % sizeof(T)) { fprintf(stderr, "misaligned\n"); abort(); }
    return *(const T*)p;
}
DEVICE uint4 weights16(const void* p) { return aligned<uint4>(p); }
typedef unsigned long long Flag;
struct Copy { void* to; const void* from; int bytes; };
struct Expected { int bytes = 0, copied = 0; std::vector<Copy> copies; std::vector<std::function<void()>> values; };
static std::map<Flag*, Expected> of_flag;
DEVICE void opened(Flag* flag) { of_flag[flag] = Expected(); }
DEVICE void expected(Flag* flag, int bytes) { of_flag[flag].bytes = bytes; }
DEVICE void copied(void* to, const void* from, int bytes, Flag* flag) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) abort();
    of_flag[flag].copied += bytes;
    of_flag[flag].copies.push_back({to, from, bytes});
}
DEVICE void arrived(Flag* flag) {  // copies are made as late as may be
    Expected& all = of_flag[flag];
    while (!all.bytes || all.copied < all.bytes) yield();
    for (Copy& copy : all.copies) memcpy(copy.to, copy.from, copy.bytes);
    all.copies.clear();
}
static bool early;  // what is sent arrives at once, or as late as may be: by the seed
template <class T> DEVICE void sent(T* to, T v, Flag* flag, int program) {
    T* there = of(to, program);
    if ((uintptr_t)there % sizeof(T)) abort();
    Expected& all = of_flag.at(of(flag, program));
    all.copied += sizeof(T);
    if (early) *there = v;
    else all.values.push_back([=] { *there = v; });
}
DEVICE void received(Flag* flag) {
    Expected& all = of_flag.at(flag);
    while (all.copied < all.bytes) yield();
    if (all.copied > all.bytes) abort();
    for (auto& value : all.values) value();
    all.values.clear();
}
DEVICE float2 weights8(const void* p) { return aligned<float2>(p); }
DEVICE float weights4(const void* p) { return aligned<float>(p); }
DEVICE u32 weights_pair(const void* p) { return aligned<u32>(p); }
DEVICE void ahead(const void*) {}
DEVICE float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }
DEVICE float root_below(float v) { return 1.0f / sqrtf(v); }
DEVICE float power_of_two(float v) { return exp2f(v); }
template <class T> DEVICE T written(const T* p) { return aligned<T>(p); }
DEVICE void add_to(float2* p, float2 v) { p->x += v.x, p->y += v.y; }
DEVICE int counted_by_all(int* p) { return (*p)++; }
DEVICE void told(int* p) { ++*p; }
DEVICE int heard_of(const int* p) {
    yield();
    return *p;
}

static float from_number(uint16_t v, bool half) {
    if (half) {
        _Float16 f;
        memcpy(&f, &v, 2);
        return f;
    }
    return float_of((u32)v << 16);
}
static u32 to_number(float f, bool half) {
    if (half) {
        _Float16 h = f;
        uint16_t v;
        memcpy(&v, &h, 2);
        return v;
    }
    u32 bits = bits_of(f);
    if (f != f) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 pair(float a, float b) { return to_number(a, HALF) | to_number(b, HALF) << 16; }
DEVICE u32 pair_half(float a, float b) { return to_number(a, true) | to_number(b, true) << 16; }
DEVICE float2 floats(u32 v) { return {from_number(v & 0xffff, HALF), from_number(v >> 16, HALF)}; }

DEVICE float2 floats_half(u32 v) { return {from_number(v & 0xffff, true), from_number(v >> 16, true)}; }

DEVICE uint2 halves(u32 v) {  // of e4m3, whose numbers are float16's with the exponent's bias 7 in place of 15
    auto half = [&](int i) -> u32 {
        u32 bits = v >> 8 * i & 0xff;
        return bits >> 7 << 15 | to_number(from_number((bits & 0x7f) << 7, true) * 256.0f, true);
    };
    return {half(0) | half(1) << 16, half(2) | half(3) << 16};
}

template <bool OF_HALF = HALF>
DEVICE void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(here->given, mine, sizeof mine);
    together();
    int g = here->thread % 32 / 4, t = here->thread % 4;
    for (int i = 0; i < 4; i++) {
        int column = 2 * t + i % 2, upper = i / 2;
        for (int k = 0; k < 16; k++) {
            int lane = k % 8 / 2, later = k / 8, odd = k % 2 * 16;
            u32 a = mate(g * 4 + lane).given[later * 2 + upper] >> odd & 0xffff;
            u32 b = mate(column * 4 + lane).given[4 + later] >> odd & 0xffff;
            c[i] += from_number(a, OF_HALF) * from_number(b, OF_HALF);
        }
    }
    together();
}
#define multiply_add_half multiply_add<true>

static void start() {
    body();
    here->done = true;
    yield();
}

static void run(int groups, int seed, size_t shared) {
    asked = shared, groups_all = groups, early = seed % 2;
    constexpr size_t STACK = 48 << 10;
    std::minstd_rand random(seed + 1);
    int all = PROGRAMS * THREADS;
    stacks.resize(all * STACK);
    for (group_now = 0; group_now < groups; group_now++) {
        fibres.assign(all, Fibre());
        of_cluster = Gate();
        for (Gate& gate : of_program) gate = Gate();
        for (Gate& gate : of_warp) gate = Gate();
        memset(shared_memory.data(), 0xff, shared_memory.size());  // whatever is not written is no number
        for (int i = 0; i < all; i++) {
            Fibre& fibre = fibres[i];
            fibre.thread = i % THREADS, fibre.program = i / THREADS;
            getcontext(&fibre.context);
            fibre.context.uc_stack.ss_sp = stacks.data() + i * STACK;
            fibre.context.uc_stack.ss_size = STACK;
            makecontext(&fibre.context, start, 0);
        }
        for (int left = all, idle = 0; left;) {
            int favoured = random() % (PROGRAMS + 1), before = left;  // one program runs ahead of the others
            for (int i = 0; i < all; i++) {
                here = &fibres[i];
                if (here->done || (favoured < PROGRAMS && idle < 50 && here->program != favoured)) continue;
                run_on();
                left -= here->done;
            }
            idle = favoured < PROGRAMS ? idle + 1 : 0;
            if (before == left && idle > 1000000) abort();
        }
        for (int p = 0; p < PROGRAMS; p++)  // nothing was written past what was asked for
            for (size_t i = (shared + 3) / 4 * 4; i < BYTES; i += 4)
                if (*(u32*)(memory_of(p) + i) != 0xffffffff) abort();
    }
}

template <class... A, size_t... I> static void call(void (*kernel)(A...), void** given, std::index_sequence<I...>) {
    kernel(*(A*)given[I]...);
}
template <class... A> static void launch(void (*kernel)(A...), int groups, int seed, int shared, void** given) {
    body = [=] { call(kernel, given, std::index_sequence_for<A...>()); };
    run(groups, seed, shared);
}
#define LAUNCHED(name) \
    extern "C" void launch_##name(int groups, int seed, int shared, void** given) { \
        launch(name, groups, seed, shared, given);                                 \
    }
