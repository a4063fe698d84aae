"""Tile sizes: what was measured where it was measured, elsewhere a rule; no kernel runs here."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.kernels import best_tiles  # noqa: E402
from m3asr.engines.cuda import tiles  # noqa: E402
from m3asr.kernels.linear import LIBRARY  # noqa: E402
from m3asr.kernels.pieces import Tile  # noqa: E402


@pytest.mark.parametrize("hidden", [256, 1024, 2048])
@pytest.mark.parametrize("width", [144, 256, 512])
@pytest.mark.parametrize("tokens", [16, 48, 64, 128, 192, 256, 512, 1024, 2048, 4096, 6144, 16384, 50000])
def test_tiles_hold_what_they_must(tokens, width, hidden):
    """Whole inner dimensions, in the registers that there are; enough programs; one height for one sort."""
    few, many = (tiles.tiles_for(regime, tokens, width, hidden, False) for regime in ("few", "many"))
    for tile, inner in ((few.down, hidden), (few.expert_down, hidden), (few.out, width), (few.expert_up, width)):
        assert tile.k >= inner
        if tokens <= tiles.FEW_TOKENS:
            # Bytes of weights: in shared memory with as many tokens' inputs, or 128 of each thread's 255 registers.
            weights = tile.n * tile.k * 2
            assert weights <= 512 * 32 * tile.warps or (tile.copied and weights + tile.m * tile.k * 2 <= 220 << 10), (
                tile
            )
    assert many.expert_up.m == many.expert_down.m
    if tokens <= 1024:
        many = tiles.many(tokens, width, hidden, False)  # the rule, where nothing was measured
        for tile, columns in ((many.up, hidden), (many.qkv, 3 * width), (many.out, width), (many.down, width)):
            smallest = (tile.m, tile.n) == (16, 64)
            assert smallest or -(-tokens // tile.m) * -(-columns // tile.n) >= tiles.PROGRAMS


def test_what_was_measured_serves_near_its_size_and_width():
    measured = tiles.MEASURED["many", "up"]
    assert tiles.tiles_for("many", 4096, 512, 1024, False).up == measured[4096]
    assert tiles.tiles_for("many", 60000, 512, 1024, False).up == measured[16384]
    near = tiles.tiles_for("many", 100, 512, 1024, False)
    assert near.up == tiles.many(100, 512, 1024, False).up
    assert near.next_convolution == tiles.MEASURED["many", "next_convolution"][64]
    for tokens, width, wide in ((1536, 512, False), (4096, 256, False), (4096, 512, True)):
        chosen = tiles.tiles_for("many", tokens, width, 1024, wide)
        assert chosen == tiles.many(tokens, width, 1024, wide)
        assert LIBRARY not in (chosen.up, chosen.qkv, chosen.down, chosen.out, chosen.gated, chosen.head)
    assert tiles.tiles_for("few", 16, 512, 1024, False).up == tiles.MEASURED["few", "up"][64]
    few = {(tokens, width, wide) for tokens in (64, 80) for width in (320, 512) for wide in (False, True)
           if tiles.are_few(tokens, width, wide)}  # fmt: skip
    assert few == {(64, 512, False)}


@pytest.mark.parametrize("tokens", [64, 256, 512, 4096, 16384])
def test_tiles_fit_cards_with_less_shared_memory(tokens):
    for regime in ("few", "many"):
        usual = tiles.tiles_for(regime, tokens, 512, 1024, False)
        assert tiles.fitted(usual, 227 << 10) == usual  # where they were measured
        for kilobytes in (163, 99):
            chosen = tiles.fitted(usual, kilobytes << 10)
            for name in ("next_convolution", "up", "down", "expert_up"):
                tile = getattr(chosen, name)
                assert 2 * tile.k * (tile.m + tile.n) * (tile.stages - 1) <= kilobytes << 10
                assert dataclasses.replace(tile, stages=0) == dataclasses.replace(getattr(usual, name), stages=0)
    assert tiles.fitted(tiles.tiles_for("many", 512, 512, 1024, False), 99 << 10).next_convolution.stages == 3


def test_a_file_of_measured_tiles_replaces_what_it_names(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "MEASURED", copy.deepcopy(tiles.MEASURED))
    before = tiles.tiles_for("many", 4096, 512, 1024, False)
    tile = {"m": 32, "n": 64, "k": 64, "warps": 4, "stages": 3, "parts": 1}
    (tmp_path / "tiles.json").write_text(json.dumps({"many up": {"4096": tile}, "many heard": {"512": tile}}))
    tiles.read_measured(tmp_path / "tiles.json")
    after = tiles.tiles_for("many", 4096, 512, 1024, False)
    assert (after.up.m, after.up.n) == (32, 64) and after.qkv == before.qkv and after.heard == after.up
    assert tiles.tiles_for("many", 16384, 512, 1024, False).up == tiles.MEASURED["many", "up"][16384]


def test_the_benchmark_gives_both_products_of_the_experts_one_height():
    """The height that is best for both together, though each alone is faster with another; wrong tiles do not count."""

    def rows(**us):
        made = [{"us": t, "error": 1e-3, **dataclasses.asdict(Tile(int(m[1:]), 64))} for m, t in us.items()]
        return {"tiles": sorted(made, key=lambda row: row["us"])}

    wrong = {"us": 0.1, "error": 1.0, **dataclasses.asdict(Tile(32, 64))}
    up, down = rows(m128=60.0, m64=63.0, m32=90.0), rows(m64=72.0, m128=99.0, m32=71.0)
    down["tiles"].insert(0, wrong)
    best = best_tiles({"many expert_up 64x1024": up, "many expert_down 64x1024": down})
    heights = {operation: tile["m"] for operation, by_tokens in best.items() for tile in by_tokens.values()}
    assert heights == {"many expert_up": 64, "many expert_down": 64}
