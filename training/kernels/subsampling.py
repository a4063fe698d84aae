"""The first convolution of the subsampling, ReLU(3x3 over one channel, stride 2), with channels behind.

Its output is the largest tensor of a step. Here it is written once and read by the next convolution alone: the gradient
finds out anew where it was positive.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

PIXELS, PROGRAMS = 64, 1056


@triton.jit
def _patches(features_ptr, pixel, pixels, frames, bins, out_frames, out_bins):
    """(pixels, 16): the nine inputs of each, a 1 for the bias, zeros."""
    tap = tl.arange(0, 16)
    row, rest = pixel // (out_frames * out_bins), pixel % (out_frames * out_bins)
    corner = row.to(tl.int64) * frames * bins + (rest // out_bins) * 2 * bins + (rest % out_bins) * 2
    inside = (pixel < pixels)[:, None] & (tap < 9)[None, :]
    values = tl.load(features_ptr + corner[:, None] + ((tap // 3) * bins + tap % 3)[None, :], mask=inside, other=0.0)
    return tl.where((tap == 9)[None, :], 1.0, values.to(tl.float32))


@triton.jit
def _filters(weight_ptr, bias_ptr, channel, channels):
    """(16, channels): nine weights, the bias, zeros."""
    tap = tl.arange(0, 16)[:, None]
    inside = channel[None, :] < channels
    weight = tl.load(weight_ptr + channel[None, :] * 9 + tap, mask=inside & (tap < 9), other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel[None, :] + 0 * tap, mask=inside, other=0.0).to(tl.float32)
    return tl.where(tap == 9, bias, weight)


@triton.jit(do_not_specialize=["pixels", "frames", "out_frames"])
def _forward_kernel(
    features_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    pixels,
    frames,
    bins,
    out_frames,
    out_bins,
    channels,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    pixel, channel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.arange(0, CHANNELS)
    patches = _patches(features_ptr, pixel, pixels, frames, bins, out_frames, out_bins).to(dtype)
    filters = _filters(weight_ptr, bias_ptr, channel, channels).to(dtype)
    out = tl.maximum(tl.dot(patches, filters, input_precision="ieee"), 0.0)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    tl.store(out_ptr + pixel.to(tl.int64)[:, None] * channels + channel[None, :], out.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["pixels", "frames", "out_frames", "programs"])
def _gradient_kernel(
    features_ptr,
    weight_ptr,
    bias_ptr,
    dout_ptr,
    part_ptr,
    pixels,
    frames,
    bins,
    out_frames,
    out_bins,
    channels,
    programs,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """part[program, tap, channel]: its pixels' share of the gradient of `_filters`."""
    dtype = dout_ptr.dtype.element_ty
    tap, channel = tl.arange(0, 16), tl.arange(0, CHANNELS)
    filters = _filters(weight_ptr, bias_ptr, channel, channels).to(dtype)
    total = tl.zeros((16, CHANNELS), dtype=tl.float32)
    for start in range(tl.program_id(0) * PIXELS, pixels, programs * PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        patches = _patches(features_ptr, pixel, pixels, frames, bins, out_frames, out_bins).to(dtype)
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        dout = tl.load(dout_ptr + pixel.to(tl.int64)[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        positive = tl.dot(patches, filters, input_precision="ieee") > 0.0
        dout = tl.where(positive, dout.to(tl.float32), 0.0).to(dtype)
        total += tl.dot(tl.trans(patches), dout, input_precision="ieee")
    out = part_ptr + tl.program_id(0) * 16 * channels + tap[:, None] * channels + channel[None, :]
    tl.store(out, total, mask=(channel < channels)[None, :])


class _FirstConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, dtype):
        rows, frames, bins = features.shape
        channels, out_frames, out_bins = len(weight), (frames - 3) // 2 + 1, (bins - 3) // 2 + 1
        features, weight = features.contiguous(), weight.reshape(channels, 9).contiguous()
        out = torch.empty(rows, out_frames, out_bins, channels, dtype=dtype, device=features.device)
        pixels = rows * out_frames * out_bins
        ctx.sizes = (pixels, frames, bins, out_frames, out_bins, channels)
        ctx.save_for_backward(features, weight, bias)
        block = triton.next_power_of_2(channels)
        _forward_kernel[(triton.cdiv(pixels, PIXELS),)](
            features, weight, bias, out, *ctx.sizes, PIXELS, block, num_warps=8
        )
        return out

    @staticmethod
    def backward(ctx, dout):
        features, weight, bias = ctx.saved_tensors
        pixels, channels = ctx.sizes[0], ctx.sizes[-1]
        programs = min(PROGRAMS, triton.cdiv(pixels, PIXELS))
        part = torch.empty(programs, 16, channels, device=features.device)
        block = triton.next_power_of_2(channels)
        _gradient_kernel[(programs,)](
            features, weight, bias, dout.contiguous(), part, *ctx.sizes, programs, PIXELS, block, num_warps=8
        )
        total = part.sum(dim=0)  # (16, channels)
        return None, total[:9].t().reshape(channels, 1, 3, 3).to(weight.dtype), total[9].to(bias.dtype), None


def first_convolution(features: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """ReLU of the convolution: features float32 (B, T, bins), weight (C, 1, 3, 3) -> `dtype` (B, T', bins', C).

    No gradient reaches the features.
    """
    if features.is_cuda:
        return _FirstConvolution.apply(features, weight, bias, dtype)
    return F.relu(F.conv2d(features.unsqueeze(1), weight, bias, stride=2)).permute(0, 2, 3, 1).to(dtype)
