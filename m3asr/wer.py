"""Word and character error rates: how texts are made comparable, aligned and counted, and how sure the rate is.

Both texts are normalised the same way: Unicode NFKC, lower case, every kind of apostrophe written ' and kept inside
words only, all other punctuation and symbols read as a space. Numbers and abbreviations stay as they are written.
A word is what stands between spaces; a Hanzi or kana is a word of its own. Characters are counted without spaces.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from m3asr.errors import MissingExtra
from m3asr.tokenizer import UNSPACED

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u02b9\u00b4`\uff07", "'"))


@dataclass(frozen=True)
class Errors:
    """Counts of an alignment with the fewest errors; `reference` is the length of what should have been said."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference: int = 0

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float | None:
        """Errors over reference length; None of an empty reference."""
        return self.total / self.reference if self.reference else None

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference + other.reference,
        )


def words(text: str) -> list[str]:
    """The normalised words of a text."""
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower()
    kept = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return [word for part in UNSPACED.sub(r" \g<0> ", kept).split() if (word := part.strip("'"))]


def count_errors(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> Errors:
    """Align two sequences, of words or of characters (a string), with the fewest errors.

    Raises MissingExtra without rapidfuzz.
    """
    kinds = [edit.tag for edit in _levenshtein().editops(reference, hypothesis)]
    return Errors(kinds.count("replace"), kinds.count("delete"), kinds.count("insert"), len(reference))


def marked(reference: Sequence[str], hypothesis: Sequence[str]) -> tuple[str, str]:
    """Both texts with what differs in brackets."""
    texts: tuple[list[str], list[str]] = ([], [])
    for edit in _levenshtein().opcodes(reference, hypothesis):
        spans = reference[edit.src_start : edit.src_end], hypothesis[edit.dest_start : edit.dest_end]
        for text, span in zip(texts, spans, strict=True):
            if span:
                text.append(" ".join(span) if edit.tag == "equal" else f"[{' '.join(span)}]")
    return " ".join(texts[0]), " ".join(texts[1])


def confidence_interval(
    errors: Sequence[int],
    lengths: Sequence[int],
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Bootstrap interval of sum(errors) / sum(lengths) (Bisani and Ney, 2004).

    errors, lengths: of each utterance. groups: who speaks each, to draw speakers instead of utterances, since those of
    one speaker are alike. None where it says nothing: fewer than two utterances, or groups, or an empty reference.
    """
    counts = np.array([errors, lengths], np.float64)  # (2, N)
    if groups is not None:
        rows = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        index = [rows[group] for group in groups]
        counts = np.stack([np.bincount(index, row, len(rows)) for row in counts])
    size = counts.shape[1]
    if size < 2 or counts[1].sum() == 0:
        return None
    random = np.random.default_rng(seed)
    sums = np.stack([counts[:, random.integers(size, size=size)].sum(axis=1) for _ in range(draws)])  # (draws, 2)
    rates = sums[:, 0] / np.maximum(sums[:, 1], 1)
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _levenshtein():
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise MissingExtra("Counting word errors", "evaluate") from None
    return Levenshtein
