// What the kernels need of the card. tests/kernels/emulated.h has the same for a CPU.
typedef unsigned int u32;
#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
#define SHARED(name) extern __shared__ __align__(128) char name[]

#if TIMED
extern "C" { __device__ long long marks[64]; }
#define MARK(i) if (threadIdx.x == 0 && blockIdx.x == 0) marks[i] = clock64()
#else
#define MARK(i)
#endif

DEVICE int thread() { return threadIdx.x; }
DEVICE int group() { return blockIdx.x / PROGRAMS; }
DEVICE int groups() { return gridDim.x / PROGRAMS; }
DEVICE int rank() {
    u32 r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
DEVICE void sync() { __syncthreads(); }
DEVICE void arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void all_here() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void release() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE float shuffle(float v, int mask) { return __shfl_xor_sync(0xffffffff, v, mask); }
DEVICE u32 shuffle(u32 v, int mask) { return __shfl_xor_sync(0xffffffff, v, mask); }
DEVICE u32 alike(int v) { return __match_any_sync(0xffffffff, v); }  // the lanes that have the same
DEVICE int ones(u32 v) { return __popc(v); }
DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 bits_of(float v) { return __float_as_uint(v); }

// Weights, which no kernel writes; volatile, so that they are asked for before a wait that stands behind them.
DEVICE uint4 weights16(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// What the copy engine brings into shared memory while threads do other things. One thread calls `opened`, then all
// `sync`; one thread says how many bytes `expected`; `arrived` waits for them.
typedef unsigned long long Flag;
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void opened(Flag* flag) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(flag)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void expected(Flag* flag, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(flag)), "r"(bytes) : "memory");
}
DEVICE void copied(void* to, const void* from, int bytes, Flag* flag) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(flag)) : "memory");
}
DEVICE void arrived(Flag* flag) {
    u32 done = 0;
    while (!done)
        asm volatile("{.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(shared_address(flag)) : "memory");
}

// Numbers to the same place of another program of the cluster, whose flag at the same place counts their bytes: who
// waits for them needs no barrier, which takes as long as they do. `opened` and `expected` come before the cluster meets.
DEVICE u32 address_at(const void* p, int program) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(program));
    return there;
}
#define SENT "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"
DEVICE void sent(uint4* to, uint4 v, Flag* flag, int program) {
    asm volatile(SENT ".v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(address_at(to, program)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w),
                    "r"(address_at(flag, program)) : "memory");
}
DEVICE void sent(float2* to, float2 v, Flag* flag, int program) {
    asm volatile(SENT ".v2.f32 [%0], {%1, %2}, [%3];"
                 :: "r"(address_at(to, program)), "f"(v.x), "f"(v.y), "r"(address_at(flag, program)) : "memory");
}
DEVICE void sent(float* to, float v, Flag* flag, int program) {
    asm volatile(SENT ".f32 [%0], %1, [%2];"
                 :: "r"(address_at(to, program)), "f"(v), "r"(address_at(flag, program)) : "memory");
}
DEVICE void received(Flag* flag) {
    u32 done = 0;
    while (!done)
        asm volatile("{.reg .pred p;\n"
                     "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(shared_address(flag)) : "memory");
}

DEVICE float2 weights8(const void* p) {
    float2 v;
    asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
    return v;
}
DEVICE float weights4(const void* p) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}
DEVICE u32 weights_pair(const void* p) {
    u32 v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
DEVICE void ahead(const void* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }
// What another kernel, or another program, wrote: past the L1 cache, where a line may be older.
template <class T> DEVICE T written(const T* p) { return __ldcg(p); }

// *p += v, by the cache.
DEVICE void add_to(float2* p, float2 v) {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" :: "l"(p), "f"(v.x), "f"(v.y) : "memory");
}

// Programs of a launch that tell each other how far they are; gives what was there before.
DEVICE int counted_by_all(int* p) { return atomicAdd(p, 1); }
// What this program's threads wrote before they met is there for whoever heard of it and meets its own program then.
DEVICE void told(int* p) { asm volatile("red.add.release.gpu.global.s32 [%0], 1;" :: "l"(p) : "memory"); }
DEVICE int heard_of(const int* p) {
    int now;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(p) : "memory");
    return now;
}

DEVICE float root_below(float v) { return rsqrtf(v); }  // 1 / sqrt(v)
DEVICE float power_of_two(float v) {
    float p;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(v));
    return p;
}
DEVICE float sigmoid(float v) { return __fdividef(1.0f, 1.0f + power_of_two(-1.4426950408889634f * v)); }

DEVICE u32 pair(float a, float b) {  // a in the lower half
    u32 v;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
#endif
    return v;
}
DEVICE u32 pair_half(float a, float b) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
    return v;
}
DEVICE float2 floats_half(u32 v) {
    float2 f;
    asm("{.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;}"
        : "=f"(f.x), "=f"(f.y) : "r"(v));
    return f;
}
// Four numbers of 8 bits (e4m3) as float16.
DEVICE uint2 halves(u32 v) {
    uint2 h;
    asm("{.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.rn.f16x2.e4m3x2 %0, a;\ncvt.rn.f16x2.e4m3x2 %1, b;}"
        : "=r"(h.x), "=r"(h.y) : "r"(v));
    return h;
}
DEVICE float2 floats(u32 v) {
#if HALF
    return floats_half(v);
#else
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000));
#endif
}

// c (16, 8) += a (16, 16) b (16, 8)
#if HALF
#define OPERANDS "f16.f16"
#else
#define OPERANDS "bf16.bf16"
#endif
#define MULTIPLY_ADD(operands)                                                                          \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." operands ".f32 "                               \
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                 \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                        \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
DEVICE void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { MULTIPLY_ADD(OPERANDS); }
DEVICE void multiply_add_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    MULTIPLY_ADD("f16.f16");
}
