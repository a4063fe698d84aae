"""Draw a run: `python3 -m training.plot log.jsonl run.png`.

A log whose lines name their `run` is of several: their word error rates are drawn beside each other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("image", type=Path)
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in args.log.read_text(encoding="utf-8").splitlines()]
    if any("run" in line for line in lines):
        figure, axes = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
        for axis, name in zip(axes, ("dev", "human"), strict=True):
            for run in dict.fromkeys(line["run"] for line in lines):
                tests = [line for line in lines if line["run"] == run and "exported" not in line]
                times = [t["elapsed"] / 60 for t in tests]
                colour = axis.plot(times, [t["wer"][name] for t in tests], "o-", label=run)[0].get_color()
                if f"{name}_chunks" in tests[0]["wer"]:
                    chunks = [t["wer"][f"{name}_chunks"] for t in tests]
                    axis.plot(times, chunks, "x:", color=colour, label=f"{run}, in chunks")
            axis.set(title=f"{name}: word error rate, greedy", xlabel="minutes", ylabel="%", yscale="log")
            axis.grid(True, which="both", alpha=0.3)
        axes[0].legend(fontsize=8)
        figure.savefig(args.image, dpi=100)
        return
    steps = [line for line in lines if "total" in line]
    tests = [line for line in lines if "wer" in line and "exported" not in line]
    figure, ((loss, wer), (router, speed)) = plt.subplots(2, 2, figsize=(12, 8), constrained_layout=True)
    minutes = [line["elapsed"] / 60 for line in steps]

    for name in ("ctc", "attention", "embedding_ctc", "text"):
        if any(line.get(name) for line in steps):
            loss.plot(minutes, [line[name] for line in steps], label=name.replace("_", " "))
    loss.set(title="loss a token", xlabel="minutes", yscale="log")
    loss.legend()

    for name in tests[0]["wer"] if tests else ():
        wer.plot([t["elapsed"] / 60 for t in tests], [t["wer"][name] for t in tests], "o-", label=name)
    wer.set(title="word error rate, greedy, averaged weights", xlabel="minutes", ylabel="%", yscale="log")
    if tests:
        wer.legend()

    routed = [line for line in steps if line["blend"] is not None]
    for layer in range(len(routed[0]["load_entropy"]) if routed else 0):
        entropy = [line["load_entropy"][layer] for line in routed]
        router.plot([line["elapsed"] / 60 for line in routed], entropy, label=f"load, block {layer}")
    for name, style in (("sparsity", "k--"), ("importance", "k:")):
        router.plot([line["elapsed"] / 60 for line in routed], [line[name] for line in routed], style, label=name)
    router.set(title="experts: entropy of their load (1 is even), router losses (1 is least)", xlabel="minutes")
    if routed:
        router.legend(fontsize=7)

    speed.plot(minutes, [line["audio_per_second"] for line in steps])
    speed.set(title="training speed", xlabel="minutes", ylabel="seconds of audio a second")
    rate = speed.twinx()
    rate.plot(minutes, [line["lr"] for line in steps], "C1")
    rate.set(ylabel="learning rate")
    figure.savefig(args.image, dpi=100)


if __name__ == "__main__":
    main()
