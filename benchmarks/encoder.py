"""How right and how fast the CUDA engine's encoder is on this card: `python -m benchmarks.encoder --out DIR`.

For each input: eager PyTorch in float32 with a loop over experts, eager bfloat16 with grouped products, the same in a
CUDA graph, the engine in each precision, and the floor: the larger of the bytes that must be read over the measured
copy bandwidth and the arithmetic over the measured matrix rate. Times are GPU medians in milliseconds; inputs are
random and rotate. Errors are relative to eager float32 with tf32 off. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import baselines
from benchmarks.accuracy import Reference, check, deviations
from benchmarks.card import copy_bandwidth, flops, gemm_peak, timed, weight_bytes
from benchmarks.models import preset, random_model, spread_routers
from m3asr.bench_plot import milliseconds
from m3asr.engines.cuda import CudaEngine, tiles

INPUTS = ("1x206", "1x1024", "1x2048", "16x1024", "64x1024")
# Milliseconds, bf16, set for an H100 with 2.97 TB/s of copy bandwidth.
GOALS = {"1x206": 0.55, "1x1024": 0.75, "1x2048": 1.0, "16x1024": 3.2, "64x1024": 11.0}
ROTATING = 3
# Relative error of the hidden sequence, the experts told, above which a result is wrong and its time means nothing.
# Random weights lose 1e-2 in 8 bits of mantissa (NOTES.md); a kernel that computes something else loses 0.1 and more.
WRONG = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 5e-3, "fp8": 4e-2}


def inputs_for(name: str, bins: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batch, frames = map(int, name.split("x"))
    generator = torch.Generator("cuda").manual_seed(batch * frames)
    lengths = torch.full((batch,), frames, dtype=torch.int32, device="cuda")
    return [
        (torch.randn(batch, frames, bins, device="cuda", generator=generator), lengths.clone()) for _ in range(ROTATING)
    ]


def measure_engine(engine: CudaEngine, name: str, data, repeats: int) -> dict:
    graph = engine.graph_for(*map(int, name.split("x")))

    return {"ms": timed(graph.replay, before=lambda i: graph.fill(*data[i % len(data)]), repeats=repeats)}


def profile(engine: CudaEngine, name: str) -> list[tuple[str, int, float]]:
    """(kernel, launches, microseconds in all) of one run launched kernel by kernel, without overlap."""
    graph = engine.graph_for(*map(int, name.split("x")))
    pdl, engine.forward.pdl = engine.forward.pdl, False
    try:
        engine.forward(graph.features, graph.lengths)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            engine.forward(graph.features, graph.lengths)
            torch.cuda.synchronize()
    finally:
        engine.forward.pdl = pdl
    rows = [(e.key, e.count, e.device_time_total) for e in profiler.key_averages() if e.device_time_total]
    return sorted(rows, key=lambda row: -row[2])


def variants(engine: CudaEngine, name: str, data, reference: Reference, late, only) -> dict[str, float | str]:
    """Milliseconds with one decision of the engine taken otherwise; of a variant that computes something else, that.
    only: words of which one must be in a variant's name.
    """
    forward, measured = engine.forward, dict(tiles.MEASURED)
    usual = {attribute: getattr(forward, attribute) for attribute in ("pdl", "beside", "fetches", "limits", "joined")}
    cases = {"as it is": {}, "no dependent launch": {"pdl": False}}
    limits = forward.limits
    cases["no weights fetched ahead"] = {"fetches": False}
    cases["norms apart from products"] = {"joined": (1, 0)}
    cases["no products by pairs of programs"] = {"limits": replace(limits, products=math.inf)}
    if name.startswith("1x"):
        cases["products by pairs of programs"] = {"limits": replace(limits, products=1)}
        cases["the embedding network before the main stack, no branch of its own"] = {"beside": False}
        cases["no clusters"] = {"limits": replace(limits, block=0, experts=0)}
        cases["clusters for experts alone"] = {"limits": replace(limits, block=0)}
        cases["clusters for blocks alone"] = {"limits": replace(limits, experts=0)}
    if tiles.MEASURED:
        cases["the package's own tiles"] = {"package": True}
        cases["tiles by rule, not by measurement"] = {"rule": True}
    rows = {}
    for case, changes in cases.items():
        if changes and only and not any(word in case for word in only):
            continue
        if late():
            rows[case] = "no time left"
            continue
        for attribute, value in {**usual, **changes}.items():
            if attribute in usual:
                setattr(forward, attribute, value)
        if "rule" in changes or "package" in changes:
            tiles.MEASURED.clear()
        if "package" in changes:
            tiles.read_measured(tiles.PACKAGE)
        engine.drop_graphs()
        try:
            error = check(engine, reference, *data[0])["hidden_error_told"]
            if error < WRONG[engine.precision]:
                rows[case] = measure_engine(engine, name, data, repeats=15)["ms"]
            else:
                rows[case] = f"wrong, error {error:.1e}"
        except Exception as error:  # of one variant, not of all
            rows[case] = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            tiles.MEASURED.update(measured)
            for attribute, value in usual.items():
                setattr(forward, attribute, value)
    engine.drop_graphs()
    return rows


def baseline_rows(name: str, model, half, data) -> dict:
    """Milliseconds by way of running the PyTorch model."""
    rows = {}
    batch = int(name.split("x")[0])
    repeats = 5 if batch > 1 else 15

    def eager(i=[0]):  # noqa: B006 - the counter rotates the inputs
        i[0] += 1
        return model(*data[i[0] % len(data)])

    rows["eager fp32, loop over experts"] = timed(eager, repeats=repeats, warmup=2)
    features, lengths = data[0][0].bfloat16(), data[0][1]
    with baselines.grouped():
        rows["eager bf16, grouped"] = timed(lambda: half(features, lengths), repeats=repeats, warmup=2)
        graph = baselines.captured(lambda: half(features, lengths))
        rows["eager bf16, grouped, graph"] = timed(
            graph.replay, before=lambda i: features.copy_(data[i % len(data)][0]), repeats=repeats, warmup=2
        )
    return rows


def compiled_rows(args) -> None:
    """In a process of its own: torch.compile with reduce-overhead, printed as JSON."""
    config = preset(args.preset)
    model = random_model(config, "cuda")
    spread_routers(model)
    model = baselines.half(model)
    with torch.inference_mode(), baselines.grouped():
        run = torch.compile(model, mode="reduce-overhead", dynamic=False)
        for name in args.inputs:
            data = [(f.bfloat16(), n) for f, n in inputs_for(name, config.encoder.input_dim)]
            ms = timed(lambda data=data: run(*data[0]), repeats=15)
            print(json.dumps({name: ms}), flush=True)


def plot(results: dict, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: no plot")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    highest = max((ms for row in results["inputs"].values() for ms in row["ms"].values()), default=None)
    if highest is None:
        print("nothing was timed: no plot")
        return
    timed_inputs = {name: row for name, row in results["inputs"].items() if row["ms"]}
    ways = list(dict.fromkeys(way for row in timed_inputs.values() for way in row["ms"]))
    figure, axes = plt.subplots(figsize=(10, 5))
    for j, way in enumerate(ways):
        points = [(i, row["ms"][way]) for i, row in enumerate(timed_inputs.values()) if way in row["ms"]]
        bars = axes.bar([i + (j - (len(ways) - 1) / 2) * 0.8 / len(ways) for i, _ in points], [y for _, y in points],
                        width=0.8 / len(ways), label=way)  # fmt: skip
        axes.bar_label(bars, fmt="%.3g", fontsize=6, rotation=90, padding=2)
    lines = {"floor bf16": [row["floor_ms"].get("bf16") for row in timed_inputs.values()]}
    if results["preset"] == "seed":
        lines["goal bf16"] = [GOALS.get(name) for name in timed_inputs]
    for (label, values), style in zip(lines.items(), ("-", ":"), strict=False):
        known = [(i, value) for i, value in enumerate(values) if value]
        if known:
            axes.hlines([y for _, y in known], [i - 0.42 for i, _ in known], [i + 0.42 for i, _ in known],
                        colors="black", linestyles=style, label=label)  # fmt: skip
    axes.set_xticks(range(len(timed_inputs)), list(timed_inputs))
    milliseconds(axes)
    axes.set_title(f"{results['preset']} on {results['card']['name']}")
    axes.set_ylim(top=5 * highest)
    axes.legend(fontsize=7, ncols=4, loc="upper center")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="seed", choices=("seed", "public", "tiny"))
    parser.add_argument("--inputs", nargs="+", default=list(INPUTS))
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp16", "fp8", "fp32"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=420, help="seconds after which nothing new is started")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--tiles", type=Path, help="tiles.json of benchmarks.kernels, in place of the rule")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--no-variants", action="store_true")
    parser.add_argument("--variants", nargs="+", metavar="WORD", help="only those with one of these words in the name")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument(
        "--compile", type=float, default=0, metavar="SECONDS", help="also torch.compile, at most so long"
    )
    parser.add_argument("--only-compile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.only_compile:
        return compiled_rows(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tiles is not None and args.tiles.is_file():
        tiles.read_measured(args.tiles)
    elif args.tiles is not None:
        print(f"! {args.tiles} is not there: tiles by rule")
    began = time.monotonic()

    def late() -> bool:
        return time.monotonic() - began > args.budget

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)

    config = preset(args.preset)
    properties = torch.cuda.get_device_properties(0)
    card = {
        "name": properties.name,
        "torch": torch.__version__,
        "copy_bytes_per_s": copy_bandwidth(),
        "bf16_flops": gemm_peak(torch.bfloat16),
        "fp32_flops": gemm_peak(torch.float32),
    }
    say(
        f"{card['name']}: copy {card['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 {card['bf16_flops'] / 1e12:.0f} "
        f"TFLOP/s, fp32 {card['fp32_flops'] / 1e12:.0f} TFLOP/s"
    )
    results = {"preset": args.preset, "card": card, "inputs": {}, "errors": [], "seconds": {}}

    def save() -> None:
        (args.out / f"encoder-{args.preset}.json").write_text(json.dumps(results, indent=1))

    with torch.inference_mode():
        model = random_model(config, "cuda")
        spread_routers(model)
        state = model.state_dict()
        say(f"{args.preset}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
        data = {name: inputs_for(name, config.encoder.input_dim) for name in args.inputs}
        references = {}
        for name in args.inputs:
            row = results["inputs"][name] = {"ms": {}, "engine": {}, "floor_ms": {}}
            try:
                references[name] = Reference(model, *data[name][0])
            except torch.cuda.OutOfMemoryError as error:
                results["errors"].append(f"reference {name}: {error}")
                continue
            hit = row["experts_hit"] = references[name].experts_hit
            batch, frames = map(int, name.split("x"))
            for precision in args.precisions:
                read = weight_bytes(config, state, precision, hit) / card["copy_bytes_per_s"]
                rate = card["fp32_flops" if precision == "fp32" else "bf16_flops"]
                row["floor_ms"][precision] = 1e3 * max(read, flops(config, batch, frames) / rate)
        say("references done; distinct experts hit, mean over layers: " + ", ".join(
            f"{n} {sum(r.experts_hit) / max(1, len(r.experts_hit)):.1f}" for n, r in references.items()))  # fmt: skip

        def run_baselines() -> None:
            half = baselines.half(model)
            for name in args.inputs:
                if late():
                    break
                try:
                    rows = baseline_rows(name, model, half, data[name])
                    results["inputs"][name]["ms"].update(rows)
                    if name in references:
                        with baselines.grouped():
                            eager = Reference(half, *data[name][0])
                        lost = deviations(eager.hidden, eager.log_probs, eager.routes, references[name])
                        results["inputs"][name]["eager bf16 error"] = lost
                        say(f"{name}: eager bf16 loses {json.dumps(lost)}")
                    say(f"{name}: " + ", ".join(f"{way} {ms:.2f}" for way, ms in rows.items()))
                except Exception as error:
                    results["errors"].append(f"baselines {name}: {type(error).__name__}: {str(error)[:500]}")
                    say(results["errors"][-1])
                save()

        for precision in args.precisions:
            if late():
                results["errors"].append(f"{precision}: no time left")
                continue
            before = torch.cuda.memory_allocated()
            start = time.monotonic()
            engine = CudaEngine(model, precision)
            torch.cuda.synchronize()
            results["seconds"][f"pack {precision}"] = time.monotonic() - start
            weights = torch.cuda.memory_allocated() - before
            for name in args.inputs:
                if late() or name not in references:
                    continue
                row = results["inputs"][name]
                try:
                    start = time.monotonic()
                    torch.cuda.reset_peak_memory_stats()
                    engine.graph_for(*map(int, name.split("x")))
                    peak = torch.cuda.max_memory_allocated() - before - weights
                    results["seconds"][f"capture {precision} {name}"] = time.monotonic() - start
                    checked = check(engine, references[name], *data[name][0])
                    # While it was captured, with the tables, the log-probabilities and what other shapes hold.
                    checked["peak_bytes_over_weights"] = peak
                    if not checked["hidden_error_told"] < WRONG[precision]:
                        row["engine"][precision] = checked
                        raise ValueError(f"wrong, so not timed: error of hidden {checked['hidden_error_told']:.1e}")
                    measured = {**measure_engine(engine, name, data[name], args.repeats), **checked}
                    row["engine"][precision] = measured
                    row["ms"][f"m3asr {precision}"] = measured["ms"]
                    own = measured["own_block_errors"]
                    aimed = GOALS.get(name) if precision == "bf16" and args.preset == "seed" else None
                    goal = f", goal {aimed}" if aimed else ""
                    say(
                        f"{precision} {name}: {measured['ms']:.3f} ms, floor {row['floor_ms'][precision]:.3f}{goal}; "
                        f"hidden {measured['hidden_error']:.1e}, "
                        f"experts told {measured['hidden_error_told']:.1e}, "
                        f"worst block {measured['worst_block_error']:.1e}, of its own {max(own):.1e} flips "
                        f"{measured['router_flips']}/{measured['routed']} argmax {measured['argmax_agreement']:.4f} "
                        f"lengths {measured['lengths_right']} replay=launch {measured['replay_equals_launches']}"
                    )
                    if precision == "bf16" and not args.no_profile and not late():
                        row["profile"] = profile(engine, name)
                        for kernel, count, us in row["profile"][:14]:
                            print(f"      {us:9.1f} us {count:4d} x {us / count:7.2f}  {kernel[:60]}", flush=True)
                    if precision in ("bf16", "fp8") and not args.no_variants and not late():
                        row["variants"] = variants(engine, name, data[name], references[name], late, args.variants)
                        for case, ms in row["variants"].items():
                            shown = f"{ms:9.3f} ms" if isinstance(ms, float) else ms
                            print(f"      {shown}  {case}", flush=True)
                except Exception as error:  # one failing row must not cost the others
                    results["errors"].append(f"{precision} {name}: {type(error).__name__}: {str(error)[:500]}")
                    say(results["errors"][-1])
                save()
            results["seconds"][f"weights {precision} bytes"] = weights
            del engine
            if precision == args.precisions[0] and not args.no_baselines:
                run_baselines()
    references.clear()
    torch.cuda.empty_cache()
    if args.compile:
        command = [sys.executable, "-m", "benchmarks.encoder", "--preset", args.preset, "--only-compile"]
        command += ["--out", str(args.out), "--inputs", *[n for n in args.inputs if n.startswith("1x")]]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.compile)
            output, reason = done.stdout, done.stderr[-500:] if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            output, reason = (error.stdout or b"").decode(), f"stopped after {args.compile:.0f} s"
        for line in filter(lambda text: text.startswith("{"), output.splitlines()):
            for name, ms in json.loads(line).items():
                results["inputs"][name]["ms"]["torch.compile reduce-overhead bf16"] = ms
        if reason:
            results["errors"].append(f"torch.compile: {reason}")
    save()
    plot(results, args.out / f"encoder-{args.preset}.png")
    ways = list(dict.fromkeys(way for row in results["inputs"].values() for way in row["ms"]))
    print(f"\n{'ms':36s}" + "".join(f"{name:>12s}" for name in args.inputs))
    for way in ways:
        values = (results["inputs"][name]["ms"].get(way) for name in args.inputs)
        print(f"{way:36s}" + "".join(f"{v:12.3f}" if v is not None else f"{'-':>12s}" for v in values))
    for precision in args.precisions:
        values = (results["inputs"][name]["floor_ms"].get(precision) for name in args.inputs)
        print(f"{'floor ' + precision:36s}" + "".join(f"{v:12.3f}" if v else f"{'-':>12s}" for v in values))
    for error in results["errors"]:
        print("!", error)
    # The profile and the error of each block are in the file only.
    for row in results["inputs"].values():
        row.pop("profile", None)
        row.pop("variants", None)
        for measured in row["engine"].values():
            measured.pop("block_errors", None)
            measured.pop("own_block_errors", None)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
