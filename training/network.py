"""The compact 3M-ASR that is trained: its sizes, and the model folder it ends in."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from m3asr.config import DecoderConfig, EncoderConfig, ModelConfig, MoEConfig
from m3asr.model import Model


def compact(vocab_size: int, dropout: float, streaming: bool) -> ModelConfig:
    """About 18 million parameters, 36 MB in float16: README.md says why these numbers."""
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
    """About 36 million parameters: what a package of 40 MB could hold with 8 bits a weight."""
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


def write_folder(folder: Path, config: ModelConfig, state: dict[str, Tensor], units, mean: Tensor, istd: Tensor) -> int:
    """config.json, model.safetensors (float16), units.txt, cmvn.json, bpe.model; -> bytes of the weights.

    Written aside and renamed, so that a reader never sees half a model.
    """
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    half = {name: value.detach().cpu().half().contiguous() for name, value in state.items()}
    if broken := [name for name, value in half.items() if not value.isfinite().all()]:
        raise ValueError(f"not finite in float16: {', '.join(broken)}")
    save_file(half, aside / "model.safetensors")
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
    state = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(state)
    cmvn = json.loads((folder / "cmvn.json").read_text(encoding="utf-8"))
    return model, (folder / "bpe.model").read_bytes(), torch.tensor(cmvn["mean"]), torch.tensor(cmvn["istd"])
