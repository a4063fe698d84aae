"""Kaldi's log-mel filterbank around the library's Fourier transform: what stands before it in one kernel, what follows
in another. In PyTorch (`engines.torch_fbank`) these are twenty passes over the frames.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, at_least_16, mean_of


@triton.jit
def _frames_kernel(
    sound_ptr,
    window_ptr,
    out_ptr,
    samples,
    frames,
    SIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    FFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.arange(0, FFT)
    inside = i < SIZE
    mask = (rows < frames)[:, None] & inside[None, :]
    at = sound_ptr + tl.program_id(1).to(tl.int64) * samples + rows[:, None] * SHIFT
    x = tl.load(at + i[None, :], mask=mask, other=0.0) * 32768.0
    before = tl.load(at + tl.maximum(i - 1, 0)[None, :], mask=mask, other=0.0) * 32768.0
    mean = mean_of(tl.sum(x, axis=1), SIZE)[:, None]
    x = (x - mean) - 0.97 * (before - mean)
    x = tl.where(inside[None, :], x * tl.load(window_ptr + i, mask=inside, other=0.0)[None, :], 0.0)
    out_at = out_ptr + (tl.program_id(1).to(tl.int64) * frames + rows[:, None]) * FFT + i[None, :]
    tl.store(out_at, x, mask=(rows < frames)[:, None])


@triton.jit
def _mel_kernel(
    spectrum_ptr,
    filters_ptr,
    mean_ptr,
    scale_ptr,
    out_ptr,
    rows_all,
    share,
    level,
    floor,
    HALF: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SHARE: tl.constexpr,
    CMVN: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    bins = tl.arange(0, BLOCK_N)
    row_in, bin_in = (rows < rows_all)[:, None], (bins < BINS)[None, :]
    mel = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, HALF, BLOCK_K):
        # Real and imaginary parts stand side by side; a row ends with the Nyquist frequency, which no filter hears.
        at = rows.to(tl.int64)[:, None] * (2 * HALF + 2) + 2 * start + tl.arange(0, 2 * BLOCK_K)[None, :]
        both = tl.load(spectrum_ptr + at, mask=row_in, other=0.0)
        real, imaginary = tl.split(tl.reshape(both * both, (BLOCK_M, BLOCK_K, 2)))
        k = start + tl.arange(0, BLOCK_K)
        filters = tl.load(filters_ptr + k[:, None] * BINS + bins[None, :], mask=bin_in, other=0.0)
        mel = tl.dot(real + imaginary, filters, mel, input_precision="tf32x3")
    x = tl.log(tl.maximum(mel, floor))
    if SHARE:
        known = tl.where(bin_in, x, -float("inf"))
        top = tl.max(known, axis=1)
        x -= share * (top + tl.log(tl.sum(tl.exp(known - top[:, None]), axis=1)) - level)[:, None]
    if CMVN:
        x -= tl.load(mean_ptr + bins, mask=bins < BINS, other=0.0)[None, :]
        x *= tl.load(scale_ptr + bins, mask=bins < BINS, other=0.0)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * BINS + bins[None, :], x, mask=row_in & bin_in)


def windowed_frames(sound, window, *, shift, fft, tile: Tile) -> torch.Tensor:
    """sound float32 (B, samples) of full scale 1.0, window float32 (size,), samples >= size -> frames of Kaldi's
    int16 range (snip_edges), without their mean, pre-emphasised by 0.97 and windowed: float32 (B, T, fft), zeros
    behind `size`.
    """
    (batch, samples), size = sound.shape, window.shape[0]
    frames = (samples - size) // shift + 1
    out = torch.empty(batch, frames, fft, device=sound.device)
    _frames_kernel[(triton.cdiv(frames, tile.m), batch)](
        sound, window, out, samples, frames, SIZE=size, SHIFT=shift, FFT=fft, BLOCK_M=tile.m, **tile.options(False)
    )
    return out


def log_mel(spectrum, filters, *, floor, share, level, cmvn, tile: Tile) -> torch.Tensor:
    """spectrum complex64 (B, T, fft / 2 + 1), contiguous; filters float32 (fft / 2, F) -> float32 (B, T, F):
    log(max(power filters, floor)), minus `share` of each frame's (logsumexp - level), and then, if cmvn = (mean, istd),
    (x - mean) * istd.
    """
    (batch, frames, _), (half, bins) = spectrum.shape, filters.shape
    out = torch.empty(batch, frames, bins, device=spectrum.device)
    mean, istd = cmvn or (filters, filters)
    _mel_kernel[(triton.cdiv(batch * frames, tile.m),)](
        torch.view_as_real(spectrum),
        filters,
        mean,
        istd,
        out,
        batch * frames,
        share,
        level,
        floor,
        HALF=half,
        BINS=bins,
        BLOCK_M=tile.m,
        BLOCK_N=at_least_16(bins),
        BLOCK_K=min(tile.k, half),
        SHARE=share != 0,
        CMVN=cmvn is not None,
        **tile.options(False),
    )
    return out
