"""Decoding with the attention decoder: rescoring of CTC's n-best list, and beam search without CTC.

Nothing here knows the network: it is a callable on numpy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from m3asr.decode.ctc import most_probable
from m3asr.decode.hypothesis import DecodeResult, Hypothesis
from m3asr.errors import ModelError, NotANumber


class AttentionDecoder(Protocol):
    """The network alone. Everything is prepared here: sos prepended, hypotheses reversed and padded."""

    def __call__(
        self,
        hidden: np.ndarray,
        hidden_length: np.ndarray,
        tokens: np.ndarray,
        *,
        reversed_tokens: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Log-probabilities of the token after each position.

        hidden: float32 (1, S, D), the encoder's output of ONE utterance, cut to its length; hidden_length: int64 (1,).
        tokens: int64 (N, L), each row [sos, w1..wn, eos, eos...]. reversed_tokens: int64 (N, L), each row [sos, wn..w1,
        eos, eos...], None where nobody wants to know what comes of it.
        Returns log-probabilities float (N, L, V), and the same of `reversed_tokens` from the right-to-left decoder,
        None if the model has none. The decoder sees no later token than its own, so padding needs no mask; what comes
        of it does not matter.
        """


def attention_rescoring(
    ctc_results: Sequence[DecodeResult],
    decoder: AttentionDecoder,
    hidden: np.ndarray,
    lengths: np.ndarray,
    ctc_weight: float = 0.5,
    reverse_weight: float = 0.0,
    *,
    sos: int,
    eos: int,
) -> list[DecodeResult]:
    """Rank the n-best lists of `ctc_prefix_beam_search` again (specification 3.2, 3.3).

    hidden: float32 (B, S, D); lengths: int (B,).
    attention = (1 - reverse_weight) * left_to_right + reverse_weight * right_to_left, each the log-probability of the
    tokens and eos; score = attention + ctc_weight * (score of the first pass, context and language model included).
    Of equal scores the better of the first pass comes first. confidence = exp(attention / (tokens + 1)), a token's is
    its probability, averaged over the two directions. An utterance without frames keeps its first-pass result.
    Raises ModelError if reverse_weight is above 0 and the model has no right-to-left decoder, NotANumber for NaN.
    """
    results = []
    for b, (result, length) in enumerate(zip(ctc_results, np.asarray(lengths).tolist(), strict=True)):
        if length == 0:
            results.append(result)
            continue
        memory = np.asarray(hidden[b : b + 1, :length])
        results.append(rescored(result.nbest, decoder, memory, ctc_weight, reverse_weight, sos, eos))
    return results


def rescored(
    nbest: Sequence[Hypothesis],
    decoder: AttentionDecoder,
    hidden: np.ndarray,
    ctc_weight: float,
    reverse_weight: float,
    sos: int,
    eos: int,
) -> DecodeResult:
    """`attention_rescoring` of one utterance: hidden (1, S, D)."""
    sequences = [hypothesis.tokens for hypothesis in nbest]
    counts = np.array([len(tokens) for tokens in sequences])
    tokens = padded(sequences, sos, eos)  # (N, L)
    backwards = padded([tokens[::-1] for tokens in sequences], sos, eos)
    length = np.array([hidden.shape[1]])
    forward, backward = decoder(hidden, length, tokens, reversed_tokens=backwards)  # (N, L, V)

    steps = log_probs_of(forward, tokens, eos)  # (N, L): of w1..wn, eos, then what is to be ignored
    real = np.arange(tokens.shape[1]) <= counts[:, None]
    attention = np.where(real, steps, 0.0).sum(axis=-1)
    confidences = np.exp(steps)
    if reverse_weight > 0:
        if backward is None:
            raise ModelError(
                f"reverse_weight is {reverse_weight}, but this model has no right-to-left decoder; set it to 0"
            )
        steps = log_probs_of(backward, backwards, eos)  # of wn..w1, eos
        reverse = np.where(real, steps, 0.0).sum(axis=-1)
        attention = (1 - reverse_weight) * attention + reverse_weight * reverse
        for row, count in enumerate(counts):
            confidences[row, :count] = (confidences[row, :count] + np.exp(steps[row, :count][::-1])) / 2

    nbest = [
        attended(hypothesis, attention[n], confidences[n, : counts[n]].tolist(), ctc_weight)
        for n, hypothesis in enumerate(nbest)
    ]
    return DecodeResult(sorted(nbest, key=lambda hypothesis: -hypothesis.score))


