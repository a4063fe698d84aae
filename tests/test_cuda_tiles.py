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

from benchmarks.in_place import sweep  # noqa: E402
from benchmarks.kernels import best_tiles  # noqa: E402
from m3asr.engines.cuda import tiles  # noqa: E402
from m3asr.kernels.linear import LIBRARY  # noqa: E402
from m3asr.kernels.pieces import Tile  # noqa: E402


@pytest.mark.parametrize("hidden", [256, 1024, 2048])
@pytest.mark.parametrize("width", [144, 256, 512])
@pytest.mark.parametrize("tokens", [16, 48, 64, 128, 192, 256, 512, 1024, 2048, 4096, 6144, 16384, 50000])
def test_tiles_are_what_they_must(tokens, width, hidden):
    """Enough programs; one height for one sort."""
    chosen = tiles.tiles_for(tokens, width, hidden, False)
    assert chosen.expert_up.m == chosen.expert_down.m
    if tokens <= 1024:
        rule = tiles.rule(tokens, width, hidden, False)  # where nothing was measured
        for tile, columns in ((rule.up, hidden), (rule.qkv, 3 * width), (rule.out, width), (rule.down, width)):
            smallest = (tile.m, tile.n) == (16, 64)
            assert smallest or -(-tokens // tile.m) * -(-columns // tile.n) >= tiles.PROGRAMS


def test_what_was_measured_serves_near_its_size_and_width():
    measured = tiles.MEASURED["up"]
    assert tiles.tiles_for(4096, 512, 1024, False).up == measured[4096]
    assert tiles.tiles_for(60000, 512, 1024, False).up == measured[16384]
    near = tiles.tiles_for(100, 512, 1024, False)
    assert near.up == tiles.rule(100, 512, 1024, False).up
    assert near.next_convolution == tiles.MEASURED["next_convolution"][64]
    # Of products, which pairs of programs make there, none was measured.
    between = tiles.tiles_for(1536, 512, 1024, False)
    assert between.up == tiles.rule(1536, 512, 1024, False).up
    assert between.expert_up == tiles.MEASURED["expert_up"][2048]
    for tokens, width, wide in ((4096, 256, False), (4096, 512, True)):
        chosen = tiles.tiles_for(tokens, width, 1024, wide)
        assert chosen == tiles.rule(tokens, width, 1024, wide)
        assert LIBRARY not in (chosen.up, chosen.qkv, chosen.down, chosen.out, chosen.gated, chosen.head)


def test_what_was_measured_is_of_operations_that_there_are():
    assert tiles.MEASURED.keys() <= {field.name for field in dataclasses.fields(tiles.Tiles)}


@pytest.mark.parametrize("tokens", [64, 256, 512, 1024, 2048, 4096, 16384])
def test_tiles_fit_cards_with_less_shared_memory(tokens):
    usual = tiles.tiles_for(tokens, 512, 1024, False)
    assert tiles.fitted(usual, 227 << 10) == usual  # where they were measured
    for kilobytes in (163, 99):
        chosen = tiles.fitted(usual, kilobytes << 10)
        for name in ("next_convolution", "up", "down", "qkv", "out", "head", "expert_up"):
            tile, measured = getattr(chosen, name), getattr(usual, name)
            assert 2 * tile.k * (tile.m + tile.n) * max(1, tile.stages - 1) <= kilobytes << 10
            assert dataclasses.replace(tile, stages=0, k=0) == dataclasses.replace(measured, stages=0, k=0)
            if 2 * measured.k * (tile.m + tile.n) <= kilobytes << 10:
                assert tile.k == measured.k
    assert tiles.fitted(tiles.tiles_for(512, 512, 1024, False), 99 << 10).next_convolution.stages == 3


def test_a_file_of_measured_tiles_replaces_what_it_names(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "MEASURED", copy.deepcopy(tiles.MEASURED))
    before = tiles.tiles_for(4096, 512, 1024, False)
    tile = {"m": 32, "n": 64, "k": 64, "warps": 4, "stages": 3, "parts": 1}
    (tmp_path / "tiles.json").write_text(json.dumps({"up": {"4096": tile}, "heard": {"512": tile}}))
    tiles.read_measured(tmp_path / "tiles.json")
    after = tiles.tiles_for(4096, 512, 1024, False)
    assert (after.up.m, after.up.n) == (32, 64) and after.qkv == before.qkv and after.heard == after.up
    assert tiles.tiles_for(16384, 512, 1024, False).up == tiles.MEASURED["up"][16384]


def test_the_benchmark_gives_both_products_of_the_experts_one_height():
    """The height that is best for both together, though each alone is faster with another; wrong tiles do not count."""

    def rows(**us):
        made = [{"us": t, "error": 1e-3, **dataclasses.asdict(Tile(int(m[1:]), 64))} for m, t in us.items()]
        return {"tiles": sorted(made, key=lambda row: row["us"])}

    wrong = {"us": 0.1, "error": 1.0, **dataclasses.asdict(Tile(32, 64))}
    up, down = rows(m128=60.0, m64=63.0, m32=90.0), rows(m64=72.0, m128=99.0, m32=71.0)
    down["tiles"].insert(0, wrong)
    best = best_tiles({"expert_up 64x1024": up, "expert_down 64x1024": down})
    heights = {operation: tile["m"] for operation, by_tokens in best.items() for tile in by_tokens.values()}
    assert heights == {"expert_up": 64, "expert_down": 64}


def test_tiles_found_in_place(monkeypatch):
    """What the whole takes decides, one operation after the other; what does not run, or gains nothing, stays out."""
    monkeypatch.setattr(tiles, "MEASURED", {"up": {256: Tile(16, 16)}, "down": {256: Tile(16, 16), 512: Tile(8, 8)}})
    costs = {16: 5.0, 32: 4.0, 64: 3.0, 128: float("inf"), 48: 2.999}

    def whole():
        up, down = (tiles.MEASURED[name][256].m for name in ("up", "down"))
        return costs[up] + costs[down] + 10 * (up == down == 64)  # together they do not fit

    candidates = [Tile(m, 16) for m in (16, 32, 64, 128, 48)]
    said = []
    sweep(whole, 256, {"up": candidates, "down": candidates[:4], "norm": [Tile(1, 1)]}, said.append)
    assert tiles.MEASURED["up"] == {256: Tile(64, 16)}
    assert tiles.MEASURED["down"] == {256: Tile(32, 16), 512: Tile(8, 8)}
    assert tiles.MEASURED["norm"] == {} and len(said) == 3
