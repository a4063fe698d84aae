"""`verify` passes what is right, and names the place where something is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from m3asr.engines.eager import EagerEngine
from m3asr.engines.observe import observe
from m3asr.engines.onnx import OnnxEngine
from m3asr.errors import ModelError
from m3asr.folder import ModelFolder
from m3asr.verify import synthetic_utterances, utterances_of, verify

EXAMPLE = Path(__file__).parent.parent / "examples" / "goforward.flac"
NAMES = "eager", "onnx", "tensorrt-interpreted"


@pytest.fixture(scope="module")
def folder(golden_folders):
    return ModelFolder.read(golden_folders["3m-moe-80"])


@pytest.fixture(scope="module")
def reference(folder):
    return EagerEngine(folder)


@pytest.fixture(scope="module")
def utterances(folder):
    """Of different lengths, so that there is padding, and one that is too short for a single frame of the encoder."""
    generator = np.random.default_rng(0)
    sizes = {"long": 120, "short": 51, "shortest": 3}
    return [(name, generator.normal(size=(size, 80)).astype(np.float32)) for name, size in sizes.items()]


@pytest.fixture(scope="module")
def engine_of(folder):
    """(name, change) -> the engine with its own copy of the weights, changed by change(state_dict)."""
    unchanged = {}

    def make(name, change=None, **options):
        if change is None and not options:
            if name not in unchanged:
                unchanged[name] = make(name, lambda state: None)
            return unchanged[name]
        weights = {key: np.array(value) for key, value in folder.weights().items()}
        if change is not None:
            change(weights)
        changed = _Changed(folder, weights)
        if name == "onnx":
            return OnnxEngine(changed)
        eager = EagerEngine(changed)
        if name == "eager":
            return eager
        pytest.importorskip("tensorrt_rtx")
        from m3asr.engines import tensorrt

        decoder = b"".join(value.tobytes() for key, value in weights.items() if key.startswith("decoder."))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensorrt, "trace_decoder", traced_once(tensorrt.trace_decoder, decoder))
            return tensorrt.InterpretedEngine(eager.model, profiles=[{"B": (1, 2, 4), "T": (7, 206, 2048)}], **options)

    decoders = {}

    def traced_once(trace, weights):
        """The changes are in the encoder mostly: a decoder with the same weights is the same network."""

        def traced(decoder, width, *, precision, **options):
            key = weights, precision
            if key not in decoders:
                decoders[key] = trace(decoder, width, precision=precision, **options)
            return decoders[key]

        return traced

    return make


class _Changed:
    """A model folder with other weights."""

    def __init__(self, folder, weights):
        self.path, self.config, self._weights = folder.path, folder.config, weights
        self.config_digest = folder.config_digest

    def weights(self):
        return {name: value.copy() for name, value in self._weights.items()}


@pytest.mark.parametrize("name", NAMES)
def test_right_engines_pass(folder, reference, utterances, engine_of, name):
    report = verify(folder, engine_of(name), reference, utterances)
    assert report.passed and report.first_departing is None and not report.texts and not report.not_finite
    assert list(report.outputs) == ["log_probs", "hidden", "decoder"]
    blocks = folder.config.encoder.num_blocks
    assert [(r.path, r.flips) for r in report.routing.values()] == [
        (f"encoder.blocks.{i}.feed_forward", 0) for i in range(blocks)
    ]
    assert all(r.tokens == 29 + 12 for r in report.routing.values())
    for path in ("encoder.subsampling.conv.0", "encoder.embed.blocks.0.norm_mha", "encoder.blocks.1.norm_final"):
        assert 0 <= report.layers[path].error < 1e-5
    if name != "eager":  # equal to the last bit would mean that nothing was compared
        assert max(row.error for row in report.layers.values()) > 0
    json.dumps(report.as_dict(), allow_nan=False)


QUERY, NORM = "encoder.blocks.0.self_attn.linear_q", "encoder.blocks.1.norm_mha"
DEPTHWISE = "encoder.embed.blocks.1.conv_module.depthwise_conv"


@pytest.mark.parametrize(
    ("name", "weight", "first"),
    [
        ("eager", f"{NORM}.bias", NORM),
        ("eager", f"{QUERY}.weight", QUERY),
        ("onnx", f"{NORM}.bias", NORM),
        ("onnx", f"{QUERY}.weight", QUERY),
        ("onnx", f"{DEPTHWISE}.bias", DEPTHWISE),
        ("tensorrt-interpreted", f"{QUERY}.weight", QUERY),
    ],
)
def test_a_changed_weight_is_named(folder, reference, utterances, engine_of, name, weight, first):
    def change(state):
        state[weight].reshape(-1)[3] += 0.5

    report = verify(folder, engine_of(name, change), reference, utterances)
    assert not report.passed and report.first_departing.path == first
    assert any("log_probs" in failure for failure in report.failures)


def test_changed_experts_and_decoders(folder, reference, utterances, engine_of):
    def change(state):
        state["encoder.blocks.1.feed_forward.experts.w_2.bias"] += 1.0

    report = verify(folder, engine_of("tensorrt-interpreted", change), reference, utterances)
    assert report.first_departing.path == "encoder.blocks.1.feed_forward.experts"
    name = next(n for n in folder.weights() if n.startswith("decoder.") and n.endswith("norm1.weight"))

    def other(state):
        state[name] *= 1.5

    report = verify(folder, engine_of("onnx", other), reference, utterances)
    assert not report.passed and report.first_departing is None and len(report.failures) == 1
    assert report.failures[0].startswith("decoder has a relative error")


@pytest.mark.parametrize("name", NAMES)
def test_flips_are_counted(folder, reference, utterances, engine_of, name):
    """A router that hears two experts exchanged sends their tokens the wrong way, and no others."""

    def change(state):
        router = state["encoder.blocks.1.feed_forward.router_weights"]
        router[:, [0, 1]] = router[:, [1, 0]]

    features, lengths = _batch(utterances)
    chosen = observe(reference, features, lengths).choices["encoder.blocks.1.feed_forward"].reshape(len(lengths), -1)
    expected = sum(int((row[:n] < 2).sum()) for row, n in zip(chosen, (29, 12, 0), strict=True))
    report = verify(folder, engine_of(name, change), reference, utterances)
    flips = [routing.flips for routing in report.routing.values()]
    assert flips[:2] == [0, expected] and expected > 0
    margins = [routing.margin for routing in report.routing.values()]
    assert margins[0] is None and 0 < margins[1] < 1


@pytest.mark.parametrize(
    ("name", "operation"), [("eager", "aten."), ("onnx", "Add ("), ("tensorrt-interpreted", "linear_k/")]
)
def test_a_planted_nan_is_traced(folder, reference, utterances, engine_of, name, operation):
    def change(state):
        state["encoder.blocks.1.self_attn.linear_k.bias"][0] = np.nan

    report = verify(folder, engine_of(name, change), reference, utterances)
    where = next(iter(report.not_finite.values()))
    assert not report.passed and operation in where and "encoder.blocks.1.self_attn.linear_k" in where
    assert "NaN" in report.failures[0]
    json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
def test_padded_and_constant_rows_make_no_nan(folder, engine_of, name):
    """Constant rows (zero variance), silence, huge values, padding that holds NaN, an utterance of length zero.

    Looked for in every module's output and every routing, not in the results alone.
    """
    engine = engine_of(name)
    x = np.zeros((5, 60, 80), np.float32)
    x[0], x[1], x[2, :30] = 5.0, -1e4, np.random.default_rng(1).normal(size=(30, 80))
    x[2:4, 30:] = np.nan
    lengths = np.array([60, 60, 30, 0, 60], np.int32)
    seen = observe(engine, x, lengths)
    assert seen.not_finite is None and len(seen.values) > 50
    assert all(np.isfinite(value).all() for value in (*seen.values.values(), *seen.outputs[:2]))
    experts = folder.config.encoder.moe.num_experts
    assert len(seen.choices) == folder.config.encoder.num_blocks
    for chosen in seen.choices.values():
        assert chosen.shape == (5 * seen.outputs[0].shape[1],) and chosen.min() >= 0 and chosen.max() < experts


def test_constant_rows_through_a_norm_without_variance(folder, engine_of):
    """With all weights before a norm at zero its rows are exactly constant: no variance at all."""

    def change(state):
        for name in state:
            if ".subsampling." in name:
                state[name][...] = 0

    x = np.ones((2, 40, 80), np.float32)
    for name in NAMES:
        seen = observe(engine_of(name, change), x, np.array([40, 0], np.int32))
        assert seen.not_finite is None and np.ptp(seen.values["encoder.subsampling.out.0"]) == 0


def test_lower_precision_has_its_own_tolerance(folder, reference, utterances, engine_of):
    engine = engine_of("tensorrt-interpreted", precision="fp16")
    report = verify(folder, engine, reference, utterances)
    assert report.precision == "fp16" and report.tolerance == 1e-2
    assert 1e-5 < report.outputs["hidden"].error
    strict = verify(folder, engine, reference, utterances, 1e-6)
    assert not strict.passed and strict.first_departing is not None


@pytest.mark.parametrize("experts", ["layers", "plugin"])
def test_a_network_with_a_prior(folder, reference, utterances, engine_of, experts):
    """The prior is added to the other side; without it, or with another one, log_probs do not agree."""
    import torch

    size = folder.config.vocab_size
    prior = np.linspace(1, 2, size, dtype=np.float32) / 1.5 / size
    engine = engine_of("tensorrt-interpreted", prior=torch.from_numpy(prior), experts=experts)
    report = verify(folder, engine, reference, utterances, prior=prior)
    assert report.passed and 0 < report.outputs["log_probs"].error < 1e-5
    assert verify(folder, engine, engine, utterances, prior=prior).outputs["log_probs"].error == 0
    assert not verify(folder, engine, reference, utterances, prior=prior[::-1]).passed
    with pytest.raises(ModelError, match="give the same file"):
        verify(folder, engine, reference, utterances)
    with pytest.raises(ModelError, match="leave --prior away"):
        verify(folder, reference, reference, utterances, prior=prior)


def test_the_command_interprets_a_prior_and_the_plugin(folder, m3, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    np.savetxt(tmp_path / "prior.txt", np.arange(1, folder.config.vocab_size + 2))
    arguments = "verify", folder.path, EXAMPLE, "--seconds", "1", "-e", "tensorrt-interpreted"
    code, out, _ = m3(*arguments, "--prior", tmp_path / "prior.txt", "--experts", "plugin")
    assert code == 0 and "passed" in out and "router flips: 0" in out
    for wrong in (["--prior", tmp_path / "prior.txt"], ["--experts", "layers"]):
        code, _, err = m3("verify", folder.path, EXAMPLE, *wrong)
        assert code == 2 and "tensorrt-interpreted" in err


def test_nothing_to_compare(folder, reference):
    with pytest.raises(ModelError, match="not a single frame"):
        verify(folder, reference, reference, [("empty", np.zeros((0, 80), np.float32))])


def test_sounds(folder):
    assert [name for name, _ in synthetic_utterances(folder)] == ["buzz", "noise", "silence"]
    assert all(np.isfinite(features).all() for _, features in synthetic_utterances(folder))
    ((name, features),) = utterances_of(folder, [EXAMPLE], 1.0)
    assert name == "goforward.flac" and features.shape == (98, 80)


def _batch(utterances):
    from m3asr.features import pad_batch

    order = sorted(utterances, key=lambda utterance: -len(utterance[1]))
    return pad_batch([features for _, features in order])


def test_command(m3, folder, tmp_path):
    files = "--json", tmp_path / "report.json", "--seconds", "2"
    code, out, _ = m3("verify", folder.path, EXAMPLE, *files)
    assert code == 0 and out.splitlines()[-1] == "passed" and "goforward.flac" in out
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["passed"] and report["engine"] == "onnx" and report["recordings"][0]["seconds"] == 1.98
    code, out, _ = m3("verify", folder.path, "--tolerance", "1e-12", "--against", "eager")
    assert code == 1 and out.splitlines()[-1] == "failed" and "synthetic sounds" in out and "first module" in out
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_command_with_a_nan_in_the_model(m3, folder, tmp_path):
    """Both engines have it: they agree, and yet it must not pass."""
    from safetensors.numpy import save_file

    copied = tmp_path / "model"
    copied.mkdir()
    for name in ("config.json", "units.txt", "cmvn.json"):
        if (folder.path / name).is_file():
            (copied / name).write_bytes((folder.path / name).read_bytes())
    weights = folder.weights()
    weights["encoder.after_norm.bias"][0] = np.nan
    save_file(weights, copied / "model.safetensors")
    code, out, _ = m3("verify", copied, "-e", "eager", EXAMPLE)
    assert code == 1 and "NaN or infinity, first from" in out and "encoder.after_norm" in out


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["missing.wav"], "no such file"),
        (["-e", "onnx", "--precision", "fp16"], "--precision is for tensorrt-interpreted"),
        (["--calibration", "x.wav"], "--calibration is for tensorrt-interpreted"),
        (["--chunk-size", "4"], "dynamic chunks"),
        (["--json", "/nonexistent/report.json"], "cannot be written"),
        (["told-before-this-is-missed.wav", "--json", "/"], "is a directory"),
        (["told-before-this-is-missed.wav", "--plot", "/"], "is a directory"),
        (["-e", "tensorrt"], "m3asr build"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(m3, folder, arguments, found):
    if "tensorrt" in arguments:
        pytest.importorskip("tensorrt_rtx")
    code, out, err = m3("verify", folder.path, *arguments)
    assert code == 2 and out == "" and found in err and len(err.splitlines()) == 1


def test_plot(m3, folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    code, _, _ = m3("verify", folder.path, "--plot", tmp_path / "errors.png")
    assert code == 0 and (tmp_path / "errors.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["errors.png"]


def test_parts():
    from m3asr.verify_plot import part_of

    paths = "cmvn", "encoder.subsampling.out.0", "encoder.embed.blocks.3.norm_ff", "encoder.blocks.0.experts"
    assert [part_of(path) for path in paths] == ["encoder in", "encoder in", "embed 3", "encoder 0"]
    assert part_of("encoder.after_norm") == "encoder out" and part_of("encoder.embed.after_norm") == "embed out"


def test_plot_of_failures(folder, reference, utterances, engine_of, tmp_path):
    pytest.importorskip("matplotlib")
    from m3asr.verify_plot import plot

    def change(state):
        state["encoder.blocks.1.norm_mha.bias"][0] = np.nan

    report = verify(folder, engine_of("eager", change), reference, utterances)
    plot(report, tmp_path / "nan.png")
    assert (tmp_path / "nan.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ModelError, match="nothing to plot"):
        plot(dataclasses.replace(report, layers={}), tmp_path / "none.png")


def test_missing_matplotlib(m3, folder, monkeypatch, tmp_path):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    code, out, err = m3("verify", folder.path, "--plot", tmp_path / "errors.png")
    assert code == 2 and out == "" and "pip install 'm3asr[plot]'" in err
