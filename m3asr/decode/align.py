"""Forced alignment: when were these tokens said?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ctc_alignment(log_probs: np.ndarray, sequences: Sequence[Sequence[int]], blank: int = 0) -> list[list[int]]:
    """The frame of each token on the most probable path that CTC takes through it (Viterbi; Graves et al., 2006).

    log_probs: float (S, V); sequences: token ids, any number of them at once. A token's time is the last frame of the
    stretch in which the path says it, as in `ctc_prefix_beam_search`.
    Raises ValueError for a sequence that no path says: it needs a frame a token, and one between two equal tokens.
    """
    log_probs = np.asarray(log_probs)
    labels = np.full((len(sequences), 2 * max(map(len, sequences), default=0) + 1), blank)  # (N, M)
    for row, tokens in zip(labels, sequences, strict=True):
        row[1 : 2 * len(tokens) : 2] = tokens  # blank, w1, blank, w2, blank...
    # A state is reached from itself, from the one before, and from a token to the next unless they are the same.
    skips = np.zeros(labels.shape, bool)
    skips[:, 1:2] = True
    skips[:, 2:] = (labels[:, 2:] != blank) & (labels[:, 2:] != labels[:, :-2])

    scores = np.full((len(labels), labels.shape[1] + 2), -np.inf)  # behind two states that come before the first
    scores[:, 1] = 0.0  # the beginning
    moves = np.zeros((len(log_probs), *labels.shape), np.int8)  # (S, N, M): by how many states a path went on
    for row, move in zip(log_probs, moves, strict=True):
        came = np.stack([scores[:, 2:], scores[:, 1:-1], np.where(skips, scores[:, :-2], -np.inf)])
        move[:] = came.argmax(axis=0)
        scores[:, 2:] = came.max(axis=0) + row[labels]
        scores[:, 1] = -np.inf
    return [_times(scores[n, 2:], moves[:, n], list(tokens)) for n, tokens in enumerate(sequences)]


def _times(scores: np.ndarray, moves: np.ndarray, tokens: list[int]) -> list[int]:
    """scores: (M,) at the end; moves: (S, M)."""
    if not tokens:
        return []
    state = 2 * len(tokens)
    if scores[state - 1] >= scores[state]:
        state -= 1
    if scores[state] == -np.inf:
        raise ValueError(f"{len(tokens)} tokens {tokens} cannot be said in {len(moves)} frames")
    times = [-1] * len(tokens)
    for t in range(len(moves) - 1, -1, -1):
        if state % 2 and times[state // 2] < 0:
            times[state // 2] = t
        state -= int(moves[t, state])
    return times
