"""Token ids <-> text, by the vocabulary file alone (units.txt: "symbol id" a line).

Covers the vocabularies that people train 3M-ASR and WeNet with: characters (Chinese, or letters with a "▁" or
"<space>" of its own between words), word pieces whose "▁" marks a word's start (SentencePiece), and mixtures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from m3asr.errors import ModelError

WORD_START = "\u2581"  # ▁
_SPACE = "<space>"
_SILENT = {"<blank>", "<blk>", "<sos/eos>", "<sos>", "<eos>", "<s>", "</s>", "<pad>"}
# Hanzi, kana and their marks: written without spaces, each a word of its own.
UNSPACED = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


class WordSpan(NamedTuple):
    """A word and the tokens it is made of: ids[start:end]."""

    word: str
    start: int
    end: int


class _Spoken(NamedTuple):
    """A token's letters, whether a ▁ stands in front of and behind them, whether they begin and end with a Hanzi."""

    body: str
    begins: bool
    ends: bool
    unspaced: bool
    ends_unspaced: bool


class Tokenizer:
    """symbols[i] is the text of token i. blank, sos, eos: their ids; sos and eos default to the symbol "<sos/eos>"
    ("<sos>", "<eos>"), else to the last id, as in the original training projects.
    """

    def __init__(self, symbols: Sequence[str], *, blank: int = 0, sos: int | None = None, eos: int | None = None):
        self.symbols = list(symbols)
        if not self.symbols:
            raise ModelError("The vocabulary is empty; expected at least one symbol.")
        first_id: dict[str, int] = {}
        for index, symbol in enumerate(self.symbols):
            first_id.setdefault(symbol, index)
        last = len(self.symbols) - 1
        self.blank = blank
        self.sos = first_id.get("<sos/eos>", first_id.get("<sos>", last)) if sos is None else sos
        self.eos = first_id.get("<sos/eos>", first_id.get("<eos>", last)) if eos is None else eos
        self.unk = first_id.get("<unk>")
        for name in ("blank", "sos", "eos"):
            if not 0 <= getattr(self, name) <= last:
                raise ModelError(f"The id of {name} is {getattr(self, name)}; expected 0 to {last}, the vocabulary.")
        self._silent = {self.blank, self.sos, self.eos} | {first_id[name] for name in _SILENT if name in first_id}
        self._has_word_pieces = any(len(s) > 1 and s.startswith(WORD_START) for s in self.symbols)
        self._space = first_id.get(WORD_START, first_id.get(_SPACE))
        control = re.compile(r"<[^<>\s]+>")
        self._pieces = {s: i for s, i in first_id.items() if s and i not in self._silent and not control.fullmatch(s)}
        self._longest = max(map(len, self._pieces), default=1)
        self._merge_order = self._is_merge_order()
        letters = "".join(self._pieces)
        self._upper_only = bool(re.search("[A-Z]", letters)) and not re.search("[a-z]", letters)
        self._lower_only = bool(re.search("[a-z]", letters)) and not re.search("[A-Z]", letters)

    def __len__(self) -> int:
        """V, the size of the vocabulary."""
        return len(self.symbols)

    @classmethod
    def read(cls, path: str | Path, *, blank: int = 0, sos: int | None = None, eos: int | None = None) -> Tokenizer:
        """Read units.txt: UTF-8, "symbol id" a line, in any order, the ids 0 to V-1 once each.

        Raises ModelError naming the first line that breaks this.
        """
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise ModelError(f"Vocabulary {path} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError as error:
            raise ModelError(f"Vocabulary {path} is not UTF-8 text (byte {error.start}).") from None
        symbols: dict[int, str] = {}
        line_of: dict[int, int] = {}
        # Not splitlines(): a symbol may itself be one of the rarer line separators.
        for number, line in enumerate(text.split("\n"), 1):
            line = line.removesuffix("\r")
            if not line:
                continue
            match = re.fullmatch(r"(.+?)[ \t]+([0-9]{1,9})[ \t]*", line, re.DOTALL)
            if not match:
                raise ModelError(f"Vocabulary {path}, line {number}: found {line[:40]!r}; expected 'symbol id'.")
            index = int(match[2])
            if index in symbols:
                raise ModelError(f"Vocabulary {path}, line {number}: id {index} was given in line {line_of[index]}.")
            symbols[index], line_of[index] = match[1], number
        for index in sorted(symbols):
            if index >= len(symbols):
                gap = next(i for i in range(len(symbols)) if i not in symbols)
                raise ModelError(
                    f"Vocabulary {path}, line {line_of[index]}: id {index} among {len(symbols)} symbols, "
                    f"while id {gap} is missing; expected 0 to {len(symbols) - 1} once each."
                )
        try:
            return cls([symbols[i] for i in range(len(symbols))], blank=blank, sos=sos, eos=eos)
        except ModelError as error:
            raise ModelError(f"Vocabulary {path}: {error}") from None

    def to_text(self) -> str:
        """The vocabulary as units.txt holds it."""
        return "".join(f"{symbol} {index}\n" for index, symbol in enumerate(self.symbols))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens. blank, sos, eos and padding say nothing; "<unk>" stays visible.

        "▁" and "<space>" become one space, none at the ends. A word that a "▁" opened is also closed by one before a
        Hanzi, so that "▁hello 你" reads "hello 你" as "你 ▁hello" reads "你 hello".
        """
        words = self._words(ids)
        return "".join(f" {word}" if spaced and i else word for i, (word, _, _, spaced) in enumerate(words))

    def word_spans(self, ids: Iterable[int]) -> list[WordSpan]:
        """Words with the tokens they are made of: pieces are joined at "▁"; a Hanzi or kana is a word of its own.

        Tokens without text of their own (blank, sos, eos, a lone "▁") begin and end no word.
        """
        return [WordSpan(word, start, end) for word, start, end, _ in self._words(ids)]

    @cached_property
    def _spoken(self) -> list[_Spoken | None]:
        """What each token adds to a text; None: nothing at all."""
        spoken: list[_Spoken | None] = []
        for index, symbol in enumerate(self.symbols):
            piece = symbol.replace(_SPACE, WORD_START)
            body = piece.strip(WORD_START).replace(WORD_START, " ")
            space = piece.startswith(WORD_START), piece.endswith(WORD_START)
            unspaced = bool(UNSPACED.match(body)), bool(UNSPACED.search(body[-1:]))
            spoken.append(None if index in self._silent else _Spoken(body, *space, *unspaced))
        return spoken

    def _words(self, ids: Iterable[int]) -> list[tuple[str, int, int, bool]]:
        """Words, the tokens they are made of, ids[start:end], and whether a space stands before each."""
        words: list[tuple[str, int, int, bool]] = []
        space = False  # a ▁ was seen since the last word
        opened = False  # the last word was opened by ▁ and is made of letters
        after_unspaced = False  # the last word ends with a Hanzi
        spoken, size = self._spoken, len(self.symbols)
        for position, index in enumerate(ids):
            if not 0 <= index < size:
                raise ModelError(f"Found token {index}; expected 0 to {size - 1}, the vocabulary's ids.")
            token = spoken[index]
            if token is None:
                continue
            body, begins, ends, unspaced, ends_unspaced = token
            space = space or begins
            if body:
                if space or unspaced or after_unspaced or not words:
                    words.append((body, position, position + 1, space or (unspaced and opened)))
                    opened = space and not unspaced
                else:
                    word, start, _, spaced = words[-1]
                    words[-1] = (word + body, start, position + 1, spaced)
                space, after_unspaced = ends, ends_unspaced
        return words

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, for phrases to listen for.

        Word pieces in the order of their byte pair merges, as SentencePiece writes a BPE vocabulary, are merged in
        that order: the cut of the training text. In any other order (sorted, or a unigram model, which needs its
        scores) that cut is not known, and words become the fewest pieces, the longest first.

        Case follows a vocabulary that has only one. A character outside the vocabulary becomes "<unk>"; a vocabulary
        without one raises ModelError.
        """
        if self._upper_only:
            text = text.upper()
        elif self._lower_only:
            text = text.lower()
        ids: list[int] = []
        for number, chunk in enumerate(text.split()):
            if number and self._space is not None and not self._has_word_pieces:
                ids.append(self._space)
            for run in self._runs(chunk):
                ids += self._merged_pieces(run) if self._merge_order else self._fewest_pieces(run)
        return ids

    def _runs(self, chunk: str) -> list[str]:
        """Letters and Hanzi apart, where words begin with ▁: "我用python" -> 我用, ▁python."""
        if not self._has_word_pieces:
            return [chunk]
        runs = re.findall(f"{UNSPACED.pattern}+|(?:(?!{UNSPACED.pattern}).)+", chunk)
        return [
            WORD_START + run if not UNSPACED.match(run) or WORD_START + run[0] in self._pieces else run for run in runs
        ]

    def _is_merge_order(self) -> bool:
        """Whether every piece is two that stand before it; single characters stand anywhere."""
        never = len(self.symbols)
        rank = {piece: index if len(piece) > 1 else -1 for piece, index in self._pieces.items()}
        longer = [piece for piece in self._pieces if len(piece) > 1]
        return bool(longer) and all(
            any(max(rank.get(p[:i], never), rank.get(p[i:], never)) < rank[p] for i in range(1, len(p))) for p in longer
        )

    def _merged_pieces(self, run: str) -> list[int]:
        """Merge neighbours as long as a pair is a piece, the pair of the smallest id first, the leftmost of equals."""
        parts, never = list(run), len(self.symbols)
        while True:
            pairs = (self._pieces.get(a + b, never) for a, b in zip(parts, parts[1:], strict=False))
            rank, i = min(((rank, i) for i, rank in enumerate(pairs)), default=(never, 0))
            if rank == never:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids = []
        for part in parts:
            if part in self._pieces:
                ids.append(self._pieces[part])
            elif part != WORD_START:  # no piece starts a word like this one: spell it without
                if self.unk is None:
                    raise ModelError(f"The vocabulary has neither {part!r} nor <unk>; expected text it can spell.")
                ids.append(self.unk)
        return ids

    def _fewest_pieces(self, run: str) -> list[int]:
        """Cut a run into pieces: fewest unknown characters, then fewest pieces, then the longest first."""
        best: list[tuple[tuple[int, int], list[int]]] = [((0, 0), [])]  # from the end: cost and ids of run[i:]
        for i in range(len(run) - 1, -1, -1):
            options = []
            for length in range(min(self._longest, len(run) - i), 0, -1):
                index = self._pieces.get(run[i : i + length])
                if index is not None:
                    (unknown, count), rest = best[-length]
                    options.append(((unknown, count + 1), index, rest))
            if not options:
                (unknown, count), rest = best[-1]
                if run[i] == WORD_START:  # no piece starts a word like this one: spell it without
                    best.append(((unknown, count), rest))
                    continue
                if self.unk is None:
                    raise ModelError(f"The vocabulary has neither {run[i]!r} nor <unk>; expected text it can spell.")
                options.append(((unknown + 1, count + 1), self.unk, rest))
            cost, index, rest = min(options, key=lambda option: option[0])
            best.append((cost, [index, *rest]))
        return best[-1][1]
