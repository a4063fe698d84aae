"""Activations with what follows them: SiLU and dropout, SiLU and the choice of an expert, GLU and the frame mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from training.kernels.random import Seed, kept

BLOCK = 1024


@triton.jit(do_not_specialize=["salt"])
def _silu_kernel(
    x_ptr,
    dy_ptr,
    expert_ptr,
    seed_ptr,
    out_ptr,
    size,
    width,
    hidden,
    drop,
    salt,
    DROP: tl.constexpr,
    CHOOSE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = SiLU(x) (GRADIENT: SiLU'(x) dy), dropped, and zero in the columns of experts that were not chosen."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(x)
    if GRADIENT:
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
        out = dy * share * (1.0 + x * (1.0 - share))
    else:
        out = x * share
    if DROP:
        out = out * kept(seed_ptr, salt, place, drop)
    if CHOOSE:
        expert = tl.load(expert_ptr + place // width, mask=inside, other=-1).to(tl.int32)
        out = tl.where((place % width) // hidden == expert, out, 0.0)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _glu_kernel(x_ptr, dy_ptr, frames_ptr, out_ptr, size, width, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """out = a sigmoid(b) in frames that count, else 0, x = (a, b); GRADIENT: the gradients of a and of b."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    row, col = place // width, place % width
    valid = inside & (tl.load(frames_ptr + row, mask=inside, other=0) != 0)
    source = row * 2 * width + col
    a = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.load(x_ptr + source + width, mask=inside, other=0.0).to(tl.float32))
    dtype = out_ptr.dtype.element_ty
    if GRADIENT:
        dy = tl.where(valid, tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32), 0.0)
        tl.store(out_ptr + source, (dy * gate).to(dtype), mask=inside)
        tl.store(out_ptr + source + width, (dy * a * gate * (1.0 - gate)).to(dtype), mask=inside)
    else:
        tl.store(out_ptr + place, tl.where(valid, a * gate, 0.0).to(dtype), mask=inside)


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, drop, salt, expert, experts):
        x = x.contiguous()
        ctx.save_for_backward(x, seed, expert)
        ctx.constants = (drop, salt, experts)
        return _Silu.launch(x, None, seed, expert, *ctx.constants)

    @staticmethod
    def backward(ctx, dy):
        x, seed, expert = ctx.saved_tensors
        return _Silu.launch(x, dy.contiguous(), seed, expert, *ctx.constants), *[None] * 5

    @staticmethod
    def launch(x, dy, seed, expert, drop, salt, experts):
        out, width = torch.empty_like(x), x.shape[-1]
        hidden = width // experts if experts else width
        flags = (drop > 0.0, expert is not None, dy is not None, BLOCK)
        _silu_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x, dy, expert, seed, out, x.numel(), width, hidden, drop, salt, *flags
        )
        return out


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, frames):
        x = x.contiguous()
        ctx.save_for_backward(x, frames)
        out = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)
        _glu_kernel[(triton.cdiv(out.numel(), BLOCK),)](x, None, frames, out, out.numel(), out.shape[-1], False, BLOCK)
        return out

    @staticmethod
    def backward(ctx, dy):
        x, frames = ctx.saved_tensors
        dx, dy = torch.empty_like(x), dy.contiguous()
        _glu_kernel[(triton.cdiv(dy.numel(), BLOCK),)](x, dy, frames, dx, dy.numel(), dy.shape[-1], True, BLOCK)
        return dx, None


def silu_dropout(x: Tensor, seed: Seed, salt: int, drop: float) -> Tensor:
    """dropout(SiLU(x)), x (..., F)."""
    if x.is_cuda:
        return _Silu.apply(x, seed.value, drop, salt, None, 0)
    return F.dropout(F.silu(x), drop, drop > 0.0)


def silu_chosen(x: Tensor, expert: Tensor, experts: int) -> Tensor:
    """SiLU(x) in the columns of each row's expert, 0 in those of the others. x (B, S, E*F), expert int64 (B, S)."""
    if x.is_cuda:
        return _Silu.apply(x, None, 0.0, 0, expert.int().contiguous(), experts)
    chosen = F.one_hot(expert, experts).to(x.dtype)  # (B, S, E)
    return (F.silu(x).unflatten(-1, (experts, -1)) * chosen.unsqueeze(-1)).flatten(-2)


def masked_glu(x: Tensor, frames: Tensor) -> Tensor:
    """GLU in the frames that count, 0 in the others. x (B, S, 2D), frames bool (B, S) -> (B, S, D)."""
    if x.is_cuda:
        return _Glu.apply(x, frames.to(torch.int8).contiguous())
    return F.glu(x, dim=-1).masked_fill(~frames.unsqueeze(-1), 0.0)
