"""The two published model shapes with random weights: what the benchmarks run on, no checkpoint needed."""

from __future__ import annotations

import torch

from m3asr.config import EncoderConfig, ModelConfig, MoEConfig
from m3asr.model import Model

# (input bins, blocks, hidden width of every feed-forward): 3M-ASR's shipped and published shapes.
PRESETS = {"seed": (40, 18, 1024), "public": (80, 12, 2048), "tiny": (20, 2, 48)}
VOCABULARY = 5537


def preset(name: str) -> ModelConfig:
    bins, blocks, hidden = PRESETS[name]
    width, heads, experts = (32, 2, 4) if name == "tiny" else (512, 8, 32)
    shape = {"input_dim": bins, "attention_dim": width, "attention_heads": heads, "linear_units": hidden}
    embed = EncoderConfig(**shape, num_blocks=2 if name == "tiny" else 6)
    encoder = EncoderConfig(**shape, num_blocks=blocks, moe=MoEConfig(experts, hidden), embed=embed)
    return ModelConfig(family="3m", vocab_size=37 if name == "tiny" else VOCABULARY, encoder=encoder)


@torch.no_grad()
def random_model(config: ModelConfig, device: str, seed: int = 0) -> Model:
    """A model whose weights keep activations of order one and send tokens to many experts."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = Model(config).eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.dtype.is_floating_point:
            continue
        if name.endswith(("running_var", "istd")) or ("norm" in name and name.endswith("weight")):
            value.uniform_(0.7, 1.3)
        elif name.endswith(("bias", "pos_bias_u", "pos_bias_v", "mean")):
            value.normal_(0.0, 0.1)
        elif name.endswith("router_weights"):
            value.normal_(0.0, (2.0 / value.shape[0]) ** 0.5)
        elif "experts" in name:
            value.normal_(0.0, value.shape[-1] ** -0.5)
        else:
            value.normal_(0.0, value[0].numel() ** -0.5)
    return model
