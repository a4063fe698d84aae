"""Experts at work: which one each frame of a recording goes to, how sure the router is, and how even the load is.

Looked at on the eager engine, the truth: the choices are those that the experts were called with. A recording is cut
into stretches of speech and recognised as `m3asr transcribe` does it, so that the words can stand beside the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m3asr.audio import SAMPLE_RATE, AudioSource
from m3asr.decode import DecodeOptions, Word
from m3asr.engines.observe import observe
from m3asr.errors import ModelError
from m3asr.features import pad_batch
from m3asr.segment import SegmentOptions
from m3asr.transcribe import Recording, Transcriber, joined

PERCENTILES = (5, 10, 25, 50, 75, 90, 95)


@dataclass(frozen=True)
class Stretch:
    """A stretch of speech. start, seconds: of the recording, in seconds; L expert layers, S encoder frames.

    experts: int16 (L, S), who took each frame; confidence: float32 (L, S), the router's probability of that expert;
    loudness: float32 (S,), the highest sample in each frame's stride.
    """

    start: float
    seconds: float
    text: str
    words: list[Word]
    experts: np.ndarray
    confidence: np.ndarray
    loudness: np.ndarray


@dataclass(frozen=True)
class RoutedRecording:
    """A recording's stretches of speech, in order; seconds: of all of it."""

    name: str
    seconds: float
    stretches: list[Stretch]

    @property
    def text(self) -> str:
        return joined(stretch.text for stretch in self.stretches)

    @property
    def frames(self) -> int:
        return sum(stretch.experts.shape[1] for stretch in self.stretches)

    def as_dict(self) -> dict:
        """For JSON, frame by frame; probabilities to a ten-thousandth."""
        stretches = [
            {
                "start": round(stretch.start, 3),
                "text": stretch.text,
                "words": [
                    {"text": word.text, "start": round(word.start, 3), "end": round(word.end, 3)}
                    for word in stretch.words
                ],
                "experts": stretch.experts.tolist(),
                "confidence": [[round(p, 4) for p in row] for row in stretch.confidence.tolist()],
            }
            for stretch in self.stretches
        ]
        return {"name": self.name, "seconds": round(self.seconds, 3), "frames": self.frames, "stretches": stretches}


@dataclass(frozen=True)
class LayerLoad:
    """What one expert layer did with all frames.

    shares: of the frames, an expert each; confidence: mean of the winning probabilities; percentiles: of the same, by
    their per cent.
    """

    path: str
    frames: int
    shares: list[float]
    confidence: float
    percentiles: dict[int, float]

    @property
    def entropy(self) -> float:
        """Of the shares, over its largest value, log(experts): 1 is an even load, 0 all frames to one expert."""
        shares = np.array([share for share in self.shares if share > 0])
        # 0 - x: an entropy of zero is not to be shown as -0.
        return float(0 - (shares * np.log(shares)).sum() / np.log(len(self.shares))) if len(self.shares) > 1 else 1.0

    @property
    def unused(self) -> list[int]:
        """Experts without a single frame."""
        return [expert for expert, share in enumerate(self.shares) if share == 0]

    def as_dict(self) -> dict:
        return {
            "path": self.path,
            "shares": self.shares,
            "entropy": self.entropy,
            "smallest": min(self.shares),
            "largest": max(self.shares),
            "unused": self.unused,
            "confidence": self.confidence,
            "percentiles": self.percentiles,
        }


def need_experts(config) -> None:
    """Raises ModelError for a configuration without experts."""
    if config.encoder.moe is None:
        raise ModelError("the model is dense: expected one with experts (config.json, encoder.moe)")


def layers_of(config) -> list[str]:
    """The paths of the expert layers, from the first block to the last."""
    return [f"encoder.blocks.{i}.feed_forward" for i in range(config.encoder.num_blocks)]


def route_recording(
    transcriber: Transcriber,
    audio: AudioSource,
    name: str,
    options: DecodeOptions | None = None,
    segmentation: SegmentOptions | None = None,
) -> RoutedRecording:
    """A recording through a transcriber on the eager engine, stretch by stretch.

    Without speech, or too short for a frame, it has no stretches. Raises AudioError for what is not a recording,
    ModelError for a model without experts.
    """
    folder, options = transcriber.folder, options or DecodeOptions()
    need_experts(folder.config)
    paths, stride = layers_of(folder.config), folder.config.frame_seconds
    heard, stretches = [], []
    for piece in transcriber.pieces(Recording(name, audio), segmentation or SegmentOptions(), heard.append):
        features, lengths = pad_batch([piece.features])
        seen = observe(transcriber.engine, features, lengths)
        (result,), size = transcriber.decode(*seen.outputs, options), int(seen.outputs[2][0])
        if not size:
            continue
        segment = transcriber.segment(piece.start, piece.seconds, result, options)
        experts = np.stack([seen.choices[path][:size] for path in paths])  # (L, S)
        routers = np.stack([seen.routers[path][:size] for path in paths])  # (L, S, E)
        confidence = np.take_along_axis(routers, experts[..., None], axis=-1)[..., 0]
        loudness = _loudness(piece.waveform, size, round(stride * SAMPLE_RATE))
        found = segment.text, segment.words, experts.astype(np.int16), confidence, loudness
        stretches.append(Stretch(piece.start, piece.seconds, *found))
    return RoutedRecording(name, sum(heard) / SAMPLE_RATE, stretches)


def _loudness(waveform: np.ndarray, size: int, stride: int) -> np.ndarray:
    padded = np.pad(np.abs(waveform), (0, max(size * stride - len(waveform), 0)))
    return padded[: size * stride].reshape(size, stride).max(axis=1)


def loads(config, recordings: Sequence[RoutedRecording]) -> list[LayerLoad]:
    """The load of each expert layer over all recordings. Raises ModelError without a single frame."""
    need_experts(config)
    stretches = [stretch for recording in recordings for stretch in recording.stretches]
    if not stretches:
        raise ModelError("no speech is found, so no expert was called: expected recordings with speech (see --no-vad)")
    experts = np.concatenate([stretch.experts for stretch in stretches], axis=1)  # (L, N)
    confidence = np.concatenate([stretch.confidence for stretch in stretches], axis=1)
    found = []
    for path, chosen, sure in zip(layers_of(config), experts, confidence, strict=True):
        shares = np.bincount(chosen, minlength=config.encoder.moe.num_experts) / len(chosen)
        percentiles = dict(zip(PERCENTILES, np.percentile(sure, PERCENTILES).tolist(), strict=True))
        found.append(LayerLoad(path, len(chosen), shares.tolist(), float(sure.mean()), percentiles))
    return found


def summary_line(layers: Sequence[LayerLoad]) -> str:
    """The load in one sentence, as a model card carries it."""
    experts = len(layers[0].shares)
    entropies = [layer.entropy for layer in layers]
    smallest, largest = (pick(pick(layer.shares) for layer in layers) for pick in (min, max))
    unused = sum(len(layer.unused) for layer in layers)
    never = "no expert is unused" if not unused else f"{unused} of {experts * len(layers)} experts are never used"
    confidence = sum(layer.confidence for layer in layers) / len(layers)
    return (
        f"load entropy per layer {_span(entropies, '.2f')} of 1; an expert's share of the frames is "
        f"{_span([100 * smallest, 100 * largest], '.1f')} % (even would be {100 / experts:.1f} %), {never}; "
        f"the router gives its choice a probability of {confidence:.2f} on average"
    )


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}-{high}"
