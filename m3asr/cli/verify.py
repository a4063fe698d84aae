"""The command `verify`: an engine's numbers beside another's."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m3asr.cli.build import ExpertsName, PrecisionName, calibration_batches
from m3asr.cli.console import err, warnings_as_lines
from m3asr.cli.convert import need_torch
from m3asr.cli.options import ChunkSizeOption, LeftChunksOption
from m3asr.engines import NAMES, check_chunks, load_engine, need_tensorrt
from m3asr.errors import M3asrError, MissingExtra
from m3asr.files import need_place, whole_file
from m3asr.folder import ModelFolder

INTERPRETED = "tensorrt-interpreted"
VerifiedName = Enum("VerifiedName", {name: name for name in (*NAMES, INTERPRETED)}, type=str)


def verify(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    audio: Annotated[
        Optional[list[Path]],  # noqa: UP007, UP045
        typer.Argument(help="Recordings; without any, synthetic sounds are used."),
    ] = None,
    engine: Annotated[
        VerifiedName,
        typer.Option(
            "--engine",
            "-e",
            help="tensorrt runs the built plans on a GPU; tensorrt-interpreted evaluates the network that would be "
            "built, layer by layer, on the CPU.",
        ),
    ] = VerifiedName.onnx,
    against: Annotated[VerifiedName, typer.Option(help="The engine that is taken for right.")] = VerifiedName.eager,
    precision: Annotated[
        Optional[PrecisionName],  # noqa: UP007, UP045
        typer.Option(help="Of tensorrt-interpreted; default fp32."),
    ] = None,
    calibration: Annotated[
        Optional[list[Path]],  # noqa: UP007, UP045
        typer.Option(help="For int8 and fp8, as for `build`; default: the recordings themselves."),
    ] = None,
    prior: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option(
            help="Of tensorrt and tensorrt-interpreted: the file that the network was or would be built with."
        ),
    ] = None,
    experts: Annotated[
        Optional[ExpertsName],  # noqa: UP007, UP045
        typer.Option(help="Of tensorrt-interpreted: in plain layers (default), or the plugin's reference."),
    ] = None,
    tolerance: Annotated[
        Optional[float],  # noqa: UP007, UP045
        typer.Option(min=0.0, help="Largest relative error that passes; default: by the precision."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=60.0, help="How much of each recording is used.")] = 10.0,
    compat: Annotated[bool, typer.Option("--compat", help="Lengths and padding exactly as the original code.")] = False,
    chunk_size: ChunkSizeOption = 0,
    left_chunks: LeftChunksOption = -1,
    json_file: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option("--json", help="File for the whole report."),
    ] = None,
    plot_file: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option("--plot", help="PNG file for the errors by depth."),
    ] = None,
) -> None:
    """Compare an engine with another one, module by module where both show their modules.

    Exit code 0: it passes, the outputs being finite and within the tolerance, the lengths equal and, in fp32, the
    texts too. 1: it does not. 2: bad input.
    """
    names = engine.value, against.value
    need_torch("verify")
    if precision is not None and INTERPRETED not in names:
        raise M3asrError(f"--precision is for {INTERPRETED}; other engines say theirs themselves")
    if experts is not None and INTERPRETED not in names:
        raise M3asrError(f"--experts is for {INTERPRETED}; a built plan has one form of them")
    if prior is not None and not {INTERPRETED, "tensorrt"} & set(names):
        raise M3asrError(f"--prior is for tensorrt and {INTERPRETED}; the other engines add none")
    from m3asr.verify import synthetic_utterances, utterances_of
    from m3asr.verify import verify as compare

    if plot_file is not None:
        _need_matplotlib()
    need_place(json_file, audio or ())
    need_place(plot_file, audio or ())
    folder = ModelFolder.read(model)
    check_chunks(folder.config, chunk_size, left_chunks)
    options = {"compat": compat, "chunk_size": chunk_size, "left_chunks": left_chunks}
    with warnings_as_lines():
        utterances = utterances_of(folder, audio, seconds) if audio else synthetic_utterances(folder)
        kind = precision.value if precision else "fp32"
        batches = None
        if INTERPRETED in names:
            need_tensorrt(f"the engine {INTERPRETED}")
            sources = calibration or (audio if kind in ("int8", "fp8") else [])
            batches = calibration_batches(folder, kind, sources or [])
        elif calibration:
            raise M3asrError(f"--calibration is for {INTERPRETED}")
        built = {**options, "precision": kind, "calibration": batches, "experts": (experts or ExpertsName.layers).value}
        values = None
        if prior is not None:
            from m3asr.engines.tensorrt import read_prior

            built["prior"] = read_prior(prior, folder.config.vocab_size)
            values = built["prior"].numpy()
        both = []
        for name in names:
            with err.status(f"loading {name}"):
                both.append(_load(folder, name, built))
        with err.status(f"running {' and '.join(names)}"):
            report = compare(folder, *both, utterances, tolerance, values, **options)
    if json_file is not None:
        _write(json_file, json.dumps({"model": str(model), **report.as_dict()}, ensure_ascii=False, indent=1) + "\n")
    if plot_file is not None:
        from m3asr.verify_plot import plot

        plot(report, plot_file)
    _show(report, bool(audio))
    if not report.passed:
        raise typer.Exit(1)


def _need_matplotlib() -> None:
    """Told before the work."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("--plot", "plot")


