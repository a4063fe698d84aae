"""Tile sizes by operation, number of tokens and type: the numbers that were measured, in one place.

Two regimes. Few tokens: launches and the latency of one program count, so a program holds the whole inner dimension,
norms are recomputed where they are needed, and every expert's weights are read once. Many tokens: arithmetic counts,
so products loop over the inner dimension, norms are kernels of their own and tokens are sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from m3asr.kernels.pieces import Tile, at_least_16

# The largest number of tokens that is treated as few.
FEW_TOKENS = 512
# Expert weights that the small kernels of a block fetch ahead into the L2 cache.
AHEAD_BYTES = 32 << 20


@dataclass(frozen=True)
class Tiles:
    """One entry an operation."""

    first_convolution: Tile
    next_convolution: Tile
    subsampling_out: Tile
    norm_linear: Tile  # few tokens: feed-forward up, QKV, pointwise 1
    residual: Tile  # feed-forward down, attention out, pointwise 2
    linear: Tile  # many tokens: the same products as norm_linear
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
    experts_early: bool = True


def few(tokens: int, width: int, hidden: int, wide: bool) -> Tiles:
    """Tiles for few tokens; width D, hidden the widest inner dimension, wide: 4 bytes a number."""
    rows = 16 if tokens <= 80 else 32
    columns = 16 if wide else 32
    whole, inner = at_least_16(width), at_least_16(hidden)
    warps = 4 if rows == 16 else 8
    return Tiles(
        first_convolution=Tile(32, 64, warps=4),
        next_convolution=Tile(64, 64, k=32 if wide else 128, warps=4, stages=3 if wide else 4),
        subsampling_out=Tile(16 if tokens <= 80 else 64, 32, k=32 if wide else 128, warps=4, stages=4),
        norm_linear=Tile(rows, columns, warps=warps),
        residual=Tile(rows, 16, k=inner, warps=warps),
        linear=Tile(rows, columns, k=whole, warps=warps),
        norm=Tile(1, 1, warps=4),
        attention=Tile(16, 64 if wide else 128, warps=4, stages=2),
        depthwise=Tile(1, 1, warps=4),
        router=Tile(1, 1, warps=8),
        expert_up=Tile(16, 16 if wide else 64, k=whole, warps=4, stages=1),
        expert_down=Tile(16, 16 if wide else 32, k=inner, warps=4, stages=1),
        sort=Tile(1, 1024),
        heard=Tile(16, 32, k=64, warps=4),
        head=Tile(rows, 32, k=whole, warps=warps),
        log_softmax=Tile(1, 2048, warps=8),
        experts_early=tokens > 80,
    )


def many(tokens: int, width: int, hidden: int, wide: bool) -> Tiles:
    """Tiles for many tokens, as for `few`."""
    product = Tile(64, 64, k=32, warps=4, stages=2) if wide else Tile(128, 128, k=64, warps=8, stages=3)
    return Tiles(
        first_convolution=Tile(64, 64, warps=4),
        next_convolution=product if wide else Tile(128, 256, k=64, warps=8, stages=3),
        subsampling_out=product,
        norm_linear=product,
        residual=product,
        linear=product,
        norm=Tile(4, 1, warps=4),
        attention=Tile(64, 32, warps=4, stages=2) if wide else Tile(128, 64, warps=8, stages=2),
        depthwise=Tile(4, 1, warps=4),
        router=Tile(32, 1, k=64, warps=8, stages=2),
        expert_up=product,
        expert_down=product,
        sort=Tile(1, 4096, warps=16),
        heard=Tile(64, 64, k=32, warps=4, stages=2),
        head=product,
        log_softmax=Tile(1, 2048, warps=8),
    )
