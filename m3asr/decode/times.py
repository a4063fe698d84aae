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
