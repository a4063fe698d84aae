"""Joint CTC/attention decoding and forced alignment against brute force, and on decoders that mean no good."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_decoding import (
    EOS,
    SOS,
    VOCAB,
    Bigrams,
    ToyDecoder,
    collapse,
    ctc_forward,
    every_sequence,
    log_softmax,
    phrase_bonus,
    random_log_probs,
)

from m3asr.decode import (
    ContextGraph,
    attention_rescoring,
    ctc_alignment,
    ctc_prefix_beam_search,
    joint_search,
)
from m3asr.errors import ModelError, NotANumber


def joint(log_probs, decoder, hidden, beam_size=10, ctc_weight=0.5, reverse_weight=0.0, first=None, **options):
    """(the first pass's result, the joint one) of one utterance."""
    scorers = {name: options[name] for name in ("context", "lm", "blank_penalty") if name in options}
    log_probs, lengths = log_probs[None], [len(log_probs)]
    results = ctc_prefix_beam_search(log_probs, lengths, first or beam_size, **scorers)
    (found,) = joint_search(
        results, log_probs, decoder, hidden, lengths, beam_size, ctc_weight, reverse_weight, sos=SOS, eos=EOS, **options
    )
    return results[0], found


def hidden_of(seed, frames):
    return np.random.default_rng(seed).standard_normal((1, frames, 6)).astype(np.float32)


class Counting:
    """A decoder that counts how often it is asked, and for how many rows."""

    def __init__(self, decoder):
        self.decoder, self.calls, self.rows = decoder, 0, 0

    def __call__(self, hidden, hidden_length, tokens, *, reversed_tokens=None):
        self.calls += 1
        self.rows += len(tokens)
        return self.decoder(hidden, hidden_length, tokens, reversed_tokens=reversed_tokens)


class Stubborn:
    """Always the same next token, whatever was said and heard."""

    def __init__(self, token, certainty=0.999):
        self.row = np.full(VOCAB, (1 - certainty) / (VOCAB - 1))
        self.row[token] = certainty

    def __call__(self, hidden, hidden_length, tokens, *, reversed_tokens=None):
        return np.tile(np.log(self.row), (*tokens.shape, 1)), None


def spoken(*frames, certainty=0.9, vocab=VOCAB):
    """log_probs that say one symbol in each frame."""
    probs = np.full((len(frames), vocab), (1 - certainty) / (vocab - 1))
    probs[np.arange(len(frames)), frames] = certainty
    return np.log(probs)


# --- against brute force --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_wide_beam_finds_the_best_of_all_sentences(seed, frames, weight):
    rng = np.random.default_rng(seed)
    log_probs = random_log_probs(rng, frames, VOCAB - 1, blank_bias=0.0)
    log_probs = np.concatenate([log_probs, np.full((frames, 1), -80.0)], axis=1)  # nobody says eos
    decoder, hidden = ToyDecoder(seed % 1000), hidden_of(seed, frames)
    lm = Bigrams(log_softmax(rng.standard_normal((VOCAB, VOCAB)))) if seed % 2 else None
    expected = {
        tokens: sum(decoder.log_prob(0, hidden, tokens)) + weight * (score + (lm.total(tokens) if lm else 0.0))
        for tokens, score in every_sequence(log_probs[:, :-1]).items()
    }
    # The first pass finds next to nothing, so that it is the search that has to.
    _, result = joint(log_probs, decoder, hidden, 5000, weight, first=1, margin=math.inf, lm=lm)
    assert tuple(result.tokens) == max(expected, key=expected.get)
    assert result.score == pytest.approx(max(expected.values()), abs=1e-6)
    for hypothesis in result.nbest:  # the first pass's may miss some of CTC's alignments
        assert hypothesis.score <= expected[tuple(hypothesis.tokens)] + 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 15), st.integers(1, 6))
