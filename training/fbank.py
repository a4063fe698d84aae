"""Kaldi's log-mel filterbank in torch, batched, on whatever device the waveform is on.

It must equal kaldi-native-fbank, which computes the features at inference: same framing (snip_edges), DC removal,
pre-emphasis, povey window, power spectrum, mel triangles and floor (Povey et al. 2011, Kaldi; no dither here).
It knows waveforms and features, nothing of text or models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3asr.config import FbankConfig

FFT_SIZE = 512
FLOOR = 1.1920929e-07  # float32 epsilon, Kaldi's floor under the logarithm


def frame_count(samples, config: FbankConfig):
    """Frames of a waveform of that many samples (int or integer tensor)."""
    size, shift = frame_size(config), frame_shift(config)
    return (samples - size) // shift + 1


def frame_size(config: FbankConfig) -> int:
    return int(config.sample_rate * config.frame_length / 1000)


def frame_shift(config: FbankConfig) -> int:
    return int(config.sample_rate * config.frame_shift / 1000)


def mel_filters(config: FbankConfig, warp: float = 1.0) -> Tensor:
    """Triangles in mel, mel(f) = 1127 ln(1 + f / 700): float32 (FFT_SIZE / 2, bins).

    `warp` moves every frequency f to warp * f below 4.8 kHz and bends the rest so that the Nyquist frequency stays
    (vocal tract length perturbation, Jaitly & Hinton 2013); 1 is Kaldi's filterbank.
    """
    nyquist = config.sample_rate / 2
    high = config.high_freq if config.high_freq > 0 else nyquist + config.high_freq
    frequency = torch.arange(FFT_SIZE // 2, dtype=torch.float64) * config.sample_rate / FFT_SIZE
    knee = 0.6 * nyquist / max(warp, 1.0)
    above = nyquist - (nyquist - warp * knee) / (nyquist - knee) * (nyquist - frequency)
    frequency = torch.where(frequency <= knee, warp * frequency, above)

    def mel(f: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(f / 700.0)

    low_mel, high_mel = mel(torch.tensor([config.low_freq, high], dtype=torch.float64))
    edges = torch.linspace(float(low_mel), float(high_mel), config.num_mel_bins + 2, dtype=torch.float64)
    position = mel(frequency).unsqueeze(-1)  # (256, 1)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (position - left) / (centre - left), (right - position) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0.0).float()


def fbank(waveform: Tensor, filters: Tensor, config: FbankConfig) -> Tensor:
    """waveform float32 (B, samples) in int16's range, filters (256, bins) or one a row (B, 256, bins) -> (B, T, bins).

    Frames that reach into a row's padding are the caller's to mask (`frame_count` of the row's true length).
    """
    if config.window_type != "povey":
        raise ValueError(f"window {config.window_type!r} is not implemented here, only 'povey'")
    size = frame_size(config)
    frames = waveform.unfold(-1, size, frame_shift(config))  # (B, T, 400)
    frames = frames - frames.mean(dim=-1, keepdim=True)
    previous = torch.cat((frames[..., :1], frames[..., :-1]), dim=-1)
    phase = torch.arange(size, dtype=torch.float64, device=waveform.device) * (2 * math.pi / (size - 1))
    window = (0.5 - 0.5 * torch.cos(phase)).pow(0.85).float()
    frames = (frames - 0.97 * previous) * window
    power = torch.fft.rfft(frames, n=FFT_SIZE)[..., :-1].abs().square()  # (B, T, 256)
    return torch.matmul(power, filters).clamp(min=FLOOR).log()
