"""What `benchmarks.kernels` runs: each kernel with its data, a reference in torch, its bytes and its arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F

from m3asr import ops
from m3asr.engines.cuda.tiles import tiles_for
from m3asr.kernels.attention import attention
from m3asr.kernels.best import best_path
from m3asr.kernels.depthwise import depthwise
from m3asr.kernels.experts_few import experts_few
from m3asr.kernels.experts_many import experts_many, slots, sort_tokens
from m3asr.kernels.linear import LIBRARY, linear
from m3asr.kernels.log_softmax import log_softmax
from m3asr.kernels.norm import norm
from m3asr.kernels.norm_linear import norm_linear
from m3asr.kernels.pieces import Tile
from m3asr.kernels.router import route
from m3asr.kernels.subsampling import first_convolution, next_convolution

# input -> (utterances, subsampled frames of the bucket, valid frames)
SHAPES = {
    "1x206": (1, 64, 50),
    "1x1024": (1, 256, 255),
    "1x2048": (1, 512, 511),
    "16x1024": (16, 256, 255),
    "64x1024": (64, 256, 255),
}
# Cases whose kernels are for many tokens alone.
ONLY_MANY = ("norm", "sort", "best")
WIDTH, HEADS, EXPERTS, VOCABULARY, BINS, TAPS = 512, 8, 32, 5537, 40, 15
DTYPE = torch.bfloat16


@dataclass
class Case:
    """One kernel at one size. `launch(i, tile)` runs it with the i-th weights; `prepare` makes its output afresh;
    `result` is what to compare with `reference` after `prepare(); launch(0, tile)`."""

    launch: Callable
    result: Callable
    reference: Callable
    tiles: list[Tile]
    bytes: float
    flops: float
    prepare: Callable = lambda: None
    copies: int = 1
    poison: torch.Tensor | None = None  # an output that is only written


def tensor(*shape, dtype=DTYPE, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def copies_for(size: int) -> int:
    """Enough weights to overflow the L2 cache, within reason."""
    return max(2, min(64, int(160e6 / size)))


def grid(rows, columns, warps, k=(64,), stages=(1,), parts=(1,)) -> list[Tile]:
    return [Tile(m, n, kk, w, s, p) for m, n, kk, w, s, p in product(rows, columns, k, warps, stages, parts)]


def few_rows(tokens: int) -> tuple[int, ...]:
    return (16,) if tokens <= 64 else (16, 32, 64)


def products(tokens: int) -> list[Tile]:
    """Candidates for a product of many tokens, the library's among them."""
    if tokens <= 1024:
        tiles = grid((16, 32), (32, 64, 128), (4,), k=(64, 128), stages=(3, 4))
        return [LIBRARY, *tiles, *grid((64,), (32, 64, 128), (4,), k=(64,), stages=(3, 4))]
    kept = [(128, 256, 8), (128, 128, 4), (128, 128, 8), (128, 64, 8), (64, 128, 4)]
    return [LIBRARY, *(Tile(m, n, 64, warps, 3) for m, n, warps in kept), *persistent()]


def persistent() -> list[Tile]:
    """Candidates whose programs stay."""
    return [
        *(Tile(128, 256, warps=8, stages=s, copied=1, stored=n) for s, n in ((3, 2), (3, 4), (4, 4))),
        *(Tile(128, 128, warps=4, stages=s, copied=2, stored=n) for s, n in ((2, 2), (3, 2), (3, 4))),
        *(Tile(128, 128, warps=8, stages=s, copied=c, stored=4) for s, c in ((3, 2), (4, 1))),
        *(Tile(64, 256, warps=4, stages=2, copied=2, stored=n) for n in (2, 4)),
        Tile(256, 128, warps=8, stages=3, copied=1, stored=4),
        Tile(128, 64, warps=4, stages=4, copied=2, stored=2),
        # Results stored by the threads.
        Tile(128, 256, warps=8, stages=3, copied=1),
        Tile(128, 128, warps=8, stages=4, copied=1),
        *(Tile(128, 64, warps=4, stages=s, copied=2) for s in (3, 4)),
        Tile(64, 128, warps=4, stages=3, copied=2),
    ]


