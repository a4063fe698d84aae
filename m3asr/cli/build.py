"""The commands `build` and `trtexec-inputs`: engines that are made before they run."""

from __future__ import annotations

import shlex
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from m3asr.cli.console import err, warnings_as_lines
from m3asr.cli.convert import need_torch
from m3asr.cli.options import EngineName
from m3asr.errors import M3asrError, reason

PrecisionName = Enum("PrecisionName", {name: name for name in ("fp32", "fp16", "bf16", "int8", "fp8")}, type=str)
ExpertsName = Enum("ExpertsName", {name: name for name in ("layers", "plugin")}, type=str)
PackageName = Enum("PackageName", {name: name for name in ("tensorrt", "tensorrt_rtx")}, type=str)
# Batches of frames whose kernels are compiled at build: few tokens, many, and very many.
WARM = ((1, 206), (1, 1024), (16, 1024))
MOST = 1_000_000  # utterances, or frames: hours of them
# Of a recording, so much is looked at to find the scales of int8 and fp8.
CALIBRATION_SECONDS = 20.0


def build(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    engine: Annotated[EngineName, typer.Option("--engine", "-e")] = EngineName.onnx,
    precision: Annotated[
        Optional[PrecisionName],  # noqa: UP007, UP045
        typer.Option(
            help="cuda: fp32, fp16 (default), bf16, as fast and further off, for a model that fp16's range does not "
            "hold, or fp8: experts in 8 bits, the rest bf16. "
            "tensorrt: all, default fp32."
        ),
    ] = None,
    profile: Annotated[
        Optional[list[str]],  # noqa: UP007, UP045
        typer.Option(
            help="tensorrt: smallest, usual and largest batch and frames, as B=1:8:16,T=7:1024:6100. Several times "
            "for several profiles; default: B=1:1:4,T=7:512:2048 and B=1:8:16,T=7:1024:6100."
        ),
    ] = None,
    prior: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option(help="tensorrt: text file of unit probabilities; log_probs gets -ln(prior) added."),
    ] = None,
    calibration: Annotated[
        Optional[list[Path]],  # noqa: UP007, UP045
        typer.Option(help="tensorrt int8 and fp8: a recording, or a .txt with a path a line; several times for more."),
    ] = None,
    experts: Annotated[
        Optional[ExpertsName],  # noqa: UP007, UP045
        typer.Option(help="tensorrt: experts in plain layers (default), or as a plugin that needs m3asr at run time."),
    ] = None,
    compat: Annotated[bool, typer.Option("--compat", help="tensorrt: lengths and padding as the original.")] = False,
    chunk_size: Annotated[int, typer.Option(help="tensorrt: encoder frames a chunk; 0 is the whole utterance.")] = 0,
    left_chunks: Annotated[int, typer.Option(help="tensorrt: earlier chunks that a frame sees; -1 is all.")] = -1,
) -> None:
    """Build an engine for a model folder, beside the model."""
    given = {
        "--profile": bool(profile),
        "--prior": prior is not None,
        "--calibration": bool(calibration),
        "--experts": experts is not None,
        "--compat": compat,
        "--chunk-size": chunk_size != 0,
        "--left-chunks": left_chunks != -1,
    }
    unused = [option for option, is_given in given.items() if is_given]
    if engine is not EngineName.tensorrt and unused:
        raise M3asrError(f"{', '.join(unused)}: for --engine tensorrt only, the engine here is {engine.value}")
    if engine is EngineName.onnx:
        if precision is not None:
            raise M3asrError("--precision is for --engine cuda or tensorrt; the onnx engine computes in float32")
        _build_onnx(model)
    elif engine is EngineName.cuda:
        if precision is PrecisionName.int8:
            raise M3asrError("--precision int8 is for --engine tensorrt; cuda has fp32, bf16, fp16 and fp8")
        _build_cuda(model, precision.value if precision else "fp16")
    elif engine is EngineName.tensorrt:
        options = {
            "precision": precision.value if precision else "fp32",
            "profiles": [read_profile(text) for text in profile or []],
            "experts": experts.value if experts else "layers",
            "compat": compat,
            "chunk_size": chunk_size,
            "left_chunks": left_chunks,
        }
        _build_tensorrt(model, options, prior, calibration or [])
    else:
        raise M3asrError(f"the engine {engine.value} needs no building; there are onnx, cuda and tensorrt to build")


