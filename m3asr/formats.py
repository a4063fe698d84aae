"""A transcript, and the formats it is written in: text, Kaldi's `key text`, json, jsonl, srt, vtt, ctm."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from m3asr.decode import Word
from m3asr.errors import M3asrError
from m3asr.files import whole_file

LINE_CHARS = 42  # of a subtitle line, two to a cue: the customary width, which players show without wrapping
CUE_CHARS = 2 * LINE_CHARS
CUE_SECONDS = 7.0  # nobody should have to wait longer for the next cue
CUE_PAUSE = 1.0  # a silence this long ends a cue


@dataclass
class Alternative:
    """One of the n-best texts of a segment; score as the decoder ranks them, confidence in 0..1."""

    text: str
    score: float
    confidence: float
    tokens: list[int]


@dataclass
class Segment:
    """A stretch of speech between pauses; times in seconds from the recording's start, confidence in 0..1.

    nbest: the best texts, this one first, where they were asked for.
    """

    text: str
    start: float
    end: float
    words: list[Word] = field(default_factory=list)
    confidence: float | None = None
    score: float | None = None
    tokens: list[int] | None = None
    nbest: list[Alternative] = field(default_factory=list)


@dataclass
class Transcript:
    """All of a recording. name: what it is called in the output, as a rule the file's name; duration in seconds.

    model, engine, device, decoder: what made it.
    """

    text: str
    segments: list[Segment] = field(default_factory=list)
    duration: float = 0.0
    name: str = ""
    model: str = ""
    engine: str = ""
    device: str = ""
    decoder: str = ""


def to_text(transcripts: Iterable[Transcript]) -> Iterator[str]:
    """The text alone, one recording a line."""
    for transcript in transcripts:
        yield f"{_one_line(transcript.text)}\n"


def to_kaldi(transcripts: Iterable[Transcript]) -> Iterator[str]:
    """`key text`, one recording a line: Kaldi's and WeNet's `text` file."""
    for transcript in transcripts:
        yield f"{_key(transcript.name)} {_one_line(transcript.text)}".rstrip() + "\n"


def to_json(transcripts: Iterable[Transcript]) -> Iterator[str]:
    """One JSON document: an object for one recording, a list of objects for several or none."""
    documents = [plain(asdict(transcript)) for transcript in transcripts]
    document = documents[0] if len(documents) == 1 else documents
    yield json.dumps(document, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def to_jsonl(transcripts: Iterable[Transcript]) -> Iterator[str]:
    """One JSON object a line and recording."""
    for transcript in transcripts:
        yield json.dumps(plain(asdict(transcript)), ensure_ascii=False, allow_nan=False) + "\n"


def to_srt(transcripts: Iterable[Transcript]) -> Iterator[str]:
    """SubRip subtitles. Several recordings follow each other in time, as their durations say."""
    number = 0
    for start, end, text in _all_cues(transcripts):
        number += 1
        # An arrow would be read as a line of times.
        lines = _wrapped(text.replace("-->", "->"))
        yield f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{lines}\n\n"


def to_vtt(transcripts: Iterable[Transcript]) -> Iterator[str]:
    """WebVTT subtitles (https://www.w3.org/TR/webvtt1/). Several recordings follow each other in time."""
    yield "WEBVTT\n\n"
    for start, end, text in _all_cues(transcripts):
        lines = _wrapped(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        yield f"{_clock(start, '.')} --> {_clock(end, '.')}\n{lines}\n\n"


def to_ctm(transcripts: Iterable[Transcript]) -> Iterator[str]:
    """NIST's time-marked conversation: `name channel start duration word [confidence]`, one word a line.

    A segment without word times is one entry, its spaces written as underscores.
    """
    for transcript in transcripts:
        for segment in transcript.segments:
            words = segment.words or [Word(segment.text, segment.start, segment.end, segment.confidence)]
            for word in words:
                if not word.text.strip():
                    continue
                entry = re.sub(r"\s+", "_", word.text.strip())
                duration = max(word.end - word.start, 0.0)
                confidence = "" if word.confidence is None else f" {word.confidence:.3f}"
                yield f"{_key(transcript.name)} 1 {word.start:.3f} {duration:.3f} {entry}{confidence}\n"


# Each takes the transcripts as they come and yields output at once; json alone needs them all first.
FORMATS: dict[str, Callable[[Iterable[Transcript]], Iterator[str]]] = {
    "text": to_text,
    "kaldi": to_kaldi,
    "json": to_json,
    "jsonl": to_jsonl,
    "srt": to_srt,
    "vtt": to_vtt,
    "ctm": to_ctm,
}


def formatted(transcripts: Iterable[Transcript] | Transcript, name: str) -> Iterator[str]:
    """The pieces of the output, as the transcripts come in. Raises M3asrError for an unknown format."""
    if name not in FORMATS:
        raise M3asrError(f"There is no output format '{name}'; choose one of {', '.join(FORMATS)}.")
    return FORMATS[name]([transcripts] if isinstance(transcripts, Transcript) else transcripts)


def write(transcripts: Iterable[Transcript] | Transcript, name: str, path: str | Path) -> None:
    """Write a file in format `name`, UTF-8; aside first and then renamed, so that it is whole or not there."""
    pieces = formatted(transcripts, name)
    with whole_file(path) as aside, open(aside, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(pieces)


def cues(segment: Segment) -> Iterator[tuple[float, float, str]]:
    """(start, end, text) of the subtitles of a segment: cut between words where it is too long, or at a pause.

    The text between two cuts is the segment's own, spaces and all. Without word times the segment stays whole.
    """
    if not segment.text.strip():
        return
    places = _places(segment)
    if places is None:
        yield segment.start, segment.end, segment.text.strip()
        return
    first = 0
    for i in range(1, len(places) + 1):
        if i < len(places):
            word, before = segment.words[i], segment.words[i - 1]
            chars = places[i][1] - places[first][0]
            seconds = word.end - segment.words[first].start
            if chars <= CUE_CHARS and seconds <= CUE_SECONDS and word.start - before.end < CUE_PAUSE:
                continue
        # What stands between two words (a comma) stays with the first.
        begin = places[first][0] if first else 0
        text = segment.text[begin : places[i][0] if i < len(places) else None].strip()
        yield segment.words[first].start, segment.words[i - 1].end, text
        first = i


def _places(segment: Segment) -> list[tuple[int, int]] | None:
    """Where in the segment's text each word stands; None if there are no words or they are not those of the text."""
    places, at = [], 0
    for word in segment.words:
        at = segment.text.find(word.text, at)
        if at < 0:
            return None
        places.append((at, at + len(word.text)))
        at = places[-1][1]
    return places or None


def _all_cues(transcripts: Iterable[Transcript]) -> Iterator[tuple[float, float, str]]:
    offset = 0.0
    for transcript in transcripts:
        for segment in transcript.segments:
            for start, end, text in cues(segment):
                yield offset + start, offset + end, text
        offset += transcript.duration


def _wrapped(text: str) -> str:
    """On two lines of about the same length where one would be too long, cut at a space if there is one."""
    text = _one_line(text)
    if len(text) <= LINE_CHARS:
        return text
    spaces = [match.start() for match in re.finditer(" ", text)]
    if not spaces:
        return f"{text[: (len(text) + 1) // 2]}\n{text[(len(text) + 1) // 2 :]}"
    cut = min(spaces, key=lambda at: abs(at - len(text) / 2))
    return f"{text[:cut]}\n{text[cut + 1 :]}"


def _clock(seconds: float, point: str) -> str:
    milliseconds = max(round(seconds * 1000), 0)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _key(name: str) -> str:
    """A name without spaces, which would end it."""
    return re.sub(r"\s+", "_", name.strip()) or "-"


def plain(value):
    """Times and confidences to a thousandth and a millionth: float noise helps no reader of a JSON file."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
