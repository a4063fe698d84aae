"""The top-1 experts in a TensorRT network: in plain layers, or as a plugin in Triton. Importing this declares both."""

from __future__ import annotations

import math
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F

from m3asr import ops, trt

EXPERTS = ("layers", "plugin")
_FORM: ContextVar[str] = ContextVar("experts", default="layers")
# Bytes that the hidden layer of all experts on all tokens may take; above it the experts are computed in groups.
LAYER_BYTES = 1 << 28
# The highest tile of sorted tokens, for the plugin's workspace: every expert may leave one partly empty.
MOST_ROWS = 128


@contextmanager
def experts_as(form: str):
    """Networks traced inside have their experts in this form, "layers" or "plugin"."""
    token = _FORM.set(form)
    try:
        yield
    finally:
        _FORM.reset(token)


@trt.converter(ops.moe)
def _convert(net, x, expert_idx, w_1, b_1, w_2, b_2, activation):
    if _FORM.get() == "plugin":
        return experts(x, expert_idx.to(torch.int32), w_1, b_1, w_2, b_2, activation=activation)
    return _in_layers(net, x, expert_idx, w_1, b_1, w_2, b_2, activation)


def _in_layers(net, x, expert_idx, w_1, b_1, w_2, b_2, activation):
    """All experts on all tokens, all but the chosen one masked: static shapes, no sorting, nothing data-dependent.

    Every expert's weights are read: with few tokens, whose experts are fewer, some two times too many. The mask stands
    on the hidden layer, so that the second product sums over experts: zeros add nothing, and a masked NaN or infinity
    is gone. With many tokens the experts come in groups, which bounds the memory and not the work.
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


def _workspace_bytes(x, expert_idx, w_1, b_1, w_2, b_2):
    """Sorted hidden rows, the token of each, the expert of each tile, and the biases as float32."""
    tokens, (count, hidden) = x[0], b_1
    slots = tokens + (count + 1) * MOST_ROWS
    return 4 * (slots * (hidden + 2) + count * hidden + b_2[0] * b_2[1]) + 6 * 256


@trt.plugin("M3asrExperts", kind="matmul", workspace=_workspace_bytes)
def experts(x, expert_idx, w_1, b_1, w_2, b_2, *, activation: str):
    """w_2[e] act(w_1[e] x[n] + b_1[e]) + b_2[e] with e = expert_idx[n]; a negative e gives zeros.

    x (N, D), expert_idx int32 (N,), w_1 (E, F, D), b_1 (E, F), w_2 (E, D, F), b_2 (E, D) -> (N, D).
    activation: a name of ops.ACTIVATIONS.
    """
    out = torch.zeros_like(x)
    for e in range(w_1.shape[0]):
        tokens = (expert_idx == e).nonzero().squeeze(1)
        h = ops.ACTIVATIONS[activation](F.linear(x[tokens].float(), w_1[e].float(), b_1[e].float())).to(x.dtype)
        out[tokens] = F.linear(h.float(), w_2[e].float(), b_2[e].float()).to(x.dtype)
    return out


@experts.kernel
def _launch(x, expert_idx, w_1, b_1, w_2, b_2, out, activation, workspace):
    """By the cuda engine's kernels: the tokens sorted by expert, then both products."""
    from m3asr.engines.cuda.tiles import fitted, tiles_for
    from m3asr.kernels.expert_product import expert_product
    from m3asr.kernels.pieces import shared_memory
    from m3asr.kernels.sort import most_tiles, sort_tokens

    (tokens, width), (count, hidden) = x.shape, b_1.shape
    wide = x.dtype == torch.float32
    tile = fitted(tiles_for(tokens, width, hidden, wide), shared_memory(x.device), x.dtype.itemsize)
    taken = 0

    def piece(dtype, *shape):
        nonlocal taken
        size = math.prod(shape) * dtype.itemsize
        taken, start = taken + -(-size // 256) * 256, taken
        return workspace[start : start + size].view(dtype).view(shape)

    b_1 = piece(torch.float32, *b_1.shape).copy_(b_1)
    b_2 = piece(torch.float32, *b_2.shape).copy_(b_2)
    out.zero_()  # tokens without an expert are not written
    # Three tf32 products keep float32's accuracy; Triton's interpreter multiplies bfloat16 operands wrongly (3.9).
    dot = {"dot": "tf32x3" if wide else "upcast" if x.device.type == "cpu" else "ieee"}
    up, down = {**dot, "tile": tile.expert_up, "activation": activation}, {**dot, "tile": tile.expert_down}
    rows = tile.expert_up.m
    tiles = most_tiles(tokens, count, rows)
    h = piece(x.dtype, tiles * rows, hidden)
    slot_token, tile_expert = piece(torch.int32, tiles * rows), piece(torch.int32, tiles)
    sort_tokens(expert_idx, slot_token, tile_expert, experts=count, rows=rows, tile=tile.sort)
    expert_product(x, w_1, b_1, slot_token, tile_expert, h, **up)
    expert_product(h, w_2, b_2, slot_token, tile_expert, out, residual_scale=1.0, **down)
