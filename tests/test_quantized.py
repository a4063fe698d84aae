"""8 bits a weight: what is lost, what is refused, and that engines read such a folder like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from golden import GOLDEN, relative_error
from random_model import VARIANTS, random_model
from safetensors.numpy import load_file, save_file

from m3asr.audio import load_audio
from m3asr.engines import load_engine
from m3asr.errors import ModelError
from m3asr.folder import BUILTIN, DEFAULT_MODEL, ModelFolder
from m3asr.quantized import dequantize, halve, quantize
from m3asr.transcribe import Transcriber

EXAMPLES = Path(__file__).parent.parent / "examples"
SHAPES = {"linear": (192, 128), "experts": (3, 80, 96), "pointwise": (128, 128, 1), "convolution": (64, 32, 3, 3)}
SCALES = {"linear": (192,), "experts": (3, 80), "pointwise": (128,), "convolution": (64,)}


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("kind", SHAPES)
def test_rows_are_within_half_a_step(kind):
    weight = matrix(*SHAPES[kind])
    stored = quantize({"w": weight})
    assert stored["w"].dtype == np.int8 and stored["w.scale"].dtype == np.float32
    assert stored["w.scale"].shape == SCALES[kind]
    back = dequantize(stored)
    assert back.keys() == {"w"} and back["w"].dtype == np.float32 and back["w"].shape == weight.shape
    steps = stored["w.scale"].reshape(-1, 1)
    rows, error = weight.reshape(len(steps), -1), (back["w"] - weight).reshape(len(steps), -1)
    inside = np.abs(rows) <= 127.5 * steps
    assert (np.abs(error) <= steps * 0.5001)[inside].all() and inside.mean() > 0.99
    # What is cut off at the ends must have paid: no row is worse than with the step that cuts nothing.
    whole = np.abs(rows).max(1, keepdims=True) / 127
    plain = np.square(np.rint(rows / whole) * whole - rows).sum(1)
    assert (np.square(error).sum(1) <= plain * 1.001).all()


def test_a_scale_a_row_of_every_expert():
    weight = matrix(3, 80, 96) * np.array([1, 1e-3, 1e3], np.float32)[:, None, None]
    back = dequantize(quantize({"w": weight}))["w"]
    error = np.linalg.norm(back - weight, axis=(1, 2)) / np.linalg.norm(weight, axis=(1, 2))
    assert (error < 0.01).all()


def test_zeros_and_outliers():
    weight = matrix(192, 128)
    weight[3] = 0
    weight[5, 7] = 1e4
    back = dequantize(quantize({"w": weight}))["w"]
    assert (back[3] == 0).all()
    assert back[5, 7] == pytest.approx(1e4, rel=1e-3)  # alone it weighs more than the others' steps
    assert np.abs(back - weight)[[0, 1, 2, 4, 6]].max() < 0.03


def test_clipping_pays_where_one_weight_stands_out():
    weight = matrix(4, 16384)
    weight[:, 0] = 5.0
    steps = quantize({"w": weight})["w.scale"]
    assert (steps < np.abs(weight).max(1) / 127 * 0.99).all()


def test_what_stays():
    state = {
        "bias": matrix(32768),
        "norm": matrix(128, 64),
        "depthwise_conv.weight": matrix(2048, 1, 15),
        "router_weights": matrix(1024, 64),
        "counter": np.array(7, np.int64),
        "epsilon": np.array(0.5, np.float32),
    }
    stored = quantize(state)
    assert {name: value.dtype for name, value in stored.items() if name != "counter"} == dict.fromkeys(
        state.keys() - {"counter"}, np.float16
    )
    assert stored["counter"].dtype == np.int64 and stored["counter"].shape == stored["epsilon"].shape == ()
    for name, value in dequantize(stored).items():
        np.testing.assert_array_equal(value, state[name].astype(np.float16) if name != "counter" else state[name])


@pytest.mark.parametrize("shape", [(128, 128), (8,)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(shape, value):
    broken = matrix(*shape)
    broken.flat[3] = value
    for store in (quantize, halve):
        with pytest.raises(ValueError, match="not finite.*broken"):
            store({"whole": matrix(*shape), "broken": broken})


def test_beyond_float16():
    with pytest.raises(ValueError, match="not finite in float16: norm"):
        quantize({"norm": np.full(8, 1e6, np.float32)})
    large = np.full((128, 128), 1e6, np.float32)
    np.testing.assert_allclose(dequantize(quantize({"w": large}))["w"], large, rtol=1e-6)


@pytest.mark.parametrize("state", [{"w": matrix(128, 128), "w.scale": matrix(128)}, {"w": np.zeros(4, np.int8)}])
def test_names_and_types_that_would_be_mistaken(state):
    with pytest.raises(ValueError, match="w cannot be stored"):
        quantize(state)
    assert dequantize({"norm": matrix(4), "norm.scale": matrix(4)}).keys() == {"norm", "norm.scale"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_parameter_is_called_like_a_scale(variant):
    names = random_model(variant).state_dict().keys()
    assert not [name for name in names if name.endswith(".scale")]


def variant_of_the_package(path, store, weights):
    """The model in the package with other weights; its onnx engine stays, for graphs depend on the config alone."""
    shutil.copytree(BUILTIN / DEFAULT_MODEL, path)
    save_file(store(weights), path / "model.safetensors")
    return ModelFolder.read(path)


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory):
    """Float16, a little beside the package's own weights, which 8 bits could hold as they are."""
    random = np.random.default_rng(5)
    weights = {
        name: value * (1 + 0.01 * random.standard_normal(value.shape, np.float32))
        for name, value in ModelFolder.read().weights().items()
    }
    return variant_of_the_package(tmp_path_factory.mktemp("models") / "sixteen", halve, weights)


