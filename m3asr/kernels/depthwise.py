"""Depthwise convolution over time, norm and activation: the middle of the Conformer's convolution module."""

from __future__ import annotations

import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, activate, at_least_16, normalise, release, wait


@triton.jit
def _depthwise_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    before_ptr,
    norm_w_ptr,
    norm_b_ptr,
    out_ptr,
    tokens,
    frames,
    eps,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BEFORE: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    d_in = d < WIDTH
    wait(PDL)
    position = rows % frames
    # One row for all, in the shape of all: else the compiler moves every tap from its threads to those of x.
    d_of_all = tl.broadcast_to(d[None, :], (BLOCK_M, BLOCK_D))
    all_in = tl.broadcast_to(d_in[None, :], (BLOCK_M, BLOCK_D))
    acc = tl.load(b_ptr + d_of_all, mask=all_in, other=0.0)
    for tap in tl.static_range(TAPS):
        source = position + tap - LEFT
        inside = (source >= 0) & (source < frames) & (rows < tokens)
        at = (rows + tap - LEFT).to(tl.int64)[:, None] * WIDTH + d[None, :]
        x = tl.load(x_ptr + at, mask=inside[:, None] & d_in[None, :], other=0.0).to(tl.float32)
        if BEFORE:
            before = tl.load(before_ptr + d, mask=d_in, other=0.0)
            x = tl.where((source < 0)[:, None], before[None, :], x)
        acc += x * tl.load(w_ptr + tap * WIDTH + d_of_all, mask=all_in, other=0.0)
    if NORM:
        norm_w = tl.load(norm_w_ptr + d_of_all, mask=all_in, other=0.0)
        norm_b = tl.load(norm_b_ptr + d_of_all, mask=all_in, other=0.0)
        acc = normalise(acc, d_in[None, :], WIDTH, eps) * norm_w + norm_b
    y = activate(acc, ACTIVATION)
    out_at = out_ptr + rows.to(tl.int64)[:, None] * WIDTH + d[None, :]
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=(rows < tokens)[:, None] & d_in[None, :])


def depthwise(x, weight, bias, out, *, frames, left, activation, tile: Tile, before=None, norm=None, pdl=False):
    """out[s] = act(norm(sum over taps of weight[tap] x[s + tap - left] + bias)); zeros outside the S frames.

    x (N, D), N = B * frames, in the compute type; weight float32 (taps, D), bias float32 (D,); out (N, D).
    before float32 (D,): what stands before the first frame instead of zeros.
    norm = (weight, bias, eps): a layer norm over D; a batch norm is folded into weight and bias by the caller.
    """
    tokens, width = x.shape
    norm_w, norm_b, eps = norm if norm else (bias, bias, 0.0)
    _depthwise_kernel[(triton.cdiv(tokens, tile.m),)](
        x,
        weight,
        bias,
        bias if before is None else before,
        norm_w,
        norm_b,
        out,
        tokens,
        frames,
        eps,
        WIDTH=width,
        TAPS=weight.shape[0],
        LEFT=left,
        BLOCK_M=tile.m,
        BLOCK_D=at_least_16(width),
        BEFORE=before is not None,
        NORM=norm is not None,
        ACTIVATION=activation,
        PDL=pdl,
        **tile.options(pdl),
    )
