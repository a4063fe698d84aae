"""Joins the stages: audio -> segments -> features -> engine -> decoding -> text. Only this module knows them all."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m3asr.audio import SAMPLE_RATE, AudioSource, read_blocks
from m3asr.decode import (
    ContextGraph,
    DecodeOptions,
    DecodeResult,
    NgramLM,
    attention_rescoring,
    attention_search,
    ctc_best_path,
    ctc_greedy_search,
    ctc_prefix_beam_search,
    joint_search,
    token_times,
    word_times,
)
from m3asr.decode.options import NO_LM, WITH_BEAM
from m3asr.engines import Engine, check_chunks, load_engine
from m3asr.errors import AudioError, M3asrError, MissingExtra, ModelError
from m3asr.features import pad_batch
from m3asr.folder import ModelFolder
from m3asr.formats import Alternative, Segment, Transcript
from m3asr.segment import SegmentOptions, speech_segments
from m3asr.tokenizer import UNSPACED

# Frames of a batch, padding included, on an engine that does not say its own (`batch_frames`): 40 seconds. On a CPU,
# more is no faster and costs memory: the first convolution alone holds 20 kB or more a frame.
BATCH_FRAMES = 4000
# Batches' worth of frames that wait to be sorted by length. It bounds the memory, and how much of a long list of
# recordings is recognised before its first text is there.
POOL_BATCHES = 9


class UnusableHotword(UserWarning):
    """A phrase to favour cannot be written with the model's vocabulary and was left out."""


class Recording(NamedTuple):
    """name: what the transcript is called; audio, sample_rate: see `audio.load_audio`."""

    name: str
    audio: AudioSource
    sample_rate: int | None = None


@dataclass
class _Job:
    """A recording on its way; its segments as they come back from the engine, in any order."""

    name: str
    samples: int = 0
    segments: list[Segment] = field(default_factory=list)
    read: bool = False
    failed: bool = False

    def heard(self, samples: int) -> None:
        self.samples += samples


class Piece(NamedTuple):
    """A segment of a recording. start, seconds: in seconds; waveform: float32 (N,); features: float32 (T, F)."""

    start: float
    seconds: float
    waveform: np.ndarray
    features: np.ndarray


class _Waiting(NamedTuple):
    """What of a `Piece` waits for the engine."""

    job: _Job
    start: float
    seconds: float
    features: np.ndarray


