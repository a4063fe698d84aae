"""From encoder frames to seconds, from tokens to words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WORD_START = "▁"  # U+2581: how SentencePiece, and the character vocabularies of both families, write a space

# Unicode blocks of kana, and of Han characters: extension A and the unified ones, compatibility, extensions B and on.
_IDEOGRAPHIC = ((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


@dataclass
class Word:
    """A word with its time in seconds and its confidence in 0..1, where known."""

    text: str
    start: float
    end: float
    confidence: float | None = None


def token_times(
    times: Sequence[int], frame_shift: float = 0.04, duration: float | None = None, longest: float = 1.0
) -> list[tuple[float, float]]:
    """(start, end) in seconds of each token, from the frames of their peaks (specification 3.3).

    Neighbours meet midway between their peaks; no token reaches further than `longest` / 2 seconds from its peak, nor
    beyond 0 and `duration` (seconds of the whole utterance, if given).
    """
    peaks = [time * frame_shift for time in times]
    spans = []
    for i, peak in enumerate(peaks):
        start = (peaks[i - 1] + peak) / 2 if i else 0.0
        end = (peak + peaks[i + 1]) / 2 if i + 1 < len(peaks) else duration
        end = peak + longest / 2 if end is None else min(end, peak + longest / 2)
        spans.append((max(start, peak - longest / 2), end))
    return spans


def word_times(
    pieces: Sequence[str], spans: Sequence[tuple[float, float]], confidences: Sequence[float] | None = None
) -> list[Word]:
    """Words from the written form of each token and its (start, end).

    A word begins at a piece that starts with ▁; a ▁ that stands alone ends the word before it; each Chinese or Japanese
    character is a word of its own. A word's confidence is the smallest of its tokens'.
    """
    if len(pieces) != len(spans) or (confidences is not None and len(confidences) != len(pieces)):
        raise ValueError(
            f"expected as many spans and confidences as the {len(pieces)} pieces, got {len(spans)}"
            + (f" and {len(confidences)}" if confidences is not None else "")
        )
    words: list[Word] = []
    joins = False  # whether the next piece continues the last word
    for i, (piece, (start, end)) in enumerate(zip(pieces, spans, strict=True)):
        confidence = None if confidences is None else confidences[i]
        text = piece.removeprefix(WORD_START)
        if text != piece:
            joins = False
        if not text:
            continue
        if joins and not is_ideographic(text[0]):
            word = words[-1]
            word.text += text
            word.end = end
            word.confidence = None if confidence is None else min(word.confidence, confidence)
        else:
            words.append(Word(text, start, end, confidence))
        joins = not is_ideographic(text[-1])
    return words


def is_ideographic(char: str) -> bool:
    """Whether `char` belongs to a script written without spaces: Han or kana."""
    code = ord(char)
    return any(first <= code <= last for first, last in _IDEOGRAPHIC)
