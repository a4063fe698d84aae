"""The commands `convert` and `engines`: from a checkpoint to what can run."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from m3asr.cli.console import err

WeightsName = Enum("WeightsName", {name: name for name in ("float32", "float16", "int8")}, type=str)


def convert(
    source: Annotated[Path, typer.Argument(help="3M-ASR or WeNet training folder.")],
    target: Annotated[Path, typer.Argument(help="Model folder to write.")],
    config: Annotated[Optional[Path], typer.Option(help="train.yaml, if called otherwise.")] = None,  # noqa: UP007, UP045
    checkpoint: Annotated[Optional[Path], typer.Option(help="Weights, if called otherwise.")] = None,  # noqa: UP007, UP045
    units: Annotated[Optional[Path], typer.Option(help="units.txt, if called otherwise.")] = None,  # noqa: UP007, UP045
    cmvn: Annotated[Optional[Path], typer.Option(help="CMVN statistics, if called otherwise.")] = None,  # noqa: UP007, UP045
    no_cmvn: Annotated[bool, typer.Option("--no-cmvn", help="The model was trained on raw filterbanks.")] = False,
    average: Annotated[int, typer.Option(min=0, help="Average the last N numbered checkpoints.")] = 0,
    weights: Annotated[
        WeightsName, typer.Option(help="How weights are stored; int8 is 8 bits a weight, one scale a row.")
    ] = WeightsName.float32,
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
        write_model_folder(found, target, onnx=onnx, overwrite=force, weights=weights.value)
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
