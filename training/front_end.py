"""Batch -> features, on the device: gathering the samples, augmentation, filterbank, CMVN, SpecAugment."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from m3asr import ops
from m3asr.config import FbankConfig
from m3asr.engines.torch_fbank import compressed_fbank, frame_count, mel_filters
from training.augment import Augment, AugmentConfig
from training.data import Batch, Speech


class FrontEnd:
    """Batch -> features after CMVN, all on the device."""

    def __init__(self, config: FbankConfig, device: torch.device):
        self.config = config
        warps = torch.linspace(-1, 1, 13) * AugmentConfig.max_warp + 1
        self.bank = torch.stack([mel_filters(config, float(w)) for w in warps]).to(device)  # (13, 256, bins)
        self.filters = mel_filters(config).to(device)
        self.mean = torch.zeros(config.num_mel_bins, device=device)
        self.istd = torch.ones(config.num_mel_bins, device=device)

    @torch.no_grad()
    def __call__(self, batch: Batch, speech: Speech, augment: Augment | None, views: int = 1) -> tuple[Tensor, Tensor]:
        """-> features float32 (views * B, T, F), lengths int32 (views * B,): the first view of all, then the next."""
        waveform, sizes = batch.render(speech).repeat(views, 1), batch.lengths.repeat(views)
        filters = self.filters
        if augment is not None:
            waveform = augment(waveform, sizes)
            filters = augment.pick_filters(len(waveform), self.bank)
        features = (compressed_fbank(waveform * 32768.0, filters, self.config) - self.mean) * self.istd
        lengths = frame_count(sizes, self.config)
        if augment is not None:
            features = augment.blur(augment.warp_time(features, lengths, views), lengths)
            features = augment.mask(features, lengths)
        return features, lengths.int()

    def measure(self, batches: Iterator[Batch], count: int, speech: Speech, augment: Augment | None) -> None:
        """Set mean and istd from `count` batches (before masking: masked frames are the mean by definition)."""
        total = torch.zeros(3, self.config.num_mel_bins, dtype=torch.float64, device=self.mean.device)
        for _ in range(count):
            batch = next(batches).to(self.mean.device)
            waveform = batch.render(speech)
            if augment is not None:
                waveform = augment(waveform, batch.lengths)
            features = compressed_fbank(waveform * 32768.0, self.filters, self.config).double()
            inside = ops.frame_mask(frame_count(batch.lengths, self.config), features.shape[1]).unsqueeze(-1)
            total[0] += (features * inside).sum(dim=(0, 1))
            total[1] += (features.square() * inside).sum(dim=(0, 1))
            total[2] += inside.sum()
        mean = total[0] / total[2]
        self.mean = mean.float()
        self.istd = (total[1] / total[2] - mean.square()).clamp(min=1e-8).rsqrt().float()
