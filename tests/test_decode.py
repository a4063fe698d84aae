"""Decoding against the original projects' results, against brute force, and on hostile input."""

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_decoding import (
    EOS,
    SOS,
    Bigrams,
    ToyDecoder,
    collapse,
    every_sequence,
    log_softmax,
    phrase_bonus,
    random_log_probs,
)

from m3asr.decode import (
    ContextGraph,
    PrefixBeamSearch,
    attention_rescoring,
    attention_search,
    ctc_greedy_search,
    ctc_prefix_beam_search,
    token_times,
    word_times,
)
from m3asr.errors import ModelError

GOLDEN = Path(__file__).parent / "data" / "golden"
FAMILY_3M = ["3m-moe-80", "3m-moe-40", "3m-dense-80"]
WENET = "wenet-u2pp-80"


def search(log_probs, beam_size=10, **options):
    return ctc_prefix_beam_search(log_probs[None], [len(log_probs)], beam_size, **options)[0]


# --- the original projects' numbers ---------------------------------------------------------------------------------


def golden(folder):
    with np.load(GOLDEN / folder / "golden.npz") as arrays:
        return dict(arrays), json.loads((GOLDEN / folder / "decode.json").read_text())


def golden_log_probs(arrays):
    if "ctc_log_probs" in arrays:
        return arrays["ctc_log_probs"]
    return log_softmax(arrays["encoder_out_nosm"]).astype(np.float32)


def assert_nbest(nbest, tokens, scores):
    assert [hypothesis.tokens for hypothesis in nbest] == tokens
    np.testing.assert_allclose([hypothesis.score for hypothesis in nbest], scores, rtol=0, atol=1e-3)


@pytest.mark.parametrize("folder", FAMILY_3M)
def test_3m_greedy_of_the_batch(folder):
    arrays, expected = golden(folder)
    results = ctc_greedy_search(golden_log_probs(arrays), arrays["encoder_out_lens"])
    assert [result.tokens for result in results] == expected["greedy"]


@pytest.mark.parametrize("folder", FAMILY_3M)
def test_3m_prefix_beam_of_the_longest_utterance(folder):
    arrays, expected = golden(folder)
    log_probs = golden_log_probs(arrays)[:1]
    (result,) = ctc_prefix_beam_search(log_probs, arrays["encoder_out_lens"][:1], expected["beam_size"])
    tokens, scores = zip(*expected["prefix_beam"][0], strict=True)
    assert_nbest(result.nbest, list(tokens), scores)


def test_wenet_prefix_beam_with_times():
    arrays, expected = golden(WENET)
    results = ctc_prefix_beam_search(arrays["ctc_log_probs"], arrays["encoder_out_lens"], expected["beam_size"])
    for result, utterance in zip(results, expected["utterances"], strict=True):
        reference = utterance["ctc_prefix_beam_search"]
        assert_nbest(result.nbest, reference["nbest"], reference["nbest_scores"])
        assert result.times == reference["times"]


def load_model(folder):
    pytest.importorskip("torch")
    from m3asr.checkpoint import read_checkpoint
    from m3asr.model import Model

    checkpoint = read_checkpoint(GOLDEN / folder)
    model = Model(checkpoint.config)
    model.load_state_dict(checkpoint.state)
    return model.eval(), checkpoint.tokenizer


def encoded_alone(model, arrays):
    """Each utterance alone, cut to its length: (log_probs (1, S, V), hidden (1, S, D))."""
    import torch

    features = arrays["feats"] if "feats" in arrays else arrays["fbank"]
    with torch.inference_mode():
        for row, length in zip(features, arrays["feat_lens"].tolist(), strict=True):
            log_probs, hidden, _ = model(torch.tensor(row[None, :length]), torch.tensor([length], dtype=torch.int32))
            yield log_probs.numpy(), hidden.numpy()


def network(model):
    import torch

    def decoder(hidden, hidden_length, tokens, token_lengths, reversed_tokens):
        tokens = torch.tensor(tokens)
        backwards = None if reversed_tokens is None else torch.tensor(reversed_tokens)
        with torch.inference_mode():
            left, right = model.decode(torch.tensor(hidden), torch.tensor(hidden_length), tokens, backwards)
        return left.numpy(), None if right is None else right.numpy()

    return decoder


