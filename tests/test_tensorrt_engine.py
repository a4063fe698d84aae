"""The model's TensorRT networks, interpreted, against the original code's numbers; plans really built."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from golden import GOLDEN, GOLDEN_NAMES, relative_error  # noqa: E402
from interpreter_tiles import few_programs  # noqa: E402, F401

from m3asr import trt  # noqa: E402
from m3asr.checkpoint import read_checkpoint  # noqa: E402
from m3asr.engines import tensorrt  # noqa: E402
from m3asr.engines.tensorrt_experts import experts  # noqa: E402
from m3asr.errors import ModelError  # noqa: E402
from m3asr.model import Model  # noqa: E402

INSTALLED = importlib.util.find_spec("tensorrt_rtx") is not None
needs_tensorrt = pytest.mark.skipif(not INSTALLED, reason="needs tensorrt_rtx: its network, builder or plugin object")
SMALL = [{"B": (1, 2, 4), "T": (7, 206, 600)}]


def golden_model(name):
    checkpoint = read_checkpoint(GOLDEN / name)
    model = Model(checkpoint.config).eval()
    model.load_state_dict(checkpoint.state)
    golden = np.load(GOLDEN / name / "golden.npz")
    features = golden["feats"] if "feats" in golden else golden["fbank"]
    return model, golden, features.astype(np.float32), golden["feat_lens"].astype(np.int32)


@pytest.fixture(scope="module")
def plain_network():
    """The encoder of 3m-moe-80 as it comes, for all who only interpret it: a trace takes seconds."""
    return tensorrt.trace_encoder(golden_model("3m-moe-80")[0], profiles=SMALL)


@needs_tensorrt
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden(name):
    """The hidden sequence of the original code, from the interpreted network; then other sizes on the same network."""
    model, golden, features, lengths = golden_model(name)
    network = tensorrt.trace_encoder(model, profiles=SMALL, compat=True)
    out = network.interpret({"feats": features, "lengths": lengths})
    valid = golden["encoder_out_lens"]
    assert out["out_lengths"].tolist() == valid.tolist()
    assert relative_error(out["hidden"].numpy(), golden["encoder_hidden"], valid) < 1e-5
    width = features.shape[2]
    for batch, frames in ((1, 7), (3, 95)):
        x = torch.randn(batch, frames, width)
        lens = torch.tensor([frames, 50, 7][:batch], dtype=torch.int32)
        got = network.interpret({"feats": x, "lengths": lens})
        with torch.no_grad():
            want = model(x, lens, compat=True)
        assert relative_error(got["log_probs"].numpy(), want[0].numpy(), want[2].tolist()) < 1e-5


@needs_tensorrt
def test_routing_in_float32_whatever_the_precision():
    model, _, features, lengths = golden_model("3m-moe-80")
    network = tensorrt.trace_encoder(model, profiles=SMALL, precision="fp16")
    kind = network.package.module.LayerType
    half, routers = 0, 0
    for i in range(len(network)):
        layer = network.network.get_layer(i)
        if layer.type == kind.MATRIX_MULTIPLY:
            router = layer.name.endswith("feed_forward/matmul/matrix_multiply")
            routers += router
            half += layer.get_output(0).dtype.name == "HALF"
            assert layer.get_output(0).dtype.name == ("FLOAT" if router else "HALF"), layer.name
        if layer.type in (kind.SOFTMAX, kind.NORMALIZATION, kind.TOPK):
            assert layer.get_output(0).dtype.name == "FLOAT", layer.name
    assert routers == len(model.encoder.blocks) and half > 20
    got = network.interpret({"feats": features, "lengths": lengths})
    with torch.no_grad():
        want = model(torch.from_numpy(features), torch.from_numpy(lengths))
    assert relative_error(got["hidden"].numpy(), want[1].numpy(), want[2].tolist()) < 1e-2


@pytest.mark.parametrize("form", ["layers", "plugin"])
@needs_tensorrt
def test_padded_and_constant_rows_make_no_nan(form, plain_network):
    """Silence, padding and constant rows pass norms, router and experts without a NaN, and change nothing else."""
    model, _, features, lengths = golden_model("3m-moe-80")
    plugin = form == "plugin"
    network = tensorrt.trace_encoder(model, profiles=SMALL, experts=form) if plugin else plain_network
    x = torch.zeros(3, 60, features.shape[2])
    x[0], x[1, :30] = 5.0, torch.randn(30, features.shape[2])
    x[1, 30:] = float("nan")
    lens = torch.tensor([60, 30, 0], dtype=torch.int32)
    out = network.interpret({"feats": x, "lengths": lens})
    assert all(out[n].isfinite().all() for n in ("log_probs", "hidden"))
    alone = network.interpret({"feats": x[1:2, :30], "lengths": lens[1:2]})
    kept = int(alone["out_lengths"])
    torch.testing.assert_close(out["hidden"][1:2, :kept], alone["hidden"][:, :kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, limit", [("int8", 0.1), ("fp8", 0.2)])
@needs_tensorrt
def test_quantised(kind, limit):
    model, _, features, lengths = golden_model("3m-moe-80")
    with pytest.raises(ModelError, match="calibration"):
        tensorrt.trace_encoder(model, profiles=SMALL, precision=kind)
    options = {"profiles": SMALL, "precision": kind, "calibration": [(features, lengths)]}
    network = tensorrt.trace_encoder(model, **options)
    got = network.interpret({"feats": features, "lengths": lengths})
    with torch.no_grad():
        want = model(torch.from_numpy(features), torch.from_numpy(lengths))
    assert 1e-4 < relative_error(got["hidden"].numpy(), want[1].numpy(), want[2].tolist()) < limit


@needs_tensorrt
def test_prior(tmp_path, plain_network):
    model, _, features, lengths = golden_model("3m-moe-80")
    size = model.config.vocab_size
    counts = np.arange(size + 1, dtype=np.float64)
    counts[3] = 0
    np.savetxt(tmp_path / "prior", counts)
    prior = tensorrt.read_prior(tmp_path / "prior", size)
    assert prior.shape == (size,) and abs(float(prior.sum()) - 1) < 1e-5 and float(prior[2]) == float(prior[0])
    plain, added = (
        network.interpret({"feats": features, "lengths": lengths})
        for network in (plain_network, tensorrt.trace_encoder(model, profiles=SMALL, prior=prior))
    )
    torch.testing.assert_close(added["log_probs"], plain["log_probs"] - prior.log(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="expected"):
        tensorrt.read_prior(tmp_path / "prior", size + 1)
    with pytest.raises(ModelError, match="readable"):
        tensorrt.read_prior(tmp_path / "missing", size)


@needs_tensorrt
def test_engine_and_decoders():
    model, _, features, lengths = golden_model("wenet-u2pp-80")
    engine = tensorrt.InterpretedEngine(model, profiles=SMALL)
    assert set(engine.networks) == {"encoder", "decoder", "reverse_decoder"}
    log_probs, hidden, out_lengths = engine(features, lengths)
    with torch.no_grad():
        want = model(torch.from_numpy(features), torch.from_numpy(lengths), compat=False)
    assert relative_error(log_probs, want[0].numpy(), want[2].tolist()) < 1e-5
    tokens = np.array([[1, 5, 9, 3], [1, 4, 4, 2]])
    first = hidden[:1, : out_lengths[0]], out_lengths[:1]
    got = engine.decode(*first, tokens, reversed_tokens=tokens)
    with torch.no_grad():
        exact = model.decode(*map(torch.from_numpy, first), *[torch.from_numpy(tokens)] * 2)
    for g, e in zip(got, exact, strict=True):
        np.testing.assert_allclose(g, e.numpy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="was built for"):
        engine(features, lengths, compat=True)
    assert engine(features[:0], lengths[:0])[0].shape == (0, 0, model.config.vocab_size)


@needs_tensorrt
def test_plans_are_really_built(tmp_path):
    model = golden_model("3m-moe-80")[0]
    built = tensorrt.build(
        lambda: model, "digest", tmp_path, precision="fp16", profiles=[*SMALL, {"B": (1, 1, 1), "T": (7, 90, 99)}]
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["plans"] == built and manifest["precision"] == "fp16" and len(manifest["profiles"]) == 2
    assert all((tmp_path / f"{n}.plan").stat().st_size == size > 10**5 for n, size in built.items())
    with pytest.raises(ModelError, match="unknown precision"):
        tensorrt.build(lambda: model, "digest", tmp_path, precision="int3")


EXPERTS, WIDTH, HIDDEN = 5, 24, 40


def expert_case(tokens, dtype, count=EXPERTS, width=WIDTH, hidden=HIDDEN):
    """Some tokens without an expert, some experts without a token."""
    idx = torch.randint(-1, count - 1, (tokens,), dtype=torch.int32)
    up = torch.randn(count, hidden, width) / width**0.5, torch.randn(count, hidden)
    down = torch.randn(count, width, hidden) / hidden**0.5, torch.randn(count, width)
    x, *weights = (t.to(dtype) for t in (torch.randn(tokens, width), *up, *down))
    return x, idx, *weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["swish", "relu"])
def test_expert_plugin(dtype, activation):
    """Few tokens and many, in Triton's interpreter, or with real device addresses where there is a GPU."""
    torch.manual_seed(0)
    cases = [expert_case(tokens, dtype) for tokens in (1, 37, 131)]
    trt.check_plugin(experts, cases, attributes={"activation": activation}, life_cycle=INSTALLED)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [51, 511, 2049, 6101])
def test_expert_plugin_at_full_width(dtype, tokens):
    """The original model's layer, 32 experts of 512 -> 1024 -> 512, tokens in odd numbers."""
    torch.manual_seed(0)
    case = expert_case(tokens, dtype, 32, 512, 1024)
    trt.check_plugin(experts, [case], attributes={"activation": "swish"}, life_cycle=INSTALLED)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [51, 1021])
def test_expert_plugin_in_a_cuda_graph(tokens):
    """Nothing waits for the device and nothing is allocated: the launches are captured and follow another routing."""
    torch.manual_seed(0)
    case = [t.cuda() for t in expert_case(tokens, torch.float16, 32, 512, 1024)]
    attributes = {"activation": "swish"}
    (out,) = experts.allocate(case, attributes)
    workspace = torch.empty(experts.workspace_bytes([t.shape for t in case]), dtype=torch.uint8, device="cuda")
    experts.launch_on(case, [out], attributes, workspace)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_allocated()
        experts.launch_on(case, [out], attributes, workspace)
        assert torch.cuda.memory_allocated() == before
    case[1].copy_(case[1].flip(0))
    graph.replay()
    want = experts.reference(*case, **attributes)
    assert (out - want).abs().max() <= 5e-3 * want.abs().max()
