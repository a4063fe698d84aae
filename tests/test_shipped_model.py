"""The model in the package on real recordings of people: what it is shipped for."""

import re
from pathlib import Path

import pytest

import m3asr
from m3asr.wer import count_errors, words

EXAMPLES = Path(__file__).parent.parent / "examples"
SAID = dict(re.findall(r"^\| (\S+\.flac) \| ([^|]+) \|", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.M))
WRONG = {"librivox-0880.flac": 1}  # "ill" becomes "old"


@pytest.fixture(scope="module", params=["onnx", "eager"])
def transcriber(request):
    return m3asr.load(engine=request.param)


def test_every_example_is_told():
    assert SAID.keys() == {path.name for path in EXAMPLES.glob("*.flac")}


@pytest.mark.parametrize("name", sorted(SAID))
def test_examples_are_recognised(transcriber, name):
    text = transcriber.transcribe(EXAMPLES / name).text
    errors = count_errors(words(SAID[name]), words(text))
    assert errors.total <= WRONG.get(name, 0), text
