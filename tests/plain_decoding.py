"""What decoding must give, in its plainest form: all alignments, all sequences, models that are tables."""

import itertools
import math
from collections import defaultdict

import numpy as np


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def random_log_probs(rng, frames, vocab, scale=2.0, blank_bias=1.0):
    logits = rng.standard_normal((frames, vocab)) * scale
    logits[:, 0] += blank_bias
    return log_softmax(logits).astype(np.float32)


def collapse(path, blank=0):
    return tuple(token for token, _ in itertools.groupby(path) if token != blank)


def every_sequence(log_probs):
    """{tokens: log-probability}, by summing over every alignment; those of probability zero left out."""
    frames, vocab = log_probs.shape
    totals = defaultdict(list)
    for path in itertools.product(range(vocab), repeat=frames):
        totals[collapse(path)].append(sum(float(log_probs[t, token]) for t, token in enumerate(path)))
    summed = {tokens: np.logaddexp.reduce(scores) for tokens, scores in totals.items()}
    return {tokens: score for tokens, score in summed.items() if score > -math.inf}


def ctc_forward(log_probs, tokens, blank=0):
    """Log-probability of one sequence over all its alignments (Graves et al., 2006), state by state."""
    states = [blank]
    for token in tokens:
        states += [token, blank]
    alpha = [float(log_probs[0][symbol]) if m < 2 else -math.inf for m, symbol in enumerate(states)]
    for row in log_probs[1:]:
        new = []
        for m, symbol in enumerate(states):
            before = alpha[max(m - 1, 0) : m + 1]
            if m > 1 and symbol not in (blank, states[m - 2]):
                before = alpha[m - 2 : m + 1]
            new.append(np.logaddexp.reduce(before) + float(row[symbol]))
        alpha = new
    return float(np.logaddexp.reduce(alpha[-2:]))


def phrase_bonus(phrases, scores, tokens, original=False):
    """What ContextGraph promises, by counting: n * score for each complete phrase."""
    return sum(
        len(phrase) * score
        for phrase, score in zip(phrases, scores, strict=True)
        for at in range(len(tokens))
        if tokens[at : at + len(phrase)] == phrase
    )


class Bigrams:
    """A language model of two tokens' memory, as a table."""

    def __init__(self, table):
        self.table = table  # (V, V): row 0 starts, column 0 ends a sequence

    def start(self):
        return 0

    def step(self, state, token):
        return float(self.table[state, token]), token

    def finish(self, state):
        return float(self.table[state, 0])

    def max_gain(self, state):
        return float(self.table[state].max())

    def total(self, tokens):
        states = [0, *tokens, 0]
        return sum(float(self.table[a, b]) for a, b in itertools.pairwise(states))


SOS, EOS, VOCAB = 4, 4, 5


class ToyDecoder:
    """Log-probabilities that depend on the previous two tokens, the position and the frames."""

    def __init__(self, seed=0, two_ways=True):
        rng = np.random.default_rng(seed)
        self.table = rng.standard_normal((2, VOCAB, VOCAB, VOCAB)) * 2
        self.place = rng.standard_normal((2, 16, VOCAB))
        self.two_ways = two_ways

    def run(self, direction, hidden, tokens):
        before = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1]], axis=1)
        logits = self.table[direction][before, tokens] + self.place[direction][: tokens.shape[1]]
        return log_softmax(logits + hidden.sum())

    def __call__(self, hidden, hidden_length, tokens, *, reversed_tokens=None):
        assert hidden.shape[:2] == (1, hidden_length[0])
        assert tokens.dtype == np.int64 and (tokens[:, 0] == SOS).all()
        for row, back in zip(tokens, tokens if reversed_tokens is None else reversed_tokens, strict=True):
            said = row[row != EOS]  # sos is eos here, and nobody says it
            padding = [EOS] * (len(row) - 1 - len(said))
            assert row.tolist() == [SOS, *said, *padding]
            assert reversed_tokens is None or back.tolist() == [SOS, *said[::-1], *padding]
        right = self.run(1, hidden, reversed_tokens) if self.two_ways and reversed_tokens is not None else None
        return self.run(0, hidden, tokens), right

    def log_prob(self, direction, hidden, tokens):
        rows = self.run(direction, hidden, np.array([[SOS, *tokens]]))[0]
        return [float(row[token]) for row, token in zip(rows, [*tokens, EOS], strict=True)]
