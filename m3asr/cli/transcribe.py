"""The command `transcribe`: recordings -> text."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer

from m3asr.cli.console import complain, err, progress_bar, warnings_as_lines, what_runs
from m3asr.cli.options import (
    BeamOption,
    BlankPenaltyOption,
    ChunkSizeOption,
    CtcWeightOption,
    DecoderOption,
    EngineName,
    EngineOption,
    FormatName,
    HotwordScoreOption,
    HotwordsOption,
    LeftChunksOption,
    LmBonusOption,
    LmOption,
    LmUnitOption,
    LmWeightOption,
    MaxSecondsOption,
    ModelOption,
    QuietOption,
    ReverseWeightOption,
    ThreadsOption,
    VadOption,
    decode_options,
)
from m3asr.decode import DecodeOptions
from m3asr.errors import M3asrError
from m3asr.files import need_place
from m3asr.formats import formatted, write
from m3asr.manifest import read_wav_scp
from m3asr.segment import SegmentOptions
from m3asr.transcribe import Recording, load, name_of, printable


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
    chunk_size: ChunkSizeOption = 0,
    left_chunks: LeftChunksOption = -1,
    threads: ThreadsOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Print what is said in recordings, in the order given, each as soon as it is known.

    A recording that cannot be read gets a line on standard error and nothing else; the others are transcribed, and the
    exit code is 2 at the end.
    """
    if bool(files) == (wav_scp is not None):
        raise M3asrError("name recordings, or a list of them with --wav-scp, and not both")
    recordings = [Recording(key, path) for key, path in read_wav_scp(wav_scp)] if wav_scp is not None else named(files)
    need_place(output, [recording.audio for recording in recordings] + ([wav_scp] if wav_scp else []))
    options = decode_options(
        decoder,
        beam_size=beam_size,
        ctc_weight=ctc_weight,
        reverse_weight=reverse_weight,
        blank_penalty=blank_penalty,
        nbest=nbest,
        hotwords=hotwords,
        hotword_score=hotword_score,
        lm=lm,
        lm_weight=lm_weight,
        lm_bonus=lm_bonus,
        lm_unit=lm_unit,
    )
    segmentation = SegmentOptions(vad=vad, max_seconds=max_seconds)
    format_name = format.value if format else "kaldi" if wav_scp is not None else "text"
    transcriber = load(model, engine.value, threads=threads, chunk_size=chunk_size, left_chunks=left_chunks)
    if not quiet:
        err.print(what_runs(transcriber), style="dim", markup=False, soft_wrap=True)
    n_failed = 0

    def failed(name: str, error: M3asrError) -> None:
        nonlocal n_failed
        n_failed += 1
        complain(error)

    def transcripts() -> Iterator:
        with warnings_as_lines(), progress_bar([r.audio for r in recordings], quiet) as progress:
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


def named(files: list[str]) -> list[Recording]:
    """Each called by its file's name, or by the path given where two files would be called the same."""
    names = [name_of(file) for file in files]
    times = Counter(names)
    return [
        Recording(name if times[name] == 1 else printable(file), file) for name, file in zip(names, files, strict=True)
    ]
