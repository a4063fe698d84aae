"""The command line, a file for each command or few. Results go to standard output, all for people to standard error.

Bad input is answered with one sentence and exit code 2.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from m3asr.cli import bench, build, convert, evaluate, infer, inspect, stream, transcribe, verify
from m3asr.cli.console import complain
from m3asr.errors import M3asrError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Conformer mixture-of-experts speech recognition.",
)


def main() -> None:
    """Entry point: runs the app and turns known errors into a sentence."""
    try:
        app()
    except M3asrError as error:
        complain(error)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        sys.exit(1)


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
