"""Tile sizes by operation, number of tokens and type: what was measured, and a rule for everything else.

With fewer tokens tiles are smaller, so that there are enough of them for a card; a larger one reads each number less
often. Tokens are sorted by expert once, so the tiles of both products of the experts have one height.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

from m3asr.kernels.pieces import Tile

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


# operation -> {tokens: tile}: the best of those that `benchmarks.kernels` tried, in bfloat16 at the seed's shapes;
# measured.json beside this file, see `read_measured`.
MEASURED: dict[str, dict[int, Tile]] = {}
MEASURED_WIDTH = 512
# Tiles serve down to so many times fewer tokens than they were measured with. Farther off the rule is better:
# at 256 tokens those of 4096 gave a product 8 programs, where the card has room for 132.
REACH = 2


def read_measured(path: Path) -> None:
    """Put what a `tiles.json` of `benchmarks.kernels` says over what MEASURED holds."""
    for operation, rows in json.loads(Path(path).read_text(encoding="utf-8")).items():
        known = MEASURED.setdefault(operation, {})
        known.update({int(tokens): Tile(**tile) for tokens, tile in rows.items()})


PACKAGE = Path(__file__).parent / "measured.json"
read_measured(PACKAGE)


def tiles_for(tokens: int, width: int, hidden: int, wide: bool) -> Tiles:
    """Tiles of a stack of width D with feed-forwards of `hidden`; wide: 4 bytes a number."""
    ruled = rule(tokens, width, hidden, wide)
    if wide or width != MEASURED_WIDTH:
        return ruled
    known = {}
    for field in fields(Tiles):
        measured = MEASURED.get(field.name)
        if measured:
            near = min(measured, key=lambda n: abs(math.log(n / tokens)))
            if tokens * REACH >= near:
                known[field.name] = measured[near]
    if known.get("expert_up", ruled.expert_up).m != known.get("expert_down", ruled.expert_down).m:
        # One sort serves both, and a tile of another height was never measured.
        known |= {"expert_up": ruled.expert_up, "expert_down": ruled.expert_down}
    return replace(ruled, **known)


# Whose programs loop over the inner dimension, with the operands of all stages but one in shared memory.
_LOOPS = (
    "next_convolution", "subsampling_out", "head", "up", "qkv", "gated", "down", "out", "expert_up", "expert_down",
)  # fmt: skip


def fitted(tiles: Tiles, shared: int, bytes_a_number: int = 2) -> Tiles:
    """The same with fewer stages, or shorter ones, where their operands would not fit into so many bytes of shared
    memory: tiles were measured on cards that have more of it than most.
    """
    changed = {}
    for name in _LOOPS:
        tile = getattr(tiles, name)
        stage = bytes_a_number * tile.k * (tile.m + tile.n)
        if stage > shared:
            tile = changed[name] = replace(tile, k=128)
            stage = bytes_a_number * tile.k * (tile.m + tile.n)
        if stage * (tile.stages - 1) > shared:
            changed[name] = replace(tile, stages=max(1, 1 + shared // stage))
    return replace(tiles, **changed)


# Of less than 64 rows the product is turned, so its columns are the matrix unit's 64 rows.
_PRODUCTS = (
    Tile(128, 128, k=64, warps=4, stages=3, copied=2, stored=4),
    Tile(64, 128, k=64, warps=4, stages=4, copied=2, stored=2),
    Tile(64, 64, k=128, warps=4, stages=3, copied=2),
    Tile(32, 64, k=128, warps=4, stages=3, copied=4),
    Tile(16, 64, k=128, warps=4, stages=4, copied=4),
)
# A tile of so few tokens takes all of so large an inner dimension in one step: its weights come before the rest.
FEW, WHOLE = 128, 512
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


def _whole(tile: Tile, tokens: int, inner: int) -> Tile:
    """The same with all of the inner dimension in one step, where that is better."""
    return replace(tile, k=WHOLE, stages=2, copied=2) if tile.copied and tokens <= FEW and inner <= WHOLE else tile


def rule(tokens: int, width: int, hidden: int, wide: bool) -> Tiles:
    """The tiles of a stack where nothing was measured; arguments as of `tiles_for`."""
    # Sorted tokens fill tiles of one expert: with some 32 experts, a tile should not be much higher than a share.
    height = 64 if wide or tokens > 1024 else 32 if tokens > 512 else 16
    height = 128 if tokens > 4096 and not wide else height
    return Tiles(
        first_convolution=Tile(1, 512, k=1, warps=4),
        next_convolution=product(4 * tokens, 2 * width, wide, of=_CONVOLUTIONS),
        subsampling_out=product(tokens, 2 * width, wide),
        up=_whole(product(tokens, hidden, wide), tokens, width),
        qkv=_whole(product(tokens, 3 * width, wide), tokens, width),
        gated=_whole(product(tokens, 2 * width, wide), tokens, width),
        down=_whole(product(tokens, width, wide), tokens, hidden),
        out=_whole(product(tokens, width, wide), tokens, width),
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
        heard=Tile(64, 64, k=32, warps=4, stages=2) if tokens > 1024 else Tile(16, 64, k=64, warps=4, stages=3),
        head=_whole(product(tokens, 8 * width, wide), tokens, width),
        log_softmax=Tile(1, 2048, warps=8),
        best=Tile(128, 128, warps=4, stages=3, copied=2),
    )
