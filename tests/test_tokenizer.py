import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3asr.errors import ModelError
from m3asr.tokenizer import Tokenizer

PIECES = "<blank> <unk> ▁the ▁cat s ▁ ▁c a t h e ' ▁hello 你 好 <sos/eos>".split()
CHARS = "<blank> <unk> ▁ 你 好 h i ， <sos/eos>".split()


def ids(tokenizer, *symbols):
    return [tokenizer.symbols.index(symbol) for symbol in symbols]


def write(path, lines, newline="\n"):
    path.write_bytes(newline.join(lines).encode())
    return path


# --- decode -------------------------------------------------------------------------------------------------------

BPE = Tokenizer(PIECES)
CHAR = Tokenizer(CHARS)


@pytest.mark.parametrize(
    ("tokenizer", "symbols", "text"),
    [
        (BPE, ["▁the", "▁cat", "s"], "the cats"),
        (BPE, ["s", "▁the"], "s the"),
        (BPE, ["<sos/eos>", "<blank>", "▁the", "<sos/eos>"], "the"),
        (BPE, ["▁the", "<unk>", "▁cat"], "the<unk> cat"),
        (BPE, ["▁", "t", "h", "e", "▁", "▁cat", "▁"], "the cat"),
        (BPE, ["你", "好", "▁hello", "你"], "你好 hello 你"),
        (BPE, ["▁cat", "'", "s", "你", "s"], "cat's 你s"),
        (BPE, ["▁", "你", "好"], "你好"),
        (BPE, [], ""),
        (BPE, ["<blank>", "▁"], ""),
        (CHAR, ["你", "好"], "你好"),
        (CHAR, ["h", "i", "▁", "h", "i"], "hi hi"),
        (CHAR, ["你", "h", "i", "好"], "你hi好"),
        (CHAR, ["你", "▁", "h", "i", "好", "，"], "你 hi 好，"),
        (CHAR, ["你", "▁", "好"], "你 好"),
    ],
)
def test_decode(tokenizer, symbols, text):
    assert tokenizer.decode(ids(tokenizer, *symbols)) == text
    assert tokenizer.decode(np.array(ids(tokenizer, *symbols), np.int64)) == text


def test_decode_of_other_spaces():
    assert Tokenizer(["<blank>", "<space>", "a", "b", "<eos>"]).decode([2, 1, 3, 1]) == "a b"
    assert Tokenizer(["<blank>", "the▁", "of▁the", "x", "<eos>"]).decode([1, 3, 1, 2]) == "the xthe of the"


def test_specials_are_dropped_by_id_and_by_name():
    assert Tokenizer(["<blank>", "a", "b"]).decode([1, 2]) == "a"  # without names the last one ends sentences
    wenet = Tokenizer(["<blank>", "<unk>", "<sos/eos>", "一", "万"], sos=2, eos=2)
    assert wenet.decode([2, 3, 4, 2]) == "一万"
    assert (wenet.sos, wenet.eos, wenet.unk, len(wenet)) == (2, 2, 1, 5)


def test_defaults_of_sentence_ends():
    assert (CHAR.sos, CHAR.eos) == (8, 8)
    named = Tokenizer(["<blank>", "<sos>", "<eos>", "a"])
    assert (named.sos, named.eos) == (1, 2)
    assert Tokenizer(["<blank>", "<sos/eos>", "a"]).eos == 1


@pytest.mark.parametrize("bad", [16, -1, 10**9])
def test_decode_refuses_ids_outside_the_vocabulary(bad):
    with pytest.raises(ModelError, match="0 to 15"):
        BPE.decode([2, bad])


# --- words --------------------------------------------------------------------------------------------------------


def test_word_spans_of_pieces():
    tokens = ids(BPE, "<sos/eos>", "▁the", "<blank>", "▁cat", "s", "▁", "你", "好", "t", "h", "▁hello")
    assert BPE.word_spans(tokens) == [
        ("the", 1, 2),
        ("cats", 3, 5),
        ("你", 6, 7),
        ("好", 7, 8),
        ("th", 8, 10),
        ("hello", 10, 11),
    ]


def test_word_spans_of_characters():
    tokens = ids(CHAR, "▁", "h", "i", "▁", "h", "你", "<unk>", "i")
    assert CHAR.word_spans(tokens) == [("hi", 1, 3), ("h", 4, 5), ("你", 5, 6), ("<unk>i", 6, 8)]
    assert CHAR.word_spans([]) == []


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=20))
def test_words_are_the_text_and_never_overlap(tokens):
    spans = BPE.word_spans(tokens)
    assert "".join(span.word for span in spans).replace(" ", "") == BPE.decode(tokens).replace(" ", "")
    assert all(0 <= span.start < span.end <= len(tokens) for span in spans)
    assert all(left.end <= right.start for left, right in zip(spans, spans[1:], strict=False))
    text = BPE.decode(tokens)
    assert text == text.strip() and "  " not in text and "▁" not in text


