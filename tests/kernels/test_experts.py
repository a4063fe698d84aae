from itertools import product

import pytest
import torch

from m3asr import ops
from m3asr.engines.cuda.packing import _float8
from m3asr.kernels.expert_product import expert_product
from m3asr.kernels.pieces import Tile
from m3asr.kernels.sort import slots, sort_tokens

TYPES = [torch.float32, torch.bfloat16, torch.float16]
EXPERTS, WIDTH, HIDDEN = 5, 32, 48


def routing(kind: str, tokens: int, device) -> torch.Tensor:
    idx = torch.randint(EXPERTS, (tokens,), device=device)
    if kind == "one expert":
        idx[:] = 3
    elif kind == "an empty expert":
        idx[idx == 2] = 0
    elif kind == "padding":
        idx[1::3] = -1
    elif kind == "only padding":
        idx[:] = -1
    return idx.int()


class Layer:
    """Both products of a layer of experts, with a routing, and what they should make of x."""

    def __init__(self, kind: str, tokens: int, dtype, device):
        self.w_1 = (torch.randn(EXPERTS, HIDDEN, WIDTH, device=device) / 6).to(dtype)
        self.w_2 = (torch.randn(EXPERTS, WIDTH, HIDDEN, device=device) / 7).to(dtype)
        self.b_1, self.b_2 = (torch.randn(EXPERTS, n, device=device) for n in (HIDDEN, WIDTH))
        self.y, gate = torch.randn(tokens, WIDTH, device=device).to(dtype), torch.rand(tokens, device=device)
        self.x = torch.randn(tokens, WIDTH, device=device)
        self.expert_idx = routing(kind, tokens, device)
        self.valid = valid = self.expert_idx >= 0
        self.down = {"residual_scale": 0.5, "gate": gate}
        self.reference = self.x.double()
        if valid.any():
            weights = (t.double() for t in (self.w_1, self.b_1, self.w_2, self.b_2))
            result = ops.moe(self.y[valid].double(), self.expert_idx[valid].long(), *weights, "swish")
            self.reference[valid] += 0.5 * gate[valid].unsqueeze(-1) * result

    def run(self, h, slot_token, tile_expert, tile: Tile, **both):
        slots = (slot_token, tile_expert)
        expert_product(self.y, self.w_1, self.b_1, *slots, h, tile=tile, activation="swish", **both)
        expert_product(h, self.w_2, self.b_2, *slots, self.x, tile=tile, **self.down, **both)

    def check(self, check, dtype):
        check(self.x, self.reference, dtype)
        assert torch.equal(self.x[~self.valid].double(), self.reference[~self.valid])


KINDS = ["mixed", "one expert", "an empty expert", "padding", "only padding"]


def cases():
    """All of them on a GPU; the interpreter, which is slow, takes each routing in float32, each type once."""
    for kind, tokens, dtype in product(KINDS, [1, 37], TYPES):
        usual = dtype == torch.float32 and tokens == 37
        marks = () if usual or (kind == "mixed" and (tokens == 37 or dtype == torch.float32)) else pytest.mark.gpu
        yield pytest.param(dtype, tokens, kind, marks=marks, id=f"{dtype}-{tokens}-{kind}")


