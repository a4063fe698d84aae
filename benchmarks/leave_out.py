"""Where the time of a replayed graph goes: `python -m benchmarks.leave_out --inputs 1x206 1x1024 --out DIR`.

A kernel timed alone in a chain finds its code, its weights and its inputs in other places than inside the engine. So
the engine's own graph is captured again with some launches left out, or with nothing but them, and what it takes less
is what they cost in place. `without` is that: microseconds that the whole graph gains. `alone` is a graph of them and
no others. `empty` has launches of the same number that do nothing; `early` waits for the whole launch before it.

What a left-out launch would have written holds whatever lay there: results are wrong and nobody reads them. Numbers
that decide where a kernel reads (lengths, experts' choices, sorted tokens) are those of a true run, kept.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.card import copy_bandwidth, timed
from benchmarks.encoder import inputs_for
from benchmarks.launches import ROUTED, Launches, empty_kernel, record, shared_weights
from benchmarks.models import preset, random_model, spread_routers
from m3asr.engines.cuda import CudaEngine, tiles
from m3asr.engines.cuda.clustered import Limits
from m3asr.kernels.pieces import Tile


def chain(launch, count: int, repeats: int = 10) -> float:
    """Microseconds of each of `count` launches in one graph."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            launch()
    return 1e3 * timed(graph.replay, repeats=repeats) / count


def of_launches(say) -> dict:
    """What a launch costs here, without any work."""
    scratch, rows = torch.zeros(1024, device="cuda", dtype=torch.int32), {}
    for programs, warps in ((16, 4), (128, 4), (128, 8), (512, 4)):
        for pdl in (True, False):
            options = Tile(1, 1, warps=warps).options(pdl)
            rows[f"empty launch, {programs} programs of {warps} warps, {'dependent' if pdl else 'plain'}"] = chain(
                lambda n=programs, p=pdl, o=options: empty_kernel[(n,)](scratch, PDL=p, **o), 200
            )
    for name, us in rows.items():
        say(f"{us:9.2f} us  {name}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", nargs="+", default=["1x206", "1x1024", "1x2048"])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--preset", default="seed", choices=("seed", "tiny"))
    parser.add_argument("--no-clusters", action="store_true", help="as longer utterances are run")
    parser.add_argument("--phases-only", action="store_true", help="of clusters, without anything left out")
    parser.add_argument("--tiles", type=Path, help="tiles.json of benchmarks.kernels")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=100, help="seconds after which nothing new is started")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tiles is not None and args.tiles.is_file():
        tiles.read_measured(args.tiles)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)

    results = {"card": torch.cuda.get_device_properties(0).name, "torch": torch.__version__, "inputs": {}, "errors": []}
    results["copy_bytes_per_s"] = copy_bandwidth()
    say(f"{results['card']}: copy {results['copy_bytes_per_s'] / 1e12:.2f} TB/s")
    config = preset(args.preset)
    with torch.inference_mode():
        if not args.phases_only:
            results["launch_us"] = of_launches(say)
        model = random_model(config, "cuda")
        spread_routers(model)
        engine = CudaEngine(model, args.precision)
        del model
        if args.no_clusters:
            engine.forward.limits = Limits(0, 0)
        watch = Launches()
        for name in args.inputs:
            try:
                phases(engine, name, results, say)
            except Exception as error:
                results["errors"].append(f"phases {name}: {type(error).__name__}: {str(error)[:300]}")
            if args.phases_only:
                continue
            of_one_input(engine, watch, name, args, results, say, lambda: time.monotonic() - began > args.budget)
            (args.out / "leave_out.json").write_text(json.dumps(results, indent=1))
    for error in results["errors"]:
        print("!", error)
    print(json.dumps(results))


# What lies between two marks of the kernels, by their first mark.
PHASES = {
    "feed forward, qkv": (0, "weights asked|wait|rows, norm|up|sums|sent|down|x, norm|sent|qkv|stored"),
    "attention, gated": (16, "weights asked|wait|scores|softmax|values|sent|out|x, norm|sent|gated|stored"),
    "convolution, router": (32, "weights asked|wait|taps|norm|sent|pointwise|x, norm|logits|sent|chosen"),
}


def phases(engine: CudaEngine, name: str, results: dict, say) -> None:
    """Cycles of the first program of the last launch of each kernel of clusters, from mark to mark."""
    forward = engine.forward
    usual, forward.limits = forward.limits, replace(forward.limits, timed=True)
    try:
        engine.drop_graphs()
        graph = engine.graph_for(*map(int, name.split("x")))
        graph.features.normal_()
        graph.lengths.fill_(int(name.split("x")[1]))
        graph.replay()
        kernels = forward.clustered[0].made.get(True)
        if kernels is not None:
            marks = kernels.kernels.numbers("marks", 64)
            for part, (first, words) in PHASES.items():
                steps = [f"{word} {marks[first + i + 1] - marks[first + i]}" for i, word in enumerate(words.split("|"))]
                say(f"{name} {part}: " + ", ".join(steps))
                results.setdefault("phases", {})[f"{name} {part}"] = steps
    finally:
        forward.limits = usual
        engine.drop_graphs()


