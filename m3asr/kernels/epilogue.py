"""What follows a linear layer's product, and a norm in front of it that costs no launch.

A residual stream x goes on as `raw`, x in the compute type, and `parts`: of each row's columns, one tile's at a time,
mean and sum of squares, which whoever wrote x has at hand. Joined as Chan et al. (1979) have it they give the row's
mean m and deviation s, and the product behind multiplies `raw` as it is:
norm(x) w^T = (raw w^T - m * sums of w's rows) / s, which loses m / s times what rounding x / s does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from m3asr.kernels.pieces import activate, gated, mean_of


@dataclass(frozen=True)
class Unnormed:
    """A stream x float32 (N, D) whose norm the next product makes: `raw` (N, D) in the compute type, float16 as x / 16,
    which holds rows of up to a million, and loses bits of those that deviate by less than 1e-3; `parts` float32
    (P, N, 2), each of `columns` of D, the last perhaps of fewer.
    """

    x: torch.Tensor
    raw: torch.Tensor
    parts: torch.Tensor
    columns: int

    @classmethod
    def empty(cls, x: torch.Tensor, dtype: torch.dtype, columns: int) -> Unnormed:
        """For x as it will be: `raw` and `parts` are written with it."""
        tokens, width = x.shape
        parts = torch.empty(triton.cdiv(width, columns), tokens, 2, device=x.device)
        return cls(x, torch.empty_like(x, dtype=dtype), parts, columns)


@triton.jit
def scale_of(TYPE: tl.constexpr):
    """What `raw` of this type is multiplied with."""
    return 0.0625 if TYPE == tl.float16 else 1.0


@triton.jit
def parts_asked(parts_ptr, rows, tokens, PARTS: tl.constexpr, BLOCK_P: tl.constexpr):
    """(rows, BLOCK_P) means and sums of squares of the rows' parts; zeros where there are none."""
    p = tl.arange(0, BLOCK_P)
    mask = (rows < tokens)[:, None] & (p < PARTS)[None, :]
    at = parts_ptr + 2 * (p[None, :] * tokens + rows[:, None])
    return tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)


@triton.jit
def parts_joined(means, squares, eps, WIDTH: tl.constexpr, EACH: tl.constexpr, BLOCK_P: tl.constexpr):
    """(rows,) mean and 1 / deviation of what `parts_asked` returned, EACH columns a part."""
    p = tl.arange(0, BLOCK_P)
    counts = tl.minimum(tl.maximum(WIDTH - p * EACH, 0), EACH).to(tl.float32)[None, :]
    mean = tl.sum(means * counts, axis=1) / WIDTH
    away = means - mean[:, None]
    variance = tl.sum(squares + counts * away * away, axis=1) / WIDTH
    # A row of equal numbers has no deviation, and what rounding makes of one is nothing to be divided by.
    return mean, tl.where(variance > 1e-7 * mean * mean, 1.0 / tl.sqrt(variance + eps), 0.0)


@triton.jit
def left(x, rows, cols, tokens, columns, raw_ptr, parts_ptr, part, BLOCK_N: tl.constexpr):
    """Store a tile x float32 (rows, cols) of a stream as `raw`, and its part."""
    count = tl.minimum(columns - part * BLOCK_N, BLOCK_N)
    inside = (cols < columns)[None, :]
    x = tl.where(inside, x, 0.0)
    at = raw_ptr + rows.to(tl.int64)[:, None] * columns + cols[None, :]
    raw = (x * scale_of(raw_ptr.dtype.element_ty)).to(raw_ptr.dtype.element_ty)
    tl.store(at, raw, mask=(rows < tokens)[:, None] & inside)
    mean = mean_of(tl.sum(x, axis=1), count)
    away = tl.where(inside, x - mean[:, None], 0.0)
    parts_at = parts_ptr + 2 * (part * tokens + rows)
    tl.store(parts_at, mean, mask=rows < tokens)
    tl.store(parts_at + 1, tl.sum(away * away, axis=1), mask=rows < tokens)


@triton.jit
def asked(
    rows, col, tokens, frames, columns, table_ptr, lengths_ptr, out_ptr, BLOCK_N: tl.constexpr, GLU: tl.constexpr,
    TABLE: tl.constexpr, RESIDUAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """What `finished` takes from memory, to be asked for as the product begins: valid (rows,) and what is added
    (rows, columns), float32, or zeros where there is nothing.
    """
    valid, added = 0, 0.0
    cols = col + tl.arange(0, BLOCK_N)
    mask = (rows < tokens)[:, None] & (cols < columns)[None, :]
    if GLU or MASK:
        valid = (rows % frames) < tl.load(lengths_ptr + rows // frames, mask=rows < tokens, other=0)
    if TABLE:
        # One summand a position, for the columns of the keys: the second third.
        third = columns // 3
        keys = (cols >= third) & (cols < 2 * third)
        at = (rows % frames)[:, None] * third + (cols - third)[None, :]
        added = tl.load(table_ptr + at, mask=mask & keys[None, :], other=0.0).to(tl.float32)
    if RESIDUAL:
        added = tl.load(out_ptr + rows.to(tl.int64)[:, None] * columns + cols[None, :], mask=mask, other=0.0)
    return valid, added


@triton.jit
def finished(
    acc, valid, added, rows, col, tokens, columns, out_ptr, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, TABLE: tl.constexpr, RESIDUAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """What follows a product with its bias, acc (BLOCK_M, BLOCK_N), up to the store into `out`, which it returns
    float32: see `linear`. valid, added: of `asked`.

    col is the first of the product's columns, of which GLU joins neighbours; `columns` counts those of the product too.
    """
    if GLU:
        acc = gated(acc, BLOCK_M, BLOCK_N)
        acc = tl.where(valid[:, None], acc, 0.0)
        columns = columns // 2
        cols = col // 2 + tl.arange(0, BLOCK_N // 2)
    else:
        cols = col + tl.arange(0, BLOCK_N)
    if TABLE:
        acc += added
    acc = activate(acc, ACTIVATION)
    if MASK:
        acc = tl.where(valid[:, None], acc, 0.0)
    if RESIDUAL:
        acc = added + scale * acc
    out_at = out_ptr + rows.to(tl.int64)[:, None] * columns + cols[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(rows < tokens)[:, None] & (cols < columns)[None, :])
    return acc
