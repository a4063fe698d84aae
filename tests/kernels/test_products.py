"""Weight-stationary products by pairs of programs: on the GPU as they are, elsewhere run by fibres on the CPU."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from emulated import Emulated, emulator

from m3asr import ops
from m3asr.kernels.clusters.products import Products, ProductSizes, Stream, on_card, shares

WIDTH, EPS = 256, 1e-12
GPU = torch.cuda.is_available()
TYPES = (torch.bfloat16, torch.float16) if GPU else (torch.bfloat16,)
kinds = pytest.mark.parametrize("dtype", TYPES)
# Less than a tile, a tile and a bit, more tiles than clusters; and on a card enough for many turns.
counts = pytest.mark.parametrize("tokens", [7, 65, 450] + [5000] * GPU)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    if GPU:
        if torch.cuda.get_device_properties(0).major < 9:
            pytest.skip("no clusters before compute capability 9.0")
        return on_card
    return emulator(tmp_path_factory.mktemp("emulated"), "emulated_warpgroups.h")


@pytest.fixture
def products(load, device):
    def of(dtype, hidden=512):
        sizes = ProductSizes(WIDTH, hidden, dtype == torch.float16, True)
        assert sizes.fit()
        return Products(sizes, device, load)

    return of


@pytest.fixture
def layer(device):
    def of(columns, inner, dtype):
        weight = (torch.randn(columns, inner, device=device) / inner**0.5).to(dtype)
        return SimpleNamespace(weight=weight, bias=torch.randn(columns, device=device) / 10)

    return of


@pytest.fixture
def zeros(device):
    return lambda tokens: torch.zeros(Products.counts_for(tokens), dtype=torch.int32, device=device)


def linear(x, layer):
    return x.double() @ layer.weight.double().t() + layer.bias.double()


def norm(x):
    return F.layer_norm(x.double(), x.shape[-1:], eps=EPS)


def stream_of(x, dtype) -> Stream:
    parts = x.view(x.shape[0], -1, 64)
    mean = parts.mean(-1)
    squares = ((parts - mean[..., None]) ** 2).sum(-1)
    raw = (x / 16 if dtype == torch.float16 else x).to(dtype)
    return Stream(raw, torch.stack((mean.t(), squares.t()), -1).contiguous())


@kinds
@counts
@pytest.mark.parametrize("hidden", [256, 512, 1024])
@pytest.mark.parametrize("normed", [False, True])
def test_feed_forward(products, layer, zeros, check, device, dtype, tokens, hidden, normed):
    x = torch.randn(tokens, WIDTH, device=device) + 0.3
    up, down = layer(hidden, WIDTH, dtype), layer(WIDTH, hidden, dtype)
    a = stream_of(x, dtype) if normed else torch.randn(tokens, WIDTH, device=device).to(dtype)
    expected = x + 0.5 * linear(F.silu(linear(norm(x) if normed else a, up)), down)
    products(dtype, hidden).feed_forward(a, up, down, x, zeros(tokens), scale=0.5, eps=EPS, pdl=GPU)
    check(x, expected, dtype)


@kinds
@pytest.mark.parametrize("frames, batch", [(45, 3), (70, 1), (9, 30)])
@pytest.mark.parametrize("table", [False, True])
def test_feed_forward_qkv(products, layer, zeros, check, poisoned, device, dtype, frames, batch, table):
    tokens = frames * batch
    x, a = (torch.randn(tokens, WIDTH, device=device) for _ in range(2))
    a, out = a.to(dtype), poisoned(tokens, 3 * WIDTH, dtype=dtype)
    up, down, qkv = layer(512, WIDTH, dtype), layer(WIDTH, 512, dtype), layer(3 * WIDTH, WIDTH, dtype)
    expected = x + 0.5 * linear(F.silu(linear(a, up)), down)
    projected = linear(norm(expected), qkv)
    positions = torch.randn(frames + 2, WIDTH, device=device).to(dtype) if table else None
    if table:
        projected[:, WIDTH : 2 * WIDTH] += positions[:frames].double().repeat(batch, 1)
    products(dtype).feed_forward(
        a, up, down, x, zeros(tokens), scale=0.5, qkv=(qkv, out, positions), frames=frames, eps=EPS, pdl=GPU
    )
    check(x, expected, dtype)
    check(out, projected, dtype)


@kinds
@counts
@pytest.mark.parametrize("masked", [False, True])
def test_add(products, layer, zeros, check, device, dtype, tokens, masked):
    x, a = torch.randn(tokens, WIDTH, device=device), torch.randn(tokens, WIDTH, device=device).to(dtype)
    out, lengths, valid = layer(WIDTH, WIDTH, dtype), None, torch.ones(tokens, 1, device=device)
    if masked:
        lengths = torch.tensor([tokens * 2 // 3], device=device).int()
        valid = ops.frame_mask(lengths, tokens).flatten()[:, None]
    before, expected = x.clone(), x + 0.5 * linear(a, out) * valid
    kernels, options = products(dtype), {"scale": 0.5, "lengths": lengths, "frames": tokens, "pdl": GPU}
    stream = kernels.add(a, out, x, zeros(tokens), streams=True, **options)
    check(x, expected, dtype, factor=0.5)
    check(stream.raw * (16 if dtype == torch.float16 else 1), expected, dtype)
    wanted = stream_of(expected, dtype).parts
    check(stream.parts[..., 0], wanted[..., 0], dtype, factor=2.0)
    check(stream.parts[..., 1], wanted[..., 1], dtype)
    assert kernels.add(a, out, before, zeros(tokens), **options) is None
    assert torch.equal(before, x)


@kinds
@pytest.mark.parametrize("lengths", [(40, 23, 0), (150, 1, 149), (9,)])
def test_add_gated(products, layer, zeros, check, poisoned, device, dtype, lengths):
    frames = max(lengths) + 3
    tokens, lengths = frames * len(lengths), torch.tensor(lengths, device=device).int()
    x, a = torch.randn(tokens, WIDTH, device=device), torch.randn(tokens, WIDTH, device=device).to(dtype)
    out, gate, glu = layer(WIDTH, WIDTH, dtype), layer(2 * WIDTH, WIDTH, dtype), poisoned(tokens, WIDTH, dtype=dtype)
    expected = x + linear(a, out)
    z, valid = linear(norm(expected), gate), ops.frame_mask(lengths, frames).flatten()[:, None]
    products(dtype).add(
        a, out, x, zeros(tokens), scale=1.0, frames=frames, gated=(gate, glu, lengths), eps=EPS, pdl=GPU
    )
    check(x, expected, dtype)
    check(glu, z[:, ::2] * torch.sigmoid(z[:, 1::2]) * valid, dtype)
    assert not glu[~valid[:, 0]].any()


def test_orders(products, layer, zeros, device):
    """Whatever runs first, every bit is the same; and a row's do not depend on where it stands."""
    dtype, found = TYPES[0], []
    kernels, up, down, qkv = products(dtype), *(layer(*s, dtype) for s in ((512, 256), (256, 512), (768, 256)))
    a, x = torch.randn(300, 256, device=device).to(dtype), torch.randn(300, 256, device=device)
    for Emulated.seed, first in ((0, 0), (1, 0), (2, 0), (3, 77)):
        out, new = torch.empty(300 - first, 768, dtype=dtype, device=device), x[first:].clone()
        kernels.feed_forward(
            a[first:].contiguous(), up, down, new, zeros(300 - first), scale=0.5, qkv=(qkv, out, None), eps=EPS
        )
        found.append((new, out))
    Emulated.seed = 0
    for new, out in found:
        rows = len(new)
        assert torch.equal(new, found[0][0][-rows:]) and torch.equal(out, found[0][1][-rows:])


def test_fit():
    assert ProductSizes(512, 1024, False, True).fit()
    for width, hidden in ((320, 1280), (384, 1536), (512, 2048), (1024, 1024)):
        assert not ProductSizes(width, hidden, False, True).fit()


def test_shares():
    def part(columns, each, cost):
        return SimpleNamespace(columns=each, cost=cost, task=SimpleNamespace(columns=columns))

    three = [part(1024, 128, 1.0), part(512, 64, 1.0), part(1536, 128, 1.0)]
    assert shares(66, three, 255) == [20, 20, 24]
    assert shares(66, three, 2) == [8, 8, 12]  # no more than there are tiles
    assert shares(3, three, 255) == [4, 4, 6]  # one each at least