def of_one_input(engine: CudaEngine, watch: Launches, name: str, args, results: dict, say, late) -> None:
    """The table of one input, printed and put into `results`."""
    data = inputs_for(name, engine.config.encoder.input_dim)[0]
    row = results["inputs"][name] = {}

    def time_it() -> float:
        engine.drop_graphs()
        graph = engine.graph_for(*map(int, name.split("x")))
        graph.fill(*data)
        return 1e3 * timed(graph.replay, repeats=args.repeats, warmup=3)

    def attempt(what: str, prepare=lambda: None, undo=lambda: None) -> float | None:
        """Microseconds of the graph so changed; a failure is printed, and costs nothing else."""
        if late():
            return None
        watch.reset()
        try:
            prepare()
            row[what] = time_it()
            return row[what]
        except Exception as error:
            results["errors"].append(f"{name}, {what}: {type(error).__name__}: {str(error)[:300]}")
            say(results["errors"][-1])
            return None
        finally:
            undo()

    usual = attempt("as it is")
    with watch:
        graph = engine.graph_for(*map(int, name.split("x")))
        graph.fill(*data)
        record(engine, watch, graph)
        whole = attempt("choices kept")
        if whole is None:
            return
        counts = dict(watch.kinds)
        hit = sum(int(c[c >= 0].unique().numel()) for c in watch.choices) / max(1, len(watch.choices))
        say(f"{name}: {usual or 0:.0f} us, with kept choices {whole:.0f}; {sum(counts.values())} launches, "
            f"{hit:.1f} experts hit")  # fmt: skip

        def only(*kinds):
            watch.passes = lambda kind: kind in kinds

        def without(*kinds):
            watch.passes = lambda kind: kind not in kinds

        table = {}
        for kind in counts:
            left = attempt(f"without {kind}", lambda k=kind: without(k))
            alone = None if kind == "first convolution" else attempt(f"only {kind}", lambda k=kind: only(k))
            table[kind] = (left, alone)
        base = attempt("only the lengths", lambda: only())
        print(f"{'kind':26s}{'launches':>9s}{'without':>10s}{'each':>8s}{'alone':>10s}{'each':>8s}")
        for kind, (left, alone) in table.items():
            n, line = counts[kind], f"{kind:26s}{counts[kind]:9d}"
            line += f"{whole - left:10.1f}{(whole - left) / n:8.2f}" if left is not None else f"{'-':>18s}"
            if alone is not None and base is not None:
                line += f"{alone - base:10.1f}{(alone - base) / n:8.2f}"
            print(line, flush=True)

        def say_less(what: str, us: float | None) -> None:
            if us is not None:
                say(f"{us:9.1f} us, {whole - us:8.1f} less: {what}")

        for kinds in (
            ROUTED, ("experts 1", "experts 2"), ("qkv", "attention", "attention out"),
            ("gated", "depthwise", "pointwise 2"), ("up", "down"), ("router", "cluster: route", "experts 1"),
        ):  # fmt: skip
            words = ", ".join(k for k in kinds if k in counts)
            if not words:
                continue
            say_less(f"without {words}", attempt(f"without {words}", lambda k=kinds: without(*k)))
            say_less(f"only {words}", attempt(f"only {words}", lambda k=kinds: only(*k)))

        def empty():
            only("first convolution")
            watch.becomes_empty = True

        say_less("every launch one of 128 programs that do nothing", attempt("empty", empty))

        def empty_experts():
            without("experts 1", "experts 2", "cluster: experts")
            watch.becomes_empty = True

        say_less("experts' launches that do nothing", attempt("empty experts", empty_experts))
        say_less("no expert has tokens", attempt("no experts", lambda: watch.change(lambda c: c * 0 - 1)))
        say_less("one expert has all tokens", attempt("one expert", lambda: watch.change(lambda c: c.clamp(max=0))))
        forward = engine.forward
        say_less(
            "no branch for the embedding network",
            attempt("no branch", lambda: setattr(forward, "beside", False), lambda: setattr(forward, "beside", True)),
        )
        unheard = torch.zeros(1 << 11, 1 << 10, device="cuda")
        experts = engine.config.encoder.moe.num_experts
        say_less(
            "no embedding network",
            attempt(
                "no embedding network",
                lambda: setattr(forward, "_heard", lambda x, shape: lambda i: unheard[: shape.tokens, :experts]),
                lambda: delattr(forward, "_heard"),
            ),
        )
        for words, dense, routed in (("dense", 1, 0), ("experts'", 0, 1), ("all", 1, 1)):
            undo = []

            def share(dense=dense, routed=routed, undo=undo):
                undo.append(shared_weights(engine, dense, routed))
                watch.one_layer = bool(routed)

            say_less(
                f"{words} weights of one layer for all, in the cache",
                attempt(f"{words} weights shared", share, lambda u=undo: u and u[0]()),
            )
        if name != args.inputs[0]:
            return  # each of these compiles a kernel again
        for kind in counts:
            if counts[kind] > 2:
                say_less(f"no early start of {kind}", attempt(f"plain {kind}", lambda k=kind: plain(watch, k)))


def plain(watch: Launches, kind: str) -> None:
    watch.plain = (kind,)


if __name__ == "__main__":
    main()
