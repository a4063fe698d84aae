"""CTC loss whose lengths stay on the device, so that a step can be captured; Graves et al. 2006, equations 6 to 15.

One program a row walks through the frames. What it needs of the frame before, at this and the two states before it,
goes through memory, which a barrier makes visible to the whole program.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

IMPOSSIBLE = -1e30


@triton.jit
def _log_add(a, b):
    high = tl.maximum(a, b)
    return high + tl.log(tl.exp(a - high) + tl.exp(b - high))


@triton.jit
def _label(tokens_ptr, state, labels):
    """Of the states blank, label 0, blank, label 1, ... blank."""
    label = tl.load(tokens_ptr + state // 2, mask=(state >= 0) & (state // 2 < labels) & (state % 2 == 1), other=0)
    return label.to(tl.int32)


@triton.jit(do_not_specialize=["frames", "labels_stride", "states_stride"])
def _alpha_kernel(
    log_probs_ptr,
    tokens_ptr,
    lengths_ptr,
    token_lengths_ptr,
    alpha_ptr,
    loss_ptr,
    frames,
    vocab,
    labels_stride,
    states_stride,
    NONE: tl.constexpr,
    STATES: tl.constexpr,
):
    """alpha[b, t, state]: logarithm of the probability of all ways to be there; loss[b] = -log p(tokens)."""
    row = tl.program_id(0).to(tl.int64)
    state = tl.arange(0, STATES)
    length, labels = tl.load(lengths_ptr + row).to(tl.int32), tl.load(token_lengths_ptr + row).to(tl.int32)
    tokens = tokens_ptr + row * labels_stride
    label, before = _label(tokens, state, labels), _label(tokens, state - 2, labels)
    real = state < 2 * labels + 1
    skips = real & (state % 2 == 1) & (state >= 2) & (label != before)
    log_probs, alpha = log_probs_ptr + row * frames * vocab, alpha_ptr + row * frames * states_stride
    here = tl.where(real & (state < 2), tl.load(log_probs + label, mask=real, other=NONE), NONE)
    tl.store(alpha + state, here, mask=real)
    for t in range(1, length):
        tl.debug_barrier()
        last = alpha + (t - 1) * states_stride + state
        emitted = tl.load(log_probs + t * vocab + label, mask=real, other=NONE)
        one = tl.load(last - 1, mask=real & (state >= 1), other=NONE)
        two = tl.load(last - 2, mask=skips, other=NONE)
        here = tl.where(real, _log_add(_log_add(here, one), two) + emitted, NONE)
        tl.store(last + states_stride, here, mask=real)
    last_two = real & (state >= 2 * labels - 1)
    high = tl.max(tl.where(last_two, here, NONE), axis=0)
    total = high + tl.log(tl.sum(tl.where(last_two, tl.exp(here - high), 0.0), axis=0))
    tl.store(loss_ptr + row, -total)


@triton.jit(do_not_specialize=["frames", "labels_stride", "states_stride"])
def _gradient_kernel(
    log_probs_ptr,
    tokens_ptr,
    lengths_ptr,
    token_lengths_ptr,
    alpha_ptr,
    beta_ptr,
    loss_ptr,
    dloss_ptr,
    gradient_ptr,
    frames,
    vocab,
    labels_stride,
    states_stride,
    NONE: tl.constexpr,
    STATES: tl.constexpr,
):
    """gradient[b, t, v] -= dloss[b] x probability that unit v is emitted at t; beta holds two frames a row."""
    row = tl.program_id(0).to(tl.int64)
    state = tl.arange(0, STATES)
    length, labels = tl.load(lengths_ptr + row).to(tl.int32), tl.load(token_lengths_ptr + row).to(tl.int32)
    tokens = tokens_ptr + row * labels_stride
    label, after = _label(tokens, state, labels), _label(tokens, state + 2, labels)
    real = state < 2 * labels + 1
    skips = (state % 2 == 1) & (state + 2 < 2 * labels + 1) & (label != after)
    log_probs, alpha = log_probs_ptr + row * frames * vocab, alpha_ptr + row * frames * states_stride
    beta, gradient = beta_ptr + row * 2 * states_stride, gradient_ptr + row * frames * vocab
    loss, dloss = tl.load(loss_ptr + row), tl.load(dloss_ptr + row)
    here = tl.where(real & (state >= 2 * labels - 1), 0.0, NONE)  # without this frame's own emission
    for back in range(length):
        t = length - 1 - back
        emitted = tl.load(log_probs + t * vocab + label, mask=real, other=NONE)
        if back > 0:
            tl.debug_barrier()
            last = beta + ((t + 1) % 2) * states_stride + state
            one = tl.load(last + 1, mask=state + 1 < 2 * labels + 1, other=NONE)
            two = tl.load(last + 2, mask=skips, other=NONE)
            here = _log_add(_log_add(tl.load(last, mask=real, other=NONE), one), two)
        tl.store(beta + (t % 2) * states_stride + state, here + emitted, mask=real)
        share = tl.exp(tl.load(alpha + t * states_stride + state, mask=real, other=NONE) + here + loss)
        tl.atomic_add(gradient + t * vocab + label, -dloss * share, mask=real & (share > 0.0))


class _Ctc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_probs, tokens, lengths, token_lengths):
        log_probs, tokens = log_probs.contiguous(), tokens.contiguous()
        rows, frames, vocab = log_probs.shape
        labels = tokens.shape[1]
        states = 2 * labels + 1
        alpha = torch.empty(rows, frames, states, device=log_probs.device)
        loss = torch.empty(rows, device=log_probs.device)
        sizes = (frames, vocab, labels, states, IMPOSSIBLE, triton.next_power_of_2(states))
        _alpha_kernel[(rows,)](log_probs, tokens, lengths, token_lengths, alpha, loss, *sizes)
        impossible = loss > -0.1 * IMPOSSIBLE
        ctx.save_for_backward(log_probs, tokens, lengths, token_lengths, alpha, loss, impossible)
        ctx.sizes = sizes
        return loss.masked_fill(impossible, 0.0)

    @staticmethod
    def backward(ctx, dloss):
        log_probs, tokens, lengths, token_lengths, alpha, loss, impossible = ctx.saved_tensors
        rows, states = len(loss), alpha.shape[-1]
        beta = torch.empty(rows, 2, states, device=loss.device)
        gradient = torch.zeros_like(log_probs)
        dloss, loss = dloss.masked_fill(impossible, 0.0).contiguous(), loss.masked_fill(impossible, 0.0)
        _gradient_kernel[(rows,)](
            log_probs, tokens, lengths, token_lengths, alpha, beta, loss, dloss, gradient, *ctx.sizes
        )
        return gradient, None, None, None


def ctc(log_probs: Tensor, tokens: Tensor, lengths: Tensor, token_lengths: Tensor) -> Tensor:
    """-log p(tokens) of each row, blank 0; a row that is too short for its tokens counts 0. -> float32 (B,).

    log_probs float32 (B, S, V), tokens int64 (B, L), lengths and token_lengths ints (B,).
    """
    if log_probs.is_cuda:
        return _Ctc.apply(log_probs, tokens, lengths.int(), token_lengths.int())
    return F.ctc_loss(
        log_probs.transpose(0, 1), tokens, lengths.long(), token_lengths, reduction="none", zero_infinity=True
    )
