"""A training folder becomes a model folder; an engine is added to one. Needs torch, unlike running the result."""

from __future__ import annotations

from pathlib import Path

from m3asr import __version__
from m3asr.checkpoint import Checkpoint
from m3asr.config import EncoderConfig, ModelConfig
from m3asr.errors import ModelError
from m3asr.folder import ModelFolder, engine_aside, write_model_files, written_aside
from m3asr.quantized import halve, quantize

# What a weight may be stored as -> what makes it so from float32, and what the card says.
STORED = {
    "float32": (dict, "float32"),
    "float16": (halve, "float16"),
    "int8": (quantize, "8 bits, matrices with one scale a row, the rest float16"),
}


def write_model_folder(
    checkpoint: Checkpoint, target: Path, *, onnx: bool = True, overwrite: bool = False, weights: str = "float32"
) -> None:
    """Write a model folder at once or not at all; weights: one of STORED.

    Raises ModelError if `target` is there, unless `overwrite`, and for weights that cannot be stored so.
    """
    stored, words = STORED[weights]
    try:
        state = stored({name: value.numpy() for name, value in checkpoint.state.items()})
    except ValueError as error:
        raise ModelError(f"the weights cannot be stored as {weights} ({error}): use --weights float32") from None
    text = card(checkpoint, words)
    with written_aside(target, overwrite=overwrite) as folder:
        write_model_files(folder, checkpoint.config, state, checkpoint.tokenizer, checkpoint.cmvn, text)
        if onnx:
            build_onnx(ModelFolder.read(folder))


def build_onnx(folder: ModelFolder) -> Path:
    """Build the onnx engine beside the model, replacing an older one only when the new one is whole."""
    from m3asr.engines import onnx_build

    with engine_aside(folder, "onnx") as aside:
        onnx_build.build(folder.config, folder.config_digest(), aside)
    return folder.path / "engines" / "onnx"


def build_tensorrt(folder: ModelFolder, **options) -> tuple[Path, dict[str, int]]:
    """Build TensorRT plans beside the model, likewise; -> where they are, and bytes of each plan.

    options: those of `engines.tensorrt.build`. Raises ModelError, and MissingExtra without a TensorRT package.
    """
    from m3asr.engines import need_tensorrt

    need_tensorrt("building the tensorrt engine")
    from m3asr.engines import tensorrt
    from m3asr.engines.eager import load_model

    with engine_aside(folder, "tensorrt") as aside:
        plans = tensorrt.build(lambda: load_model(folder), folder.config_digest(), aside, **options)
    return folder.path / "engines" / "tensorrt", plans


def card(checkpoint: Checkpoint, stored: str) -> str:
    """The model card: what this folder was made from and what the network is."""
    config = checkpoint.config
    parameters = sum(value.numel() for value in checkpoint.state.values())
    notes = "".join(f"- {note}\n" for note in checkpoint.notes)
    return (
        f"# {'3M-ASR' if config.family == '3m' else 'WeNet'} model\n\n"
        f"Converted by m3asr {__version__} from {', '.join(path.name for path in checkpoint.source)}.\n\n"
        f"- {parameters:,} parameters, {config.vocab_size} units\n"
        f"- weights stored as {stored}\n"
        f"- encoder: {_stack(config.encoder)}\n"
        + (f"- embedding network: {_stack(config.encoder.embed)}\n" if config.encoder.embed else "")
        + f"- attention decoder: {_decoder(config)}\n"
        + f"- features: {config.fbank.num_mel_bins} mel bins, CMVN {config.cmvn}\n"
        + (f"\n## Notes of the conversion\n\n{notes}" if notes else "")
    )


def _stack(encoder: EncoderConfig) -> str:
    experts = f", {encoder.moe.num_experts} experts of {encoder.moe.hidden_units}" if encoder.moe else ""
    streaming = ", causal" if encoder.causal else ""
    return (
        f"{encoder.num_blocks} blocks of width {encoder.attention_dim}, {encoder.attention_heads} heads{experts}, "
        f"{encoder.input_layer}, kernel {encoder.cnn_module_kernel}, {encoder.cnn_module_norm}{streaming}"
    )


def _decoder(config: ModelConfig) -> str:
    if config.decoder is None:
        return "none"
    right = f" and {config.decoder.r_num_blocks} right to left" if config.decoder.r_num_blocks else ""
    return f"{config.decoder.num_blocks} blocks{right}"