@pytest.mark.parametrize("folder", FAMILY_3M)
def test_3m_beam_and_rescoring_of_every_utterance(folder):
    model, tokenizer = load_model(folder)
    arrays, expected = golden(folder)
    for b, (log_probs, hidden) in enumerate(encoded_alone(model, arrays)):
        lengths = [log_probs.shape[1]]
        beam = ctc_prefix_beam_search(log_probs, lengths, expected["beam_size"])
        tokens, scores = zip(*expected["prefix_beam"][b], strict=True)
        assert_nbest(beam[0].nbest, list(tokens), scores)
        (rescored,) = attention_rescoring(
            beam,
            network(model),
            hidden,
            lengths,
            expected["ctc_weight"],
            expected["reverse_weight"],
            sos=tokenizer.sos,
            eos=tokenizer.eos,
        )
        assert rescored.tokens == expected["rescoring"][b]
        assert sorted(h.tokens for h in rescored.nbest) == sorted(tokens)


def test_wenet_all_four_modes_of_every_utterance():
    model, tokenizer = load_model(WENET)
    arrays, expected = golden(WENET)
    ends = {"sos": tokenizer.sos, "eos": tokenizer.eos}
    for (log_probs, hidden), reference in zip(encoded_alone(model, arrays), expected["utterances"], strict=True):
        lengths = [log_probs.shape[1]]
        assert ctc_greedy_search(log_probs, lengths)[0].tokens == reference["ctc_greedy_search"]["tokens"]

        beam = ctc_prefix_beam_search(log_probs, lengths, expected["beam_size"])
        wanted = reference["ctc_prefix_beam_search"]
        assert_nbest(beam[0].nbest, wanted["nbest"], wanted["nbest_scores"])
        assert beam[0].times == wanted["times"]

        weights = expected["ctc_weight"], expected["reverse_weight"]
        (rescored,) = attention_rescoring(beam, network(model), hidden, lengths, *weights, **ends)
        wanted = reference["attention_rescoring"]
        assert (rescored.tokens, rescored.times) == (wanted["tokens"], wanted["times"])
        assert rescored.score == pytest.approx(wanted["score"], abs=1e-3)
        assert rescored.confidence == pytest.approx(wanted["confidence"], abs=1e-4)

        attention = attention_search(network(model), hidden, lengths[0], expected["beam_size"], **ends)
        assert attention.tokens == reference["attention"]["tokens"]


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


@st.composite
def tiny_log_probs(draw):
    """(S <= 5, V <= 3): every kind of frame, also with symbols of probability zero."""
    frames, vocab = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    logit = st.one_of(st.floats(-6, 6), st.just(-math.inf))
    rows = draw(st.lists(st.lists(logit, min_size=vocab, max_size=vocab), min_size=frames, max_size=frames))
    return log_softmax([row if max(row) > -math.inf else [0.0] * vocab for row in rows])


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


# --- attention decoder ----------------------------------------------------------------------------------------------


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


def test_attention_search_without_frames():
    result = attention_search(ToyDecoder(), np.zeros((1, 3, 6)), 0, sos=SOS, eos=EOS)
    assert (result.tokens, result.score, result.confidence) == ([], 0.0, 1.0)


# --- times ----------------------------------------------------------------------------------------------------------


def test_token_times_meet_midway_and_stay_within_half_a_second():
    assert token_times([]) == []
    assert token_times([0]) == [(0.0, 0.5)]
    spans = token_times([10, 15, 60], duration=2.6)
    np.testing.assert_allclose(spans, [(0.0, 0.5), (0.5, 1.1), (1.9, 2.6)])
    np.testing.assert_allclose(token_times([10, 60], frame_shift=0.06), [(0.1, 1.1), (3.1, 4.1)])


@given(st.lists(st.integers(0, 500), unique=True, max_size=20))
def test_token_times_are_in_order(frames):
    spans = token_times(sorted(frames), duration=20.1)
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges)
    assert all(end - start <= 1.0 + 1e-9 and 0 <= start <= end <= 20.1 for start, end in spans)


def test_words_take_the_times_of_their_tokens():
    spans = [(0.0, 0.2), (0.2, 0.5), (0.5, 0.6), (0.9, 1.0)]
    words = word_times([("hello", 0, 2), ("you", 3, 4)], spans, [0.9, 0.5, 0.1, 0.8])
    assert [(w.text, w.start, w.end, w.confidence) for w in words] == [("hello", 0.0, 0.5, 0.5), ("you", 0.9, 1.0, 0.8)]
    assert word_times([("hello", 0, 2)], spans)[0].confidence is None
    assert word_times([], []) == []
