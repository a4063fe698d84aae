"""The command line, a file for each command or few. Results go to standard output, all for people to standard error.

Bad input is answered with one sentence and exit code 2.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import Annotated, NoReturn

import typer

from m3asr.cli import bench, build, convert, evaluate, infer, inspect, stream, transcribe, verify
from m3asr.cli.console import complain
from m3asr.errors import M3asrError, reason

# What torch and ONNX Runtime say, in exceptions of many types, of memory that is not there.
_NO_MEMORY = re.compile(r"[Ff]ailed to allocate memory|can't allocate memory|out of memory|bad_alloc|bad allocation")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Conformer mixture-of-experts speech recognition.",
)


def main() -> None:
    """Entry point: runs the app and turns known errors into a sentence."""
    if sys.stderr is None:  # closed, `2>&-`: whoever does that wants no messages
        sys.stderr = open(os.devnull, "w")
    # What is being written is then removed, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        if sys.stdout is None:  # its number would go to the next file opened, and whatever is printed into that
            raise M3asrError("standard output is closed: expected an open one, /dev/null if nobody is to read it")
        try:
            app()
        finally:
            sys.stdout.flush()  # not later, where nobody could tell of a full disk
    except M3asrError as error:
        _end(error)
    except MemoryError as error:
        _end(f"there is not enough memory: {error}")
    except UnicodeEncodeError as error:
        found = error.object[error.start : error.end]
        _end(f"{found!r} cannot be written as {error.encoding}: expected UTF-8, so set PYTHONIOENCODING=utf-8")
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        _drop_output()
        sys.exit(1)
    except OSError as error:
        _drop_output()
        _end(f"{error.filename or 'standard output'} cannot be used: {reason(error)}")
    except Exception as error:
        if not _NO_MEMORY.search(str(error)):
            raise
        _end("there is not enough memory: shorter segments (--max-seconds) and smaller inputs need less")


def _end(message: M3asrError | str) -> NoReturn:
    complain(message)
    sys.exit(2)


def _drop_output() -> None:
    """What is still to be written goes nowhere, or the end of the process would try it once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version(show: bool) -> None:
    if show:
        import m3asr

        print(f"m3asr {m3asr.__version__}")
        raise typer.Exit()


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


app.command()(transcribe.transcribe)
app.command()(stream.stream)
app.command()(convert.convert)
app.command()(build.build)
app.command("trtexec-inputs")(build.trtexec_inputs)
app.command()(convert.engines)
app.command()(infer.infer)
app.command()(evaluate.evaluate)
app.command()(verify.verify)
app.command()(inspect.inspect)
app.command()(bench.bench)
