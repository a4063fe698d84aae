"""The command `stream`: live sound -> lines of text while it is spoken."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from enum import Enum
from typing import Annotated, Optional

import numpy as np
import typer

from m3asr.audio import SAMPLE_RATE, read_blocks, read_pcm, standard_input
from m3asr.cli.console import err, warnings_as_lines, what_runs
from m3asr.cli.options import (
    BeamOption,
    BlankPenaltyOption,
    CtcWeightOption,
    DecoderOption,
    EngineName,
    EngineOption,
    HotwordScoreOption,
    HotwordsOption,
    ModelOption,
    QuietOption,
    ReverseWeightOption,
    ThreadsOption,
    decode_options,
)
from m3asr.decode import DecodeOptions
from m3asr.errors import M3asrError
from m3asr.formats import plain
from m3asr.stream import MODES, EndpointRule, Stream, StreamOptions, Update
from m3asr.transcribe import load

PACKET = 0.1  # seconds of a file that are played at a time
ModeName = Enum("ModeName", {name: name for name in MODES}, type=str)
LiveFormat = Enum("LiveFormat", {"text": "text", "jsonl": "jsonl"}, type=str)


def stream(
    file: Annotated[str, typer.Argument(help="A recording played as if live, or - for raw 16-bit mono samples.")],
    model: ModelOption = None,
    format: Annotated[
        LiveFormat, typer.Option("--format", "-f", help="jsonl: every update, partial ones too.")
    ] = LiveFormat.text,
    rate: Annotated[int, typer.Option(help="Hz, of raw samples on standard input.")] = SAMPLE_RATE,
    realtime: Annotated[bool, typer.Option("--realtime", help="Play a recording no faster than it is.")] = False,
    engine: EngineOption = EngineName.auto,
    mode: Annotated[
        ModeName, typer.Option(help="chunks need a model trained for it; windows any; auto: what the model allows.")
    ] = ModeName.auto,
    chunk: Annotated[int, typer.Option(min=0, help="Encoder frames at a time; 0: the model's own, or 16.")] = 0,
    left_chunks: Annotated[int, typer.Option(min=-1, help="Mode chunks: chunks back that a frame sees; -1 all.")] = -1,
    left: Annotated[int, typer.Option(min=0, help="Mode windows: encoder frames before a chunk.")] = StreamOptions.left,
    right: Annotated[
        int, typer.Option(min=0, help="Mode windows: encoder frames after it; they delay the text.")
    ] = StreamOptions.right,
    reread: Annotated[
        Optional[bool],  # noqa: UP007, UP045
        typer.Option(
            "--reread/--no-reread",
            help="Read a line again as a whole when it ends: slower by that, and as good as a recording. "
            "Default: in mode windows.",
        ),
    ] = None,
    pause: Annotated[float, typer.Option(min=0.0, help="Seconds of silence that end a line.")] = 1.0,
    longest: Annotated[float, typer.Option(min=0.1, help="Seconds after which a line ends whatever is said.")] = 20.0,
    decoder: DecoderOption = None,
    beam_size: BeamOption = 10,
    ctc_weight: CtcWeightOption = None,
    reverse_weight: ReverseWeightOption = None,
    blank_penalty: BlankPenaltyOption = 0.0,
    hotwords: HotwordsOption = None,
    hotword_score: HotwordScoreOption = DecodeOptions.hotword_score,
    threads: ThreadsOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Print what is said while it is said: on a terminal the line being spoken too, elsewhere lines that are final.

    For example: ffmpeg -i SOURCE -f s16le -ar 16000 -ac 1 - | m3asr stream -
    """
    options = StreamOptions(
        mode=mode.value,
        chunk=chunk,
        left_chunks=left_chunks,
        left=left,
        right=right,
        endpoints=(EndpointRule(False, 5.0), EndpointRule(True, pause), EndpointRule(False, 0.0, longest)),
        reread=reread,
        decode=decode_options(
            decoder,
            beam_size=beam_size,
            ctc_weight=ctc_weight,
            reverse_weight=reverse_weight,
            blank_penalty=blank_penalty,
            hotwords=hotwords,
            hotword_score=hotword_score,
        ),
    )
    if file != "-" and rate != SAMPLE_RATE:
        raise M3asrError(f"--rate is for raw samples on standard input; {file} says its own, so leave it out")
    packets = read_pcm(standard_input(), rate) if file == "-" else read_blocks(file, PACKET)
    with warnings_as_lines():
        transcriber = load(model, engine.value, threads=threads)
        live = Stream(transcriber, options)
        if live.mode == "windows" and left_chunks != -1:
            raise M3asrError("--left-chunks is for the mode chunks, this is windows: give --left, in encoder frames")
        if not quiet:
            again = ", each line read again when it ends" if live.reread else ""
            how = f"{what_runs(transcriber)}, mode {live.mode}{again}"
            how += f": text at most {live.latency:.2f} s behind, and computing"
            err.print(how, style="dim", markup=False, soft_wrap=True)
        show = _show_json if format is LiveFormat.jsonl else _show_text
        _print(_updates(live, _paced(packets) if realtime and file != "-" else packets), show)


def _updates(live: Stream, packets: Iterator[np.ndarray]) -> Iterator[Update]:
    try:
        for packet in packets:
            yield from live.accept(packet)
    except KeyboardInterrupt:  # how one stops speaking
        pass
    yield from live.finish()


def _paced(packets: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Each packet when a microphone would have had it."""
    start, played = time.monotonic(), 0
    for packet in packets:
        played += len(packet)
        time.sleep(max(start + played / SAMPLE_RATE - time.monotonic(), 0.0))
        yield packet


def _print(updates: Iterator[Update], show) -> None:
    terminal = sys.stdout.isatty() and show is _show_text
    with _partial_line() if terminal else nullcontext() as partial:
        for update in updates:
            show(update, partial)
            sys.stdout.flush()


def _show_json(update: Update, partial) -> None:
    segment = {key: value for key, value in asdict(update.segment).items() if value not in (None, [])}
    print(json.dumps(plain({"final": update.final, **segment}), ensure_ascii=False))


def _show_text(update: Update, partial) -> None:
    if partial is not None:
        partial.update("" if update.final else update.text)
    if update.final and update.text:
        print(update.text)


def _partial_line():
    """The line that is still being spoken, below the ones that are final."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    class Partial(Live):
        def update(self, text: str) -> None:
            super().update(Text(text, style="dim"), refresh=True)

    return Partial(console=Console(highlight=False), transient=True, auto_refresh=False)
