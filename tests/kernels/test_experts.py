from itertools import product

import pytest
import torch

from m3asr import ops
from m3asr.engines.cuda.packing import _float8
from m3asr.kernels.experts_few import experts_few
from m3asr.kernels.experts_many import experts_many, slots, sort_tokens
from m3asr.kernels.pieces import Tile

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


def cases():
    """All of them on a GPU; the interpreter, which is slow, takes each routing in float32, each type once."""
    kinds = ["mixed", "one expert", "an empty expert", "padding", "only padding"]
    for regime, kind, tokens, dtype in product(["few", "many"], kinds, [1, 37], TYPES):
        usual = dtype == torch.float32 and tokens == 37
        marks = () if usual or (kind == "mixed" and (tokens == 37 or dtype == torch.float32)) else pytest.mark.gpu
        yield pytest.param(dtype, tokens, kind, regime, marks=marks, id=f"{dtype}-{tokens}-{kind}-{regime}")


@pytest.mark.parametrize("dtype, tokens, kind, regime", list(cases()))
def test_experts(device, options, check, poisoned, tile, dtype, tokens, kind, regime):
    w_1 = (torch.randn(EXPERTS, HIDDEN, WIDTH, device=device) / 6).to(dtype)
    w_2 = (torch.randn(EXPERTS, WIDTH, HIDDEN, device=device) / 7).to(dtype)
    b_1, b_2 = torch.randn(EXPERTS, HIDDEN, device=device), torch.randn(EXPERTS, WIDTH, device=device)
    y, gate = torch.randn(tokens, WIDTH, device=device).to(dtype), torch.rand(tokens, device=device)
    x = torch.randn(tokens, WIDTH, device=device)
    expert_idx = routing(kind, tokens, device)
    valid = expert_idx >= 0
    reference = x.double()
    if valid.any():
        arguments = (t.double() for t in (w_1, b_1, w_2, b_2))
        result = ops.moe(y[valid].double(), expert_idx[valid].long(), *arguments, "swish")
        reference[valid] += 0.5 * gate[valid].unsqueeze(-1) * result
    both = options(dtype)
    down = {"residual_scale": 0.5, "gate": gate}
    if regime == "many":
        slot_token, tile_expert = slots(tokens, EXPERTS, 16, device)
        slot_token.fill_(10**6)
        tile_expert.fill_(10**6)
        sort_tokens(expert_idx, slot_token, tile_expert, experts=EXPERTS, rows=16, tile=tile(n=16), pdl=both["pdl"])
        taken = slot_token.view(-1, 16)[tile_expert >= 0]
        assert sorted(taken[taken >= 0].tolist()) == valid.nonzero().flatten().tolist()
        h = poisoned(slot_token.numel(), HIDDEN, dtype=dtype)
        experts_many(y, w_1, b_1, slot_token, tile_expert, h, tile=tile(), activation="swish", **both)
        experts_many(h, w_2, b_2, slot_token, tile_expert, x, tile=tile(), **down, **both)
    else:
        h = poisoned(tokens, HIDDEN, dtype=dtype)
        experts_few(y, w_1, b_1, expert_idx, h, tile=tile(k=32, stages=1), activation="swish", **both)
        experts_few(h, w_2, b_2, expert_idx, x, tile=tile(k=64, stages=1), **down, **both)
    check(x, reference, dtype)
    assert torch.equal(x[~valid].double(), reference[~valid])