@pytest.fixture(scope="module")
def eight(sixteen, tmp_path_factory):
    return variant_of_the_package(tmp_path_factory.mktemp("models") / "eight", quantize, sixteen.weights())


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, name: tensors.pop(name),
        lambda tensors, name: tensors.update({name: tensors[name][:-1]}),
        lambda tensors, name: tensors.update({name: tensors[name][:, None].repeat(2, 1)}),
        lambda tensors, name: tensors.update({name: np.array(0.1, np.float32)}),
        lambda tensors, name: tensors.update({name: tensors[name].astype(np.int32)}),
    ],
)
def test_damaged_scales(change, eight, tmp_path):
    shutil.copytree(eight.path, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    change(tensors, "decoder.output_layer.weight.scale")
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ModelError, match=r"damaged \(decoder\.output_layer\.weight.*convert the checkpoint again"):
        ModelFolder.read(tmp_path / "model").weights()


def test_half_the_size_of_float16(eight, sixteen):
    sizes = [(folder.path / "model.safetensors").stat().st_size for folder in (eight, sixteen)]
    assert 0.49 < sizes[0] / sizes[1] < 0.53
    weights, whole = eight.weights(), sixteen.weights()
    assert whole.keys() == weights.keys()
    for name, value in weights.items():
        assert np.linalg.norm(value - whole[name]) <= 0.02 * np.linalg.norm(whole[name]), name


def test_engines_agree_on_8_bits(eight, sixteen):
    audio = load_audio(EXAMPLES / "goforward.flac")
    eager, onnx = (Transcriber(eight, load_engine(eight, kind)) for kind in ("eager", "onnx"))
    features = eight.features(audio)[None]
    lengths = np.array([features.shape[1]], np.int32)
    (log_probs, hidden, out_lengths), outputs = (one.engine(features, lengths) for one in (eager, onnx))
    assert outputs[2].tolist() == out_lengths.tolist()
    assert relative_error(outputs[0], log_probs, out_lengths) < 1e-4
    assert relative_error(outputs[1], hidden, out_lengths) < 1e-4
    whole = load_engine(sixteen, "onnx")(features, lengths)
    assert 1e-4 < relative_error(outputs[1], whole[1], out_lengths) < 0.1  # it is another model, and a near one
    assert eager.transcribe(audio).text == onnx.transcribe(audio).text == "go forward ten meters"


@pytest.mark.parametrize(("weights", "kind"), [("float32", np.float32), ("float16", np.float16), ("int8", np.int8)])
def test_convert(weights, kind, m3, tmp_path):
    code, _, err = m3("convert", GOLDEN / "3m-moe-80", tmp_path / "model", "--no-onnx", "--weights", weights)
    assert code == 0, err
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in stored.values()} >= {np.dtype(kind)}
    assert ("8 bits" if weights == "int8" else weights) in (tmp_path / "model" / "README.md").read_text()
    load_engine(ModelFolder.read(tmp_path / "model"), "eager")


def test_convert_says_what_cannot_be_stored(m3, tmp_path, monkeypatch):
    import m3asr.checkpoint

    read = m3asr.checkpoint.read_checkpoint

    def broken(*args, **options):
        found = read(*args, **options)
        found.state["encoder.after_norm.weight"][0] = 1e6
        return found

    monkeypatch.setattr(m3asr.checkpoint, "read_checkpoint", broken)
    code, _, err = m3("convert", GOLDEN / "3m-moe-80", tmp_path / "model", "--no-onnx", "--weights", "int8")
    assert code == 2 and "encoder.after_norm.weight" in err and not (tmp_path / "model").exists()
