"""The CUDA engine where programs work in clusters. Their kernels alone are tested everywhere (tests/kernels)."""

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from interpreter_tiles import few_programs  # noqa: E402, F401
from kernels.emulated import emulator  # noqa: E402

from m3asr.config import EncoderConfig, ModelConfig, MoEConfig  # noqa: E402
from m3asr.engines.cuda import CudaEngine  # noqa: E402
from m3asr.engines.cuda.clustered import ClusteredStack, Limits  # noqa: E402
from m3asr.engines.cuda.packing import EXPERTS_TYPES, TYPES, pack  # noqa: E402
from m3asr.kernels.clusters.products import MANY, SOME  # noqa: E402
from m3asr.model import Model  # noqa: E402


def config(blocks=(3, 2), experts=32, **changes) -> ModelConfig:
    shape = {"input_dim": 20, "attention_dim": 256, "attention_heads": 4, "linear_units": 512, **changes}
    embed = EncoderConfig(**shape, num_blocks=blocks[1])
    encoder = EncoderConfig(**shape, num_blocks=blocks[0], moe=MoEConfig(experts, 512), embed=embed)
    return ModelConfig(family="3m", vocab_size=37, encoder=encoder)


@torch.no_grad()
def model(config: ModelConfig) -> Model:
    torch.manual_seed(0)
    built = Model(config).eval()
    for name, value in built.named_parameters():
        if value.dim() > 1:
            value.normal_(0.0, (value.shape[-1] if "experts" in name else value[0].numel()) ** -0.5)
        if "router" in name:
            value.normal_()
    return built


def relative(value, reference) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize(
    "changes, tokens, frames, blocks, experts",
    [
        ({}, 64, 64, True, True),
        ({}, 112, 112, True, True),
        ({}, 128, 64, False, True),
        ({}, 256, 256, False, True),
        ({}, 272, 272, False, False),
        ({"cnn_module_norm": "batch_norm"}, 64, 64, True, True),
        ({"causal": True}, 64, 64, False, True),
        ({"activation_type": "gelu"}, 64, 64, False, False),
        ({"linear_units": 768}, 64, 64, False, True),
        ({"attention_dim": 320, "attention_heads": 5}, 64, 64, False, True),
    ],
)
def test_what_clusters_run(changes, tokens, frames, blocks, experts):
    config_ = config(**changes)
    packed = pack(config_, model(config_).state_dict(), "fp16", "cpu")
    stack = ClusteredStack(packed.weights.main, 32, torch.float16, torch.float16, load=lambda *_: None)
    limits = Limits()
    assert (stack.for_blocks(limits, tokens, frames, None) is not None) == blocks
    assert (stack.for_experts(limits, tokens) is not None) == experts
    assert stack.for_blocks(limits, tokens, frames, (4, 2)) is None
    assert stack.for_blocks(Limits(0, 0), tokens, frames, None) is None


@pytest.mark.parametrize(
    "changes, precision, most",
    [
        ({}, "fp8", 10**6),
        ({"causal": True}, "bf16", 10**6),
        ({"linear_units": 2048}, "bf16", 4096),  # a program keeps 32 columns of them, and many tokens would suffer
        ({}, "fp32", 0),
        ({"macaron_style": False}, "bf16", 0),
        ({"activation_type": "gelu"}, "bf16", 0),
        ({"attention_dim": 320, "attention_heads": 5}, "bf16", 0),
    ],
)
def test_what_pairs_run(changes, precision, most):
    config_ = config(blocks=(1, 1), **changes)
    packed = pack(config_, model(config_).state_dict(), precision, "cpu")
    stack = ClusteredStack(packed.weights.main, 32, TYPES[precision], EXPERTS_TYPES[precision], load=lambda *_: None)
    for tokens, cut in (
        (639, None),
        (640, SOME),
        (2559, SOME),
        (2560, MANY),
        (4096, MANY),
        (4097, MANY),
        (10**6, MANY),
    ):
        found = stack.for_products(Limits(), tokens)
        assert (found and found.sizes.cut) == (cut if tokens <= most else None)
    assert stack.for_products(Limits(products=math.inf), 10**6) is None


