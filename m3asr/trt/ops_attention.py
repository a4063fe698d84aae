"""Attention as two matrix products and a float32 softmax; TensorRT fuses the pattern by itself."""

import torch
import torch.nn.functional as F

from . import layers as L
from .errors import UncoveredOperation
from .table import converter


@converter(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    net, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """softmax(q k^T * scale + mask) v; a row whose keys are all masked gives zeros (as torch's own kernels do)."""
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(times, -3) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if is_causal:
        rows = torch.arange(query.shape[-2]).unsqueeze(1)
        attn_mask = torch.arange(key.shape[-2]).unsqueeze(0) <= rows
    if attn_mask is None:
        return torch.matmul(torch.softmax(scores, -1), value)
    if attn_mask.dtype == torch.bool:
        weights = masked_softmax(scores, attn_mask)
    else:
        weights = torch.softmax(scores + attn_mask, -1)
    return torch.matmul(weights, value)


def masked_softmax(scores, mask):
    """Masked keys get the lowest finite score, not -inf: no NaN can arise, and the second mask makes the rows exact."""
    lowest = -1e4
    weights = torch.softmax(torch.where(mask, scores, lowest), -1)
    return torch.where(mask, weights, 0.0)


@converter(torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd)
def fast_path(net, *args, **kwargs):
    raise UncoveredOperation(f"{net.where()}the fused fast path of torch.nn was called directly; call the module")


@converter(torch._nested_tensor_from_mask_left_aligned)
def left_aligned(net, x, mask):
    """torch.nn.TransformerEncoder asks whether it may leave out the padding. It computes it here, and gives zeros for
    it in the end, as it does where it leaves it out. x (B, T, D), mask bool (B, T).
    """
    aligned = (mask[:, 1:] <= mask[:, :-1]).all()
    net.zero_at_leaving[net.path[-1]] = aligned & ~mask
    return False


@converter(F.normalize, kind="float32")
def normalize(net, x, p=2.0, dim=1, eps=1e-12, out=None):
    return x / torch.linalg.vector_norm(x, p, dim, True).clamp_min(eps)


@converter(F.glu)
def glu(net, x, dim=-1):
    node, dim = net.operand(x), dim % x.dim()
    half = x.shape[dim] // 2
    starts, window = [0] * x.dim(), list(x.shape)
    window[dim] = half
    value = L.slice_(node, starts, window, [1] * x.dim())
    starts[dim] = half
    return value * L.activation("SIGMOID", L.slice_(node, starts, window, [1] * x.dim()))
