"""The encoder as it is trained: the model's mathematics in a few kernels a sub-layer, and nothing the host must know.

`install` replaces the forward of a model's modules; parameters and their names stay, and a test holds values and
gradients equal to the model's own. Frames past an utterance's end may hold other numbers: nothing hears them.
Weights are cast to the dtype of the products (bfloat16 on a GPU) at each use; norms, softmax and routers are float32.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3asr import ops
from m3asr.model import Attention, ConformerBlock, ConvModule, FeedForward, Model, Subsampling
from training.kernels.activation import masked_glu, silu_dropout
from training.kernels.depthwise import depthwise
from training.kernels.norm import residual_norm
from training.kernels.random import Seed
from training.kernels.subsampling import first_convolution
from training.products import half, linear

EXTRA = 8  # columns that attention's heads get beside their own: what a key adds to all its scores, and zeros


def install(model: Model, seed: Seed) -> None:
    for module in model.modules():
        if isinstance(module, ConformerBlock) and supported(module):
            salts = [seed.salt() for _ in range(6)]
            module.forward = partial(_block, module, seed, salts)
        elif isinstance(module, Attention):
            module.forward = partial(_attention, module)
        elif isinstance(module, Subsampling) and quartered(module):
            module.forward = partial(_subsampling, module)


# Kernels are there for what is trained here; other modules keep their own forward.


def quartered(module: Subsampling) -> bool:
    """Two convolutions of 3x3 and stride 2 over one channel."""
    shapes = [(layer.kernel_size, layer.stride) for layer in module.conv if isinstance(layer, nn.Conv2d)]
    return module.in_channels == 1 and shapes == [((3, 3), (2, 2))] * 2


def supported(block: ConformerBlock) -> bool:
    convolution = block.conv_module
    return (
        block.macaron
        and block.feed_forward_macaron.activation is F.silu
        and convolution.activation is F.silu
        and convolution.use_layer_norm
    )


def _block(module: ConformerBlock, seed: Seed, salts, x, pos, mask, frames, glu_frames, embedding=None, cache=None):
    """Each sub-layer's output is added and the next one's norm taken in one kernel; (B, S, D) float32 in and out."""
    drop = module.dropout.p if module.training else 0.0
    dtype = half(x)

    def then(x, y, scale, norm, salt, dtype=dtype):
        return residual_norm(x, y, norm, seed, salt, scale, drop, dtype=dtype)

    x, n = then(x.float(), None, 1.0, module.norm_ff_macaron, 0)
    x, n = then(x, _feed_forward(module.feed_forward_macaron, seed, salts[0], n), 0.5, module.norm_mha, salts[1])
    x, n = then(x, module.self_attn(n, n, mask, pos), 1.0, module.norm_conv, salts[2])
    x, n = then(x, _convolution(module.conv_module, seed, n, glu_frames), 1.0, module.norm_ff, salts[3])
    feed_forward = module.feed_forward
    if embedding is None:
        y = _feed_forward(feed_forward, seed, salts[5], n)
    else:
        y = feed_forward(n, embedding)
    return then(x, y, 0.5, module.norm_final, salts[4], torch.float32)[1]


def _feed_forward(module: FeedForward, seed: Seed, salt: int, x: Tensor) -> Tensor:
    drop = module.dropout.p if module.training else 0.0
    hidden = silu_dropout(linear(x, module.w_1.weight, module.w_1.bias), seed, salt, drop)
    return linear(hidden, module.w_2.weight, module.w_2.bias)


def _convolution(module: ConvModule, seed: Seed, x: Tensor, glu_frames: Tensor) -> Tensor:
    """Frames stay in front of channels, so that pointwise convolutions are plain products."""
    first, last, middle = module.pointwise_conv1, module.pointwise_conv2, module.depthwise_conv
    x = masked_glu(linear(x, first.weight.squeeze(-1), first.bias), glu_frames)  # (B, S, D)
    left, edge = module.left_padding, None
    if left:  # what the model has before the first frame: the first product of zeros
        edge = F.glu(first.bias, dim=0)
    x = depthwise(x, middle.weight.squeeze(1), middle.bias, left or middle.kernel_size[0] // 2, edge)
    x = residual_norm(x, None, module.norm, seed, 0, silu=True)[1]
    return linear(x, last.weight.squeeze(-1), last.bias)


def _widened(weight: Tensor, bias: Tensor, heads: int, columns=None) -> tuple[Tensor, Tensor]:
    """Rows for EXTRA more columns a head: `columns` (weight (H, 1, D), bias (H, 1)) and zeros, or zeros alone."""
    weight, bias = weight.unflatten(0, (heads, -1)), bias.unflatten(0, (heads, -1))  # (H, K, D), (H, K)
    used = 0
    if columns is not None:
        weight, bias, used = torch.cat((weight, columns[0]), 1), torch.cat((bias, columns[1]), 1), 1
    weight, bias = F.pad(weight, (0, 0, 0, EXTRA - used)), F.pad(bias, (0, EXTRA - used))
    return weight.flatten(0, 1), bias.flatten(0, 1)


def _attention(module: Attention, x: Tensor, memory: Tensor, mask: Tensor, pos=None, cache=None) -> Tensor:
    """Scores never reach memory. What a key adds to all its scores (`ops.rel_pos_keys`, and whether it is masked) is
    one more column of the keys, where the queries have a 1; the projections make those columns themselves."""
    if not module.rel_pos:
        return _plain_attention(module, x, memory, mask)
    heads, q, k, v, out = module.heads, module.linear_q, module.linear_k, module.linear_v, module.linear_out
    scale = (q.weight.shape[0] // heads) ** -0.5
    u, w = module.pos_bias_u.unsqueeze(1), module.pos_bias_v.unsqueeze(1)  # (H, 1, K)
    one = torch.zeros_like(q.weight.unflatten(0, (heads, -1))[:, :1]), torch.ones_like(q.bias[:heads].unsqueeze(1))
    k_split = k.weight.unflatten(0, (heads, -1)), k.bias.unflatten(0, (heads, -1)).unsqueeze(-1)  # (H, K, D), (H, K, 1)
    heard = u @ k_split[0], (u @ k_split[1]).squeeze(-1)  # u k^T as a row of the projection
    parts = [
        _widened(q.weight, q.bias, heads, one),
        _widened(k.weight, k.bias, heads, heard),
        _widened(v.weight, v.bias, heads),
    ]
    weight, bias = (torch.cat(part) for part in zip(*parts, strict=True))
    projected = linear(x, weight, bias).unflatten(-1, (3, heads, -1))  # (B, S, 3, H, K + EXTRA)
    q_rows, k_rows, v_rows = projected.transpose(1, 3).unbind(2)  # (B, H, S, K + EXTRA)
    p = module.split(F.linear(pos.float(), module.linear_pos.weight))  # (1, H, S, K)
    p = torch.cat((p, (p * w).sum(dim=-1, keepdim=True)), dim=-1)  # v p^T beside it
    k_rows = k_rows + F.pad(p, (0, EXTRA - 1)).to(k_rows.dtype)
    # Behind autograd's back: a masked key has no weight, so nothing flows to it either way. The last query sees every
    # key that any sees.
    k_rows.detach()[..., p.shape[-1] - 1].masked_fill_(~mask[:, :, -1], ops.MASKED)
    chunks = None
    if mask.shape[2] > 1:  # the same for all rows but for the keys that the column has masked already
        seen = mask.any(dim=0)[0]  # (S, S)
        chunks = torch.zeros_like(seen, dtype=q_rows.dtype).masked_fill(~seen, ops.MASKED)
    context = F.scaled_dot_product_attention(q_rows, k_rows, v_rows, chunks, scale=scale)  # (B, H, S, K + EXTRA)
    weight = F.pad(out.weight.unflatten(1, (heads, -1)), (0, EXTRA)).flatten(1)  # zeros for the extra columns
    return linear(context.transpose(1, 2).flatten(2), weight, out.bias)


def _plain_attention(module: Attention, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
    """The decoder's two kinds, and encoders' without positions."""
    q = module.split(module.linear_q(x))
    k, v = module.split(module.linear_k(memory)), module.split(module.linear_v(memory))
    if mask.ndim == 2:  # the decoder's own tokens: causal
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    elif mask.shape[2] > 1:
        context = ops.attention(q, k, v, mask)
    else:
        one = F.pad(torch.ones_like(q[..., :1]), (0, EXTRA - 1))
        masked = torch.zeros_like(mask, dtype=k.dtype).masked_fill(~mask, ops.MASKED)[:, :, 0, :, None]
        masked = F.pad(masked.expand(*k.shape[:-1], 1), (0, EXTRA - 1))
        q, k, v = torch.cat((q, one), dim=-1), torch.cat((k, masked), dim=-1), F.pad(v, (0, EXTRA))
        context = F.scaled_dot_product_attention(q, k, v, scale=(q.shape[-1] - EXTRA) ** -0.5)[..., :-EXTRA]
    return module.linear_out(context.transpose(1, 2).flatten(2))


def _subsampling(module: Subsampling, features: Tensor) -> Tensor:
    """Channels last throughout; the projection's weight is turned instead of its input."""
    first, _, second, _ = module.conv
    projection: nn.Linear = module.out[0]
    x = first_convolution(features.float(), first.weight, first.bias, half(features))  # (B, T', bins', D)
    weight = second.weight.to(x.dtype, memory_format=torch.channels_last)
    x = F.relu(F.conv2d(x.permute(0, 3, 1, 2), weight, second.bias.to(x.dtype), second.stride))  # (B, D, S, bins'')
    channels, bins = x.shape[1], x.shape[3]
    weight = projection.weight.unflatten(1, (channels, bins)).transpose(1, 2).flatten(1)
    return linear(x.permute(0, 2, 3, 1).flatten(2), weight, projection.bias)
