"""What people are told, all of it on standard error: lines, warnings, a progress bar."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console

from m3asr.audio import DamagedAudio
from m3asr.errors import M3asrError
from m3asr.transcribe import UnusableHotword

err = Console(stderr=True, highlight=False)


def complain(error: M3asrError | str) -> None:
    err.print(f"m3asr: {error}", style="red", markup=False, soft_wrap=True)


def what_runs(transcriber) -> str:
    """Model, engine and device, and the chunks if the encoder is asked to work in them."""
    model, engine = transcriber.folder.path.name, transcriber.engine
    chunks = "".join(f", {name.replace('_', ' ')} {value}" for name, value in transcriber.chunks.items())
    return f"model {model}, engine {engine.name} on {engine.device}{chunks}"


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """What the libraries warn of becomes a line on standard error, each time."""

    def show(message, *args, **kwargs) -> None:
        err.print(f"m3asr: {message}", style="yellow", markup=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in (DamagedAudio, UnusableHotword):
            warnings.simplefilter("always", category)
        warnings.showwarning = show
        yield


@contextmanager
def progress_bar(files: Iterable[str], quiet: bool) -> Iterator:
    """A bar of the seconds of audio that are done, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    done = "{task.completed:.0f} s of audio"
    columns = BarColumn(), TextColumn(done), TimeRemainingColumn()
    # On a terminal, results are printed above the bar. Elsewhere they must not be led through it: it writes to stderr.
    with Progress(*columns, console=err, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=seconds_of(files))
        yield lambda seconds: bar.advance(task, seconds)


def seconds_of(files: Iterable[str]) -> float | None:
    """How long recordings are together, by their headers; None if one does not say.

    Only of files: what is read from a pipe, or from standard input, which libsndfile opens as "-", would be gone.
    """
    import soundfile

    total = 0.0
    for file in files:
        if file == "-" or not os.path.isfile(file):
            return None
        try:
            total += soundfile.info(file).duration
        except (soundfile.SoundFileError, OSError, TypeError, ValueError):
            return None
    return total