def make_up(batch, frames, valid, hidden, kind, few):
    """Feed-forward up, QKV or the gated pointwise layer: with the norm inside for few tokens."""
    tokens = batch * frames
    columns = {"up": hidden, "qkv": 3 * WIDTH, "gated": 2 * WIDTH}[kind]
    copies = copies_for(columns * WIDTH * 2)
    weights, bias = tensor(copies, columns, WIDTH, scale=WIDTH**-0.5), tensor(columns, dtype=torch.float32)
    x = tensor(tokens, WIDTH, dtype=torch.float32)
    y = F.layer_norm(x, (WIDTH,)).to(DTYPE)
    out_columns = WIDTH if kind == "gated" else columns
    out = torch.empty(tokens, out_columns, device="cuda", dtype=DTYPE)
    lengths = torch.full((batch,), valid, dtype=torch.int32, device="cuda")
    table = tensor(1024, WIDTH)
    options = {
        "up": {"activation": "swish"},
        "qkv": {"table": (table, frames)},
        "gated": {"glu": (lengths, frames)},
    }[kind]

    def launch(i, tile):
        if few:
            norm_linear(x, weights[i], bias, out, eps=1e-12, tile=tile, pdl=True, **options)
        else:
            linear(y, weights[i], bias, out, tile=tile, pdl=True, **options)

    def reference():
        z = y.float() @ weights[0].float().t() + bias
        if kind == "up":
            return F.silu(z)
        if kind == "gated":
            keep = ops.frame_mask(lengths, frames).flatten().unsqueeze(-1)
            return z[:, ::2] * torch.sigmoid(z[:, 1::2]) * keep
        z[:, WIDTH : 2 * WIDTH] += table[:frames].float().repeat(batch, 1)
        return z

    if few:
        candidates = grid(few_rows(tokens), (16, 32, 64), (4, 8), parts=(1, 4, 8))
    else:
        candidates = products(tokens)
    size = columns * WIDTH * 2 + tokens * (WIDTH * (4 if few else 2) + 2 * out_columns)
    work = 2 * tokens * columns * WIDTH
    return Case(launch, lambda: out, reference, candidates, size, work, copies=copies, poison=out)


def make_residual(batch, frames, valid, width, few):
    tokens = batch * frames
    copies = copies_for(WIDTH * width * 2)
    weights, bias = tensor(copies, WIDTH, width, scale=width**-0.5), tensor(WIDTH, dtype=torch.float32)
    a, x = tensor(tokens, width), tensor(tokens, WIDTH, dtype=torch.float32)
    out = x.clone()
    return Case(
        launch=lambda i, tile: linear(a, weights[i], bias, out, tile=tile, residual_scale=0.5, pdl=True),
        result=lambda: out,
        reference=lambda: x + 0.5 * (a.float() @ weights[0].float().t() + bias),
        tiles=[
            *(grid(few_rows(tokens), (16, 32), (4, 8), k=(width,), parts=(1, 4, 8)) if few else []),
            *(grid(few_rows(tokens), (16, 32, 64), (4,), k=(128, 256), stages=(3,)) if few else products(tokens)),
        ],
        bytes=WIDTH * width * 2 + tokens * (width * 2 + WIDTH * 8),
        flops=2 * tokens * width * WIDTH,
        prepare=lambda: out.copy_(x),
        copies=copies,
    )


