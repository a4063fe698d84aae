"""A picture of `bench`'s rows: milliseconds of a forward, by input and engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from m3asr.bench import EngineRow
from m3asr.errors import MissingExtra
from m3asr.files import whole_file


def plot(rows: Sequence[EngineRow], inputs: Sequence[str], path: Path, title: str) -> None:
    """Write a PNG, whole or not at all. Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("the plot", "plot") from None
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [row for row in rows if row.forwards]
    width = 0.8 / len(shown)
    for j, row in enumerate(shown):
        at = [i + (j - (len(shown) - 1) / 2) * width for i in range(len(inputs))]
        bars = axes.bar(at, [row.forwards[name].ms for name in inputs], width, label=f"{row.engine} on {row.device}")
        axes.bar_label(bars, [f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}" for ms in bars.datavalues], fontsize=7)
    axes.set_xticks(range(len(inputs)), inputs)
    milliseconds(axes)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    with whole_file(path) as aside:
        figure.savefig(aside, dpi=120, format="png")


def milliseconds(axes) -> None:
    """Times of a forward upwards, on a logarithmic scale in plain numbers, not powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("ms per encoder forward")
