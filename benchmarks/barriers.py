"""What programs that work together cost on this card: barriers of a cluster and of a grid, and streams of weights."""

from __future__ import annotations

import torch

from benchmarks.card import timed
from m3asr.kernels.clusters.machine import Kernels

SOURCE = r"""
typedef unsigned int u32;
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ u32 rank() { u32 r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ __forceinline__ u32 size() { u32 r; asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)); return r; }
__device__ __forceinline__ u32 there(void* p, u32 of) {
    u32 here = (u32)__cvta_generic_to_shared(p), r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(here), "r"(of));
    return r;
}

// Barriers of a cluster; with `exchange` a value goes to the neighbour before each and is read after it, by way of
// its shared memory (1) or of the L2 cache (2).
extern "C" __global__ void __launch_bounds__(256) cluster_steps(int* out, int* place, int steps, int exchange) {
    __shared__ int inbox[2][256];
    int value = threadIdx.x;
    u32 next = (rank() + 1) % size();
    int first = blockIdx.x / size() * size() * 256, mine = first + rank() * 256 + (threadIdx.x ^ 1);
    inbox[0][threadIdx.x] = 0;
    cluster_barrier();
    for (int i = 0; i < steps; i++) {
        int half = i & 1;
        if (exchange == 1)
            asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(there(&inbox[half][threadIdx.x], next)), "r"(value));
        if (exchange == 2) place[half * gridDim.x * 256 + first + next * 256 + threadIdx.x] = value;
        cluster_barrier();
        if (exchange == 1) value = inbox[half][threadIdx.x ^ 1] + 1;
        if (exchange == 2) value = __ldcg(&place[half * gridDim.x * 256 + mine]) + 1;
    }
    out[blockIdx.x * 256 + threadIdx.x] = value;
    cluster_barrier();
}

extern "C" __global__ void __launch_bounds__(256) grid_steps(int* out, int* place, int* count, int steps) {
    int value = threadIdx.x, next = (blockIdx.x + 1) % gridDim.x;
    for (int i = 0; i < steps; i++) {
        int half = i & 1;
        place[half * gridDim.x * 256 + next * 256 + threadIdx.x] = value;
        __syncthreads();
        if (threadIdx.x == 0) {
            asm volatile("red.release.gpu.global.add.s32 [%0], 1;" :: "l"(count) : "memory");
            int seen;
            do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
            while (seen < (i + 1) * (int)gridDim.x);
        }
        __syncthreads();
        value = __ldcg(&place[half * gridDim.x * 256 + blockIdx.x * 256 + (threadIdx.x ^ 1)]) + 1;
    }
    out[blockIdx.x * 256 + threadIdx.x] = value;
}

// Reads `units` of 16 bytes, `times` over, by all programs together.
extern "C" __global__ void __launch_bounds__(512) stream(const uint4* from, int* out, int units, int times) {
    u32 sum = 0;
    int stride = gridDim.x * 512;
    for (int t = 0; t < times; t++)
        for (int i = blockIdx.x * 512 + threadIdx.x; i < units; i += 8 * stride) {
            uint4 v[8];
            #pragma unroll
            for (int j = 0; j < 8; j++)
                v[j] = i + j * stride < units ? __ldcg(from + i + j * stride) : uint4{0, 0, 0, 0};
            #pragma unroll
            for (int j = 0; j < 8; j++) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
        }
    if (sum == 12345) out[0] = sum;
}
"""


def of_programs(say) -> dict:
    """Microseconds of a barrier, and bytes a second; what fails is said and passed over."""
    kernels, rows = Kernels(SOURCE), {}
    out, place = (torch.zeros(1 << 18, device="cuda", dtype=torch.int32) for _ in range(2))
    count = torch.zeros(1, device="cuda", dtype=torch.int32)
    names = ("alone", "with an exchange through shared memory", "with an exchange through the L2 cache")
    for cluster in (4, 8, 16):
        for exchange, words in enumerate(names):
            for clusters in (1, 4) if exchange == 1 else (1,):

                def steps(n, c=cluster, x=exchange, k=clusters):
                    kernels.launch("cluster_steps", c * k, 256, out, place, n, x, cluster=c)

                try:
                    short, long = (timed(lambda n=n: steps(n), repeats=10) for n in (10, 1010))
                    rows[f"barrier of {clusters} x {cluster} programs, {words}"] = long - short
                except Exception as error:
                    say(f"cluster of {cluster}: {error}")
    for programs in (16, 64, 132):

        def barriers(n, p=programs):
            count.zero_()
            kernels.launch("grid_steps", p, 256, out, place, count, n)

        short, long = (timed(lambda n=n: barriers(n), repeats=10) for n in (10, 1010))
        rows[f"barrier of a grid of {programs}, with an exchange"] = long - short
    for name, us in rows.items():
        say(f"{us:9.3f} us  {name}")
    weights = torch.empty(1 << 28, device="cuda", dtype=torch.int32)
    weights.random_()
    for size, where in ((8 << 20, "L2 cache"), (1 << 30, "memory")):
        for programs in (16, 64, 128):
            times = max(1, (1 << 28) // size)
            ms = timed(lambda p=programs, s=size, t=times: kernels.launch("stream", p, 512, weights, out, s // 16, t),
                       repeats=5, warmup=2)  # fmt: skip
            rate = rows[f"{programs} programs read from the {where}, TB/s"] = times * size / ms / 1e9
            say(f"{rate:9.2f} TB/s  {programs} programs read from the {where}")
    return rows
