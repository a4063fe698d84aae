"""A small n-gram language model from text: `python3 -m training.ngram TEXT... -o lm.arpa.gz --model MODEL`.

For `m3asr transcribe --lm lm.arpa.gz --lm-unit token`, or, of words (--unit word -o lm.npz), for a model folder. Needs
no package beside those of m3asr, and memory of some hundred bytes an n-gram: text of millions of words. For more,
KenLM's lmplz makes the same kind of model.

The n-grams are of the model's own units (--unit token), which suits a search that goes unit by unit and has no unknown
words, or of words. Smoothing is interpolated modified Kneser-Ney (Chen and Goodman, "An Empirical Study of Smoothing
Techniques for Language Modeling", 1998); n-grams seen less than --min-counts times are left out, and what they were
worth goes to the back-off.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from m3asr.decode.arpa import ArpaModel
from m3asr.files import whole_file
from m3asr.tokenizer import Tokenizer

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
Gram = tuple[str, ...]


def estimate(
    sentences: Iterable[Sequence[str]], order: int, min_counts: Sequence[int] = (), vocabulary: Iterable[str] = ()
) -> list[dict[Gram, tuple[float, float]]]:
    """For each size from 1 to `order`: {n-gram: (probability after the words before its last, back-off weight)}.

    min_counts: for each size how often an n-gram must have been seen; the last goes on for the larger sizes, and none
    may be smaller than the one before. vocabulary: entries beside those of the sentences; unknown ones are "<unk>".
    """
    min_counts = [*min_counts, *[min_counts[-1] if min_counts else 1] * order][:order]
    if order < 1 or min_counts[0] != 1 or min_counts != sorted(min_counts):
        raise ValueError(f"order {order} and counts {min_counts}: expected 1 or more, and rising counts from 1 on")
    seen = [Counter() for _ in range(order)]  # by size - 1
    for sentence in sentences:
        framed = (START, *sentence, END)
        for size, counts in enumerate(seen, 1):
            counts.update(zip(*(framed[i:] for i in range(size)), strict=False))
    if not seen[0]:
        raise ValueError("there is no sentence to count")
    # Of a shorter n-gram it counts after how many different words it was seen, not how often, unless it begins the
    # sentence: it is asked only where the longer ones know nothing.
    counted = [Counter(gram[1:] for gram in longer) for longer in seen[1:]] + [seen[-1]]
    for size, counts in enumerate(counted[:-1], 1):
        counts.update({gram: count for gram, count in seen[size - 1].items() if gram[0] == START})

    words = {UNKNOWN, END, *vocabulary, *(gram[0] for gram in seen[0])} - {START}
    del counted[0][START,]
    model: list[dict[Gram, tuple[float, float]]] = []
    for counts, raw, least in zip(counted, seen, min_counts, strict=True):
        discounts = _discounts(counts.values())
        total, freed, kept = Counter(), Counter(), {}
        for gram, count in counts.items():
            rest = count - discounts[min(count, 3)] if raw[gram] >= least else 0.0
            total[gram[:-1]] += count
            freed[gram[:-1]] += count - rest
            if rest > 0:
                kept[gram] = rest
        if not model:
            uniform = freed[()] / total[()] / len(words)
            model.append({(word,): (kept.get((word,), 0.0) / total[()] + uniform, 1.0) for word in sorted(words)})
            model[0][START,] = 0.0, 1.0
            continue
        shorter = model[-1]
        for context in total.keys() & shorter.keys():
            shorter[context] = shorter[context][0], freed[context] / total[context]
        longer = {}
        for gram in sorted(kept):
            context = gram[:-1]
            longer[gram] = (kept[gram] + freed[context] * shorter[gram[1:]][0]) / total[context], 1.0
        model.append(longer)
    return model


def _discounts(counts: Iterable[int]) -> list[float]:
    """What n-grams seen 0, 1, 2, and 3 or more times give to others, by how many were seen 1 to 4 times."""
    n = Counter(counts)
    if not all(n[i] for i in (1, 2, 3, 4)):
        return [0.0, 0.5, 0.75, 0.9]  # too little text, or units that are all frequent
    scale = n[1] / (n[1] + 2 * n[2])
    discounts = [i - (i + 1) * scale * n[i + 1] / n[i] for i in (1, 2, 3)]
    return [0.0, *(min(max(discount, 0.05), i - 0.05) for i, discount in enumerate(discounts, 1))]


def arpa_lines(model: Sequence[dict[Gram, tuple[float, float]]]) -> Iterator[str]:
    """The model as an ARPA file holds it: decimal logarithms to four places."""
    yield "\\data\\\n"
    yield from (f"ngram {size}={len(grams)}\n" for size, grams in enumerate(model, 1))
    for size, grams in enumerate(model, 1):
        yield f"\n\\{size}-grams:\n"
        for gram, (prob, backoff) in grams.items():
            line = f"{_log10(prob)}\t{' '.join(gram)}"
            yield line + (f"\t{_log10(backoff)}\n" if backoff != 1.0 else "\n")
    yield "\n\\end\\\n"


def _log10(value: float) -> str:
    return f"{math.log10(value):.4f}".rstrip("0").rstrip(".") if value > 0 else "-99"


def write_arpa(model: Sequence[dict[Gram, tuple[float, float]]], path: Path) -> None:
    """Write the file whole or not at all, gzipped if its name ends in .gz."""
    with whole_file(path) as part, open(part, "wb") as file:
        # No name and no time inside, so that the same text gives the same bytes.
        out = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.suffix == ".gz" else file
        out.writelines(line.encode() for line in arpa_lines(model))
        if out is not file:
            out.close()


def read_sentences(path: Path) -> list[tuple[str, str]]:
    """(id, text) of each line of a text file, or of a file of JSON lines with "text" (and "id"); both also gzipped."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    with opened as file:
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            lines = [json.loads(line) for line in file if line.strip()]
            return [(str(line.get("id", number)), line["text"]) for number, line in enumerate(lines)]
        return [(str(number), line.strip()) for number, line in enumerate(file) if line.strip()]