@pytest.mark.parametrize("dtype, tokens, kind", list(cases()))
def test_experts(device, options, check, poisoned, tile, dtype, tokens, kind):
    layer, both = Layer(kind, tokens, dtype, device), options(dtype)
    slot_token, tile_expert = slots(tokens, EXPERTS, 16, device)
    slot_token.fill_(10**6)
    tile_expert.fill_(10**6)
    sort_tokens(layer.expert_idx, slot_token, tile_expert, experts=EXPERTS, rows=16, tile=tile(n=16), pdl=both["pdl"])
    taken = slot_token.view(-1, 16)[tile_expert >= 0]
    assert sorted(taken[taken >= 0].tolist()) == layer.valid.nonzero().flatten().tolist()
    layer.run(poisoned(slot_token.numel(), HIDDEN, dtype=dtype), slot_token, tile_expert, tile(), **both)
    layer.check(check, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, stored", [(16, 0), (16, 2), (64, 0), (64, 2)])
def test_experts_by_programs_that_stay(device, options, check, poisoned, tile, kind, rows, stored):
    """As above, more tiles than programs, and fewer; what no slot holds is not read: h starts as NaN. stored: results
    go by the copy engine, two slices a tile. Of few rows the product is turned.
    """
    tokens, dtype = 70, torch.float16
    layer, both = Layer(kind, tokens, dtype, device), options(dtype)
    slot_token, tile_expert = slots(tokens, EXPERTS, rows, device)
    sort_tokens(layer.expert_idx, slot_token, tile_expert, experts=EXPERTS, rows=rows, tile=tile(n=32), pdl=both["pdl"])
    h = poisoned(slot_token.numel(), HIDDEN, dtype=dtype)
    columns = 64 if rows < 64 and device.type == "cuda" else 32 if stored else 16
    layer.run(h, slot_token, tile_expert, Tile(rows, columns, 32, stages=2, copied=1, stored=stored), **both)
    layer.check(check, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied, stored", [(0, 0), (1, 0), (1, 2)])
def test_experts_whose_results_stay_sorted(device, options, check, poisoned, tile, kind, copied, stored):
    tokens, dtype = 70, torch.float16
    layer, both = Layer(kind, tokens, dtype, device), options(dtype)
    slot_token, tile_expert = slots(tokens, EXPERTS, 64, device)
    token_slot = poisoned(tokens, dtype=torch.int32)
    sort_tokens(
        layer.expert_idx, slot_token, tile_expert, experts=EXPERTS, rows=64, tile=tile(n=32), token_slot=token_slot,
        pdl=both["pdl"],
    )  # fmt: skip
    assert torch.equal(token_slot == -1, ~layer.valid)
    h, out = (poisoned(slot_token.numel(), n, dtype=dtype) for n in (HIDDEN, WIDTH))
    how, places = Tile(64, 32, 32, stages=2, copied=copied, stored=stored), (slot_token, tile_expert)
    expert_product(layer.y, layer.w_1, layer.b_1, *places, h, tile=how, activation="swish", **both)
    expert_product(h, layer.w_2, layer.b_2, *places, out, tile=how, by_slot=True, **layer.down, **both)
    summand = torch.zeros(tokens, WIDTH, device=device)
    summand[layer.valid] = out[token_slot[layer.valid].long()].float()
    check(layer.x + summand, layer.reference, dtype)


def test_sorting_many_tokens(device, options, tile):
    tokens = 1000
    expert_idx = routing("padding", tokens, device)
    slot_token, tile_expert = slots(tokens, EXPERTS, 16, device)
    sort_tokens(expert_idx, slot_token, tile_expert, experts=EXPERTS, rows=16, tile=tile(n=256), pdl=False)
    groups = slot_token.view(-1, 16)
    for e in range(EXPERTS):
        mine = groups[tile_expert == e].flatten()
        assert mine[mine >= 0].tolist() == (expert_idx == e).nonzero().flatten().tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens, count_rows, parts", [(1, 16, 4), (300, 1, 2), (1000, 16, 5)])
def test_sorting_by_counts_is_sorting(device, options, poisoned, tile, kind, tokens, count_rows, parts):
    """More programs than counts, counts that no program's share divides, more than one step a program."""
    expert_idx = routing(kind, tokens, device)
    counts = torch.stack([torch.bincount(part[part >= 0], minlength=EXPERTS) for part in expert_idx.split(count_rows)])
    results = []
    for counted in (None, (counts.int(), count_rows)):
        slot_token, tile_expert = (poisoned(len(t), dtype=torch.int32) for t in slots(tokens, EXPERTS, 16, device))
        token_slot = poisoned(tokens, dtype=torch.int32)
        sort_tokens(
            expert_idx, slot_token, tile_expert, experts=EXPERTS, rows=16, tile=tile(n=64, parts=parts), counts=counted,
            token_slot=token_slot, pdl=options(torch.float32)["pdl"],
        )  # fmt: skip
        valid = expert_idx >= 0
        assert torch.equal(slot_token[token_slot[valid].long()], valid.nonzero().flatten().int())
        assert (token_slot[~valid] == -1).all()
        results.append((slot_token, tile_expert))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float8_weights_with_a_scale_for_each_row(device, options, check, poisoned, tile, dtype):
    tokens = 21
    rows = torch.logspace(-3, 3, HIDDEN, device=device)
    weight = (torch.randn(EXPERTS, HIDDEN, WIDTH, device=device) / 6 * rows.view(-1, 1)).double()
    packed = _float8(weight.float(), torch.randn(EXPERTS, HIDDEN, device=device) * rows)
    rounded = packed.weight.double() * packed.scale.unsqueeze(-1)
    # Three bits behind the point: a sixteenth at most, wherever the number is not tiny in its row.
    large = weight.abs() > packed.scale.unsqueeze(-1) * 0.02
    assert ((rounded - weight).abs() <= weight.abs() / 16)[large].all()
    y, expert_idx = torch.randn(tokens, WIDTH, device=device).to(dtype), routing("padding", tokens, device)
    valid = expert_idx >= 0
    chosen = expert_idx[valid].long()
    reference = (rounded[chosen] @ y[valid].double().unsqueeze(-1)).squeeze(-1) + packed.bias[chosen]
    both = {"weight_scale": packed.scale, **options(dtype)}
    slot_token, tile_expert = slots(tokens, EXPERTS, 16, device)
    sort_tokens(expert_idx, slot_token, tile_expert, experts=EXPERTS, rows=16, tile=tile(n=32), pdl=both["pdl"])
    h = poisoned(slot_token.numel(), HIDDEN)
    expert_product(y, packed.weight, packed.bias, slot_token, tile_expert, h, tile=tile(), **both)
    slot = (tile_expert >= 0).repeat_interleave(16) & (slot_token >= 0)
    out = poisoned(tokens, HIDDEN)
    out[slot_token[slot].long()] = h[slot]
    for columns in (slice(0, 8), slice(None), slice(-8, None)):  # each scale is right, not the largest alone
        check(out[valid][:, columns], reference[:, columns], factor=4.0)