# --- encode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("the cats", ["▁the", "▁cat", "s"]),
        ("  the\tthe ", ["▁the", "▁the"]),
        ("The CAT", ["▁the", "▁cat"]),
        ("chat", ["▁c", "h", "a", "t"]),
        ("that", ["▁", "t", "h", "a", "t"]),
        ("the你好hello", ["▁the", "你", "好", "▁hello"]),
        ("cat's", ["▁cat", "'", "s"]),
        ("caz", ["▁c", "a", "<unk>"]),
        ("", []),
        ("<blank>", ["▁"] + ["<unk>"] * 3 + ["a"] + ["<unk>"] * 3),
    ],
)
def test_encode_pieces(text, symbols):
    assert BPE.encode(text) == ids(BPE, *symbols)


def test_encode_prefers_few_pieces_over_a_greedy_start():
    tokenizer = Tokenizer(["<blank>", "<unk>", "▁abc", "▁ab", "cde", "d", "e", "<sos/eos>"])
    assert tokenizer.encode("abcde") == ids(tokenizer, "▁ab", "cde")
    dead_end = Tokenizer(["<blank>", "<unk>", "▁abc", "▁ab", "cd", "<sos/eos>"])
    assert dead_end.encode("abcd") == ids(dead_end, "▁ab", "cd")


def test_encode_never_drops_a_word_start_for_a_shorter_cut():
    tokenizer = Tokenizer(["<blank>", "<unk>", "hello", "▁hell", "o", "<sos/eos>"])
    assert tokenizer.encode("hello") == ids(tokenizer, "▁hell", "o")
    assert tokenizer.encode("ohello") == ids(tokenizer, "o", "hello")


def test_encode_characters():
    assert CHAR.encode("你好 hi") == ids(CHAR, "你", "好", "▁", "h", "i")
    assert CHAR.encode("你x") == ids(CHAR, "你", "<unk>")
    assert Tokenizer(["<blank>", "A", "B", "<eos>"]).encode("a b") == [1, 2]
    with pytest.raises(ModelError, match="'z'"):
        Tokenizer(["<blank>", "a", "<eos>"]).encode("az")


@given(st.lists(st.sampled_from(["the", "cats", "that", "hello", "eat's"]), max_size=5))
def test_encode_then_decode(words):
    assert BPE.decode(BPE.encode(" ".join(words))) == " ".join(words)


# --- units.txt ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_read(tmp_path, newline):
    symbols = ["<blank>", "<unk>", "▁", "é", "\u3000", "\u2028", "1", "𠮷", "<sos/eos>"]
    lines = [f"{symbol} {i}" for i, symbol in enumerate(symbols)]
    lines[3], lines[5] = lines[5], lines[3].replace(" ", "\t")
    tokenizer = Tokenizer.read(write(tmp_path / "units.txt", [*lines, ""], newline))
    assert tokenizer.symbols == symbols
    (tmp_path / "again.txt").write_text(tokenizer.to_text(), encoding="utf-8", newline="\n")
    assert Tokenizer.read(tmp_path / "again.txt").symbols == symbols


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["<blank> 0", "a 1", "b 1"], "line 3: id 1 was given in line 2"),
        (["<blank> 0", "a 1", "b 5"], "line 3: id 5 among 3 symbols, while id 2 is missing"),
        (["<blank> 1", "a 2"], "line 2: id 2 among 2 symbols, while id 0 is missing"),
        (["<blank> 0", "a"], "line 2: found 'a'"),
        (["<blank> 0", " 1"], "line 2"),
        (["<blank> 0", "a -1"], "line 2"),
        (["<blank> 0", "a 1.0"], "line 2"),
        (["<blank> 0", "a 99999999999999999999"], "line 2"),
        ([""], "empty"),
    ],
)
def test_read_refuses(tmp_path, lines, message):
    with pytest.raises(ModelError, match=message):
        Tokenizer.read(write(tmp_path / "units.txt", lines))


def test_read_refuses_other_files(tmp_path):
    with pytest.raises(ModelError, match="No such file"):
        Tokenizer.read(tmp_path / "none.txt")
    (tmp_path / "gbk.txt").write_bytes("<blank> 0\n你 1".encode("gbk"))
    with pytest.raises(ModelError, match="UTF-8"):
        Tokenizer.read(tmp_path / "gbk.txt")
    with pytest.raises(ModelError, match="eos is 7"):
        Tokenizer.read(write(tmp_path / "units.txt", ["<blank> 0", "a 1"]), eos=7)


def test_pieces_in_merge_order_are_merged_as_sentencepiece_does():
    """The first ids are merges in their order, letters follow, as SentencePiece writes a BPE vocabulary."""
    letters = ["▁", "h", "e", "r", "t", "<sos/eos>"]

    def cut(word, *merges):
        tokenizer = Tokenizer(["<blank>", "<unk>", *merges, *letters])
        return " ".join(tokenizer.symbols[i] for i in tokenizer.encode(word))

    merges = "he", "er", "▁h", "re", "▁he"
    cuts = {"her": "▁he r", "here": "▁he re", "ere": "▁ er e", "hher": "▁h he r", "x": "▁ <unk>"}
    assert {word: cut(word, *merges) for word in cuts} == cuts
    assert cut("her", *merges[:4]) == "▁ he r"
    # "▁there" is no two pieces before it: the order says nothing, so the fewest pieces.
    assert cut("her", "▁there", *merges[:4]) == "▁h er"
