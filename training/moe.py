"""The experts as they are trained: every expert on every token and a mask, so that the host never waits.

A few small experts cost the device little, shapes stay fixed, and the gradient is exact: a token that is not an
expert's contributes nothing to it. `install` replaces the forward of a model's MoEFeedForward modules; parameters and
their names stay, and what is trained equals `ops.moe` (a test compares them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3asr.model import Model, MoEFeedForward
from training.kernels.activation import silu_chosen
from training.products import linear


@dataclass
class Routing:
    """How the experts of a model are used now, and what the routers said (the user empties `probs`)."""

    blend: Tensor  # (), on the device: the output is scaled by 1 + blend * (gate - 1)
    dense: bool = False  # every token through expert 0, unscaled: an ordinary Conformer
    probs: list[Tensor] = field(default_factory=list)  # one (B, S, E) a layer


def moe_layers(model: Model) -> list[MoEFeedForward]:
    return [module for module in model.modules() if isinstance(module, MoEFeedForward)]


def install(model: Model) -> Routing:
    """Raises ValueError for experts that no kernel is there for."""
    routing = Routing(torch.ones((), device=next(model.parameters()).device))
    for module in moe_layers(model):
        if module.experts.activation != "swish":
            raise ValueError(f"experts with activation {module.experts.activation!r}: only swish is trained here")
        module.forward = partial(_forward, module, routing)
    return routing


def _forward(module: MoEFeedForward, routing: Routing, x: Tensor, embedding: Tensor) -> Tensor:
    experts = module.experts
    w_1, b_1, w_2, b_2 = experts.w_1.weight, experts.w_1.bias, experts.w_2.weight, experts.w_2.bias
    if routing.dense:
        return linear(F.silu(linear(x, w_1[0], b_1[0])), w_2[0], b_2[0])
    with torch.autocast(x.device.type, enabled=False):  # the router is float32, always
        probs = torch.softmax(module.router_logits(x, embedding), dim=-1)  # (B, S, E)
    if torch.is_grad_enabled():  # evaluation does not ask for them, and would pile them up
        routing.probs.append(probs)
    gate, expert_idx = probs.max(dim=-1)
    hidden = linear(x, w_1.flatten(0, 1), b_1.flatten())  # (B, S, E*F)
    hidden = silu_chosen(hidden, expert_idx, w_1.shape[0])
    chosen = F.one_hot(expert_idx, w_1.shape[0]).to(hidden.dtype)  # (B, S, E)
    y = linear(hidden, w_2.transpose(0, 1).flatten(1), None) + torch.matmul(chosen, b_2.to(hidden.dtype))  # (B, S, D)
    if module.keep_expert_output:
        return y
    return y * (1.0 + routing.blend * (gate - 1.0)).unsqueeze(-1).to(y.dtype)


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
