"""N-gram language model in the prefix beam search (shallow fusion), read by KenLM: ARPA or KenLM binary files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3asr.errors import MissingExtra, ModelError

WORD_START = "\u2581"  # ▁: how SentencePiece, and the character vocabularies of both families, write a space
TO_NATURAL = math.log(10.0)  # KenLM answers in decimal logarithms


class NgramLM:
    """score = weight * ln P(next | before) + bonus, for every unit and (without bonus) for the sentence end.

    path: ARPA file (also gzipped) or KenLM binary. pieces: the written form of each token id.
    unit: "token" if the model's entries are pieces (characters, BPE), "word" if they are words; a word is scored when
    the next one begins with ▁ or the utterance ends, so `bonus` then counts words.
    Raises MissingExtra without the package kenlm, ModelError if the file cannot be read.
    """

    def __init__(
        self, path: str | Path, pieces: Sequence[str], weight: float = 0.3, bonus: float = 0.0, unit: str = "word"
    ):
        if unit not in ("token", "word"):
            raise ValueError(f"unit must be 'token' or 'word', got {unit!r}")
        try:
            import kenlm
        except ImportError:
            raise MissingExtra("An n-gram language model", "lm") from None
        if not Path(path).is_file():
            raise ModelError(f"language model {path} is not there; give an ARPA or KenLM binary file")
        try:
            self._model = kenlm.Model(str(path))
        except (OSError, RuntimeError) as error:
            raise ModelError(f"language model {path} is neither an ARPA nor a KenLM binary file: {error}") from None
        self._new_state = kenlm.State
        self.pieces = [piece.replace("<space>", WORD_START) for piece in pieces]
        self.weight, self.bonus, self.unit = weight, bonus, unit

    def start(self) -> tuple[Any, str]:
        """(KenLM's state, the letters of the word that is not complete yet)."""
        state = self._new_state()
        self._model.BeginSentenceWrite(state)
        return state, ""

    def step(self, state: tuple[Any, str], token: int) -> tuple[float, tuple[Any, str]]:
        before, word = state
        piece = self.pieces[token]
        if self.unit == "token":
            score, after = self._score(before, piece)
            return score + self.bonus, (after, "")
        if not piece.startswith(WORD_START):
            return 0.0, (before, word + piece)
        rest = piece.removeprefix(WORD_START)
        if not word:
            return 0.0, (before, rest)
        score, after = self._score(before, word)
        return score + self.bonus, (after, rest)

    def finish(self, state: tuple[Any, str]) -> float:
        before, word = state
        total = 0.0
        if word:
            total, before = self._score(before, word)
            total += self.bonus
        return total + self._score(before, "</s>")[0]

    def max_gain(self, state: tuple[Any, str]) -> float:
        return max(self.bonus, 0.0)

    def _score(self, before: Any, entry: str) -> tuple[float, Any]:
        after = self._new_state()
        return self.weight * TO_NATURAL * self._model.BaseScore(before, entry, after), after
