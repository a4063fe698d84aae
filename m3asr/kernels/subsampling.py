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
    rows_all,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    group = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = rows < rows_all
    col_in = cols < WIDTH
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        # A frame comes out for each whole receptive field; nested floors are one floor.
        for start in range(0, batch, BLOCK_M):
            utterance = start + tl.arange(0, BLOCK_M)
            length = tl.load(lengths_ptr + utterance, mask=utterance < batch, other=0)
            length = tl.where(length >= receptive_field, (length - receptive_field) // rate + 1, 0)
            tl.store(out_lengths_ptr + utterance, length, mask=utterance < batch)
    f = rows % BINS * STRIDE
    t = rows // BINS % frames * STRIDE
    b = rows // (BINS * frames)
    length = tl.load(lengths_ptr + b, mask=row_in, other=0)
    WHOLE: tl.constexpr = BINS_IN * CHANNELS
    w_ptr += group * (CHANNELS * KERNEL * KERNEL * WIDTH)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc += tl.load(b_ptr + group * WIDTH + cols, mask=col_in, other=0.0)[None, :]
    for tap in tl.static_range(CHANNELS * KERNEL * KERNEL):
        bin_ = f + tap // (KERNEL * KERNEL) * BINS_IN + tap % KERNEL
        frame = t + tap // KERNEL % KERNEL
        # Frames past the length count as zeros, whatever stands there.
        at = (b.to(tl.int64) * frames_in + frame) * WHOLE + bin_
        x = tl.load(x_ptr + at, mask=row_in & (frame < length), other=0.0)
        if CMVN:
            x = (x - tl.load(mean_ptr + bin_, mask=row_in, other=0.0)) * tl.load(
                istd_ptr + bin_, mask=row_in, other=0.0
            )
        acc += x[:, None] * tl.load(w_ptr + tap * WIDTH + cols, mask=col_in, other=0.0)[None, :]
    out_at = out_ptr + (group * rows_all + rows)[:, None] * WIDTH + cols[None, :]
    tl.store(out_at, tl.maximum(acc, 0.0).to(out_ptr.dtype.element_ty), mask=row_in[:, None] & col_in[None, :])


def first_convolution(
    features, lengths, weight, bias, out, out_lengths, *, kernel, stride, receptive_field, rate, tile: Tile, cmvn=None
) -> None:
    """out = relu(conv2d(features)) of every group, features past an utterance's length taken as zeros.

    features float32 (B, T, channels * bins); lengths int32 (B,) in frames; weight float32 (G, taps, D), taps ordered
    (channel, time, bin); bias float32 (G, D); out (G, B, T', bins', D). cmvn = (mean, istd), float32 (channels *
    bins,): applied first, to the zeros too. out_lengths int32 (B,): frames after all convolutions of the stack, of the
    given receptive field and rate. It is the first kernel of a chain and waits for nothing.
    """
    groups, batch, frames, bins, width = out.shape
    channels = weight.shape[1] // kernel**2
    rows = batch * frames * bins
    mean, istd = cmvn if cmvn else (bias, bias)
    _first_kernel[(triton.cdiv(rows, tile.m), triton.cdiv(width, tile.n), groups)](
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
        rows,
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
        BLOCK_M=tile.m,
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
