"""Phrases to favour and a language model in the prefix beam search, against counting and brute force."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_decoding import Bigrams, every_sequence, phrase_bonus
from tiny_searches import search, tiny_log_probs

from m3asr.decode import ContextGraph

# --- context biasing ------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_context_earns_each_complete_phrase_once(data):
    token = st.integers(1, 3)
    phrases = data.draw(st.lists(st.lists(token, min_size=1, max_size=4), min_size=1, max_size=5, unique_by=tuple))
    tokens = data.draw(st.lists(token, max_size=12))
    graph = ContextGraph(phrases, 2.0)
    state, total = graph.start(), 0.0
    for token in tokens:
        top = graph.max_gain(state)
        gain, state = graph.step(state, token)
        assert gain <= top
        total += gain
    assert total + graph.finish(state) == pytest.approx(phrase_bonus(phrases, [2.0] * len(phrases), tokens))


@settings(max_examples=60, deadline=None)
@given(tiny_log_probs(), st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=3), min_size=1, max_size=3))
def test_context_ranks_by_ctc_plus_bonus(log_probs, phrases):
    phrases = [list(phrase) for phrase in {tuple(phrase) for phrase in phrases}]
    expected = {
        tokens: score + phrase_bonus(phrases, [1.5] * len(phrases), list(tokens))
        for tokens, score in every_sequence(log_probs).items()
    }
    result = search(log_probs, 500, context=ContextGraph(phrases, 1.5))
    assert {tuple(h.tokens): h.score for h in result.nbest} == pytest.approx(expected, abs=1e-9)
    assert result.score == pytest.approx(max(expected.values()))
    assert result.nbest[0].ctc_score == pytest.approx(every_sequence(log_probs)[tuple(result.tokens)])


def test_context_makes_a_rare_phrase_win_in_a_narrow_beam():
    probs = np.full((6, 8), 0.02)
    for frame, (usual, wanted) in enumerate([(1, 4), (0, 0), (2, 5), (0, 0), (3, 6), (0, 0)]):
        probs[frame, usual] = 0.8
        if wanted:
            probs[frame, wanted] = 0.08
    log_probs = np.log(probs / probs.sum(axis=1, keepdims=True))
    assert search(log_probs, 4).tokens == [1, 2, 3]
    assert search(log_probs, 4, context=ContextGraph([[4, 5, 6]], 3.0)).tokens == [4, 5, 6]
    assert search(log_probs, 4, context=ContextGraph([[4, 5, 6], [7]], [0.1, 0.1])).tokens == [1, 2, 3]
    assert search(log_probs, 4, context=ContextGraph([[4, 5, 6], [7]], [3.0, 0.1])).tokens == [4, 5, 6]


def test_the_originals_end_of_utterance_only_on_request():
    # "1" is heard; "2" is the beginning of a phrase that nobody finishes.
    log_probs = np.log([[0.02, 0.7, 0.28]])
    ours = search(log_probs, 3, context=ContextGraph([[2, 2]], 2.0))
    assert ours.tokens == [1]
    assert ours.score == pytest.approx(math.log(0.7))
    originals = search(log_probs, 3, context=ContextGraph([[2, 2]], 2.0, original=True))
    assert originals.tokens == [2]
    assert originals.score == pytest.approx(math.log(0.28) - 2.0)
    # A complete phrase: ours keeps its bonus, the original's score has lost it twice over.
    assert search(log_probs, 3, context=ContextGraph([[1]], 2.0)).score == pytest.approx(math.log(0.7) + 2.0)
    originals = search(log_probs, 3, context=ContextGraph([[1]], 2.0, original=True))
    assert originals.score == pytest.approx(math.log(0.7) - 2.0)


def test_a_phrase_that_begins_another_counts_whatever_the_order():
    def bonus(phrases, **options):
        graph = ContextGraph(phrases, 1.0, **options)
        (first, state) = graph.step(graph.start(), 1)
        (second, state) = graph.step(state, 2)
        return first + second + graph.finish(state)

    assert bonus([[1, 2], [1, 2, 3]]) == bonus([[1, 2, 3], [1, 2]]) == 2.0
    assert bonus([[1, 2], [1, 2, 3]], original=True) == 2.0
    assert bonus([[1, 2, 3], [1, 2]], original=True) == 0.0


def test_context_refuses_what_it_cannot_favour():
    with pytest.raises(ValueError, match="without tokens"):
        ContextGraph([[1], []])
    with pytest.raises(ValueError, match="one score for each"):
        ContextGraph([[1], [2]], [1.0])


# --- language model -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(tiny_log_probs(), st.integers(0, 1000))
def test_a_language_model_and_phrases_add_up(log_probs, seed):
    lm = Bigrams(np.random.default_rng(seed).standard_normal((3, 3)))
    context = ContextGraph([[1, 2]], 1.0)
    ctc = every_sequence(log_probs)
    expected = {tokens: score + lm.total(tokens) for tokens, score in ctc.items()}
    result = search(log_probs, 500, lm=lm)
    assert {tuple(h.tokens): h.score for h in result.nbest} == pytest.approx(expected, abs=1e-9)
    assert result.score == pytest.approx(max(expected.values()))
    for tokens in expected:
        expected[tokens] += phrase_bonus([[1, 2]], [1.0], list(tokens))
    result = search(log_probs, 500, lm=lm, context=context)
    assert {tuple(h.tokens): h.score for h in result.nbest} == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match="original"):
        search(log_probs, lm=lm, context=ContextGraph([[1]], original=True))
