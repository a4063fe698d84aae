"""Greedy search and prefix beam search against brute force, and on hostile input."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_decoding import collapse, every_sequence, log_softmax, random_log_probs
from tiny_searches import search, tiny_log_probs

from m3asr.decode import PrefixBeamSearch, ctc_greedy_search, ctc_prefix_beam_search

# --- CTC by brute force ---------------------------------------------------------------------------------------------


def plain_prefix_beam(log_probs, beam_size):
    """The pruned search of specification 3.2 in its plainest form: [(tokens, log-probability)]."""
    beam = {(): (0.0, -math.inf)}
    for row in log_probs.astype(np.float64):
        grown = defaultdict(lambda: (-math.inf, -math.inf))

        def add(tokens, blank, other, grown=grown):
            old = grown[tokens]
            grown[tokens] = (np.logaddexp(old[0], blank), np.logaddexp(old[1], other))

        for symbol in np.argsort(-row, kind="stable")[:beam_size].tolist():
            for tokens, (blank, other) in beam.items():
                total = np.logaddexp(blank, other) + row[symbol]
                if symbol == 0:
                    add(tokens, total, -math.inf)
                elif tokens and tokens[-1] == symbol:
                    add(tokens, -math.inf, other + row[symbol])
                    add((*tokens, symbol), -math.inf, blank + row[symbol])
                else:
                    add((*tokens, symbol), -math.inf, total)
        ranked = sorted(grown.items(), key=lambda item: -np.logaddexp(*item[1]))
        beam = dict(ranked[:beam_size])
    return [(list(tokens), np.logaddexp(*scores)) for tokens, scores in beam.items()]


@settings(max_examples=150, deadline=None)
@given(tiny_log_probs())
def test_a_wide_beam_sums_over_all_alignments(log_probs):
    exact = every_sequence(log_probs)
    result = search(log_probs, beam_size=500)  # more than there are symbols or sequences
    found = {tuple(hypothesis.tokens): hypothesis.score for hypothesis in result.nbest}
    assert found == pytest.approx(exact, abs=1e-9)
    assert sum(map(math.exp, found.values())) == pytest.approx(1.0)
    scores = [hypothesis.score for hypothesis in result.nbest]
    assert scores == sorted(scores, reverse=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(2, 12), st.sampled_from([0.5, 2.0, 5.0]))
def test_skipping_hopeless_candidates_changes_nothing(seed, frames, vocab, scale):
    rng = np.random.default_rng(seed)
    log_probs = random_log_probs(rng, frames, vocab, scale, blank_bias=float(rng.choice([0.0, 4.0])))
    if seed % 2:
        # Symbols that last: repeats, and prefixes that meet again. The noise keeps two orders of the same symbols from
        # being equally probable, where their ranking would be left to rounding.
        log_probs = log_softmax(log_probs.repeat(2, axis=0) + 0.1 * rng.standard_normal((2 * frames, vocab)))
    beam_size = int(rng.integers(1, vocab + 1))
    expected = [pair for pair in plain_prefix_beam(log_probs, beam_size) if pair[1] > -math.inf]
    result = search(log_probs, beam_size)
    assert [hypothesis.tokens for hypothesis in result.nbest] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([h.score for h in result.nbest], [score for _, score in expected], atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(tiny_log_probs())
def test_greedy_follows_the_best_path(log_probs):
    (result,) = ctc_greedy_search(log_probs[None], [len(log_probs)])
    path = log_probs.argmax(axis=-1)
    assert tuple(result.tokens) == collapse(path)
    assert result.score == pytest.approx(log_probs.max(axis=-1).sum())
    for token, time, confidence in zip(result.tokens, result.times, result.tokens_confidence, strict=True):
        assert path[time] == token
        assert confidence == pytest.approx(math.exp(log_probs[time, token]))


def test_greedy_time_is_the_peak_of_a_run():
    probs = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7], [0.8, 0.2], [0.45, 0.55]])
    (result,) = ctc_greedy_search(np.log(probs)[None], [6])
    assert (result.tokens, result.times) == ([1, 1], [2, 5])
    assert result.tokens_confidence == pytest.approx([0.8, 0.55])
    assert result.confidence == pytest.approx(math.sqrt(0.8 * 0.55))


def test_viterbi_times_move_with_repeats_and_count_repeated_tokens():
    probs = np.array([[0.05, 0.9, 0.05], [0.05, 0.9, 0.05], [0.9, 0.05, 0.05], [0.04, 0.9, 0.06], [0.04, 0.06, 0.9]])
    result = search(np.log(probs), 3)
    assert (result.tokens, result.times) == ([1, 1, 2], [1, 3, 4])
    for hypothesis in result.nbest:
        assert len(hypothesis.times) == len(hypothesis.tokens) == len(hypothesis.tokens_confidence)
        assert hypothesis.times == sorted(hypothesis.times)


# --- hostile input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [ctc_greedy_search, ctc_prefix_beam_search])
@pytest.mark.parametrize("frames", [0, 4])
def test_an_utterance_without_frames_is_empty(decode, frames):
    log_probs = np.full((2, frames, 3), np.nan, np.float32)
    for result in decode(log_probs, [0, 0]):
        assert (result.tokens, result.times, result.tokens_confidence) == ([], [], [])
        assert (result.score, result.confidence) == (0.0, 1.0)
    assert decode(np.zeros((0, 5, 3)), np.zeros(0, int)) == []


@pytest.mark.parametrize("decode", [ctc_greedy_search, ctc_prefix_beam_search])
def test_blanks_alone_say_nothing(decode):
    probs = np.full((1, 7, 4), 0.01)
    probs[..., 0] = 0.97
    (result,) = decode(np.log(probs), [7])
    assert (result.tokens, result.times) == ([], [])
    assert result.confidence == pytest.approx(0.97, abs=0.02)


def test_only_one_symbol():
    (result,) = ctc_prefix_beam_search(np.zeros((1, 3, 1)), [3], 10)
    assert [hypothesis.tokens for hypothesis in result.nbest] == [[]]
    (result,) = ctc_prefix_beam_search(np.zeros((1, 3, 1)), [3], 10, blank=5)  # no blank at all
    assert [(h.tokens, h.times) for h in result.nbest] == [([0], [2])]


@pytest.mark.parametrize("decode", [ctc_greedy_search, ctc_prefix_beam_search])
def test_frames_past_the_length_are_not_looked_at(decode):
    rng = np.random.default_rng(5)
    utterances = [random_log_probs(rng, frames, 9) for frames in (12, 7, 1, 0)]
    batch = np.full((4, 12, 9), np.nan, np.float32)
    for row, utterance in zip(batch, utterances, strict=True):
        row[: len(utterance)] = utterance
    together = decode(batch, [12, 7, 1, 0])
    alone = [decode(utterance[None], [len(utterance)])[0] for utterance in utterances]
    assert together == alone


@pytest.mark.parametrize("decode", [ctc_greedy_search, ctc_prefix_beam_search])
def test_input_that_means_nothing_is_refused(decode):
    log_probs = random_log_probs(np.random.default_rng(0), 6, 5)[None]
    spoiled = log_probs.copy()
    spoiled[0, 3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        decode(spoiled, [6])
    decode(spoiled, [3])
    for lengths in ([7], [-1], [6, 6]):
        with pytest.raises(ValueError, match="length"):
            decode(log_probs, lengths)
    with pytest.raises(ValueError, match="expected log_probs"):
        decode(log_probs[0], [6])


def test_a_frame_without_any_symbol_is_refused():
    log_probs = random_log_probs(np.random.default_rng(0), 6, 5)
    log_probs[4] = -np.inf
    with pytest.raises(ValueError, match="frame 4"):
        search(log_probs)
    with pytest.raises(ValueError, match="beam_size"):
        search(log_probs, 0)


def test_a_result_is_json():
    for decode in (ctc_greedy_search, ctc_prefix_beam_search):
        (result,) = decode(random_log_probs(np.random.default_rng(1), 20, 6)[None], np.array([20]))
        read = json.loads(json.dumps(result.as_dict(), allow_nan=False))
        assert read["tokens"] == result.tokens == read["nbest"][0]["tokens"]


def test_frames_in_pieces_give_the_result_of_the_whole():
    rng = np.random.default_rng(3)
    log_probs = random_log_probs(rng, 40, 20)
    stream = PrefixBeamSearch(beam_size=6)
    at = 0
    while at < 40:
        size = int(rng.integers(0, 7))
        stream.accept(log_probs[at : at + size])
        at = min(at + size, 40)
        assert stream.result() == search(log_probs[:at], 6)


def test_blank_penalty_is_a_shifted_logit():
    rng = np.random.default_rng(7)
    logits = rng.standard_normal((15, 6)) * 2
    logits[:, 0] += 3
    shifted = logits.copy()
    shifted[:, 0] -= 2.5
    for decode in (ctc_greedy_search, ctc_prefix_beam_search):
        (penalised,) = decode(log_softmax(logits)[None], [15], blank_penalty=2.5)
        (expected,) = decode(log_softmax(shifted)[None], [15])
        (without,) = decode(log_softmax(logits)[None], [15])
        assert penalised.tokens == expected.tokens
        assert penalised.score == pytest.approx(expected.score)
        assert len(penalised.tokens) > len(without.tokens)
    certain = np.log([[1.0, 0.0], [1.0, 0.0]] + np.full((2, 2), 1e-300))
    assert search(certain, blank_penalty=2.5).score == pytest.approx(0.0)
