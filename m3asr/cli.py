"""The command line. Results go to standard output, everything for people to standard error.

Bad input is answered with one sentence and exit code 2.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from m3asr.audio import DamagedAudio
from m3asr.decode import DECODERS, DecodeOptions
from m3asr.engines import NAMES
from m3asr.errors import M3asrError
from m3asr.formats import FORMATS
from m3asr.segment import SegmentOptions
from m3asr.transcribe import UnusableHotword

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Conformer mixture-of-experts speech recognition.",
)
err = Console(stderr=True, highlight=False)

EngineName = Enum("EngineName", {name: name for name in ("auto", *NAMES)}, type=str)
DecoderName = Enum("DecoderName", {name: name for name in DECODERS}, type=str)
FormatName = Enum("FormatName", {name: name for name in FORMATS}, type=str)

ModelOption = Annotated[
    Optional[Path],  # noqa: UP007, UP045 - typer reads this at run time on Python 3.10
    typer.Option("--model", "-m", help="Model folder; default: the English model in the package."),
]
EngineOption = Annotated[EngineName, typer.Option("--engine", "-e", help="auto means onnx.")]
DecoderOption = Annotated[
    Optional[DecoderName],  # noqa: UP007, UP045
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
BlankPenaltyOption = Annotated[
    float, typer.Option("--blank-penalty", help="Above 0: fewer words are missed, more are invented.")
]
HotwordsOption = Annotated[
    Optional[str],  # noqa: UP007, UP045
    typer.Option("--hotwords", help="Phrases to favour: a file with one a line, or a list with commas."),
]
HotwordScoreOption = Annotated[float, typer.Option("--hotword-score", help="For each token of a phrase.")]
LmOption = Annotated[
    Optional[Path],  # noqa: UP007, UP045
    typer.Option("--lm", help="N-gram language model, an ARPA or KenLM binary file."),
]
LmWeightOption = Annotated[float, typer.Option("--lm-weight")]
LmBonusOption = Annotated[float, typer.Option("--lm-bonus", help="Added for each word, or token.")]
LmUnitOption = Annotated[str, typer.Option("--lm-unit", help="What the language model counts: word or token.")]
MaxSecondsOption = Annotated[
    float, typer.Option("--max-seconds", help="Longer recordings are cut at pauses, into at most this long segments.")
]
VadOption = Annotated[
    bool, typer.Option("--vad/--no-vad", help="Look for speech; without, everything is taken for speech.")
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 leaves it to the engine.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but the result and errors.")]


def main() -> None:
    """Entry point: runs the app and turns known errors into a sentence."""
    try:
        app()
    except M3asrError as error:
        _complain(error)
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
    files: Annotated[
        Optional[list[str]],  # noqa: UP007, UP045
        typer.Argument(help="Recordings of any length; - reads one from standard input."),
    ] = None,
    model: ModelOption = None,
    wav_scp: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option("--wav-scp", help="Kaldi's list of recordings, 'key path' a line; gives the format kaldi."),
    ] = None,
    format: Annotated[
        Optional[FormatName],  # noqa: UP007, UP045
        typer.Option("--format", "-f", help="Default: text."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option("--output", "-o", help="Write this file, whole or not at all, instead of standard output."),
    ] = None,
    engine: EngineOption = EngineName.auto,
    decoder: DecoderOption = None,
    beam_size: BeamOption = 10,
    nbest: Annotated[int, typer.Option(min=1, help="Hypotheses of each segment in json and jsonl.")] = 1,
    ctc_weight: CtcWeightOption = None,
    reverse_weight: ReverseWeightOption = None,
    blank_penalty: BlankPenaltyOption = 0.0,
    hotwords: HotwordsOption = None,
    hotword_score: HotwordScoreOption = DecodeOptions.hotword_score,
    lm: LmOption = None,
    lm_weight: LmWeightOption = DecodeOptions.lm_weight,
    lm_bonus: LmBonusOption = DecodeOptions.lm_bonus,
    lm_unit: LmUnitOption = DecodeOptions.lm_unit,
    vad: VadOption = True,
    max_seconds: MaxSecondsOption = SegmentOptions.max_seconds,
    threads: ThreadsOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Print what is said in recordings, in the order given, each as soon as it is known.

    A recording that cannot be read gets a line on standard error and nothing else; the others are transcribed, and the
    exit code is 2 at the end.
    """
    from m3asr.formats import formatted, write
    from m3asr.manifest import read_wav_scp
    from m3asr.transcribe import Recording, load, name_of

    if bool(files) == (wav_scp is not None):
        raise M3asrError("name recordings, or a list of them with --wav-scp, and not both")
    recordings = (
        [Recording(key, path) for key, path in read_wav_scp(wav_scp)]
        if wav_scp is not None
        else [Recording(name_of(file), file) for file in files]
    )
    options = DecodeOptions(
        decoder.value if decoder else None,
        beam_size,
        ctc_weight,
        reverse_weight,
        blank_penalty,
        nbest,
        _phrases(hotwords),
        hotword_score,
        str(lm) if lm else None,
        lm_weight,
        lm_bonus,
        lm_unit,
    )
    segmentation = SegmentOptions(vad=vad, max_seconds=max_seconds)
    format_name = format.value if format else "kaldi" if wav_scp is not None else "text"
    transcriber = load(model, engine.value, threads=threads)
    if not quiet:
        err.print(_what_runs(transcriber), style="dim", markup=False, soft_wrap=True)
    n_failed = 0

    def failed(name: str, error: M3asrError) -> None:
        nonlocal n_failed
        n_failed += 1
        _complain(error)

    def transcripts() -> Iterator:
        with warnings_as_lines(), _progress([r.audio for r in recordings], quiet) as progress:
            yield from transcriber.transcribe_each(recordings, options, segmentation, failed=failed, progress=progress)
        if recordings and n_failed == len(recordings):
            raise typer.Exit(2)  # before anything is written

    if output is not None:
        write(transcripts(), format_name, output)
    else:
        for piece in formatted(transcripts(), format_name):
            sys.stdout.write(piece)
            sys.stdout.flush()
    if n_failed:
        raise typer.Exit(2)


def _phrases(hotwords: str | None) -> tuple[str, ...]:
    """A file with one phrase a line, or phrases with commas between them."""
    if hotwords is None:
        return ()
    path = Path(hotwords)
    try:
        if path.is_file():
            return tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise M3asrError(f"{path} is no readable list of phrases: {error}") from None
    if "," not in hotwords and ("/" in hotwords or path.suffix.lower() in (".txt", ".lst", ".csv")):
        raise M3asrError(f"{hotwords}: no such file; expected a file of phrases, or phrases with commas between them")
    return tuple(phrase.strip() for phrase in hotwords.split(",") if phrase.strip())


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
def _progress(files: Iterable[str], quiet: bool) -> Iterator:
    """A bar of the seconds of audio that are done, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    done = "{task.completed:.0f} s of audio"
    with Progress(BarColumn(), TextColumn(done), TimeRemainingColumn(), console=err, transient=True) as bar:
        task = bar.add_task("", total=_seconds(files))
        yield lambda seconds: bar.advance(task, seconds)


def _seconds(files: Iterable[str]) -> float | None:
    """How long recordings are together, by their headers; None if one does not say."""
    import soundfile

    total = 0.0
    for file in files:
        try:
            total += soundfile.info(file).duration
        except (soundfile.SoundFileError, OSError, TypeError, ValueError):
            return None
    return total


def _complain(error: M3asrError) -> None:
    err.print(f"m3asr: {error}", style="red", markup=False, soft_wrap=True)


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
    from m3asr.transcribe import load

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
