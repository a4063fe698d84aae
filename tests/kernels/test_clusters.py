"""The kernels whose programs form clusters: on the GPU as they are, elsewhere run by fibres on the CPU."""

from types import SimpleNamespace
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from emulated import emulator

from m3asr import ops
from m3asr.kernels.clusters import Clusters, Sizes
from m3asr.kernels.clusters.experts import Experts, ExpertSizes
from m3asr.kernels.clusters.machine import on_card

WIDTH, HIDDEN, HEADS, TAPS, EXPERTS = 256, 512, 4, 15, 32
EPS = 1e-12


def loader(folder, *headers):
    if torch.cuda.is_available():
        if torch.cuda.get_device_properties(0).major < 9:
            pytest.skip("no clusters before compute capability 9.0")
        return on_card
    return emulator(folder, *headers)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return loader(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def load_experts(tmp_path_factory):
    return loader(tmp_path_factory.mktemp("emulated"), "emulated_warpgroups.h")


@pytest.fixture
def clusters(load, device, request):
    def of(dtype):
        # The experts' input is float16, as for experts of 8 bits.
        sizes = Sizes(WIDTH, HIDDEN, HEADS, TAPS, EXPERTS, dtype == torch.float16, True, True)
        assert sizes.fit()
        made = Clusters(sizes, device, load)
        if device.type == "cpu":  # some tests with what is sent arriving at once, some as late as may be
            made.kernels.seed = crc32(request.node.name.encode()) % 4
        return made

    return of


# The emulated card is slow, and there float16 is tested by one of them.
TYPES = (torch.bfloat16, torch.float16) if torch.cuda.is_available() else (torch.bfloat16,)
kinds = pytest.mark.parametrize("dtype", TYPES)


@pytest.fixture
def layer(device):
    def of(columns, width, dtype, *groups):
        weight = (torch.randn(*groups, columns, width, device=device) / width**0.5).to(dtype)
        return SimpleNamespace(weight=weight, bias=torch.randn(*groups, columns, device=device) / 10)

    return of


def linear(x, layer):
    return x.double() @ layer.weight.double().t() + layer.bias.double()


def norm(x):
    return F.layer_norm(x.double(), x.shape[-1:], eps=EPS)


def pdl(device) -> bool:
    return device.type == "cuda"


@kinds
@pytest.mark.parametrize("prior", [False, True])
def test_feed_forward_qkv(clusters, layer, check, poisoned, device, dtype, prior):
    tokens, frames = 32, 16
    x = torch.randn(tokens, WIDTH, device=device)
    up, down, qkv = layer(HIDDEN, WIDTH, dtype), layer(WIDTH, HIDDEN, dtype), layer(3 * WIDTH, WIDTH, dtype)
    table, out = torch.randn(40, WIDTH, device=device).to(dtype), poisoned(tokens, 3 * WIDTH, dtype=dtype)
    prior = (torch.rand(WIDTH, device=device) + 0.5, torch.randn(WIDTH, device=device), 1e-5) if prior else None
    expected = x.double()
    if prior:
        expected = F.layer_norm(expected, (WIDTH,), *(p.double() for p in prior[:2]), prior[2])
    expected = expected + 0.5 * linear(F.silu(linear(norm(expected), up)), down)
    projected = linear(norm(expected), qkv)
    projected[:, WIDTH : 2 * WIDTH] += table[:frames].double().repeat(tokens // frames, 1)
    clusters(dtype).feed_forward_qkv(
        x,
        up,
        down,
        qkv,
        qkv.weight.float().sum(1),
        table,
        out,
        frames=frames,
        scale=0.5,
        eps=EPS,
        prior=prior,
        pdl=pdl(device),
    )
    check(x, expected, dtype)
    check(out, projected, dtype)


def test_feed_forward(clusters, layer, check, device):
    x = torch.randn(48, WIDTH, device=device)
    up, down = layer(HIDDEN, WIDTH, torch.float16), layer(WIDTH, HIDDEN, torch.float16)
    expected = x + 0.5 * linear(F.silu(linear(norm(x), up)), down)
    clusters(torch.float16).feed_forward(x, up, down, scale=0.5, eps=EPS, pdl=pdl(device))
    check(x, expected, torch.float16)


@kinds
@pytest.mark.parametrize("frames, lengths", [(16, (16, 9, 0)), (96, (83,)), (128, (128,))])
def test_attention_gated(clusters, layer, check, poisoned, device, dtype, frames, lengths):
    batch, tokens, head = len(lengths), len(lengths) * frames, WIDTH // HEADS
    qkv, x = torch.randn(tokens, 3 * WIDTH, device=device).to(dtype), torch.randn(tokens, WIDTH, device=device)
    lengths, key_bias = torch.tensor(lengths, device=device).int(), torch.randn(HEADS, frames + 7, device=device)
    out, gated, glu = layer(WIDTH, WIDTH, dtype), layer(2 * WIDTH, WIDTH, dtype), poisoned(tokens, WIDTH, dtype=dtype)
    q, k, v = (t.double().view(batch, frames, HEADS, head).transpose(1, 2) for t in qkv.chunk(3, -1))
    mask = ops.frame_mask(lengths, frames)
    scores = (q @ k.transpose(2, 3) + key_bias[:, None, :frames].double()) / head**0.5
    weights = scores.masked_fill(~mask[:, None, None], -1e300).softmax(-1) * mask[:, None, None]
    context = (weights @ v).transpose(1, 2).reshape(tokens, WIDTH)
    # Queries see nothing where all 16 rows of a cluster lie past the length.
    sees = (torch.arange(frames, device=device) // 16 * 16)[None] < lengths[:, None]
    expected = x + linear(context * sees.flatten()[:, None], out)
    z = linear(norm(expected), gated)
    glu_expected = z[:, ::2] * torch.sigmoid(z[:, 1::2]) * mask.flatten()[:, None]
    clusters(dtype).attention_gated(
        qkv, lengths, key_bias, x, out, gated, gated.weight.float().sum(1), glu, frames=frames, eps=EPS, pdl=pdl(device)
    )
    check(x, expected, dtype)
    check(glu, glu_expected, dtype)


@kinds
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("frames, lengths", [(16, (16, 5)), (48, (41,))])
def test_convolution(clusters, layer, check, poisoned, device, dtype, normed, frames, lengths):
    batch, tokens = len(lengths), len(lengths) * frames
    glu, x = torch.randn(tokens, WIDTH, device=device).to(dtype), torch.randn(tokens, WIDTH, device=device)
    taps, bias = torch.randn(TAPS, WIDTH, device=device) / 3, torch.randn(WIDTH, device=device)
    norm_of = (torch.rand(WIDTH, device=device) + 0.5, torch.randn(WIDTH, device=device), 1e-5) if normed else None
    out, lengths = layer(WIDTH, WIDTH, dtype), torch.tensor(lengths, device=device).int()
    router = SimpleNamespace(
        weight=torch.randn(WIDTH, EXPERTS, device=device) / 8, bias=torch.randn(EXPERTS, device=device)
    )
    heard = torch.randn(tokens, 3 * EXPERTS, device=device)[:, EXPERTS : 2 * EXPERTS]
    z = glu.double().view(batch, frames, WIDTH).transpose(1, 2)
    z = F.conv1d(z, taps.double().t()[:, None], bias.double(), padding=TAPS // 2, groups=WIDTH).transpose(1, 2)
    if normed:
        z = F.layer_norm(z, (WIDTH,), *(n.double() for n in norm_of[:2]), norm_of[2])
    mask = ops.frame_mask(lengths, frames).flatten()
    expected = x + linear(F.silu(z).flatten(0, 1), out) * mask[:, None]
    chances = (2 * norm(expected) @ router.weight.double() + router.bias + heard).softmax(-1)
    alone, options = x.clone(), {"frames": frames, "left": TAPS // 2, "pdl": pdl(device)}
    kernels = clusters(dtype)
    kernels.convolution(glu, taps, bias, norm_of, out, lengths, alone, **options)
    check(alone, expected, dtype)
    y, gate = poisoned(tokens, WIDTH, dtype=torch.float16), poisoned(tokens)
    idx = poisoned(tokens, dtype=torch.int32)
    kernels.convolution_router(
        glu,
        taps,
        bias,
        norm_of,
        out,
        lengths,
        x,
        router,
        router.weight.sum(0),
        heard,
        y,
        idx,
        gate,
        eps=EPS,
        scale=2.0,
        **options,
    )
    assert torch.equal(x, alone)
    check(y, norm(expected), dtype)
    top = chances.amax(-1)
    chosen = chances.gather(1, idx.clamp(min=0).long()[:, None])[:, 0]
    assert torch.equal(idx < 0, ~mask) and ((chosen > 0.97 * top) | ~mask).all()
    check(gate, chosen * mask, dtype)


ROUTINGS = ("spread", "one expert", "padding", "only padding", "few experts")
EIGHT_BITS = torch.float8_e4m3fn
EXPERT_CASES = [(128, 256, 48, kind, torch.bfloat16) for kind in ROUTINGS] + [
    (128, 256, 48, "few experts", torch.float16),
    (128, 256, 48, "few experts", EIGHT_BITS),
    (128, 256, 256, "few experts", torch.bfloat16),  # of one expert's tokens more than a part
    (64, 1088, 20, "few experts", torch.bfloat16),  # slices of 16 columns
    (320, 192, 33, "few experts", torch.bfloat16),  # warps without a part of the inner dimension
    (320, 192, 33, "few experts", EIGHT_BITS),
]
if torch.cuda.is_available():  # the emulated card is slow
    EXPERT_CASES += [
        (WIDTH, HIDDEN, 256, kind, dtype) for kind in ROUTINGS for dtype in (torch.bfloat16, torch.float16, EIGHT_BITS)
    ] + [(512, hidden, 240, "spread", dtype) for hidden in (1024, 2048) for dtype in (torch.bfloat16, EIGHT_BITS)]


def run_experts(load, layer, check, device, width, hidden, experts, tokens, kind, dtype, seeds=(0, 0)):
    """Twice and more, so that what programs told each other must be forgotten; the first time without gates."""
    inputs = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    sizes = ExpertSizes(width, hidden, experts, inputs == torch.float16, True, dtype.itemsize)
    assert sizes.fit()
    launcher = Experts(sizes, device, load)
    up, down = layer(hidden, width, inputs, experts), layer(width, hidden, inputs, experts)
    up.scale = down.scale = None
    weights = [up.weight, down.weight]
    if dtype == EIGHT_BITS:
        for i, part in enumerate((up, down)):
            part.scale = part.weight.float().abs().amax(-1) / 448
            part.weight = (part.weight.float() / part.scale[..., None]).to(dtype)
            weights[i] = part.weight.double() * part.scale[..., None].double()
    for repeat, seed in enumerate(seeds):
        if device.type == "cpu":
            launcher.kernels.seed = seed
        y, gate = torch.randn(tokens, width, device=device).to(inputs), torch.rand(tokens, device=device)
        idx = torch.randint(min(3, experts) if kind == "few experts" else experts, (tokens,), device=device)
        if kind == "one expert":
            idx[:] = experts - 1
        if kind in ("padding", "few experts"):
            idx[1::3] = -1
        if kind == "only padding":
            idx[:] = -1
        x = torch.randn(tokens, width, device=device)
        before, expected, valid = x.clone(), x.double(), idx >= 0
        factor = 0.5 * (gate if repeat else torch.ones_like(gate))
        if valid.any():
            layers = (t.double() for t in (weights[0], up.bias, weights[1], down.bias))
            expected[valid] += factor[valid, None] * ops.moe(y[valid].double(), idx[valid], *layers, "swish")
        launcher(y, idx.int(), gate if repeat else None, up, down, x, scale=0.5, pdl=pdl(device))
        check(x, expected, inputs)
        assert torch.equal(x[~valid], before[~valid])
    assert not launcher._state.any()


@pytest.mark.parametrize("width, hidden, tokens, kind, dtype", EXPERT_CASES)
def test_experts(load_experts, layer, check, device, width, hidden, tokens, kind, dtype):
    run_experts(load_experts, layer, check, device, width, hidden, EXPERTS, tokens, kind, dtype)


@pytest.mark.parametrize(
    "experts, tokens, dtype", [(4, 20, EIGHT_BITS), (32, 48, torch.float16), (2, 250, torch.float16)]
)
def test_experts_of_programs_at_once(load_experts, layer, check, device, experts, tokens, dtype):
    """Four programs take slices of each other, in whatever order their threads run."""
    if device.type == "cuda":
        pytest.skip("for the emulated card")

    def load(defined, files, device):
        return load_experts(
            defined.replace("#define PROGRAMS 1\n", "#define PROGRAMS 4\n#define AT_ONCE\n"), files, device
        )

    run_experts(load, layer, check, device, 64, 128, experts, tokens, "padding", dtype, seeds=range(4))


def test_order_of_threads_does_not_matter(clusters, layer, load, device):
    if device.type == "cuda":
        pytest.skip("for the emulated card")
    kernels, results = clusters(torch.bfloat16), []
    up, down, qkv = (layer(*s, torch.bfloat16) for s in ((HIDDEN, WIDTH), (WIDTH, HIDDEN), (3 * WIDTH, WIDTH)))
    x = torch.randn(16, WIDTH)
    emulated = load(*kernels.sizes.source(), device)
    for emulated.seed in range(4):
        mine, out = x.clone(), torch.empty(16, 3 * WIDTH, dtype=torch.bfloat16)
        kernels.feed_forward_qkv(
            mine, up, down, qkv, qkv.weight.float().sum(1), None, out, frames=16, scale=0.5, eps=EPS
        )
        results.append(torch.cat((mine, out.float()), 1))
    assert all(torch.equal(result, results[0]) for result in results)
