"""CTC decoding of an engine's log-probabilities: greedy search and prefix beam search.

The beam search follows Hannun et al., "First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional
Recurrent DNNs" (2014), pruned as 3M-ASR and WeNet prune it: in each frame the `beam_size` most probable symbols extend
the `beam_size` best prefixes. The result is theirs; only candidates that cannot enter the beam are left unevaluated.
"""

from __future__ import annotations

import heapq
import math
from operator import itemgetter
from typing import Any, Protocol

import numpy as np

from m3asr.decode.biasing import ContextGraph
from m3asr.decode.hypothesis import DecodeResult, Hypothesis
from m3asr.errors import NotANumber

NEVER = -math.inf  # log-probability of what cannot be


class Scorer(Protocol):
    """A score that depends on the token sequence alone, added once for every appended token: a language model."""

    def start(self) -> Any:
        """State of the empty sequence."""

    def step(self, state: Any, token: int) -> tuple[float, Any]:
        """Score of appending `token`, and the state after it."""

    def finish(self, state: Any) -> float:
        """Score added where the utterance ends."""

    def max_gain(self, state: Any) -> float:
        """No `step` from `state` scores more than this; the tighter, the faster the search."""


def ctc_greedy_search(
    log_probs: np.ndarray, lengths: np.ndarray, blank: int = 0, blank_penalty: float = 0.0
) -> list[DecodeResult]:
    """The most probable symbol of each frame, repeats merged, blanks dropped (specification 3.2).

    log_probs: float (B, S, V), normalised; lengths: int (B,), frames past an utterance's length are not looked at.
    A token's time is its most probable frame, its confidence the probability there. `score` and `ctc_score` are the
    log-probability of the path. For `blank_penalty` and `confidence` see `ctc_prefix_beam_search`.
    Raises ValueError for wrong shapes, and NotANumber for NaN.
    """
    log_probs, lengths = _checked(log_probs, lengths)
    log_probs = penalise_blank(log_probs, blank_penalty, blank)
    symbols = log_probs.argmax(axis=-1)  # (B, S)
    peaks = np.take_along_axis(log_probs, symbols[..., None], axis=-1)[..., 0]  # (B, S)
    return ctc_best_path(symbols, peaks, lengths, blank)


def ctc_best_path(symbols: np.ndarray, peaks: np.ndarray, lengths: np.ndarray, blank: int = 0) -> list[DecodeResult]:
    """`ctc_greedy_search` from the most probable symbol of each frame, int (B, S), and its log-probability, float
    (B, S), as an engine finds them that keeps the others to itself. Raises ValueError for NaN.
    """
    size, peaks = symbols.shape[1], peaks.astype(np.float64)
    if size == 0:
        return [_empty_result(0.0, 0) for _ in lengths]
    inside = np.arange(size) < lengths[:, None]
    symbols = np.where(inside, symbols, blank)
    peaks = np.where(inside, peaks, 0.0)
    if np.isnan(peaks).any():
        raise NotANumber

    starts = np.ones_like(inside)
    starts[:, 1:] = symbols[:, 1:] != symbols[:, :-1]
    run = starts.cumsum()  # (B * S,): number of the run of equal symbols that a frame belongs to, of the whole batch
    all_symbols, all_peaks = symbols.ravel(), peaks.ravel()
    frames = np.flatnonzero(all_symbols != blank)
    frames = frames[np.lexsort((-all_peaks[frames], run[frames]))]  # by run, the most probable frame first
    frames = frames[np.diff(run[frames], prepend=-1) != 0]
    tokens, times = all_symbols[frames].tolist(), (frames % size).tolist()
    log_peaks = all_peaks[frames].tolist()
    bounds = np.searchsorted(frames, np.arange(len(lengths) + 1) * size).tolist()
    results = []
    for b, (score, length) in enumerate(zip(peaks.sum(axis=-1).tolist(), lengths.tolist(), strict=True)):
        mine = slice(bounds[b], bounds[b + 1])
        confidence, tokens_confidence = _confidences(log_peaks[mine], score, length)
        results.append(
            DecodeResult([Hypothesis(tokens[mine], score, confidence, tokens_confidence, times[mine], ctc_score=score)])
        )
    return results


