"""How fast a model's engines are on this machine, each beside the others of the same run.

An encoder forward is timed on features of noise, which rotate; the time from audio to text on recordings. Times of
different machines, or of one machine at different loads, do not compare; the ratios within a run do.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from m3asr.audio import SAMPLE_RATE, load_audio
from m3asr.decode import DecodeOptions
from m3asr.engines import available, load_engine
from m3asr.errors import M3asrError, ModelError
from m3asr.folder import ModelFolder
from m3asr.transcribe import Transcriber, batches

INPUTS = ("1x206", "1x1024", "4x1024")
ROTATING = 3
MOST_FRAMES = 4_000_000  # eleven hours in one batch


@dataclass
class Forward:
    """One input on one engine. ms: median of the whole call, arrays to arrays; gpu_ms: of the graph alone."""

    ms: float
    gpu_ms: float | None = None
    error: float | None = None  # ||hidden - reference|| / ||reference|| over the valid frames
    same_symbols: float | None = None  # share of frames whose most probable symbol is the reference's


@dataclass
class Recordings:
    """Audio arrays to text, segments given: features, encoder, decoding."""

    seconds: float
    audio_seconds: float
    same_texts: float | None = None  # share of recordings with the reference's text

    @property
    def times_real_time(self) -> float:
        return self.audio_seconds / self.seconds


@dataclass
class EngineRow:
    """What one engine did, or why it did nothing."""

    engine: str
    device: str = ""
    refused: str = ""
    load_seconds: float | None = None
    forwards: dict[str, Forward] = field(default_factory=dict)
    recordings: Recordings | None = None

    def as_dict(self) -> dict:
        row = asdict(self)
        if self.recordings is not None:
            row["recordings"]["times_real_time"] = self.recordings.times_real_time
        return row


def read_input(text: str) -> tuple[int, int]:
    """ "16x1024" -> (16, 1024): utterances and frames. Raises M3asrError."""
    sizes = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    batch, frames = map(int, sizes.groups()) if sizes else (0, 0)
    if not 1 <= batch * frames <= MOST_FRAMES:
        raise M3asrError(
            f"the input {text!r} is not readable: expected utterances x frames, as 16x1024, "
            f"{MOST_FRAMES:,} frames at most"
        )
    return batch, frames


def bench(
    folder: ModelFolder,
    engines: Sequence[str],
    inputs: Sequence[str] = INPUTS,
    recordings: Sequence = (),
    *,
    options: DecodeOptions | None = None,
    repeats: int = 5,
    threads: int = 0,
) -> Iterator[EngineRow]:
    """A row for each engine, as soon as it is measured; the first that runs is the reference of the others' errors.

    recordings: what `audio.load_audio` reads, each recognised as one segment. An engine that cannot run gives a row
    that says why. Raises M3asrError for inputs that cannot be read, AudioError for recordings.
    """
    shapes = {name: read_input(name) for name in inputs}
    options = options or DecodeOptions()
    waveforms = [load_audio(recording) for recording in recordings]
    here = available()
    first = _Outputs()
    for name in engines:
        row = EngineRow(name, refused=here[name][1] if name in here else "")
        if not row.refused:
            try:
                before = time.perf_counter()
                transcriber = Transcriber(folder, load_engine(folder, name, threads=threads))
                row.load_seconds, row.device = time.perf_counter() - before, transcriber.engine.device
                outputs = _measure(row, transcriber, shapes, waveforms, options, repeats, first)
            except M3asrError as error:
                row = EngineRow(name, refused=str(error))
            else:
                first = first if first.forwards else outputs
        yield row


@dataclass
class _Outputs:
    """What an engine gave: of each input the most probable symbols (B, S) and hidden (B, S, D); texts."""

    forwards: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


def _measure(row: EngineRow, transcriber, shapes, waveforms, options, repeats, first: _Outputs) -> _Outputs:
    """Fills the row; errors are against what the first engine gave, if there was one."""
    engine, outputs = transcriber.engine, _Outputs()
    for label, (batch, frames) in shapes.items():
        data = list(_noise(batch, frames, transcriber.folder.config.encoder.input_dim))
        log_probs, hidden, lengths = engine(*data[0])
        outputs.forwards[label] = log_probs.argmax(-1), hidden
        measured = row.forwards[label] = Forward(median_ms(lambda i, d=data: engine(*d[i % ROTATING]), repeats))
        measured.gpu_ms = _graph_ms(engine, batch, frames, repeats)
        if label in first.forwards:
            measured.error, measured.same_symbols = _differences(
                *outputs.forwards[label], lengths, first.forwards[label]
            )
    if waveforms:
        outputs.texts, seconds = _recognise(transcriber, waveforms, options)
        row.recordings = Recordings(seconds, sum(map(len, waveforms)) / SAMPLE_RATE)
        if first.texts:
            row.recordings.same_texts = sum(map(str.__eq__, outputs.texts, first.texts)) / len(first.texts)
    return outputs


def median_ms(run: Callable[[int], object], repeats: int) -> float:
    """Median milliseconds of run(i), after one that is not counted."""
    run(0)
    times = []
    for i in range(repeats):
        before = time.perf_counter()
        run(i + 1)
        times.append(1e3 * (time.perf_counter() - before))
    return statistics.median(times)


def _noise(batch: int, frames: int, bins: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(batch * frames)
    for _ in range(ROTATING):
        yield random.standard_normal((batch, frames, bins), np.float32), np.full(batch, frames, np.int32)


def _graph_ms(engine, batch: int, frames: int, repeats: int) -> float | None:
    """Median GPU time of the captured encoder, for an engine that has one."""
    if engine.name != "cuda":
        return None
    import torch

    graph, times = engine.graph_for(batch, frames), []
    for _ in range(repeats + 3):
        graph.features.normal_()
        graph.lengths.fill_(0)
        graph.lengths[:batch] = frames
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def _differences(symbols, hidden, lengths, reference) -> tuple[float, float]:
    expected_symbols, expected = reference
    inside = np.arange(hidden.shape[1]) < np.asarray(lengths)[:, None]
    if hidden.shape != expected.shape:
        raise ModelError(f"an engine gives {hidden.shape} where the first one gave {expected.shape}")
    difference = (hidden[inside] - expected[inside]).astype(np.float64)
    error = np.linalg.norm(difference) / max(np.linalg.norm(expected[inside].astype(np.float64)), 1e-30)
    return float(error), float((symbols == expected_symbols)[inside].mean()) if inside.any() else 1.0


def _recognise(transcriber: Transcriber, waveforms: list[np.ndarray], options) -> tuple[list[str], float]:
    """Texts, and seconds for all of them; what the first call alone pays for is paid before."""
    folder, texts = transcriber.folder, [""] * len(waveforms)

    def once() -> None:
        features = [folder.features(waveform) for waveform in waveforms]
        for group in batches([len(f) for f in features], transcriber.batch_frames):
            for i, result in zip(group, transcriber.recognise([features[i] for i in group], options), strict=True):
                texts[i] = folder.tokenizer.decode(result.tokens)

    once()
    before = time.perf_counter()
    once()
    return texts, time.perf_counter() - before
