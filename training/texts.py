"""Sentences to speak and to read, from files that packages hold: `python3 -m training.texts OUT NAME=PATH...`

OUT/NAME.txt gets a sentence a line, lower case, words of a-z and apostrophes, none twice in all of OUT. A file's name
tells what it is: *.txt prose; *.jsonl and *.jsonl.gz lines with "text"; *.imp what SWORD's `mod2imp MODULE` prints;
*.page and *.html paragraphs; *.yml chatterbot's conversations; data.* WordNet's glosses. A folder stands for all such
files in it.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from rich.progress import track

TITLES = {"Mr.": "Mister", "Mrs.": "Missus", "Dr.": "Doctor", "Messrs.": "Messieurs"}
KINDS = (".txt", ".jsonl", ".jsonl.gz", ".imp", ".page", ".html", ".yml")
LONGEST = 30  # words


def spelled_out(text: str) -> str:
    for short, full in TITLES.items():
        text = text.replace(short, full)
    return text


def clean(line: str) -> str | None:
    """Text as a voice reads it, or None where reading and transcript could differ."""
    line = spelled_out(line)
    line = re.sub(r"\s+", " ", line.translate(str.maketrans("’‘`“”", "'''\"\"")).replace("--", ", ")).strip(" ,;:-")
    odd = re.search(r"[^A-Za-z' ,.;:?!\"-]|[A-Za-z]\.[A-Za-z]|\b[A-Z]{2,}\b|\b(etc|vs|St|esp|Jr|Sr|No|Ltd|Co)\.", line)
    return None if odd or not line else line


def normalise(line: str) -> str:
    words = re.sub(r"[^a-z' ]+", " ", line.lower()).split()
    return " ".join(word for word in (word.strip("'") for word in words) if word)


def grams(text: str, size: int = 4) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def read_manifest(path: Path) -> list[dict]:
    """The lines of a JSONL file, also gzipped; a last line that is still being written is left out."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def wordnet(path: Path) -> Iterator[tuple[str, str]]:
    """(text, what it is) of the glosses of one of WordNet's data files, or of a folder with them."""
    for file in sorted(path.glob("data.*")) if path.is_dir() else [path]:
        for line in file.read_text(encoding="latin-1").splitlines():
            gloss = line.partition(" | ")[2]
            for example in re.findall(r'"([^"]+)"', gloss):
                yield example, "wordnet-example"
            definition = re.sub(r"\([^)]*\)", "", gloss.split('"')[0].split(";")[0])
            if definition.strip():
                yield definition, "wordnet-definition"


def without_markup(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", text))


def files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and (p.name.endswith(KINDS) or p.name.startswith("data.")))


def passages(path: Path) -> Iterator[str]:
    """The running text of one file, in pieces of any length."""
    if path.name.startswith("data."):
        yield from (text for text, _ in wordnet(path))
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from (line["text"] for line in read_manifest(path))
    else:
        text = path.read_text(encoding="utf-8", errors="ignore")
        if path.suffix == ".imp":
            for entry in text.split("$$$"):
                entry = re.sub(r"<(note|title|reference)\b.*?</\1>", " ", entry.partition("\n")[2], flags=re.DOTALL)
                yield without_markup(entry)
        elif path.suffix in (".page", ".html"):
            paragraphs = re.findall(r'<p\b[^>]*>(.*?)</p>|<div class="para">(.*?)</div>', text, flags=re.DOTALL)
            yield from (without_markup(one or other) for one, other in paragraphs)
        elif path.suffix == ".yml":
            import yaml

            for conversation in yaml.safe_load(text).get("conversations", []):
                yield from (f"{line}." for line in conversation)
        else:
            yield text


def sentences(text: str) -> Iterator[str]:
    """Cut at ends and at semicolons and colons, which are read as ends; titles are spelled out first."""
    yield from re.split(r"(?<=[.?!;:])[\"'”’)]*\s+", spelled_out(text))


def cut(words: list[str]) -> list[list[str]]:
    """What is too long for one breath in parts of equal length."""
    parts = 1 if len(words) <= LONGEST else -(-len(words) // 22)
    size = -(-len(words) // parts)
    return [words[i : i + size] for i in range(0, len(words), size)]


class Reserved:
    """What the tests are about: no line of training is one of `without` or shares four words in a row with `apart`."""

    def __init__(self, without: list[Path], apart: list[Path]):
        far = {entry["text"] for path in apart for entry in read_manifest(path)}
        self.texts = far | {entry["text"] for path in without for entry in read_manifest(path)}
        self.grams = set().union(*map(grams, far))

    def allows(self, text: str) -> bool:
        return text not in self.texts and not grams(text) & self.grams


class Collection:
    """Takes each sentence once, and none that a test could be about."""

    def __init__(self, without: list[Path], apart: list[Path], known: set[str], unknown: int):
        self.reserved, self.known, self.unknown = Reserved(without, apart), known, unknown
        self.seen: set[str] = set()

    def take(self, passage: str) -> Iterator[str]:
        for sentence in sentences(passage):
            line = clean(sentence.replace("LORD", "Lord").replace("GOD", "God").replace("_", ""))
            words = normalise(line).split() if line else []
            for part in cut(words) if len(words) > 1 else ():
                text = " ".join(part)
                strange = sum(w.removesuffix("'s") not in self.known for w in part) if self.known else 0
                if len(part) > 1 and strange <= self.unknown and text not in self.seen and self.reserved.allows(text):
                    self.seen.add(text)
                    yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", nargs="+", metavar="NAME=PATH", help="a file or a folder, as above")
    parser.add_argument("--without", type=Path, nargs="*", default=[], help="manifests whose texts nothing repeats")
    parser.add_argument(
        "--apart", type=Path, nargs="*", default=[], help="manifests to share no four words in a row with"
    )
    parser.add_argument("--words", type=Path, help="a word a line: sentences with others are left out")
    parser.add_argument("--unknown", type=int, default=0, help="such words that a sentence may have")
    args = parser.parse_args()
    known = set(args.words.read_text(encoding="utf-8").lower().split()) if args.words else set()
    collection = Collection(args.without, args.apart, known, args.unknown)
    args.out.mkdir(parents=True, exist_ok=True)
    for source in args.sources:
        name, found, path = source.partition("=")
        if not found or not Path(path).exists():
            raise SystemExit(f"{source}: expected NAME=PATH with a file or folder that is there")
        lines = [x for file in track(files(Path(path)), name) for p in passages(file) for x in collection.take(p)]
        (args.out / f"{name}.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        shown = random.Random(0).sample(lines, min(2, len(lines)))
        print(f"{name}: {len(lines)} sentences, {sum(len(x.split()) for x in lines)} words: {' | '.join(shown)}")


if __name__ == "__main__":
    main()
