"""Is an engine right? Its numbers beside those of another one, module by module, on the same recordings.

Only what belongs to an utterance is compared; NaN and infinity are looked for in the padding too.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from m3asr.audio import SAMPLE_RATE, read_blocks
from m3asr.decode import ctc_greedy_search
from m3asr.engines.observe import Observation, observe
from m3asr.errors import AudioError, ModelError
from m3asr.features import pad_batch
from m3asr.folder import ModelFolder
from m3asr.transcribe import batches

# Largest ||difference|| / ||reference|| that passes. Float32 engines differ by the order of their sums; the others by
# their rounding, and by the tokens that it sends to another expert.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1, "int8": 2e-1, "fp8": 3e-1}
# Frames of a batch, padding included. All intermediate values of a batch are held at once.
BATCH_FRAMES = 2000


@dataclass
class Row:
    """One tensor of the engine against the reference's, over all batches.

    error: ||difference|| / ||reference|| (infinite when one is not finite); worst: recording and index of the element
    that differs most, (frame, ...) where the tensor has frames; got and want: its values.
    """

    path: str
    error: float = 0.0
    worst: str = ""
    got: float = 0.0
    want: float = 0.0
    _difference: float = field(default=0.0, repr=False)
    _scale: float = field(default=0.0, repr=False)
    _largest: float = field(default=-1.0, repr=False)

    def add(self, got: np.ndarray, want: np.ndarray, kept: np.ndarray | None, names: Sequence[str]) -> None:
        """got, want (B, S, ...) and kept bool (B, S); or any shapes with kept None."""
        got, want = got.astype(np.float64), want.astype(np.float64)
        both = np.isfinite(got) & np.isfinite(want)
        difference = np.where(both, np.abs(np.where(both, got - want, 0.0)), np.inf)
        if kept is not None:
            mask = kept.reshape(kept.shape + (1,) * (got.ndim - 2))
            difference, want_kept = np.where(mask, difference, 0.0), np.where(mask, want, 0.0)
        else:
            want_kept = want
        if not difference.size:
            return
        self._difference += float((difference**2).sum())
        self._scale += float((want_kept[np.isfinite(want_kept)] ** 2).sum())
        largest = float(difference.max())
        if largest > self._largest:
            at = tuple(int(i) for i in np.unravel_index(difference.argmax(), difference.shape))
            self._largest, self.got, self.want = largest, float(got[at]), float(want[at])
            self.worst = f"{names[at[0]]} {list(at[1:])}" if got.shape[0] == len(names) else str(list(at))
        if not self._difference:
            self.error = 0.0
        else:
            self.error = float(np.sqrt(self._difference / self._scale)) if self._scale else float("inf")


@dataclass
class Routing:
    """One expert layer: how many tokens the engine sends to another expert than the reference does.

    margin: the largest difference, among those, between the reference's probabilities of the two experts; a small one
    means that the choice was a tie. None where the reference does not show probabilities.
    """

    path: str
    flips: int = 0
    tokens: int = 0
    margin: float | None = None


@dataclass
class Text:
    recording: str
    want: str
    got: str


@dataclass
class Report:
    """What `verify` found. outputs, layers: in order of computation; layers is empty if an engine shows none."""

    engine: str
    against: str
    precision: str
    tolerance: float
    recordings: list[tuple[str, float]] = field(default_factory=list)  # name, seconds
    outputs: dict[str, Row] = field(default_factory=dict)
    layers: dict[str, Row] = field(default_factory=dict)
    routing: dict[str, Routing] = field(default_factory=dict)
    texts: list[Text] = field(default_factory=list)  # those that differ
    lengths: list[str] = field(default_factory=list)  # disagreements
    not_finite: dict[str, str] = field(default_factory=dict)  # engine -> the first operation
    seconds: dict[str, float] = field(default_factory=dict)  # engine -> time, showing its layers included

    @property
    def first_departing(self) -> Row | None:
        """The first module whose error exceeds the tolerance."""
        return next((row for row in self.layers.values() if not row.error <= self.tolerance), None)

    @property
    def failures(self) -> list[str]:
        """Why it does not pass, a sentence each."""
        found = [f"{name}: NaN or infinity, first from {where}" for name, where in self.not_finite.items()]
        found += self.lengths
        for row in self.outputs.values():
            if not row.error <= self.tolerance:
                found.append(f"{row.path} has a relative error of {row.error:.2g}, allowed is {self.tolerance:.2g}")
        if self.texts and self.precision == "fp32":
            found.append(f"{len(self.texts)} of {len(self.recordings)} texts differ, in fp32")
        return found

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict:
        """For JSON: numbers that are not finite become strings."""
        first = self.first_departing
        return {
            "passed": self.passed,
            "failures": self.failures,
            "engine": self.engine,
            "against": self.against,
            "precision": self.precision,
            "tolerance": self.tolerance,
            "recordings": [{"name": name, "seconds": round(seconds, 3)} for name, seconds in self.recordings],
            "outputs": [_row(row) for row in self.outputs.values()],
            "layers": [_row(row) for row in self.layers.values()],
            "first_departing": first.path if first else None,
            "not_finite": self.not_finite,
            "routing": [dataclasses.asdict(routing) for routing in self.routing.values()],
            "texts": [dataclasses.asdict(text) for text in self.texts],
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def _row(row: Row) -> dict:
    numbers = {name: getattr(row, name) for name in ("error", "got", "want")}
    numbers = {name: value if np.isfinite(value) else str(value) for name, value in numbers.items()}
    return {"path": row.path, "worst": row.worst, **numbers}


def verify(
    folder: ModelFolder,
    engine,
    reference,
    utterances: Sequence[tuple[str, np.ndarray]],
    tolerance: float | None = None,
    prior: np.ndarray | None = None,
    **options,
) -> Report:
    """Runs both engines on the same features, padded together, and compares whatever both can show.

    utterances: (name, features float32 (T, F)) as the model reads them. tolerance: None takes that of the engine's
    precision, or of the reference's if that is lower. prior: unit probabilities (V,) that an engine was built with;
    the other one's log_probs get -ln(prior) added here. options: the keywords of `Engine.__call__`. Raises ModelError
    without a single frame, for a prior that no engine or only an engine knows of, and for input that an engine refuses.
    """
    built_with = any(getattr(each, "adds_prior", False) for each in (engine, reference))
    if built_with != (prior is not None):
        found = (
            "an engine here was built with a prior: give" if built_with else "no engine here was built with a prior:"
        )
        raise ModelError(f"{found} {'the same file with --prior' if built_with else 'leave --prior away'}")
    if not any(len(features) for _, features in utterances):
        raise ModelError("the recordings hold not a single frame: expected some sound to compare engines on")
    precisions = [getattr(e, "precision", "fp32") for e in (engine, reference)]
    precision = max(precisions, key=lambda name: TOLERANCES[name])
    report = Report(engine.name, reference.name, precision, TOLERANCES[precision] if tolerance is None else tolerance)
    shift = folder.config.fbank.frame_shift / 1000
    report.recordings = [(name, len(features) * shift) for name, features in utterances]
    for batch in batches([len(features) for _, features in utterances], BATCH_FRAMES):
        names = [utterances[i][0] for i in batch]
        features, lengths = pad_batch([utterances[i][1] for i in batch])
        # Two of one kind are told apart.
        keys = (engine.name, reference.name if reference.name != engine.name else f"{reference.name} (reference)")
        seen = []
        for key, each in zip(keys, (engine, reference), strict=True):
            before = time.perf_counter()
            seen.append(_with_prior(observe(each, features, lengths, **options), each, prior))
            report.seconds[key] = report.seconds.get(key, 0.0) + time.perf_counter() - before
            if seen[-1].not_finite is not None:
                report.not_finite.setdefault(key, seen[-1].not_finite)
        _compare(report, folder, engine, reference, names, *seen)
    return report


def _with_prior(seen: Observation, engine, prior: np.ndarray | None) -> Observation:
    if prior is None or getattr(engine, "adds_prior", False):
        return seen
    log_probs, *rest = seen.outputs
    return dataclasses.replace(seen, outputs=((log_probs - np.log(prior)).astype(np.float32), *rest))


def _compare(report, folder, engine, reference, names, got: Observation, want: Observation) -> None:
    log_probs, hidden, lengths = want.outputs
    if not np.array_equal(got.outputs[2], lengths):
        report.lengths.append(f"lengths are {got.outputs[2].tolist()}, the reference has {lengths.tolist()}")
        return
    size = log_probs.shape[1]
    kept = np.arange(size) < lengths[:, None]  # (B, S)
    for path, value in got.values.items():
        if path in want.values:
            a, b = (_frames_first(path, v, len(lengths), size) for v in (value, want.values[path]))
            if a.shape == b.shape:
                row = report.layers.setdefault(path, Row(path))
                # Frames are not yet counted as the encoder's between the subsampling's convolutions.
                framed = a.shape[:2] == kept.shape and ".subsampling.conv" not in path
                row.add(a, b, kept if framed else None, names)
    for path, chosen in got.choices.items():
        if path in want.choices:
            _route(report.routing.setdefault(path, Routing(path)), chosen, want, kept)
    for name, a, b in (("log_probs", got.outputs[0], log_probs), ("hidden", got.outputs[1], hidden)):
        report.outputs.setdefault(name, Row(name)).add(a[:, :size], b, kept, names)
    if np.isfinite(log_probs).all() and np.isfinite(got.outputs[0]).all():
        _texts(report, folder, names, got.outputs[0], log_probs, lengths)
    if folder.config.decoder is not None and np.isfinite(hidden).all() and np.isfinite(log_probs).all():
        _decoders(report, folder, engine, reference, names, want)


def _frames_first(path: str, value: np.ndarray, batch: int, size: int) -> np.ndarray:
    """(B, S, ...) where the value has frames: one-dimensional convolutions have them last, experts fold them."""
    if path.endswith(".experts") and value.shape[0] == batch * size:
        return value.reshape(batch, size, -1)
    last = path.endswith(("conv1", "conv2", "depthwise_conv")) or value.shape[1:2] != (size,)
    if value.ndim == 3 and last and value.shape[0] == batch and value.shape[2] == size:
        return value.swapaxes(1, 2)
    return value


def _route(routing: Routing, chosen: np.ndarray, want: Observation, kept: np.ndarray) -> None:
    tokens = kept.reshape(-1)
    differ = tokens & (chosen != want.choices[routing.path])
    routing.flips += int(differ.sum())
    routing.tokens += int(tokens.sum())
    router = want.routers.get(routing.path)  # (B*S, E)
    if router is not None and differ.any():
        at = np.flatnonzero(differ)
        margin = router[at, want.choices[routing.path][at]] - router[at, chosen[at]]
        routing.margin = max(routing.margin or 0.0, float(margin.max()))


def _texts(report, folder, names, got, want, lengths) -> None:
    both = (ctc_greedy_search(log_probs, lengths, folder.config.blank) for log_probs in (got, want))
    for name, a, b in zip(names, *both, strict=True):
        if a.tokens != b.tokens:
            report.texts.append(Text(name, *(folder.tokenizer.decode(result.tokens) for result in (b, a))))


def _decoders(report, folder, engine, reference, names, want: Observation) -> None:
    """The attention decoders on the reference's hidden sequence and the text that it reads there."""
    config = folder.config
    results = ctc_greedy_search(want.outputs[0], want.outputs[2], config.blank)
    for name, result, hidden, length in zip(names, results, *want.outputs[1:], strict=True):
        if not length:
            continue
        tokens = np.array([[config.sos, *result.tokens]], np.int64)  # (1, L)
        backwards = np.array([[config.sos, *result.tokens[::-1]]], np.int64)
        given = hidden[None], np.array([length], np.int32), tokens
        pairs = zip(*(e.decode(*given, reversed_tokens=backwards) for e in (engine, reference)), strict=True)
        for path, (a, b) in zip(("decoder", "reverse decoder"), pairs, strict=True):
            if a is not None and b is not None:
                report.outputs.setdefault(path, Row(path)).add(a, b, None, [name])
                if not np.isfinite(a).all():
                    report.not_finite.setdefault(engine.name, f"the {path}'s output")


