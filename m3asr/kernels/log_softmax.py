"""Log-softmax over the vocabulary, in place."""

from __future__ import annotations

import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, release, wait


@triton.jit
def _log_softmax_kernel(x_ptr, columns, BLOCK_N: tl.constexpr, PDL: tl.constexpr):
    release(PDL)
    wait(PDL)
    x_ptr += tl.program_id(0).to(tl.int64) * columns
    cols = tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    for start in range(0, columns, BLOCK_N):
        top = tl.maximum(top, tl.load(x_ptr + start + cols, mask=start + cols < columns, other=-float("inf")))
    top = tl.max(top, axis=0)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        total += tl.exp(tl.load(x_ptr + start + cols, mask=start + cols < columns, other=-float("inf")) - top)
    normaliser = top + tl.log(tl.sum(total, axis=0))
    for start in range(0, columns, BLOCK_N):
        x = tl.load(x_ptr + start + cols, mask=start + cols < columns, other=0.0)
        tl.store(x_ptr + start + cols, x - normaliser, mask=start + cols < columns)


def log_softmax(x, *, tile: Tile, pdl=False) -> None:
    """x float32 (N, V) becomes its log-softmax over V."""
    _log_softmax_kernel[(x.shape[0],)](x, x.shape[1], BLOCK_N=tile.n, PDL=pdl, **tile.options(pdl))
