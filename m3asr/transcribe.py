"""Joins the stages: audio -> features -> engine -> decoding -> text. The only module that knows them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m3asr.audio import SAMPLE_RATE, AudioSource, load_audio
from m3asr.decode import (
    DecodeResult,
    attention_rescoring,
    ctc_greedy_search,
    ctc_prefix_beam_search,
    token_times,
    word_times,
)
from m3asr.engines import Engine, load_engine
from m3asr.errors import M3asrError, ModelError
from m3asr.features import fbank, pad_batch
from m3asr.folder import ModelFolder
from m3asr.formats import Segment, Transcript

DECODERS = ("greedy", "beam", "rescoring")
# Frames of a batch, padding included: two minutes. More gains nothing on a CPU and costs memory.
BATCH_FRAMES = 12000


@dataclass(frozen=True)
class DecodeOptions:
    """How log-probabilities become tokens.

    decoder: "greedy", "beam" (CTC prefix beam search), "rescoring" (its n-best list ranked again by the attention
    decoder), or None for rescoring where the model has an attention decoder, else beam. ctc_weight and
    reverse_weight: None takes the model's own.
    """

    decoder: str | None = None
    beam_size: int = 10
    ctc_weight: float | None = None
    reverse_weight: float | None = None

    def __post_init__(self):
        if self.decoder is not None and self.decoder not in DECODERS:
            raise M3asrError(f"there is no decoder {self.decoder!r}; choose one of {', '.join(DECODERS)}")
        if self.beam_size < 1:
            raise M3asrError(f"beam size is {self.beam_size}, expected at least 1")
        for name in ("ctc_weight", "reverse_weight"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise M3asrError(f"{name} is {value}, expected 0 to 1")


class Transcriber:
    """A model on an engine, ready for recordings. Make one with `m3asr.load`."""

    def __init__(self, folder: ModelFolder, engine: Engine):
        self.folder = folder
        self.engine = engine

    def transcribe(
        self, audio: AudioSource, sample_rate: int | None = None, name: str = "", options: DecodeOptions | None = None
    ) -> Transcript:
        """One recording -> Transcript.

        audio: a path, "-" for standard input, bytes, a binary file, or an array of samples (see `audio.load_audio`;
        `sample_rate` in Hz is for arrays). Raises AudioError for what is not a recording; audio too short for a
        frame gives empty text.
        """
        return self.transcribe_all([(name or _name_of(audio), load_audio(audio, sample_rate))], options)[0]

    def transcribe_all(
        self,
        recordings: Sequence[tuple[str, np.ndarray]],
        options: DecodeOptions | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> list[Transcript]:
        """(name, waveform float32 (N,) at 16 kHz) each -> transcripts in the same order.

        Recordings of similar length share a batch. `progress` is told the seconds of audio that each batch finished.
        """
        options = options or DecodeOptions()
        transcripts: list[Transcript | None] = [None] * len(recordings)
        features = [self._features(waveform) for _, waveform in recordings]
        for batch in batches([len(f) for f in features]):
            results = self.recognise([features[i] for i in batch], options)
            for i, result in zip(batch, results, strict=True):
                name, waveform = recordings[i]
                transcripts[i] = self._transcript(name, len(waveform) / SAMPLE_RATE, result)
            if progress is not None:
                progress(sum(len(recordings[i][1]) for i in batch) / SAMPLE_RATE)
        return transcripts  # type: ignore[return-value]

    def recognise(self, features: Sequence[np.ndarray], options: DecodeOptions) -> list[DecodeResult]:
        """Features (T, F) of several utterances, normalised if the model wants that -> one result each."""
        log_probs, hidden, lengths = self.engine(*pad_batch(features))
        return self.decode(log_probs, hidden, lengths, options)

    def decode(self, log_probs, hidden, lengths, options: DecodeOptions) -> list[DecodeResult]:
        """log_probs (B, S, V), hidden (B, S, D), lengths (B,) -> results."""
        config = self.folder.config
        decoder = options.decoder or ("rescoring" if config.decoder is not None else "beam")
        if decoder == "rescoring" and config.decoder is None:
            raise ModelError("the model has no attention decoder: choose the decoder greedy or beam")
        if decoder == "greedy":
            return ctc_greedy_search(log_probs, lengths, config.blank)
        results = ctc_prefix_beam_search(log_probs, lengths, min(options.beam_size, config.vocab_size), config.blank)
        if decoder == "beam":
            return results
        ctc_weight = config.ctc_weight if options.ctc_weight is None else options.ctc_weight
        reverse_weight = config.reverse_weight if options.reverse_weight is None else options.reverse_weight
        return attention_rescoring(
            results, self.engine.decode, hidden, lengths, ctc_weight, reverse_weight, sos=config.sos, eos=config.eos
        )

    def _features(self, waveform: np.ndarray) -> np.ndarray:
        features = fbank(waveform, self.folder.config.fbank)
        return features if self.folder.cmvn is None else self.folder.cmvn.apply(features)

    def _transcript(self, name: str, duration: float, result: DecodeResult) -> Transcript:
        tokenizer, config = self.folder.tokenizer, self.folder.config
        text = tokenizer.decode(result.tokens)
        segments = []
        if text:
            shift = config.fbank.frame_shift / 1000 * config.encoder.subsampling_rate  # seconds per encoder frame
            spans = token_times(result.times or [], shift, duration)
            words = word_times(tokenizer.word_spans(result.tokens), spans, result.tokens_confidence) if spans else []
            segment = Segment(text, 0.0, duration, words, result.confidence, result.score, list(result.tokens))
            segments.append(segment)
        return Transcript(text, segments, duration, name)


def batches(frames: Sequence[int], limit: int = BATCH_FRAMES) -> Iterable[list[int]]:
    """Indices in groups of similar length, the longest first, each at most `limit` frames when padded (or one long)."""
    group: list[int] = []
    for i in sorted(range(len(frames)), key=lambda i: -frames[i]):
        if group and frames[group[0]] * (len(group) + 1) > limit:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def load(path: str | Path | None = None, engine: str = "auto", *, threads: int = 0) -> Transcriber:
    """Load a model folder (None: the model shipped with the package) on an engine ("auto", "onnx", "eager").

    threads: CPU threads, 0 leaves it to the engine. Raises ModelError for a folder that cannot be used, MissingExtra
    for an engine that is not installed.
    """
    folder = ModelFolder.read(path)
    return Transcriber(folder, load_engine(folder, engine, threads=threads))


def _name_of(audio: AudioSource) -> str:
    if isinstance(audio, (str, Path)):
        return "stdin" if str(audio) == "-" else Path(audio).name
    return ""