def without_development(sentences: list[tuple[str, str]], count: int) -> tuple[list[str], list[str]]:
    """(training, development) texts, split as `training.train` splits its lines."""
    from training.data import split

    parts = split([{"text": text} for _, text in sorted(sentences)], count)
    return tuple([line["text"] for line in part] for part in parts)


def units_of(tokenizer: Tokenizer) -> list[str]:
    """The units that text is made of, in the order of their ids."""
    silent = {tokenizer.blank, tokenizer.sos, tokenizer.eos}
    return [s for i, s in enumerate(tokenizer.symbols) if i not in silent and s not in (START, END) and " " not in s]


def perplexity(model: ArpaModel, sentences: Iterable[Sequence[str]], words: int) -> float:
    """A word, the ends of the sentences counted as words, whatever the model's units are."""
    total, ends = 0.0, 0
    for sentence in sentences:
        state, ends = model.start(), ends + 1
        for unit in (*sentence, END):
            score, state = model.score(state, unit)
            total += score
    return 10 ** (-total / (words + ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, help="a sentence a line, or JSON lines with 'text'; also .gz")
    parser.add_argument("--output", "-o", type=Path, required=True, help="lm.arpa, lm.arpa.gz, or lm.npz: packed")
    parser.add_argument("--unit", choices=("token", "word"), default="token")
    parser.add_argument("--vocabulary", type=Path, help="--unit word: words to know though no text has them")
    parser.add_argument("--unknown", type=float, help="log10 of an unknown word's probability, if not as estimated")
    parser.add_argument("--model", type=Path, help="model folder: whose units, and how words are cut into them")
    parser.add_argument("--order", type=int, default=6, help="the longest n-gram")
    parser.add_argument(
        "--min-counts", type=int, nargs="+", default=[1, 1, 2, 2, 3], help="for 1-grams, 2-grams...; the last goes on"
    )
    parser.add_argument("--without", type=Path, nargs="*", default=[], help="texts to leave out, and to measure on")
    parser.add_argument(
        "--development", type=int, default=0, help="leave out, and measure on, the N that training.train evaluates on"
    )
    args = parser.parse_args()
    if args.unit == "token" and args.model is None:
        parser.error("--unit token needs --model, whose units they are")
    if args.unit == "token" and args.vocabulary is not None:
        parser.error("--vocabulary is for --unit word: tokens are the model's units")

    sentences = [pair for path in args.texts for pair in read_sentences(path)]
    held_out = [text for path in args.without for _, text in read_sentences(path)]
    texts = [text for _, text in sentences]
    if args.development:
        texts, development = without_development(sentences, args.development)
        held_out += development
    left_out = set(held_out)
    texts = [text for text in texts if text not in left_out]

    vocabulary, cut = [], str.split
    if args.unit == "token":
        tokenizer = Tokenizer.read(args.model / "units.txt")
        vocabulary = units_of(tokenizer)
        cut = lambda text: [tokenizer.symbols[i] for i in tokenizer.encode(text)]  # noqa: E731
    elif args.vocabulary:
        vocabulary = args.vocabulary.read_text(encoding="utf-8").split()
    model = estimate(map(cut, texts), args.order, args.min_counts, vocabulary)
    if args.unknown is not None:
        model[0][UNKNOWN,] = 10.0**args.unknown, 1.0
    if args.output.suffix == ".npz":
        with tempfile.TemporaryDirectory() as folder, whole_file(args.output) as part, open(part, "wb") as file:
            write_arpa(model, Path(folder) / "lm.arpa")
            ArpaModel(Path(folder) / "lm.arpa").write_packed(file)
    else:
        write_arpa(model, args.output)
    sizes = " + ".join(str(len(grams)) for grams in model)
    print(f"{len(texts)} sentences, {sizes} n-grams, {args.output.stat().st_size / 1e6:.2f} MB")
    if held_out:
        words = sum(len(text.split()) for text in held_out)
        value = perplexity(ArpaModel(args.output), map(cut, held_out), words)
        print(f"perplexity {value:.1f} a word on {len(held_out)} sentences left out")


if __name__ == "__main__":
    main()