def attended(hypothesis: Hypothesis, attention: float, tokens_confidence: list[float], ctc_weight: float) -> Hypothesis:
    """A hypothesis of the first pass, its score so far included, under the attention decoder as well.

    Raises NotANumber.
    """
    if np.isnan(attention):
        raise NotANumber
    return replace(
        hypothesis,
        score=float(attention + ctc_weight * hypothesis.score),
        confidence=float(np.exp(attention / (len(hypothesis.tokens) + 1))),
        tokens_confidence=tokens_confidence,
        attention_score=float(attention),
    )


def attention_search(
    decoder: AttentionDecoder,
    hidden: np.ndarray,
    length: int,
    beam_size: int = 10,
    *,
    sos: int,
    eos: int,
    length_penalty: float = 0.0,
) -> DecodeResult:
    """Beam search of one utterance with the attention decoder alone (specification 3.3, mode `attention`).

    hidden: float32 (S, D) or (1, S, D); length: its frames that count. A hypothesis has at most as many tokens as
    there are frames. Ranked by score / tokens ** length_penalty, an empty hypothesis counted as one token; `score` is
    the value ranked by. Without a cache of the decoder's keys: the cost grows with the square of the tokens.
    confidence as in `attention_rescoring`, without the eos where none was reached. Raises NotANumber for NaN.
    """
    hidden = np.asarray(hidden).reshape(1, -1, np.shape(hidden)[-1])[:, :length]
    running: list[tuple[float, list[int], list[float]]] = [(0.0, [], [])]  # (score, tokens, log_probs)
    for _ in range(length):
        alive = [beam for beam in running if not _ended(beam, eos)]
        if not alive:
            break
        tokens = padded([beam[1] for beam in alive], sos, eos)
        log_probs, _ = decoder(hidden, np.array([length]), tokens)
        values, symbols = most_probable(np.asarray(log_probs)[:, -1], beam_size)
        if np.isnan(values).any():
            raise NotANumber
        steps = zip(values.tolist(), symbols.tolist(), strict=True)
        candidates = []
        for beam in running:  # in the order of the beam, because ties go to the better-ranked
            if _ended(beam, eos):
                candidates.append(beam)
                continue
            for p, token in zip(*next(steps), strict=True):
                candidates.append((beam[0] + p, [*beam[1], token], [*beam[2], p]))
        running = sorted(candidates, key=lambda beam: -beam[0])[:beam_size]

    nbest = []
    for score, tokens, log_probs in running:
        count = len(tokens) - (1 if _ended((score, tokens, log_probs), eos) else 0)
        confidence = float(np.exp(score / len(tokens))) if tokens else 1.0
        tokens_confidence = np.exp(log_probs[:count]).tolist()
        ranked_by = score / max(count, 1) ** length_penalty
        nbest.append(Hypothesis(tokens[:count], ranked_by, confidence, tokens_confidence, attention_score=score))
    return DecodeResult(sorted(nbest, key=lambda hypothesis: -hypothesis.score))


def _ended(beam: tuple, eos: int) -> bool:
    return bool(beam[1]) and beam[1][-1] == eos


def padded(sequences: Sequence[Sequence[int]], sos: int, eos: int) -> np.ndarray:
    """[sos, w1..wn, eos...] int64 (N, L)."""
    rows = np.full((len(sequences), 1 + max(map(len, sequences))), eos, np.int64)
    rows[:, 0] = sos
    for row, tokens in zip(rows, sequences, strict=True):
        row[1 : 1 + len(tokens)] = tokens
    return rows


def log_probs_of(log_probs: np.ndarray, tokens: np.ndarray, eos: int) -> np.ndarray:
    """float64 (N, L): log-probability, at each position of `tokens`, of the token that follows it."""
    following = np.concatenate([tokens[:, 1:], np.full_like(tokens[:, :1], eos)], axis=1)
    return np.take_along_axis(np.asarray(log_probs), following[..., None], axis=-1)[..., 0].astype(np.float64)