def make_attention(batch, frames, valid, few):
    qkv, out = tensor(batch, frames, 3 * WIDTH), tensor(batch, frames, WIDTH)
    lengths = torch.full((batch,), valid, dtype=torch.int32, device="cuda")
    key_bias = tensor(HEADS, 1024, dtype=torch.float32)

    def reference():
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2).float() for t in qkv.chunk(3, -1))
        mask = ops.frame_mask(lengths, frames)[:, None, None]
        return ops.attention(q, k, v, mask, key_bias[:, None, :frames]).transpose(1, 2).flatten(2)[:, :valid]

    if few:
        candidates = grid((16, 32, 64), (32, 64, 128), (4, 8), stages=(2, 3))
    else:
        copied = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 4, 2)]
        candidates = [Tile(*mn, warps=w, stages=s, copied=1) for *mn, w, s in copied]
        candidates += grid((64,), (64, 128), (4,), stages=(2, 3)) + grid((128,), (64,), (8,), stages=(2,))
    work = batch * 4 * valid * valid * WIDTH
    return Case(
        lambda i, tile: attention(qkv, lengths, out, heads=HEADS, tile=tile, key_bias=key_bias, pdl=True),
        lambda: out[:, :valid], reference, candidates, batch * frames * WIDTH * 8, work, poison=out,
    )  # fmt: skip


def make_depthwise(batch, frames, valid, few):
    tokens = batch * frames
    x, out = tensor(tokens, WIDTH), tensor(tokens, WIDTH)
    weight, bias, w, b = (tensor(*s, dtype=torch.float32) for s in ((TAPS, WIDTH), (WIDTH,), (WIDTH,), (WIDTH,)))

    def reference():
        y = F.conv1d(
            x.view(batch, frames, -1).transpose(1, 2).float(), weight.t()[:, None], bias, padding=7, groups=WIDTH
        )
        return F.silu(F.layer_norm(y.transpose(1, 2), (WIDTH,), w, b)).flatten(0, 1)

    return Case(
        lambda i, tile: depthwise(
            x, weight, bias, out, frames=frames, left=7, activation="swish", tile=tile, norm=(w, b, 1e-5), pdl=True
        ),
        lambda: out, reference,
        grid((1, 2), (1,), (2, 4, 8)) + grid((4, 8, 16), (1,), (2, 4, 8), parts=(1, 2)),
        tokens * WIDTH * 4, tokens * WIDTH * 2 * TAPS, poison=out,
    )  # fmt: skip


def make_norm(batch, frames, valid, few):
    tokens = batch * frames
    x, out = tensor(tokens, WIDTH, dtype=torch.float32), tensor(tokens, WIDTH)
    return Case(
        lambda i, tile: norm(x, out, eps=1e-12, tile=tile, pdl=True),
        lambda: out, lambda: F.layer_norm(x, (WIDTH,)), grid((1, 2, 4, 8), (1,), (2, 4, 8)), tokens * WIDTH * 6, 0,
        poison=out,
    )  # fmt: skip


def routed(batch, frames, valid) -> torch.Tensor:
    """A choice of experts for each token, of as many as the engine hits with so many tokens (benchmarks.encoder)."""
    hit = {64: 14, 256: 28, 512: 31}.get(batch * frames, EXPERTS)
    idx = torch.randperm(EXPERTS, device="cuda")[torch.randint(hit, (batch, frames), device="cuda")]
    idx[:, valid:] = -1
    return idx.flatten().int()


def make_router(batch, frames, valid, few):
    tokens = batch * frames
    x, weight = tensor(tokens, WIDTH, dtype=torch.float32), tensor(WIDTH, EXPERTS, dtype=torch.float32)
    bias, heard = tensor(EXPERTS, dtype=torch.float32), tensor(tokens, 18 * EXPERTS, dtype=torch.float32)[:, :EXPERTS]
    lengths = torch.full((batch,), frames, dtype=torch.int32, device="cuda")
    y, gate = tensor(tokens, WIDTH), tensor(tokens, dtype=torch.float32)
    idx = torch.empty(tokens, device="cuda", dtype=torch.int32)

    def reference():
        z = F.layer_norm(x, (WIDTH,))
        return torch.cat((torch.softmax(z @ weight + bias + heard, -1).amax(-1, keepdim=True), z), 1)

    return Case(
        lambda i, tile: route(
            x, weight, bias, heard, lengths, y, idx, gate, frames=frames, eps=1e-12, tile=tile, pdl=True
        ),
        lambda: torch.cat((gate.unsqueeze(1), y), 1),
        reference,
        [*grid((1,), (1,), (4, 8, 16)), *grid((16,), (1,), (4,), k=(64, 128), stages=(2,))]
        if few
        else [
            *grid((16, 32, 64), (1,), (4, 8), k=(64, 128), stages=(2, 3)),
            *grid((16,), (1,), (4, 8), k=(256,), stages=(2,)),
            Tile(1, 1, warps=4, stages=1),
        ],
        tokens * WIDTH * 6 + WIDTH * EXPERTS * 4,
        2 * tokens * WIDTH * EXPERTS,
        poison=gate,
    )


