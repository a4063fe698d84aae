"""Waveforms in host memory -> the best CTC path, features computed on the device, one batch ahead of its reader."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from m3asr.config import FbankConfig
from m3asr.engines.cuda.engine import CudaEngine
from m3asr.engines.torch_fbank import fbank, frame_count, frame_size, mel_filters, window
from m3asr.errors import ModelError


class BestPath(NamedTuple):
    """The most probable symbol of each frame and its log-probability, frames past `lengths` without a meaning."""

    symbols: np.ndarray  # int32 (B, S)
    peaks: np.ndarray  # float32 (B, S)
    lengths: np.ndarray  # int32 (B,)


class WaveformRecogniser:
    """Batches of waveforms on a cuda engine. cmvn = (mean, istd) float32 (F,), for models that want it before."""

    def __init__(self, engine: CudaEngine, config: FbankConfig, cmvn: tuple[np.ndarray, np.ndarray] | None = None):
        if config.num_mel_bins != engine.config.encoder.input_dim:
            raise ModelError(
                f"the filterbank has {config.num_mel_bins} bins, the model reads {engine.config.encoder.input_dim}"
            )
        self.engine, self.config = engine, config
        window(config)  # an unknown window is refused here
        self._device = engine.place
        self._filters = mel_filters(config).to(self._device)
        self._cmvn = None
        if cmvn is not None:
            self._cmvn = tuple(torch.from_numpy(np.ascontiguousarray(part)).to(self._device) for part in cmvn)

    @torch.inference_mode()
    def features(self, waveforms: torch.Tensor, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """waveforms float32 (B, samples) of full scale 1.0, zeros at the end, and int (B,) their samples, all on the
        device -> features (B, T, F), lengths int32 (B,): as `features.fbank` and `Cmvn.apply` have them, to 1e-3.
        """
        features = fbank(waveforms * 32768.0, self._filters, self.config)
        if self._cmvn is not None:
            features = (features - self._cmvn[0]) * self._cmvn[1]
        return features, frame_count(samples, self.config).int()

    def best_paths(self, batches: Iterable[Sequence[np.ndarray]]) -> Iterator[BestPath]:
        """Each batch's result in turn, float32 waveforms (samples,) at the filterbank's rate.

        The next batch is on the device before a result is handed out, so what the reader does with it costs no time
        there. Waveforms of similar length in a batch cost the least.
        """
        waiting: deque[_Ticket] = deque()
        for waveforms in batches:
            waiting.append(self._enqueue(waveforms))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    @torch.inference_mode()
    def _enqueue(self, waveforms: Sequence[np.ndarray]) -> _Ticket:
        longest = max([frame_size(self.config), *map(len, waveforms)])
        on_gpu = self._device.type == "cuda"
        # Pinned memory comes from torch's own cache and is not reused before the copies out of it are done.
        host = torch.zeros(len(waveforms), longest, pin_memory=on_gpu)
        for row, waveform in zip(host.numpy(), waveforms, strict=True):
            row[: len(waveform)] = waveform
        samples = torch.tensor([len(waveform) for waveform in waveforms], dtype=torch.int32)
        if on_gpu:
            samples = samples.pin_memory()
        features, lengths = self.features(
            host.to(self._device, non_blocking=True), samples.to(self._device, non_blocking=True)
        )
        outputs = self.engine.best_path_on_device(features, lengths)
        if not on_gpu:
            return _Ticket(outputs, None, ())
        pinned = tuple(torch.empty(o.shape, dtype=o.dtype, pin_memory=True) for o in outputs)
        for target, output in zip(pinned, outputs, strict=True):
            target.copy_(output, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _Ticket(pinned, event, (host, samples))


class _Ticket(NamedTuple):
    """A batch on the device; its inputs are kept until it is done."""

    outputs: tuple[torch.Tensor, ...]
    event: torch.cuda.Event | None
    inputs: tuple

    def result(self) -> BestPath:
        if self.event is not None:
            self.event.synchronize()
        return BestPath(*(output.cpu().numpy() for output in self.outputs))
