"""N-gram language models: what is read, what is answered, what is refused."""

import gzip
import itertools
import math

import numpy as np
import pytest

from m3asr.decode import NgramLM
from m3asr.decode.arpa import ArpaModel
from m3asr.errors import MissingExtra, ModelError

ARPA = r"""\data\
ngram 1=5
ngram 2=3

\1-grams:
-1.0	<unk>
0.0	<s>	-0.5
-0.7	</s>
-0.6	ab	-0.3
-0.9	c	-0.2

\2-grams:
-0.2	<s> ab
-0.4	ab c
-0.1	c </s>

\end\
"""


@pytest.fixture
def arpa(tmp_path):
    path = tmp_path / "words.arpa"
    path.write_text(ARPA, encoding="utf-8")
    return path


def total(lm, tokens):
    state, score = lm.start(), 0.0
    for token in tokens:
        gain, after = lm.step(state, token)
        assert gain <= lm.max_gain(state) + 1e-12
        score, state = score + gain, after
    return score + lm.finish(state)


def test_scores_of_words_and_of_tokens(arpa):
    pieces = ["<blank>", "▁a", "b", "▁c", "▁", "ab", "c"]
    words = NgramLM(arpa, pieces, weight=0.5, bonus=0.25)
    expected = 0.5 * math.log(10) * (-0.2 - 0.4 - 0.1) + 2 * 0.25
    assert total(words, [1, 2, 3]) == pytest.approx(expected)
    assert total(words, [4, 5, 4, 6]) == pytest.approx(expected)
    unknown = 0.5 * math.log(10) * (-0.5 - 1.0 - 0.7) + 0.25  # backed off, <unk>, </s>
    assert total(words, [2, 2]) == pytest.approx(unknown)
    tokens = NgramLM(arpa, pieces, weight=0.5, unit="token")
    assert total(tokens, [5, 6]) == pytest.approx(0.5 * math.log(10) * -0.7)
    assert total(NgramLM(arpa, pieces, weight=-0.5, unit="token"), [5, 6]) == pytest.approx(-total(tokens, [5, 6]))


def random_arpa(rng, words, order, whole=False):
    """Text of a model, and {n-gram: (log10 probability, log10 back-off)}; unless `whole`, some suffixes are missing."""
    entries = {(word,): (-rng.random() * 3, -rng.random()) for word in ("<unk>", "<s>", "</s>", *words)}
    for size in range(2, order + 1):
        for context in [gram for gram in entries if len(gram) == size - 1 and gram[-1] not in ("</s>", "<unk>")]:
            for word in (*words, "</s>"):
                if rng.random() < 0.4 and (not whole or (*context[1:], word) in entries):
                    backoff = -rng.random() if size < order and word != "</s>" else 0.0
                    entries[(*context, word)] = (-rng.random() * 3, backoff)
    lines = ["\\data\\"]
    by_size = [[gram for gram in entries if len(gram) == size] for size in range(1, order + 1)]
    lines += [f"ngram {size}={len(grams)}" for size, grams in enumerate(by_size, 1)]
    for size, grams in enumerate(by_size, 1):
        lines += ["", f"\\{size}-grams:"]
        for gram in grams:
            log_prob, backoff = entries[gram]
            lines.append(f"{log_prob!r}\t{' '.join(gram)}" + (f"\t{backoff!r}" if backoff else ""))
    return "\n".join([*lines, "", "\\end\\", ""]), entries


def backed_off(entries, context, word):
    """The definition: log10 P(word | context)."""
    if (*context, word) in entries:
        return entries[(*context, word)][0]
    if not context:
        return entries[("<unk>",)][0]
    return entries.get(tuple(context), (0.0, 0.0))[1] + backed_off(entries, context[1:], word)


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_the_definition(tmp_path, seed):
    rng, words, order = np.random.default_rng(seed), ["a", "b", "c"], 2 + seed % 3
    text, entries = random_arpa(rng, words, order)
    path = tmp_path / "lm.arpa.gz"
    path.write_bytes(gzip.compress(text.encode()))
    model = ArpaModel(path)
    for sentence in itertools.product([*words, "never seen"], repeat=4):
        state, before = model.start(), ["<s>"]
        for word in [*sentence, "</s>"]:
            known = word if (word,) in entries else "<unk>"
            expected = backed_off(entries, before[max(0, len(before) - order + 1) :], known)
            highest = model.highest(state)
            score, state = model.score(state, word)
            assert score == pytest.approx(expected)
            assert score <= highest + 1e-12
            before.append(known)


