"""Error rates against brute force, lists of every kind, runs that are interrupted, and the report."""

from __future__ import annotations

import json
import zipfile
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import m3asr
from m3asr.audio import load_audio
from m3asr.decode import DecodeOptions
from m3asr.errors import AudioError, M3asrError
from m3asr.evaluate import Result, ResultsFile, differences, summary, transcribe_utterances, worst
from m3asr.manifest import Utterance, read_manifest
from m3asr.segment import SegmentOptions
from m3asr.wer import Errors, confidence_interval, count_errors, marked, words

EXAMPLES = Path(__file__).parent.parent / "examples"
CLIPS = {"goforward": "go forward ten meters", "librivox-0880": "he was not an ill disposed young man"}


# Counting


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("And so, my FELLOW Americans: ask not!", "and so my fellow americans ask not"),
        ("Don\u2019t 'quote' the dogs' o\u2018clock", "don't quote the dogs o'clock"),
        ("ill-disposed\tman\u2014well...no", "ill disposed man well no"),
        ("\uff21\uff22\uff43 caf\u00e9 CAFE\u0301", "abc caf\u00e9 caf\u00e9"),
        ("我用python写ABC。", "我 用 python 写 abc"),
        ("' -- ?!", ""),
    ],
)
def test_normalised_words(text, expected):
    assert words(text) == expected.split()
    assert words(" ".join(words(text))) == words(text)


def distance(a, b):
    @lru_cache(None)
    def d(i, j):
        if not i or not j:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return d(len(a), len(b))


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abcd"), max_size=8))
def test_errors_are_the_fewest(reference, hypothesis):
    errors = count_errors(reference, hypothesis)
    assert errors.total == distance(tuple(reference), tuple(hypothesis))
    assert errors.reference == len(reference)
    assert len(reference) - errors.deletions + errors.insertions == len(hypothesis)
    said, heard = marked(reference, hypothesis)
    assert said.replace("[", "").replace("]", "").split() == reference
    assert heard.replace("[", "").replace("]", "").split() == hypothesis
    assert ("[" in said + heard) == bool(errors.total)


def test_rates():
    assert count_errors("the cat sat".split(), "the hat sat down".split()) == Errors(1, 0, 1, 3)
    assert Errors(1, 0, 1, 3).rate == pytest.approx(2 / 3)
    assert Errors(insertions=3).rate is None
    assert sum([Errors(1, 2, 3, 4), Errors(1, 1, 1, 1)], Errors()) == Errors(2, 3, 4, 5)


def test_intervals():
    random = np.random.default_rng(0)
    lengths = np.full(400, 10)
    errors = random.binomial(10, 0.2, 400)
    low, high = confidence_interval(errors, lengths)
    mean = errors.sum() / lengths.sum()
    width = 2 * 1.96 * errors.std() / 20 / 10  # of a mean of 400
    assert low < mean < high and (high - low) == pytest.approx(width, rel=0.15)
    # Speakers who differ make it wider than their utterances do, and one speaker says nothing.
    speakers = np.repeat(np.arange(8), 50)
    errors = random.binomial(10, 0.05 + 0.05 * speakers)
    by_utterance, by_speaker = confidence_interval(errors, lengths), confidence_interval(errors, lengths, speakers)
    assert by_speaker[1] - by_speaker[0] > 2 * (by_utterance[1] - by_utterance[0])
    assert confidence_interval(errors, lengths, ["a"] * 400) is None
    assert confidence_interval([1], [4]) is None and confidence_interval([1, 1], [0, 0]) is None
    assert confidence_interval(errors, lengths) == confidence_interval(errors, lengths)


# Lists


