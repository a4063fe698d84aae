"""Waveforms in host memory -> the best CTC path, one batch ahead of its reader.

A batch is one copy to the device, one CUDA graph from waveforms to the best path, one copy back. The host does little
more than fill one pinned buffer, in numpy: PyTorch's own operations on the CPU may wait for threads of a pool.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from m3asr.config import LEVEL, FbankConfig
from m3asr.engines.cuda.engine import Captured, CudaEngine
from m3asr.engines.torch_fbank import FLOOR, fft_size, frame_count, frame_shift, frame_size, mel_filters, window
from m3asr.errors import ModelError
from m3asr.kernels.fbank import log_mel, windowed_frames
from m3asr.kernels.pieces import Tile

FRAMES, MEL = Tile(4, 1, warps=4), Tile(32, 1, k=64, warps=4, stages=2)


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
        self._device = engine.place
        self._window = window(config).to(self._device)
        self._filters = mel_filters(config).to(self._device)
        self._cmvn = None
        if cmvn is not None:
            self._cmvn = tuple(torch.from_numpy(np.ascontiguousarray(part)).to(self._device) for part in cmvn)
        self._mark = object()  # tells this recogniser's graphs from another's
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @torch.inference_mode()
    def features(self, waveforms: torch.Tensor, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """waveforms float32 (B, samples) of full scale 1.0 and int (B,) their samples, all on the device -> features
        (B, T, F), lengths int32 (B,): as `ModelFolder.features` has them, to 1e-3. What stands past an
        utterance's samples does not matter up to its length.
        """
        config = self.config
        frames = windowed_frames(
            waveforms, self._window, shift=frame_shift(config), fft=fft_size(config), tile=FRAMES
        )  # fmt: skip
        features = log_mel(
            torch.fft.rfft(frames), self._filters, floor=FLOOR, share=config.level_compression, level=LEVEL,
            cmvn=self._cmvn, tile=MEL,
        )  # fmt: skip
        return features, frame_count(samples, config).int()

    def best_paths(self, batches: Iterable[Sequence[np.ndarray]]) -> Iterator[BestPath]:
        """Each batch's result in turn, float32 waveforms (samples,) at the filterbank's rate.

        The next batch is on the device before a result is handed out, so what the reader does with it costs no time
        there. Waveforms of similar length in a batch cost the least.
        """
        waiting: deque[_Ticket] = deque()
        for waveforms in batches:
            waiting.append(self._enqueue(waveforms, busy=bool(waiting)))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    @torch.inference_mode()
    def _enqueue(self, waveforms: Sequence[np.ndarray], busy: bool) -> _Ticket:
        """busy: another batch is under way, beside which the waveforms can be copied to the device."""
        engine, size, shift = self.engine, frame_size(self.config), frame_shift(self.config)
        longest = frame_count(max(map(len, waveforms), default=0), self.config)
        batch, frames, bucket = engine.bucket(len(waveforms), longest)
        samples = size + (frames - 1) * shift
        graph = engine.captured(
            (self._mark, batch, frames), batch, bucket, lambda pool: WaveformGraph(self, batch, samples, bucket, pool)
        )
        on_gpu = self._device.type == "cuda"
        # Pinned memory comes from torch's own cache and is not reused before the copies out of it are done.
        given = torch.empty(graph.given.shape, pin_memory=on_gpu)
        sound = given.numpy()
        counts = sound[batch * samples :].view(np.int32)
        counts[:] = 0
        for row, waveform in enumerate(waveforms):
            # Less than a frame's shift may be too long for the bucket: no frame reads it.
            counts[row] = count = min(len(waveform), samples)
            sound[row * samples : row * samples + count] = waveform[:count]
        if busy and self._copies is not None:
            now = torch.cuda.current_stream(self._device)
            with torch.cuda.stream(self._copies):
                staged = given.to(self._device, non_blocking=True)
            now.wait_stream(self._copies)
            staged.record_stream(now)
            graph.given.copy_(staged)
        else:
            graph.given.copy_(given, non_blocking=True)
        graph.replay()
        found = torch.empty(graph.found.shape, dtype=torch.int32, pin_memory=on_gpu)
        found.copy_(graph.found, non_blocking=True)
        event = None
        if on_gpu:
            event = torch.cuda.Event()
            event.record()
        return _Ticket(found, event, given, (batch, bucket), (len(waveforms), engine.subsampled(longest)))


class WaveformGraph(Captured):
    """From waveforms to the best path for one batch shape.

    `given` float32: waveforms (B, samples), then the bits of their numbers of samples int32 (B,). `found` int32:
    symbols (B, S), the bits of their log-probabilities float32 (B, S), lengths (B,).
    """

    def __init__(self, recogniser: WaveformRecogniser, batch: int, samples: int, size: int, pool):
        engine, device = recogniser.engine, recogniser.engine.place
        given = self.given = torch.zeros(batch * (samples + 1), device=device)
        chunk = engine.chunk(size, 0, -1)

        def run():
            waveforms, counts = given[: batch * samples].view(batch, samples), given[batch * samples :]
            features, lengths = recogniser.features(waveforms, counts.view(torch.int32))
            _, _, out_lengths, best, peaks = engine.forward(features, lengths, chunk, best_alone=True)
            return (torch.cat((best.flatten(), peaks.flatten().view(torch.int32), out_lengths)),)

        super().__init__(run, device, pool)

    @property
    def found(self) -> torch.Tensor:
        return self.outputs[0]


class _Ticket(NamedTuple):
    """A batch on the device; its input is kept until it is done."""

    found: torch.Tensor
    event: torch.cuda.Event | None
    given: torch.Tensor
    bucket: tuple[int, int]  # (utterances, frames) of the graph
    wanted: tuple[int, int]

    def result(self) -> BestPath:
        if self.event is not None:
            self.event.synchronize()
        # A copy, so that the pinned memory is free again.
        found, (utterances, frames), size = self.found.numpy().copy(), self.wanted, math.prod(self.bucket)
        symbols, peaks = found[:size].reshape(self.bucket), found[size : 2 * size].view(np.float32).reshape(self.bucket)
        return BestPath(symbols[:utterances, :frames], peaks[:utterances, :frames], found[2 * size :][:utterances])
