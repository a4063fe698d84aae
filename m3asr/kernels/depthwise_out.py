"""Depthwise convolution, norm, activation, the second pointwise layer and the sum into the residual stream, for few
tokens: what stands in front of the pointwise layer is repeated by the programs of all its column tiles, which costs
less than another launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3asr.kernels.depthwise import convolved
from m3asr.kernels.pieces import Tile, at_least_16, dot_parts, prefetch, release, wait


@triton.jit
def _depthwise_out_kernel(
    h_ptr,
    tap_ptr,
    tap_bias_ptr,
    before_ptr,
    norm_w_ptr,
    norm_b_ptr,
    w_ptr,
    b_ptr,
    lengths_ptr,
    x_ptr,
    tokens,
    frames,
    eps,
    ahead_ptr,
    ahead_bytes,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    BEFORE: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DOT: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    prefetch(ahead_ptr, ahead_bytes, AHEAD)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    parts = tl.arange(0, PARTS)
    k = parts[None, :, None] * (BLOCK_D // PARTS) + tl.arange(0, BLOCK_D // PARTS)[None, None, :]
    w_mask = (cols < WIDTH)[:, None, None] & (k < WIDTH)
    w = tl.load(w_ptr + cols[:, None, None] * WIDTH + k, mask=w_mask, other=0.0)  # (BLOCK_N, PARTS, BLOCK_D / PARTS)
    bias = tl.load(b_ptr + cols, mask=cols < WIDTH, other=0.0)
    wait(PDL)
    y = convolved(
        h_ptr, tap_ptr, tap_bias_ptr, before_ptr, norm_w_ptr, norm_b_ptr, rows, tokens, frames, eps, WIDTH, TAPS, LEFT,
        BLOCK_M, BLOCK_D, BEFORE, NORM, ACTIVATION,
    )  # fmt: skip
    y = tl.reshape(y.to(w.dtype), (BLOCK_M, PARTS, BLOCK_D // PARTS))
    out = dot_parts(y, w, PARTS, DOT) + bias[None, :]
    valid = (rows % frames) < tl.load(lengths_ptr + rows // frames, mask=rows < tokens, other=0)
    x_at = x_ptr + rows.to(tl.int64)[:, None] * WIDTH + cols[None, :]
    # Past the length the module's result counts as zero: there x stays as it is.
    mask = (valid & (rows < tokens))[:, None] & (cols < WIDTH)[None, :]
    tl.store(x_at, tl.load(x_at, mask=mask, other=0.0) + out, mask=mask)


def depthwise_out(
    h, taps, tap_bias, weight, bias, x, *, lengths, frames, left, activation, tile: Tile, before=None, norm=None,
    dot="ieee", ahead=None, pdl=False,
) -> None:  # fmt: skip
    """x += depthwise(h) weight^T + bias where a frame is shorter than its utterance; `depthwise` says what stands in
    front: h (N, D), taps float32 (taps, D), tap_bias float32 (D,), left, activation, before and norm.

    weight (D, D) in h's type, bias float32 (D,), lengths int32 (B,), N = B * frames, x float32 (N, D).
    """
    tokens, width = x.shape
    norm_w, norm_b, eps = norm if norm else (bias, bias, 0.0)
    _depthwise_out_kernel[(triton.cdiv(width, tile.n), triton.cdiv(tokens, tile.m))](
        h,
        taps,
        tap_bias,
        bias if before is None else before,
        norm_w,
        norm_b,
        weight,
        bias,
        lengths,
        x,
        tokens,
        frames,
        eps,
        ahead if ahead is not None else x,
        ahead.numel() * ahead.element_size() if ahead is not None else 0,
        WIDTH=width,
        TAPS=taps.shape[0],
        LEFT=left,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_D=at_least_16(width),
        PARTS=tile.parts,
        BEFORE=before is not None,
        NORM=norm is not None,
        ACTIVATION=activation,
        DOT=dot,
        AHEAD=ahead is not None,
        PDL=pdl,
        **tile.options(pdl),
    )
