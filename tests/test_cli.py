"""The real command: what goes to standard output, to standard error and to files, and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from typer.testing import CliRunner

import m3asr
from m3asr.audio import SAMPLE_RATE
from m3asr.cli import app
from m3asr.cli.console import seconds_of

EXAMPLES = Path(__file__).parent.parent / "examples"
ONE, TWO = str(EXAMPLES / "goforward.flac"), str(EXAMPLES / "librivox-0880.flac")


@pytest.fixture(scope="module")
def model(golden_folders):
    return str(golden_folders["3m-moe-80"])


@pytest.fixture(scope="module")
def texts(model):
    transcriber = m3asr.load(model, threads=1)
    return [transcriber.transcribe(path).text for path in (ONE, TWO)]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The beginning of the second recording, for what is not about recognition."""
    samples, rate = soundfile.read(TWO, frames=2 * SAMPLE_RATE)
    path = tmp_path_factory.mktemp("short") / "short.wav"
    soundfile.write(path, samples, rate)
    return path


@pytest.fixture
def bad(tmp_path):
    """Files that are no recordings: name -> path."""
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("hello there")
    soundfile.write(tmp_path / "nan.wav", np.full(9000, np.nan, np.float32), SAMPLE_RATE, "FLOAT")
    names = "empty.wav", "text.wav", "nan.wav", "missing.wav"
    return {name: str(tmp_path / name) for name in names}


def test_text_alone_on_standard_output(m3, model, texts):
    code, out, err = m3("transcribe", "-m", model, ONE, TWO)
    assert code == 0 and out == f"{texts[0]}\n{texts[1]}\n"
    assert err == "model 3m-moe-80, engine onnx on cpu\n"
    assert m3("transcribe", "-m", model, "-q", ONE)[1:] == (f"{texts[0]}\n", "")


def test_the_length_of_what_can_be_read_once_is_not_looked_for(tmp_path):
    """For the progress bar of a terminal; the recording would be gone."""
    os.mkfifo(tmp_path / "pipe")
    content = Path(ONE).read_bytes()[:20000]
    with open(tmp_path / "pipe", "r+b", buffering=0) as pipe:  # both ends, so that nothing waits
        pipe.write(content)
        assert seconds_of([str(tmp_path / "pipe")]) is None
        assert os.read(pipe.fileno(), len(content)) == content
    code = "from m3asr.cli.console import seconds_of; import sys; print(seconds_of('-'), len(sys.stdin.buffer.read()))"
    ended = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True)
    assert ended.stdout.split() == [b"None", str(len(content)).encode()]
    assert seconds_of([ONE, TWO]) == pytest.approx(sum(soundfile.info(path).duration for path in (ONE, TWO)))


def test_standard_input(m3, model, texts):
    code, out, _ = m3("transcribe", "-m", model, "-f", "jsonl", "-", stdin=Path(ONE).read_bytes())
    assert code == 0 and json.loads(out)["text"] == texts[0] and json.loads(out)["name"] == "stdin"


def test_a_real_process_whose_reader_goes_away(model, texts):
    command = [sys.executable, "-m", "m3asr", "transcribe", "-m", model, "-q", *[ONE, TWO] * 3]
    whole = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert whole.returncode == 0 and whole.stdout.splitlines() == texts * 3 and whole.stderr == ""
    piped = subprocess.run(["bash", "-c", '"$@" | head -1', "-", *command], capture_output=True, text=True)
    assert piped.stdout.splitlines() == texts[:1] and "Traceback" not in piped.stderr


@pytest.mark.parametrize(
    ("redirection", "code", "found"),
    [
        (">/dev/full", 2, "standard output cannot be used: No space left on device"),
        (">&-", 2, "standard output is closed"),
        ("- <&-", 2, "Standard input is closed"),
        ("2>&-", 0, ""),
    ],
)
def test_streams_that_are_closed_or_full(model, short, redirection, code, found):
    if redirection == ">/dev/full" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    recording = [] if redirection.startswith("-") else [short]
    command = [sys.executable, "-m", "m3asr", "transcribe", "-m", model, "-q", *map(str, recording)]
    ended = subprocess.run(["bash", "-c", f'"$@" {redirection}', "-", *command], capture_output=True, text=True)
    assert ended.returncode == code and bool(ended.stdout) == (code == 0)
    assert found in ended.stderr and len(ended.stderr.splitlines()) == (code != 0)


