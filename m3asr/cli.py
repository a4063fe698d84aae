"""The command line. Results go to standard output, everything for people to standard error.

Bad input is answered with one sentence and exit code 2.
"""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from m3asr.errors import M3asrError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Conformer mixture-of-experts speech recognition.",
)
err = Console(stderr=True, highlight=False)


class EngineName(str, Enum):
    auto = "auto"
    onnx = "onnx"
    eager = "eager"


class DecoderName(str, Enum):
    greedy = "greedy"
    beam = "beam"
    rescoring = "rescoring"


class Format(str, Enum):
    text = "text"
    json = "json"
    jsonl = "jsonl"


EngineOption = Annotated[EngineName, typer.Option("--engine", "-e", help="auto means onnx.")]
DecoderOption = Annotated[
    Optional[DecoderName],  # noqa: UP007, UP045 - typer reads this at run time on Python 3.10
    typer.Option("--decoder", help="Rescoring unless the model has no attention decoder, then beam."),
]
BeamOption = Annotated[int, typer.Option("--beam-size", min=1, max=1000)]
CtcWeightOption = Annotated[
    Optional[float],  # noqa: UP007, UP045
    typer.Option("--ctc-weight", min=0.0, max=1.0, help="Of CTC in rescoring; default: the model's."),
]
ReverseWeightOption = Annotated[
    Optional[float],  # noqa: UP007, UP045
    typer.Option("--reverse-weight", min=0.0, max=1.0, help="Of the right-to-left decoder; default: the model's."),
]


def main() -> None:
    """Entry point: runs the app and turns known errors into a sentence."""
    try:
        app()
    except M3asrError as error:
        err.print(f"m3asr: {error}", style="red", markup=False, soft_wrap=True)
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


@app.command()
def transcribe(
    files: Annotated[list[str], typer.Argument(help="Recordings; - reads one from standard input.")],
    model: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option("--model", "-m", help="Model folder; default: the English model in the package."),
    ] = None,
    engine: EngineOption = EngineName.auto,
    decoder: DecoderOption = None,
    format: Annotated[Format, typer.Option("--format", "-f")] = Format.text,
    beam_size: BeamOption = 10,
    ctc_weight: CtcWeightOption = None,
    reverse_weight: ReverseWeightOption = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to the engine.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but the result and errors.")] = False,
) -> None:
    """Print what is said in recordings, one line a recording, in the order given."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from m3asr.audio import SAMPLE_RATE, load_audio
    from m3asr.formats import formatted
    from m3asr.transcribe import DecodeOptions, _name_of, load

    options = DecodeOptions(decoder.value if decoder else None, beam_size, ctc_weight, reverse_weight)
    transcriber = load(model, engine.value, threads=threads)
    if not quiet:
        err.print(_what_runs(transcriber), style="dim", markup=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("reading", total=None)
        recordings = [(_name_of(file), load_audio(file)) for file in files]
        seconds = sum(len(waveform) for _, waveform in recordings) / SAMPLE_RATE
        bar.update(task, description="transcribing", total=seconds)
        transcripts = transcriber.transcribe_all(recordings, options, lambda done: bar.advance(task, done))
    for piece in formatted(transcripts, format.value):
        sys.stdout.write(piece)


def _what_runs(transcriber) -> str:
    return f"model {transcriber.folder.path.name}, engine {transcriber.engine.name} on {transcriber.engine.device}"


@app.command()
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
    _need_torch("converting a checkpoint")
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


@app.command()
def build(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    engine: Annotated[EngineName, typer.Option("--engine", "-e")] = EngineName.onnx,
) -> None:
    """Build an engine for a model folder, beside the model."""
    if engine is not EngineName.onnx:
        raise M3asrError(f"the engine {engine.value} needs no building; there is onnx to build")
    _need_torch("building an engine")
    from m3asr.convert import build_onnx
    from m3asr.folder import ModelFolder

    folder = ModelFolder.read(model)
    with err.status("building the onnx engine"):
        target = build_onnx(folder)
    err.print(f"wrote {target}", markup=False, soft_wrap=True)


@app.command()
def engines() -> None:
    """Which engines can run here, and why the others cannot."""
    from rich.table import Table

    from m3asr.engines import available

    table = Table("engine", "device", "here")
    for name, (device, reason) in available().items():
        table.add_row(name, device, reason or "yes")
    Console(highlight=False).print(table)


@app.command()
def infer(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    features: Annotated[Path, typer.Argument(help="An .npz with feat_lens and feats (after CMVN) or fbank (raw).")],
    engine: EngineOption = EngineName.auto,
    output: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option("--output", "-o", help="An .npz for log_probs, hidden and lengths."),
    ] = None,
    compat: Annotated[bool, typer.Option("--compat", help="Lengths and padding exactly as the original code.")] = False,
    decoder: DecoderOption = None,
    beam_size: BeamOption = 10,
    ctc_weight: CtcWeightOption = None,
    reverse_weight: ReverseWeightOption = None,
    chunk_size: Annotated[int, typer.Option(help="Encoder frames a chunk; 0 means the whole utterance.")] = 0,
    left_chunks: Annotated[int, typer.Option(help="Chunks before its own that a frame sees; -1 means all.")] = -1,
) -> None:
    """Run an engine on stored features, for comparison with other implementations."""
    from m3asr.infer import read_features, write_outputs
    from m3asr.transcribe import DecodeOptions, load

    if output is None and decoder is None:
        raise M3asrError("nothing to do: name an output file with -o, or a decoder with --decoder")
    options = DecodeOptions(decoder.value if decoder else None, beam_size, ctc_weight, reverse_weight)
    transcriber = load(model, engine.value)
    encoder = transcriber.folder.config.encoder
    if chunk_size > 0 and not encoder.use_dynamic_chunk:
        raise M3asrError("--chunk-size: this model was not trained on dynamic chunks (use_dynamic_chunk is false)")
    err.print(_what_runs(transcriber), style="dim", markup=False, soft_wrap=True)
    feats, lengths = read_features(features, transcriber.folder)
    log_probs, hidden, out_lengths = transcriber.engine(
        feats, lengths, compat=compat, chunk_size=chunk_size, left_chunks=left_chunks
    )
    if output is not None:
        write_outputs(output, log_probs=log_probs, hidden=hidden, lengths=out_lengths)
    if decoder is not None:
        for result in transcriber.decode(log_probs, hidden, out_lengths, options):
            line = result.as_dict()
            for hypothesis in (line, *line["nbest"]):
                hypothesis["text"] = transcriber.folder.tokenizer.decode(hypothesis["tokens"])
            print(json.dumps(line, ensure_ascii=False))


def _need_torch(what: str) -> None:
    import importlib.util

    from m3asr.errors import MissingExtra

    for package in ("torch", "yaml", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(what, "torch")


if __name__ == "__main__":
    main()
