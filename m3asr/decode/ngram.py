"""N-gram language model in the searches (shallow fusion): ARPA files, or KenLM's binary ones by the package kenlm."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3asr.decode.arpa import ArpaModel
from m3asr.errors import MissingExtra, ModelError

WORD_START = "\u2581"  # ▁: how SentencePiece, and the character vocabularies of both families, write a space
TO_NATURAL = math.log(10.0)  # the models answer in decimal logarithms
_KENLM_MAGIC = b"mmap lm http://kheafield.com/code"


class NgramLM:
    """score = weight * ln P(next | before) + bonus, for every unit and (without bonus) for the sentence end.

    path: ARPA file (also gzipped) or KenLM binary. pieces: the written form of each token id.
    unit: "token" if the model's entries are pieces (characters, BPE), "word" if they are words; a word is scored when
    the next one begins with ▁ or the utterance ends, so `bonus` then counts words.
    Raises ModelError if the file cannot be read, MissingExtra for a KenLM binary without the package kenlm.
    """

    def __init__(
        self, path: str | Path, pieces: Sequence[str], weight: float = 0.3, bonus: float = 0.0, unit: str = "word"
    ):
        if unit not in ("token", "word"):
            raise ValueError(f"unit must be 'token' or 'word', got {unit!r}")
        if not Path(path).is_file():
            found = "is no file" if Path(path).exists() else "is not there"
            raise ModelError(f"language model {path} {found}; give an ARPA or KenLM binary file")
        with open(path, "rb") as file:
            binary = file.read(len(_KENLM_MAGIC)) == _KENLM_MAGIC
        self._model: ArpaModel | _KenlmModel = _KenlmModel(path) if binary else ArpaModel(path)
        self.pieces = [piece.replace("<space>", WORD_START) for piece in pieces]
        self.weight, self.bonus, self.unit = weight, bonus, unit

    def weighted(self, weight: float, bonus: float) -> NgramLM:
        """The same language model, not read again, that counts otherwise."""
        other = copy.copy(self)
        other.weight, other.bonus = weight, bonus
        return other

    def start(self) -> tuple[Any, str]:
        """(the model's state, the letters of the word that is not complete yet)."""
        return self._model.start(), ""

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
        if self.weight < 0:
            return math.inf
        highest = self.weight * TO_NATURAL * self._model.highest(state[0]) + self.bonus
        return highest if self.unit == "token" else max(highest, 0.0)

    def _score(self, before: Any, entry: str) -> tuple[float, Any]:
        log_prob, after = self._model.score(before, entry)
        return self.weight * TO_NATURAL * log_prob, after


class _KenlmModel:
    """A binary file of KenLM's, asked as an `ArpaModel` is."""

    def __init__(self, path: str | Path):
        try:
            import kenlm
        except ImportError:
            raise MissingExtra("A language model in KenLM's binary format", "lm") from None
        try:
            self._model = kenlm.Model(str(path))
        except (OSError, RuntimeError) as error:
            raise ModelError(f"language model {path} cannot be read by KenLM: {error}") from None
        self._new_state = kenlm.State

    def start(self) -> Any:
        state = self._new_state()
        self._model.BeginSentenceWrite(state)
        return state

    def score(self, state: Any, word: str) -> tuple[float, Any]:
        after = self._new_state()
        return self._model.BaseScore(state, word, after), after

    def highest(self, state: Any) -> float:
        return 0.0