@pytest.mark.parametrize("kind", ["mixed", "one expert", "an empty expert", "padding", "only padding"])
def test_experts_by_programs_that_stay(device, options, check, poisoned, tile, kind):
    """As above, more tiles than programs, and fewer; what no slot holds is not read: h starts as NaN."""
    tokens, rows, dtype = 70, 64 if device.type == "cuda" else 16, torch.float16
    w_1 = (torch.randn(EXPERTS, HIDDEN, WIDTH, device=device) / 6).to(dtype)
    w_2 = (torch.randn(EXPERTS, WIDTH, HIDDEN, device=device) / 7).to(dtype)
    b_1, b_2 = torch.randn(EXPERTS, HIDDEN, device=device), torch.randn(EXPERTS, WIDTH, device=device)
    y, gate = torch.randn(tokens, WIDTH, device=device).to(dtype), torch.rand(tokens, device=device)
    x = torch.randn(tokens, WIDTH, device=device)
    expert_idx = routing(kind, tokens, device)
    valid = expert_idx >= 0
    reference = x.double()
    if valid.any():
        arguments = (t.double() for t in (w_1, b_1, w_2, b_2))
        result = ops.moe(y[valid].double(), expert_idx[valid].long(), *arguments, "swish")
        reference[valid] += 0.5 * gate[valid].unsqueeze(-1) * result
    both, staying = options(dtype), Tile(rows, 16, 32, stages=2, copied=1)
    slot_token, tile_expert = slots(tokens, EXPERTS, rows, device)
    sort_tokens(expert_idx, slot_token, tile_expert, experts=EXPERTS, rows=rows, tile=tile(n=32), pdl=both["pdl"])
    h = poisoned(slot_token.numel(), HIDDEN, dtype=dtype)
    experts_many(y, w_1, b_1, slot_token, tile_expert, h, tile=staying, activation="swish", **both)
    experts_many(h, w_2, b_2, slot_token, tile_expert, x, tile=staying, residual_scale=0.5, gate=gate, **both)
    check(x, reference, dtype)
    assert torch.equal(x[~valid].double(), reference[~valid])


@pytest.mark.parametrize("columns", [16, 64])
@pytest.mark.parametrize("kind", ["mixed", "one expert", "padding", "only padding"])
def test_few_experts_whose_weights_are_copied(device, options, check, poisoned, kind, columns):
    tokens, dtype, both = 21, torch.float16, options(torch.float16)
    weight, bias = (torch.randn(EXPERTS, HIDDEN, WIDTH, device=device) / 6).to(dtype), torch.randn(EXPERTS, HIDDEN)
    bias, y = bias.to(device), torch.randn(tokens, WIDTH, device=device).to(dtype)
    out, gate = torch.randn(tokens, HIDDEN, device=device), torch.rand(tokens, device=device)
    expert_idx = routing(kind, tokens, device)
    valid, reference = expert_idx >= 0, out.double()
    chosen = expert_idx[valid].long()
    product = (weight[chosen].double() @ y[valid].double().unsqueeze(-1)).squeeze(-1) + bias[chosen]
    reference[valid] += 0.5 * gate[valid].double().unsqueeze(-1) * product
    copied = Tile(16, columns, 32, stages=1, copied=1)
    h = poisoned(tokens, HIDDEN, dtype=dtype)
    experts_few(y, weight, bias, expert_idx, h, tile=copied, activation="swish", **both)
    check(h[valid], torch.nn.functional.silu(product), dtype)
    experts_few(y, weight, bias, expert_idx, out, tile=copied, residual_scale=0.5, gate=gate, **both)
    check(out, reference, dtype)
    assert torch.equal(out[~valid].double(), reference[~valid])


def test_sorting_many_tokens(device, options, tile):
    tokens = 1000
    expert_idx = routing("padding", tokens, device)
    slot_token, tile_expert = slots(tokens, EXPERTS, 16, device)
    sort_tokens(expert_idx, slot_token, tile_expert, experts=EXPERTS, rows=16, tile=tile(n=256), pdl=False)
    groups = slot_token.view(-1, 16)
    for e in range(EXPERTS):
        mine = groups[tile_expert == e].flatten()
        assert mine[mine >= 0].tolist() == (expert_idx == e).nonzero().flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", ["few", "many"])
def test_float8_weights_with_a_scale_for_each_row(device, options, check, poisoned, tile, dtype, regime):
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
    if regime == "many":
        slot_token, tile_expert = slots(tokens, EXPERTS, 16, device)
        sort_tokens(expert_idx, slot_token, tile_expert, experts=EXPERTS, rows=16, tile=tile(n=32), pdl=both["pdl"])
        h = poisoned(slot_token.numel(), HIDDEN)
        experts_many(y, packed.weight, packed.bias, slot_token, tile_expert, h, tile=tile(), **both)
        slot = torch.where(tile_expert >= 0, 1, 0).repeat_interleave(16).bool()
        slot &= slot_token >= 0
        out = poisoned(tokens, HIDDEN)
        out[slot_token[slot].long()] = h[slot]
    else:
        out = poisoned(tokens, HIDDEN)
        experts_few(y, packed.weight, packed.bias, expert_idx, out, tile=tile(k=32, stages=1), **both)
    for columns in (slice(0, 8), slice(None), slice(-8, None)):  # each scale is right, not the largest alone
        check(out[valid][:, columns], reference[:, columns], factor=4.0)
