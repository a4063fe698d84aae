"""Options that several commands share, with their words for the manual."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from m3asr.decode import DECODERS, DecodeOptions
from m3asr.decode.options import JOINT_LM_BONUS, JOINT_LM_WEIGHT, LM_BONUS, LM_WEIGHT
from m3asr.engines import NAMES
from m3asr.errors import M3asrError, reason
from m3asr.formats import FORMATS

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
    typer.Option(
        "--decoder", help="Default: joint (streams in chunks: rescoring); without an attention decoder, beam."
    ),
]
BeamOption = Annotated[int, typer.Option("--beam-size", min=1, max=1000)]
CtcWeightOption = Annotated[
    Optional[float],  # noqa: UP007, UP045
    typer.Option("--ctc-weight", min=0.0, max=1.0, help="Of CTC in rescoring and joint; default: the model's."),
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
    typer.Option(
        "--lm",
        help="N-gram language model, an ARPA or KenLM binary file; default: the model's own, if it has one. "
        "none: without.",
    ),
]
LmWeightOption = Annotated[
    Optional[float],  # noqa: UP007, UP045
    typer.Option("--lm-weight", help=f"Default: {JOINT_LM_WEIGHT} in joint, {LM_WEIGHT} in beam and rescoring."),
]
LmBonusOption = Annotated[
    Optional[float],  # noqa: UP007, UP045
    typer.Option(
        "--lm-bonus",
        help=f"For each word, or token. Default: {JOINT_LM_BONUS} in joint, {LM_BONUS} in beam and rescoring.",
    ),
]
LmUnitOption = Annotated[str, typer.Option("--lm-unit", help="What the language model counts: word or token.")]
ChunkSizeOption = Annotated[
    int,
    typer.Option(
        "--chunk-size",
        min=0,
        help="Encoder frames (of 40 ms, as a rule) a chunk, as a stream would hear them; 0 means the whole utterance.",
    ),
]
LeftChunksOption = Annotated[
    int, typer.Option("--left-chunks", min=-1, help="Chunks before its own that a frame sees; -1 means all.")
]
MaxSecondsOption = Annotated[
    float, typer.Option("--max-seconds", help="Longer recordings are cut at pauses, into at most this long segments.")
]
VadOption = Annotated[
    bool, typer.Option("--vad/--no-vad", help="Look for speech; without, everything is taken for speech.")
]
# A bound, for thousands of threads wait for each other and never end.
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=0, max=512, help="CPU threads; 0 leaves it to the engine.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but the result and errors.")]


def phrases(hotwords: str | None) -> tuple[str, ...]:
    """A file with one phrase a line, or phrases with commas between them."""
    if hotwords is None:
        return ()
    path = Path(hotwords)
    try:
        if os.path.isfile(path):  # Path.is_file raises for a list longer than a name may be
            return tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise M3asrError(f"{path} is no readable list of phrases: {reason(error)}") from None
    if "," not in hotwords and ("/" in hotwords or path.suffix.lower() in (".txt", ".lst", ".csv")):
        raise M3asrError(f"{hotwords}: no such file; expected a file of phrases, or phrases with commas between them")
    found = tuple(phrase.strip() for phrase in hotwords.split(",") if phrase.strip())
    if not found and hotwords.strip():
        raise M3asrError(f"--hotwords {hotwords!r} holds no phrase; expected phrases with commas between them")
    return found


def decode_options(
    decoder: DecoderName | None = None, *, hotwords: str | None = None, lm: Path | None = None, **others
) -> DecodeOptions:
    """The settings that options as they were typed mean; others: as `DecodeOptions` has them. Raises M3asrError."""
    return DecodeOptions(
        decoder=decoder.value if decoder else None, hotwords=phrases(hotwords), lm=str(lm) if lm else None, **others
    )