def utterances_of(folder: ModelFolder, recordings: Iterable[str | Path], seconds: float) -> list:
    """The first `seconds` of each recording -> (name, features (T, F)). Raises AudioError."""
    found = []
    for recording in recordings:
        waveform = next(iter(read_blocks(recording, seconds)), np.zeros(0, np.float32))
        found.append((Path(recording).name, folder.features(waveform)))
        if not len(found[-1][1]):
            raise AudioError(f"{recording} is too short for one frame: expected at least 25 ms of sound")
    return found


def synthetic_utterances(folder: ModelFolder) -> list:
    """Sounds for those who have no recording: a voice-like buzz, noise, and digital silence -> (name, features)."""
    generator = np.random.default_rng(0)
    t = np.arange(4 * SAMPLE_RATE) / SAMPLE_RATE  # seconds
    pitch = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * t)) / SAMPLE_RATE
    buzz = sum(np.sin(k * pitch) / k for k in range(1, 25)) * (np.sin(2 * np.pi * 3 * t) > -0.5)
    noise = generator.normal(size=round(2.5 * SAMPLE_RATE))
    sounds = {"buzz": 0.1 * buzz, "noise": 0.05 * noise, "silence": np.zeros(SAMPLE_RATE)}
    return [(name, folder.features(sound.astype(np.float32))) for name, sound in sounds.items()]