def experts_tiles(width: int) -> list[Tile]:
    """Candidates for a product of the experts of few tokens. Walkers change no machine code, so they change last: of
    12 cuts each of the four processes that compile ahead gets three.
    """
    cuts = [(16, 2, 1), (16, 4, 4), (16, 8, 8), (32, 4, 1), (32, 4, 4), (32, 8, 8), (64, 8, 1), (64, 8, 8)]
    copied = [(16, 2), (32, 2), (32, 4), (64, 4)]
    tiles = [
        *(Tile(16, n, width, warps, 1, parts) for n, warps, parts in cuts),
        *(Tile(16, n, width, warps, 1, copied=1) for n, warps in copied),
    ]
    return [replace(tile, walkers=walkers) for walkers in (1, 2, 3, 4, 6, 8) for tile in tiles]


def make_experts_few(batch, frames, valid, hidden, down):
    """Both products, the other one with the best tile that is known: the second begins while the first one runs."""
    tokens, copies = batch * frames, 3
    usual = tiles_for("few", tokens, WIDTH, hidden, False)
    w_1 = tensor(copies, EXPERTS, hidden, WIDTH, scale=WIDTH**-0.5)
    w_2 = tensor(copies, EXPERTS, WIDTH, hidden, scale=hidden**-0.5)
    b_1, b_2 = (tensor(EXPERTS, n, dtype=torch.float32) for n in (hidden, WIDTH))
    y, h, x = tensor(tokens, WIDTH), tensor(tokens, hidden), tensor(tokens, WIDTH, dtype=torch.float32)
    idx, gate, out = routed(batch, frames, valid), torch.rand(tokens, device="cuda"), x.clone()
    here = idx >= 0

    def launch(i, tile):
        first, second = (usual.expert_up, tile) if down else (tile, usual.expert_down)
        experts_few(y, w_1[i], b_1, idx, h, tile=first, activation="swish", pdl=True)
        experts_few(h, w_2[i], b_2, idx, out, tile=second, residual_scale=0.5, gate=gate, known=True, pdl=True)

    def reference():
        rows = idx[here].long()
        z = torch.stack([w_1[0, e].float() @ v for e, v in zip(rows, y[here].float(), strict=True)])
        z = F.silu(z + b_1[rows])
        if not down:
            return z
        z = torch.stack([w_2[0, e].float() @ v for e, v in zip(rows, z.to(DTYPE).float(), strict=True)])
        return x[here] + 0.5 * gate[here, None] * (z + b_2[rows])

    hit = int(idx[here].unique().numel())
    return Case(
        launch, lambda: (out if down else h)[here], reference, experts_tiles(hidden if down else WIDTH),
        hit * hidden * WIDTH * 4 + tokens * (WIDTH * 10 + hidden * 4), 4 * tokens * hidden * WIDTH,
        prepare=lambda: out.copy_(x), copies=copies, poison=h,
    )  # fmt: skip


