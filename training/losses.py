"""What is minimised: CTC, label-smoothed attention, the embedding network's CTC, and the routers' two losses.

CTC and attention losses are sums over tokens divided by the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m3asr import ops
from m3asr.model import Model
from training import moe
from training.kernels.ctc import ctc

NAMES = ("total", "ctc", "attention", "embedding_ctc", "sparsity", "importance", "text", "consistency")


@dataclass(frozen=True)
class LossWeights:
    ctc: float = 0.3
    attention: float = 0.7
    embedding_ctc: float = 0.3
    sparsity: float = 0.02  # per layer
    importance: float = 0.1  # per layer
    text: float = 0.2  # the decoder without anything to hear
    consistency: float = 0.2  # of each CTC's own weight, where there are two views
    label_smoothing: float = 0.1


def attention(log_probs: Tensor, targets: Tensor, valid: Tensor, smoothing: float) -> Tensor:
    """Cross entropy against (1 - smoothing) on the target and smoothing spread evenly. log_probs (B, L, V)."""
    right = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    loss = -(1.0 - smoothing) * right - smoothing * log_probs.mean(dim=-1)
    return (loss * valid).sum() / valid.sum()


def sparsity(probs: Tensor, valid: Tensor) -> Tensor:
    """Mean over tokens of ||p||_1 / ||p||_2 (You et al. 2021, arXiv 2105.03036): 1 if one-hot, sqrt(E) if even.

    probs (..., B, S, E), valid bool (B, S) -> (...)."""
    ratio = 1.0 / probs.square().sum(dim=-1).sqrt()  # ||p||_1 = 1
    return (ratio * valid).sum(dim=(-2, -1)) / valid.sum()


def importance(probs: Tensor, valid: Tensor) -> Tensor:
    """E * sum over experts of (mean probability)^2 (same source): 1 if the experts are used evenly, E if one is.

    probs (..., B, S, E), valid bool (B, S) -> (...)."""
    mean = (probs * valid.unsqueeze(-1)).sum(dim=(-3, -2)) / valid.sum()
    return probs.shape[-1] * mean.square().sum(dim=-1)


def consistency(log_probs: Tensor, valid: Tensor) -> Tensor:
    """Sum over views and frames of KL(other view || view), the other one held still (CR-CTC: Yao et al. 2024, arXiv
    2410.05101). log_probs (..., 2, B, S, V), valid bool (B, S) -> (...)."""
    other = log_probs.flip(-4).detach()
    divergence = (other.exp() * (other - log_probs)).sum(dim=-1)  # (..., 2, B, S)
    return (divergence * valid).sum(dim=(-3, -2, -1))


def decoder_tokens(tokens: Tensor, token_lengths: Tensor, sos: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (B, L) -> input (B, L+1) from sos on, target (B, L+1) up to eos (= sos), valid bool (B, L+1)."""
    position = torch.arange(tokens.shape[1] + 1, device=tokens.device)
    end = token_lengths.unsqueeze(-1)
    inputs = F.pad(tokens, (1, 0), value=sos)
    targets = F.pad(tokens, (0, 1), value=0).masked_fill(position == end, sos)
    return inputs, targets, position <= end


def unheard(model: Model, tokens: Tensor, token_lengths: Tensor, smoothing: float) -> Tensor:
    """The attention loss of text alone: the decoder hears one frame of zeros and must go by the words before.

    What it knows of words then does not end with what was spoken (Meng et al. 2021, arXiv 2102.01380, train the
    decoder's own language model so, on the transcripts).
    """
    inputs, outputs, valid = decoder_tokens(tokens, token_lengths, model.config.sos)
    silence = torch.zeros(len(tokens), 1, model.config.encoder.attention_dim, device=tokens.device)
    log_probs, _ = model.decode(silence, torch.ones_like(token_lengths), inputs)
    return attention(log_probs.float(), outputs, valid, smoothing)


def batch_loss(
    model: Model,
    routing: moe.Routing,
    features: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    token_lengths: Tensor,
    weights: LossWeights,
    text: tuple[Tensor, Tensor] | None = None,
    chunk: Tensor | int = 0,
    views: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss, its parts in the order of NAMES (detached), entropy of each layer's expert load (layers,).

    text: tokens and token_lengths of lines that were never spoken, for the decoder alone. chunk: what attention sees,
    as `Model.encode` has it. views: 2 if the second half of the rows is the first half, augmented otherwise.
    """
    config, routing.probs = model.config, []
    embedding = []
    hook = model.encoder.embed.register_forward_hook(lambda module, inputs, output: embedding.append(output))
    everything_before = torch.full((), -1, device=features.device)
    hidden, out_lengths = model.encode(features, lengths, chunk, everything_before)
    hook.remove()
    # Both heads in one go: CTC walks through the frames, and its walk takes the same time for twice as many rows.
    logits = torch.cat((model.encoder.out_linear(hidden), model.encoder.embed.out_linear(embedding[0])))
    twice = [torch.cat((x, x)) for x in (tokens, out_lengths, token_lengths)]
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    count = token_lengths.sum()
    ctc_losses = ctc(log_probs, *twice).view(2, -1).sum(dim=1) / count  # (2,)
    frames = ops.frame_mask(out_lengths, hidden.shape[1])
    differences = torch.zeros_like(ctc_losses)
    if views == 2:
        log_probs = log_probs.unflatten(0, (2, 2, -1))  # (heads, views, B, S, V)
        differences = consistency(log_probs, frames[: len(frames) // 2]) / count
    ctc_loss, embedding_loss = ctc_losses
    inputs, outputs, valid = decoder_tokens(tokens, token_lengths, config.sos)
    log_probs, _ = model.decode(hidden, out_lengths, inputs)
    attention_loss = attention(log_probs.float(), outputs, valid, weights.label_smoothing)
    if routing.probs:
        probs = torch.stack(routing.probs)  # (layers, B, S, E)
        sparsity_loss, importance_loss = sparsity(probs, frames), importance(probs, frames)  # (layers,)
        entropies = moe.load_entropy(probs.detach(), frames)
    else:  # dense: nothing was routed
        sparsity_loss = importance_loss = entropies = torch.zeros(len(moe.moe_layers(model)), device=hidden.device)
    text_loss = unheard(model, *text, weights.label_smoothing) if text else torch.zeros((), device=hidden.device)
    total = (
        weights.ctc * ctc_loss
        + weights.attention * attention_loss
        + weights.embedding_ctc * embedding_loss
        + weights.sparsity * sparsity_loss.sum()
        + weights.importance * importance_loss.sum()
        + weights.text * text_loss
        + weights.consistency * (weights.ctc * differences[0] + weights.embedding_ctc * differences[1])
    )
    routing_parts = sparsity_loss.mean(), importance_loss.mean()
    parts = (total, ctc_loss, attention_loss, embedding_loss, *routing_parts, text_loss, differences[0])
    return total, torch.stack(parts).detach(), entropies
