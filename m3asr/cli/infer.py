"""The command `infer`: an engine on stored features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from m3asr.cli.console import err, what_runs
from m3asr.cli.options import (
    BeamOption,
    ChunkSizeOption,
    CtcWeightOption,
    DecoderOption,
    EngineName,
    EngineOption,
    LeftChunksOption,
    ReverseWeightOption,
    decode_options,
)
from m3asr.errors import M3asrError
from m3asr.files import need_place
from m3asr.infer import read_features, write_outputs
from m3asr.transcribe import load


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
    chunk_size: ChunkSizeOption = 0,
    left_chunks: LeftChunksOption = -1,
) -> None:
    """Run an engine on stored features, for comparison with other implementations."""
    if output is None and decoder is None:
        raise M3asrError("nothing to do: name an output file with -o, or a decoder with --decoder")
    need_place(output, [features])
    options = decode_options(decoder, beam_size=beam_size, ctc_weight=ctc_weight, reverse_weight=reverse_weight)
    transcriber = load(model, engine.value, chunk_size=chunk_size, left_chunks=left_chunks)
    err.print(what_runs(transcriber), style="dim", markup=False, soft_wrap=True)
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
