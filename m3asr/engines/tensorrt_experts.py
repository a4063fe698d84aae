"""The top-1 experts in a TensorRT network: in plain layers, or as a plugin in Triton. Importing this declares both."""

from __future__ import annotations

import os
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F

from m3asr import ops, trt

EXPERTS = ("layers", "plugin")
_FORM: ContextVar[str] = ContextVar("experts", default="layers")
# Bytes that the hidden layer of all experts on all tokens may take; above it the experts are computed in groups.
LAYER_BYTES = 1 << 28
# Tokens of one launch of the plugin's kernel, which holds the routing of all of them at once.
LAUNCH_TOKENS = 1024


@contextmanager
def experts_as(form: str):
    """Networks traced inside have their experts in this form, "layers" or "plugin"."""
    token = _FORM.set(form)
    try:
        yield
    finally:
        _FORM.reset(token)


@trt.converter(ops.moe)
def _experts(net, x, expert_idx, w_1, b_1, w_2, b_2, activation):
    if _FORM.get() == "plugin":
        h = expert_linear(x, expert_idx, w_1, b_1, activation=activation)
        return expert_linear(h, expert_idx, w_2, b_2, activation="none")
    return _in_layers(net, x, expert_idx, w_1, b_1, w_2, b_2, activation)


def _in_layers(net, x, expert_idx, w_1, b_1, w_2, b_2, activation):
    """All experts on all tokens, all but the chosen one masked: static shapes, no sorting, nothing data-dependent.

    Near the floor for few tokens, where every expert's weights are read anyway. The mask stands on the hidden layer, so
    that the second product sums over experts: zeros add nothing, and a masked NaN or infinity is gone. With many
    tokens the experts come in groups, which bounds the memory and not the work.
    """
    experts, hidden, _ = w_1.shape
    largest = net.sizes.largest(x.shape[0]) * experts * hidden * 4
    size = -(-experts // min(experts, max(1, -(-largest // LAYER_BYTES))))  # experts of one group
    chosen = F.one_hot(expert_idx, experts).to(torch.bool)  # (N, E)
    y = F.embedding(expert_idx, b_2)  # (N, D)
    for a in range(0, experts, size):
        b = min(a + size, experts)
        h = ops.ACTIVATIONS[activation](F.linear(x, w_1[a:b].flatten(0, 1), b_1[a:b].flatten()))  # (N, e*F)
        h = torch.where(chosen[:, a:b, None], h.unflatten(-1, (b - a, hidden)), 0.0).flatten(1)
        y = y + F.linear(h, w_2[a:b].transpose(0, 1).flatten(1))
    return y


@trt.plugin("M3asrExpertLinear", shape=lambda x, expert_idx, weight, bias: (x[0], weight[1]), kind="matmul")
def expert_linear(x, expert_idx, weight, bias, *, activation: str):
    """act(weight[e] x[n] + bias[e]) with e = expert_idx[n]; a negative e gives zeros.

    x (N, K), expert_idx int (N,), weight (E, C, K), bias (E, C) -> (N, C). activation: a name of ops.ACTIVATIONS
    or "none".
    """
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for e in range(weight.shape[0]):
        tokens = (expert_idx == e).nonzero().squeeze(1)
        y = F.linear(x[tokens].float(), weight[e].float(), bias[e].float())
        out[tokens] = (y if activation == "none" else ops.ACTIVATIONS[activation](y)).to(out.dtype)
    return out


@expert_linear.kernel
def _launch(x, expert_idx, weight, bias, out, activation):
    from m3asr.kernels.experts_few import experts_few
    from m3asr.kernels.pieces import Tile, at_least_16

    out.zero_()  # tokens without an expert are not written
    # The interpreter multiplies bfloat16 operands wrongly (triton 3.9), so it is given float32 ones.
    dot = "upcast" if os.environ.get("TRITON_INTERPRET") == "1" else "ieee"
    expert_idx, bias = expert_idx.to(torch.int32), bias.float()
    tile = Tile(16, 32, at_least_16(x.shape[1]), stages=1)
    for a in range(0, x.shape[0], LAUNCH_TOKENS):
        b = a + LAUNCH_TOKENS
        part = {"tile": tile, "activation": activation, "early": False, "dot": dot}
        experts_few(x[a:b], weight, bias, expert_idx[a:b], out[a:b], **part)
