"""The compact 3M-ASR that is trained: its sizes, and the model folder it ends in."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.numpy import save_file
from torch import Tensor

from m3asr.config import DecoderConfig, EncoderConfig, ModelConfig, MoEConfig
from m3asr.folder import read_weights
from m3asr.model import Model
from m3asr.quantized import halve, quantize


def compact(vocab_size: int, dropout: float, streaming: bool) -> ModelConfig:
    """About 18 million parameters, 36 MB in float16."""
    common = {
        "input_dim": 80,
        "causal": streaming,
        "use_dynamic_chunk": streaming,
        "norm_eps": 1e-5,
        "dropout_rate": dropout,
    }
    embed = EncoderConfig(attention_dim=128, attention_heads=4, num_blocks=4, linear_units=512, **common)
    encoder = EncoderConfig(
        attention_dim=256,
        attention_heads=4,
        num_blocks=9,
        linear_units=320,
        moe=MoEConfig(num_experts=4, hidden_units=320),
        embed=embed,
        **common,
    )
    decoder = DecoderConfig(attention_heads=4, linear_units=512, num_blocks=2, norm_eps=1e-5, dropout_rate=dropout)
    return ModelConfig("3m", vocab_size, encoder, decoder, sos=vocab_size - 1, eos=vocab_size - 1)


def large(vocab_size: int, dropout: float, streaming: bool) -> ModelConfig:
    """About 36 million parameters, 36 MB with 8 bits a weight: README.md says why these numbers."""
    config = compact(vocab_size, dropout, streaming)
    encoder = replace(
        config.encoder,
        attention_dim=320,
        attention_heads=5,
        num_blocks=11,
        linear_units=512,
        moe=MoEConfig(num_experts=4, hidden_units=512),
    )
    return replace(config, encoder=encoder, decoder=replace(config.decoder, attention_heads=5, linear_units=1024))


def tiny(vocab_size: int, dropout: float, streaming: bool) -> ModelConfig:
    """The same in a few seconds of one processor core, for trying the recipe out."""
    common = {"input_dim": 80, "causal": streaming, "use_dynamic_chunk": streaming, "dropout_rate": dropout}
    embed = EncoderConfig(attention_dim=32, attention_heads=2, num_blocks=1, linear_units=64, **common)
    moe = MoEConfig(num_experts=4, hidden_units=64)
    encoder = EncoderConfig(
        attention_dim=64, attention_heads=2, num_blocks=2, linear_units=64, moe=moe, embed=embed, **common
    )
    decoder = DecoderConfig(attention_heads=2, linear_units=64, num_blocks=1, dropout_rate=dropout)
    return ModelConfig("3m", vocab_size, encoder, decoder, sos=vocab_size - 1, eos=vocab_size - 1)


SIZES = {"compact": compact, "large": large, "tiny": tiny}


def write_folder(
    folder: Path, config: ModelConfig, state: dict[str, Tensor], units, mean: Tensor, istd: Tensor, *, bits: int = 16
) -> int:
    """config.json, model.safetensors (16 or 8 bits a weight), units.txt, cmvn.json, bpe.model; -> bytes of the weights.

    Written aside and renamed, so that a reader never sees half a model. Raises ValueError for weights that are not
    finite.
    """
    stored = {8: quantize, 16: halve}[bits]
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    arrays = {name: value.detach().cpu().numpy() for name, value in state.items()}
    save_file(stored(arrays), aside / "model.safetensors")
    (aside / "config.json").write_text(config.to_json(), encoding="utf-8")
    (aside / "units.txt").write_text(units.lines(), encoding="utf-8")
    (aside / "bpe.model").write_bytes(units.model)
    (aside / "cmvn.json").write_text(json.dumps({"mean": mean.tolist(), "istd": istd.tolist()}), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return (folder / "model.safetensors").stat().st_size


def read_folder(folder: Path) -> tuple[Model, bytes, Tensor, Tensor]:
    """What write_folder wrote -> model (float32), BPE model, mean, istd."""
    model = Model(ModelConfig.read(folder / "config.json"))
    weights = read_weights(folder / "model.safetensors")
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    cmvn = json.loads((folder / "cmvn.json").read_text(encoding="utf-8"))
    return model, (folder / "bpe.model").read_bytes(), torch.tensor(cmvn["mean"]), torch.tensor(cmvn["istd"])