def ctc_prefix_beam_search(
    log_probs: np.ndarray,
    lengths: np.ndarray,
    beam_size: int = 10,
    blank: int = 0,
    blank_penalty: float = 0.0,
    context: ContextGraph | None = None,
    lm: Scorer | None = None,
) -> list[DecodeResult]:
    """Token sequences by their total probability over all alignments, the best `beam_size` of each utterance.

    log_probs: float (B, S, V), normalised; lengths: int (B,), frames past an utterance's length are not looked at.
    blank_penalty: subtracted from the blank's logit before normalisation; above 0 it makes deletions rarer.
    context: phrases to favour; lm: a language model, see `NgramLM`. Both add to `score`, not to `ctc_score`.

    `times` are those of the Viterbi path as WeNet tracks it (specification 3.3): the frame where a token was appended,
    moved to the latest frame in which it was repeated. A token's confidence is its probability in that frame, the
    hypothesis's is their geometric mean; without tokens, the mean probability per frame of saying nothing.
    Raises ValueError for wrong shapes, NaN, or a frame in which every symbol has probability zero.
    """
    log_probs, lengths = _checked(log_probs, lengths)
    results = []
    for utterance, length in zip(log_probs, lengths.tolist(), strict=True):
        search = PrefixBeamSearch(beam_size, blank, blank_penalty, context, lm)
        search.accept(utterance[:length])
        results.append(search.result())
    return results


