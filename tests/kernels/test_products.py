"""Weight-stationary products by pairs of programs: on the GPU as they are, elsewhere run by fibres on the CPU."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from emulated import Emulated, emulator
from streams import floats, stream_of

from m3asr import ops
from m3asr.kernels.clusters.machine import on_card
from m3asr.kernels.clusters.products import MANY, SOME, Products, ProductSizes, with_keys
from m3asr.kernels.epilogue import Unnormed

WIDTH, EPS = 256, 1e-12
GPU = torch.cuda.is_available()
TYPES = (torch.bfloat16, torch.float16) if GPU else (torch.bfloat16,)
kinds = pytest.mark.parametrize("dtype", TYPES)
cuts = pytest.mark.parametrize("cut", [MANY, SOME], ids=["many", "some"])
# Less than a tile, more tiles than clusters; and on a card a tile and a bit, and enough for many turns.
counts = pytest.mark.parametrize("tokens", [7, 450, 65, 5000][: 4 if GPU else 2])


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    if GPU:
        if torch.cuda.get_device_properties(0).major < 9:
            pytest.skip("no clusters before compute capability 9.0")
        return on_card
    return emulator(tmp_path_factory.mktemp("emulated"), "emulated_warpgroups.h")


@pytest.fixture
def products(load, device):
    def of(dtype, hidden=1024, experts=0, experts_dtype=None, cut=MANY):
        half = dtype == torch.float16
        sizes = ProductSizes(WIDTH, hidden, experts, half, (experts_dtype or dtype) == torch.float16, True, cut)
        assert sizes.fit()
        return Products(sizes, device, load)

    return of


@pytest.fixture
def layer(device):
    def of(columns, inner, dtype):
        weight = (torch.randn(columns, inner, device=device) / inner**0.5).to(dtype)
        return SimpleNamespace(weight=weight, bias=torch.randn(columns, device=device) / 10)

    return of


def linear(x, layer):
    return x.double() @ layer.weight.double().t() + layer.bias.double()


def norm(x):
    return F.layer_norm(x.double(), x.shape[-1:], eps=EPS)


@kinds
@cuts
@counts
@pytest.mark.parametrize("normed", [False, True])
def test_up(products, layer, check, poisoned, device, dtype, tokens, normed, cut):
    x, up = torch.randn(tokens, WIDTH, device=device) + 0.3, layer(512, WIDTH, dtype)
    x[5] = 3.3  # a constant row has no variance: its norm is zero
    a, out = stream_of(x, dtype) if normed else x.to(dtype), poisoned(tokens, 512, dtype=dtype)
    products(dtype, cut=cut).up(a, up, out, activation="swish", eps=EPS, pdl=GPU)
    check(out, F.silu(linear(norm(x) if normed else a, up)), dtype)


@kinds
@cuts
@pytest.mark.parametrize("lengths", [(40, 23, 0), (150, 1, 149), (9,)][: 3 if GPU else 2])
def test_gated(products, layer, check, poisoned, device, dtype, lengths, cut):
    frames = max(lengths) + 3
    tokens, lengths = frames * len(lengths), torch.tensor(lengths, device=device).int()
    x, gate, out = (
        torch.randn(tokens, WIDTH, device=device),
        layer(512, WIDTH, dtype),
        poisoned(tokens, WIDTH, dtype=dtype),
    )
    products(dtype, cut=cut).up(stream_of(x, dtype), gate, out, glu=(lengths, frames), eps=EPS, pdl=GPU)
    z, valid = linear(norm(x), gate), ops.frame_mask(lengths, frames).flatten()[:, None]
    check(out, z[:, ::2] * torch.sigmoid(z[:, 1::2]) * valid, dtype)
    assert not out[~valid[:, 0]].any()


@kinds
@cuts
@pytest.mark.parametrize("frames, batch", [(9, 30), (100, 5), (45, 3), (70, 1)][: 4 if GPU else 2])
@pytest.mark.parametrize("table", [False, True])
def test_qkv(products, layer, check, poisoned, device, dtype, frames, batch, table, cut):
    x, qkv = torch.randn(frames * batch, WIDTH, device=device), layer(3 * WIDTH, WIDTH, dtype)
    out, expected = poisoned(frames * batch, 3 * WIDTH, dtype=dtype), linear(norm(x), qkv)
    positions = torch.randn(frames + 2, WIDTH, device=device).to(dtype)
    if table:
        expected[:, WIDTH : 2 * WIDTH] += positions[:frames].double().repeat(batch, 1)
    options = {"table": (positions, frames) if table else None, "eps": EPS, "pdl": GPU}
    products(dtype, cut=cut).up(stream_of(x, dtype), qkv, out, **options)
    check(out, expected, dtype)


# tokens, inner, masked, cut; each width of the feed-forward is another compilation.
ADDED = [(450, 256, True, MANY), (450, 256, True, SOME), (65, 1024, False, SOME), (450, 768, True, MANY)]
ADDED += [(130, 2048, True, SOME)]
if GPU:
    ADDED = list(product([7, 65, 450, 5000], [256, 512, 768, 1024, 2048], [False, True], [MANY, SOME]))


@kinds
@pytest.mark.parametrize("tokens, inner, masked, cut", ADDED)
def test_add(products, layer, check, device, dtype, tokens, inner, masked, cut):
    x, a = torch.randn(tokens, WIDTH, device=device), torch.randn(tokens, inner, device=device).to(dtype)
    x *= torch.logspace(-2, 3, WIDTH, device=device)
    down, mask, before = layer(WIDTH, inner, dtype), None, stream_of(x, dtype)
    valid = torch.ones(tokens, 1, device=device)
    if masked:
        mask = torch.tensor([tokens * 2 // 3], device=device).int(), tokens
        valid = ops.frame_mask(*mask).flatten()[:, None]
    expected = floats(before).double() + 0.5 * linear(a, down) * valid
    kernels, options = (
        products(dtype, 1024 if inner == 256 else inner, cut=cut),
        {"scale": 0.5, "mask": mask, "pdl": GPU},
    )
    copies = [replace(before, raw=before.raw.clone(), low=before.low.clone(), parts=None) for _ in range(2)]
    stream = kernels.add(a, down, copies[0], **options)
    assert stream.raw is copies[0].raw and stream.low is copies[0].low
    wanted = stream_of(expected.float(), dtype, 32 if inner == 2048 else 64)
    check(floats(stream), expected, factor=20.0)
    check(stream.raw.float(), wanted.raw.float(), dtype)
    check(stream.parts, wanted.parts, factor=20.0)
    if masked:
        assert torch.equal(floats(stream)[~valid[:, 0].bool()], floats(before)[~valid[:, 0].bool()])
    assert kernels.add(a, down, copies[1], normed=False, **options).parts is None
    assert torch.equal(copies[1].raw, stream.raw) and torch.equal(copies[1].low, stream.low)


ROUTED = [(5, torch.bfloat16, torch.bfloat16), (32, torch.bfloat16, torch.float16)]
if GPU:
    ROUTED += product([1, 4, 32, 64], TYPES[:1], TYPES)
    ROUTED += product([1, 4, 32, 64], TYPES[1:], TYPES[1:])


@pytest.mark.parametrize("experts, dtype, experts_dtype", ROUTED)
@pytest.mark.parametrize("parts, rows, floats32", [(1, 16, 0), (4, 16, 0), (4, 64, 0), (4, 16, 1), (16, 16, 1)])
def test_route(products, monkeypatch, rows, check, poisoned, device, experts, dtype, experts_dtype, parts, floats32):
    monkeypatch.setattr("m3asr.kernels.clusters.products.MOST_SHARED", 150 if rows == 16 else 0)
    lengths = torch.tensor([45, 0, 17], device=device).int()
    frames, tokens = 50, 150
    x = torch.randn(tokens, WIDTH, device=device) + 2
    x = floats(stream_of(x, dtype))
    x[3] = 7.0  # no variance
    weight, bias = torch.randn(WIDTH, experts, device=device), torch.randn(experts, device=device)
    heard = torch.randn(tokens, 3 * experts, device=device)[:, experts : 2 * experts]
    y, gate = poisoned(tokens, WIDTH, dtype=experts_dtype), poisoned(tokens)
    expert_idx, counts = (
        poisoned(tokens, dtype=torch.int32),
        poisoned(-(-tokens // rows), experts, dtype=torch.int32),
    )
    stream = stream_of(x, dtype, WIDTH // parts)
    if floats32:
        stream = Unnormed(x, None, stream.parts, WIDTH // parts)
    products(dtype, 1024, experts, experts_dtype).route(
        stream, SimpleNamespace(weight=weight / 4, bias=bias), heard, lengths, y,
        expert_idx, gate, frames=frames, eps=EPS, scale=4.0, counts=counts, pdl=GPU,
    )  # fmt: skip
    chances = (norm(x) @ weight.double() + bias + heard).softmax(-1)
    valid = ops.frame_mask(lengths, frames).flatten()
    check(y, norm(x), experts_dtype)
    best, expected = chances.max(-1)
    assert torch.equal(expert_idx[valid].long(), expected[valid])
    assert (expert_idx[~valid] == -1).all() and not gate[~valid].any()
    check(gate[valid], best[valid], factor=2.0)
    for i, chosen in enumerate(expert_idx.split(rows)):
        assert counts[i].tolist() == [int((chosen == e).sum()) for e in range(experts)]


def test_the_first_expert_wins_a_tie(products, poisoned, device):
    x, dtype = torch.randn(9, WIDTH, device=device), TYPES[0]
    layer = SimpleNamespace(weight=torch.randn(WIDTH, 1, device=device).expand(-1, 32).contiguous())
    layer.bias = torch.tensor([0.0, 1, 2, -1] * 8, device=device)
    y, gate, expert_idx = poisoned(9, WIDTH, dtype=dtype), poisoned(9), poisoned(9, dtype=torch.int32)
    products(dtype, 1024, 32, torch.float16).route(
        stream_of(x, dtype), layer, torch.zeros(9, 32, device=device), torch.tensor([9], device=device).int(), y.half(),
        expert_idx, gate, frames=9, eps=EPS, scale=1.0, pdl=GPU,
    )  # fmt: skip
    assert expert_idx.tolist() == [2] * 9


@cuts
def test_orders(products, layer, device, cut):
    """Whatever runs first, every bit is the same; and a row's do not depend on where it stands."""
    dtype, found = TYPES[0], []
    kernels, up, down = products(dtype, cut=cut), layer(1024, 256, dtype), layer(256, 1024, dtype)
    a, x = torch.randn(300, 256, device=device).to(dtype), torch.randn(300, 256, device=device)
    for Emulated.seed, first in ((0, 0), (1, 0), (2, 77)):
        h = torch.empty(300 - first, 1024, dtype=dtype, device=device)
        kernels.up(a[first:].contiguous(), up, h, activation="swish")
        found.append(floats(kernels.add(h, down, stream_of(x[first:], dtype), scale=0.5)))
    Emulated.seed = 0
    assert all(torch.equal(new, found[0][-len(new) :]) for new in found)


def test_fit():
    assert ProductSizes(512, 1024, 32, False, False, True).fit()
    for width, hidden, experts in ((320, 1280, 4), (384, 1536, 4), (512, 4096, 4), (1024, 1024, 4), (512, 1024, 65)):
        assert not ProductSizes(width, hidden, experts, False, False, True).fit()


def test_keys_get_more_clusters():
    assert with_keys(66, 6, 255) == (10, 3)
    assert with_keys(66, 6, 2) == (2, 0)  # no more than there are tiles
    assert with_keys(3, 6, 255) == (1, 0)