def make_experts_many(batch, frames, valid, hidden, down):
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
        kwargs = {"residual_scale": 0.5, "gate": gate} if down else {"activation": "swish"}
        slot_token, tile_expert, sorted_a, out = sorts[tile.m]
        experts_many(
            sorted_a if down else a, weights[i], bias, slot_token, tile_expert, out, tile=tile, pdl=True, **kwargs
        )

    def prepare():
        for rows in (16, 32, 64, 128):
            slot_token, tile_expert = slots(tokens, EXPERTS, rows, "cuda")
            slot_token.fill_(-1)
            sort_tokens(idx, slot_token, tile_expert, experts=EXPERTS, rows=rows, tile=Tile(1, 1024), pdl=False)
            sorted_a = a[slot_token.clamp(min=0).long()] if down else a
            size = (slot_token.numel(), columns)
            out = x.clone() if down else torch.full(size, float("nan"), device="cuda", dtype=DTYPE)
            sorts[rows] = (slot_token, tile_expert, sorted_a, out)

    prepare()

    def result():
        slot_token, tile_expert, _, out = sorts[made["rows"]]
        if down:
            return out[here]
        taken = (slot_token.view(tile_expert.numel(), -1) >= 0) & (tile_expert >= 0).unsqueeze(1)
        taken = taken.flatten()
        return torch.zeros(tokens, columns, device="cuda").index_copy_(0, slot_token[taken].long(), out[taken].float())[
            here
        ]

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
        ]
        if tokens > 1024
        else grid((16, 32, 64), (64, 128), (4,), k=(64, 128), stages=(3, 4))
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


def make_convolution(batch, frames, valid, few, first):
    time_in = (frames - 1) * 4 + 7
    t1, f1, f2 = (time_in - 1) // 2, (BINS - 1) // 2, ((BINS - 1) // 2 - 1) // 2
    if first:
        x, lengths = tensor(batch, time_in, BINS, dtype=torch.float32), torch.empty(batch, device="cuda").int()
        lengths.fill_(time_in)
        weight, bias = tensor(2, 9, WIDTH, dtype=torch.float32), tensor(2, WIDTH, dtype=torch.float32)
        out, out_lengths = torch.empty(2, batch, t1, f1, WIDTH, device="cuda", dtype=DTYPE), lengths.clone()
        return Case(
            lambda i, tile: first_convolution(
                x, lengths, weight, bias, out, out_lengths, kernel=3, stride=2, receptive_field=7, rate=4, tile=tile
            ),
            lambda: out[:, :2],
            lambda: torch.stack(
                [F.relu(F.conv2d(x[:2, None], weight[g].t().reshape(WIDTH, 1, 3, 3), bias[g], 2)) for g in range(2)]
            ).permute(0, 1, 3, 4, 2),
            grid((1, 2, 4), (256, 512), (2, 4, 8), k=(1,)), out.numel() * 2, out.numel() * 18,
            poison=out,
        )  # fmt: skip
    x = tensor(2, batch, t1, f1, WIDTH)
    weight, bias = tensor(2, WIDTH, 3, 3, WIDTH, scale=(9 * WIDTH) ** -0.5), tensor(2, WIDTH, dtype=torch.float32)
    out = torch.empty(2, batch, frames, f2, WIDTH, device="cuda", dtype=DTYPE)

    def reference():
        images, kernels = x[:, :1].permute(0, 1, 4, 2, 3).float(), weight.permute(0, 1, 4, 2, 3).float()
        outs = [F.relu(F.conv2d(images[g], kernels[g], bias[g], 2)) for g in range(2)]
        return torch.stack(outs).permute(0, 1, 3, 4, 2)

    candidates = (
        grid((16, 32, 64), (32, 64, 128), (4,), k=(64, 128), stages=(3, 4))
        if few or batch * frames <= 1024
        else grid((128,), (128, 256), (8,), k=(64,), stages=(3, 4))
        + grid((64, 128), (128,), (4,), k=(64,), stages=(3,))
    )
    return Case(
        lambda i, tile: next_convolution(x, weight, bias, out, kernel=3, stride=2, tile=tile, pdl=True),
        lambda: out[:, :1],
        reference,
        candidates, (x.numel() + out.numel() + weight.numel()) * 2, out.numel() * 18 * WIDTH,
        poison=out,
    )  # fmt: skip


