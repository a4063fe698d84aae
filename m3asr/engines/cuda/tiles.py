"""Tile sizes by operation, number of tokens and type: what was measured, and a rule for everything else.

Two regimes. Few tokens: launches and the latency of one program count, so a program holds the whole inner dimension,
norms are recomputed where they are needed, and weights of experts that have tokens are read once. Many tokens:
arithmetic counts, so products loop over the inner dimension, norms are kernels of their own and tokens are sorted by
expert.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

from m3asr.kernels.pieces import Tile, at_least_16

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
    best: Tile  # the head where the best path is all that is wanted


# (regime, operation) -> {tokens: tile}: the best of those that `benchmarks.kernels` tried, in bfloat16 at the seed's
# shapes; measured.json beside this file, see `read_measured`.
MEASURED: dict[tuple[str, str], dict[int, Tile]] = {}
MEASURED_WIDTH = 512
# The most tokens that are treated as few. At 128 few took 3.3 ms and many 1.4 (seed's shapes without clusters, H100);
# of another width many are faster at 64, too: 0.69 ms and 0.80 (the package's model, 320).
FEW_TOKENS = 64
# Tiles for many tokens serve down to so many times fewer than they were measured with. Farther off the rule is better:
# at 256 tokens those of 4096 gave a product 8 programs, where the card has room for 132.
REACH = 2


def read_measured(path: Path) -> None:
    """Put what a `tiles.json` of `benchmarks.kernels` says over what MEASURED holds."""
    for key, rows in json.loads(Path(path).read_text(encoding="utf-8")).items():
        regime, operation = key.split()
        known = MEASURED.setdefault((regime, operation), {})
        known.update({int(tokens): Tile(**tile) for tokens, tile in rows.items()})


PACKAGE = Path(__file__).parent / "measured.json"
read_measured(PACKAGE)


def are_few(tokens: int, width: int, wide: bool) -> bool:
    """Whether the kernels for few tokens are the faster ones."""
    return tokens <= FEW_TOKENS and width == MEASURED_WIDTH and not wide


def tiles_for(regime: str, tokens: int, width: int, hidden: int, wide: bool) -> Tiles:
    """Tiles of a stack of width D with feed-forwards of `hidden`; wide: 4 bytes a number."""
    rule = (few if regime == "few" else many)(tokens, width, hidden, wide)
    if wide or width != MEASURED_WIDTH:
        return rule
    known = {}
    for field in fields(Tiles):
        measured = MEASURED.get((regime, field.name))
        if measured:
            near = min(measured, key=lambda n: abs(math.log(n / tokens)))
            if regime == "many" and tokens * REACH < near:
                continue
            tile = measured[near]
            # A tile that holds the whole inner dimension must hold this one too, in as many registers.
            if regime == "few" and field.name in ("down", "expert_down"):
                inner = at_least_16(hidden)
                larger = max(1, inner // tile.k)
                tile = replace(tile, k=inner, n=max(16, tile.n // larger), warps=min(8, tile.warps * larger))
            known[field.name] = tile
    if regime == "many" and known.get("expert_up", rule.expert_up).m != known.get("expert_down", rule.expert_down).m:
        # One sort serves both, and a tile of another height was never measured.
        known |= {"expert_up": rule.expert_up, "expert_down": rule.expert_down}
    return replace(rule, **known)


# Whose programs loop over the inner dimension, with the operands of all stages but one in shared memory.
_LOOPS = (
    "next_convolution", "subsampling_out", "head", "up", "qkv", "gated", "down", "out", "expert_up", "expert_down",
)  # fmt: skip


def fitted(tiles: Tiles, shared: int, bytes_a_number: int = 2) -> Tiles:
    """The same with fewer stages where their operands would not fit into so many bytes of shared memory: tiles were
    measured on cards that have more of it than most.
    """
    changed = {}
    for name in _LOOPS:
        tile = getattr(tiles, name)
        stage = bytes_a_number * tile.k * (tile.m + tile.n)
        if stage * (tile.stages - 1) > shared:
            changed[name] = replace(tile, stages=max(1, 1 + shared // stage))
    return replace(tiles, **changed)


_BEST = Tile(128, 128, warps=4, stages=3, copied=2)


def few(tokens: int, width: int, hidden: int, wide: bool) -> Tiles:
    """The rule for few tokens."""
    rows = 16 if tokens <= 80 else 32
    columns = 16 if wide else 32
    whole, inner = at_least_16(width), at_least_16(hidden)
    warps = 4 if rows == 16 and inner <= 1024 else 8
    columns = 64 if tokens > 128 and not wide else columns
    norm_linear = Tile(rows, columns, warps=8, parts=parts_of(whole, 8, wide))

    def experts(columns: int, inner: int) -> Tile:
        if wide:
            return Tile(16, 16, k=inner, warps=8, stages=1, parts=parts_of(inner, 8, False), walkers=2)
        warps = 4 if inner <= 1024 else 8
        return Tile(16, columns, k=inner, warps=warps, stages=1, parts=parts_of(inner, warps, False), walkers=4)

    return Tiles(
        first_convolution=Tile(1, 512, k=1, warps=4),
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
        expert_up=experts(32, whole),
        expert_down=experts(16, inner),
        sort=Tile(1, 1024),
        heard=Tile(16, 32, k=64, warps=4),
        head=Tile(rows, 32, k=whole, warps=warps, parts=parts_of(whole, warps, wide)),
        log_softmax=Tile(1, 2048, warps=8),
        best=_BEST,
    )


def parts_of(inner: int, warps: int, wide: bool) -> int:
    """A part of the inner dimension for each warp, 32 elements at least."""
    return 1 if wide else max(1, min(warps, inner // 32))


# Of less than 64 rows the product is turned, so its columns are the matrix unit's 64 rows.
_PRODUCTS = (
    Tile(128, 128, k=64, warps=4, stages=3, copied=2, stored=4),
    Tile(64, 128, k=64, warps=4, stages=4, copied=2, stored=2),
    Tile(64, 64, k=128, warps=4, stages=3, copied=2),
    Tile(32, 64, k=128, warps=4, stages=3, copied=4),
    Tile(16, 64, k=128, warps=4, stages=4, copied=4),
)
# Convolutions gather their rows, which the copy engine does not.
_CONVOLUTIONS = (
    Tile(128, 256, k=64, warps=8, stages=3),
    Tile(128, 128, k=64, warps=8, stages=4),
    Tile(64, 128, k=64, warps=4, stages=4),
    Tile(64, 64, k=64, warps=4, stages=4),
    Tile(32, 64, k=128, warps=4, stages=3),
)


def product(tokens: int, columns: int, wide: bool, rows: int | None = None, of=_PRODUCTS) -> Tile:
    """The largest tile that still gives enough programs; `rows` fixes its height."""
    if wide:
        return Tile(rows or 64, 64, k=32, warps=4, stages=2)
    tiles = [tile for tile in of if rows is None or tile.m == rows]
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
        first_convolution=Tile(1, 512, k=1, warps=4),
        next_convolution=product(4 * tokens, 2 * width, wide, of=_CONVOLUTIONS),
        subsampling_out=product(tokens, 2 * width, wide),
        up=product(tokens, hidden, wide),
        qkv=product(tokens, 3 * width, wide),
        gated=product(tokens, 2 * width, wide),
        down=product(tokens, width, wide),
        out=product(tokens, width, wide),
        norm=Tile(1 if tokens <= 1024 else 4, 1, warps=4),
        attention=Tile(64, 32, warps=4, stages=2)
        if wide
        else Tile(64, 128 if tokens <= 1024 else 64, warps=4, stages=2, copied=1),
        depthwise=Tile(1, 1, warps=4) if tokens <= 1024 else Tile(8, 1, warps=4, parts=2),
        router=Tile(1, 1, warps=4) if tokens <= 256 else Tile(16, 1, k=256, warps=4, stages=2),
        expert_up=product(tokens, hidden, wide, height),
        expert_down=product(tokens, width, wide, height),
        sort=Tile(1, max(128, 1 << (tokens - 1).bit_length()))
        if tokens <= 1024
        else Tile(1, 1024, parts=4 if tokens <= 8192 else 16),
        heard=Tile(64 if tokens > 1024 else 16, 64, k=32, warps=4, stages=2),
        head=product(tokens, 8 * width, wide),
        log_softmax=Tile(1, 2048, warps=8),
        best=_BEST,
    )
