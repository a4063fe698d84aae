"""The commands `convert`, `build` and `engines`: from a checkpoint to what can run."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from m3asr.cli.console import err
from m3asr.cli.options import EngineName
from m3asr.errors import M3asrError

PrecisionName = Enum("PrecisionName", {name: name for name in ("fp32", "bf16", "fp16")}, type=str)
# Batches of frames whose kernels are compiled at build: few tokens, many, and very many.
WARM = ((1, 206), (1, 1024), (16, 1024))


def convert(
    source: Annotated[Path, typer.Argument(help="3M-ASR or WeNet training folder.")],
    target: Annotated[Path, typer.Argument(help="Model folder to write.")],
    config: Annotated[Optional[Path], typer.Option(help="train.yaml, if called otherwise.")] = None,  # noqa: UP007, UP045
    checkpoint: Annotated[Optional[Path], typer.Option(help="Weights, if called otherwise.")] = None,  # noqa: UP007, UP045
    units: Annotated[Optional[Path], typer.Option(help="units.txt, if called otherwise.")] = None,  # noqa: UP007, UP045
    cmvn: Annotated[Optional[Path], typer.Option(help="CMVN statistics, if called otherwise.")] = None,  # noqa: UP007, UP045
    no_cmvn: Annotated[bool, typer.Option("--no-cmvn", help="The model was trained on raw filterbanks.")] = False,
    average: Annotated[int, typer.Option(min=0, help="Average the last N numbered checkpoints.")] = 0,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Build the onnx engine too.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder that is there already.")] = False,
) -> None:
    """Turn a training folder into a model folder."""
    need_torch("converting a checkpoint")
    from m3asr.checkpoint import read_checkpoint
    from m3asr.convert import write_model_folder

    with err.status("reading the checkpoint"):
        found = read_checkpoint(
            source, config=config, checkpoint=checkpoint, units=units, cmvn=cmvn, use_cmvn=not no_cmvn, average=average
        )
    for note in found.notes:
        err.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    with err.status("writing the model folder" + (" and the onnx engine" if onnx else "")):
        write_model_folder(found, target, onnx=onnx, overwrite=force)
    err.print(f"wrote {target}", markup=False, soft_wrap=True)


def build(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    engine: Annotated[EngineName, typer.Option("--engine", "-e")] = EngineName.onnx,
    precision: Annotated[
        Optional[PrecisionName],  # noqa: UP007, UP045
        typer.Option(help="Of the cuda engine; default: bf16. fp16 is as fast and nearer, where its range suffices."),
    ] = None,
) -> None:
    """Build an engine for a model folder, beside the model."""
    if engine is EngineName.cuda:
        build_cuda(model, precision.value if precision else "bf16")
        return
    if engine is not EngineName.onnx:
        raise M3asrError(f"the engine {engine.value} needs no building; there are onnx and cuda to build")
    if precision is not None:
        raise M3asrError("--precision is for --engine cuda; the onnx engine computes in float32")
    need_torch("building an engine")
    from m3asr.convert import build_onnx
    from m3asr.folder import ModelFolder

    folder = ModelFolder.read(model)
    with err.status("building the onnx engine"):
        target = build_onnx(folder)
    err.print(f"wrote {target}", markup=False, soft_wrap=True)


def build_cuda(model: Path, precision: str) -> None:
    from m3asr.engines import need_cuda
    from m3asr.folder import ModelFolder

    need_cuda("building the cuda engine")
    from m3asr.engines.cuda.built import build, load

    folder = ModelFolder.read(model)
    with err.status("packing the weights"):
        target = build(folder, precision)
    with err.status("compiling kernels"):
        load(folder, warm=WARM)
    err.print(f"wrote {target}", markup=False, soft_wrap=True)


def engines() -> None:
    """Which engines can run here, and why the others cannot."""
    from rich.markup import escape
    from rich.table import Table

    from m3asr.engines import available

    table = Table("engine", "device", "here")
    for name, (device, reason) in available().items():
        table.add_row(name, device, escape(reason or "yes"))  # [torch] is no markup
    Console(highlight=False).print(table)


def need_torch(what: str) -> None:
    import importlib.util

    from m3asr.errors import MissingExtra

    for package in ("torch", "yaml", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(what, "torch")