def test_what_is_written_when_the_process_is_ended_is_removed(model, tmp_path):
    """The recording is a pipe that nobody closes, so that the work does not end."""
    os.mkfifo(tmp_path / "endless.wav")
    command = [sys.executable, "-m", "m3asr", "transcribe", "-m", model, "-o", tmp_path / "out"]
    with subprocess.Popen([*command, tmp_path / "endless.wav"], stderr=subprocess.PIPE) as process:
        with open(tmp_path / "endless.wav", "wb"):  # waits for the reader
            assert [path.name for path in tmp_path.glob(".out*")]
            time.sleep(1)  # until it reads: Python hears of a signal just before a read when the read ends
            process.terminate()
            assert process.wait(60) == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["endless.wav"]


def test_text_that_standard_output_cannot_take(model, short, tmp_path):
    (tmp_path / "日本.wav").write_bytes(short.read_bytes())
    command = [sys.executable, "-m", "m3asr", "transcribe", "-m", model, "-q", "-f", "jsonl"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([*command, tmp_path / "日本.wav"], capture_output=True, text=True, env=environment)
    assert ended.returncode == 2 and ended.stdout == "" and len(ended.stderr.splitlines()) == 1
    assert "cannot be written as ascii" in ended.stderr and "PYTHONIOENCODING=utf-8" in ended.stderr


def test_a_name_that_is_no_utf8(m3, model, short, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    try:
        Path(os.fsdecode(name)).write_bytes(short.read_bytes())
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    code, _, _ = m3("transcribe", "-m", model, "-q", "-f", "jsonl", "-o", tmp_path / "out", os.fsdecode(name))
    assert code == 0 and json.loads((tmp_path / "out").read_text(encoding="utf-8"))["name"] == "caf\ufffd.wav"


@pytest.mark.parametrize("format", ["text", "kaldi", "json", "jsonl", "srt", "vtt", "ctm"])
def test_every_format_to_a_file_as_to_standard_output(m3, model, tmp_path, format, short):
    printed = m3("transcribe", "-m", model, "-f", format, ONE, short)
    assert printed[0] == 0 and printed[1]
    code, out, _ = m3("transcribe", "-m", model, "-f", format, ONE, short, "-o", tmp_path / "out")
    assert (code, out) == (0, "")
    assert (tmp_path / "out").read_text(encoding="utf-8") == printed[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_json_says_what_made_it_and_holds_the_nbest(m3, model, texts):
    code, out, _ = m3("transcribe", "-m", model, "-f", "json", "--nbest", "3", "--decoder", "beam", ONE)
    document = json.loads(out)
    assert code == 0
    made_by = {name: document[name] for name in ("model", "engine", "device", "decoder")}
    assert made_by == {"model": "3m-moe-80", "engine": "onnx", "device": "cpu", "decoder": "beam"}
    assert len(document["segments"][0]["nbest"]) == 3


def test_one_bad_recording_among_several(m3, model, texts, bad, tmp_path):
    code, out, err = m3("transcribe", "-m", model, "-q", ONE, *bad.values(), TWO)
    assert code == 2 and out == f"{texts[0]}\n{texts[1]}\n"
    lines = err.splitlines()
    assert len(lines) == 4 and "Traceback" not in err
    for line, found in zip(lines, ("0 bytes", "not audio", "NaN", "no such file"), strict=True):
        assert line.startswith("m3asr: ") and found in line
    code, out, _ = m3("transcribe", "-m", model, "-q", "-o", tmp_path / "out", ONE, bad["nan.wav"])
    assert code == 2 and (tmp_path / "out").read_text(encoding="utf-8") == f"{texts[0]}\n"


def test_nothing_is_written_when_nothing_could_be_read(m3, model, bad, tmp_path):
    for format in ("text", "json", "vtt"):
        code, out, err = m3("transcribe", "-m", model, "-q", "-f", format, "-o", tmp_path / "out", *bad.values())
        assert code == 2 and out == "" and len(err.splitlines()) == 4
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_recording_cut_short_is_used_and_told(m3, model, tmp_path):
    (tmp_path / "cut.flac").write_bytes(Path(ONE).read_bytes()[:30000])
    code, out, err = m3("transcribe", "-m", model, "-q", tmp_path / "cut.flac")
    assert code == 0 and out.strip() and len(err.splitlines()) == 1 and "cut short" in err


@pytest.mark.parametrize("command", ["transcribe", "transcribe-list", "inspect", "infer"])
def test_no_result_replaces_what_is_read(m3, model, short, tmp_path, command):
    """As a pattern of the shell makes it happen: -o *.wav."""
    recording, link = tmp_path / "a.wav", tmp_path / "link.wav"
    recording.write_bytes(short.read_bytes())
    link.symlink_to(recording)
    (tmp_path / "wav.scp").write_text(f"a {recording}\n")
    arguments = {
        "transcribe": ("transcribe", "-m", model, "-f", "srt", "-o", link, short, recording),
        "transcribe-list": ("transcribe", "-m", model, "--wav-scp", tmp_path / "wav.scp", "-o", tmp_path / "wav.scp"),
        "inspect": ("inspect", "-m", model, recording, "--json", link),
        "infer": ("infer", model, recording, "-o", recording),
    }
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = m3(*arguments[command])
    assert code == 2 and out == "" and "would replace it" in err and len(err.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before and link.is_symlink()


def test_wav_scp(m3, model, texts, tmp_path):
    (tmp_path / "near.flac").write_bytes(Path(TWO).read_bytes())
    (tmp_path / "wav.scp").write_text(f"utt-1 {ONE}\nutt-2\tnear.flac\n")
    code, out, _ = m3("transcribe", "-m", model, "--wav-scp", tmp_path / "wav.scp")
    assert code == 0 and out == f"utt-1 {texts[0]}\nutt-2 {texts[1]}\n"
    code, out, _ = m3("transcribe", "-m", model, "--wav-scp", tmp_path / "wav.scp", "-f", "jsonl")
    assert [json.loads(line)["name"] for line in out.splitlines()] == ["utt-1", "utt-2"]
    touched = tmp_path / "touched"
    for content, found in (
        (f"a touch {touched} |\n", "command"),
        ("a\n", "key path"),
        (f"a {ONE}\na {TWO}\n", "again"),
    ):
        (tmp_path / "bad.scp").write_text(content)
        code, out, err = m3("transcribe", "-m", model, "--wav-scp", tmp_path / "bad.scp")
        assert code == 2 and out == "" and found in err
    assert not touched.exists()


def test_two_files_of_one_name_are_called_by_their_paths(m3, model, short, tmp_path):
    paths = [tmp_path / folder / "a.wav" for folder in ("one", "two")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(Path(short).read_bytes())
    code, out, _ = m3("transcribe", "-m", model, "-q", "-f", "jsonl", *paths, short)
    assert code == 0
    assert [json.loads(line)["name"] for line in out.splitlines()] == [*map(str, paths), Path(short).name]


def test_hotwords_from_a_list_and_from_a_file(m3, model, tmp_path):
    transcriber = m3asr.load(model, threads=1)
    options = m3asr.DecodeOptions("beam", nbest=10)
    plain = transcriber.transcribe(ONE, options=options).segments[0]
    token = next(t for other in plain.nbest for t in other.tokens if t not in plain.tokens)
    symbol = transcriber.folder.tokenizer.symbols[token]
    (tmp_path / "names.txt").write_text(f"\ufeff{symbol}\n\n", encoding="utf-8")
    common = "transcribe", "-m", model, "-q", "--decoder", "beam", "--hotword-score", "20", ONE
    # The last is longer than a file's name, and than a path, may be.
    lists = symbol, f"{symbol} , {symbol}", tmp_path / "names.txt", ",".join([symbol] * 5000)
    outputs = [m3(*common, "--hotwords", words)[:2] for words in lists]
    assert outputs == outputs[:1] * 4 and outputs[0][0] == 0
    assert symbol in outputs[0][1] and symbol not in plain.text
    code, out, err = m3(*common, "--hotwords", tmp_path / "missing.txt")
    assert code == 2 and out == "" and "no such file" in err
    code, out, err = m3(*common, "--hotwords", "\U0001f600")
    assert code == 0 and len(err.splitlines()) == 1 and "\U0001f600" in err


def test_decoding_options_arrive(m3, model, texts):
    base = m3("transcribe", "-m", model, "-q", "--decoder", "greedy", ONE)[1]
    assert m3("transcribe", "-m", model, "-q", "--decoder", "greedy", "--blank-penalty", "-6", ONE)[1] != base
    assert m3("transcribe", "-m", model, "-q", "--decoder", "beam", "--beam-size", "1", ONE)[0] == 0
    assert m3("transcribe", "-m", model, "-q", "--decoder", "attention", ONE)[0] == 0
    weights = [m3("transcribe", "-m", model, "-f", "jsonl", "--ctc-weight", w, ONE)[1] for w in ("0", "1")]
    assert json.loads(weights[0])["segments"] != json.loads(weights[1])["segments"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--decoder", "greedy", "--hotwords", "a"], "hotwords"),
        (["--decoder", "greedy", "--nbest", "2"], "one hypothesis"),
        (["--nbest", "20"], "beam size"),
        (["--blank-penalty", "nan"], "blank_penalty"),
        (["--max-seconds", "0.1"], "max_seconds"),
        (["--lm-unit", "letter"], "lm_unit"),
        (["--lm-unit", "token"], "there is no lm"),
        (["--lm-unit", "token", "--lm", "none"], "there is no lm"),
        (["--hotwords", " ,"], "holds no phrase"),
        (["-o", "/nonexistent/folder/out"], "/nonexistent/folder/out"),
        (["-o", "/"], "is a directory"),
        (["-m", "x" * 300], "File name too long"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense(m3, model, arguments, found):
    code, out, err = m3("transcribe", "-m", model, "-q", *arguments, ONE)
    assert code == 2 and out == "" and found in err and len(err.splitlines()) == 1


def test_models_and_recordings_that_are_not_there(m3, model, tmp_path):
    assert m3("transcribe", "-m", tmp_path / "no-model", ONE)[0] == 2
    code, out, err = m3("transcribe", "-m", model)
    assert code == 2 and out == "" and "name recordings" in err
    assert m3("transcribe", "-m", model, ONE, "--wav-scp", "x")[0] == 2
    code, out, err = m3("transcribe", "-m", model, ONE, "--threads", "100000")  # would take for ever
    assert code == 2 and out == "" and "--threads" in err
    assert "--repeats" in m3("bench", "-m", model, "-e", "onnx", "-i", "1x20", "--repeats", 10**9)[2]  # likewise
    assert m3("transcribe", "-m", model, "--wav-scp", tmp_path / "missing.scp")[0] == 2


def test_speech_detection_can_be_left_out(m3, model, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.05, 3 * SAMPLE_RATE)
    soundfile.write(tmp_path / "noise.wav", noise, SAMPLE_RATE)
    assert m3("transcribe", "-m", model, "-q", tmp_path / "noise.wav")[:2] == (0, "\n")
    assert m3("transcribe", "-m", model, "-q", "--no-vad", tmp_path / "noise.wav")[1].strip()


@pytest.mark.parametrize("library", ["numpy", "torch", "onnxruntime"])
def test_more_than_the_memory_holds(m3, model, monkeypatch, library):
    def ask(*arguments, **options):
        if library == "onnxruntime":
            raise Fail("Failed to allocate memory for requested buffer of")
        yield np.ones(2**50) if library == "numpy" else torch.ones(2**50)

    monkeypatch.setattr("m3asr.bench.bench", ask)
    code, out, err = m3("bench", "-m", model, "-e", "onnx", "-i", "1x20")
    assert code == 2 and out == "" and "not enough memory" in err and len(err.splitlines()) == 1


def test_other_errors_are_not_hidden(m3, model, monkeypatch):
    monkeypatch.setattr("m3asr.bench.bench", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        m3("bench", "-m", model, "-e", "onnx", "-i", "1x20")


def test_features_that_are_no_archive(m3, model, tmp_path):
    np.save(tmp_path / "feats.npy", np.zeros((1, 50, 80), np.float32))
    code, out, err = m3("infer", model, tmp_path / "feats.npy", "--decoder", "greedy")
    assert code == 2 and out == "" and "is a single array; expected an .npz" in err


def test_every_command_has_a_manual():
    runner = CliRunner()
    commands = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    assert {"transcribe", "evaluate", "convert", "build", "engines", "infer"} <= set(commands)
    for command in commands:
        shown = runner.invoke(app, [command, "--help"])
        assert shown.exit_code == 0 and command in shown.output
    assert runner.invoke(app, ["--version"]).output.strip() == f"m3asr {m3asr.__version__}"
