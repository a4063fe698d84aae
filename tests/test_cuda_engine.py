"""The CUDA engine against the PyTorch model: in Triton's interpreter without a GPU, for real with one (`-m gpu`)."""

import dataclasses
import weakref
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from interpreter_tiles import few_programs  # noqa: E402, F401

from m3asr.config import DecoderConfig, EncoderConfig, ModelConfig, MoEConfig  # noqa: E402
from m3asr.engines.cuda import CudaEngine  # noqa: E402
from m3asr.engines.cuda import engine as engine_module  # noqa: E402
from m3asr.engines.cuda import forward as forward_module  # noqa: E402
from m3asr.engines.cuda.buckets import bucket_batch, bucket_frames  # noqa: E402
from m3asr.engines.cuda.packing import _float8  # noqa: E402
from m3asr.errors import ModelError  # noqa: E402
from m3asr.model import Model  # noqa: E402

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}


def config(cmvn="before", decoder=None, vocab=37, embed=None, **changes) -> ModelConfig:
    small = {"input_dim": 20, "attention_dim": 32, "attention_heads": 2, "linear_units": 48, "num_blocks": 1}
    stack = EncoderConfig(**{**small, **{k: v for k, v in changes.items() if k != "moe"}})
    if "moe" in changes:
        inner = dataclasses.replace(stack, **(embed or {}))
        stack = dataclasses.replace(stack, num_blocks=2, moe=changes["moe"], embed=inner)
    return ModelConfig(family="3m", vocab_size=vocab, encoder=stack, decoder=decoder, cmvn=cmvn)


@torch.no_grad()
def model(config: ModelConfig, device="cpu") -> Model:
    torch.manual_seed(0)
    built = Model(config).eval()
    for name, value in [*built.named_parameters(), *built.named_buffers()]:
        if not value.dtype.is_floating_point:
            continue
        if name.endswith(("running_var", "istd")) or ("norm" in name and name.endswith("weight")):
            value.uniform_(0.7, 1.3)
        elif value.dim() == 1 or "pos_bias" in name or name.endswith("bias"):
            value.normal_(0.0, 0.2)
        elif "router" in name:
            value.normal_()
        else:
            value.normal_(0.0, (value.shape[-1] if "experts" in name else value[0].numel()) ** -0.5)
    return built.to(device)


def batch(frames=45, lengths=(45, 27), bins=20):
    generator = np.random.default_rng(1)
    return generator.standard_normal((len(lengths), frames, bins), np.float32), np.array(lengths, np.int32)


def relative(value, reference) -> float:
    return float(np.linalg.norm(value.astype(np.float64) - reference) / np.linalg.norm(reference))


def assert_same(engine, built, features, lengths, tolerance, **chunks):
    with torch.inference_mode():
        expected = built(torch.from_numpy(np.nan_to_num(features)), torch.from_numpy(lengths), **chunks)
    expected = [e.numpy() for e in expected]
    got = engine(features, lengths, **chunks)
    assert got[2].dtype == np.int32 and got[2].tolist() == expected[2].tolist()
    for value, reference in zip(got[:2], expected[:2], strict=True):
        assert value.dtype == np.float32 and value.shape == reference.shape
        assert np.isfinite(value).all()
        for b, length in enumerate(expected[2]):
            if length:
                error = relative(value[b, :length], reference[b, :length].astype(np.float64))
                assert error <= tolerance, f"utterance {b}: relative error {error:.1e}"
    return got


