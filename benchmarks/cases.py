"""What `benchmarks.kernels` runs: each kernel with its data, a reference in torch, its bytes and its arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.case import (
    BINS,
    DTYPE,
    HEADS,
    ONE,
    PAIRS,
    SHAPES,
    TAPS,
    VOCABULARY,
    WIDTH,
    Case,
    copies_for,
    grid,
    in_pairs,
    joined,
    products,
    reset,
    streams,
    tensor,
    unnormed,
)
from benchmarks.cases_experts import make_expert_product, make_experts, make_router, make_sort
from m3asr import ops
from m3asr.engines.cuda.packing import Linear
from m3asr.kernels.attention import attention
from m3asr.kernels.best import best_path
from m3asr.kernels.depthwise import depthwise
from m3asr.kernels.epilogue import Unnormed
from m3asr.kernels.linear import linear
from m3asr.kernels.log_softmax import log_softmax
from m3asr.kernels.norm import norm
from m3asr.kernels.pieces import Tile
from m3asr.kernels.stream import from_stream, norm_stream, to_stream
from m3asr.kernels.subsampling import first_convolution, next_convolution


def make_up(batch, frames, valid, hidden, kind):
    """Feed-forward up, QKV or the gated pointwise layer: but for the first with the norm inside, for PAIRS and where
    the engine joins them.
    """
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
    pairs, layers = in_pairs(tokens, hidden, weights, bias)
    a = y
    if kind != "up":
        nothing = Linear(torch.zeros(WIDTH, WIDTH, device="cuda", dtype=DTYPE), torch.zeros(WIDTH, device="cuda"))
        a = pairs.add(y, nothing, to_stream(x, DTYPE, tile=ONE), scale=1.0)
        for layer in layers:
            pairs.sums(layer.weight)  # made once, and not inside a graph
    inside = kind != "up" and joined(tokens)
    rows, sums = (unnormed(x), weights.float().sum(-1)) if inside else (None, None)

    def launch(i, tile):
        if tile == PAIRS:
            pairs.up(a, layers[i], out, eps=1e-12, pdl=True, **options)
        elif inside and tile.copied:
            linear(rows, weights[i], bias, out, tile=tile, sums=sums[i], eps=1e-12, pdl=True, **options)
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

    size, work = columns * WIDTH * 2 + tokens * 2 * (WIDTH + out_columns), 2 * tokens * columns * WIDTH
    return Case(launch, lambda: out, reference, products(tokens), size, work, copies=copies, poison=out)


def make_residual(batch, frames, valid, width):
    tokens = batch * frames
    copies = copies_for(WIDTH * width * 2)
    weights, bias = tensor(copies, WIDTH, width, scale=width**-0.5), tensor(WIDTH, dtype=torch.float32)
    a, x = tensor(tokens, width), tensor(tokens, WIDTH, dtype=torch.float32)
    out = x.clone()
    pairs, layers = in_pairs(tokens, max(width, 1024), weights, bias)
    stream, one, used = to_stream(x, DTYPE, tile=ONE), torch.empty_like(x), []
    left = {n: Unnormed.empty(out, DTYPE, n) for n in (16, 32, 64, 128)} if joined(tokens) else {}

    def launch(i, tile):
        used[:] = [tile]
        if tile == PAIRS:  # which prepares the norm behind it
            pairs.add(a, layers[i], stream, scale=0.5, pdl=True)
        else:
            leaves = left[tile.n] if tile.copied and left else None
            linear(a, weights[i], bias, out, tile=tile, residual_scale=0.5, leaves=leaves, pdl=True)

    def prepare():
        out.copy_(x)
        reset(stream, x)

    def result():
        if used == [PAIRS]:
            from_stream(stream, one, tile=ONE)
        return one if used == [PAIRS] else out

    return Case(
        launch=launch,
        result=result,
        reference=lambda: x + 0.5 * (a.float() @ weights[0].float().t() + bias),
        tiles=products(tokens),
        bytes=WIDTH * width * 2 + tokens * (width * 2 + WIDTH * (6 if streams(tokens) else 8)),
        flops=2 * tokens * width * WIDTH,
        prepare=prepare,
        copies=copies,
    )


def make_attention(batch, frames, valid):
    qkv, out = tensor(batch, frames, 3 * WIDTH), tensor(batch, frames, WIDTH)
    lengths = torch.full((batch,), valid, dtype=torch.int32, device="cuda")
    key_bias = tensor(HEADS, 1024, dtype=torch.float32)

    def reference():
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2).float() for t in qkv.chunk(3, -1))
        mask = ops.frame_mask(lengths, frames)[:, None, None]
        return ops.attention(q, k, v, mask, key_bias[:, None, :frames]).transpose(1, 2).flatten(2)[:, :valid]

    copied = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 4, 2)]
    copied += [(64, 256, 4, 1), (64, 256, 8, 1), (128, 256, 8, 1), (64, 128, 4, 1), (64, 128, 8, 1)]
    candidates = [Tile(*mn, warps=w, stages=s, copied=1) for *mn, w, s in copied]
    candidates += grid((64,), (64, 128), (4,), stages=(2, 3)) + grid((128,), (64,), (8,), stages=(2,))
    if batch * frames <= 1024:
        small = [(16, 64, 2), (16, 64, 3), (16, 128, 2), (16, 256, 1), (32, 64, 2), (32, 128, 2)]
        candidates += [Tile(m, n, warps=4, stages=s, copied=c) for m, n, s in small for c in (0, 1)]
    work = batch * 4 * valid * valid * WIDTH
    return Case(
        lambda i, tile: attention(qkv, lengths, out, heads=HEADS, tile=tile, key_bias=key_bias, pdl=True),
        lambda: out[:, :valid], reference, candidates, batch * frames * WIDTH * 8, work, poison=out,
    )  # fmt: skip


def make_depthwise(batch, frames, valid):
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


def make_norm(batch, frames, valid):
    tokens = batch * frames
    x, out = tensor(tokens, WIDTH, dtype=torch.float32), tensor(tokens, WIDTH)
    tiles = grid((1, 2, 4, 8), (1,), (1, 2, 4, 8))
    if streams(tokens):  # the norm between two blocks, the second product of the experts before it
        stream, found = to_stream(x, DTYPE, tile=ONE), torch.empty_like(x)
        more = tensor(tokens, WIDTH), torch.randperm(tokens, device="cuda").int()
        one, zero = torch.ones(WIDTH, device="cuda"), torch.zeros(WIDTH, device="cuda")
        total = x + more[0][more[1].long()]

        def result():
            from_stream(stream, found, tile=ONE)
            return found

        return Case(
            lambda i, tile: norm_stream(stream, one, zero, eps=1e-12, more=more, tile=tile, pdl=True),
            result, lambda: F.layer_norm(total, (WIDTH,)), tiles, tokens * WIDTH * 8, 0,
            prepare=lambda: reset(stream, x),
        )  # fmt: skip
    return Case(
        lambda i, tile: norm(x, out, eps=1e-12, tile=tile, pdl=True),
        lambda: out, lambda: F.layer_norm(x, (WIDTH,)), tiles, tokens * WIDTH * 6, 0,
        poison=out,
    )  # fmt: skip


def make_convolution(batch, frames, valid, first):
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
        if batch * frames <= 1024
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


def make_head(batch, frames, valid, kind):
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
    return Case(
        lambda i, tile: linear(a, weight, bias, out, tile=tile, pdl=True),
        lambda: out, lambda: torch.stack([a[g].float() @ weight[g].float().t() + bias[g] for g in range(groups)]),
        products(tokens), (a.numel() + weight.numel()) * 2 + out.numel() * 4, 2 * groups * tokens * columns * width,
        poison=out,
    )  # fmt: skip


CASES = {
    "up": lambda s, h: make_up(*s, h, "up"),
    "qkv": lambda s, h: make_up(*s, h, "qkv"),
    "gated": lambda s, h: make_up(*s, h, "gated"),
    "out": lambda s, h: make_residual(*s, WIDTH),
    "down": lambda s, h: make_residual(*s, h),
    "attention": lambda s, h: make_attention(*s),
    "depthwise": lambda s, h: make_depthwise(*s),
    "norm": lambda s, h: make_norm(*s),
    "router": lambda s, h: make_router(*s),
    "sort": lambda s, h: make_sort(*s),
    "expert_up": lambda s, h: make_expert_product(*s, h, False),
    "expert_down": lambda s, h: make_expert_product(*s, h, True),
    "experts": lambda s, h: make_experts(*s, h),
    "first_convolution": lambda s, h: make_convolution(*s, True),
    "next_convolution": lambda s, h: make_convolution(*s, False),
    "subsampling_out": lambda s, h: make_head(*s, "subsampling_out"),
    "head": lambda s, h: make_head(*s, "head"),
    "best": lambda s, h: make_head(*s, "best"),
    "log_softmax": lambda s, h: make_head(*s, "log_softmax"),
}


def make(name: str, shape: str, hidden: int) -> Case:
    torch.manual_seed(0)
    return CASES[name](SHAPES[shape], hidden)
