"""Tiles for Triton's interpreter, imported by the tests of the CUDA engine."""

import dataclasses

import pytest
import torch

from m3asr.engines.cuda import tiles
from m3asr.kernels.pieces import Tile


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes milliseconds for every program: there, tiles are as large as they come."""
    if torch.cuda.is_available():
        return
    chosen = tiles.tiles_for

    def larger(*args):
        rule = chosen(*args)
        rows = {"norm": Tile(8, 1), "depthwise": Tile(2, 32, parts=2), "sort": Tile(1, 64, parts=2)}
        rows |= {"first_convolution": Tile(32, 64, k=32), "log_softmax": Tile(1, 64), "router": Tile(16, 1, k=64)}
        # As on the cards that have a copy engine; the other ways have tests of their own.
        copies = {"copied": 1, "stored": 2}
        wide = {
            name: dataclasses.replace(getattr(rule, name), n=64, **copies)
            for name in ("up", "qkv", "gated", "down", "out", "expert_up", "expert_down")
        }
        attention = dataclasses.replace(rule.attention, m=16, n=16, **copies)
        return dataclasses.replace(rule, **rows, **wide, attention=attention)

    monkeypatch.setattr(tiles, "PROGRAMS", 1)
    monkeypatch.setattr(tiles, "tiles_for", larger)
