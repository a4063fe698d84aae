"""Residual sum and the norm of what follows, in one pass: s = x + scale dropout(y), n = LayerNorm(s) (and SiLU)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from training.kernels.random import Seed, kept

ROWS, PROGRAMS = 4, 2112  # rows of a warp's step; programs of the backward pass, each adds up its share of the rows


@triton.jit(do_not_specialize=["rows", "salt"])
def _forward_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    s_ptr,
    n_ptr,
    rows,
    width,
    scale,
    drop,
    salt,
    eps,
    HAS_Y: tl.constexpr,
    DROP: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    place = row[:, None] * width + col[None, :]
    s = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_Y:
        y = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            y = y * kept(seed_ptr, salt, place, drop)
        s += scale * y
        tl.store(s_ptr + place, s.to(s_ptr.dtype.element_ty), mask=inside)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    centred = tl.where(inside, s - (tl.sum(s, axis=1) / width)[:, None], 0.0)
    n = centred * tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)[:, None] * weight + bias
    if SILU:
        n = n * tl.sigmoid(n)
    tl.store(n_ptr + place, n.to(n_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "salt", "programs"])
def _backward_kernel(
    s_ptr,
    dn_ptr,
    ds_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    dx_ptr,
    dy_ptr,
    part_ptr,
    rows,
    width,
    scale,
    drop,
    salt,
    eps,
    programs,
    HAS_Y: tl.constexpr,
    HAS_DS: tl.constexpr,
    DROP: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """part[program, 0] and [1]: its rows' share of the weight's and the bias's gradients."""
    col = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    d_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        place = row[:, None] * width + col[None, :]
        s = tl.load(s_ptr + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dn_ptr + place, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, s - (tl.sum(s, axis=1) / width)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)[:, None]
        unit = centred * rstd
        if SILU:
            n = unit * weight + bias
            share = tl.sigmoid(n)
            g = g * share * (1.0 + n * (1.0 - share))
        d_weight += tl.sum(g * unit, axis=0)
        d_bias += tl.sum(g, axis=0)
        g = g * weight
        dx = rstd * (g - (tl.sum(g, axis=1) / width)[:, None] - unit * (tl.sum(g * unit, axis=1) / width)[:, None])
        if HAS_DS:
            dx += tl.load(ds_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if HAS_Y:
            dy = dx * scale
            if DROP:
                dy = dy * kept(seed_ptr, salt, place, drop)
            tl.store(dy_ptr + place, dy.to(dy_ptr.dtype.element_ty), mask=inside)
    out = part_ptr + tl.program_id(0) * 2 * width + col
    tl.store(out, d_weight, mask=col < width)
    tl.store(out + width, d_bias, mask=col < width)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, bias, seed, scale, drop, salt, eps, silu, dtype):
        ctx.set_materialize_grads(False)
        x, width = x.contiguous(), x.shape[-1]
        y = None if y is None else y.contiguous()
        rows, block = x.numel() // width, triton.next_power_of_2(width)
        s = x if y is None else torch.empty_like(x)
        n = torch.empty_like(x, dtype=dtype)
        ctx.constants = (scale, drop, salt, eps, silu, rows, block, None if y is None else y.dtype)
        flags = (y is not None, drop > 0.0, silu, ROWS, block)
        _forward_kernel[(triton.cdiv(rows, ROWS),)](
            x, y, weight, bias, seed, s, n, rows, width, scale, drop, salt, eps, *flags, num_warps=1
        )
        ctx.save_for_backward(s, weight, bias, seed)
        return (s.view_as(s) if y is None else s), n

    @staticmethod
    def backward(ctx, ds, dn):
        s, weight, bias, seed = ctx.saved_tensors
        scale, drop, salt, eps, silu, rows, block, dtype = ctx.constants
        width, programs = s.shape[-1], min(PROGRAMS, triton.cdiv(rows, ROWS))
        dn = torch.zeros_like(s) if dn is None else dn.contiguous()
        ds = None if ds is None else ds.contiguous()
        dx = torch.empty_like(s)
        dy = None if dtype is None else torch.empty_like(s, dtype=dtype)
        part = torch.empty(programs, 2, width, device=s.device)
        flags = (dtype is not None, ds is not None, drop > 0.0, silu, ROWS, block)
        sizes = (rows, width, scale, drop, salt, eps, programs)
        _backward_kernel[(programs,)](s, dn, ds, weight, bias, seed, dx, dy, part, *sizes, *flags, num_warps=1)
        d_weight, d_bias = part.sum(dim=0).to(weight.dtype).unbind()
        return dx, dy, d_weight, d_bias, *[None] * 7


def residual_norm(
    x: Tensor, y: Tensor | None, norm: nn.LayerNorm, seed: Seed, salt: int, scale=1.0, drop=0.0, silu=False, dtype=None
) -> tuple[Tensor, Tensor]:
    """s = x + scale dropout(y) in x's dtype, n = norm(s), through SiLU if asked for, in `dtype` (x's if None).

    x (..., D), y (..., D) or None: s is x. The dropout's mask follows from seed and salt.
    """
    dtype = dtype or x.dtype
    if x.is_cuda:
        settings = (seed.value, scale, drop, salt, norm.eps, silu, dtype)
        return _ResidualNorm.apply(x, y, norm.weight, norm.bias, *settings)
    s = x if y is None else x + scale * F.dropout(y, drop, drop > 0.0)
    n = norm(s)
    return s, (F.silu(n) if silu else n).to(dtype)
