"""Decoding against the original projects' results."""

import json
from pathlib import Path

import numpy as np
import pytest
from plain_decoding import log_softmax

from m3asr.decode import attention_rescoring, attention_search, ctc_greedy_search, ctc_prefix_beam_search

GOLDEN = Path(__file__).parent / "data" / "golden"
FAMILY_3M = ["3m-moe-80", "3m-moe-40", "3m-dense-80"]
WENET = "wenet-u2pp-80"


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

    def decoder(hidden, hidden_length, tokens, *, reversed_tokens=None):
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
