"""From encoder frames to seconds, from tokens to words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Word:
    """A word with its time in seconds and its confidence in 0..1, None where not known."""

    text: str
    start: float
    end: float
    confidence: float | None = None


def token_times(
    times: Sequence[int],
    frame_shift: float = 0.04,
    duration: float | None = None,
    lead: float = 0.12,
    tail: float = 0.5,
) -> list[tuple[float, float]]:
    """(start, end) in seconds of each token, from the frames of their peaks.

    Neighbours meet midway between their peaks, as in WeNet (specification 3.3); a token begins no more than `lead`
    seconds before its peak, ends no more than `tail` after it, and neither lies beyond 0 and `duration` (seconds of the
    whole utterance, if given). WeNet has 0.5 for both; but speech begins at the peak of the first token, 0.05 s before
    it to 0.25 behind for 90 % of people, and ends 0.2 to 0.7 s behind the last one (the package's model).
    """
    peaks = [time * frame_shift for time in times]
    spans = []
    for i, peak in enumerate(peaks):
        start = (peaks[i - 1] + peak) / 2 if i else 0.0
        end = (peak + peaks[i + 1]) / 2 if i + 1 < len(peaks) else duration
        spans.append((max(start, peak - lead), peak + tail if end is None else min(end, peak + tail)))
    return spans


def word_times(
    words: Sequence[tuple[str, int, int]],
    spans: Sequence[tuple[float, float]],
    confidences: Sequence[float] | None = None,
) -> list[Word]:
    """Words with times, from `Tokenizer.word_spans` (word, first token, behind its last token) and `token_times`.

    A word's confidence is the smallest of its tokens'.
    """
    return [
        Word(text, spans[first][0], spans[end - 1][1], None if confidences is None else min(confidences[first:end]))
        for text, first, end in words
    ]
