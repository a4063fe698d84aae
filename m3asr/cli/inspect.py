"""The command `inspect`: which expert takes which frames."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from m3asr.cli.console import complain, err, warnings_as_lines
from m3asr.cli.options import DecoderOption, MaxSecondsOption, ModelOption, ThreadsOption, VadOption, decode_options
from m3asr.engines import load_engine
from m3asr.errors import AudioError, M3asrError, MissingExtra
from m3asr.files import need_place, whole_file
from m3asr.folder import ModelFolder
from m3asr.segment import SegmentOptions
from m3asr.transcribe import Transcriber, name_of

_BARS = "▁▂▃▄▅▆▇█"


def inspect(
    recordings: Annotated[
        list[str],
        typer.Argument(
            help="Recordings of any length. A model folder in the first place is taken as --model.",
        ),
    ],
    model: ModelOption = None,
    decoder: DecoderOption = None,
    vad: VadOption = True,
    max_seconds: MaxSecondsOption = SegmentOptions.max_seconds,
    threads: ThreadsOption = 0,
    json_file: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option("--json", help="File for the whole report, frame by frame."),
    ] = None,
    plot_file: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option("--plot", help="PNG file for the first recording, or an existing folder for one of each."),
    ] = None,
) -> None:
    """Show which expert takes which frames, how even the load is, and how sure the routers are.

    The table is over all recordings; the picture is of one, its words above the frames. The experts are watched on the
    engine eager. A recording that cannot be read gets a line on standard error and nothing else, and the exit code is
    then 2.
    """
    if model is None and Path(recordings[0]).is_dir():
        model, *recordings = Path(recordings[0]), *recordings[1:]
    if not recordings:
        raise M3asrError("name recordings: `m3asr inspect MODEL AUDIO...`")
    _need(plot_file is not None)
    need_place(json_file, recordings)
    if plot_file is not None and not plot_file.is_dir():
        need_place(plot_file, recordings)
    folder = ModelFolder.read(model)
    from m3asr.routing import loads, need_experts, route_recording, summary_line

    need_experts(folder.config)
    options, segmentation = decode_options(decoder), SegmentOptions(vad, max_seconds)
    routed = []
    with warnings_as_lines():
        transcriber = Transcriber(folder, load_engine(folder, "eager", threads=threads))
        transcriber.decoder_of(options)
        with err.status("recognising"):
            for recording in recordings:
                try:
                    routed.append(route_recording(transcriber, recording, name_of(recording), options, segmentation))
                except (AudioError, MissingExtra) as error:
                    complain(error)
    if not routed:
        raise typer.Exit(2)
    layers = loads(folder.config, routed)
    line = summary_line(layers)
    name = folder.path.resolve().name
    if json_file is not None:
        report = {
            "model": name,
            "experts": folder.config.encoder.moe.num_experts,
            "frames": layers[0].frames,
            "summary": line,
            "layers": [layer.as_dict() for layer in layers],
            "recordings": [recording.as_dict() for recording in routed],
        }
        with whole_file(json_file) as aside:
            aside.write_text(json.dumps(report, ensure_ascii=False) + "\n", encoding="utf-8")
    if plot_file is not None:
        _plot(plot_file, name, folder.config, routed, layers)
    # A file or a pipe has no width of its own: wide enough for the table.
    out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    seconds = sum(recording.seconds for recording in routed)
    out.print(
        f"{name}: {len(layers)} layers of {len(layers[0].shares)} experts, "
        f"{layers[0].frames} frames of {len(routed)} recording{'s' if len(routed) > 1 else ''}, {seconds:.1f} s",
        markup=False,
    )
    out.print(_table(layers, bars=out.encoding.startswith("utf")), crop=False)
    out.print(line, markup=False)
    if len(routed) < len(recordings):
        raise typer.Exit(2)


def _need(plot: bool) -> None:
    """What is missing is told before the work."""
    if importlib.util.find_spec("torch") is None:
        raise MissingExtra("inspect", "torch")
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("--plot", "plot")


def _plot(path: Path, name: str, config, routed: list, layers: list) -> None:
    from m3asr.routing_plot import plot

    spoken = [recording for recording in routed if recording.stretches]
    if not path.is_dir():
        plot(spoken[0], layers, config, path, name)
        return
    taken: set[str] = set()
    for recording in spoken:
        picture = f"{recording.name}.png"
        for number in range(2, len(spoken) + 2):
            if picture not in taken:
                break
            picture = f"{recording.name}-{number}.png"
        taken.add(picture)
        plot(recording, layers, config, path / picture, name)


def _table(layers: list, bars: bool) -> Table:
    experts = len(layers[0].shares)
    table = Table("layer", *([f"load of the experts 0-{experts - 1}"] if bars else []), "entropy")
    for title in ("smallest %", "largest %", "never used", "confidence", "10 %", "50 %", "90 %"):
        table.add_column(title)
    highest = max(max(layer.shares) for layer in layers)
    for i, layer in enumerate(layers):
        unused = ", ".join(map(str, layer.unused[:8])) + ("..." if len(layer.unused) > 8 else "")
        table.add_row(
            str(i),
            *([_bars(layer.shares, highest)] if bars else []),
            f"{layer.entropy:.3f}",
            f"{100 * min(layer.shares):.1f} ({layer.shares.index(min(layer.shares))})",
            f"{100 * max(layer.shares):.1f} ({layer.shares.index(max(layer.shares))})",
            unused or "-",
            f"{layer.confidence:.2f}",
            *(f"{layer.percentiles[p]:.2f}" for p in (10, 50, 90)),
        )
    return table


def _bars(shares: list[float], highest: float) -> str:
    """A bar an expert; one that is never used leaves its place empty."""
    steps = [min(int(share / highest * len(_BARS)), len(_BARS) - 1) for share in shares]
    return "".join(_BARS[step] if share else " " for step, share in zip(steps, shares, strict=True))
