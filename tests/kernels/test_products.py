"""Weight-stationary products by pairs of programs: on the GPU as they are, elsewhere run by fibres on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from emulated import Emulated, emulator
from test_clusters import layer, linear, norm, pdl  # noqa: F401

from m3asr import ops
from m3asr.kernels.clusters.products import Products, ProductSizes, on_card

EPS = 1e-12
GPU = torch.cuda.is_available()
TYPES = (torch.bfloat16, torch.float16) if GPU else (torch.bfloat16,)
kinds = pytest.mark.parametrize("dtype", TYPES)
# Less than a tile, a tile and a bit, more tiles than clusters, and on a card enough for many turns.
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
    def of(dtype, width=256, hidden=512):
        sizes = ProductSizes(width, hidden, dtype == torch.float16, True)
        assert sizes.fit()
        return Products(sizes, device, load)

    return of


def stream_of(x, products, layer):
    """x as a stream, made by a product that adds nothing."""
    layer.weight.zero_(), layer.bias.zero_()
    return products.add(torch.ones(x.shape, dtype=layer.weight.dtype, device=x.device), layer, x, scale=1.0, streams=True)


@kinds
@counts
@pytest.mark.parametrize("normed", [False, True])
def test_up(products, layer, check, poisoned, device, dtype, tokens, normed):
    x, up, out = torch.randn(tokens, 256, device=device) + 0.3, layer(512, 256, dtype), poisoned(tokens, 512, dtype=dtype)
    kernels = products(dtype)
    a = stream_of(x, kernels, layer(256, 256, dtype)) if normed else x.to(dtype)
    kernels.up(a, up, out, activation="swish", eps=EPS, pdl=pdl(device))
    check(out, F.silu(linear(norm(x) if normed else a, up)), dtype)


@kinds
@pytest.mark.parametrize("lengths", [(40, 23, 0), (150, 1, 149), (9,)])
def test_gated(products, layer, check, poisoned, device, dtype, lengths):
    frames = max(lengths) + 3
    tokens, mask = frames * len(lengths), torch.tensor(lengths, device=device).int()
    x, gate, out = torch.randn(tokens, 256, device=device), layer(512, 256, dtype), poisoned(tokens, 256, dtype=dtype)
    kernels = products(dtype)
    kernels.up(stream_of(x, kernels, layer(256, 256, dtype)), gate, out, glu=(mask, frames), eps=EPS, pdl=pdl(device))
    z, valid = linear(norm(x), gate), ops.frame_mask(mask, frames).flatten()[:, None]
    check(out, z[:, ::2] * torch.sigmoid(z[:, 1::2]) * valid, dtype)
    assert not out[~valid[:, 0]].any()


@kinds
@pytest.mark.parametrize("table", [False, True])
def test_keyed(products, layer, check, poisoned, device, dtype, table):
    frames, batch = 45, 3
    x, qkv = torch.randn(frames * batch, 256, device=device), layer(768, 256, dtype)
    out = poisoned(frames * batch, 768, dtype=dtype)
    positions = (torch.randn(frames + 2, 256, device=device).to(dtype), frames) if table else None
    kernels = products(dtype)
    kernels.up(stream_of(x, kernels, layer(256, 256, dtype)), qkv, out, table=positions, eps=EPS, pdl=pdl(device))
    expected = linear(norm(x), qkv)
    if table:
        expected[:, 256:512] += positions[0][:frames].double().repeat(batch, 1)
    check(out, expected, dtype)


@kinds
@counts
@pytest.mark.parametrize("inner", [256, 512, 1024])
@pytest.mark.parametrize("masked", [False, True])
def test_add(products, layer, check, device, dtype, tokens, inner, masked):
    x, a, down = torch.randn(tokens, 256, device=device), torch.randn(tokens, inner, device=device).to(dtype), None
    down = layer(256, inner, dtype)
    mask, valid = None, torch.ones(tokens, 1, device=device)
    if masked:
        mask = torch.tensor([tokens * 2 // 3], device=device).int(), tokens
        valid = ops.frame_mask(*mask).flatten()[:, None]
    expected = x + 0.5 * linear(a, down) * valid
    kernels = products(dtype, hidden=max(inner, 512))
    stream = kernels.add(a, down, x, scale=0.5, mask=mask, streams=True, pdl=pdl(device))
    check(x, expected, dtype, factor=0.5)
    check(stream.raw * (16 if dtype == torch.float16 else 1), expected, dtype)
    count = stream.parts.shape[0]
    assert count == 4, "parts of 64 columns"
    parts = expected.view(tokens, count, -1)
    check(stream.parts[..., 0].t(), parts.mean(-1), dtype, factor=2.0)
    check(stream.parts[..., 1].t(), ((parts - parts.mean(-1, keepdim=True)) ** 2).sum(-1), dtype)
    assert kernels.add(a, down, x, scale=0.5) is None
    check(x, expected + 0.5 * linear(a, down), dtype, factor=0.5)


def test_orders(products, layer, device):
    """Whatever thread runs first, every bit is the same."""
    dtype, found = TYPES[0], []
    kernels, up, x = products(dtype), layer(512, 256, dtype), torch.randn(300, 256, device=device).to(dtype)
    for Emulated.seed in range(4):
        out = torch.empty(300, 512, dtype=dtype, device=device)
        kernels.up(x, up, out, activation="swish")
        found.append(out)
    Emulated.seed = 0
    assert all(torch.equal(each, found[0]) for each in found)


def test_fit():
    assert ProductSizes(512, 1024, False, True).fit()
    for width, hidden in ((320, 1280), (384, 1536), (512, 2048), (1024, 1024)):
        assert not ProductSizes(width, hidden, False, True).fit()
