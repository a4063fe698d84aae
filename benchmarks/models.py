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
    """A model whose weights keep activations of order one; see `spread_routers` for its routing."""
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


@torch.no_grad()
def spread_routers(model: Model, batch: int = 8, frames: int = 406, seed: int = 1) -> None:
    """Change the routers so that tokens of noise go to nearly all experts, as those of speech do in trained models.

    What all tokens have in common decides a random router: then few experts are hit, and a forward reads less than it
    would in earnest. So that common part, measured on noise, is taken out of each router's weights, and the rest is
    scaled to logits with a standard deviation of 2.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def spread(layer, inputs):
        x, embedding = inputs
        z = torch.cat((embedding, x), dim=-1).flatten(0, 1).double()  # (N, D' + D)
        mean, weight = z.mean(0), layer.router_weights.double()
        weight = weight - torch.outer(mean, mean @ weight) / (mean @ mean)
        layer.router_weights.copy_(weight * (2.0 / (z @ weight).std()))

    layers = [block.feed_forward for block in model.encoder.blocks if hasattr(block.feed_forward, "router_weights")]
    hooks = [layer.register_forward_pre_hook(spread) for layer in layers]
    features = torch.randn(batch, frames, model.config.encoder.input_dim, device=device, generator=generator)
    try:
        model(features, torch.full((batch,), frames, dtype=torch.int32, device=device))
    finally:
        for hook in hooks:
            hook.remove()