def _load(folder: ModelFolder, name: str, options: dict):
    if name != INTERPRETED:
        return load_engine(folder, name)
    from m3asr.engines.eager import load_model
    from m3asr.engines.tensorrt import InterpretedEngine

    return InterpretedEngine(load_model(folder), **options)


def _write(path: Path, text: str) -> None:
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _show(report, recorded: bool) -> None:
    # A file or a pipe has no width of its own: wide enough for the tables.
    out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    total = sum(seconds for _, seconds in report.recordings)
    source = "recordings" if recorded else "synthetic sounds (their texts mean nothing)"
    out.print(
        f"{report.engine} against {report.against}, {report.precision}: {len(report.recordings)} {source}, "
        f"{total:.1f} s, tolerance {report.tolerance:g}",
        markup=False,
    )
    out.print(_errors("output", report.outputs.values(), report.tolerance), crop=False)
    if report.layers:
        rows = _blocks(report)
        out.print(_errors("block: its worst module", rows, report.tolerance), crop=False)
        first = report.first_departing
        found = f"{first.path}, {first.error:.2g}" if first else "none of the"
        out.print(f"first module that departs: {found}" + ("" if first else f" {len(report.layers)} modules compared"))
    else:
        out.print("modules: not compared, for an engine does not show them")
    for routing in report.routing.values():
        if routing.flips:
            tie = "" if routing.margin is None else f", by a probability of at most {routing.margin:.2g}"
            out.print(f"router of {routing.path}: {routing.flips} of {routing.tokens} tokens to another expert{tie}")
    if report.routing:
        flips, tokens = (sum(getattr(r, k) for r in report.routing.values()) for k in ("flips", "tokens"))
        out.print(f"router flips: {flips} of {tokens} choices in {len(report.routing)} layers")
    for name, where in report.not_finite.items():
        out.print(f"{name}: NaN or infinity, first from {where}", style="red", markup=False)
    if not report.not_finite:
        out.print("NaN or infinity: none, padding included")
    out.print(f"texts: {len(report.texts)} of {len(report.recordings)} differ")
    for text in report.texts:
        out.print(
            f"  {text.recording}\n    {report.against}: {text.want}\n    {report.engine}: {text.got}", markup=False
        )
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    out.print(f"time, modules recorded: {took}")
    for failure in report.failures:
        out.print(f"fail: {failure}", style="red", markup=False)
    out.print("passed" if report.passed else "failed", style="bold green" if report.passed else "bold red")


def _blocks(report) -> list:
    """The worst module of each block, in order."""
    from m3asr.verify_plot import part_of

    worst = {}
    for row in report.layers.values():
        part = part_of(row.path)
        if part not in worst or row.error > worst[part].error:
            worst[part] = row
    return list(worst.values())


def _errors(title: str, rows, tolerance: float) -> Table:
    table = Table(title, "relative error", "worst element", "here", "reference")
    for row in rows:
        style = "" if row.error <= tolerance else "red"
        table.add_row(row.path, f"{row.error:.2g}", escape(row.worst), f"{row.got:.6g}", f"{row.want:.6g}", style=style)
    return table