def trtexec_inputs(
    batch: Annotated[int, typer.Argument(metavar="B", help="Utterances.")],
    frames: Annotated[int, typer.Argument(metavar="S", help="Feature frames.")],
    width: Annotated[int, typer.Argument(metavar="D", help="Feature bins.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")] = Path("."),
    plan: Annotated[str, typer.Option(help="The plan that the printed command runs.")] = "encoder.plan",
    package: Annotated[PackageName, typer.Option(help="Whose tool the command is.")] = PackageName.tensorrt,
) -> None:
    """Write raw input files for trtexec, and print the command that runs a plan on them."""
    from m3asr.engines.trtexec import trtexec_inputs as write

    print(write(batch, frames, width, output, plan=plan, package=package.value))


def _build_onnx(model: Path) -> None:
    need_torch("building an engine")
    from m3asr.convert import build_onnx
    from m3asr.folder import ModelFolder

    folder = ModelFolder.read(model)
    with err.status("building the onnx engine"):
        target = build_onnx(folder)
    err.print(f"wrote {target}", markup=False, soft_wrap=True)


def _build_cuda(model: Path, precision: str) -> None:
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


def _build_tensorrt(model: Path, options: dict, prior: Path | None, calibration: list[Path]) -> None:
    from m3asr.engines import check_chunks, need_tensorrt
    from m3asr.folder import ModelFolder

    need_tensorrt("building the tensorrt engine")
    from m3asr.convert import build_tensorrt
    from m3asr.engines.tensorrt import PROFILES, read_prior

    folder, before = ModelFolder.read(model), time.perf_counter()
    options["profiles"] = options["profiles"] or list(PROFILES)
    check_chunks(folder.config, options["chunk_size"], options["left_chunks"])
    if prior is not None:
        options["prior"] = read_prior(prior, folder.config.vocab_size)
    options["calibration"] = calibration_batches(folder, options["precision"], calibration)
    with warnings_as_lines(), err.status(f"building the tensorrt engine in {options['precision']}"):
        target, plans = build_tensorrt(folder, **options)
    for name, size in plans.items():
        print(f"{name}.plan {size / 1e6:.1f} MB")
    print(f"precision {options['precision']}")
    for sizes in options["profiles"]:
        print("profile " + ",".join(f"{name}={':'.join(map(str, sizes[name]))}" for name in sizes))
    print(f"{time.perf_counter() - before:.1f} s")
    err.print(f"wrote {target}", markup=False, soft_wrap=True)


def read_profile(text: str) -> dict[str, tuple[int, int, int]]:
    """ "B=1:8:16,T=7:1024:6100" -> {"B": (1, 8, 16), "T": (7, 1024, 6100)}."""
    expected = "expected smallest:usual:largest of both, as B=1:8:16,T=7:1024:6100"
    sizes = {}
    for part in text.split(","):
        name, _, numbers = part.strip().partition("=")
        values = [value.strip() for value in numbers.split(":")]
        if name not in ("B", "T") or name in sizes or len(values) != 3 or not all(map(str.isdecimal, values)):
            raise M3asrError(f"--profile {shlex.quote(text)} is not readable at {part!r}: {expected}")
        low, usual, high = (int(value) for value in values)
        if not 1 <= low <= usual <= high:
            raise M3asrError(f"--profile {shlex.quote(text)}: {name} is not rising from 1 on: {expected}")
        if high > MOST:
            raise M3asrError(f"--profile {shlex.quote(text)}: {name} is more than {MOST:,}: {expected}")
        sizes[name] = (low, usual, high)
    if len(sizes) != 2:
        raise M3asrError(f"--profile {shlex.quote(text)} lacks {'T' if 'B' in sizes else 'B'}: {expected}")
    return sizes


def calibration_batches(folder, precision: str, sources: list[Path]) -> list | None:
    """Recordings and lists of them -> (features (1, T, F), lengths (1,)) of each, or None where none are needed."""
    if precision not in ("int8", "fp8"):
        if sources:
            raise M3asrError(f"--calibration is for int8 and fp8, the precision is {precision}")
        return None
    if not sources:
        raise M3asrError(f"precision {precision} finds its scales on recordings: name some with --calibration")
    from m3asr.features import pad_batch
    from m3asr.verify import utterances_of

    recordings = [path for source in sources for path in _listed(source)]
    if not recordings:
        raise M3asrError(f"{', '.join(map(str, sources))} lists no recordings; expected at least one")
    return [pad_batch([features]) for _, features in utterances_of(folder, recordings, CALIBRATION_SECONDS)]


def _listed(source: Path) -> list[Path]:
    if source.suffix.lower() not in (".txt", ".lst", ".list"):
        return [source]
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise M3asrError(f"{source} is no readable list of recordings: {reason(error)}") from None
    return [source.parent / line.strip() for line in lines if line.strip()]