def write_lines(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture
def audio(tmp_path):
    for name in CLIPS:
        (tmp_path / f"{name}.flac").write_bytes((EXAMPLES / f"{name}.flac").read_bytes())
    return tmp_path


def test_lists_of_every_kind_say_the_same(audio):
    path = {name: audio / f"{name}.flac" for name in CLIPS}
    by_id = write_lines(audio / "a.jsonl", *({"id": k, "text": t, "speaker": k[0]} for k, t in CLIPS.items()))
    by_path = write_lines(
        audio / "b.jsonl", "", *({"audio_filepath": f"{k}.flac", "id": k, "text": t} for k, t in CLIPS.items())
    )
    wenet = write_lines(audio / "data.list", *({"key": k, "wav": str(path[k]), "txt": t} for k, t in CLIPS.items()))
    kaldi = audio / "kaldi"
    kaldi.mkdir()
    write_lines(kaldi / "wav.scp", *(f"{k} ../{k}.flac" for k in CLIPS))
    write_lines(kaldi / "text", *(f"{k} {t}" for k, t in CLIPS.items()))
    write_lines(kaldi / "utt2spk", *(f"{k} {k[0]}" for k in CLIPS))
    tabs = audio / "tabs"
    tabs.mkdir()
    write_lines(tabs / "wav.scp", *(f"{k}\t../{k}.flac" for k in CLIPS))
    write_lines(tabs / "text", *(f"{k}\t{t}" for k, t in CLIPS.items()))
    lists = [read_manifest(p) for p in (by_id, by_path, wenet, kaldi, kaldi / "wav.scp", tabs)]
    for utterances in lists:
        assert [(u.key, u.text) for u in utterances] == list(CLIPS.items())
        assert [u.path.resolve() for u in utterances] == [p.resolve() for p in path.values()]
    assert [u.speaker for u in lists[0]] == [u.speaker for u in lists[3]] == ["g", "l"]


def test_members_of_a_zip(audio):
    with zipfile.ZipFile(audio / "some.zip", "w") as archive:
        for name in ("inside/000001.flac", "a/3.flac", "b/3.flac"):
            archive.write(audio / "goforward.flac", name)
    entries = ({"id": name, "shard": "some.zip", "text": "x"} for name in ("000001", "2", "3"))
    one, missing, twice = read_manifest(write_lines(audio / "list.jsonl", *entries))
    assert one.audio() == (audio / "goforward.flac").read_bytes()
    with pytest.raises(AudioError, match="no member 2"):
        missing.audio()
    with pytest.raises(AudioError, match="2 members 3"):
        twice.audio()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"id": "a", "text": "x"', "line 2"),
        ("[1]", "line 2: found a list"),
        ('{"id": "a"}', "expected text"),
        ('{"text": "a"}', "audio or id"),
        ("/data/shards_000.tar", "shards"),
        ('{"id": "ok", "audio": "other.wav", "text": "x"}', "line 2: found 'ok' again"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, line, found):
    path = write_lines(tmp_path / "list.jsonl", '{"id": "ok", "text": "x"}', line)
    with pytest.raises(M3asrError, match=found):
        read_manifest(path)


def test_a_name_too_long_is_a_recording_that_is_missing(tmp_path):
    entries = [{"audio": "x" * 5000, "text": "x"}, {"id": "y" * 5000, "text": "x"}]
    for utterance in read_manifest(write_lines(tmp_path / "list.jsonl", *entries)):
        with pytest.raises(AudioError, match="cannot be opened: File name too long.$"):
            load_audio(utterance.audio())


def test_kaldi_folders_that_do_not_fit(tmp_path):
    with pytest.raises(M3asrError, match="neither wav.scp"):
        read_manifest(tmp_path)
    write_lines(tmp_path / "wav.scp", "a a.wav", "b b.wav")
    with pytest.raises(M3asrError, match="text cannot be read"):
        read_manifest(tmp_path)
    write_lines(tmp_path / "text", "a x")
    with pytest.raises(M3asrError, match="1 recordings have no line in text, the first is b"):
        read_manifest(tmp_path)
    write_lines(tmp_path / "segments", "a a 0 1")
    with pytest.raises(M3asrError, match="segments"):
        read_manifest(tmp_path)


# Running


@pytest.fixture(scope="module")
def model(golden_folders):
    return golden_folders["3m-moe-80"]


def test_results_are_picked_up_again(model, tmp_path):
    transcriber = m3asr.load(model, threads=1)
    utterances = [Utterance(name, EXAMPLES / f"{name}.flac", text) for name, text in CLIPS.items()]
    options, segmentation = DecodeOptions("greedy"), SegmentOptions()

    def go(path):
        kept, new = ResultsFile(path), []
        run = kept.begin({"decoder": "greedy"})

        def done(result):
            new.append(result.utterance.key)
            kept.add(run, "list", result)

        results = transcribe_utterances(
            transcriber,
            utterances,
            options,
            segmentation,
            found=lambda utterance: kept.find(run, "list", utterance),
            failed=lambda utterance, error: pytest.fail(str(error)),
            done=done,
        )
        kept.close()
        return new, results

    path = tmp_path / "results.jsonl"
    first, whole = go(path)
    assert first == list(CLIPS) and go(path) == ([], whole)
    # A crash in the middle of the last line.
    path.write_bytes(path.read_bytes()[:-30])
    again, results = go(path)
    assert again == ["librivox-0880"]
    assert [result.hypothesis for result in results] == [result.hypothesis for result in whole]
    assert go(path)[0] == []
    # A line whose numbers are none.
    path.write_text(path.read_text("utf-8").replace('"took": ', '"took": null, "was": '), "utf-8")
    assert go(path)[0] == list(CLIPS) and go(path)[0] == []
    # Results of other settings do not count.
    kept = ResultsFile(path)
    other = kept.begin({"decoder": "beam"})
    assert kept.find(other, "list", utterances[0]) is None
    assert kept.find(kept.begin({"decoder": "greedy"}), "other list", utterances[0]) is None
    kept.close()


def test_only_a_file_of_results_is_gone_on_with(tmp_path):
    """Anything else, the list itself for example, would be spoilt by what is added."""
    for content in (b'{"audio": "a.wav", "text": "a"}\n', b"fLaC\0\0", b"\n"):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(M3asrError, match="holds no results"):
            ResultsFile(tmp_path / "other")
        assert (tmp_path / "other").read_bytes() == content
    # The crash came in the first line; the others lack what was heard, which is not found then.
    lines = '{"run": "1", "sett\n{"run": "1", "manifest": "list", "key": "a", "seconds": 1, "took": 1}\n'
    (tmp_path / "cut").write_text(lines + lines[20:-2] + ', "hypothesis": null}\n' + "[" * 100_000)
    kept = ResultsFile(tmp_path / "cut")
    assert kept.find("1", "list", Utterance("a", Path("a"), "a")) is None
    kept.close()


def made(*pairs):
    """Results of (said, heard), by two speakers in turn."""
    utterances = [Utterance(str(i), Path(str(i)), said, "ab"[i % 2]) for i, (said, _) in enumerate(pairs)]
    return [Result(utterance, heard, 2.0, 0.5) for utterance, (_, heard) in zip(utterances, pairs, strict=True)]


def test_summary_worst_and_differences():
    results = made(("a b c d", "A, b x d"), ("one two", "one two"), ("", "um"), ("yes", ""))
    report = summary(results)
    assert report["words"] == 7 and report["wer"] == pytest.approx(3 / 7)
    assert (report["substitutions"], report["deletions"], report["insertions"]) == (1, 1, 1)
    assert report["cer"] == pytest.approx((1 + 2 + 3) / (4 + 6 + 3)) and report["rtfx"] == 4.0
    assert report["speakers"] == 2 and report["wer_interval_by_speaker"] is not None
    assert [result.utterance.key for result, _ in worst(results, 10)] == ["2", "3", "0"]
    assert len(worst(results, 1)) == 1
    other = made(("a b c d", "a b x d"), ("one two", "one two"), ("", "um"), ("yes", ""))
    assert [a.utterance.key for a, _ in differences(results, other)] == ["0"]
    assert summary([])["wer"] is None and summary([])["rtfx"] is None


@pytest.fixture
def evaluate(m3):
    return partial(m3, "evaluate")


def test_the_report(evaluate, model, audio):
    path = write_lines(audio / "list.jsonl", *({"id": k, "text": t.upper() + "."} for k, t in CLIPS.items()))
    engines = "-e", "onnx", "-e", "eager", "--decoder", "greedy", "--decoder", "beam"
    code, out, err = evaluate("-m", model, path, *engines)
    assert code == 0
    report = json.loads(out.splitlines()[-1])
    rows = [(run["engine"], run["decode"]["decoder"]) for run in report["runs"]]
    assert rows == [("onnx", "greedy"), ("onnx", "beam"), ("eager", "greedy"), ("eager", "beam")]
    transcriber = m3asr.load(model, threads=1)
    for run in report["runs"]:
        texts = [
            transcriber.transcribe(audio / f"{k}.flac", options=DecodeOptions(run["decode"]["decoder"])).text
            for k in CLIPS
        ]
        expected = sum(
            (count_errors(t.split(), words(h)) for t, h in zip(CLIPS.values(), texts, strict=True)), Errors()
        )
        assert run["words"] == 12 and run["wer"] == pytest.approx(expected.rate)
        assert run["rtfx"] > 0 and run["unreadable"] == 0
    assert [(d["engines"], d["different"]) for d in report["differences"]] == [(["onnx", "eager"], 0)] * 2
    assert report["versions"]["numpy"] == np.__version__ and report["cores"] >= 1 and report["cpu"]
    assert "onnx on cpu" in out and "worst utterances" in out and "goforward" in out
    # The model as the first argument is the same thing.
    code, out, _ = evaluate(model, path, "--decoder", "greedy", "-q")
    assert code == 0 and json.loads(out.splitlines()[-1])["runs"][0]["wer"] == report["runs"][0]["wer"]


def test_recordings_that_cannot_be_read_are_counted(evaluate, model, audio):
    (audio / "empty.wav").touch()
    entries = [{"id": k, "text": t} for k, t in CLIPS.items()]
    entries[1:1] = [{"audio": "missing.wav", "text": "x"}, {"audio": "empty.wav", "text": "y"}]
    path = write_lines(audio / "list.jsonl", *entries)
    results = audio / "results.jsonl"
    for _ in range(2):
        code, out, err = evaluate(
            "-m", model, path, "-q", "--decoder", "greedy", "--decoder", "beam", "--results", results
        )
        report = json.loads(out.splitlines()[-1])
        assert code == 2 and len(err.splitlines()) == 2
        assert err.count("missing.wav") == err.count("empty.wav") == 1 and "no such file" in err and "0 bytes" in err
        assert [(run["utterances"], run["unreadable"], run["words"]) for run in report["runs"]] == [(2, 2, 12)] * 2
    assert len(results.read_text().splitlines()) == 2 * (1 + 2)


def test_lists_that_cannot_be_used(evaluate, model, tmp_path):
    empty = write_lines(tmp_path / "empty.jsonl", "")
    for path, found in ((empty, "no recordings"), (tmp_path / "missing.jsonl", "cannot be read")):
        code, out, err = evaluate("-m", model, path)
        assert code == 2 and out == "" and found in err and len(err.splitlines()) == 1
    code, _, err = evaluate("-m", model, write_lines(tmp_path / "a.jsonl", {"id": "a", "text": "b"}), "-q")
    assert code == 2 and "a.flac: no such file" in err and not err.startswith("m3asr: a: ")
    entry = {"id": "first", "audio": "a.flac", "text": "b"}
    code, _, err = evaluate("-m", model, write_lines(tmp_path / "a.jsonl", entry), "-q")
    assert code == 2 and err.startswith("m3asr: first: ") and "a.flac: no such file" in err
