"""Small models with random weights that can stream, in every configuration that does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from random_model import VARIANTS, random_model

from m3asr.config import FbankConfig
from m3asr.convert import build_onnx
from m3asr.folder import ModelFolder, write_model_files, written_aside
from m3asr.tokenizer import Tokenizer

CHUNKED = {"causal": True, "use_dynamic_chunk": True}
STREAMING = {
    "layer_norm-8": {"cnn_module_kernel": 8},
    "layer_norm-15": {"cnn_module_kernel": 15},
    "batch_norm-8": {"cnn_module_kernel": 8, "cnn_module_norm": "batch_norm"},
    "batch_norm-15": {"cnn_module_kernel": 15, "cnn_module_norm": "batch_norm"},
    "other-embedding": {
        "num_blocks": 1,
        "cnn_module_kernel": 8,
        "embed": {"attention_dim": 48, "attention_heads": 3, "num_blocks": 2},
    },
    "conv2d6": {"input_layer": "conv2d6"},
    "no_pos": {"pos_enc_layer_type": "no_pos", "selfattention_layer_type": "selfattn"},
    "dense": {"moe": None, "embed": None},
    "static": {"use_dynamic_chunk": False, "static_chunk_size": 3},
}
# Exporting takes seconds, so one model here has an onnx engine; the golden one is the other.
EXPORTED = "other-embedding"
UNITS = ["<blank>", "<unk>", "▁", *"abcdefghijklmnop", "<sos/eos>"]


def write_model(name: str, path: Path) -> None:
    """A folder of that variant, whole or not at all; that of EXPORTED with its onnx engine."""
    VARIANTS["streaming"] = CHUNKED | STREAMING[name] if name in STREAMING else VARIANTS[name]
    model = random_model("streaming")
    del VARIANTS["streaming"]
    config = replace(model.config, fbank=FbankConfig(num_mel_bins=model.config.encoder.input_dim))
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    with written_aside(path) as folder:
        write_model_files(folder, config, state, Tokenizer(UNITS), None, "")
        if name == EXPORTED:
            build_onnx(ModelFolder.read(folder))
