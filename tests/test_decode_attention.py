"""Rescoring and search with an attention decoder, by hand and against exhaustive search."""

import itertools
import json
import math

import numpy as np
import pytest
from plain_decoding import EOS, SOS, ToyDecoder, random_log_probs

from m3asr.decode import attention_rescoring, attention_search, ctc_prefix_beam_search
from m3asr.errors import ModelError, NotANumber


@pytest.mark.parametrize("reverse_weight", [0.0, 0.3])
def test_rescoring_by_hand(reverse_weight):
    rng = np.random.default_rng(2)
    log_probs = np.stack([random_log_probs(rng, 9, 4), random_log_probs(rng, 9, 4), random_log_probs(rng, 9, 4)])
    lengths, hidden = [9, 5, 0], rng.standard_normal((3, 9, 6)).astype(np.float32)
    first_pass = ctc_prefix_beam_search(log_probs, lengths, 4)
    decoder = ToyDecoder()
    results = attention_rescoring(first_pass, decoder, hidden, lengths, 0.7, reverse_weight, sos=SOS, eos=EOS)
    assert results[2] == first_pass[2]
    for b in range(2):
        memory = hidden[b : b + 1, : lengths[b]]
        expected = []
        for hypothesis in first_pass[b].nbest:
            left = decoder.log_prob(0, memory, hypothesis.tokens)
            right = decoder.log_prob(1, memory, hypothesis.tokens[::-1])
            attention = (1 - reverse_weight) * sum(left) + reverse_weight * sum(right)
            token = [math.exp(p) for p in left[:-1]]
            if reverse_weight:
                token = [(a + math.exp(p)) / 2 for a, p in zip(token, right[-2::-1], strict=True)]
            confidence = math.exp(attention / len(left))
            expected.append((attention + 0.7 * hypothesis.score, hypothesis.tokens, confidence, token))
        expected.sort(key=lambda row: -row[0])
        for hypothesis, (score, tokens, confidence, token) in zip(results[b].nbest, expected, strict=True):
            assert hypothesis.tokens == tokens
            assert hypothesis.score == pytest.approx(score)
            assert hypothesis.confidence == pytest.approx(confidence)
            assert hypothesis.tokens_confidence == pytest.approx(token)
            assert len(hypothesis.times) == len(tokens)
    json.dumps([result.as_dict() for result in results], allow_nan=False)


def test_rescoring_tells_when_there_is_no_right_to_left_decoder():
    first_pass = ctc_prefix_beam_search(random_log_probs(np.random.default_rng(2), 9, 4)[None], [9], 4)
    hidden = np.zeros((1, 9, 6), np.float32)
    with pytest.raises(ModelError, match="reverse_weight is 0.3"):
        attention_rescoring(first_pass, ToyDecoder(two_ways=False), hidden, [9], 0.5, 0.3, sos=SOS, eos=EOS)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_attention_search_with_a_wide_beam_is_exhaustive(seed, penalty):
    decoder, frames = ToyDecoder(seed), 4
    hidden = np.random.default_rng(seed).standard_normal((1, frames, 6)).astype(np.float32)
    expected = []
    for size in range(frames + 1):
        for tokens in itertools.product(range(4), repeat=size):
            steps = decoder.log_prob(0, hidden, tokens)
            if size == frames:
                steps.pop()  # as many tokens as frames: no room for eos
            expected.append((sum(steps) / max(size, 1) ** penalty, list(tokens), steps))
    expected.sort(key=lambda row: -row[0])
    result = attention_search(decoder, hidden, frames, 1000, sos=SOS, eos=EOS, length_penalty=penalty)
    assert len(result.nbest) == len(expected)
    for hypothesis, (score, tokens, steps) in zip(result.nbest[:20], expected, strict=False):
        assert hypothesis.tokens == tokens
        assert hypothesis.score == pytest.approx(score)
        assert hypothesis.confidence == pytest.approx(math.exp(sum(steps) / len(steps)))
        assert hypothesis.tokens_confidence == pytest.approx([math.exp(p) for p in steps[: len(tokens)]])
    narrow = attention_search(decoder, hidden[0], frames, 2, sos=SOS, eos=EOS)
    assert len(narrow.nbest) == 2


def test_nan_of_a_decoder_is_refused():
    def broken(hidden, hidden_length, tokens, *, reversed_tokens=None):
        return np.full((*tokens.shape, EOS + 1), np.nan), None

    first_pass = ctc_prefix_beam_search(random_log_probs(np.random.default_rng(2), 9, 4)[None], [9], 4)
    hidden = np.zeros((1, 9, 6), np.float32)
    with pytest.raises(NotANumber):
        attention_rescoring(first_pass, broken, hidden, [9], sos=SOS, eos=EOS)
    with pytest.raises(NotANumber):
        attention_search(broken, hidden, 9, 3, sos=SOS, eos=EOS)


def test_attention_search_without_frames():
    result = attention_search(ToyDecoder(), np.zeros((1, 3, 6)), 0, sos=SOS, eos=EOS)
    assert (result.tokens, result.score, result.confidence) == ([], 0.0, 1.0)