def make_head(batch, frames, valid, few, kind):
    tokens = batch * frames
    if kind == "log_softmax":
        x = tensor(tokens, VOCABULARY, dtype=torch.float32)
        out, best, peak = x.clone(), torch.empty(tokens, device="cuda").int(), torch.empty(tokens, device="cuda")
        return Case(
            lambda i, tile: log_softmax(out, best, peak, tile=tile, pdl=True),
            lambda: out, lambda: torch.log_softmax(x, -1),
            grid((1,), (1024, 2048, 8192), (4, 8, 16)), x.numel() * 8, 0, prepare=lambda: out.copy_(x),
        )  # fmt: skip
    if kind == "best":
        a, weight = tensor(tokens, WIDTH), tensor(VOCABULARY, WIDTH, scale=WIDTH**-0.5)
        bias = tensor(VOCABULARY, dtype=torch.float32)
        best, peak = torch.empty(tokens, device="cuda").int(), torch.empty(tokens, device="cuda")
        candidates = [Tile(128, 256, warps=8, stages=3, copied=1)]
        candidates += [Tile(128, 128, warps=w, stages=3, copied=2) for w in (4, 8)]
        return Case(
            lambda i, tile: best_path(a, weight, bias, best, peak, tile=tile, pdl=True),
            lambda: peak, lambda: torch.log_softmax(a.float() @ weight.float().t() + bias, -1).amax(-1),
            candidates, (a.numel() + weight.numel()) * 2, 2 * tokens * VOCABULARY * WIDTH, poison=peak,
        )  # fmt: skip
    groups, columns, width = (2, WIDTH, 9 * WIDTH) if kind == "subsampling_out" else (1, VOCABULARY, WIDTH)
    a, weight = tensor(groups, tokens, width), tensor(groups, columns, width, scale=width**-0.5)
    bias, out = tensor(groups, columns, dtype=torch.float32), tensor(groups, tokens, columns, dtype=torch.float32)
    if few:
        candidates = grid(few_rows(tokens), (16, 32, 64), (4,), k=(128, 256, 512), stages=(3,))
    else:
        candidates = products(tokens)
    return Case(
        lambda i, tile: linear(a, weight, bias, out, tile=tile, pdl=True),
        lambda: out, lambda: torch.stack([a[g].float() @ weight[g].float().t() + bias[g] for g in range(groups)]),
        candidates, (a.numel() + weight.numel()) * 2 + out.numel() * 4, 2 * groups * tokens * columns * width,
        poison=out,
    )  # fmt: skip


CASES = {
    "up": lambda s, h, few: make_up(*s, h, "up", few),
    "qkv": lambda s, h, few: make_up(*s, h, "qkv", few),
    "gated": lambda s, h, few: make_up(*s, h, "gated", few),
    "out": lambda s, h, few: make_residual(*s, WIDTH, few),
    "down": lambda s, h, few: make_residual(*s, h, few),
    "attention": lambda s, h, few: make_attention(*s, few),
    "depthwise": lambda s, h, few: make_depthwise(*s, few),
    "norm": lambda s, h, few: make_norm(*s, few),
    "router": lambda s, h, few: make_router(*s, few),
    "sort": lambda s, h, few: make_sort(*s),
    "expert_up": lambda s, h, few: (make_experts_few if few else make_experts_many)(*s, h, False),
    "expert_down": lambda s, h, few: (make_experts_few if few else make_experts_many)(*s, h, True),
    "first_convolution": lambda s, h, few: make_convolution(*s, few, True),
    "next_convolution": lambda s, h, few: make_convolution(*s, few, False),
    "subsampling_out": lambda s, h, few: make_head(*s, few, "subsampling_out"),
    "head": lambda s, h, few: make_head(*s, few, "head"),
    "best": lambda s, h, few: make_head(*s, few, "best"),
    "log_softmax": lambda s, h, few: make_head(*s, few, "log_softmax"),
}


def make(name: str, shape: str, hidden: int, few: bool) -> Case:
    torch.manual_seed(0)
    return CASES[name](SHAPES[shape], hidden, few)
