"""Engines beside each other: what runs is measured and compared, what cannot run says why."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from m3asr.bench import bench, read_input  # noqa: E402
from m3asr.checkpoint import read_checkpoint  # noqa: E402
from m3asr.cli import app  # noqa: E402
from m3asr.convert import write_model_folder  # noqa: E402
from m3asr.engines.eager import EagerEngine  # noqa: E402
from m3asr.errors import AudioError, M3asrError, ModelError  # noqa: E402
from m3asr.folder import ModelFolder  # noqa: E402

GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "model"
    write_model_folder(read_checkpoint(GOLDEN / "3m-dense-80"), path, onnx=False)
    return ModelFolder.read(path)


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "noise.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 12000), 16000)
    return str(path)


class WrongEngine(EagerEngine):
    """Its hidden sequence is a tenth too large, its best symbol always the last."""

    name = "wrong"

    def __call__(self, features, lengths, **options):
        log_probs, hidden, lengths = super().__call__(features, lengths, **options)
        log_probs[..., -1] = 0.0
        return log_probs, 1.1 * hidden, lengths


class FailingEngine(WrongEngine):
    """It takes the first input and refuses the second."""

    def __call__(self, features, lengths, **options):
        if len(lengths) == 1:
            raise ModelError("no profile holds it")
        return super().__call__(features, lengths, **options)


def test_rows_are_compared_with_the_first(folder, recording, monkeypatch):
    import m3asr.bench

    load, own = m3asr.bench.load_engine, {"wrong": WrongEngine, "failing": FailingEngine}
    monkeypatch.setattr(
        m3asr.bench, "load_engine", lambda f, name, threads: own[name](f) if name in own else load(f, name)
    )
    engines = ["failing", "eager", "eager", "wrong", "onnx"]
    failing, first, same, wrong, missing = bench(folder, engines, ["2x30", "1x9"], [recording])
    assert failing.refused == "no profile holds it" and not failing.forwards and failing.recordings is None
    assert first.forwards["2x30"].error is None and first.forwards["2x30"].ms > 0 and first.load_seconds > 0
    assert same.forwards["1x9"].error == 0.0 and same.forwards["2x30"].same_symbols == 1.0
    assert wrong.forwards["2x30"].error == pytest.approx(0.1, rel=1e-4) and wrong.forwards["2x30"].same_symbols < 1
    assert first.recordings.audio_seconds == 0.75 and same.recordings.same_texts == 1.0
    assert first.recordings.times_real_time == pytest.approx(0.75 / first.recordings.seconds)
    assert not missing.forwards and "m3asr build" in missing.refused


def test_the_command_prints_a_table_and_a_line_of_json(folder, recording, tmp_path):
    arguments = [
        "bench",
        "-m",
        str(folder.path),
        "-e",
        "eager",
        "-e",
        "onnx",
        "-i",
        "1x20",
        "--repeats",
        "1",
        recording,
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "1x20, ms" in result.stderr and "no onnx engine" in result.stderr
    (line,) = result.stdout.splitlines()
    eager, onnx = json.loads(line)["engines"]
    assert eager["forwards"]["1x20"]["ms"] > 0 and eager["recordings"]["times_real_time"] > 0
    assert onnx["refused"] and not onnx["forwards"]


def test_wrong_requests_get_a_sentence(folder, tmp_path):
    for text in ("", "16", "x5", "2x", "0x10", "2x3x4", "-1x5", "²x5", "1x99999999999999999999", "4x1000001"):
        with pytest.raises(M3asrError, match="expected utterances x frames"):
            read_input(text)
    with pytest.raises(AudioError):
        list(bench(folder, ["eager"], ["1x20"], [str(tmp_path / "missing.wav")]))
    runner = CliRunner()
    for engine, said in (("onnx", "none of the engines"), ("cublas", "cublas")):
        result = runner.invoke(app, ["bench", "-m", str(folder.path), "-e", engine, "-i", "1x20"])
        assert isinstance(result.exception, M3asrError) and said in str(result.exception)


def test_a_picture(folder, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.png"
    arguments = ["bench", "-m", str(folder.path), "-e", "eager", "-i", "1x20", "--repeats", "1", "--plot", str(path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir()] == ["bench.png"]
