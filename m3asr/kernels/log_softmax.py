"""Log-softmax over the vocabulary, in place, and the best path: each frame's most probable symbol."""

from __future__ import annotations

import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, release, wait


@triton.jit
def _log_softmax_kernel(x_ptr, best_ptr, peak_ptr, columns, BLOCK_N: tl.constexpr, PDL: tl.constexpr):
    release(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * columns
    cols = tl.arange(0, BLOCK_N)
    highest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    where = tl.full((BLOCK_N,), 0, tl.int32)
    for start in range(0, columns, BLOCK_N):
        x = tl.load(x_ptr + start + cols, mask=start + cols < columns, other=-float("inf"))
        where = tl.where(x > highest, start + cols, where)
        highest = tl.maximum(highest, x)
    top = tl.max(highest, axis=0)
    # The first of equals.
    best = tl.min(tl.where(highest == top, where, columns), axis=0)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        total += tl.exp(tl.load(x_ptr + start + cols, mask=start + cols < columns, other=-float("inf")) - top)
    normaliser = top + tl.log(tl.sum(total, axis=0))
    for start in range(0, columns, BLOCK_N):
        x = tl.load(x_ptr + start + cols, mask=start + cols < columns, other=0.0)
        tl.store(x_ptr + start + cols, x - normaliser, mask=start + cols < columns)
    tl.store(best_ptr + row, best)
    tl.store(peak_ptr + row, top - normaliser)


def log_softmax(x, best, peak, *, tile: Tile, pdl=False) -> None:
    """x float32 (N, V) becomes its log-softmax over V; best int32 (N,) the first largest column of each row, peak
    float32 (N,) its log-probability.
    """
    _log_softmax_kernel[(x.shape[0],)](x, best, peak, x.shape[1], BLOCK_N=tile.n, PDL=pdl, **tile.options(pdl))
