"""The head and the best path without the log-probabilities: each frame's most probable symbol and its own alone.

A frame's scores are never written, 363 MB for 16384 frames and 5537 symbols: each tile of the product leaves its
largest score, where it stands and the sum of exponentials below it, and a second kernel joins them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from m3asr.kernels.pieces import Tile, copied_product, multiprocessors, release, wait


@triton.jit
def _best_kernel(
    a,
    w,
    b_ptr,
    top_ptr,
    where_ptr,
    total_ptr,
    tokens,
    columns,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    wait(PDL)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    tiles = tl.cdiv(tokens, BLOCK_M) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, col = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        acc = copied_product(a, w, row, col, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K, DOT)
        cols = col + tl.arange(0, BLOCK_N)
        acc += tl.load(b_ptr + cols, mask=cols < columns, other=-float("inf"))[None, :]
        top = tl.max(acc, axis=1)
        # The first of equals.
        where = tl.min(tl.where(acc == top[:, None], cols[None, :], columns), axis=1)
        total = tl.sum(tl.exp(acc - top[:, None]), axis=1)
        rows = row + tl.arange(0, BLOCK_M)
        at = tile % tiles_n * tokens + rows
        tl.store(top_ptr + at, top, mask=rows < tokens)
        tl.store(where_ptr + at, where, mask=rows < tokens)
        tl.store(total_ptr + at, total, mask=rows < tokens)


@triton.jit
def _join_kernel(
    top_ptr,
    where_ptr,
    total_ptr,
    best_ptr,
    peak_ptr,
    tokens,
    tiles,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = tl.arange(0, BLOCK_T)
    at = t[:, None] * tokens + rows[None, :]
    mask = (t < tiles)[:, None] & (rows < tokens)[None, :]
    wait(PDL)
    tops = tl.load(top_ptr + at, mask=mask, other=-float("inf"))  # (BLOCK_T, BLOCK_M)
    where = tl.load(where_ptr + at, mask=mask, other=0)
    totals = tl.load(total_ptr + at, mask=mask, other=0.0)
    # Where no row is, not infinities whose difference is no number.
    top = tl.where(rows < tokens, tl.max(tops, axis=0), 0.0)
    best = tl.min(tl.where(tops == top[None, :], where, columns), axis=0)
    total = tl.sum(totals * tl.exp(tops - top[None, :]), axis=0)
    tl.store(best_ptr + rows, best, mask=rows < tokens)
    tl.store(peak_ptr + rows, -tl.log(tl.where(rows < tokens, total, 1.0)), mask=rows < tokens)


def best_path(a, weight, bias, best, peak, *, tile: Tile, dot="ieee", pdl=False) -> None:
    """best int32 (N,): the first largest column of each row of a weight^T + bias, peak float32 (N,): that one's
    log-softmax.

    a (N, K), weight (V, K) in the compute type, both `pieces.copyable`; bias float32 (V,). The tile's programs stay.
    """
    tokens, width = a.shape
    columns = weight.shape[0]
    tiles_n = triton.cdiv(columns, tile.n)
    parts = torch.empty(3, tiles_n, tokens, device=a.device)
    top, where, total = parts[0], parts[1].view(torch.int32), parts[2]
    programs = min(tiles_n * triton.cdiv(tokens, tile.m), max(1, tile.copied) * multiprocessors(a.device))
    _best_kernel[(programs,)](
        TensorDescriptor.from_tensor(a, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight, [tile.n, tile.k]),
        bias,
        top,
        where,
        total,
        tokens,
        columns,
        WIDTH=width,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        DOT=dot,
        PDL=pdl,
        **tile.options(pdl),
    )
    rows = 32
    _join_kernel[(triton.cdiv(tokens, rows),)](
        top, where, total, best, peak, tokens, tiles_n, columns, BLOCK_M=rows, BLOCK_T=triton.next_power_of_2(tiles_n),
        PDL=pdl, **Tile(1, 1, warps=4).options(pdl),
    )  # fmt: skip