def test_scores_are_those_of_kenlm(tmp_path):
    kenlm = pytest.importorskip("kenlm")
    text, _ = random_arpa(np.random.default_rng(7), ["a", "b", "c", "d"], 4, whole=True)
    path = tmp_path / "lm.arpa"
    path.write_text(text, encoding="utf-8")
    ours, theirs = ArpaModel(path), kenlm.Model(str(path))
    for sentence in itertools.product(["a", "b", "d", "x"], repeat=4):
        state, score = ours.start(), 0.0
        for word in [*sentence, "</s>"]:
            gain, state = ours.score(state, word)
            score += gain
        assert score == pytest.approx(theirs.score(" ".join(sentence)), abs=1e-4)


def test_packed_is_the_same_to_three_digits(tmp_path):
    rng = np.random.default_rng(8)
    words = ["a", "b", "c", "longer", "\u00e9t\u00e9"]
    (tmp_path / "lm.arpa").write_text(random_arpa(rng, words, 4)[0], encoding="utf-8")
    text = ArpaModel(tmp_path / "lm.arpa")
    text.write_packed(tmp_path / "lm.npz")
    packed = ArpaModel(tmp_path / "lm.npz")
    assert packed.order == text.order
    for sentence in itertools.product([*words, "other", "</s>"], repeat=3):
        states = text.start(), packed.start()
        for word in sentence:
            assert packed.highest(states[1]) == pytest.approx(text.highest(states[0]), rel=1e-3)
            (ours, after), (reference, expected) = packed.score(states[1], word), text.score(states[0], word)
            assert ours == pytest.approx(reference, rel=2e-3, abs=1e-3) and after == expected
            states = expected, after


@pytest.mark.parametrize("harm", ["cut", "empty", "other", "short", "cycle"])
def test_a_damaged_packed_file_is_refused(arpa, tmp_path, harm):
    path = tmp_path / "lm.npz"
    ArpaModel(arpa).write_packed(path)
    data = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    if harm in ("cut", "empty"):
        path.write_bytes(data[: len(data) // 2] if harm == "cut" else b"")
    else:
        arrays |= {
            "other": {"words": np.array(["a"], dtype=object)},
            "short": {"log_probs": arrays["log_probs"][:-1]},
            "cycle": {"suffixes": arrays["suffixes"] + 100},
        }[harm]
        np.savez(path, **arrays)
    with pytest.raises(ModelError, match="lm.npz"):
        ArpaModel(path)


def test_windows_line_ends_and_spaces_for_tabs(arpa):
    arpa.write_bytes(ARPA.replace("\t", " ").replace("\n", "\r\n").encode())
    model = ArpaModel(arpa)
    assert model.score(model.start(), "ab")[0] == -0.2


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("\\data\\", "data", "no line"),
        ("\\end\\\n", "", "is missing"),
        ("-0.1\tc </s>\n", "", "2 2-grams, 3 were announced"),
        ("-0.4\tab c", "-0.4\tab", "line 14"),
        ("-0.4\tab c", "-0.4\tab d", "line 14"),
        ("-0.4\tab c", "nan\tab c", "line 14"),
        ("-0.4\tab c", "x\tab c", "line 14"),
        ("ngram 2=3\n", "", "section"),
        ("ngram 2=3\n", "two\n", "line 3"),
    ],
)
def test_a_damaged_file_is_refused_with_its_reason(arpa, old, new, reason):
    assert old in ARPA
    arpa.write_text(ARPA.replace(old, new), encoding="utf-8")
    with pytest.raises(ModelError, match=rf"words\.arpa .*{reason}"):
        NgramLM(arpa, [])


def test_what_is_no_language_model_is_refused(tmp_path):
    zipped = gzip.compress(ARPA.encode())
    (tmp_path / "cut.arpa.gz").write_bytes(zipped[:-30])
    (tmp_path / "damaged.arpa.gz").write_bytes(zipped[:10] + b"\xff" + zipped[11:])
    (tmp_path / "empty.arpa").write_bytes(b"")
    (tmp_path / "bytes.arpa").write_bytes(bytes(range(256)))
    for name in ("cut.arpa.gz", "damaged.arpa.gz", "empty.arpa", "bytes.arpa", "missing.arpa"):
        with pytest.raises(ModelError, match=name):
            NgramLM(tmp_path / name, [])


def test_a_binary_of_kenlm_needs_its_package(monkeypatch, tmp_path):
    path = tmp_path / "lm.bin"
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0")
    monkeypatch.setitem(__import__("sys").modules, "kenlm", None)
    with pytest.raises(MissingExtra, match=r"pip install 'm3asr\[lm\]'"):
        NgramLM(path, [])
