"""Language models from text: probabilities by their definition, files that are read back, texts that are left out."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from m3asr.decode import NgramLM
from m3asr.decode.arpa import ArpaModel
from m3asr.tokenizer import Tokenizer
from training import ngram
from training.ngram import END, START, UNKNOWN, estimate, units_of, write_arpa

UNITS = Path(__file__).parent / "data" / "golden" / "3m-moe-80"


def text(seed, sentences=400, words="abcdefgh"):
    """Sentences of a chain in which some words are frequent and some follow each other."""
    rng = np.random.default_rng(seed)
    chain = rng.dirichlet(np.full(len(words), 0.3), len(words))
    result = []
    for _ in range(sentences):
        sentence = [int(rng.integers(len(words)))]
        while rng.random() < 0.85:
            sentence.append(int(rng.choice(len(words), p=chain[sentence[-1]])))
        result.append([words[i] for i in sentence])
    return result


def prob(model, context, word):
    """As the file would be asked."""
    gram = (*context[max(0, len(context) - len(model) + 1) :], word)
    if gram in model[len(gram) - 1]:
        return model[len(gram) - 1][gram][0]
    backoff = model[len(gram) - 2].get(gram[:-1], (0.0, 1.0))[1]
    return backoff * prob(model, gram[1:-1], word)


def contexts(sentences, order):
    yield ()
    for sentence in sentences:
        framed = [START, *sentence]
        for i in range(1, len(framed) + 1):
            for size in range(1, order):
                yield tuple(framed[max(0, i - size) : i])


@pytest.mark.parametrize("min_counts", [(1,), (1, 1, 2), (1, 2, 2, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_probabilities_sum_to_one_after_anything(seed, min_counts):
    sentences = text(seed)
    model = estimate(sentences, 4, min_counts, ["never", "a"])
    vocabulary = [gram[0] for gram in model[0] if gram[0] != START]
    assert set(vocabulary) == {*"abcdefgh", "never", UNKNOWN, END}
    after = {*contexts(sentences[:40], 4), ("a", "never"), ("h", "g", "h", "g", "h")}
    for context in after:
        assert sum(prob(model, context, word) for word in vocabulary) == pytest.approx(1.0)
    assert min(prob(model, context, word) for context in after for word in vocabulary) > 0
    seen = Counter(tuple(s[i : i + 3]) for s in ([START, *x, END] for x in sentences) for i in range(len(s) - 2))
    least = dict(enumerate(min_counts)).get(2, min_counts[-1])
    assert set(model[2]) == {gram for gram, count in seen.items() if count >= least}


def test_kneser_ney_by_its_definition():
    sentences, order = text(5, 300, "abcdefghijkl"), 3
    model = estimate(sentences, order)
    vocabulary = sorted({word for s in sentences for word in s} | {END, UNKNOWN})
    framed = [[START, *sentence, END] for sentence in sentences]
    grams = [Counter(tuple(s[i : i + n]) for s in framed for i in range(len(s) - n + 1)) for n in range(1, order + 1)]

    def count(gram):
        if len(gram) == order or gram[0] == START:
            return grams[len(gram) - 1][gram]
        return sum(longer[1:] == gram for longer in grams[len(gram)])

    def discounts(size):
        n = Counter(count(gram) for gram in grams[size - 1] if gram != (START,))
        y = n[1] / (n[1] + 2 * n[2])
        return [0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]

    by_size = {size: discounts(size) for size in (2, 3)}

    def kneser_ney(context, word):
        if not context:
            return model[0][word,][0]  # below
        d = by_size[len(context) + 1]
        followed = {w: count((*context, w)) for w in vocabulary}
        total = sum(followed.values())
        freed = sum(d[min(c, 3)] for c in followed.values())
        rest = max(followed[word] - d[min(followed[word], 3)], 0)
        return rest / total + freed / total * kneser_ney(context[1:], word)

    for context in [("a",), ("c", "b"), (START,), (START, "d"), *sorted(grams[1])[:6]]:
        if sum(grams[len(context)][(*context, word)] for word in vocabulary):
            for word in vocabulary:
                assert prob(model, context, word) == pytest.approx(kneser_ney(context, word))
    # A word counts after how many different words it was seen.
    different = {word: count((word,)) for word in vocabulary}
    ranked = sorted(different, key=different.get)
    assert sorted(ranked, key=lambda word: model[0][word,][0]) == ranked
    assert model[0][UNKNOWN,][0] == min(value for gram, (value, _) in model[0].items() if gram != (START,))


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
def test_the_file_says_what_the_model_says(tmp_path, name):
    sentences = text(1)
    model = estimate(sentences, 4, (1, 1, 2))
    write_arpa(model, tmp_path / name)
    read = ArpaModel(tmp_path / name)
    for sentence in text(2, 30):
        state, before = read.start(), (START,)
        for word in [*sentence, END]:
            score, state = read.score(state, word)
            assert 10**score == pytest.approx(prob(model, before, word), rel=2e-3)
            before += (word,)
    first = (tmp_path / name).read_bytes()
    write_arpa(model, tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("sentences", [[], [[]], [["a"]], [["a", "a"], ["a"]]])
def test_hardly_any_text(tmp_path, sentences):
    model = estimate(sentences, 3, vocabulary=["b"]) if sentences else None
    if model is None:
        with pytest.raises(ValueError, match="no sentence"):
            estimate(sentences, 3)
        return
    write_arpa(model, tmp_path / "lm.arpa")
    read = ArpaModel(tmp_path / "lm.arpa")
    words = [gram[0] for gram in model[0] if gram[0] != START]
    assert sum(10 ** read.score(read.start(), word)[0] for word in words) == pytest.approx(1.0, rel=1e-3)


def test_counts_that_make_no_sense():
    for order, counts in ((0, (1,)), (3, (2,)), (3, (1, 3, 2))):
        with pytest.raises(ValueError, match="expected 1 or more"):
            estimate([["a"]], order, counts)


def test_the_command(tmp_path, monkeypatch, capsys):
    lines = [{"id": str(i), "text": " ".join(words)} for i, words in enumerate(text(3, 60, ["一", "万", "与", "东"]))]
    lines[7]["text"] = "二 个 买"
    with gzip.open(tmp_path / "train.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "dev.txt").write_text("二 个 买\n", encoding="utf-8")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ngram", str(tmp_path / "train.jsonl.gz"), *map(str, arguments)])
        ngram.main()
        return capsys.readouterr().out

    out = run("-o", tmp_path / "lm.arpa", "--model", UNITS, "--order", 3, "--without", tmp_path / "dev.txt")
    assert "59 sentences" in out and "on 1 sentences left out" in out
    assert "二 个" not in (tmp_path / "lm.arpa").read_text(encoding="utf-8").split("\\2-grams:")[1]
    tokenizer = Tokenizer.read(UNITS / "units.txt")
    model, lm = ArpaModel(tmp_path / "lm.arpa"), NgramLM(tmp_path / "lm.arpa", tokenizer.symbols, 1.0, unit="token")
    known = [symbol for symbol in tokenizer.symbols if symbol not in ("<blank>", "<unk>", "<sos/eos>")]
    assert len(units_of(tokenizer)) == len(known) + 1
    often, never = (tokenizer.symbols.index(symbol) for symbol in ("一", "亡"))
    assert lm.step(lm.start(), often)[0] > lm.step(lm.start(), never)[0] > -20
    assert sum(10 ** model.score(model.start(), unit)[0] for unit in [*known, UNKNOWN, END]) == pytest.approx(
        1, rel=0.01
    )

    out = run("-o", tmp_path / "words.arpa.gz", "--unit", "word", "--order", 2, "--development", 10)
    assert "on 10 sentences left out" in out
    (tmp_path / "more.txt").write_text("never\nheard\n", encoding="utf-8")
    more = "--vocabulary", tmp_path / "more.txt", "--unknown", -9
    run("-o", tmp_path / "words.npz", "--unit", "word", "--order", 2, "--development", 10, *more)
    written, packed = ArpaModel(tmp_path / "words.arpa.gz"), ArpaModel(tmp_path / "words.npz")
    assert packed.score(packed.start(), "买")[0] == pytest.approx(written.score(written.start(), "买")[0], rel=0.02)
    assert -9 < packed.score(0, "never")[0] < packed.score(0, "买")[0] and packed.score(0, "no")[0] == -9
    with pytest.raises(SystemExit):
        run("-o", tmp_path / "none.arpa")
    assert "--model" in capsys.readouterr().err