def test_never_worse_than_rescoring_and_true_to_its_scores(seed, frames, beam_size):
    rng = np.random.default_rng(seed)
    log_probs = random_log_probs(rng, frames, VOCAB - 1)
    decoder, hidden = ToyDecoder(seed % 1000), hidden_of(seed, frames)
    first, result = joint(log_probs, decoder, hidden, beam_size, 0.7)
    (rescored,) = attention_rescoring([first], decoder, hidden, [frames], 0.7, sos=SOS, eos=EOS)
    assert result.score >= rescored.score - 1e-9
    scores = [hypothesis.score for hypothesis in result.nbest]
    assert scores == sorted(scores, reverse=True) and len(scores) <= beam_size
    heard_first = [hypothesis.tokens for hypothesis in first.nbest]
    for hypothesis in result.nbest:
        steps = decoder.log_prob(0, hidden, hypothesis.tokens)
        assert hypothesis.attention_score == pytest.approx(sum(steps))
        assert hypothesis.score == pytest.approx(sum(steps) + 0.7 * hypothesis.ctc_score)
        exact = ctc_forward(log_probs, hypothesis.tokens)
        if hypothesis.tokens in heard_first:  # over the alignments that the first pass kept
            assert hypothesis.ctc_score <= exact + 1e-6
        else:
            assert hypothesis.ctc_score == pytest.approx(exact, abs=1e-6)
        assert hypothesis.confidence == pytest.approx(math.exp(sum(steps) / len(steps)))
        assert hypothesis.tokens_confidence == pytest.approx([math.exp(step) for step in steps[:-1]])
        assert len(hypothesis.times) == len(hypothesis.tokens)
        assert all(a < b for a, b in itertools.pairwise([-1, *hypothesis.times, frames]))
    json.dumps(result.as_dict(), allow_nan=False)


@pytest.mark.parametrize("reverse_weight", [0.0, 0.3])
def test_the_right_to_left_decoder_ranks_once_more(reverse_weight):
    log_probs = random_log_probs(np.random.default_rng(4), 9, VOCAB - 1)
    decoder, hidden = ToyDecoder(4), hidden_of(4, 9)
    _, result = joint(log_probs, decoder, hidden, 4, 0.7, reverse_weight)
    for hypothesis in result.nbest:
        left = sum(decoder.log_prob(0, hidden, hypothesis.tokens))
        right = sum(decoder.log_prob(1, hidden, hypothesis.tokens[::-1]))
        expected = (1 - reverse_weight) * left + reverse_weight * right + 0.7 * hypothesis.ctc_score
        assert hypothesis.score == pytest.approx(expected)
    scores = [hypothesis.score for hypothesis in result.nbest]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(ModelError, match="reverse_weight is 0.3"):
        joint(log_probs, ToyDecoder(two_ways=False), hidden, 4, 0.7, 0.3)


# --- what it is for -------------------------------------------------------------------------------------------------


class Knowing:
    """A decoder that is sure of one sentence, and of its own words after a mistake."""

    def __init__(self, sentence, certainty=0.99):
        self.sentence, self.certainty = [*sentence, EOS], certainty

    def __call__(self, hidden, hidden_length, tokens, *, reversed_tokens=None):
        probs = np.full((*tokens.shape, VOCAB), (1 - self.certainty) / (VOCAB - 1))
        for place in range(tokens.shape[1]):
            probs[:, place, self.sentence[min(place, len(self.sentence) - 1)]] = self.certainty
        return np.log(probs), None


def test_attention_finds_what_the_first_pass_has_lost():
    log_probs = spoken(1, 0, 2, 0, 3, 0, certainty=0.6)
    first, result = joint(log_probs, Knowing([1, 3, 3]), hidden_of(0, 6), 2)
    assert [1, 3, 3] not in [hypothesis.tokens for hypothesis in first.nbest]
    assert result.tokens == [1, 3, 3]
    assert result.times[0] == 0 and result.times[2] == 4
    # Each has its say: the surer CTC, the more it weighs.
    _, result = joint(spoken(1, 0, 2, 0, 3, 0, certainty=0.9999), Knowing([1, 3, 3], 0.9), hidden_of(0, 6), 2, 1.0)
    assert result.tokens == [1, 2, 3]


