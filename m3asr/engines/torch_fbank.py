"""Kaldi's log-mel filterbank in torch, batched, on whatever device the waveform is on.

It equals kaldi-native-fbank, which `m3asr.features` uses, to 1e-3: same framing (snip_edges), DC removal, pre-emphasis,
window, power spectrum, mel triangles and floor (Povey et al. 2011, Kaldi; no dither here). The training uses it too.
It knows waveforms and features, nothing of text or models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3asr.config import LEVEL, FbankConfig
from m3asr.errors import ModelError

FLOOR = 1.1920929e-07  # float32 epsilon, Kaldi's floor under the logarithm
_COSINES = {"hanning": (0.5, 0.5, 0.0), "hamming": (0.54, 0.46, 0.0), "blackman": (0.42, 0.5, 0.08)}


def frame_count(samples, config: FbankConfig):
    """Frames of a waveform of that many samples (int or integer tensor)."""
    size, shift = frame_size(config), frame_shift(config)
    count = (samples - size) // shift + 1
    return count.clamp(min=0) if isinstance(count, Tensor) else max(0, count)


def frame_size(config: FbankConfig) -> int:
    return int(config.sample_rate * config.frame_length / 1000)


def frame_shift(config: FbankConfig) -> int:
    return int(config.sample_rate * config.frame_shift / 1000)


def fft_size(config: FbankConfig) -> int:
    """The power of two that holds a frame."""
    return 1 << (frame_size(config) - 1).bit_length()


def mel_filters(config: FbankConfig, warp: float = 1.0) -> Tensor:
    """Triangles in mel, mel(f) = 1127 ln(1 + f / 700): float32 (fft_size / 2, bins).

    `warp` moves every frequency f to warp * f below 4.8 kHz and bends the rest so that the Nyquist frequency stays
    (vocal tract length perturbation, Jaitly & Hinton 2013); 1 is Kaldi's filterbank.
    """
    nyquist, size = config.sample_rate / 2, fft_size(config)
    high = config.high_freq if config.high_freq > 0 else nyquist + config.high_freq
    frequency = torch.arange(size // 2, dtype=torch.float64) * config.sample_rate / size
    knee = 0.6 * nyquist / max(warp, 1.0)
    above = nyquist - (nyquist - warp * knee) / (nyquist - knee) * (nyquist - frequency)
    frequency = torch.where(frequency <= knee, warp * frequency, above)

    def mel(f: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(f / 700.0)

    low_mel, high_mel = mel(torch.tensor([config.low_freq, high], dtype=torch.float64))
    edges = torch.linspace(float(low_mel), float(high_mel), config.num_mel_bins + 2, dtype=torch.float64)
    position = mel(frequency).unsqueeze(-1)  # (fft_size / 2, 1)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (position - left) / (centre - left), (right - position) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0.0).float()


def window(config: FbankConfig, device=None) -> Tensor:
    """The window of a frame, float32 (samples,). Raises ModelError for one that Kaldi does not have."""
    size = frame_size(config)
    phase = torch.arange(size, dtype=torch.float64, device=device) * (2 * math.pi / (size - 1))
    if config.window_type == "povey":
        values = (0.5 - 0.5 * torch.cos(phase)).pow(0.85)
    elif config.window_type == "rectangular":
        values = torch.ones_like(phase)
    elif config.window_type in _COSINES:
        a, b, c = _COSINES[config.window_type]
        values = a - b * torch.cos(phase) + c * torch.cos(2 * phase)
    else:
        known = ", ".join(("povey", "rectangular", *_COSINES))
        raise ModelError(f"window_type is {config.window_type!r}; expected one of {known}.")
    return values.float()


def fbank(waveform: Tensor, filters: Tensor, config: FbankConfig) -> Tensor:
    """waveform float32 (B, samples) in int16's range, at least one frame long; filters (fft_size / 2, bins) or one a
    row (B, ., bins) -> (B, T, bins).

    Levels are not compressed. Frames that reach into a row's padding are the caller's to mask (`frame_count` of the
    row's true length).
    """
    frames = waveform.unfold(-1, frame_size(config), frame_shift(config))  # (B, T, 400)
    frames = frames - frames.mean(dim=-1, keepdim=True)
    previous = torch.cat((frames[..., :1], frames[..., :-1]), dim=-1)
    frames = (frames - 0.97 * previous) * window(config, waveform.device)
    power = torch.fft.rfft(frames, n=fft_size(config))[..., :-1].abs().square()  # (B, T, 256)
    return torch.matmul(power, filters).clamp(min=FLOOR).log()


def compressed_fbank(waveform: Tensor, filters: Tensor, config: FbankConfig) -> Tensor:
    """`fbank` after the configuration's level compression, as `features.compress_levels` has it."""
    features, share = fbank(waveform, filters, config), config.level_compression
    return features - share * (features.logsumexp(dim=-1, keepdim=True) - LEVEL) if share else features
