"""The CUDA engine as files: what is built is what is loaded, and what does not fit is refused with the way out."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from interpreter_tiles import few_programs  # noqa: E402, F401
from typer.testing import CliRunner  # noqa: E402

from m3asr.checkpoint import read_checkpoint  # noqa: E402
from m3asr.cli import app  # noqa: E402
from m3asr.convert import write_model_folder  # noqa: E402
from m3asr.engines import available, load_engine  # noqa: E402
from m3asr.engines.cuda import CudaEngine, built  # noqa: E402
from m3asr.errors import MissingExtra, ModelError  # noqa: E402
from m3asr.folder import ModelFolder  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with experts, with its cuda engine in float32."""
    path = tmp_path_factory.mktemp("cuda") / "model"
    write_model_folder(read_checkpoint(GOLDEN / "3m-moe-40"), path, onnx=False)
    folder = ModelFolder.read(path)
    built.build(folder, "fp32", DEVICE)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder.path, tmp_path / "model")
    return ModelFolder.read(tmp_path / "model")


def test_what_is_loaded_computes_what_was_packed(folder):
    """The weights of the engine made from the model in memory, bit for bit; and near the PyTorch model."""
    loaded, fresh = built.load(folder, DEVICE), CudaEngine(folder, "fp32", DEVICE)
    assert loaded.precision == "fp32"
    stored, made = {}, {}
    assert built._flat(loaded.forward.weights, "", stored) == built._flat(fresh.forward.weights, "", made)
    assert len(stored) > 50 and all(torch.equal(stored[name], value) for name, value in made.items())
    features = np.random.default_rng(0).standard_normal((1, 23, 40), np.float32)
    lengths = np.array([23], np.int32)
    eager = load_engine(folder, "eager")
    got, expected = loaded(features, lengths), eager(features, lengths)
    for value, reference in zip(got[:2], expected[:2], strict=True):
        assert np.linalg.norm(value - reference) <= 1e-5 * np.linalg.norm(reference)
    assert got[2].tolist() == expected[2].tolist()
    if folder.config.decoder is not None:
        tokens = np.array([[folder.config.sos, 3, 4]])
        for value, reference in zip(
            loaded.decode(got[1], got[2], tokens), eager.decode(got[1], got[2], tokens), strict=True
        ):
            assert (value is None) == (reference is None)
            assert value is None or np.allclose(value, reference, atol=1e-4)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"compute_capability": "7.5"}, "compute capability 7.5"),
        ({"torch": "1.13"}, "torch 1.13"),
        ({"triton": "2.0"}, "triton 2.0"),
        ({"m3asr": "0.0.9"}, "m3asr 0.0.9"),
        ({"model_digest": "0"}, "whose weights"),
        ({"config_sha256": "0"}, "config.json"),
        ({"format_version": 0}, "format 0"),
        ({"weights": None}, "damaged"),
        ({"weights": {"kind": "Weights", "parts": {}}}, "damaged"),
    ],
)
def test_an_engine_built_for_something_else_is_refused(copy, change, said):
    manifest = copy.path / "engines" / "cuda" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(ModelError, match=f"{said}.*m3asr build .* --engine cuda --precision fp32"):
        built.load(copy, DEVICE)


def test_damaged_or_missing_files_are_refused(copy):
    path = copy.path / "engines" / "cuda"
    weights = (path / "weights.safetensors").read_bytes()
    for size in (0, 7, 1000, len(weights) - 1):
        (path / "weights.safetensors").write_bytes(weights[:size])
        with pytest.raises(ModelError, match="damaged.*m3asr build"):
            built.load(copy, DEVICE)
    (path / "manifest.json").write_text("{")
    with pytest.raises(ModelError, match="damaged.*m3asr build"):
        built.load(copy, DEVICE)
    shutil.rmtree(path)
    with pytest.raises(ModelError, match="no cuda engine.*m3asr build"):
        built.load(copy, DEVICE)


def test_other_weights_in_the_folder_are_noticed(copy):
    model = copy.path / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-5] ^= 1
    model.write_bytes(data)
    with pytest.raises(ModelError, match="whose weights"):
        built.load(copy, DEVICE)


def test_a_failed_build_leaves_the_old_engine(copy, monkeypatch):
    before = (copy.path / "engines" / "cuda" / "manifest.json").read_text()
    with pytest.raises(ModelError, match="int3"):
        built.build(copy, "int3", DEVICE)
    strange = dataclasses.replace(copy, config=dataclasses.replace(copy.config, compat=True))
    with pytest.raises(ModelError, match="compat"):
        built.build(strange, "fp32", DEVICE)
    assert (copy.path / "engines" / "cuda" / "manifest.json").read_text() == before
    assert [entry.name for entry in (copy.path / "engines").iterdir()] == ["cuda"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_is_said_and_nothing_else_runs(folder):
    assert available()["cuda"][1] == "no CUDA device is found"
    with pytest.raises(ModelError, match="NVIDIA GPU.*onnx"):
        load_engine(folder, "cuda")
    with pytest.raises(ModelError, match="NVIDIA GPU.*onnx"):
        built.build(folder, "bf16")
    runner = CliRunner()
    assert isinstance(runner.invoke(app, ["build", str(folder.path), "-e", "cuda"]).exception, ModelError)
    assert "CUDA" in runner.invoke(app, ["engines"]).output


def test_without_triton_the_extra_is_named(folder, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert "m3asr[cuda]" in available()["cuda"][1]
    with pytest.raises(MissingExtra, match=r"m3asr\[cuda\]"):
        load_engine(folder, "cuda")
    assert isinstance(CliRunner().invoke(app, ["build", str(folder.path), "-e", "cuda"]).exception, MissingExtra)
