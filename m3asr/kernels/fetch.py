"""Weights brought into the L2 cache while the memory has nothing else to do."""

from __future__ import annotations

import triton
import triton.language as tl

BYTES = tl.constexpr(4096)  # of one request


@triton.jit
def _fetch_kernel(ptr, requests, PER_REQUEST: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(tl.program_id(0) * BLOCK, requests, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.inline_asm_elementwise(
            "{.reg .pred p;\n setp.ne.s32 p, $2, 0;\n @p cp.async.bulk.prefetch.L2.global [$1], $3;\n mov.u32 $0, 0;}",
            "=r,l,r,r",
            [ptr + i.to(tl.int64) * PER_REQUEST, (i < requests).to(tl.int32), BYTES],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def fetch(weight) -> None:
    """Ask for all of `weight`: nothing is computed, and nothing waits for it.

    For cards with a copy engine (compute capability 9.0). What is behind the last whole 4096 bytes is not asked for.
    """
    size = weight.element_size()
    requests = weight.numel() * size // BYTES.value
    _fetch_kernel[(max(1, min(16, triton.cdiv(requests, 128))),)](
        weight, requests, PER_REQUEST=BYTES.value // size, BLOCK=128, num_warps=4
    )
