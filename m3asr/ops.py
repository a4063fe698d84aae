"""The few functions whose mathematics depends on data or on lengths, in plain torch.

They are the reference that every engine's kernels are compared with. Shape letters: B batch, T frames, S subsampled
frames, D model width, H heads, K head width, F hidden width, E experts, N = B*S tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

ACTIVATIONS = {
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "hardtanh": F.hardtanh,
    "selu": F.selu,
}

# Masked scores. Finite, so that a row without any valid key gives zeros and not NaN; float16 never sees it, because
# the softmax is always taken in float32.
MASKED = -1e30


def subsampled_lengths(lengths: Tensor, layers, original_3m_frames=None) -> Tensor:
    """Number of valid frames after the subsampling convolutions. int32 (B,) -> int32 (B,).

    layers: ((kernel, stride), ...). By default a frame counts as valid if its whole receptive field is
    (specification 2.2, "modern": (L - kernel) // stride + 1 a layer). With `original_3m_frames` = T, the padded input
    length, the formula is the one of the 3M-ASR training code, ceil(L / stride) capped by the output's length, which
    keeps up to two frames that see padding.
    """
    frames = original_3m_frames
    for kernel, stride in layers:
        if original_3m_frames is None:
            lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
            lengths = lengths.clamp(min=0)
        else:
            frames = (frames - kernel) // stride + 1
            lengths = torch.div(lengths + (stride - 1), stride, rounding_mode="floor").clamp(max=frames)
    return lengths


def frame_mask(lengths: Tensor, size) -> Tensor:
    """True where a frame is inside its utterance. int (B,) -> bool (B, size)."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)  # (B, size)


def chunk_mask(size, chunk_size, left_chunks, device=None) -> Tensor:
    """Which keys each query sees when the encoder works in chunks: bool (size, size), rows are queries.

    Query i sees keys [max((i // C - left) * C, 0), (i // C + 1) * C); left < 0 means everything before
    (specification 3.4). `chunk_size` and `left_chunks` are ints or 0-d integer tensors; chunk_size <= 0 means one
    chunk over the whole utterance.
    """
    position = torch.arange(size, device=device)
    chunk_size = torch.as_tensor(chunk_size, device=device)
    left_chunks = torch.as_tensor(left_chunks, device=device)
    chunk_size = torch.where(chunk_size > 0, chunk_size, size)
    left_chunks = torch.where(left_chunks >= 0, left_chunks, size)
    chunk = torch.div(position, chunk_size, rounding_mode="floor").unsqueeze(-1)  # (S, 1)
    return (position < (chunk + 1) * chunk_size) & (position >= (chunk - left_chunks) * chunk_size)


def positional_encoding(size, width: int, offset=0, device=None) -> Tensor:
    """Sinusoidal table float32 (size, width): pe[p, 2i] = sin(p w_i), pe[p, 2i+1] = cos(p w_i), w_i = 1e4^(-2i/width).

    Positions start at `offset`, a number, or an integer tensor (B, 1) that gives a table each: (B, size, width).
    (Vaswani et al. 2017, section 3.5; specification 2.3.)
    """
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32, device=device) * -(math.log(10000.0) / width))
    position = torch.arange(size, device=device).to(torch.float32) + offset
    angle = position.unsqueeze(-1) * rate  # (size, width/2)
    return torch.stack((torch.sin(angle), torch.cos(angle)), dim=-1).flatten(-2)  # (size, width)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, key_bias: Tensor | None = None) -> Tensor:
    """softmax((q k^T + key_bias) / sqrt(K)) v over the keys that `mask` allows; zeros where it allows none.

    q (B, H, Q, K); k, v (B, H, S, K); mask bool, broadcastable to (B, H, Q, S); key_bias (B, H, 1, S) -> (B, H, Q, K).
    The softmax is float32 whatever the inputs are.
    """
    scores = torch.matmul(q, k.transpose(-2, -1))  # (B, H, Q, S)
    if key_bias is not None:
        scores = scores + key_bias
    scores = (scores * (1.0 / math.sqrt(q.shape[-1]))).float().masked_fill(~mask, MASKED)
    weights = torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0)
    return torch.matmul(weights.to(v.dtype), v)


def rel_pos_keys(k: Tensor, p: Tensor, pos_bias_u: Tensor, pos_bias_v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys that hold their positional terms: k + p (B, H, S, K), and the bias of each key (B, H, 1, S).

    The checkpoints' scores are (q + u) k^T + (q + v) p^T. Since there is no relative shift, p has the index of the
    key, and this is q (k + p)^T + (u k^T + v p^T): ordinary attention over k + p with one bias a key (specification
    2.5). k (B, H, S, K); p (1 or B, H, S, K); pos_bias_u, pos_bias_v (H, K).
    """
    u, w = pos_bias_u.unsqueeze(-2), pos_bias_v.unsqueeze(-2)  # (H, 1, K)
    key_bias = torch.matmul(u, k.transpose(-2, -1)) + torch.matmul(w, p.transpose(-2, -1))  # (B, H, 1, S)
    return k + p, key_bias


def route(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 routing. float32 (N, E) -> (gate float32 (N,), expert_idx int64 (N,)).

    gate is the softmax probability over all experts of the chosen one; the first expert wins a tie
    (specification 2.7).
    """
    gate, expert_idx = torch.max(torch.softmax(logits.float(), dim=-1), dim=-1)
    return gate, expert_idx


def moe(x: Tensor, expert_idx: Tensor, w_1: Tensor, b_1: Tensor, w_2: Tensor, b_2: Tensor, activation: str) -> Tensor:
    """Each token through its own expert: w_2[e] act(w_1[e] x + b_1[e]) + b_2[e].

    x (N, D), expert_idx int64 (N,), w_1 (E, F, D), b_1 (E, F), w_2 (E, D, F), b_2 (E, D) -> (N, D).
    """
    if has_torch_function_unary(x):
        return handle_torch_function(moe, (x,), x, expert_idx, w_1, b_1, w_2, b_2, activation)
    order = torch.argsort(expert_idx, stable=True)
    counts = torch.bincount(expert_idx, minlength=w_1.shape[0]).tolist()
    outputs = []
    for e, tokens in enumerate(x[order].split(counts)):
        hidden = ACTIVATIONS[activation](F.linear(tokens, w_1[e], b_1[e]))  # (tokens of e, F)
        outputs.append(F.linear(hidden, w_2[e], b_2[e]))
    return torch.cat(outputs)[torch.argsort(order)]
