"""Every output format, read back by an independent few lines where the format allows."""

import html
import json
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3asr.decode import Word
from m3asr.errors import M3asrError
from m3asr.files import need_place, whole_file
from m3asr.formats import CUE_CHARS, CUE_SECONDS, FORMATS, LINE_CHARS, Segment, Transcript, cues, formatted, write


def segment(text, start=0.0, seconds_per_word=0.4, **fields):
    """A segment whose words are the text's, one after the other."""
    words, at = [], start
    for word in text.split():
        words.append(Word(word, at, at + seconds_per_word, 0.5))
        at += seconds_per_word
    return Segment(text, start, max(at, start), words, **fields)


def transcript(*segments, name="call 1.wav", duration=10.0):
    return Transcript(" ".join(s.text for s in segments), list(segments), duration, name)


def render(transcripts, name):
    return "".join(formatted(transcripts, name))


def read_subtitles(text, point):
    """[(start, end, lines)] in seconds."""
    found = []
    clock = rf"(\d\d+):(\d\d):(\d\d){re.escape(point)}(\d\d\d)"
    for block in text.strip().split("\n\n"):
        lines = block.split("\n")
        at = next((i for i, line in enumerate(lines) if "-->" in line), None)
        if at is None:
            continue
        parts = [int(x) for x in re.fullmatch(f"{clock} --> {clock}", lines[at]).groups()]
        start, end = (h * 3600 + m * 60 + s + ms / 1000 for h, m, s, ms in (parts[:4], parts[4:]))
        found.append((start, end, lines[at + 1 :]))
    return found


def test_text_and_kaldi_are_a_line_a_recording():
    transcripts = [transcript(segment("hello  there")), transcript(name="b"), transcript(segment("你好"), name="c d")]
    assert render(transcripts, "text") == "hello there\n\n你好\n"
    assert render(transcripts, "kaldi") == "call_1.wav hello there\nb\nc_d 你好\n"


def test_json_of_one_and_of_several():
    one = transcript(segment("hello 你", score=-3.25, tokens=[4, 5], confidence=0.123456789))
    document = json.loads(render(one, "json"))
    assert document["text"] == "hello 你" and document["name"] == "call 1.wav" and document["duration"] == 10.0
    assert document["segments"][0]["words"][1] == {"text": "你", "start": 0.4, "end": 0.8, "confidence": 0.5}
    assert document["segments"][0]["tokens"] == [4, 5]
    assert document["segments"][0]["confidence"] == 0.123457
    assert "你" in render(one, "json")
    assert [d["name"] for d in json.loads(render([one, transcript(name="b")], "json"))] == ["call 1.wav", "b"]
    assert json.loads(render([], "json")) == []
    lines = render([one, transcript(name="b")], "jsonl").splitlines()
    assert [json.loads(line) for line in lines] == json.loads(render([one, transcript(name="b")], "json"))


def test_numbers_that_json_does_not_know_become_null():
    text = render(transcript(segment("a", score=float("-inf"), confidence=float("nan"))), "jsonl")
    document = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert document["segments"][0]["score"] is None and document["segments"][0]["confidence"] is None


def test_srt_and_vtt_as_a_player_reads_them():
    long = transcript(segment("one two", 0.5), segment("three", 3599.9996), duration=3700.0)
    expected = "1\n00:00:00,500 --> 00:00:01,300\none two\n\n2\n01:00:00,000 --> 01:00:00,400\nthree\n\n"
    assert render(long, "srt") == expected
    vtt = render(long, "vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:00.500 --> 00:00:01.300\none two\n")
    assert [cue[:2] for cue in read_subtitles(vtt, ".")] == [cue[:2] for cue in read_subtitles(expected, ",")]
    two = [transcript(segment("a", 1.0)), transcript(segment("b", 2.0))]
    assert [cue[0] for cue in read_subtitles(render(two, "srt"), ",")] == [1.0, 12.0]
    assert render([], "srt") == "" and render([], "vtt") == "WEBVTT\n\n"


def test_markup_in_the_text_stays_text():
    odd = transcript(segment("<unk> & a --> b"))
    (cue,) = read_subtitles(render(odd, "vtt"), ".")
    assert html.unescape(cue[2][0]) == "<unk> & a --> b" and "<" not in cue[2][0]
    assert read_subtitles(render(odd, "srt"), ",")[0][2] == ["<unk> & a -> b"]


