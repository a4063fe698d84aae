"""Small models with random weights in every configuration that the converter accepts."""

from __future__ import annotations

import torch

from m3asr.config import DecoderConfig, EncoderConfig, ModelConfig, MoEConfig
from m3asr.model import Model

VARIANTS = {
    "moe": {},
    "wide-embedding": {"embed": {"attention_dim": 48, "linear_units": 40}},
    "batch_norm": {"cnn_module_norm": "batch_norm", "embed": {"cnn_module_norm": "batch_norm"}},
    "causal": {"causal": True, "cnn_module_kernel": 8},
    "conv2d6": {"input_layer": "conv2d6"},
    "conv2d8": {"input_layer": "conv2d8"},
    "three-channels": {"input_dim": 120, "conv_subsample_in_ch": 3},
    "no_pos": {"pos_enc_layer_type": "no_pos", "selfattention_layer_type": "selfattn"},
    "no_pos-rel_selfattn": {"pos_enc_layer_type": "no_pos"},
    "no-macaron": {"macaron_style": False},
    "router-bias": {"moe": {"router_with_bias": True, "keep_expert_output": True}},
    "gelu": {"activation_type": "gelu"},
    "dense": {"moe": None, "embed": None},
    "static-chunk": {"static_chunk_size": 3, "causal": True},
}


def random_model(variant: str = "moe", family: str = "3m", seed: int = 0, blocks: int = 2) -> Model:
    """A small model with weights far from their initial values. variant: of VARIANTS, several joined by +."""
    changes = {key: value for name in variant.split("+") for key, value in VARIANTS[name].items()}
    base = {"input_dim": 40, "attention_dim": 32, "attention_heads": 2, "num_blocks": blocks, "linear_units": 48}
    moe, embed = changes.pop("moe", {}), changes.pop("embed", {})
    moe = None if moe is None else MoEConfig(**{"num_experts": 4, "hidden_units": 24, **moe})
    embed = None if embed is None else EncoderConfig(**{**base, **changes, **embed})
    encoder = EncoderConfig(**base | changes, moe=moe, embed=embed)
    config = ModelConfig(family, 20, encoder, DecoderConfig(2, 24, 1), cmvn="none", sos=19, eos=19)
    torch.manual_seed(seed)
    model = Model(config).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) * (0.3 if tensor.ndim == 1 else 0.1))
    return model
