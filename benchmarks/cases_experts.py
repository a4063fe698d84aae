"""The cases of `benchmarks.kernels` that know experts: routing, sorting, each product, and both in one launch."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.case import (
    DTYPE,
    EXPERTS,
    ONE,
    PAIRS,
    TOGETHER,
    WIDTH,
    Case,
    grid,
    in_pairs,
    persistent,
    streams,
    tensor,
)
from m3asr.engines.cuda.packing import Linear
from m3asr.kernels.clusters.experts import Experts, ExpertSizes
from m3asr.kernels.expert_product import expert_product
from m3asr.kernels.pieces import Tile
from m3asr.kernels.router import route
from m3asr.kernels.sort import slots, sort_tokens
from m3asr.kernels.stream import to_stream


def routed(batch, frames, valid) -> torch.Tensor:
    """A choice of experts for each token, of as many as the engine hits with so many tokens (benchmarks.encoder)."""
    hit = {64: 14, 256: 28, 512: 31}.get(batch * frames, EXPERTS)
    idx = torch.randperm(EXPERTS, device="cuda")[torch.randint(hit, (batch, frames), device="cuda")]
    idx[:, valid:] = -1
    return idx.flatten().int()


def make_router(batch, frames, valid):
    tokens = batch * frames
    x, weight = tensor(tokens, WIDTH, dtype=torch.float32), tensor(WIDTH, EXPERTS, dtype=torch.float32)
    bias, heard = tensor(EXPERTS, dtype=torch.float32), tensor(tokens, 18 * EXPERTS, dtype=torch.float32)[:, :EXPERTS]
    lengths = torch.full((batch,), frames, dtype=torch.int32, device="cuda")
    y, gate = tensor(tokens, WIDTH), tensor(tokens, dtype=torch.float32)
    idx = torch.empty(tokens, device="cuda", dtype=torch.int32)
    if streams(tokens):
        pairs, (layer,) = in_pairs(tokens, 1024, [weight], bias)
        columns = x.unflatten(1, (-1, 64))
        parts = torch.stack((columns.mean(-1), columns.var(-1, correction=0) * 64), -1).transpose(0, 1).contiguous()
        stream = replace(to_stream(x, DTYPE, tile=ONE), parts=parts)
        # The weight's halves are made once, and not inside a graph.
        pairs.route(stream, layer, heard, lengths, y, idx, gate, frames=frames, eps=1e-12, scale=1.0)

    def launch(i, tile):
        if tile == PAIRS:
            pairs.route(stream, layer, heard, lengths, y, idx, gate, frames=frames, eps=1e-12, scale=1.0, pdl=True)
        else:
            route(x, weight, bias, heard, lengths, y, idx, gate, frames=frames, eps=1e-12, tile=tile, pdl=True)

    def reference():
        z = F.layer_norm(x, (WIDTH,))
        return torch.cat((torch.softmax(z @ weight + bias + heard, -1).amax(-1, keepdim=True), z), 1)

    return Case(
        launch,
        lambda: torch.cat((gate.unsqueeze(1), y), 1),
        reference,
        [
            *([PAIRS] if streams(tokens) else []),
            *grid((16, 32, 64), (1,), (4, 8), k=(64, 128), stages=(2, 3)),
            *grid((16,), (1,), (4, 8), k=(256,), stages=(2,)),
            *grid((16, 32), (1,), (4, 8), k=(512,), stages=(1,)),
            *grid((1,), (1,), (4, 8)),
        ],
        tokens * WIDTH * (5 if streams(tokens) else 6) + WIDTH * EXPERTS * 4,
        2 * tokens * WIDTH * EXPERTS,
        poison=gate,
    )


def make_experts(batch, frames, valid, hidden):
    """Both products in one launch."""
    tokens, copies, half = batch * frames, 3, DTYPE == torch.float16
    w_1 = tensor(copies, EXPERTS, hidden, WIDTH, scale=WIDTH**-0.5)
    w_2 = tensor(copies, EXPERTS, WIDTH, hidden, scale=hidden**-0.5)
    b_1, b_2 = (tensor(EXPERTS, n, dtype=torch.float32) for n in (hidden, WIDTH))
    layers = [(Linear(up, b_1), Linear(down, b_2)) for up, down in zip(w_1, w_2, strict=True)]
    y, x, gate = tensor(tokens, WIDTH), tensor(tokens, WIDTH, dtype=torch.float32), torch.rand(tokens, device="cuda")
    idx, out = routed(batch, frames, valid), x.clone()
    here = idx >= 0
    sizes = ExpertSizes(WIDTH, hidden, EXPERTS, half, swish=True, weight_bytes=DTYPE.itemsize)
    experts = Experts(sizes, torch.device("cuda", 0))

    def reference():
        z = x.clone()
        for e in idx[here].unique():
            rows = idx == e
            h = F.silu(y[rows].float() @ w_1[0, e].float().t() + b_1[e]).to(DTYPE).float()
            z[rows] += 0.5 * gate[rows, None] * (h @ w_2[0, e].float().t() + b_2[e])
        return z[here]

    hit = int(idx[here].unique().numel())
    return Case(
        lambda i, tile: experts(y, idx, gate, *layers[i], out, scale=0.5, pdl=True), lambda: out[here], reference,
        [TOGETHER], hit * hidden * WIDTH * 4 + tokens * (WIDTH * 10 + hidden * 4), 4 * tokens * hidden * WIDTH,
        prepare=lambda: out.copy_(x), copies=copies,
    )  # fmt: skip


def turned_experts(rows) -> list[Tile]:
    """Candidates whose operands are copied, for few rows a tile: then the product is turned."""
    cuts = [(64, 64, 4, 4), (64, 128, 4, 3), (64, 256, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4), (128, 128, 4, 2)]
    cuts += [(128, 128, 4, 3), (128, 64, 8, 3), (256, 64, 4, 3), (256, 64, 8, 3)]
    stored = [(64, 128, 4, 3), (128, 64, 4, 3), (128, 128, 4, 2)]
    tiles = [Tile(m, n, k, w, s, copied=4) for m in rows for n, k, w, s in cuts]
    return tiles + [Tile(m, n, k, w, s, copied=4, stored=1) for m in rows for n, k, w, s in stored]


def make_expert_product(batch, frames, valid, hidden, down):
    """One of the two products, of sorted tokens."""
    tokens = batch * frames
    columns, width = (WIDTH, hidden) if down else (hidden, WIDTH)
    copies = 3
    weights = tensor(copies, EXPERTS, columns, width, scale=width**-0.5)
    bias = tensor(EXPERTS, columns, dtype=torch.float32)
    a, idx, gate = tensor(tokens, width), routed(batch, frames, valid), torch.rand(tokens, device="cuda")
    here = idx >= 0
    x = tensor(tokens, WIDTH, dtype=torch.float32)
    sorts = {}
    made = {}

    def launch(i, tile):
        made["rows"] = tile.m
        by_slot = {"residual_scale": 0.5, "gate": gate, "by_slot": streams(tokens)}
        kwargs = by_slot if down else {"activation": "swish"}
        slot_token, tile_expert, sorted_a, out = sorts[tile.m]
        expert_product(
            sorted_a if down else a, weights[i], bias, slot_token, tile_expert, out, tile=tile, pdl=True, **kwargs
        )

    def prepare():
        for rows in (16, 32, 64, 128):
            slot_token, tile_expert = slots(tokens, EXPERTS, rows, "cuda")
            slot_token.fill_(-1)
            sort_tokens(idx, slot_token, tile_expert, experts=EXPERTS, rows=rows, tile=Tile(1, 1024), pdl=False)
            sorted_a = a[slot_token.clamp(min=0).long()] if down else a
            size = (slot_token.numel(), columns)
            adds = down and not streams(tokens)
            out = x.clone() if adds else torch.full(size, float("nan"), device="cuda", dtype=DTYPE)
            sorts[rows] = (slot_token, tile_expert, sorted_a, out)

    prepare()

    def result():
        slot_token, tile_expert, _, out = sorts[made["rows"]]
        if down and not streams(tokens):
            return out[here]
        taken = (slot_token.view(tile_expert.numel(), -1) >= 0) & (tile_expert >= 0).unsqueeze(1)
        taken = taken.flatten()
        found = torch.zeros(tokens, columns, device="cuda")
        found = found.index_copy_(0, slot_token[taken].long(), out[taken].float())
        return (x + found if down else found)[here]

    def reference():
        z = torch.zeros(tokens, columns, device="cuda")
        for e in range(EXPERTS):
            rows = idx == e
            z[rows] = a[rows].float() @ weights[0, e].float().t() + bias[e]
        z = (x + 0.5 * gate[:, None] * z) if down else F.silu(z)
        return z[here]

    hit = int(idx[here].unique().numel())
    candidates = (
        [
            *grid((64,), (128, 256), (4, 8), stages=(3, 4)),
            Tile(128, 128, warps=8),
            *(t for t in persistent() if t.m <= 128),
            *turned_experts((32,)),
        ]
        if tokens > 1024
        else grid((16, 32, 64), (64, 128), (4,), k=(64, 128), stages=(3, 4)) + turned_experts((16, 32))
    )
    return Case(
        launch, result, reference, candidates, hit * columns * width * 2 + tokens * 2 * (columns + width),
        2 * tokens * columns * width, prepare=prepare, copies=copies,
    )  # fmt: skip


def make_sort(batch, frames, valid):
    """The counts that tiles of several parts use are the router's, of 64 tokens each."""
    tokens, rows, count_rows = batch * frames, 128, 64
    idx = routed(batch, frames, valid)
    slot_token, tile_expert = slots(tokens, EXPERTS, rows, "cuda")
    one_hot = F.one_hot(idx.long() + 1, EXPERTS + 1)[:, 1:]
    counts = one_hot.view(-1, count_rows, EXPERTS).sum(1).int(), count_rows

    def launch(i, tile):
        sort_tokens(
            idx, slot_token, tile_expert, experts=EXPERTS, rows=rows, tile=tile, pdl=True,
            counts=counts if tile.parts > 1 else None,
        )  # fmt: skip

    candidates = grid((1,), (4096, 16384), (16,)) + grid((1,), (512, 1024, 2048), (4, 8), parts=(4, 8, 16))
    return Case(
        launch, lambda: slot_token[(tile_expert >= 0).repeat_interleave(rows) & (slot_token >= 0)],
        lambda: torch.cat([(idx == e).nonzero().flatten() for e in range(EXPERTS)]),
        candidates, tokens * 8, 0, prepare=lambda: (slot_token.fill_(-7), tile_expert.fill_(-7)),
    )  # fmt: skip
