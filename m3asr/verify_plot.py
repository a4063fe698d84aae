"""A picture of `verify`'s report: the error of every module by its depth, and what flipped on the way."""

from __future__ import annotations

import re
from pathlib import Path

from m3asr.errors import MissingExtra, ModelError
from m3asr.files import whole_file
from m3asr.verify import Report

# A logarithm needs a floor; float32's rounding is above it.
FLOOR = 1e-9


def plot(report: Report, path: Path) -> None:
    """Write a PNG. Raises MissingExtra without matplotlib, ModelError when no module was compared."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("the plot", "plot") from None
    rows = list(report.layers.values())
    if not rows:
        raise ModelError(f"there is nothing to plot: {report.engine} and {report.against} show no modules in common")
    largest = max([row.error for row in rows if row.error < float("inf")], default=0.0)
    ceiling = 10 * max(largest, report.tolerance, FLOOR)
    # What is equal to the last bit has no place on the axis: a gap in the line, and a number in the legend.
    heights = [min(max(row.error, FLOOR), ceiling) if row.error else float("nan") for row in rows]
    equal = sum(row.error == 0 for row in rows)
    floor = max(FLOOR, min([report.tolerance, *(height for height in heights if height > 0)])) / 3

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(len(rows)), heights, color="#4878a8", linewidth=0.8)
    axes.scatter(
        range(len(rows)), heights, s=9, color="#4878a8", label=f"a module's output; {equal} more are equal", zorder=3
    )
    axes.axhline(report.tolerance, color="#b04030", linestyle="--", linewidth=1, label=f"limit {report.tolerance:g}")
    beyond = [i for i, row in enumerate(rows) if not row.error < float("inf")]
    if beyond:
        axes.scatter(beyond, [heights[i] for i in beyond], marker="x", s=30, color="black", label="NaN or infinity")
    first = report.first_departing
    if first is not None:
        i = rows.index(first)
        side = "left" if i < len(rows) / 2 else "right"
        axes.scatter([i], [heights[i]], s=60, facecolors="none", edgecolors="#b04030", zorder=4)
        axes.annotate(f" first to depart: {first.path} ", (i, heights[i]), ha=side, va="bottom", color="#b04030")
    flipped = {f"{r.path}.experts": r.flips for r in report.routing.values() if r.flips}
    for i, row in enumerate(rows):
        if row.path in flipped:
            axes.annotate(
                f"{flipped[row.path]} flipped", (i, heights[i]), (0, 6), textcoords="offset points", fontsize=7
            )
    _name_parts(axes, [part_of(row.path) for row in rows])
    axes.set_yscale("log")
    axes.set_ylim(floor, ceiling * 2)
    axes.set_xlim(-1, len(rows) + len(rows) // 25)
    axes.set_ylabel("relative error")
    verdict = "passes" if report.passed else "fails"
    axes.set_title(f"{report.engine} against {report.against}, {report.precision}: {verdict}")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    with whole_file(path) as aside:
        figure.savefig(aside, format="png", dpi=120)


def part_of(path: str) -> str:
    """The block that a module belongs to, in short: encoder.embed.blocks.3.norm_ff -> embed 3."""
    stack = "embed" if path.startswith("encoder.embed") else "encoder"
    block = re.search(r"\.blocks\.(\d+)", path)
    if block:
        return f"{stack} {block[1]}"
    return f"{stack} in" if ".subsampling" in path or path.startswith("cmvn") else f"{stack} out"


def _name_parts(axes, parts: list[str]) -> None:
    """A faint line where each block begins, its name in the middle below."""
    begins = [i for i in range(len(parts)) if i == 0 or parts[i] != parts[i - 1]]
    ends = [*begins[1:], len(parts)]
    for begin in begins[1:]:
        axes.axvline(begin - 0.5, color="0.85", linewidth=0.8, zorder=0)
    # Names of the narrow parts would cover each other.
    wide = [(b, e) for b, e in zip(begins, ends, strict=True) if e - b >= len(parts) / 60]
    axes.set_xticks(
        [(b + e - 1) / 2 for b, e in wide], [parts[b] for b, _ in wide], rotation=60, fontsize=8, ha="right"
    )
