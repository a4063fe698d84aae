// What kernels of many tokens need of the card besides: tiles by the copy engine, and products of four warps together.
// tests/kernels/emulated_warpgroups.h has the same for a CPU.
struct __align__(64) Matrix { char bytes[128]; };  // as the driver describes a matrix and its tiles
#define CONSTANT const __grid_constant__
// Asked for before a wait, so that the first copy by it need not.
DEVICE void described(const Matrix& matrix) { asm volatile("prefetch.tensormap [%0];" :: "l"(&matrix) : "memory"); }

DEVICE void together() { __syncwarp(); }
DEVICE int uniform(int v) { return __shfl_sync(0xffffffff, v, 0); }  // lets the compiler know that a warp shares it

// A flag with a phase: it turns when all `arrivals` and expected bytes are there, and begins again.
DEVICE void opened(Flag* flag, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(flag)), "r"(arrivals) : "memory");
}
DEVICE void all_opened() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrived(Flag* flag, int parity) {
    u32 done = 0;
    while (!done)
        asm volatile("{.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(shared_address(flag)), "r"(parity) : "memory");
}
DEVICE void arrive_here(Flag* flag) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(flag)) : "memory");
}
// At the same place of a program of the cluster; tells it nothing of what was written.
DEVICE void arrive_at(Flag* flag, int program) {
    asm volatile("{.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there];}"
                 :: "r"(shared_address(flag)), "r"(program) : "memory");
}

// A tile of a matrix, 128 bytes wide, to shared memory in the matrix unit's order; what lies outside comes as zeros.
DEVICE void tile_copied(void* to, const Matrix& matrix, int column, int row, Flag* flag) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];"
                 :: "r"(shared_address(to)), "l"(&matrix), "r"(column), "r"(row), "r"(shared_address(flag)) : "memory");
}
// The same to all programs of the cluster, each of which has its flag at the same place.
DEVICE void tile_shared(void* to, const Matrix& matrix, int column, int row, Flag* flag) {
    const unsigned short all = (1 << PROGRAMS) - 1;
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;"
                 :: "r"(shared_address(to)), "l"(&matrix), "r"(column), "r"(row), "r"(shared_address(flag)), "h"(all)
                 : "memory");
}

// A tile back to its matrix; what lies outside is left out. Before it, `seen_by_copies` by all who wrote it, and a
// meeting.
DEVICE void written_seen_by_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }  // of whom it heard
DEVICE void seen_by_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void tile_stored(const Matrix& matrix, int column, int row, const void* from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 :: "l"(&matrix), "r"(column), "r"(row), "r"(shared_address(from)) : "memory");
}
DEVICE void stores_read() {  // this thread's: what they read may be written to
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
DEVICE void sync_eight() { asm volatile("bar.sync 1, 256;" ::: "memory"); }  // the first eight warps; nine of them
DEVICE void sync_nine() { asm volatile("bar.sync 2, 288;" ::: "memory"); }
DEVICE void sync_four(int group) { asm volatile("bar.sync %0, 128;" :: "r"(group + 1) : "memory"); }

// A tile of 64 columns in shared memory as the matrix unit wants it described; `later`, so many bytes behind.
typedef u32 Operand;
DEVICE Operand operand(const char* tile) { return (shared_address(tile) & 0x3ffff) >> 4 | 1 << 16; }
DEVICE Operand later(Operand first, int bytes) { return first + bytes / 16; }
#define REST "0x40000040"  // the upper half: rows of 128 bytes in groups of eight, swizzled

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_committed() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DEVICE void products_done() {  // but for the last LEFT that were committed
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
}

// c (64, N) = a (64, 16) b (N, 16)^T, or += with `add`. Warp w of four has rows 16 w to 16 w + 15, in each 8 columns as
// `multiply_add` has them.
#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
DEVICE void multiply_tile(float (&c)[64], Operand a, Operand b, int add) {
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 ".reg .b64 a, b;\nmov.b64 a, {%64, " REST "};\nmov.b64 b, {%65, " REST "};\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." OPERANDS " {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
                 "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"
                 "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, a, b, p, 1, 1, 0, 0;}"
                 : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48) : "r"(a), "r"(b), "r"(add));
}
DEVICE void multiply_tile(float (&c)[32], Operand a, Operand b, int add) {
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 ".reg .b64 a, b;\nmov.b64 a, {%32, " REST "};\nmov.b64 b, {%33, " REST "};\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." OPERANDS " {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
                 "%27,%28,%29,%30,%31}, a, b, p, 1, 1, 0, 0;}"
                 : SIXTEEN(0), SIXTEEN(16) : "r"(a), "r"(b), "r"(add));
}
DEVICE void multiply_tile(float (&c)[16], Operand a, Operand b, int add) {
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
                 ".reg .b64 a, b;\nmov.b64 a, {%16, " REST "};\nmov.b64 b, {%17, " REST "};\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32." OPERANDS " {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, a, b, p, 1, 1, 0, 0;}"
                 : SIXTEEN(0) : "r"(a), "r"(b), "r"(add));
}
DEVICE float2 written_now(const float2* p) {  // `written`, asked for where it stands
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
    return v;
}