def test_blocks_in_pairs(tmp_path, few_programs):  # noqa: F811
    """A whole forward whose products are made by pairs of programs, on an emulated card, or by Triton with norms joined
    and a router of CUDA C++: the same but for rounding, and each block; the same bits when nobody watches, and
    the router counts for the sort.
    """
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    engine = CudaEngine(model(config(blocks=(1, 1), experts=4, linear_units=256)), "fp16", "cpu")
    forward, runs = engine.forward, []
    features, lengths = torch.randn(2, 31, 20), torch.tensor([31, 19], dtype=torch.int32)
    load = emulator(tmp_path, "emulated_warpgroups.h")
    stacks = forward.weights.main, forward.weights.embed
    forward.clustered = [ClusteredStack(stack, 4, torch.float16, torch.float16, load=load) for stack in stacks]
    for products, forward.joined in ((math.inf, (1, 0)), (math.inf, (1, 10**6)), (1, (1, 0))):
        forward.limits, traced = Limits(0, 0, products=products, router=1), []
        forward.trace = lambda kind, block, value, traced=traced: traced.append((kind, value.clone()))
        runs.append((forward(features, lengths)[1], traced))
    (reference, expected), *others = runs
    valid = torch.arange(reference.shape[1]) < torch.tensor([[7], [4]])
    for hidden, traced in others:
        assert not torch.equal(hidden, reference), "it was not run otherwise"
        assert relative(hidden[valid], reference[valid]) < 3e-3
        # Of the embedding network a block, of the main stack a routing and a block.
        assert [kind for kind, _ in expected] == [kind for kind, _ in traced] == ["blocks", "routes", "blocks"]
        for (kind, one), (_, two) in zip(expected, traced, strict=True):
            one, two = one[valid.flatten()], two[valid.flatten()]
            assert torch.equal(one, two) if kind == "routes" else relative(two, one) < 3e-3
    forward.trace = None
    assert torch.equal(forward(features, lengths)[1], hidden)


@pytest.fixture(scope="module")
def engines():
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).major != 9:
        pytest.skip("needs a Hopper GPU")
    built = model(config()).cuda()
    made = {}
    for precision in ("bf16", "fp16", "fp8"):
        made[precision] = CudaEngine(built, precision)
    return built, made


@pytest.mark.gpu
@pytest.mark.parametrize("precision, tolerance", [("bf16", 2e-2), ("fp16", 3e-3), ("fp8", 5e-2)])
@pytest.mark.parametrize("batch, frames", [(1, 206), (2, 90), (1, 500)])
def test_clusters_agree_with_single_launches(engines, precision, tolerance, batch, frames):
    engine = engines[1][precision]
    features = torch.randn(batch, frames, 20, device="cuda")
    lengths = torch.tensor([frames, frames // 2][:batch], dtype=torch.int32, device="cuda")
    results = []
    for limits in (
        Limits(0, 0, products=math.inf),
        Limits(block=0),
        Limits(),
        Limits(0, 0, products=1),
        Limits(0, 0, products=1, many=1),
    ):
        engine.forward.limits = limits
        engine.drop_graphs()
        results.append(engine(features, lengths)[1])
    usual = engine.forward.joined
    for router, engine.forward.joined in ((math.inf, (1, 10**6)), (1, (1, 10**6)), (1, usual)):
        engine.forward.limits = Limits(0, 0, products=math.inf, router=router)
        engine.drop_graphs()
        results.append(engine(features, lengths)[1])
    engine.forward.limits = Limits()
    engine.drop_graphs()
    valid = torch.arange(results[0].shape[1], device="cuda")[None] < engine.subsampled(frames)
    valid = valid.expand(batch, -1).clone()
    valid[1:, engine.subsampled(frames // 2) :] = False
    for result in results[1:]:
        # A token whose two best experts are close may go to the other one: of most it must not be so.
        errors = (result - results[0])[valid].norm(dim=1) / results[0][valid].norm(dim=1)
        assert float(errors.median()) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_weights_that_products_ask_for_ahead_change_nothing(engines, precision):
    engine = engines[1][precision]
    engine.forward.limits = Limits(0, 0)
    features = torch.randn(1, 206, 20, device="cuda")
    lengths = torch.tensor([206], dtype=torch.int32, device="cuda")
    results = []
    for fetches in (False, True, True):
        engine.forward.fetches = fetches
        engine.drop_graphs()
        results += [engine(features, lengths)[1] for _ in range(5)]
    engine.forward.limits = Limits()
    engine.drop_graphs()
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.gpu
def test_bits_do_not_depend_on_the_rest_of_a_batch(engines):
    engine = engines[1]["bf16"]
    features = torch.randn(2, 200, 20, device="cuda")
    lengths = torch.tensor([200, 131], dtype=torch.int32, device="cuda")
    size = engine.subsampled(131)
    both = engine(features, lengths)[1]
    other = engine(torch.randn(2, 200, 20, device="cuda").index_copy(0, torch.tensor([0], device="cuda"), features[1:]),
                   torch.tensor([131, 163], dtype=torch.int32, device="cuda"))[1]  # fmt: skip
    assert torch.equal(both[1, :size], other[0, :size])
    assert torch.equal(engine(features, lengths)[1][0], both[0])
