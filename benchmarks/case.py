"""A kernel that `benchmarks.kernels` runs: its data, its reference, its candidates; and the sizes it comes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch

from m3asr.engines.cuda.clustered import Limits
from m3asr.engines.cuda.forward import JOINED
from m3asr.engines.cuda.packing import Linear
from m3asr.kernels.clusters import experts
from m3asr.kernels.clusters.products import Products, ProductSizes
from m3asr.kernels.epilogue import Unnormed
from m3asr.kernels.linear import LIBRARY
from m3asr.kernels.pieces import Tile
from m3asr.kernels.stream import Stream, to_stream

# input -> (utterances, subsampled frames of the bucket, valid frames)
SHAPES = {
    "1x206": (1, 64, 50),
    "1x1024": (1, 256, 255),
    "1x2048": (1, 512, 511),
    "4x1024": (4, 256, 255),
    "8x1024": (8, 256, 255),
    "16x1024": (16, 256, 255),
    "64x1024": (64, 256, 255),
}
# Cases that are for no more tokens than so many.
MOST_TOKENS = {"experts": experts.MOST_TOKENS}
WIDTH, HEADS, EXPERTS, VOCABULARY, BINS, TAPS = 512, 8, 32, 5537, 40, 15
DTYPE = torch.bfloat16
# In place of a tile: by pairs of programs (`kernels.clusters.products`).
PAIRS = Tile(0, 64)
TOGETHER = Tile(0, 32)  # both products of the experts in one launch (`kernels.clusters.experts`)
ONE = Tile(1, 1)  # a row a program: for what is not timed


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


def streams(tokens: int) -> bool:
    """Whether the residual stream has 24 bits (`kernels.stream`), as it has where products are made by pairs."""
    return tokens >= Limits().products


def joined(tokens: int) -> bool:
    """Whether products by Triton make the norms in front of them."""
    return JOINED[0] <= tokens <= JOINED[1] and not streams(tokens)


def unnormed(x: torch.Tensor) -> Unnormed:
    """x float32 (N, D) as a product by tiles of 64 columns leaves it."""
    parts = x.unflatten(1, (-1, 64))
    mean = parts.mean(-1)
    squares = (parts - mean.unsqueeze(-1)).square().sum(-1)
    return Unnormed(x, x.to(DTYPE), torch.stack((mean, squares), -1).transpose(0, 1).contiguous(), 64)


def tensor(*shape, dtype=DTYPE, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def in_pairs(tokens: int, hidden: int, weights, bias) -> tuple[Products, list[Linear]]:
    """What launches PAIRS of so many tokens, and the layers as it takes them."""
    half, cut = DTYPE == torch.float16, Limits().cut(tokens)
    sizes = ProductSizes(WIDTH, hidden, experts=EXPERTS, half=half, experts_half=half, swish=True, cut=cut)
    return Products(sizes, torch.device("cuda", 0)), [Linear(weight, bias) for weight in weights]


def reset(stream: Stream, x: torch.Tensor) -> None:
    """The stream's numbers made those of x float32 once more."""
    fresh = to_stream(x, stream.raw.dtype, tile=ONE)
    stream.raw.copy_(fresh.raw), stream.low.copy_(fresh.low)


def copies_for(size: int) -> int:
    """Enough weights to overflow the L2 cache, within reason."""
    return max(2, min(64, int(160e6 / size)))


def grid(rows, columns, warps, k=(64,), stages=(1,), parts=(1,)) -> list[Tile]:
    return [Tile(m, n, kk, w, s, p) for m, n, kk, w, s, p in product(rows, columns, k, warps, stages, parts)]


def products(tokens: int) -> list[Tile]:
    """Candidates for a product, the library's among them."""
    if tokens <= 1024:
        tiles = grid((16, 32), (32, 64, 128), (4,), k=(64, 128), stages=(3, 4))
        tiles += grid((16,), (64,), (4,), k=(256, 512), stages=(3,))
        return [LIBRARY, PAIRS, *tiles, *grid((64,), (32, 64, 128), (4,), k=(64,), stages=(3, 4)), *turned()]
    kept = [(128, 256, 8), (128, 128, 4), (128, 128, 8), (128, 64, 8), (64, 128, 4)]
    return [LIBRARY, PAIRS, *(Tile(m, n, 64, warps, 3) for m, n, warps in kept), *persistent()]


def turned() -> list[Tile]:
    """Candidates for a few hundred tokens, operands copied: of less than 64 rows the product is turned."""
    cuts = [(16, 64, 128, 4), (16, 64, 256, 2), (32, 64, 64, 4), (32, 64, 128, 3), (32, 64, 256, 2), (32, 64, 512, 1)]
    cuts += [(32, 128, 128, 3), (64, 32, 128, 3), (64, 64, 64, 4), (64, 64, 128, 3), (64, 64, 256, 2)]
    cuts += [(64, 16, 512, 2), (32, 64, 512, 2), (64, 32, 512, 2), (64, 64, 512, 2)]  # a row of 512 is one step
    cuts += [(64, 16, 256, 3), (64, 32, 256, 3), (32, 64, 128, 5), (64, 32, 128, 5)]
    stored = [(32, 64, 128, 3), (64, 64, 128, 3), (64, 64, 64, 4)]
    tiles = [Tile(m, n, k, 4, stages, copied=2) for m, n, k, stages in cuts]
    return tiles + [Tile(m, n, k, 4, stages, copied=2, stored=1) for m, n, k, stages in stored]


def persistent() -> list[Tile]:
    """Candidates whose programs stay."""
    return [
        *(Tile(128, 256, warps=8, stages=s, copied=1, stored=n) for s, n in ((3, 2), (3, 4), (4, 4))),
        *(Tile(128, 128, warps=4, stages=s, copied=2, stored=n) for s, n in ((2, 2), (3, 2), (3, 4))),
        *(Tile(128, 128, warps=8, stages=s, copied=c, stored=4) for s, c in ((3, 2), (4, 1))),
        *(Tile(64, 256, warps=4, stages=2, copied=2, stored=n) for n in (2, 4)),
        Tile(256, 128, warps=8, stages=3, copied=1, stored=4),
        Tile(128, 64, warps=4, stages=4, copied=2, stored=2),
        Tile(64, 128, warps=4, stages=4, copied=2, stored=2),
        Tile(64, 128, warps=4, stages=3, copied=3, stored=2),
        # Results stored by the threads.
        Tile(128, 256, warps=8, stages=3, copied=1),
        Tile(128, 128, warps=8, stages=4, copied=1),
        *(Tile(128, 64, warps=4, stages=s, copied=2) for s in (3, 4)),
        Tile(64, 128, warps=4, stages=3, copied=2),
    ]
