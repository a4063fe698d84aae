"""The experts as they are trained: every expert on every token and a mask, so that the host never waits.

Eight small experts cost the device little, shapes stay fixed, and the gradient is exact: a token that is not an
expert's contributes nothing to it. `install` gives a model's MoEFeedForward modules another class; parameters and
their names stay, and what is trained equals `ops.moe` (a test compares them).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3asr.model import Model, MoEFeedForward
from m3asr.ops import ACTIVATIONS


class TrainedMoE(MoEFeedForward):
    """MoEFeedForward while it is trained; `install` makes them."""

    single: Tensor  # (), 1: every token through expert 0
    blend: Tensor  # (), the output is scaled by 1 + blend * (gate - 1)
    probs: Tensor | None  # (B, S, E) of the last forward that wanted gradients

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        experts = self.experts
        w_1, b_1, w_2, b_2 = experts.w_1.weight, experts.w_1.bias, experts.w_2.weight, experts.w_2.bias
        with torch.autocast(x.device.type, enabled=False):  # the router is float32, always
            probs = torch.softmax(self.router_logits(x, embedding), dim=-1)  # (B, S, E)
        if torch.is_grad_enabled():  # evaluation does not ask for them, and would pile them up
            self.probs = probs
        gate, expert_idx = probs.max(dim=-1)
        hidden = ACTIVATIONS[experts.activation](F.linear(x, w_1.flatten(0, 1), b_1.flatten()))  # (B, S, E*F)
        number = torch.arange(w_1.shape[0], device=x.device)
        chosen = torch.lerp((number == expert_idx.unsqueeze(-1)).float(), (number == 0).float(), self.single)
        chosen = chosen.to(hidden.dtype)  # (B, S, E)
        hidden = (hidden.unflatten(-1, (w_1.shape[0], -1)) * chosen.unsqueeze(-1)).flatten(-2)
        y = F.linear(hidden, w_2.transpose(0, 1).flatten(1)) + torch.matmul(chosen, b_2)  # (B, S, D)
        if self.keep_expert_output:
            return y
        return y * (1.0 + self.blend * (gate - 1.0)).unsqueeze(-1).to(y.dtype)


class Routing:
    """How the experts of a model are used now, and what its routers said."""

    def __init__(self, layers: list[TrainedMoE]):
        self.layers, self.dense, self.blend = layers, False, 1.0

    def set(self, dense: bool, blend: float) -> None:
        """dense: every token through expert 0, unscaled, an ordinary Conformer. blend: how much of the gate counts."""
        if (dense, blend) != (self.dense, self.blend):
            for layer in self.layers:
                layer.single.fill_(float(dense))
                layer.blend.fill_(0.0 if dense else blend)
            self.dense, self.blend = dense, blend

    def probs(self) -> list[Tensor]:
        """(B, S, E) of each layer, of the last forward with gradients; nothing is kept after the call."""
        found = [layer.probs for layer in self.layers if layer.probs is not None]
        for layer in self.layers:
            layer.probs = None
        return found


def moe_layers(model: Model) -> list[MoEFeedForward]:
    return [module for module in model.modules() if isinstance(module, MoEFeedForward)]


def install(model: Model) -> Routing:
    layers = moe_layers(model)
    for module in layers:
        module.__class__ = TrainedMoE
        device = module.router_weights.device
        module.register_buffer("single", torch.zeros((), device=device), persistent=False)
        module.register_buffer("blend", torch.ones((), device=device), persistent=False)
        module.probs = None
    return Routing(layers)


def start_routers(model: Model) -> None:
    """Xavier-uniform of gain 0.5; all zeros, as the module is made, would send every token to expert 0."""
    for module in moe_layers(model):
        nn.init.xavier_uniform_(module.router_weights, gain=0.5)


def expert_parameters(model: Model) -> list[nn.Parameter]:
    return [p for module in moe_layers(model) for p in module.experts.parameters()]


@torch.no_grad()
def copy_first_expert(model: Model, optimizer=None) -> None:
    """Every expert becomes expert 0, the optimizer's moments too: what was one dense feed-forward goes on as E."""
    for parameter in expert_parameters(model):
        tensors = [parameter]
        if optimizer is not None:
            tensors += optimizer.moments(parameter)
        for tensor in tensors:
            tensor.copy_(tensor[:1].expand_as(tensor).clone())


def load_entropy(probs: Tensor, valid: Tensor) -> Tensor:
    """Entropy of the experts' shares of the tokens / log E: 1 if they are used evenly, 0 if one takes all.

    probs (..., B, S, E), valid bool (B, S) -> (...)."""
    experts = probs.shape[-1]
    load = (F.one_hot(probs.argmax(dim=-1), experts) * valid.unsqueeze(-1)).sum(dim=(-3, -2)).float()
    share = load / load.sum(dim=-1, keepdim=True)
    return -(share * share.clamp(min=1e-9).log()).sum(dim=-1) / math.log(experts)