def test_ctm_has_a_line_a_word():
    assert render(transcript(segment("a b", 1.0)), "ctm") == (
        "call_1.wav 1 1.000 0.400 a 0.500\ncall_1.wav 1 1.400 0.400 b 0.500\n"
    )
    without_words = Transcript("new york", [Segment("new york", 1.0, 2.0), Segment("", 3.0, 4.0)], 5.0, "x")
    assert render(without_words, "ctm") == "x 1 1.000 1.000 new_york\n"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("abcXYZ,.'你好", min_size=1, max_size=12), max_size=60),
    st.sampled_from(["", " "]),
    st.floats(0.05, 3.0),
)
def test_cues_hold_every_word_in_order_and_are_short(words, between, seconds_per_word):
    text = between.join(words)
    timed = [Word(w, i * seconds_per_word, (i + 1) * seconds_per_word) for i, w in enumerate(words)]
    found = list(cues(Segment(text, 0.0, len(words) * seconds_per_word, timed)))
    assert "".join(cue[2] for cue in found).replace(" ", "") == text.replace(" ", "")
    edges = [edge for start, end, _ in found for edge in (start, end)]
    assert edges == sorted(edges)
    for start, end, cue in found:
        assert len(cue) <= CUE_CHARS and end - start <= CUE_SECONDS + 1e-6
        shown = render(Transcript(cue, [Segment(cue, start, end)], end), "srt").split("\n")[2:-2]
        assert len(shown) <= 2 and "".join(shown).replace(" ", "") == cue.replace(" ", "")
        if "" not in (between, cue) and all(len(w) <= 12 for w in words):
            assert max(map(len, shown)) <= LINE_CHARS + 13


def test_a_pause_ends_a_cue_and_punctuation_stays_with_its_word():
    words = [Word("Yes", 0.0, 0.3), Word("no", 0.3, 0.5), Word("maybe", 2.0, 2.4)]
    found = list(cues(Segment("Yes, no... maybe!", 0.0, 2.4, words)))
    assert found == [(0.0, 0.5, "Yes, no..."), (2.0, 2.4, "maybe!")]


def test_a_segment_without_usable_words_stays_whole():
    assert list(cues(Segment("Twenty one", 1.0, 2.0))) == [(1.0, 2.0, "Twenty one")]
    assert list(cues(Segment("21", 1.0, 2.0, [Word("twenty", 1.0, 1.5)]))) == [(1.0, 2.0, "21")]
    assert list(cues(Segment(" ", 1.0, 2.0))) == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_recording_of_silence_is_written(name, tmp_path):
    path = tmp_path / "out"
    write(Transcript("", [], 3.0, "quiet"), name, path)
    assert path.read_text(encoding="utf-8") == render(Transcript("", [], 3.0, "quiet"), name)
    assert os.listdir(tmp_path) == ["out"]


def test_streaming_formats_do_not_wait_for_the_last_transcript():
    def endless():
        while True:
            yield transcript(segment("word"))

    for name in set(FORMATS) - {"json"}:
        pieces = formatted(endless(), name)
        assert "word" in next(pieces) + next(pieces)


def test_nothing_is_left_half_written(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")

    def breaks():
        yield transcript(segment("new"))
        raise RuntimeError("engine failed")

    with pytest.raises(RuntimeError):
        write(breaks(), "text", path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.txt"]
    for place in (tmp_path / "missing" / "out.txt", path / "out.txt"):
        with pytest.raises(M3asrError, match="out.txt cannot be written: No(t a directory| such file)"):
            write(transcript(), "text", place)
    with pytest.raises(M3asrError, match="no output format 'doc'; choose one of text"):
        write(transcript(), "doc", path)
    assert path.read_text() == "old"


def test_names_that_no_file_can_have_are_refused_before_the_work(tmp_path):
    def unused():
        raise AssertionError("asked for a transcript")
        yield

    (tmp_path / "loop").symlink_to("loop")
    for path, found in (
        (tmp_path, "is a directory; expected the name of a file"),
        ("", "is a directory"),
        (tmp_path / ("x" * 250), "cannot be written: File name too long"),
        (tmp_path / ("x" * 5000), "cannot be written: File name too long"),
        (tmp_path / "loop", "cannot be written"),
        ("a\0b", "cannot be written"),
    ):
        with pytest.raises(M3asrError, match=found):
            write(unused(), "text", path)
        with pytest.raises(M3asrError, match=found):
            need_place(path)
    assert os.listdir(tmp_path) == ["loop"]


def test_pipes_devices_and_links_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "file").write_text("old")
    for link, target in (("link", "file"), ("to-nothing-yet", "new"), ("null", os.devnull)):
        (tmp_path / link).symlink_to(target)
    for name in ("pipe", "link", "to-nothing-yet"):
        need_place(tmp_path / name)
        write(transcript(segment("new")), "text", tmp_path / name)
    assert os.read(reader, 99) == b"new\n" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    assert (tmp_path / "file").read_text() == (tmp_path / "new").read_text() == "new\n"
    # These are looked at only: who may replace them must not try.
    for path in (tmp_path / "null", "/dev/null", "/dev/stdout", "/dev/fd/1"):
        with whole_file(path) as aside:
            assert str(aside) == str(path)
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "new", "null", "pipe", "to-nothing-yet"]
    assert all((tmp_path / link).is_symlink() for link in ("link", "to-nothing-yet", "null"))


def test_a_written_file_has_the_usual_rights(tmp_path):
    (tmp_path / "usual").write_text("")
    write(transcript(segment("a")), "text", tmp_path / "ours")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode
