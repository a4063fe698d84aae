"""Depthwise convolution over time, (B, S, D) throughout.

cuDNN and PyTorch's own kernels want (B, D, S), and their gradient of the filter alone costs more than the rest of a
block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

FRAMES, CHANNELS = 32, 64  # of a program
SPAN = 64  # frames that one program of the filter's gradient adds up


@triton.jit(do_not_specialize=["frames"])
def _convolve_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    edge_ptr,
    y_ptr,
    frames,
    channels,
    KERNEL: tl.constexpr,
    LEFT: tl.constexpr,
    FLIPPED: tl.constexpr,
    BIAS: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y[b, s, d] = bias[d] + sum_k w[d, k] x[b, s + k - LEFT, d], where x[b, s < 0, d] = edge[d].

    FLIPPED: s - k + LEFT, the gradient's way.
    """
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    base = tl.program_id(2).to(tl.int64) * frames * channels
    total = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
    for k in tl.static_range(KERNEL):
        place = s + (LEFT - k if FLIPPED else k - LEFT)
        inside = ((place >= 0) & (place < frames))[:, None] & (d < channels)[None, :]
        value = tl.load(x_ptr + base + place[:, None] * channels + d[None, :], mask=inside, other=0.0)
        if EDGE:
            edge = tl.load(edge_ptr + d, mask=d < channels, other=0.0)
            value = tl.where((place < 0)[:, None], edge[None, :], value.to(tl.float32))
        weight = tl.load(w_ptr + d * KERNEL + k, mask=d < channels, other=0.0).to(tl.float32)
        total += value.to(tl.float32) * weight[None, :]
    if BIAS:
        total += tl.load(bias_ptr + d, mask=d < channels, other=0.0).to(tl.float32)[None, :]
    inside = (s < frames)[:, None] & (d < channels)[None, :]
    tl.store(y_ptr + base + s[:, None] * channels + d[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["frames", "spans"])
def _filter_gradient_kernel(
    x_ptr,
    dy_ptr,
    edge_ptr,
    part_ptr,
    frames,
    channels,
    spans,
    KERNEL: tl.constexpr,
    LEFT: tl.constexpr,
    EDGE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """part[row, span, k, d] = sum over the span of dy[b, s, d] x[b, s + k - LEFT, d]; k = K: the bias's gradient.

    A walk through the span's frames, unrolled, so that each input is read once and stays in a register for its K uses.
    """
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(2)
    first = tl.program_id(0) * SPAN + 0 * d
    base = row.to(tl.int64) * frames * channels + d
    inputs, totals = (), ()
    for _ in tl.static_range(KERNEL + 1):
        totals = totals + (tl.zeros((BLOCK_D,), dtype=tl.float32),)
    for k in tl.static_range(KERNEL - 1):
        place = first + k - LEFT
        inside = (place >= 0) & (place < frames) & (d < channels)
        x = tl.load(x_ptr + base + place * channels, mask=inside, other=0.0).to(tl.float32)
        if EDGE:
            x = tl.where(place < 0, tl.load(edge_ptr + d, mask=d < channels, other=0.0), x)
        inputs = inputs + (x,)
    for s in tl.static_range(SPAN):
        place = first + s + KERNEL - 1 - LEFT  # not before the first frame
        x = tl.load(x_ptr + base + place * channels, mask=(place < frames) & (d < channels), other=0.0)
        inputs = inputs + (x.to(tl.float32),)
        place = first + s
        dy = tl.load(dy_ptr + base + place * channels, mask=(place < frames) & (d < channels), other=0.0)
        dy = dy.to(tl.float32)
        added = ()
        for k in tl.static_range(KERNEL):
            added = added + (totals[k] + dy * inputs[s + k],)
        totals = added + (totals[KERNEL] + dy,)
    out = part_ptr + (row * spans + tl.program_id(0)).to(tl.int64) * (KERNEL + 1) * channels + d
    for k in tl.static_range(KERNEL + 1):
        tl.store(out + k * channels, totals[k], mask=d < channels)


def _convolve(x: Tensor, weight: Tensor, bias, edge, left: int, flipped: bool) -> Tensor:
    rows, frames, channels = x.shape
    y, kernel = torch.empty_like(x), weight.shape[1]
    grid = (triton.cdiv(frames, FRAMES), triton.cdiv(channels, CHANNELS), rows)
    given = bias is not None, edge is not None
    _convolve_kernel[grid](x, weight, bias, edge, y, frames, channels, kernel, left, flipped, *given, FRAMES, CHANNELS)
    return y


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, left, edge):
        x, edge = x.contiguous(), None if edge is None else edge.float()
        ctx.save_for_backward(x, weight, edge)
        ctx.left = left
        return _convolve(x, weight, bias, edge, left, False)

    @staticmethod
    def backward(ctx, dy):
        x, weight, edge = ctx.saved_tensors
        left, dy = ctx.left, dy.contiguous()
        rows, frames, channels = x.shape
        kernel, spans = weight.shape[1], triton.cdiv(frames, SPAN)
        part = torch.empty(rows, spans, kernel + 1, channels, device=x.device)
        block = min(256, triton.next_power_of_2(channels))
        grid, given = (spans, triton.cdiv(channels, block), rows), edge is not None
        _filter_gradient_kernel[grid](
            x, dy, edge, part, frames, channels, spans, kernel, left, given, SPAN, block, num_warps=max(1, block // 64)
        )
        total = part.sum(dim=(0, 1))  # (K + 1, D)
        dx = _convolve(dy, weight, None, None, left, True)
        if given:  # frame s heard the edge through w[0] ... w[left - s - 1]
            heard = weight.float().t()[:left].cumsum(dim=0).flip(0)[:frames]  # (min(left, S), D)
            edge = (dy[:, : len(heard)].sum(dim=0, dtype=torch.float32) * heard).sum(dim=0)
        return dx, total[:-1].t().to(weight.dtype), total[-1].to(weight.dtype), None, edge


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, left: int, edge: Tensor | None = None) -> Tensor:
    """x (B, S, D), weight (D, K), bias (D,) -> (B, S, D) of x's dtype: frame s hears s - left ... s - left + K - 1.

    Before the first frame stands `edge` (D,), or zeros, behind the last one zeros.
    """
    if x.is_cuda:
        return _Depthwise.apply(x, weight, bias, left, edge)
    before = x.new_zeros(len(weight)) if edge is None else edge.to(x.dtype)
    x = torch.cat((before.expand(len(x), left, -1), x), dim=1).transpose(1, 2)
    x = F.pad(x, (0, weight.shape[1] - 1 - left))
    return F.conv1d(x, weight.unsqueeze(1), bias, groups=len(weight)).transpose(1, 2)
