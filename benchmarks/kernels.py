"""Each kernel alone: microseconds a launch, error against torch, floor; and which tile is best.

`python -m benchmarks.kernels --out DIR --shapes 1x206 1x1024 --cases up out` times a chain of launches, each with
weights of its own, captured in one CUDA graph with dependent launch, as the engine runs them. The floor of a launch is
the larger of its bytes over the measured copy bandwidth and its arithmetic over the measured matrix rate. Tiles are
compiled ahead by several processes. DIR/tiles.json has the winners, for `benchmarks.encoder --tiles`. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from itertools import product
from pathlib import Path

import torch

from benchmarks.card import copy_bandwidth, gemm_peak, timed
from benchmarks.case import DTYPE, MOST_TOKENS, PAIRS, SHAPES, TOGETHER, WIDTH, Case
from benchmarks.cases import CASES, make
from m3asr.engines.cuda import tiles
from m3asr.kernels.linear import LIBRARY
from m3asr.kernels.pieces import Tile

# What stands in place of a tile, as it is called; and of that, what the engine has no tile for.
INSTEAD = {LIBRARY: "library", PAIRS: "pairs", TOGETHER: "together"}
NO_TILES = [(tile.m, tile.n) for tile in (PAIRS, TOGETHER)]
# Relative error above which a tile is wrong, whatever its time: operands and results of 8 bits lose 2e-3 to 6e-3.
RIGHT = 8e-3


def compile_ahead(job) -> None:
    """In a worker: run some tiles of a case once, which leaves the compiled kernels in Triton's cache."""
    name, shape, hidden, part, parts = job
    try:
        with torch.inference_mode():
            case = make(name, shape, hidden)
            case.prepare()
            for tile in case.tiles[part::parts]:
                try:
                    case.launch(0, tile)
                except Exception:  # found again, and reported, by the process that measures
                    continue
            torch.cuda.synchronize()
    except Exception as error:
        print(f"compiling {name} {shape}: {error}", flush=True)


def measure(case: Case, tile: Tile) -> tuple[float, float]:
    """(microseconds a launch, relative error). Raises ValueError, and times nothing, for a wrong result."""
    case.prepare()
    if case.poison is not None:
        case.poison.fill_(float("nan"))  # what a tile does not write must not be what another one wrote
    case.launch(0, tile)
    result, reference = case.result().double(), case.reference().double()
    error = float((result - reference).norm() / reference.norm())
    if not error < RIGHT:
        raise ValueError(f"wrong: relative error {error:.1e}")
    launches = max(8, case.copies)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            case.launch(i % case.copies, tile)
    return 1e3 * timed(graph.replay, repeats=5, warmup=1) / launches, error


def best_tiles(cases: dict) -> dict:
    """What `tiles.read_measured` reads: operation -> tokens -> tile, of tiles that were right and timed.

    One sort serves both products of the experts, so their tiles have the height whose best two take the least time
    together.
    """
    right = {
        key: [row for row in value["tiles"] if row.get("error", 1.0) < RIGHT and (row["m"], row["n"]) not in NO_TILES]
        for key, value in cases.items()
    }
    for shape in {key.split()[1] for key in right}:
        pair = [f"{operation} {shape}" for operation in ("expert_up", "expert_down")]
        if all(right.get(key) for key in pair):
            by_height = [{row["m"]: row for row in reversed(right[key])} for key in pair]  # the fastest of each
            shared = by_height[0].keys() & by_height[1].keys()
            height = min(shared, key=lambda m: sum(rows[m]["us"] for rows in by_height))
            for key, rows in zip(pair, by_height, strict=True):
                right[key] = [rows[height]]
    best: dict[str, dict] = {}
    for key, rows in right.items():
        operation, shape = key.split()
        if rows:
            tile = {field.name: rows[0][field.name] for field in dataclasses.fields(Tile)}
            best.setdefault(operation, {})[str(SHAPES[shape][0] * SHAPES[shape][1])] = tile
    return best


def join_tiles(files: list[Path]) -> str:
    """One `tiles.json` from several; what a later file says of an operation at a number of tokens stands."""
    joined: dict[str, dict] = {}
    for file in files:
        for operation, rows in json.loads(file.read_text()).items():
            joined.setdefault(operation, {}).update(rows)
    return as_text(joined)


