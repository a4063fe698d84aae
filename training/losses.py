"""What is minimised: CTC, label-smoothed attention, the embedding network's CTC, and the routers' two losses.

CTC and attention losses are sums over tokens divided by the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LossWeights:
    ctc: float = 0.3
    attention: float = 0.7
    embedding_ctc: float = 0.3
    sparsity: float = 0.05  # per layer
    importance: float = 0.1  # per layer
    label_smoothing: float = 0.1


def ctc(log_probs: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
    """log_probs (B, S, V); lengths on the host, so that the device is not waited for. An impossible row counts 0."""
    total = F.ctc_loss(
        log_probs.transpose(0, 1), tokens, lengths, token_lengths, blank=0, reduction="sum", zero_infinity=True
    )
    return total / token_lengths.sum()


def attention(log_probs: Tensor, targets: Tensor, valid: Tensor, smoothing: float) -> Tensor:
    """Cross entropy against (1 - smoothing) on the target and smoothing spread evenly. log_probs (B, L, V)."""
    right = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    loss = -(1.0 - smoothing) * right - smoothing * log_probs.mean(dim=-1)
    return (loss * valid).sum() / valid.sum()


def sparsity(probs: Tensor, valid: Tensor) -> Tensor:
    """Mean over tokens of ||p||_1 / ||p||_2 (You et al. 2021, arXiv 2105.03036): 1 if one-hot, sqrt(E) if even."""
    ratio = 1.0 / probs.square().sum(dim=-1).sqrt()  # ||p||_1 = 1
    return (ratio * valid).sum() / valid.sum()


def importance(probs: Tensor, valid: Tensor) -> Tensor:
    """E * sum over experts of (mean probability)^2 (same source): 1 if the experts are used evenly, E if one is."""
    mean = (probs * valid.unsqueeze(-1)).sum(dim=(0, 1)) / valid.sum()
    return probs.shape[-1] * mean.square().sum()


def decoder_tokens(tokens: Tensor, token_lengths: Tensor, sos: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (B, L) -> input (B, L+1) from sos on, target (B, L+1) up to eos (= sos), valid bool (B, L+1)."""
    position = torch.arange(tokens.shape[1] + 1, device=tokens.device)
    end = token_lengths.unsqueeze(-1)
    inputs = F.pad(tokens, (1, 0), value=sos)
    targets = F.pad(tokens, (0, 1), value=0).masked_fill(position == end, sos)
    return inputs, targets, position <= end
