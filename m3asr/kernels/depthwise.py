"""Depthwise convolution over time, norm and activation: the middle of the Conformer's convolution module."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, activate, at_least_16, mean_of, normalise, release, wait


@triton.jit
def _joined(rows, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tensors (G, D), from the FIRST of the tuple, as one (G, D, COUNT); each thread keeps what it has."""
    if COUNT == 1:
        whole = tl.expand_dims(rows[FIRST], 2)
    else:
        left, right = _joined(rows, FIRST, COUNT // 2), _joined(rows, FIRST + COUNT // 2, COUNT // 2)
        both = tl.permute(tl.join(left, right), (0, 1, 3, 2))
        whole = tl.reshape(both, (left.shape[0], left.shape[1], COUNT))
    return whole


@triton.jit
def _apart(whole, COUNT: tl.constexpr):
    """(G, D, COUNT) -> the tensors (G, D) that `_joined` had."""
    if COUNT == 1:
        rows = (tl.reshape(whole, (whole.shape[0], whole.shape[1])),)
    else:
        halves = tl.reshape(whole, (whole.shape[0], whole.shape[1], 2, COUNT // 2))
        left, right = tl.split(tl.permute(halves, (0, 1, 3, 2)))
        rows = _apart(left, COUNT // 2) + _apart(right, COUNT // 2)
    return rows


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
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BEFORE: tl.constexpr,
    NORM: tl.constexpr,
    JOINED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    # Runs of neighbouring rows of one utterance, walked through in time: each input is read, and made float32, once for
    # all rows of a run, and each tap's weights once.
    first = (tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)) * BLOCK_M  # of each run
    d = tl.arange(0, BLOCK_D)
    d_in = (d < WIDTH)[None, :]
    run_in = first < tokens
    weights = ()
    for tap in tl.static_range(TAPS):
        weights = weights + (tl.load(w_ptr + tap * WIDTH + d[None, :], mask=d_in, other=0.0),)
    bias = tl.broadcast_to(tl.load(b_ptr + d[None, :], mask=d_in, other=0.0), (BLOCK_G, BLOCK_D))
    sums = ()
    for _ in tl.static_range(BLOCK_M):
        sums = sums + (bias,)
    if BEFORE:
        before = tl.load(before_ptr + d[None, :], mask=d_in, other=0.0)
    wait(PDL)
    position = first % frames
    at = x_ptr + (first - LEFT).to(tl.int64)[:, None] * WIDTH + d[None, :]
    for step in tl.static_range(BLOCK_M + TAPS - 1):
        source = position + step - LEFT
        inside = run_in & (source >= 0) & (source < frames)
        x = tl.load(at + step * WIDTH, mask=inside[:, None] & d_in, other=0.0).to(tl.float32)
        if BEFORE:
            x = tl.where((source < 0)[:, None], before, x)
        added = ()
        for m in tl.static_range(BLOCK_M):
            if step - m >= 0 and step - m < TAPS:
                added = added + (sums[m] + x * weights[step - m],)
            else:
                added = added + (sums[m],)
        sums = added
    if NORM:
        norm_w = tl.load(norm_w_ptr + d[None, :], mask=d_in, other=0.0)
        norm_b = tl.load(norm_b_ptr + d[None, :], mask=d_in, other=0.0)
    if NORM and JOINED:
        # One sum over the threads for all rows, not one a row after another.
        x = _joined(sums, 0, BLOCK_M)
        mean = mean_of(tl.sum(x, axis=1), WIDTH)
        x = tl.where(d_in[:, :, None], x - mean[:, None, :], 0.0)
        variance = mean_of(tl.sum(x * x, axis=1), WIDTH)
        sums = _apart(x * (1.0 / tl.sqrt(variance + eps))[:, None, :], BLOCK_M)
    out_at = out_ptr + first.to(tl.int64)[:, None] * WIDTH + d[None, :]
    for m in tl.static_range(BLOCK_M):
        y = sums[m]
        if NORM and not JOINED:
            y = normalise(y, d_in, WIDTH, eps)
        if NORM:
            y = y * norm_w + norm_b
        y = activate(y, ACTIVATION).to(out_ptr.dtype.element_ty)
        tl.store(out_at + m * WIDTH, y, mask=run_in[:, None] & d_in)


def depthwise(x, weight, bias, out, *, frames, left, activation, tile: Tile, before=None, norm=None, pdl=False):
    """out[s] = act(norm(sum over taps of weight[tap] x[s + tap - left] + bias)); zeros outside the S frames.

    x (N, D), N = B * frames, in the compute type; weight float32 (taps, D), bias float32 (D,); out (N, D).
    before float32 (D,): what stands before the first frame instead of zeros.
    norm = (weight, bias, eps): a layer norm over D; a batch norm is folded into weight and bias by the caller.
    A program takes tile.n runs of tile.m rows, or of as many below that divide S. With tile.parts above 1 it sums
    for the norms of a run's rows together.
    """
    tokens, width = x.shape
    norm_w, norm_b, eps = norm if norm else (bias, bias, 0.0)
    rows = math.gcd(tile.m, frames)
    _depthwise_kernel[(triton.cdiv(tokens, rows * tile.n),)](
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
        BLOCK_G=tile.n,
        BLOCK_M=rows,
        BLOCK_D=at_least_16(width),
        BEFORE=before is not None,
        NORM=norm is not None,
        JOINED=tile.parts > 1,
        ACTIVATION=activation,
        PDL=pdl,
        **tile.options(pdl),
    )
