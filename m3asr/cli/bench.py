"""The command `bench`: the engines of this machine beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from m3asr.cli.console import err
from m3asr.cli.options import DecoderOption, ModelOption, ThreadsOption, decode_options
from m3asr.engines import NAMES
from m3asr.errors import M3asrError
from m3asr.files import need_place

_PACKAGES = ("m3asr", "numpy", "onnxruntime", "torch", "triton")


def bench(
    recordings: Annotated[
        Optional[list[str]],  # noqa: UP007, UP045
        typer.Argument(help="Recordings to recognise, each as one segment; without, only the encoder is timed."),
    ] = None,
    model: ModelOption = None,
    engine: Annotated[
        Optional[list[str]],  # noqa: UP007, UP045
        typer.Option("--engine", "-e", help="Several times for several; default: all. The first is the reference."),
    ] = None,
    inputs: Annotated[
        Optional[list[str]],  # noqa: UP007, UP045
        typer.Option("--input", "-i", help="Utterances x frames, as 16x1024; several times for several."),
    ] = None,
    decoder: DecoderOption = None,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="Forwards of which the median is shown.")] = 5,
    threads: ThreadsOption = 0,
    plot: Annotated[Optional[Path], typer.Option(help="Write a picture of the table, a PNG.")] = None,  # noqa: UP007, UP045
) -> None:
    """Time engines on this machine: a table for people, and one line of JSON on standard output."""
    from m3asr.bench import INPUTS
    from m3asr.bench import bench as measure
    from m3asr.evaluate import environment
    from m3asr.folder import ModelFolder

    names = engine or ["eager", *(name for name in NAMES if name != "eager")]
    if unknown := [name for name in names if name not in NAMES]:
        raise M3asrError(f"there is no engine {unknown[0]!r}; expected some of {', '.join(NAMES)}")
    need_place(plot, recordings or ())
    folder, shown = ModelFolder.read(model), list(inputs or INPUTS)
    options = decode_options(decoder)
    rows = []
    with err.status("measuring"):
        for row in measure(folder, names, shown, recordings or (), options=options, repeats=repeats, threads=threads):
            rows.append(row)
            if row.refused:
                err.print(f"{row.engine}: {row.refused}", style="yellow", markup=False, soft_wrap=True)
    if not any(row.forwards for row in rows):
        raise M3asrError(f"none of the engines {', '.join(names)} can run here: see `m3asr engines`")
    Console(stderr=True, highlight=False).print(_table(rows, shown))
    about = {"model": folder.path.resolve().name, **environment(_PACKAGES)}
    result = {**about, "engines": [row.as_dict() for row in rows]}
    if plot is not None:
        from m3asr.bench_plot import plot as draw

        draw(rows, shown, plot, f"{result['model']} on {result['cpu']}")
    print(json.dumps(result, ensure_ascii=False))


def _table(rows, inputs: list[str]) -> Table:
    shown = [row for row in rows if row.forwards]
    first = shown[0]
    table = Table("", *(f"{row.engine} on {row.device}" for row in shown))
    table.add_row("load, s", *(f"{row.load_seconds:.1f}" for row in shown))
    for name in inputs:
        cells = []
        for row in shown:
            forward = row.forwards[name]
            ratio = "" if row is first else f" ({first.forwards[name].ms / forward.ms:.1f}x)"
            graph = "" if forward.gpu_ms is None else f", graph {forward.gpu_ms:.3f}"
            cells.append(f"{forward.ms:.1f}{ratio}{graph}")
        table.add_row(f"{name}, ms", *cells)
    errors = [max((f.error for f in row.forwards.values() if f.error is not None), default=None) for row in shown]
    table.add_row("error, largest", *("-" if error is None else f"{error:.1e}" for error in errors))
    if first.recordings:
        table.add_row("x real time", *(f"{row.recordings.times_real_time:.0f}" for row in shown))
        same = [row.recordings.same_texts for row in shown]
        table.add_row("same text", *("-" if share is None else f"{share:.1%}" for share in same))
    return table