MOE = MoEConfig(num_experts=4, hidden_units=48)
CONFIGS = {
    "experts": config(moe=MOE),
    "experts, router bias, whole outputs": config(
        moe=MoEConfig(5, 40, router_with_bias=True, keep_expert_output=True), cmvn="inside"
    ),
    "other embedding network": config(
        moe=MOE, embed={"attention_dim": 48, "attention_heads": 3, "cnn_module_norm": "batch_norm", "linear_units": 20}
    ),
    "dense": config(),
    "dense, causal, chunks, cmvn inside": config(
        causal=True, cnn_module_kernel=8, use_dynamic_chunk=True, norm_eps=1e-5, cmvn="inside"
    ),
    "static chunks": config(static_chunk_size=3),
    "batch norm, relu, no macaron": config(cnn_module_norm="batch_norm", activation_type="relu", macaron_style=False),
    "no positions": config(pos_enc_layer_type="no_pos", selfattention_layer_type="selfattn", activation_type="gelu"),
    "no positions, rel_selfattn": config(pos_enc_layer_type="no_pos"),
    "conv2d6": config(input_layer="conv2d6"),
    "conv2d8, two channels": config(input_layer="conv2d8", input_dim=40, conv_subsample_in_ch=2),
    "odd widths": config(attention_dim=40, attention_heads=5, linear_units=36, cnn_module_kernel=7),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_model(device, name):
    built = model(CONFIGS[name])
    engine = CudaEngine(built, "fp32", device)
    bins = CONFIGS[name].encoder.input_dim
    chunks = {"chunk_size": 4, "left_chunks": 1} if CONFIGS[name].encoder.use_dynamic_chunk else {}
    assert_same(engine, built, *batch(bins=bins), TOLERANCE["fp32"], **chunks)


@pytest.mark.parametrize("joined", [(1, 10**6), (1, 0)], ids=["norms joined", "norms apart"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["experts", "batch norm, relu, no macaron"])
def test_half_precision(device, name, precision, joined):
    built = model(CONFIGS[name])
    engine = CudaEngine(built, precision, device)
    engine.forward.joined = joined
    assert_same(engine, built, *batch(), TOLERANCE[precision])


def test_the_best_path_without_log_probabilities(device):
    engine = CudaEngine(model(CONFIGS["experts"]), "fp16", device)
    graph = engine.graph_for(2, 45)
    with torch.inference_mode():
        graph.features.normal_()
        log_probs, *usual = engine.forward(graph.features, graph.lengths)
        nothing, *alone = engine.forward(graph.features, graph.lengths, best_alone=True)
    assert nothing is None
    for one, two in zip(usual[:-1], alone[:-1], strict=True):
        assert torch.equal(one, two)
    torch.testing.assert_close(usual[-1], alone[-1], atol=1e-5, rtol=1e-5)
    assert torch.equal(log_probs.argmax(-1), alone[-2].long())


def test_experts_in_eight_bits(device, monkeypatch):
    """The model whose experts have the rounded weights, but for float16 in front of them and bfloat16 elsewhere."""
    built = model(CONFIGS["experts"])
    with torch.no_grad():
        for block in built.encoder.blocks:
            # The norm is folded into the weights before they are rounded: here there is nothing to fold.
            block.norm_ff.weight.fill_(1.0)
            block.norm_ff.bias.zero_()
            for layer in (block.feed_forward.experts.w_1, block.feed_forward.experts.w_2):
                packed = _float8(layer.weight, layer.bias)
                rounded = packed.weight.float() * packed.scale.unsqueeze(-1)
                assert not torch.equal(rounded, layer.weight)
                layer.weight.copy_(rounded)
    engine = CudaEngine(built, "fp8", device)
    assert engine.forward.weights.main.blocks[0].up.weight.element_size() == 1
    inputs = []
    routed = forward_module.route
    monkeypatch.setattr(forward_module, "route", lambda *a, **k: (inputs.append(a[5].dtype), routed(*a, **k)))
    assert_same(engine, built, *batch(), TOLERANCE["bf16"])
    assert inputs and set(inputs) == {torch.float16}


def test_alone_and_in_any_batch_of_the_same_bucket(device):
    """Bit for bit on the GPU, and whatever stands in the padding."""
    built = model(CONFIGS["experts"])
    # The interpreter multiplies with numpy, whose sums depend on where a row stands: there, equal but for rounding.
    tolerance = 0.0 if device.type == "cuda" else 1e-6
    engine = CudaEngine(built, "bf16" if device.type == "cuda" else "fp32", device)
    features, lengths = batch(lengths=(33, 45))
    for b, length in enumerate(lengths):
        features[b, length:] = np.nan
    together = engine(features, lengths)
    swapped = engine(features[::-1], lengths[::-1])
    alone = engine(np.stack((features[0], features[0] * 0)), np.array([33, 0], np.int32))
    kept = together[2][0]
    for value, other, single in zip(together[:2], swapped[:2], alone[:2], strict=True):
        assert np.isfinite(value).all()
        assert relative(other[1, :kept], value[0, :kept].astype(np.float64)) <= tolerance
        assert relative(single[0, :kept], value[0, :kept].astype(np.float64)) <= tolerance


def test_all_tokens_on_one_expert(device):
    built = model(CONFIGS["experts, router bias, whole outputs"])
    with torch.no_grad():
        for block in built.encoder.blocks:
            block.feed_forward.router_bias[2] += 100.0
    assert_same(CudaEngine(built, "fp32", device), built, *batch(), TOLERANCE["fp32"])


def test_poisoned_memory_is_never_read(device, monkeypatch):
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.dtype.is_floating_point else made.fill_(10**6)

    built = model(CONFIGS["experts"])
    engine = CudaEngine(built, "fp32", device)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        patch.setattr(torch, "empty_like", lambda t: poisoned(t.shape, dtype=t.dtype, device=t.device))
        assert_same(engine, built, *batch(), TOLERANCE["fp32"])


@pytest.mark.parametrize("frames", [0, 3, 7, 8, 10, 11, 30])
def test_short_inputs(device, frames):
    built = model(CONFIGS["dense"])
    engine = CudaEngine(built, "fp32", device)
    features, lengths = batch(frames, (frames,))
    if frames < 7:
        log_probs, hidden, out_lengths = engine(features, lengths)
        assert out_lengths.tolist() == [0] and np.isfinite(log_probs).all() and np.isfinite(hidden).all()
    else:
        assert_same(engine, built, features, lengths, TOLERANCE["fp32"])


def test_empty_batch(device):
    engine = CudaEngine(model(CONFIGS["dense"]), "fp32", device)
    log_probs, hidden, lengths = engine(np.zeros((0, 30, 20), np.float32), np.zeros(0, np.int32))
    assert log_probs.shape == (0, 6, 37) and hidden.shape == (0, 6, 32) and lengths.shape == (0,)


@torch.inference_mode()
def test_what_the_benchmark_measures_errors_by(device, monkeypatch):
    """`benchmarks.encoder` times nothing that this finds wrong: each block alone, a run told the experts, and all."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from benchmarks.accuracy import Reference, check

    # PyTorch's convolutions on a card would have 10 bits, as `benchmarks.encoder` knows: 2e-4 where 1e-5 is asked.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    built = model(CONFIGS["experts"], device)
    features, lengths = (torch.from_numpy(given).to(device) for given in batch(lengths=(45,)))
    found = check(CudaEngine(built, "fp32", device), Reference(built, features, lengths), features, lengths)
    assert max(found["hidden_error_told"], *found["block_errors"], *found["own_block_errors"]) < TOLERANCE["fp32"]
    assert len(found["block_errors"]) == 3 and len(found["own_block_errors"]) == 1  # of the blocks behind a first one
    assert found["replay_equals_launches"] and found["lengths_right"]


def test_a_replay_equals_the_launches_and_shapes_come_and_go(device):
    """Two shapes alternate in one engine that keeps one graph; a longer one makes the tables grow."""
    built = model(CONFIGS["experts"])
    engine = CudaEngine(built, "bf16", device, graphs=1)
    engine._positions = 0
    long, short = batch(45, (45, 30)), batch(20, (20,))
    first = engine(*long)
    engine(*short)
    again = engine(*long)
    graph = engine.graph_for(2, 45)
    with torch.inference_mode():
        launched = engine.forward(graph.features, graph.lengths)
    for one, two, three in zip(first, again, launched[:3], strict=True):
        assert np.array_equal(one, two)
        three = three.cpu().numpy()[: one.shape[0]]
        assert np.array_equal(one, three[:, : one.shape[1]] if one.ndim > 1 else three)
    assert len(engine._graphs) == 1


def test_decoder(device):
    built = model(config(decoder=DecoderConfig(2, 40, 1, r_num_blocks=1)))
    engine = CudaEngine(built, "fp32", device)
    hidden = np.random.default_rng(0).standard_normal((1, 9, 32), np.float32)
    lengths, tokens = np.array([7], np.int32), np.array([[36, 4, 5, 6], [36, 2, 0, 0]])
    backwards = np.array([[36, 6, 5, 4], [36, 2, 0, 0]])
    got = engine.decode(hidden, lengths, tokens, reversed_tokens=backwards)
    with torch.inference_mode():
        arrays = (torch.from_numpy(a) for a in (hidden, lengths, tokens, backwards))
        expected = built.decode(*arrays)
    for value, reference in zip(got, expected, strict=True):
        assert relative(value, reference.double().numpy()) < 1e-5


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"cnn_module_kernel": 8}, "8 frames"),
        ({"input_dim": 40, "conv_subsample_in_ch": 3}, "3 channels"),
        ({"moe": MoEConfig(2, 48), "embed": {"embed": EncoderConfig(20, 32, 2, 1, 48)}}, "nests two"),
        ({"moe": MoEConfig(2, 48), "embed": {"input_layer": "conv2d6"}}, "conv2d6"),
    ],
)
def test_what_no_kernel_covers_is_refused_by_name(changes, named):
    from m3asr.engines.cuda.packing import check_supported

    with pytest.raises(ModelError, match=named):
        check_supported(config(**changes))
    with pytest.raises(ModelError, match="compat"):
        check_supported(dataclasses.replace(config(), compat=True))


def test_wrong_requests_get_a_sentence(device):
    built = model(CONFIGS["dense"])
    with pytest.raises(ModelError, match="int3"):
        CudaEngine(built, "int3", device)
    engine = CudaEngine(built, "fp32", device)
    with pytest.raises(ModelError, match="reads"):
        engine(np.zeros((1, 30, 19), np.float32), np.array([30], np.int32))
    with pytest.raises(ModelError, match="compat"):
        engine(*batch(), compat=True)


def test_buckets_hold_what_they_are_for():
    for size in [*range(700), 1000, 1025, 2049, 12345]:
        bucket = bucket_frames(size)
        assert bucket >= max(size, 1) and bucket_frames(bucket) == bucket and bucket - size <= max(16, size // 3)
    for size in range(1, 200):
        bucket = bucket_batch(size)
        assert size <= bucket <= max(1, size * 3 // 2) and bucket_batch(bucket) == bucket


@pytest.mark.parametrize("layer", ["conv2d", "conv2d6", "conv2d8"])
def test_every_number_of_frames_fits_its_bucket(device, layer):
    """Also those that the subsampling leaves over at the end: around each bucket's edge, all of them."""
    engine = CudaEngine(model(config(input_layer=layer, input_dim=40)), "fp32", device)
    encoder = engine.config.encoder
    edges = {bucket_frames(size) for size in range(1, 1100)}
    for edge in edges:
        first = (edge - 2) * encoder.subsampling_rate + encoder.min_frames
        for frames in range(first, first + 3 * encoder.subsampling_rate):
            for batch in (1, 2, 5, 48, 64):
                utterances, features, size = engine.bucket(batch, frames)
                assert utterances >= batch and features >= frames and size == bucket_frames(engine.subsampled(frames))
                assert engine.subsampled(features) == size


@pytest.mark.parametrize("frames", range(66, 73))
def test_frames_at_the_edge_of_a_bucket(device, frames):
    """16 subsampled frames come from 67 to 70 features, 17 from 71."""
    built = model(CONFIGS["dense"])
    engine = CudaEngine(built, "fp32", device)
    assert_same(engine, built, *batch(frames, (frames, frames - 2, frames - 5)), TOLERANCE["fp32"])


class Pools:
    """torch's rule: a pool lives from the first capture into it to the end of its last graph, and never again."""

    def __init__(self):
        self.used, self.made = {}, 0

    def handle(self):
        self.made += 1
        return self.made

    def graph(self, forward, batch, frames, bins, chunk, device, pool):
        assert self.used.get(pool) != 0, "use_count > 0 INTERNAL ASSERT FAILED"
        self.used[pool] = self.used.get(pool, 0) + 1
        captured = Graph()
        weakref.finalize(captured, self.end, pool)
        return captured

    def end(self, pool):
        self.used[pool] -= 1


class Graph:
    pass


@pytest.mark.parametrize("graphs", [1, 2, 3])
def test_graphs_come_and_go_in_pools_that_live(monkeypatch, graphs):
    """Evicted, dropped, and dropped while somebody still holds one."""
    monkeypatch.setattr(CudaEngine, "_hold_log_probs", lambda *_: None)
    engine = CudaEngine(model(CONFIGS["dense"]), "fp32", "cpu", graphs=graphs)
    pools = Pools()
    monkeypatch.setattr(engine_module, "EncoderGraph", pools.graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", pools.handle)
    engine._device = torch.device("cuda", 0)
    monkeypatch.setattr(CudaEngine, "_hold_positions", lambda *_: None)
    for frames in (40, 100, 200, 40, 300, 400):
        engine.graph_for(1, frames)
    engine.drop_graphs()
    held = engine.graph_for(1, 40)
    engine.drop_graphs()
    for frames in (40, 100, 40):
        engine.graph_for(2, frames)
    del held
    for frames in (40, 500, 600):
        engine.graph_for(2, frames)
    assert sum(pools.used.values()) == len(engine._graphs) == min(graphs, 3)
    if graphs > 1:
        assert pools.made == 3  # one from drop to drop: what an evicted graph took, the next one takes


def test_weights_beyond_the_range_of_float16_are_refused(device):
    """Also where only their product with the norm in front of them is."""
    built = model(CONFIGS["experts"])
    with torch.no_grad():
        built.state_dict()["encoder.blocks.0.norm_conv.weight"].mul_(1e6)
    with pytest.raises(ModelError, match="fp16 ends at 65504: use bf16"):
        CudaEngine(built, "fp16", device)
    assert CudaEngine(built, "bf16", device).precision == "bf16"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["experts", "other embedding network"])
def test_an_embedding_network_in_a_branch_of_its_own_changes_nothing(name):
    engine = CudaEngine(model(CONFIGS[name]), "bf16", "cuda")
    inputs = batch(), batch(20, (20,))
    engine.forward.beside = False
    expected = [engine(*given) for given in inputs]
    engine.forward.beside = True
    engine.drop_graphs()
    for _ in range(20):
        for given, outputs in zip(inputs, expected, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(engine(*given), outputs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [1, 2])
def test_captures_after_all_graphs_were_dropped(graphs):
    built = model(CONFIGS["experts"])
    engine = CudaEngine(built, "bf16", "cuda", graphs=graphs)
    long, short = batch(), batch(20, (20,))
    first = engine(*long)
    for _ in range(3):
        engine.drop_graphs()
        engine(*short)
        assert all(np.array_equal(a, b) for a, b in zip(engine(*long), first, strict=True))