class PrefixBeamSearch:
    """Prefix beam search of one utterance that takes its frames in pieces; see `ctc_prefix_beam_search`.

    A beam is a tuple (node, last token, s, ns, score, v_s, v_ns, times_s, times_ns, bonus, state):
    node in the tree of prefixes; log-probability of ending in a blank (s), in a token (ns), of both (score); the same
    of the single best path (v_s, v_ns) with the times of its tokens as linked tuples (before, frame, log-probability);
    what context and language model have added, and their state.
    """

    def __init__(
        self,
        beam_size: int = 10,
        blank: int = 0,
        blank_penalty: float = 0.0,
        context: ContextGraph | None = None,
        lm: Scorer | None = None,
    ):
        if beam_size < 1:
            raise ValueError(f"beam_size must be at least 1, got {beam_size}")
        if context is not None and context.original and lm is not None:
            raise ValueError("a context graph in the original's mode does not combine with a language model")
        self.beam_size, self.blank, self.blank_penalty, self.context = beam_size, blank, blank_penalty, context
        self._scorer = joined_scorer(context, lm)
        self.frames = 0
        # The tree of prefixes. One number per prefix, also when it left the beam and came back.
        self._parent, self._token, self._child = [-1], [-1], {}
        state = self._scorer.start() if self._scorer else None
        self._beams = [(0, -1, 0.0, NEVER, 0.0, 0.0, 0.0, None, None, 0.0, state)]

    def accept(self, log_probs: np.ndarray) -> None:
        """Go on by the frames of log_probs (S, V)."""
        log_probs = penalise_blank(log_probs, self.blank_penalty, self.blank)
        values, symbols = most_probable(log_probs, self.beam_size)
        if np.isnan(values).any():
            raise NotANumber
        for row, ids in zip(values.tolist(), symbols.tolist(), strict=True):
            self._step(row, ids)
            self.frames += 1

    def result(self) -> DecodeResult:
        """The hypotheses so far, as if the utterance ended here; `accept` may go on afterwards."""
        ranked = []
        for node, _, _, _, score, v_s, v_ns, times_s, times_ns, bonus, state in self._beams:
            if self._scorer is not None:
                final = self._scorer.finish(state)
                # Assigned, not added: how the original ends, see ContextGraph.
                bonus = final if self.context is not None and self.context.original else bonus + final
            ranked.append((score + bonus, score, node, times_s if v_s > v_ns else times_ns))
        if self._scorer is not None and not (self.context is not None and self.context.original):
            ranked.sort(key=itemgetter(0), reverse=True)
        nbest = []
        for total, score, node, link in ranked:
            times, log_peaks = [], []
            while link is not None:
                link, time, log_peak = link
                times.append(time)
                log_peaks.append(log_peak)
            times.reverse()
            log_peaks.reverse()
            confidence, tokens_confidence = _confidences(log_peaks, score, self.frames)
            nbest.append(Hypothesis(self._tokens(node), total, confidence, tokens_confidence, times, ctc_score=score))
        return DecodeResult(nbest)

    def _tokens(self, node: int) -> list[int]:
        tokens = []
        while node:
            tokens.append(self._token[node])
            node = self._parent[node]
        return tokens[::-1]

    def _step(self, row: list[float], ids: list[int]) -> None:
        """One frame: `row` the log-probabilities of the symbols `ids`, best first."""
        beams, parent, scorer, width = self._beams, self._parent, self._scorer, self.beam_size
        of = dict(zip(ids, row, strict=True))
        p_blank = of.get(self.blank, NEVER)
        rank = {beam[0]: i for i, beam in enumerate(beams)}

        # Prefixes that stay as they are: by a blank, by repeating their last token, and by being what another prefix
        # of the beam becomes with one token more. No other two candidates are ever the same prefix.
        candidates = []  # (total, CTC score, came from beam, ...)
        taken: dict[int, list[int]] = {}  # beam -> tokens whose extension is counted in a prefix that stays
        for j, (node, last, s, ns, score, *_, bonus, _) in enumerate(beams):
            p = of.get(last, NEVER)
            s, ns, i = score + p_blank, ns + p, -1
            if p > NEVER:
                i = rank.get(parent[node], -1)
                if i >= 0:
                    taken.setdefault(i, []).append(last)
                    ns = _log_add(ns, (beams[i][2] if beams[i][1] == last else beams[i][4]) + p)
            score = _log_add(s, ns)
            if score > NEVER:
                candidates.append((score + bonus, score, j, s, ns, p, i))

        # Prefixes with one token more. Both lists are in falling order, so a beam's extensions end at the first one
        # below the floor: the worst of the best `width` candidates found so far.
        floors = [candidate[0] for candidate in candidates]
        heapq.heapify(floors)
        floor = floors[0] if len(floors) == width else NEVER
        pairs = [(u, p) for u, p in zip(ids, row, strict=True) if u != self.blank and p > NEVER]
        for i, (_, last, s, _, score, *_, bonus, state) in enumerate(beams):
            bound = score + bonus + (scorer.max_gain(state) if scorer else 0.0)
            counted = taken.get(i, ())
            for u, p in pairs:
                if bound + p < floor:
                    break
                if u in counted:
                    continue
                ctc = (s if u == last else score) + p
                gain, after = scorer.step(state, u) if scorer else (0.0, None)
                total = ctc + bonus + gain
                if total < floor or ctc == NEVER:
                    continue
                candidates.append((total, ctc, i, u, p, bonus + gain, after, True))
                if len(floors) < width:
                    heapq.heappush(floors, total)
                else:
                    heapq.heappushpop(floors, total)
                if len(floors) == width:
                    floor = floors[0]

        if not candidates:
            raise ValueError(f"every symbol has probability zero in frame {self.frames}")
        candidates.sort(key=itemgetter(0), reverse=True)
        self._beams = [
            self._extended(c) if len(c) == 8 else self._stayed(c, p_blank) for c in candidates[: self.beam_size]
        ]

    def _extended(self, candidate: tuple) -> tuple:
        _, ctc, i, u, p, bonus, state, _ = candidate
        beam = self._beams[i]
        key = (beam[0], u)
        node = self._child.get(key)
        if node is None:
            node = self._child[key] = len(self._parent)
            self._parent.append(beam[0])
            self._token.append(u)
        v_ns, times_ns = self._viterbi_extension(beam, u, p)
        return node, u, NEVER, ctc, ctc, NEVER, v_ns, None, times_ns, bonus, state

    def _stayed(self, candidate: tuple, p_blank: float) -> tuple:
        _, score, j, s, ns, p, i = candidate
        node, last, _, _, _, old_v_s, old_v_ns, old_times_s, old_times_ns, bonus, state = self._beams[j]
        v_s, times_s, v_ns, times_ns = NEVER, None, NEVER, None
        if p_blank > NEVER:
            v_s, times_s = (old_v_s, old_times_s) if old_v_s > old_v_ns else (old_v_ns, old_times_ns)
            v_s += p_blank
        repeated = old_v_ns + p
        if repeated > NEVER:
            v_ns, times_ns = repeated, (old_times_ns[0], self.frames, p)
        if i >= 0:
            extended, times = self._viterbi_extension(self._beams[i], last, p)
            # WeNet meets the better-ranked of the two first; of equal token probability, the first extension keeps
            # its times even where repeating is the more probable path.
            if extended > (NEVER if i < j else v_ns):
                times_ns = times
            v_ns = max(v_ns, extended)
        return node, last, s, ns, score, v_s, v_ns, times_s, times_ns, bonus, state

    def _viterbi_extension(self, beam: tuple, token: int, p: float) -> tuple[float, tuple | None]:
        """Score and times of the best path of `beam` with `token` appended in this frame."""
        _, last, _, _, _, v_s, v_ns, times_s, times_ns, _, _ = beam
        best, times = (v_s, times_s) if v_s > v_ns or token == last else (v_ns, times_ns)
        return best + p, (times, self.frames, p) if best + p > NEVER else None


