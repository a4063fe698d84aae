"""`m3asr build` for every engine, `m3asr trtexec-inputs`: what is printed, what is written, what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from m3asr.cli.build import read_profile
from m3asr.engines import available
from m3asr.errors import M3asrError

EXAMPLE = Path(__file__).parent.parent / "examples" / "goforward.flac"
SMALL = "B=1:1:2,T=7:100:400"


@pytest.fixture(scope="module")
def model(golden_folders, tmp_path_factory):
    """A copy of a model folder, so that what is built in it is in nobody's way."""
    target = tmp_path_factory.mktemp("built") / "model"
    shutil.copytree(golden_folders["3m-moe-80"], target)
    return target


def test_tensorrt(m3, model):
    pytest.importorskip("tensorrt_rtx")
    engine = model / "engines" / "tensorrt"
    code, out, err = m3("build", model, "--engine", "tensorrt", "--precision", "fp16", "--profile", SMALL)
    assert code == 0 and err == f"wrote {engine}\n"
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["encoder.plan", "decoder.plan"]
    assert lines[2:4] == ["precision fp16", f"profile {SMALL}"] and lines[4].endswith(" s")
    manifest = json.loads((engine / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["precision"] == "fp16" and manifest["profiles"] == [{"B": [1, 1, 2], "T": [7, 100, 400]}]
    for name, size in manifest["plans"].items():
        assert (engine / f"{name}.plan").stat().st_size == size > 10_000
    assert sorted(path.name for path in engine.parent.iterdir()) == ["onnx", "tensorrt"]

    # Again, with everything that changes the plan; a failure leaves the old engine as it is.
    prior = model.parent / "prior.txt"
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    np.savetxt(prior, np.ones(config["vocab_size"] + 1))
    twice = "--profile", SMALL, "--profile", "B=2:2:2,T=100:200:300"
    code, out, _ = m3("build", model, "-e", "tensorrt", *twice, "--prior", prior, "--compat")
    assert code == 0 and "precision fp32" in out and out.count("profile ") == 2
    changed = json.loads((engine / "manifest.json").read_text(encoding="utf-8"))
    assert changed["prior"] and changed["compat"] and changed["plans"]["encoder"] > manifest["plans"]["encoder"]
    prior.write_text("1 2 3")
    code, out, err = m3("build", model, "-e", "tensorrt", "--profile", SMALL, "--prior", prior)
    assert code == 2 and out == "" and "expected" in err and len(err.splitlines()) == 1
    assert json.loads((engine / "manifest.json").read_text(encoding="utf-8")) == changed


def test_a_failed_build_leaves_nothing_behind(m3, model, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    from m3asr import trt
    from m3asr.engines import tensorrt

    def refuse(*args, **options):
        raise trt.BuildError("TensorRT refused")

    before = sorted(path.name for path in (model / "engines").iterdir())
    monkeypatch.setattr(tensorrt, "networks", lambda *args, **options: [("encoder", None)])  # tracing takes seconds
    monkeypatch.setattr(tensorrt.trt, "write", refuse)
    code, out, err = m3("build", model, "-e", "tensorrt", "--profile", SMALL)
    assert code == 2 and out == "" and "refused" in err and "Traceback" not in err
    assert sorted(path.name for path in (model / "engines").iterdir()) == before


def test_calibration(m3, model, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / EXAMPLE.name).write_bytes(EXAMPLE.read_bytes())
    (tmp_path / "list.txt").write_text(f"{EXAMPLE.name}\n\n")
    arguments = "build", model, "-e", "tensorrt", "--profile", SMALL, "--precision"
    code, out, _ = m3(*arguments, "int8", "--calibration", tmp_path / "list.txt", "--calibration", EXAMPLE)
    assert code == 0 and "precision int8" in out
    (tmp_path / "empty.txt").write_text("\n")
    for precision, options, found in (
        ("int8", [], "--calibration"),
        ("fp8", ["--calibration", tmp_path / "empty.txt"], "no recordings"),
        ("int8", ["--calibration", tmp_path / "missing.txt"], "no readable list"),
        ("int8", ["--calibration", tmp_path / "missing.wav"], "no such file"),
        ("fp16", ["--calibration", EXAMPLE], "int8 and fp8"),
    ):
        code, out, err = m3(*arguments, precision, *options)
        assert code == 2 and out == "" and found in err and len(err.splitlines()) == 1
        assert err.count("missing.") <= 1  # a file is named once


def test_a_package_that_is_missing(m3, model, monkeypatch):
    found = importlib.util.find_spec
    gone = "tensorrt_rtx", "tensorrt"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else found(name))
    for command in (("build", model), ("transcribe", EXAMPLE, "-m", model)):
        code, out, err = m3(*command, "--engine", "tensorrt")
        assert code == 2 and out == "" and "pip install 'm3asr[tensorrt]'" in err and len(err.splitlines()) == 1
    assert "pip install 'm3asr[tensorrt]'" in available()["tensorrt"][1]


def test_no_silent_other_engine(m3, golden_folders):
    """Without a plan, or without a GPU for it, nothing else runs in its place."""
    pytest.importorskip("tensorrt_rtx")
    code, out, err = m3("transcribe", EXAMPLE, "-m", golden_folders["3m-moe-80"], "-e", "tensorrt")
    assert code == 2 and out == "" and "m3asr build" in err and len(err.splitlines()) == 1
    if not torch.cuda.is_available():
        assert "no CUDA device" in available()["tensorrt"][1]


def test_a_plan_without_a_gpu(m3, model):
    pytest.importorskip("tensorrt_rtx")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if not (model / "engines" / "tensorrt").is_dir():
        assert m3("build", model, "-e", "tensorrt", "--profile", SMALL)[0] == 0
    code, out, err = m3("transcribe", EXAMPLE, "-m", model, "-e", "tensorrt")
    assert code == 2 and out == "" and "needs a CUDA GPU" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["-e", "eager"], "needs no building"),
        (["-e", "onnx", "--precision", "fp16"], "computes in float32"),
        (["-e", "onnx", "--profile", SMALL, "--compat"], "--profile, --compat: for --engine tensorrt only"),
        (["-e", "cuda", "--precision", "int8"], "is for --engine tensorrt"),
        (["-e", "cuda", "--left-chunks", "3"], "--left-chunks"),
        (["-e", "tensorrt", "--profile", "B=1:2:3"], "lacks T"),
        (["-e", "tensorrt", "--profile", "B=1:2:3,T=7:9"], "not readable at 'T=7:9'"),
        (["-e", "tensorrt", "--profile", "B=3:2:1,T=7:8:9"], "not rising"),
        (["-e", "tensorrt", "--chunk-size", "4"], "dynamic chunks"),
        (["-e", "tensorrt", "--prior", "missing.txt"], "missing.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense(m3, model, arguments, found):
    if "tensorrt" in arguments:
        pytest.importorskip("tensorrt_rtx")
    code, out, err = m3("build", model, *arguments)
    assert code == 2 and out == "" and found in err and len(err.splitlines()) == 1


def test_profiles():
    assert read_profile(" T=7:8:9, B=1:1:1") == {"T": (7, 8, 9), "B": (1, 1, 1)}
    for text in ("", "B=1:2:3,B=1:2:3", "B=1:2:3,T=7:8:9,X=1:1:1", "B=-1:2:3,T=7:8:9", "B=0:2:3,T=7:8:9", "B=1:²:3"):
        with pytest.raises(M3asrError, match="--profile"):
            read_profile(text)
    with pytest.raises(M3asrError, match="T is more than 1,000,000"):
        read_profile("B=1:2:3,T=7:8:99999999999999999999")


def test_trtexec_inputs(m3, tmp_path, monkeypatch):
    code, out, err = m3("trtexec-inputs", 2, 50, 80, "-o", tmp_path)
    assert code == 0 and err == "" and out.startswith("trtexec --loadEngine=encoder.plan --shapes=feats:2x50x80")
    assert np.fromfile(tmp_path / "feats.2x50x80.bin", "<f4").shape == (2 * 50 * 80,)
    assert np.fromfile(tmp_path / "lengths.2x50x80.bin", "<i4").tolist() == [50, 50]
    monkeypatch.chdir(tmp_path)
    assert m3("trtexec-inputs", 1, 7, 40, "--package", "tensorrt_rtx")[1].startswith("tensorrt_rtx ")
    assert (tmp_path / "feats.1x7x40.bin").is_file()
    for arguments in ((0, 7, 40), (1, 7, 40, "-o", tmp_path / "missing")):
        code, out, err = m3("trtexec-inputs", *arguments)
        assert code == 2 and out == "" and len(err.splitlines()) == 1
