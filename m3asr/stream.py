"""Live speech: samples in packets of any size -> text while it is spoken.

A stream is cut into windows of features. A causal model trained on chunks takes each chunk once, with caches, and
gives exactly what it would give for the whole recording seen in chunks. Any other model looks ahead without limit;
it reads each window again with sound before and after it, and only the middle is kept: several times the work, more
delay, and text that can differ from that of the whole recording. `Stream.mode` and `Stream.latency` say which and
how long.

Where the speaker pauses, a segment ends: its text is final, and the model starts anew. What was read in windows is then
read once more as a whole, so that final texts are as good as those of recordings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from m3asr.audio import PEAK_LIMIT
from m3asr.config import EncoderConfig
from m3asr.decode import DecodeOptions, PrefixBeamSearch
from m3asr.errors import AudioError, M3asrError
from m3asr.features import OnlineFbank, pad_batch
from m3asr.formats import Segment
from m3asr.transcribe import Transcriber

MODES = ("auto", "chunks", "windows")
BATCH_STREAMS = 64  # in one engine call, so that memory does not grow with the number of streams
LONGEST_AGAIN = 30.0  # seconds of a segment that is read again; a longer one keeps what the beam search found
MOST_FRAMES = 750  # of the encoder, 30 s as a rule: in a chunk or read around it; also chunks looked back on
LONGEST_RULE = 3600.0  # seconds: what a segment holds is in memory
_AROUND = 12  # encoder frames before the first token and behind the last that are read with them


@dataclass(frozen=True)
class EndpointRule:
    """A segment ends when all of this holds (Kaldi's online endpointing, as WeNet uses it).

    Times in seconds, 0 to 3600. Raises M3asrError for others.
    """

    needs_text: bool  # something was recognised
    silence: float  # at least so long without a token at the end
    length: float = 0.0  # the segment is at least so long

    def __post_init__(self):
        for name in ("silence", "length"):
            value = getattr(self, name)
            if not 0 <= value <= LONGEST_RULE:  # also refuses NaN
                raise M3asrError(f"the {name} that ends a line is {value} s, expected 0 to {LONGEST_RULE:.0f}")


# WeNet's: five seconds of nothing, a second of silence after words, and twenty seconds whatever happens.
ENDPOINT_RULES = (EndpointRule(False, 5.0), EndpointRule(True, 1.0), EndpointRule(False, 0.0, 20.0))


@dataclass(frozen=True)
class StreamOptions:
    """How a stream is cut and decoded.

    mode: "chunks" (with caches), "windows" (overlapping, for models that look ahead), "auto" for chunks where the
    model allows them.
    chunk: encoder frames (of 40 ms, as a rule) that are recognised at a time; 0 for the size the model was trained
    with, if it was one, else 16. left_chunks: in mode chunks, how many chunks back a frame sees, -1 all of its segment.
    left, right: in mode windows, encoder frames of context that each chunk is read with, left in whole chunks.
    endpoints: the rules; without one that has a length, memory grows as long as nobody pauses. silence_threshold: a
    frame counts as silence if the probability of blank is above it.
    reread: whether a segment that ends with words in it is read again as a whole for its final text; None: in mode
    windows.
    decode: the decoder of final texts, beam, rescoring or, where segments are read again, joint; None is the best of
    them. Texts before the end are the beam search's.

    chunk, left_chunks, left and right are at most 750. Raises M3asrError for values outside their range.
    """

    mode: str = "auto"
    chunk: int = 0
    left_chunks: int = -1
    left: int = 96
    right: int = 16
    endpoints: tuple[EndpointRule, ...] = ENDPOINT_RULES
    silence_threshold: float = 0.8
    reread: bool | None = None
    decode: DecodeOptions = field(default_factory=DecodeOptions)

    def __post_init__(self):
        if self.mode not in MODES:
            raise M3asrError(f"there is no streaming mode {self.mode!r}; choose one of {', '.join(MODES)}")
        for name, least in (("chunk", 0), ("left_chunks", -1), ("left", 0), ("right", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= MOST_FRAMES:
                raise M3asrError(f"{name} is {value}, expected a whole number from {least} to {MOST_FRAMES}")
        if not 0 <= self.silence_threshold <= 1:
            raise M3asrError(f"silence_threshold is {self.silence_threshold}, expected a probability, 0 to 1")
        if self.decode.decoder not in (None, "beam", "rescoring", "joint"):
            raise M3asrError(f"the decoder {self.decode.decoder} does not stream: choose beam, rescoring or joint")


@dataclass
class Update:
    """What a stream has recognised of the segment being spoken.

    A partial result (`final` is False) is replaced by the next update; a final one closes the segment. Times are in
    seconds from the start of the stream. A final result may have empty text, where a partial one was taken back.
    """

    final: bool
    segment: Segment

    @property
    def text(self) -> str:
        return self.segment.text


class Stream:
    """One live stream. `accept` packets of samples, `finish` at the end; many streams at once: `push` and `advance`."""

    def __init__(self, transcriber: Transcriber, options: StreamOptions | None = None):
        """Raises M3asrError where model, engine and options do not go together."""
        self.transcriber = transcriber
        self.options = options = options or StreamOptions()
        config = transcriber.folder.config
        self._encoding = _encoding(transcriber, options)
        self.reread = self.mode == "windows" if options.reread is None else options.reread
        decoder = transcriber.decoder_of(options.decode, live=not self.reread)
        if decoder == "joint" and not self.reread:
            raise M3asrError(
                "the decoder joint needs a segment's end and does not stream: choose beam or rescoring, or read "
                "segments again when they end (reread)"
            )
        self._rescore = decoder == "rescoring" and not self.reread
        # As the words come there is CTC alone, whatever decoder has the last word.
        self._scorers = transcriber.scorers(options.decode, "beam")
        self._fbank = OnlineFbank(config.fbank)
        self._shift = config.frame_seconds
        self._first = 0  # encoder frame of the stream that the segment starts with
        self._heard = np.zeros((0, config.encoder.input_dim), np.float32)  # (T, F) from there on, to be read again
        self._closed = self._finished = False
        self._begin_segment()

    @property
    def mode(self) -> str:
        """ "chunks" or "windows"."""
        return self._encoding.mode

    @property
    def latency(self) -> float:
        """Seconds from a sound to its text at the latest, the time of computing aside."""
        fbank = self.transcriber.folder.config.fbank
        return ((self._encoding.delay - 1) * fbank.frame_shift + fbank.frame_length) / 1000

    def accept(self, samples: np.ndarray) -> list[Update]:
        """The next samples, float (N,), 16 kHz, full scale 1.0 -> what is new. Raises AudioError for anything else."""
        self.push(samples)
        return advance([self])[0]

    def finish(self) -> list[Update]:
        """The sound is over -> what is new, the final text of the last segment included."""
        self.close()
        return advance([self])[0]

    def push(self, samples: np.ndarray) -> None:
        """As `accept`, but leaves the work to `advance`."""
        if self._closed:
            raise M3asrError("the stream is finished and takes no more samples; start a new one")
        samples = np.asarray(samples)
        if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
            raise AudioError(f"samples are {samples.dtype} of shape {samples.shape}; expected float32 of one dimension")
        if samples.size and not np.abs(samples).max() <= PEAK_LIMIT:  # also refuses NaN
            raise AudioError("samples hold NaN or values far over full scale; divide 16-bit integers by 32768")
        features = self.transcriber.folder.normalised(self._fbank.accept(samples))
        self._encoding.add(features)
        if self.reread and len(features):
            self._heard = np.concatenate((self._heard, features))

    def close(self) -> None:
        """As `finish`, but leaves the work to `advance`."""
        self._closed = True

    def _begin_segment(self) -> None:
        config, decode = self.transcriber.folder.config, self.options.decode
        context, lm = self._scorers
        beam_size = min(decode.beam_size, config.vocab_size)
        self._search = PrefixBeamSearch(beam_size, config.blank, decode.blank_penalty, context, lm)
        self._hidden: list[np.ndarray] = []  # (C, D) a chunk, for rescoring
        self._silent = 0  # encoder frames without a token at the end
        self._spoken: int | None = None  # the first with one
        self._partial = ""

    def _window(self) -> np.ndarray | None:
        return None if self._finished else self._encoding.window(self._closed)

    def _recognised(self, log_probs: np.ndarray, hidden: np.ndarray) -> list[Update]:
        """The next frames: log_probs (C, V), hidden (C, D)."""
        before = self._search.frames
        self._search.accept(log_probs)
        if self._rescore:
            self._hidden.append(hidden.copy())  # not a view that holds the whole batch
        silence = np.exp(log_probs[:, self.transcriber.folder.config.blank]) > self.options.silence_threshold
        speech = np.flatnonzero(~silence)
        if len(speech) and self._spoken is None:
            self._spoken = before + int(speech[0])
        self._silent = len(silence) - 1 - int(speech[-1]) if len(speech) else self._silent + len(silence)
        result = self._search.result()
        seconds, silent = self._search.frames * self._shift, self._silent * self._shift
        for rule in self.options.endpoints:
            if (result.tokens or not rule.needs_text) and silent >= rule.silence and seconds >= rule.length:
                return self._end_segment()
        segment = self._segment(result)
        if segment.text == self._partial:
            return []
        self._partial = segment.text
        return [Update(False, segment)]

    def _end_segment(self) -> list[Update]:
        result, frames = self._search.result(), self._search.frames
        said = result.tokens and self._spoken is not None
        if self.reread and said and frames * self._shift <= LONGEST_AGAIN:
            segment = self._again(frames)
        else:
            if self._rescore and self._hidden:
                hidden = np.concatenate(self._hidden)[None]
                (result,) = self.transcriber.rescore([result], hidden, np.array([len(hidden[0])]), self.options.decode)
            segment = self._segment(result)
        updates = [Update(True, segment)] if segment.text or self._partial else []
        self._first += frames
        self._heard = self._heard[frames * self.transcriber.folder.config.encoder.subsampling_rate :]
        self._encoding.begin_segment()
        self._begin_segment()
        return updates

    def _again(self, frames: int) -> Segment:
        """The segment of so many encoder frames, read as a whole: what was said and a little around it."""
        config, decode = self.transcriber.folder.config.encoder, self.options.decode
        first = max(self._spoken - _AROUND, 0)
        last = min(frames - self._silent + _AROUND, frames)
        begin = first * config.subsampling_rate
        end = begin + (last - first - 1) * config.subsampling_rate + config.min_frames
        (result,) = self.transcriber.recognise([self._heard[begin:end]], decode, whole=True)
        return self._segment(result, first, last - first)

    def _segment(self, result, first: int = 0, frames: int | None = None) -> Segment:
        start = (self._first + first) * self._shift
        seconds = (self._search.frames if frames is None else frames) * self._shift
        segment = self.transcriber.segment(start, seconds, result, self.options.decode)
        if segment.words:  # without the silence around
            segment = replace(segment, start=segment.words[0].start, end=segment.words[-1].end)
        return segment


def advance(streams: Sequence[Stream]) -> list[list[Update]]:
    """Recognise all that is waiting in the streams -> what is new in each.

    Windows that are ready at the same time share an engine call. The streams must be of one Transcriber and have the
    same options.
    """
    if any((s.transcriber, s.options) != (streams[0].transcriber, streams[0].options) for s in streams):
        raise M3asrError("streams that share a batch must have the same model, engine and options")
    if len(set(map(id, streams))) != len(streams):
        raise M3asrError("a stream stands in the batch twice")
    updates: list[list[Update]] = [[] for _ in streams]
    while True:
        waiting = [(i, window) for i, s in enumerate(streams) if (window := s._window()) is not None]
        if not waiting:
            break
        for first in range(0, len(waiting), BATCH_STREAMS):
            batch, windows = zip(*waiting[first : first + BATCH_STREAMS], strict=True)
            encodings = [streams[i]._encoding for i in batch]
            for i, outputs in zip(batch, encodings[0].run(encodings, windows), strict=True):
                updates[i] += streams[i]._recognised(*outputs)
    for new, stream in zip(updates, streams, strict=True):
        if stream._closed and not stream._finished:
            stream._finished = True
            new += stream._end_segment()
    return updates


class _Encoding:
    """The features that wait, and how they are cut into windows for the engine."""

    mode: str
    delay: int  # feature frames from a sound to the end of the window that recognises it, at the latest

    def __init__(self, engine, config: EncoderConfig, options: StreamOptions):
        self.engine, self.config, self.options = engine, config, options
        self.chunk = options.chunk or self.config.static_chunk_size or 16
        self.features = np.zeros((0, self.config.input_dim), np.float32)  # (T, F)

    def add(self, features: np.ndarray) -> None:
        if len(features):
            self.features = np.concatenate((self.features, features)) if len(self.features) else features

    def _frames(self, size: int) -> int:
        """Feature frames that give `size` encoder frames."""
        return (size - 1) * self.config.subsampling_rate + self.config.min_frames


class _Chunks(_Encoding):
    """Each chunk once, with caches (specification 3.4)."""

    mode = "chunks"

    def __init__(self, engine, config: EncoderConfig, options: StreamOptions):
        super().__init__(engine, config, options)
        static = self.config.static_chunk_size
        if static and not self.config.use_dynamic_chunk and self.chunk != static:
            raise M3asrError(f"chunk is {self.chunk}, but this model was trained on chunks of {static} frames alone")
        self.delay = self._frames(self.chunk)
        self.keep = self.chunk * options.left_chunks
        self.start = self.state = engine.stream_start()

    def window(self, closed: bool) -> np.ndarray | None:
        """(T, F), or None if there is not enough for one."""
        size = self._frames(self.chunk)
        if len(self.features) >= (self.config.min_frames if closed else size):
            return self.features[:size]
        return None

    @staticmethod
    def run(encodings: Sequence[_Chunks], windows: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """One engine call -> log_probs (C, V) and hidden (C, D) each."""
        features, lengths = pad_batch(windows)
        engine, keep = encodings[0].engine, encodings[0].keep
        states = [encoding.state for encoding in encodings]
        log_probs, hidden, lengths, states = engine.stream_step(features, lengths, states, keep)
        for encoding, state in zip(encodings, states, strict=True):
            encoding.state = state
            encoding.features = encoding.features[encoding.chunk * encoding.config.subsampling_rate :]
        return [(log_probs[b, :n], hidden[b, :n]) for b, n in enumerate(lengths)]

    def begin_segment(self) -> None:
        self.state = self.start


class _Windows(_Encoding):
    """Each chunk with the frames before and after it, read anew every time."""

    mode = "windows"

    def __init__(self, engine, config: EncoderConfig, options: StreamOptions):
        super().__init__(engine, config, options)
        self.delay = self._frames(self.chunk + options.right)
        self.left = options.left // self.chunk * self.chunk  # whole chunks, as a model with fixed ones needs it
        self.before = 0  # encoder frames of context that the features start with

    def window(self, closed: bool) -> np.ndarray | None:
        size = self._frames(self.before + self.chunk + self.options.right)
        if len(self.features) >= (self._frames(self.before + 1) if closed else size):
            return self.features[:size]
        return None

    @staticmethod
    def run(encodings: Sequence[_Windows], windows: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        log_probs, hidden, lengths = encodings[0].engine(*pad_batch(windows))
        outputs = []
        for b, (encoding, length) in enumerate(zip(encodings, lengths.tolist(), strict=True)):
            middle = slice(encoding.before, min(encoding.before + encoding.chunk, length))
            outputs.append((log_probs[b, middle], hidden[b, middle]))
            before = min(middle.stop, encoding.left)
            encoding.features = encoding.features[(middle.stop - before) * encoding.config.subsampling_rate :]
            encoding.before = before
        return outputs

    def begin_segment(self) -> None:
        """What was said before stays as context: it costs nothing and helps where a long segment was cut."""


def _encoding(transcriber: Transcriber, options: StreamOptions) -> _Encoding:
    engine, config = transcriber.engine, transcriber.folder.config.encoder
    if options.mode == "windows" or (options.mode == "auto" and not config.can_stream):
        return _Windows(engine, config, options)
    if not hasattr(engine, "stream_step"):
        raise M3asrError(
            f"the engine {engine.name} does not run chunk by chunk: use onnx or eager, or the mode windows"
        )
    return _Chunks(engine, config, options)