def penalise_blank(log_probs: np.ndarray, penalty: float, blank: int = 0) -> np.ndarray:
    """(..., V): log_softmax of the logits with `penalty` subtracted from the blank's, from the log-probabilities."""
    if penalty == 0.0 or log_probs.size == 0:
        return log_probs
    shifted = log_probs.astype(np.float64)
    blank_prob = np.exp(shifted[..., blank])
    shifted[..., blank] -= penalty
    # The other probabilities keep their sum, 1 - blank_prob; max() because rounding may leave it below zero.
    total = np.log(np.maximum(1.0 - blank_prob, 0.0) + blank_prob * math.exp(-penalty))
    return shifted - total[..., None]


def joined_scorer(*scorers: Scorer | None) -> Scorer | None:
    """Those that are there, as one."""
    present = [scorer for scorer in scorers if scorer is not None]
    return _Sum(present) if len(present) > 1 else present[0] if present else None


class _Sum:
    """Several scorers as one."""

    def __init__(self, scorers: list[Scorer]):
        self.scorers = scorers

    def start(self) -> tuple:
        return tuple(scorer.start() for scorer in self.scorers)

    def step(self, state: tuple, token: int) -> tuple[float, tuple]:
        steps = [scorer.step(part, token) for scorer, part in zip(self.scorers, state, strict=True)]
        return sum(score for score, _ in steps), tuple(after for _, after in steps)

    def finish(self, state: tuple) -> float:
        return sum(scorer.finish(part) for scorer, part in zip(self.scorers, state, strict=True))

    def max_gain(self, state: tuple) -> float:
        return sum(scorer.max_gain(part) for scorer, part in zip(self.scorers, state, strict=True))


def _checked(log_probs: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    log_probs, lengths = np.asarray(log_probs), np.asarray(lengths)
    if log_probs.ndim != 3 or lengths.shape != log_probs.shape[:1]:
        raise ValueError(
            f"expected log_probs (B, S, V) with lengths (B,), got shapes {log_probs.shape} and {lengths.shape}"
        )
    if lengths.size and not 0 <= lengths.min() <= lengths.max() <= log_probs.shape[1]:
        raise ValueError(f"lengths must lie in 0..{log_probs.shape[1]}, got {lengths.min()}..{lengths.max()}")
    return log_probs, lengths


def most_probable(log_probs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` best of each row of (S, V): float64 values (S, K) in falling order, symbols (S, K)."""
    count = min(count, log_probs.shape[1])
    first = log_probs.shape[1] - count
    symbols = np.argpartition(log_probs, first, axis=1)[:, first:] if first else _all_symbols(log_probs)
    symbols.sort(axis=1)  # of equal values the smaller symbol comes first
    values = np.take_along_axis(log_probs, symbols, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1).astype(np.float64), np.take_along_axis(symbols, order, axis=1)


def _all_symbols(log_probs: np.ndarray) -> np.ndarray:
    return np.tile(np.arange(log_probs.shape[1]), (log_probs.shape[0], 1))


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a + math.log1p(math.exp(b - a)) if b > NEVER else a


def _confidences(log_peaks: list[float], score: float, frames: int) -> tuple[float, list[float]]:
    if not log_peaks:
        return math.exp(min(score / frames, 0.0)) if frames else 1.0, []
    return math.exp(sum(log_peaks) / len(log_peaks)), list(map(math.exp, log_peaks))


def _empty_result(score: float, frames: int) -> DecodeResult:
    confidence, tokens_confidence = _confidences([], score, frames)
    return DecodeResult([Hypothesis([], score, confidence, tokens_confidence, [], ctc_score=score)])
