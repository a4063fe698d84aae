"""N-gram language models in ARPA's text format, or packed from it, read and asked without a package."""

from __future__ import annotations

import gzip
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from m3asr.errors import ModelError, reason

UNKNOWN = -100.0  # of a word outside a model that has no <unk>; KenLM's value


class ArpaModel:
    """A back-off model as a tree of its n-grams: each node knows its longest proper suffix in the tree.

    A state is the node of the longest n-gram that the words so far end in. Logarithms are decimal, as in the file.
    Takes some 150 bytes an n-gram and a second for 300,000 of them as text, a tenth of that packed; for models of many
    millions, KenLM's binary files are the better choice.
    """

    def __init__(self, path: str | Path):
        """path: ARPA file, also gzipped, or what `write_packed` wrote. Raises ModelError for one that is damaged or
        cut off, naming the line of text.
        """
        self._word_ids: dict[str, int] = {}
        self._children: dict[tuple[int, int], int] = {}  # (node, word) -> node
        self._log_probs = [0.0]
        self._backoffs = [0.0]
        self._suffixes = [0]
        self._depths = [0]
        self.order = 0
        if zipfile.is_zipfile(path):
            self._read_packed(path)
            return
        try:
            with open(path, "rb") as file:
                zipped = file.read(2) == b"\x1f\x8b"
            with gzip.open(path, "rt", encoding="utf-8") if zipped else open(path, encoding="utf-8") as file:
                self._read(enumerate(file, 1))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise ModelError(
                f"language model {path} is neither an ARPA nor a KenLM binary file: {reason(error)}"
            ) from None
        if "<unk>" not in self._word_ids:
            self._add(["<unk>"], UNKNOWN, 0.0)
        self._unknown = self._word_ids["<unk>"]
        self._highest = self._bounds()

    def start(self) -> int:
        """The state at the beginning of a sentence."""
        return self._children.get((0, self._word_ids.get("<s>", -1)), 0)

    def score(self, state: int, word: str) -> tuple[float, int]:
        """log10 P(word | state), and the state after it. "</s>" ends a sentence."""
        index, total = self._word_ids.get(word, self._unknown), 0.0
        while True:
            node = self._children.get((state, index))
            if node is not None:
                after = node if self._depths[node] < self.order else self._suffixes[node]
                return total + self._log_probs[node], after
            total += self._backoffs[state]
            state = self._suffixes[state]

    def highest(self, state: int) -> float:
        """No word's score is above this."""
        return self._highest[state]

    def write_packed(self, file: Path | BinaryIO) -> None:
        """The model as an .npz of arrays, numbers to three digits: what takes long to read as text is read at once."""
        words = np.frombuffer("\n".join(self._word_ids).encode(), np.uint8)
        nodes = sorted(self._children.items(), key=lambda item: item[1])
        arrays = {
            "words": words,
            "parents": np.array([parent for (parent, _), _ in nodes], np.int32),
            "last_words": np.array([word for (_, word), _ in nodes], np.int32),
            "suffixes": np.array(self._suffixes[1:], np.int32),
            "log_probs": np.array(self._log_probs[1:], np.float16),
            "backoffs": np.array(self._backoffs[1:], np.float16),
            "highest": np.array(self._highest, np.float16),
            "depths": np.array(self._depths, np.uint8),
        }
        np.savez_compressed(file, **arrays)

    def _read_packed(self, path: str | Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            self._word_ids = {word: i for i, word in enumerate(arrays["words"].tobytes().decode().split("\n"))}
            self._unknown = self._word_ids["<unk>"]
            parents, words = arrays["parents"].tolist(), arrays["last_words"].tolist()
            self._children = dict(zip(zip(parents, words, strict=True), range(1, len(parents) + 1), strict=True))
            self._log_probs, self._backoffs = [0.0, *arrays["log_probs"].tolist()], [0.0, *arrays["backoffs"].tolist()]
            self._suffixes, self._depths = [0, *arrays["suffixes"].tolist()], arrays["depths"].tolist()
            self._highest, self.order = arrays["highest"].tolist(), max(self._depths)
            lengths = {len(x) for x in (self._log_probs, self._backoffs, self._suffixes, self._depths, self._highest)}
            if lengths != {len(parents) + 1} or not all(0 <= s < node for node, s in enumerate(self._suffixes[1:], 1)):
                raise ValueError("its arrays do not belong together")
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ModelError(f"language model {path} is damaged: {' '.join(str(error).split())}") from None

    def _read(self, lines: Iterator[tuple[int, str]]) -> None:
        announced: dict[int, int] = {}
        size, found = 0, 0  # of the section being read, and how many n-grams it had

        def finish(number: int) -> None:
            if size and found != announced[size]:
                raise ValueError(f"line {number}: {found} {size}-grams, {announced[size]} were announced")

        for number, line in lines:
            line = line.rstrip("\r\n")
            if not line:
                continue
            if line == "\\end\\" and size and size == max(announced):
                finish(number)
                return
            if not announced and line == "\\data\\":
                announced[0] = 0
            elif announced and (section := re.fullmatch(r"\\(\d+)-grams:", line)):
                finish(number)
                if int(section[1]) != size + 1 or size + 1 not in announced:
                    raise ValueError(f"line {number}: section {line}, expected that of {size + 1}-grams")
                size, found = size + 1, 0
                self.order = size
            elif size:
                self._take(line, size, number)
                found += 1
            elif announced and (count := re.fullmatch(r"ngram\s+(\d+)\s*=\s*(\d+)", line)):
                announced[int(count[1])] = int(count[2])
            elif announced:
                raise ValueError(f"line {number}: {line[:40]!r}, expected 'ngram 1=...'")
        raise ValueError("its end, the line \\end\\, is missing" if announced else "no line \\data\\")

    def _take(self, line: str, size: int, number: int) -> None:
        fields = [field for field in line.replace("\t", " ").split(" ") if field]
        if len(fields) not in (size + 1, size + 2):
            raise ValueError(f"line {number}: {line[:40]!r}, expected log-probability, {size} words, back-off")
        log_prob, backoff = (_number(field, number) for field in (fields[0], *(fields[size + 1 :] or ["0"])))
        try:
            self._add(fields[1 : size + 1], log_prob, backoff)
        except KeyError:
            raise ValueError(
                f"line {number}: what {line[:40]!r} begins with, or one of its words, was not given"
            ) from None

    def _add(self, words: list[str], log_prob: float, backoff: float) -> None:
        """Raises KeyError if the words but the last, or the last alone, are not there yet."""
        if len(words) == 1:
            self._word_ids.setdefault(words[0], len(self._word_ids))
        *context, last = (self._word_ids[word] for word in words)
        parent = 0
        for index in context:
            parent = self._children[parent, index]
        self._children[parent, last] = len(self._depths)
        self._suffixes.append(self._suffix(parent, last))
        self._log_probs.append(log_prob)
        self._backoffs.append(backoff)
        self._depths.append(len(words))

    def _suffix(self, parent: int, index: int) -> int:
        while parent:
            parent = self._suffixes[parent]
            node = self._children.get((parent, index))
            if node is not None:
                return node
        return 0

    def _bounds(self) -> list[float]:
        best = [-math.inf] * len(self._depths)
        for (parent, _), node in self._children.items():
            best[parent] = max(best[parent], self._log_probs[node])
        for node in sorted(range(1, len(best)), key=self._depths.__getitem__):
            best[node] = max(best[node], self._backoffs[node] + best[self._suffixes[node]])
        return best


def _number(field: str, line: int) -> float:
    try:
        value = float(field)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"line {line}: {field[:40]!r}, expected a number")
    return value
