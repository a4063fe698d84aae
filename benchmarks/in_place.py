"""Tiles found in place: `python -m benchmarks.in_place --inputs 1x1024 1x2048 --out DIR`.

A launch of some hundred tokens finds others beside it, whose programs leave it room or not, and how long it takes
depends on that more than on itself. So here the engine's own graph is captured with one tile after the other, and what
the whole takes decides, for one operation after the other and then again with the best of all. Kernels are compiled
ahead by several processes. DIR/tiles.json has the winners, for `benchmarks.encoder --tiles`. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.encoder import inputs_for, measure_engine
from benchmarks.kernels import as_text
from benchmarks.models import preset, random_model, spread_routers
from m3asr.engines.cuda import CudaEngine, tiles
from m3asr.kernels.linear import LIBRARY
from m3asr.kernels.pieces import Tile

_SHORT = [Tile(m, n, 512, stages=2, copied=2) for m, n in ((64, 16), (32, 64), (64, 32))]
_PRODUCTS = [*_SHORT, Tile(64, 64, 512, stages=2, copied=1)]
_PRODUCTS += [Tile(m, n, 128, stages=s, copied=2) for m, n, s in ((64, 64, 3), (32, 64, 5), (64, 32, 5))]
CANDIDATES: dict[str, list[Tile]] = {
    **dict.fromkeys(("up", "qkv", "gated", "out"), _PRODUCTS),
    "down": [
        *(Tile(m, n, 256, stages=3, copied=2) for m, n in ((64, 16), (32, 64), (64, 32))),
        *(Tile(64, n, 128, stages=5, copied=2) for n in (16, 32)),
    ],
    "attention": [Tile(64, n, stages=s, copied=1) for n, s in ((128, 2), (128, 3), (64, 2))],
    "depthwise": [Tile(1, 1, warps=2, stages=1), Tile(1, 1, warps=4, stages=1), Tile(4, 1, warps=4, stages=1, parts=2)],
    "norm": [Tile(1, 1, warps=w, stages=1) for w in (1, 2, 4)],
    "subsampling_out": [LIBRARY, Tile(32, 64, 256, stages=4, copied=1)],
    "head": [*(Tile(64, n, 64, stages=4) for n in (64, 128)), Tile(64, 64, 512, stages=2, copied=1)],
    "log_softmax": [Tile(1, n, warps=w, stages=1) for n, w in ((1024, 8), (2048, 16), (8192, 8))],
}
BETTER = 0.002  # of the whole time: what repeats of one capture differ by


def sweep(time_it: Callable[[], float], tokens: int, candidates: dict[str, list[Tile]], say=print) -> None:
    """Put the best of each operation's candidates into `tiles.MEASURED` at `tokens`, one by one. What stands there
    stays unless another is BETTER. time_it: what the whole takes with what stands there; inf if it does not run.
    """
    for operation, others in candidates.items():
        known = tiles.MEASURED.setdefault(operation, {})
        before, best = known.get(tokens), time_it()
        chosen, row = before, []
        for tile in others:
            if tile != before:
                known[tokens] = tile
                row.append(time_it())
                if row[-1] < best * (1 - BETTER):
                    chosen, best = tile, row[-1]
        if chosen is None:
            del known[tokens]
        else:
            known[tokens] = chosen
        say(f"{operation:16s}{best:8.4f} ms  {' '.join(f'{ms:.4f}' for ms in row)}  {chosen}")


@torch.inference_mode()
def compile_ahead(job) -> None:
    """Run the i-th candidates of all operations in a model of two blocks: their kernels lie where Triton keeps them."""
    i, names, precision = job
    config = preset("seed")
    encoder = config.encoder
    few = replace(encoder, num_blocks=2, embed=replace(encoder.embed, num_blocks=2))
    engine = CudaEngine(random_model(replace(config, encoder=few), "cuda"), precision)
    for name in names:
        for operation, candidates in CANDIDATES.items():
            if i < len(candidates):
                known = tiles.MEASURED.setdefault(operation, {})
                kept, known[tokens_of(engine, name)] = dict(known), candidates[i]
                timed(engine, name, 1)
                tiles.MEASURED[operation] = kept


def tokens_of(engine: CudaEngine, name: str) -> int:
    batch, _, size = engine.bucket(*map(int, name.split("x")))
    return batch * size


def timed(engine: CudaEngine, name: str, repeats: int) -> float:
    """Milliseconds of the graph as it is captured now; inf if a tile does not fit."""
    engine.drop_graphs()
    try:
        return measure_engine(engine, name, inputs_for(name, engine.config.encoder.input_dim), repeats)["ms"]
    except Exception as error:
        if "out of resource" not in str(error):
            raise
        return float("inf")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", nargs="+", default=["1x1024", "1x2048"])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--sweeps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile; 0: as kernels are needed")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    began, found, results = time.monotonic(), {}, {}
    if args.jobs:
        jobs = [(i, args.inputs, args.precision) for i in range(max(map(len, CANDIDATES.values())))]
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            pool.map(compile_ahead, jobs, chunksize=1)
        print(f"[{time.monotonic() - began:6.1f} s] compiled", flush=True)
    model = random_model(preset("seed"), "cuda")
    spread_routers(model)
    engine = CudaEngine(model, args.precision)
    for name in args.inputs:
        tokens = tokens_of(engine, name)
        results[name] = {"before": timed(engine, name, args.repeats)}
        for _ in range(args.sweeps):
            sweep(lambda name=name: timed(engine, name, args.repeats), tokens, CANDIDATES)
        results[name]["found"] = timed(engine, name, args.repeats)
        print(f"[{time.monotonic() - began:6.1f} s] {name}: {results[name]}", flush=True)
        for operation in CANDIDATES:
            if tokens in tiles.MEASURED[operation]:
                found.setdefault(operation, {})[str(tokens)] = asdict(tiles.MEASURED[operation][tokens])
        (args.out / "tiles.json").write_text(as_text(found))
    print(json.dumps({"card": torch.cuda.get_device_name(), "torch": torch.__version__, "ms": results}))


if __name__ == "__main__":
    main()