class Transcriber:
    """A model on an engine, ready for recordings. Make one with `m3asr.load`."""

    def __init__(self, folder: ModelFolder, engine: Engine, *, chunk_size: int = 0, left_chunks: int = -1):
        """chunk_size, left_chunks: see `load`."""
        check_chunks(folder.config, chunk_size, left_chunks)
        self.folder = folder
        self.engine = engine
        whole = chunk_size <= 0 and left_chunks < 0
        # How recordings are seen, as the engine takes it; empty for whole segments.
        self.chunks: dict[str, int] = {} if whole else {"chunk_size": chunk_size, "left_chunks": left_chunks}
        self.batch_frames: int = getattr(engine, "batch_frames", BATCH_FRAMES)
        # Made once for all batches: a language model takes seconds to read.
        self._context = lru_cache(maxsize=8)(self._new_context)
        self._lm = lru_cache(maxsize=2)(self._new_lm)

    def transcribe(
        self,
        audio: AudioSource,
        sample_rate: int | None = None,
        name: str = "",
        options: DecodeOptions | None = None,
        segmentation: SegmentOptions | None = None,
    ) -> Transcript:
        """One recording of any length -> Transcript.

        audio: a path, "-" for standard input, bytes, a binary file, or an array of samples (see `audio.load_audio`;
        `sample_rate` in Hz is for arrays). `segmentation` says where a long recording is cut (see `segment`). Raises
        AudioError for what is not a recording; silence, and audio too short for a frame, give empty text.
        """
        recording = Recording(name or name_of(audio), audio, sample_rate)
        return next(self.transcribe_each([recording], options, segmentation))

    def transcribe_each(
        self,
        recordings: Iterable[Recording | tuple[str, AudioSource]],
        options: DecodeOptions | None = None,
        segmentation: SegmentOptions | None = None,
        *,
        failed: Callable[[str, M3asrError], None] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Iterator[Transcript]:
        """Many recordings of any length -> a transcript each, in the same order, as soon as it is known.

        A recording is read when its turn comes, piece by piece. Segments of similar length, of whatever recordings,
        share a batch. Memory is bounded: it grows neither with their number nor with their length.
        failed: gets the name and the error of a recording that cannot be read to its end; it has no transcript, and
        the others go on. Without it the error is raised. progress: is told the seconds of audio finished since the
        last call.
        """
        options, segmentation = options or DecodeOptions(), segmentation or SegmentOptions()
        self.decoder_of(options)  # what cannot be done is said before anything is read
        self.scorers(options)
        jobs: deque[_Job] = deque()
        pool: list[_Waiting] = []
        waiting, done = 0, 0  # samples read, and reported as finished

        def recognise() -> None:
            nonlocal done
            live = [piece for piece in pool if not piece.job.failed]
            pool.clear()
            rest = sum(len(piece.features) for piece in live)
            for batch in batches([len(piece.features) for piece in live], self.batch_frames):
                pieces = [live[i] for i in batch]
                self._recognise_pieces(pieces, options)
                if progress is not None:
                    frames = sum(len(piece.features) for piece in pieces)
                    share = round((waiting - done) * frames / rest) if rest else 0
                    progress(share / SAMPLE_RATE)
                    done, rest = done + share, rest - frames
            if progress is not None and waiting > done:
                progress((waiting - done) / SAMPLE_RATE)
            done = waiting

        def finished() -> Iterator[Transcript]:
            while jobs and jobs[0].read:
                yield self._transcript(jobs.popleft(), options)

        for recording in recordings:
            job = _Job(recording[0])
            jobs.append(job)
            pieces = self.pieces(Recording(*recording), segmentation, job.heard)
            before = 0
            while True:
                try:
                    piece = next(pieces, None)
                except (AudioError, MissingExtra) as error:
                    if failed is None:
                        raise
                    job.failed = True
                    jobs.pop()
                    failed(job.name, error)
                    piece = None
                waiting += job.samples - before
                before = job.samples
                if piece is None:
                    break
                pool.append(_Waiting(job, piece.start, piece.seconds, piece.features))
                if sum(len(piece.features) for piece in pool) >= POOL_BATCHES * self.batch_frames:
                    recognise()
                    yield from finished()
            job.read = True
            if not pool:
                yield from finished()
        recognise()
        yield from finished()

    def recognise(
        self, features: Sequence[np.ndarray], options: DecodeOptions, *, whole: bool = False
    ) -> list[DecodeResult]:
        """Features (T, F) of several utterances, normalised if the model wants that -> one result each.

        whole: seen as a whole, whatever chunks the Transcriber was made with.
        """
        chunks = {} if whole else self.chunks
        greedy = self.decoder_of(options) == "greedy" and not options.blank_penalty
        if greedy and not chunks and hasattr(self.engine, "best_path"):
            # Of a large batch the log-probabilities take longer to leave the device than to compute.
            return ctc_best_path(*self.engine.best_path(*pad_batch(features)), self.folder.config.blank)
        log_probs, hidden, lengths = self.engine(*pad_batch(features), **chunks)
        return self.decode(log_probs, hidden, lengths, options)

    def decode(self, log_probs, hidden, lengths, options: DecodeOptions) -> list[DecodeResult]:
        """log_probs (B, S, V), hidden (B, S, D), lengths (B,) -> results."""
        config = self.folder.config
        decoder = self.decoder_of(options)
        beam_size = min(options.beam_size, config.vocab_size)
        if decoder == "greedy":
            return ctc_greedy_search(log_probs, lengths, config.blank, options.blank_penalty)
        if decoder == "attention":
            return [
                attention_search(self.engine.decode, hidden[b], int(length), beam_size, sos=config.sos, eos=config.eos)
                for b, length in enumerate(lengths)
            ]
        context, lm = self.scorers(options)
        results = ctc_prefix_beam_search(
            log_probs, lengths, beam_size, config.blank, options.blank_penalty, context=context, lm=lm
        )
        if decoder == "beam":
            return results
        if decoder == "rescoring":
            return self.rescore(results, hidden, lengths, options)
        ctc_weight, reverse_weight = self._weights(options)
        return joint_search(
            results,
            log_probs,
            self.engine.decode,
            hidden,
            lengths,
            beam_size,
            ctc_weight,
            reverse_weight,
            sos=config.sos,
            eos=config.eos,
            blank=config.blank,
            blank_penalty=options.blank_penalty,
            context=context,
            lm=lm,
        )

    def rescore(self, results: Sequence[DecodeResult], hidden, lengths, options: DecodeOptions) -> list[DecodeResult]:
        """Results of the prefix beam search, ranked again by the attention decoder over hidden (B, S, D)."""
        config = self.folder.config
        return attention_rescoring(
            results, self.engine.decode, hidden, lengths, *self._weights(options), sos=config.sos, eos=config.eos
        )

    def _weights(self, options: DecodeOptions) -> tuple[float, float]:
        """Of CTC and of the right-to-left decoder."""
        config = self.folder.config
        return (
            config.ctc_weight if options.ctc_weight is None else options.ctc_weight,
            config.reverse_weight if options.reverse_weight is None else options.reverse_weight,
        )

    def decoder_of(self, options: DecodeOptions, live: bool = False) -> str:
        """The decoder that these options mean for this model. Raises ModelError for one that it does not have.

        live: of a stream, whose text cannot wait for the end of the joint search.
        """
        has_attention = self.folder.config.decoder is not None
        best = "rescoring" if live else "joint"
        decoder = options.decoder or (best if has_attention else "beam")
        if decoder in ("rescoring", "joint", "attention") and not has_attention:
            raise ModelError("the model has no attention decoder: choose the decoder greedy or beam")
        return decoder

    def lm_of(self, options: DecodeOptions) -> str | None:
        """The language model that these options mean: the named one, the model's own, or none."""
        if self.decoder_of(options) not in WITH_BEAM or options.lm == NO_LM:
            return None
        own = self.folder.lm()
        return options.lm or (str(own) if own else None)

    def scorers(self, options: DecodeOptions, decoder: str | None = None) -> tuple[ContextGraph | None, NgramLM | None]:
        """What options and model folder add to a prefix beam search, of `decoder` if that is not the options' own.
        Warns UnusableHotword, the first time."""
        context = self._context(options.hotwords, options.hotword_score) if options.hotwords else None
        lm, unit = self.lm_of(options), options.lm_unit if options.lm else "word"
        if lm is None:
            return context, None
        return context, self._lm(lm, unit).weighted(*options.lm_share(decoder or self.decoder_of(options)))

    def _new_context(self, hotwords: tuple[str, ...], score: float) -> ContextGraph | None:
        tokenizer, phrases = self.folder.tokenizer, []
        for hotword in hotwords:
            try:
                tokens = tokenizer.encode(hotword)
            except ModelError:  # a vocabulary without <unk>
                tokens = []
            if tokens and tokenizer.unk not in tokens:
                phrases.append(tokens)
            elif hotword.strip():
                warnings.warn(
                    f"the hotword {hotword!r} has characters outside the model's vocabulary: left out",
                    UnusableHotword,
                    stacklevel=2,
                )
        return ContextGraph(phrases, score) if phrases else None

    def _new_lm(self, path: str, unit: str) -> NgramLM:
        return NgramLM(path, self.folder.tokenizer.symbols, unit=unit)

    def pieces(
        self, recording: Recording, segmentation: SegmentOptions, heard: Callable[[int], None]
    ) -> Iterator[Piece]:
        """A recording, cut where `segmentation` says, as far as it is read. heard: is told of each block's samples.

        Raises AudioError and MissingExtra as `audio.read_blocks` does.
        """

        def counted() -> Iterator[np.ndarray]:
            for block in read_blocks(recording.audio, sample_rate=recording.sample_rate):
                heard(len(block))
                yield block

        for start, waveform in speech_segments(counted(), segmentation):
            yield Piece(start / SAMPLE_RATE, len(waveform) / SAMPLE_RATE, waveform, self.folder.features(waveform))

    def _recognise_pieces(self, pieces: list[_Waiting], options: DecodeOptions) -> None:
        results = self.recognise([piece.features for piece in pieces], options)
        for piece, result in zip(pieces, results, strict=True):
            segment = self.segment(piece.start, piece.seconds, result, options)
            if segment.text:
                piece.job.segments.append(segment)

    def segment(self, start: float, seconds: float, result: DecodeResult, options: DecodeOptions) -> Segment:
        """The text and times of a stretch of sound, from its result. start: of the recording; both in seconds."""
        tokenizer, shift = self.folder.tokenizer, self.folder.config.frame_seconds
        spans = [(start + a, start + b) for a, b in token_times(result.times or [], shift, seconds)]
        words = word_times(tokenizer.word_spans(result.tokens), spans, result.tokens_confidence) if spans else []
        nbest = []
        if options.nbest > 1:
            nbest = [
                Alternative(tokenizer.decode(other.tokens), other.score, other.confidence, list(other.tokens))
                for other in result.nbest[: options.nbest]
            ]
        return Segment(
            tokenizer.decode(result.tokens),
            start,
            start + seconds,
            words,
            result.confidence,
            result.score,
            list(result.tokens),
            nbest,
        )

    def _transcript(self, job: _Job, options: DecodeOptions) -> Transcript:
        segments = sorted(job.segments, key=lambda segment: segment.start)
        return Transcript(
            joined(segment.text for segment in segments),
            segments,
            job.samples / SAMPLE_RATE,
            job.name,
            self.folder.path.resolve().name,
            self.engine.name,
            self.engine.device,
            self.decoder_of(options),
        )


def batches(frames: Sequence[int], limit: int) -> Iterable[list[int]]:
    """Indices in groups of similar length, the longest first, each at most `limit` frames when padded (or one long)."""
    group: list[int] = []
    for i in sorted(range(len(frames)), key=lambda i: -frames[i]):
        if group and frames[group[0]] * (len(group) + 1) > limit:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def joined(texts: Iterable[str]) -> str:
    """Texts of neighbouring segments as one; no space between scripts that are written without."""
    whole = ""
    for text in texts:
        if whole and text and not (UNSPACED.match(whole[-1]) and UNSPACED.match(text[0])):
            whole += " "
        whole += text
    return whole


def load(
    path: str | Path | None = None,
    engine: str = "auto",
    *,
    threads: int = 0,
    chunk_size: int = 0,
    left_chunks: int = -1,
) -> Transcriber:
    """Load a model folder (None: the model shipped with the package) on an engine: "auto", which is onnx, or a name
    from `m3asr engines`.

    threads: CPU threads, 0 leaves it to the engine; eager sets them for all of the process. chunk_size: encoder frames
    (of 40 ms, as a rule) that see each other and `left_chunks` chunks before them, -1 all, as in a stream; 0 for whole
    segments. A `Stream` has options of its own and takes no notice. Raises ModelError for a folder that cannot be used
    or a model that was not trained on dynamic chunks, MissingExtra for an engine that is not installed.
    """
    folder = ModelFolder.read(path)
    loaded = load_engine(folder, engine, threads=threads)
    return Transcriber(folder, loaded, chunk_size=chunk_size, left_chunks=left_chunks)


def name_of(audio: AudioSource) -> str:
    """What a recording is called if it is not said: the file's name."""
    if isinstance(audio, (str, Path)):
        return "stdin" if str(audio) == "-" else printable(Path(audio).name)
    return ""


def printable(path: str | Path) -> str:
    """A path as UTF-8 can write it: names of other systems may be bytes that are none."""
    return os.fsencode(path).decode("utf-8", "replace")