def as_text(tiles_by_operation: dict) -> str:
    """The same as JSON, a tile a line."""
    operations = [
        f' "{operation}": {{\n' + ",\n".join(f'  "{n}": {json.dumps(tile)}' for n, tile in rows.items()) + "\n }"
        for operation, rows in tiles_by_operation.items()
    ]
    return "{\n" + ",\n".join(operations) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["1x206", "1x1024", "16x1024"], choices=SHAPES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(16, max(4, os.cpu_count() - 4)),
        help="processes that compile, each with memory of the card",
    )
    parser.add_argument("--budget", type=float, default=420, help="seconds after which nothing new is started")
    parser.add_argument("--used", action="store_true", help="only the tiles in use, and what stands in place of a tile")
    parser.add_argument("--show", type=int, default=4, help="how many tiles of each case are printed")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    began = time.monotonic()
    tokens = {shape: batch * frames for shape, (batch, frames, _) in SHAPES.items()}
    todo = [
        (case, shape)
        for shape, case in product(args.shapes, args.cases)
        if tokens[shape] <= MOST_TOKENS.get(case, tokens[shape])
    ]
    if args.jobs:
        jobs = [(*job, args.hidden, part, 4) for job in todo for part in range(4)]
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            done = pool.map_async(compile_ahead, jobs, chunksize=1)
            done.wait(timeout=args.budget * 0.6)
            pool.terminate()
        print(f"[{time.monotonic() - began:.0f} s] compiled ahead", flush=True)
    bandwidth, peak = copy_bandwidth(), gemm_peak(DTYPE)
    print(f"copy {bandwidth / 1e12:.2f} TB/s, {peak / 1e12:.0f} TFLOP/s", flush=True)
    results = {"copy_bytes_per_s": bandwidth, "bf16_flops": peak, "cases": {}}
    with torch.inference_mode():
        for name, shape in todo:
            if time.monotonic() - began > args.budget:
                print("no time left")
                break
            rows = []
            try:
                case = make(name, shape, args.hidden)
            except Exception as error:
                print(f"{name} {shape}: {type(error).__name__}: {error}")
                continue
            if args.used:
                used = getattr(tiles.tiles_for(tokens[shape], WIDTH, args.hidden, False), name, None)
                case.tiles = [*([used] if used else []), *(tile for tile in case.tiles if tile in INSTEAD)]
            for tile in case.tiles:
                try:
                    us, error = measure(case, tile)
                    rows.append({"us": us, "error": error, **dataclasses.asdict(tile)})
                except Exception as error:
                    rows.append({"us": float("inf"), "failed": str(error)[:200], **dataclasses.asdict(tile)})
                if time.monotonic() - began > args.budget:
                    break
            if not rows:
                continue
            rows.sort(key=lambda row: row["us"])
            floor = 1e6 * max(case.bytes / bandwidth, case.flops / peak)
            results["cases"][f"{name} {shape}"] = {"floor_us": floor, "tiles": rows}
            instead = {(tile.m, tile.n): word for tile, word in INSTEAD.items()}
            named = [f"{instead[r['m'], r['n']]} {r['us']:.2f}; " for r in rows if (r["m"], r["n"]) in instead]
            shown = "".join(named) + "; ".join(
                f"{r['us']:.2f} (m{r['m']} n{r['n']} k{r['k']} w{r['warps']} s{r['stages']} p{r['parts']} "
                f"c{r['copied']} stored{r['stored']} {r.get('error', 9):.0e})"
                for r in [r for r in rows if r["m"]][: args.show]
            )
            failed = sum("failed" in r for r in rows)
            print(f"{shape:8s} {name:18s} floor {floor:7.2f}  best {shown}  failed {failed}", flush=True)
            if failed:
                print("    ", next(r["failed"] for r in rows if "failed" in r).replace("\n", " ")[:160])
            del case
            torch.cuda.empty_cache()
            (args.out / "kernels.json").write_text(json.dumps(results))
            (args.out / "tiles.json").write_text(as_text(best_tiles(results["cases"])))
            tiles.read_measured(args.out / "tiles.json")  # the experts' other product is tried with the best of this
    best = {key: {k: v for k, v in value["tiles"][0].items()} for key, value in results["cases"].items()}
    print(json.dumps({key: round(value["us"], 2) for key, value in best.items()}))


if __name__ == "__main__":
    main()