def test_ctc_keeps_attention_from_ending_early_and_from_going_in_circles():
    log_probs = spoken(*[1, 0, 2, 0, 3, 0] * 5, certainty=0.99)
    frames = len(log_probs)
    for token in (EOS, 1, 2):
        decoder = Counting(Stubborn(token, 0.9))
        _, result = joint(log_probs, decoder, hidden_of(0, frames), 10, 1.0)
        assert len(result.tokens) == pytest.approx(15, abs=2)
        assert decoder.calls < 40
    # Nothing was said, and attention will not stop saying something.
    decoder = Counting(Stubborn(2))
    _, result = joint(spoken(*[0] * 300, certainty=0.999), decoder, hidden_of(0, 300), 10, 1.0)
    assert len(result.tokens) <= 2 and decoder.calls < 10


def test_where_both_agree_the_decoder_is_asked_once():
    sentence = [1, 2, 3, 1, 3, 2]
    frames = [symbol for token in sentence for symbol in (token, 0)]
    decoder = Counting(Knowing(sentence, 0.97))
    first, result = joint(spoken(*frames, certainty=0.97), decoder, hidden_of(0, len(frames)))
    assert result.tokens == sentence
    assert result.times == first.times
    assert decoder.calls == 1
    assert decoder.rows == len(first.nbest)


