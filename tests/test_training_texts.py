"""Texts for training: cut from what packages hold, each once, none that a test is about."""

import gzip
import json
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("yaml")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import data, texts  # noqa: E402


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "It rained\nall day. Mr. Ho  left; why?", ["it rained all day", "mister ho left"]),
        ("a.txt", "In 1999 we met. NATO grew. A.b is odd, etc. yes.", []),
        ("a.jsonl", json.dumps({"text": "Fear not, \u2018little\u2019 one."}) + "\n", ["fear not little one"]),
        ("a.jsonl", '{"text": "whole line"}\n{"text": "half a li', ["whole line"]),
        (
            "a.imp",
            "$$$Genesis 1:1\n<w>In</w> the <note>not <i>this</i></note> beginning.\n$$$Genesis 1:2\nThe LORD spoke.",
            ["in the beginning", "the lord spoke"],
        ),
        ("a.page", "<p>Press <key>Esc</key> to leave.</p><code>never this</code>", ["press esc to leave"]),
        ("a.html", '<div class="para">One &amp; two went.</div><p class="x">They came.</p>', ["they came"]),
        ("a.yml", "conversations:\n- - How are you?\n  - I am fine\n", ["how are you", "i am fine"]),
        ("data.noun", 'x | a small cup (of tea); other; "he drank it"\n', ["he drank it", "a small cup"]),
    ],
)
def test_each_kind_of_file(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, encoding="utf-8")
    collection = texts.Collection([], [], set(), 0)
    found = [line for file in texts.files(tmp_path) for x in texts.passages(file) for line in collection.take(x)]
    assert found == expected


def test_nothing_of_the_tests_and_nothing_twice(tmp_path):
    (tmp_path / "heard.jsonl").write_text(json.dumps({"text": "we walked along the river bank"}) + "\n")
    with gzip.open(tmp_path / "spoken.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "said before"}) + "\n")
    collection = texts.Collection(
        [tmp_path / "spoken.jsonl.gz"], [tmp_path / "heard.jsonl"], {"we", "walked", "home"}, 1
    )
    passage = (
        "We walked along the river! Said before. We walked home. We walked home. We zig zag. We zig. Along the river."
    )
    assert list(collection.take(passage)) == ["we walked home", "we zig"]


def test_long_sentences_are_cut_in_equal_parts():
    parts = texts.cut([str(i) for i in range(64)])
    assert [len(part) for part in parts] == [22, 22, 20] and sum(parts, []) == [str(i) for i in range(64)]
    assert texts.cut(["a"] * texts.LONGEST) == [["a"] * texts.LONGEST]


def test_shards_and_utterances_of_one_name_are_refused(tmp_path):
    def folder(name: str, shard: str, utterance: str, text: str) -> Path:
        (tmp_path / name).mkdir()
        with zipfile.ZipFile(tmp_path / name / shard, "w"):
            pass
        with gzip.open(tmp_path / name / "lines.jsonl.gz", "wt") as file:
            file.write(json.dumps({"id": utterance, "shard": shard, "text": text, "seconds": 1.0}) + "\n")
        return tmp_path / name

    a, b = folder("a", "a.zip", "u1", "one"), folder("b", "b.zip", "u2", "two")
    assert [line["path"] for line in data.read_manifest([a, b])] == [a / "a.zip", b / "b.zip"]
    with pytest.raises(SystemExit, match=r"c/a\.zip has the name of .*a/a\.zip"):
        data.read_manifest([a, folder("c", "a.zip", "u3", "three")])
    with pytest.raises(SystemExit, match="u1 stands for another utterance"):
        data.read_manifest([a, folder("d", "d.zip", "u1", "four")])
    (b / "copy.jsonl.gz").write_bytes((b / "lines.jsonl.gz").read_bytes())
    assert len(data.read_manifest([a, b])) == 2
