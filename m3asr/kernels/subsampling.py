"""The strided convolutions in front of a stack, each with its ReLU; features by frame, activations channels last."""

from __future__ import annotations

import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, at_least_16, dot, release, wait


@triton.jit
def _first_kernel(
    x_ptr,
    lengths_ptr,
    mean_ptr,
    istd_ptr,
    w_ptr,
    b_ptr,
    out_ptr,
    out_lengths_ptr,
    frames_in,
    frames,
    batch,
    receptive_field,
    rate,
    BINS_IN: tl.constexpr,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    CMVN: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program makes all bins of a frame, a few at a time: its weights stay in registers.
    group = tl.program_id(2).to(tl.int64)
    steps = tl.cdiv(frames, BLOCK_T)
    b, t_first = tl.program_id(0) // steps, tl.program_id(0) % steps * BLOCK_T
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_in = cols < WIDTH
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        # A frame comes out for each whole receptive field; nested floors are one floor.
        for start in range(0, batch, BLOCK_L):
            utterance = start + tl.arange(0, BLOCK_L)
            length = tl.load(lengths_ptr + utterance, mask=utterance < batch, other=0)
            length = tl.where(length >= receptive_field, (length - receptive_field) // rate + 1, 0)
            tl.store(out_lengths_ptr + utterance, length, mask=utterance < batch)
    length = tl.load(lengths_ptr + b)
    WHOLE: tl.constexpr = BINS_IN * CHANNELS
    TAPS: tl.constexpr = CHANNELS * KERNEL * KERNEL
    weights = ()
    for tap in tl.static_range(TAPS):
        weights = weights + (tl.load(w_ptr + (group * TAPS + tap) * WIDTH + cols, mask=col_in, other=0.0),)
    bias = tl.load(b_ptr + group * WIDTH + cols, mask=col_in, other=0.0)
    row = tl.arange(0, BLOCK_T * BLOCK_F)
    t = t_first + row // BLOCK_F
    x_at = x_ptr + (b.to(tl.int64) * frames_in + t * STRIDE) * WHOLE
    out_at = out_ptr + ((group * batch + b) * frames + t)[:, None] * (BINS * WIDTH) + cols[None, :]
    for first in range(0, BINS, BLOCK_F):
        f = first + row % BLOCK_F
        inside = (f < BINS) & (t < frames)
        acc = tl.broadcast_to(bias[None, :], (BLOCK_T * BLOCK_F, BLOCK_N))
        for tap in tl.static_range(TAPS):
            bin_ = f * STRIDE + tap // (KERNEL * KERNEL) * BINS_IN + tap % KERNEL
            frame = tap // KERNEL % KERNEL
            # Frames past the length count as zeros, whatever stands there.
            x = tl.load(x_at + frame * WHOLE + bin_, mask=inside & (t * STRIDE + frame < length), other=0.0)
            if CMVN:
                x = (x - tl.load(mean_ptr + bin_, mask=inside)) * tl.load(istd_ptr + bin_, mask=inside)
            acc += x[:, None] * weights[tap][None, :]
        y = tl.maximum(acc, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_at + f[:, None] * WIDTH, y, mask=inside[:, None] & col_in[None, :])


def first_convolution(
    features, lengths, weight, bias, out, out_lengths, *, kernel, stride, receptive_field, rate, tile: Tile, cmvn=None
) -> None:
    """out = relu(conv2d(features)) of every group, features past an utterance's length taken as zeros.

    features float32 (B, T, channels * bins); lengths int32 (B,) in frames; weight float32 (G, taps, D), taps ordered
    (channel, time, bin); bias float32 (G, D); out (G, B, T', bins', D). cmvn = (mean, istd), float32 (channels *
    bins,): applied first, to the zeros too. out_lengths int32 (B,): frames after all convolutions of the stack, of the
    given receptive field and rate. It is the first kernel of a chain and waits for nothing.
    A program takes tile.k frames, tile.m bins of them at a time, and tile.n columns.
    """
    groups, batch, frames, bins, width = out.shape
    channels = weight.shape[1] // kernel**2
    mean, istd = cmvn if cmvn else (bias, bias)
    _first_kernel[(batch * triton.cdiv(frames, tile.k), triton.cdiv(width, tile.n), groups)](
        features,
        lengths,
        mean,
        istd,
        weight,
        bias,
        out,
        out_lengths,
        features.shape[1],
        frames,
        batch,
        receptive_field,
        rate,
        BINS_IN=features.shape[2] // channels,
        BINS=bins,
        CHANNELS=channels,
        KERNEL=kernel,
        STRIDE=stride,
        WIDTH=width,
        CMVN=cmvn is not None,
        BLOCK_L=16,
        BLOCK_T=tile.k,
        BLOCK_F=tile.m,
        BLOCK_N=tile.n,
        **tile.options(False),
    )


@triton.jit
def _next_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    out_ptr,
    frames_in,
    frames,
    batch,
    BINS_IN: tl.constexpr,
    BINS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    # Channels last: the taps along the bins and all channels are one run of memory, KERNEL runs a row.
    RUN: tl.constexpr = KERNEL * WIDTH
    STEPS: tl.constexpr = (RUN + BLOCK_K - 1) // BLOCK_K
    group = tl.program_id(2).to(tl.int64)
    rows_all = batch * frames * BINS
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row_in = (rows < rows_all)[:, None]
    col_in = (cols < WIDTH)[:, None]
    f = rows % BINS * STRIDE
    t = rows // BINS % frames * STRIDE
    b = rows // (BINS * frames)
    start = ((group * batch + b) * frames_in + t) * BINS_IN + f
    x_at = x_ptr + start[:, None] * WIDTH + k[None, :]
    w_at = w_ptr + group * (WIDTH * KERNEL * RUN) + cols[:, None] * (KERNEL * RUN) + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias = tl.load(b_ptr + group * WIDTH + cols, mask=cols < WIDTH, other=0.0)
    wait(PDL)
    for step in range(KERNEL * STEPS):
        run = step // STEPS
        offset = step % STEPS * BLOCK_K
        if RUN % BLOCK_K == 0:
            x = tl.load(x_at + run * (BINS_IN * WIDTH) + offset, mask=row_in, other=0.0)
            w = tl.load(w_at + run * RUN + offset, mask=col_in, other=0.0)
        else:
            inside = (offset + k < RUN)[None, :]
            x = tl.load(x_at + run * (BINS_IN * WIDTH) + offset, mask=row_in & inside, other=0.0)
            w = tl.load(w_at + run * RUN + offset, mask=col_in & inside, other=0.0)
        acc = dot(x, tl.trans(w), acc, DOT)
    acc = tl.maximum(acc + bias[None, :], 0.0)
    out_at = out_ptr + (group * rows_all + rows)[:, None] * WIDTH + cols[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=row_in & (cols < WIDTH)[None, :])


def next_convolution(x, weight, bias, out, *, kernel, stride, tile: Tile, dot="ieee", pdl=False) -> None:
    """out = relu(conv2d(x)) of every group, as a matrix product over gathered rows.

    x (G, B, T, bins, D), weight (G, D, kernel, kernel, D) ordered (out, time, bin, in), out (G, B, T', bins', D) in
    the compute type; bias float32 (G, D).
    """
    groups, batch, frames, bins, width = out.shape
    grid = (triton.cdiv(width, tile.n), triton.cdiv(batch * frames * bins, tile.m), groups)
    _next_kernel[grid](
        x,
        weight,
        bias,
        out,
        x.shape[2],
        frames,
        batch,
        BINS_IN=x.shape[3],
        BINS=bins,
        KERNEL=kernel,
        STRIDE=stride,
        WIDTH=width,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=min(tile.k, at_least_16(kernel * width)),
        DOT=dot,
        PDL=pdl,
        **tile.options(pdl),
    )
