"""Joint CTC/attention decoding: a search that both have a say in at every token.

Watanabe et al., "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition" (2017), and Hori et al., "Joint
CTC/attention decoding for end-to-end speech recognition" (2017): a beam search token by token, like that of attention
alone, whose hypotheses are ranked by attention and by the probability of all that CTC could say beginning with them.
Rescoring can only choose from what CTC found; here attention finds words that CTC alone would not. CTC keeps it from
ending early and from going round in circles, so lengths need no correction.

Three things make it cheap. The n-best list of the first pass is scored first, as in rescoring: a beginning that can no
longer become better than the best of it is given up, because no score ever rises but those of context and language
model. So is one far below the best of its length. And the decoder is asked ahead: a new beginning is continued by
what the first pass heard after it, and while the search goes on as guessed, the answers are there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from m3asr.decode.align import ctc_alignment
from m3asr.decode.attention import AttentionDecoder, attended, log_probs_of, padded, rescored
from m3asr.decode.biasing import ContextGraph
from m3asr.decode.ctc import NEVER, Scorer, joined_scorer, most_probable, penalise_blank
from m3asr.decode.hypothesis import DecodeResult, Hypothesis

MARGIN = 4.0  # a hypothesis so far below the best of its length does not come back; wider changes next to nothing
GUESS = 32  # tokens guessed ahead: more are rarely all right, and the decoder's work grows with them
LEAST = -1000.0  # log-probabilities below are taken for this, so that differences of sums stay finite

Prefix = tuple[int, ...]


@dataclass
class _Beam:
    """A beginning of a sentence."""

    tokens: Prefix
    steps: tuple[float, ...]  # log-probability of each token under the attention decoder
    attention: float  # their sum
    ctc: float  # log-probability of all sentences that begin so, under CTC
    in_token: np.ndarray  # (S + 1,) log-probability that the tokens are said in the first t frames, the last just now
    in_blank: np.ndarray  # (S + 1,) the same, a blank behind it
    bonus: float = 0.0  # of context and language model
    state: Any = None  # theirs


def joint_search(
    ctc_results: Sequence[DecodeResult],
    log_probs: np.ndarray,
    decoder: AttentionDecoder,
    hidden: np.ndarray,
    lengths: np.ndarray,
    beam_size: int = 10,
    ctc_weight: float = 0.5,
    reverse_weight: float = 0.0,
    *,
    sos: int,
    eos: int,
    blank: int = 0,
    blank_penalty: float = 0.0,
    context: ContextGraph | None = None,
    lm: Scorer | None = None,
    margin: float = MARGIN,
) -> list[DecodeResult]:
    """Beam search with CTC and the attention decoder together, from the results of `ctc_prefix_beam_search`.

    log_probs: float (B, S, V); hidden: float32 (B, S, D); lengths: int (B,). `blank_penalty`, `context` and `lm` are
    those of the first pass. score = attention + ctc_weight * (ctc + context + lm), as in `attention_rescoring`;
    confidences as there. reverse_weight ranks the hypotheses found once more, with the right-to-left decoder. Each
    hypothesis of the beam goes on by its `beam_size` most probable tokens, and is given up `margin` below the best.
    Of the n-best list, only the first is searched for; the others are what was met on the way. An utterance without
    frames keeps its first-pass result.
    Raises ModelError if reverse_weight is above 0 and the model has no right-to-left decoder, NotANumber for NaN from
    the decoder, ValueError for a context in the original's mode.
    """
    if context is not None and context.original:
        raise ValueError("a context graph in the original's mode is for the prefix beam search alone")
    log_probs = penalise_blank(np.asarray(log_probs), blank_penalty, blank)
    scorer = joined_scorer(context, lm)
    results = []
    for b, (result, length) in enumerate(zip(ctc_results, np.asarray(lengths).tolist(), strict=True)):
        if length == 0:
            results.append(result)
            continue
        memory = np.asarray(hidden[b : b + 1, :length])
        search = _JointSearch(
            log_probs[b, :length], decoder, memory, beam_size, ctc_weight, margin, sos, eos, blank, scorer
        )
        search.run(result.nbest)
        result = DecodeResult(search.best(beam_size))
        if reverse_weight > 0:
            before = [replace(h, score=search.without_attention[tuple(h.tokens)]) for h in result.nbest]
            result = rescored(before, decoder, memory, ctc_weight, reverse_weight, sos, eos)
        results.append(result)
    return results


class _JointSearch:
    """The search of one utterance."""

    def __init__(self, log_probs, decoder, memory, beam_size, ctc_weight, margin, sos, eos, blank, scorer):
        self.ctc = _PrefixScores(log_probs, blank)
        self.next = _NextTokens(decoder, memory, sos, eos, blank, beam_size)
        self.beam_size, self.weight, self.margin, self.scorer = beam_size, ctc_weight, margin, scorer
        self.found: dict[Prefix, Hypothesis] = {}  # complete ones, `score` that of all together
        self.without_attention: dict[Prefix, float] = {}
        self.highest = NEVER  # score among them
        self.rise = 0.0  # what context and language model may still add to a beginning

    def run(self, nbest: Sequence[Hypothesis]) -> None:
        answers = self.next.ask([tuple(hypothesis.tokens) for hypothesis in nbest])
        for hypothesis, steps in zip(nbest, answers, strict=True):
            self._complete(hypothesis, steps)
        if self.scorer is not None:
            self.rise = max(_largest_rise(self.scorer, hypothesis) for hypothesis in nbest)
        guide = max(self.found.values(), key=lambda hypothesis: hypothesis.score)
        beams = [_Beam((), (), 0.0, 0.0, *self.ctc.start(), state=self.scorer.start() if self.scorer else None)]
        while beams:
            unknown = [beam for beam in beams if not self.next.knows(beam.tokens)]
            self.next.ask([beam.tokens + _rest(guide, beam) for beam in unknown])
            for beam in beams:
                self._end(beam)
            beams = self._longer(beams)

    def best(self, count: int) -> list[Hypothesis]:
        """Complete hypotheses, best first, with their times."""
        nbest = sorted(self.found.values(), key=lambda hypothesis: -hypothesis.score)[:count]
        untimed = [hypothesis.tokens for hypothesis in nbest if hypothesis.times is None]
        times = iter(ctc_alignment(self.ctc.log_probs.T, untimed, self.ctc.blank) if untimed else ())
        return [h if h.times is not None else replace(h, times=next(times)) for h in nbest]

    def _complete(self, hypothesis: Hypothesis, steps: np.ndarray) -> None:
        """hypothesis.score: without attention; steps: log-probabilities of its tokens and eos under attention."""
        complete = attended(hypothesis, float(steps.sum()), np.exp(steps[:-1]).tolist(), self.weight)
        key = tuple(complete.tokens)
        if key not in self.found or complete.score > self.found[key].score:
            self.found[key] = complete
            self.without_attention[key] = hypothesis.score
            self.highest = max(self.highest, complete.score)

    def _end(self, beam: _Beam) -> None:
        """Count the beam as a complete sentence."""
        ctc = float(np.logaddexp(beam.in_token[-1], beam.in_blank[-1]))
        if ctc == NEVER:
            return
        before = self.found.get(beam.tokens)
        bonus = beam.bonus + (self.scorer.finish(beam.state) if self.scorer else 0.0)
        times = before.times if before is not None else None
        hypothesis = Hypothesis(list(beam.tokens), ctc + bonus, times=times, ctc_score=ctc)
        self._complete(hypothesis, np.array([*beam.steps, self.next.end(beam.tokens)]))

    def _longer(self, beams: list[_Beam]) -> list[_Beam]:
        """The best beams with a token more; none if no sentence that begins so can be the best."""
        floor = self.highest - self.weight * self.rise
        tokens, steps = (np.stack(arrays) for arrays in zip(*(self.next.after(b.tokens) for b in beams), strict=True))
        attention = np.array([beam.attention for beam in beams])[:, None] + steps  # (N, K)
        before = np.array([beam.ctc + beam.bonus for beam in beams])[:, None]
        rows, columns = np.nonzero(attention + self.weight * before > floor)  # (C,)
        if not len(rows):
            return []
        tokens, steps, attention = tokens[rows, columns], steps[rows, columns], attention[rows, columns]
        ctc, reached = self.ctc.extend(beams, rows, tokens)
        bonuses, states = [0.0] * len(rows), [None] * len(rows)
        if self.scorer is not None:
            for i, (row, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
                gain, states[i] = self.scorer.step(beams[row].state, token)
                bonuses[i] = beams[row].bonus + gain
        # What CTC cannot say is out, even where its weight is 0.
        scores = np.where(ctc > NEVER, attention + self.weight * (np.maximum(ctc, -1e30) + bonuses), NEVER)
        order = np.argsort(-scores, kind="stable")[: self.beam_size]
        order = order[(scores[order] > floor) & (scores[order] >= scores[order[0]] - self.margin)]
        in_token, in_blank = self.ctc.forward(tokens[order], reached[order])
        longer = []
        for i, token_ends, blank_ends in zip(order.tolist(), in_token, in_blank, strict=True):
            old, token, step = beams[rows[i]], int(tokens[i]), float(steps[i])
            longer.append(
                _Beam(
                    (*old.tokens, token),
                    (*old.steps, step),
                    old.attention + step,
                    float(ctc[i]),
                    token_ends,
                    blank_ends,
                    bonuses[i],
                    states[i],
                )
            )
        return longer


class _PrefixScores:
    """CTC's forward variables and prefix probabilities (Graves, 2008), for many hypotheses over all frames at once.

    A token's variable obeys a(t) = (a(t-1) + reached(t-1)) * p(t); divided by the product of the p up to t it is a
    running sum, which numpy computes without a loop over frames.
    """

    def __init__(self, log_probs: np.ndarray, blank: int):
        self.log_probs = np.maximum(log_probs.astype(np.float64), LEAST).T.copy()  # (V, S)
        self._sums = np.zeros((len(self.log_probs), self.log_probs.shape[1] + 1))
        np.cumsum(self.log_probs, axis=1, out=self._sums[:, 1:])  # (V, S + 1)
        self.blank = blank

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        """`_Beam.in_token` and `in_blank` of nothing said yet."""
        blanks = self._sums[self.blank]
        return np.full_like(blanks, NEVER), blanks

    def extend(self, beams: list[_Beam], rows: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Beam rows[c] with tokens[c] behind it -> prefix log-probabilities (C,), and the log-probability of where a
        new token may begin, after each frame but the last (C, S).
        """
        in_blank = np.stack([beam.in_blank[:-1] for beam in beams])  # (N, S)
        either = np.logaddexp(np.stack([beam.in_token[:-1] for beam in beams]), in_blank)
        last = np.array([beam.tokens[-1] if beam.tokens else -1 for beam in beams])
        # The same token again needs a blank in between.
        reached = np.where((tokens == last[rows])[:, None], in_blank[rows], either[rows])
        begins = reached + self.log_probs[tokens]  # in each frame
        highest = begins.max(axis=1)
        sums = np.exp(begins - np.where(highest > NEVER, highest, 0.0)[:, None]).sum(axis=1)
        return highest + np.log(np.maximum(sums, 1e-300)), reached

    def forward(self, tokens: np.ndarray, reached: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`_Beam.in_token` and `in_blank`, (C, S + 1) each, after the tokens (C,); `reached` from `extend`."""
        in_token = _driven(reached, self._sums[tokens])
        return in_token, _driven(in_token[:, :-1], np.broadcast_to(self._sums[self.blank], in_token.shape))


def _driven(inflow: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """(C, S + 1): log of a(0) = 0, a(t) = (a(t-1) + inflow(t-1)) * p(t), from log inflow (C, S) and sums of log p."""
    out = np.full(sums.shape, NEVER)
    out[:, 1:] = sums[:, 1:] + np.logaddexp.accumulate(inflow - sums[:, :-1], axis=1)
    return out


class _NextTokens:
    """What the attention decoder says may follow each beginning: each asked once."""

    def __init__(self, decoder: AttentionDecoder, memory: np.ndarray, sos: int, eos: int, blank: int, count: int):
        self._decoder, self._memory, self._sos, self._eos, self._blank = decoder, memory, sos, eos, blank
        self._count = count
        self._known: dict[Prefix, tuple[np.ndarray, np.ndarray, float]] = {}

    def knows(self, prefix: Prefix) -> bool:
        return prefix in self._known

    def after(self, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        """The most probable next tokens (K,) with their log-probabilities (K,), best first; no eos."""
        return self._known[prefix][:2]

    def end(self, prefix: Prefix) -> float:
        """The log-probability of eos."""
        return self._known[prefix][2]

    def ask(self, sentences: Sequence[Prefix]) -> list[np.ndarray]:
        """Log-probabilities of each sentence's tokens and eos; what may follow all their beginnings is known then."""
        if not sentences:
            return []
        tokens = padded(sentences, self._sos, self._eos)  # (N, L)
        log_probs, _ = self._decoder(self._memory, np.array([self._memory.shape[1]]), tokens)
        steps = log_probs_of(log_probs, tokens, self._eos)
        new, prefixes = [], []
        for n, sentence in enumerate(sentences):
            for size in range(len(sentence), -1, -1):
                prefix = sentence[:size]
                if prefix in self._known:
                    break  # so are all before it
                self._known[prefix] = ()
                new.append((n, size))
                prefixes.append(prefix)
        if new:
            rows = np.asarray(log_probs)[tuple(np.array(new).T)].astype(np.float64)  # (R, V)
            ends = rows[:, self._eos].tolist()
            rows[:, [self._sos, self._eos, self._blank]] = NEVER
            values, symbols = most_probable(rows, self._count)
            self._known.update(zip(prefixes, zip(symbols, values, ends, strict=True), strict=True))
        return [row[: len(sentence) + 1] for row, sentence in zip(steps, sentences, strict=True)]


def _rest(guide: Hypothesis, beam: _Beam) -> Prefix:
    """What the guide says next, after the frame in which the beam's tokens most probably end."""
    end = int(beam.in_token.argmax()) if beam.tokens else 0
    return tuple(token for token, time in zip(guide.tokens, guide.times, strict=True) if time >= end)[:GUESS]


def _largest_rise(scorer: Scorer, hypothesis: Hypothesis) -> float:
    """By how much the scorer's total rose from any place in the hypothesis to its end."""
    state, total, lowest = scorer.start(), 0.0, 0.0
    for token in hypothesis.tokens:
        gain, state = scorer.step(state, token)
        total += gain
        lowest = min(lowest, total)
    return max(total + scorer.finish(state) - lowest, 0.0)
