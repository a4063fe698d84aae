"""Tile sizes by operation, number of tokens and type: what was measured, and a rule for everything else.

Two regimes. Few tokens: launches and the latency of one program count, so a program holds the whole inner dimension,
norms are recomputed where they are needed, and every expert's weights are read once. Many tokens: arithmetic counts,
so products loop over the inner dimension, norms are kernels of their own and tokens are sorted by expert.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

from m3asr.kernels.linear import LIBRARY
from m3asr.kernels.pieces import Tile, at_least_16

# The largest number of tokens that is treated as few.
FEW_TOKENS = 128
# Up to so many tokens both layers of the experts are one launch, whatever else is treated as few or many; each expert's
# weights are read once for every 32 of its tokens.
WHOLE_TOKENS = 512
# Up to so many frames attention is one launch with its projection, for few tokens: every tile of the projection's
# columns reads all keys and values.
ATTENTION_OUT_FRAMES = 64
# Expert weights that the small kernels of a block fetch ahead into the L2 cache: on an H200 none is best (0 to 32 MB
# within 1 %, more is worse).
AHEAD_BYTES = 0
# Programs that fill a card: a tile is made smaller until a product has as many.
PROGRAMS = 120


@dataclass(frozen=True)
class Tiles:
    """One entry an operation."""

    first_convolution: Tile
    next_convolution: Tile
    subsampling_out: Tile
    up: Tile  # feed-forward up, after a norm
    down: Tile  # feed-forward down, into the residual stream
    qkv: Tile  # after a norm
    out: Tile  # attention out and pointwise 2, into the residual stream
    gated: Tile  # pointwise 1, after a norm
    norm: Tile
    attention: Tile
    depthwise: Tile
    router: Tile
    expert_up: Tile
    expert_down: Tile
    sort: Tile
    heard: Tile
    head: Tile
    log_softmax: Tile
    # Two launches in one, for few tokens: see forward.FUSED.
    attention_out: Tile | None = None
    depthwise_out: Tile | None = None
    experts_whole: Tile | None = None  # parts: programs that share an expert; k 1: fetches weights before the wait
    experts_early: bool = True


# Measured best tiles: (regime, operation) -> {tokens: tile}, for a width of 512 and 2 bytes a number. Empty until
# `benchmarks.kernels` has been run; `read_measured` fills it from that run's file.
MEASURED: dict[tuple[str, str], dict[int, Tile]] = {}
MEASURED_WIDTH = 512


def tiles_for(regime: str, tokens: int, width: int, hidden: int, wide: bool) -> Tiles:
    """Tiles of a stack of width D with feed-forwards of `hidden`; wide: 4 bytes a number."""
    rule = (few if regime == "few" else many)(tokens, width, hidden, wide)
    if wide or width != MEASURED_WIDTH:
        return rule
    known = {}
    for field in fields(Tiles):
        measured = MEASURED.get((regime, field.name))
        if measured:
            near = min(
                measured, key=lambda n: abs(n.bit_length() - tokens.bit_length()) + abs(n - tokens) / (n + tokens)
            )
            tile = measured[near]
            # A tile that holds the whole inner dimension must hold this one too.
            if regime == "few" and field.name in ("down", "expert_down") and tile.k >= 512:
                tile = replace(tile, k=at_least_16(hidden))
            known[field.name] = tile
    if regime == "many" and "expert_up" in known and "expert_down" in known:
        # One sort serves both.
        known["expert_down"] = replace(known["expert_down"], m=known["expert_up"].m)
    if regime == "few" and "expert_up" in known:
        # A kernel without a loop has no stages: the measurement says with them whether weights are loaded early.
        known["experts_early"] = known["expert_up"].stages == 1
    return replace(rule, **known)


def read_measured(path: Path) -> None:
    """Fill MEASURED from the `tiles.json` that `benchmarks.kernels` writes."""
    MEASURED.clear()
    for key, rows in json.loads(Path(path).read_text(encoding="utf-8")).items():
        regime, operation = key.split()
        MEASURED[regime, operation] = {int(tokens): Tile(**tile) for tokens, tile in rows.items()}


def few(tokens: int, width: int, hidden: int, wide: bool) -> Tiles:
    """The rule for few tokens."""
    rows = 16 if tokens <= 80 else 32
    columns = 16 if wide else 32
    whole, inner = at_least_16(width), at_least_16(hidden)
    warps = 4 if rows == 16 else 8
    columns = 64 if tokens > 128 and not wide else columns
    norm_linear = Tile(rows, columns, warps=8, parts=parts_of(whole, 8, wide))
    return Tiles(
        first_convolution=Tile(32, 64, warps=4),
        next_convolution=Tile(64, 64, k=32 if wide else 128, warps=4, stages=3 if wide else 4),
        subsampling_out=Tile(16 if tokens <= 80 else 64, 32, k=32 if wide else 128, warps=4, stages=4),
        up=norm_linear,
        qkv=norm_linear,
        gated=norm_linear,
        down=Tile(rows, 16, k=inner, warps=warps, parts=parts_of(inner, warps, wide)),
        out=Tile(rows, 16, k=whole, warps=warps, parts=parts_of(whole, warps, wide)),
        norm=Tile(1, 1, warps=4),
        attention=Tile(16, 64 if wide else 128, warps=4, stages=2),
        depthwise=Tile(1, 1, warps=4),
        router=Tile(1, 1, warps=8) if tokens <= 128 else Tile(16, 1, k=64, warps=4, stages=2),
        expert_up=Tile(16, 16 if wide else 64, k=whole, warps=4, stages=1),
        expert_down=Tile(16, 16 if wide else 32, k=inner, warps=4, stages=1),
        sort=Tile(1, 1024),
        heard=Tile(16, 32, k=64, warps=4),
        head=Tile(rows, 32, k=whole, warps=warps, parts=parts_of(whole, warps, wide)),
        log_softmax=Tile(1, 2048, warps=8),
        attention_out=Tile(16, 16, k=16 if wide else 64, warps=8, stages=1),
        depthwise_out=Tile(
            16, 16 if tokens <= 80 or wide else 32 if tokens <= 128 else 64, warps=8, parts=parts_of(whole, 8, wide)
        ),
        experts_whole=experts_whole(tokens, wide),
        experts_early=tokens > 80,
    )


def experts_whole(tokens: int, wide: bool) -> Tile:
    """The rule for both layers of the experts in one launch."""
    return Tile(16 if tokens <= 128 or wide else 32, 16 if wide else 32, k=1, warps=8, stages=2, parts=4)


def parts_of(inner: int, warps: int, wide: bool) -> int:
    """A part of the inner dimension for each warp, 32 elements at least."""
    return 1 if wide else max(1, min(warps, inner // 32))


_PRODUCTS = (
    Tile(128, 256, k=64, warps=8, stages=3),
    Tile(128, 128, k=64, warps=8, stages=4),
    Tile(64, 128, k=64, warps=4, stages=4),
    Tile(64, 64, k=64, warps=4, stages=4),
    Tile(32, 64, k=128, warps=4, stages=3),
    Tile(32, 32, k=128, warps=4, stages=3),
    Tile(16, 32, k=128, warps=4, stages=3),
)


def product(tokens: int, columns: int, wide: bool, rows: int | None = None, reads: bool = False) -> Tile:
    """The largest tile that still gives enough programs; `rows` fixes its height. reads: what follows the product
    reads as much as it writes, for which the registers of the largest tile do not suffice.
    """
    if wide:
        return Tile(rows or 64, 64, k=32, warps=4, stages=2)
    tiles = [tile for tile in _PRODUCTS[reads:] if rows is None or tile.m == rows]
    for tile in tiles:
        if -(-tokens // tile.m) * -(-columns // tile.n) >= PROGRAMS:
            return tile
    return tiles[-1]


def many(tokens: int, width: int, hidden: int, wide: bool) -> Tiles:
    """The rule for many tokens."""
    # Sorted tokens fill tiles of one expert: with some 32 experts, a tile should not be much higher than a share.
    height = 64 if wide or tokens > 1024 else 32 if tokens > 512 else 16
    height = 128 if tokens > 4096 and not wide else height
    return Tiles(
        first_convolution=Tile(64, 64, warps=4),
        next_convolution=product(4 * tokens, 2 * width, wide),
        subsampling_out=product(tokens, 2 * width, wide),
        up=product(tokens, hidden, wide),
        qkv=product(tokens, 3 * width, wide, reads=True),
        gated=product(tokens, 2 * width, wide),
        down=product(tokens, width, wide, reads=True),
        out=product(tokens, width, wide, reads=True),
        norm=Tile(1 if tokens <= 1024 else 4, 1, warps=4),
        attention=Tile(64, 32, warps=4, stages=2)
        if wide
        else Tile(32 if tokens <= 1024 else 128, 64, warps=4 if tokens <= 1024 else 8, stages=2),
        depthwise=Tile(1 if tokens <= 1024 else 8, 1, warps=4 if tokens <= 1024 else 8),
        router=Tile(16, 1, k=64, warps=4, stages=2),
        experts_whole=experts_whole(tokens, wide),
        expert_up=product(tokens, hidden, wide, height),
        expert_down=product(tokens, width, wide, height, reads=True),
        sort=Tile(1, max(128, min(4096, 1 << (tokens - 1).bit_length())), warps=16 if tokens > 1024 else 4),
        heard=Tile(64 if tokens > 1024 else 16, 64, k=32, warps=4, stages=2),
        head=product(tokens, 8 * width, wide),
        log_softmax=Tile(1, 2048, warps=8),
    )


# Products that the card's own library could compute instead, as one choice of `benchmarks.encoder --variants`.
LIBRARY_OPERATIONS = ("subsampling_out", "up", "qkv", "gated", "down", "out", "head")


def by_library(tiles: Tiles, operations=LIBRARY_OPERATIONS) -> Tiles:
    """The same tiles with these products computed by the library (cuBLAS)."""
    return replace(tiles, **dict.fromkeys(operations, LIBRARY))