def test_a_guess_spares_asking_again():
    # Attention corrects the second of twelve words; the ten after it are as the first pass heard them.
    heard, sentence = [1, 2, 3] * 4, [1, 1, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    frames = [symbol for token in heard for symbol in (token, 0)]
    decoder = Counting(Knowing(sentence, 0.99))
    first, result = joint(spoken(*frames, certainty=0.9), decoder, hidden_of(0, len(frames)), 1)
    assert first.tokens == heard and result.tokens == sentence
    assert decoder.calls == 2


# --- context and language model -------------------------------------------------------------------------------------


def test_phrases_and_language_model_count_as_in_rescoring():
    log_probs = random_log_probs(np.random.default_rng(3), 8, VOCAB - 1)
    decoder, hidden = ToyDecoder(3), hidden_of(3, 8)
    lm = Bigrams(np.random.default_rng(1).standard_normal((VOCAB, VOCAB)))
    phrases = [[1, 2], [3]]
    _, result = joint(log_probs, decoder, hidden, 6, 0.4, context=ContextGraph(phrases, 1.5), lm=lm)
    for hypothesis in result.nbest:
        tokens = hypothesis.tokens
        bonus = phrase_bonus(phrases, [1.5, 1.5], tokens) + lm.total(tokens)
        expected = sum(decoder.log_prob(0, hidden, tokens)) + 0.4 * (hypothesis.ctc_score + bonus)
        assert hypothesis.score == pytest.approx(expected)


def test_a_phrase_still_to_come_is_waited_for():
    # The first pass has the phrase, with a wrong word before it. A right beginning has not earned the phrase's bonus
    # yet, and must not be given up for that.
    log_probs = spoken(2, 0, 3, 0, 1, 0, certainty=0.6)
    decoder, hidden, context = Knowing([1, 3, 1]), hidden_of(0, 6), ContextGraph([[3, 1]], 9.0)
    first, result = joint(log_probs, decoder, hidden, 4, first=1, context=context)
    assert first.tokens == [2, 3, 1] and result.tokens == [1, 3, 1]
    with pytest.raises(ValueError, match="original"):
        joint(log_probs, decoder, hidden, first=4, context=ContextGraph([[3]], original=True))


def test_blank_penalty_is_that_of_the_first_pass():
    log_probs = random_log_probs(np.random.default_rng(5), 8, VOCAB - 1, blank_bias=3.0)
    decoder, hidden = ToyDecoder(5), hidden_of(5, 8)
    logits = log_probs.astype(np.float64)
    logits[:, 0] -= 2.0
    _, result = joint(log_probs, decoder, hidden, 6, blank_penalty=2.0)
    expected = ctc_forward(log_softmax(logits), result.tokens)
    assert result.nbest[0].ctc_score == pytest.approx(expected, abs=1e-2)
    assert abs(expected - ctc_forward(log_probs, result.tokens)) > 0.5


# --- batches and hostile input --------------------------------------------------------------------------------------


def test_alone_as_in_a_batch_and_nothing_behind_the_length_is_looked_at():
    rng = np.random.default_rng(7)
    decoder, lengths = ToyDecoder(7), [12, 5, 0, 1]
    log_probs = np.full((4, 12, VOCAB - 1), np.nan, np.float32)
    hidden = np.full((4, 12, 6), np.nan, np.float32)
    for b, length in enumerate(lengths):
        log_probs[b, :length] = random_log_probs(rng, length, VOCAB - 1) if length else 0.0
        hidden[b, :length] = rng.standard_normal((length, 6))
    first = ctc_prefix_beam_search(log_probs, lengths, 4)
    together = joint_search(first, log_probs, decoder, hidden, lengths, 4, sos=SOS, eos=EOS)
    assert together[2] is first[2]
    for b, length in enumerate(lengths):
        (alone,) = joint_search(
            [first[b]],
            log_probs[b : b + 1, :length],
            decoder,
            hidden[b : b + 1, :length],
            [length],
            4,
            sos=SOS,
            eos=EOS,
        )
        assert alone == together[b]


def test_nan_of_the_decoder_is_refused():
    with pytest.raises(NotANumber):
        joint(spoken(1, 2), Stubborn(1, math.nan), hidden_of(0, 2))


def test_symbols_that_cannot_be():
    with np.errstate(divide="ignore"):
        log_probs = spoken(1, 0, 2, certainty=1.0)
    _, result = joint(log_probs, Knowing([3, 3]), hidden_of(0, 3))
    assert result.tokens == [1, 2]
    # One frame has room for one token, whatever attention wants.
    _, result = joint(spoken(1, certainty=0.5), Knowing([3, 3, 3]), hidden_of(0, 1), ctc_weight=0.0)
    assert max(len(hypothesis.tokens) for hypothesis in result.nbest) == 1


# --- alignment ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_alignment_is_the_most_probable_path(seed, frames):
    log_probs = random_log_probs(np.random.default_rng(seed), frames, 3)
    best = {}
    for path in itertools.product(range(3), repeat=frames):
        score = sum(float(log_probs[t, symbol]) for t, symbol in enumerate(path))
        best[collapse(path)] = max(best.get(collapse(path), (-math.inf,)), (score, path))
    sequences = sorted(best)
    for tokens, times in zip(sequences, ctc_alignment(log_probs, sequences), strict=True):
        path = best[tokens][1]
        ends = [t for t, symbol in enumerate(path) if symbol and path[t + 1 : t + 2] != (symbol,)]
        assert times == ends


def test_alignment_of_what_cannot_be_aligned():
    log_probs = random_log_probs(np.random.default_rng(0), 3, 4)
    assert ctc_alignment(log_probs, [[], [1, 2, 3], [1, 1]]) == [[], [0, 1, 2], [0, 2]]
    assert ctc_alignment(log_probs, []) == []
    assert ctc_alignment(log_probs[:0], [[]]) == [[]]
    for tokens in ([1, 1, 2], [1, 2, 3, 1]):
        with pytest.raises(ValueError, match="cannot be said in 3 frames"):
            ctc_alignment(log_probs, [tokens])
