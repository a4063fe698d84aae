"""Every engine against the golden numbers and against the eager one, at all lengths."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from golden import GOLDEN, GOLDEN_NAMES, relative_error
from random_model import random_model

from m3asr.convert import build_onnx
from m3asr.decode import attention_rescoring, ctc_prefix_beam_search, joint_search
from m3asr.engines import available, load_engine
from m3asr.errors import ModelError
from m3asr.folder import ModelFolder, write_model_files
from m3asr.tokenizer import Tokenizer

TOLERANCE = {"eager": 1e-5, "onnx": 1e-4}


@pytest.fixture(scope="module")
def engine_of(golden_folders):
    loaded = {}

    def engine(name, kind):
        if (name, kind) not in loaded:
            loaded[name, kind] = load_engine(ModelFolder.read(golden_folders[name]), kind)
        return loaded[name, kind]

    return engine


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden(name, kind, engine_of):
    golden = np.load(GOLDEN / name / "golden.npz")
    features = golden["feats"] if "feats" in golden else golden["fbank"]
    engine = engine_of(name, kind)
    log_probs, hidden, lengths = engine(features, golden["feat_lens"], compat=True)
    assert lengths.tolist() == golden["encoder_out_lens"].tolist()
    assert {log_probs.dtype, hidden.dtype} == {np.dtype(np.float32)} and lengths.dtype == np.int32
    assert relative_error(hidden, golden["encoder_hidden"], lengths) < TOLERANCE[kind]
    if "ctc_log_probs" in golden:
        assert relative_error(log_probs, golden["ctc_log_probs"], lengths) < TOLERANCE[kind]
        size, left = golden["chunk"].tolist()
        hidden = engine(features, golden["feat_lens"], compat=True, chunk_size=size, left_chunks=left)[1]
        assert relative_error(hidden, golden["chunk_hidden"], lengths) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_decoding_a_batch_gives_the_originals_results_alone(name, kind, engine_of, golden_folders):
    """decode.json was made from each utterance alone; here they share a batch, which must not matter."""
    golden = np.load(GOLDEN / name / "golden.npz")
    expected = json.loads((GOLDEN / name / "decode.json").read_text())
    config = ModelFolder.read(golden_folders[name]).config
    engine = engine_of(name, kind)
    features = golden["feats"] if "feats" in golden else golden["fbank"]
    log_probs, hidden, lengths = engine(features, golden["feat_lens"])
    beam = ctc_prefix_beam_search(log_probs, lengths, expected["beam_size"])
    rescored = attention_rescoring(
        beam,
        engine.decode,
        hidden,
        lengths,
        expected["ctc_weight"],
        expected["reverse_weight"],
        sos=config.sos,
        eos=config.eos,
    )
    if "utterances" in expected:
        nbest = [u["ctc_prefix_beam_search"] for u in expected["utterances"]]
        nbest = [list(zip(u["nbest"], u["nbest_scores"], strict=True)) for u in nbest]
        best = [u["attention_rescoring"]["tokens"] for u in expected["utterances"]]
        scores = [u["attention_rescoring"]["score"] for u in expected["utterances"]]
        np.testing.assert_allclose([r.score for r in rescored], scores, atol=1e-3)
    else:
        nbest, best = expected["prefix_beam"], expected["rescoring"]
    assert [r.tokens for r in rescored] == best
    for result, reference in zip(beam, nbest, strict=True):
        assert [h.tokens for h in result.nbest] == [tokens for tokens, _ in reference]
        np.testing.assert_allclose([h.score for h in result.nbest], [score for _, score in reference], atol=1e-3)


@pytest.mark.parametrize("name", ["3m-moe-80", "wenet-u2pp-80"])
def test_joint_decoding_is_the_same_on_both(name, engine_of):
    features, lengths = np.random.default_rng(2).standard_normal((2, 160, 80)).astype(np.float32), np.array([160, 90])
    both = []
    for kind in ("eager", "onnx"):
        engine = engine_of(name, kind)
        config = engine.config
        log_probs, hidden, out_lengths = engine(features, lengths)
        beam = ctc_prefix_beam_search(log_probs, out_lengths, 5)
        weights = config.ctc_weight, config.reverse_weight
        both.append(
            joint_search(
                beam, log_probs, engine.decode, hidden, out_lengths, 5, *weights, sos=config.sos, eos=config.eos
            )
        )
    for ours, reference in zip(*both, strict=True):
        assert (ours.tokens, ours.times) == (reference.tokens, reference.times)
        assert ours.score == pytest.approx(reference.score, abs=1e-3)


@pytest.mark.parametrize("name", ["3m-moe-80", "wenet-u2pp-80"])
def test_onnx_equals_eager_at_all_lengths(name, engine_of):
    rng = np.random.default_rng(0)
    eager, onnx = engine_of(name, "eager"), engine_of(name, "onnx")
    shortest = eager.config.encoder.min_frames
    for lengths in ([0], [1], [shortest - 1], [shortest], [63], [250, 3, 0, shortest], [64, 64, 64], []):
        frames = max(lengths, default=0)
        features = rng.standard_normal((len(lengths), frames, 80)).astype(np.float32)
        lengths = np.array(lengths, np.int32)
        for compat in (False, True):
            ours, reference = onnx(features, lengths, compat=compat), eager(features, lengths, compat=compat)
            assert ours[2].tolist() == reference[2].tolist()
            assert [o.shape for o in ours] == [r.shape for r in reference]
            if reference[2].sum():
                for out, expected in zip(ours[:2], reference[:2], strict=True):
                    assert relative_error(out, expected, reference[2]) < 1e-5


def test_onnx_of_other_configurations(tmp_path):
    """An export takes many seconds: the variants that the golden models lack, in one network of one block, without the
    decoder, which is that of the network that tests/streaming exports.
    """
    model = random_model("batch_norm+router-bias+gelu+conv2d6+no_pos+static-chunk", blocks=1)
    tokenizer = Tokenizer(["<blank>", *(f"s{i}" for i in range(18)), "<sos/eos>"])
    state = {name: value.numpy() for name, value in model.state_dict().items() if "decoder" not in name}
    write_model_files(tmp_path, replace(model.config, decoder=None), state, tokenizer, None, "")
    folder = ModelFolder.read(tmp_path)
    build_onnx(folder)
    features = np.random.default_rng(1).standard_normal((3, 90, model.config.encoder.input_dim)).astype(np.float32)
    lengths = np.array([90, 61, 20], np.int32)
    eager, onnx = load_engine(folder, "eager"), load_engine(folder, "onnx")
    reference = eager(features, lengths)
    for out, expected in zip(onnx(features, lengths)[:2], reference[:2], strict=True):
        assert relative_error(out, expected, reference[2]) < 1e-5


@pytest.mark.parametrize("kind", TOLERANCE)
def test_bad_features_are_refused(kind, engine_of):
    engine = engine_of("3m-moe-80", kind)
    good = np.zeros((2, 20, 80), np.float32)
    lengths = np.array([20, 9], np.int32)
    nan = good.copy()
    nan[1, 3, 5] = np.nan
    for features, n, said in (
        (good[..., :40], lengths, "80"),
        (good[0], lengths, "shape"),
        (good, lengths[:1], "expected one each"),
        (good, np.array([21, 9]), "20 frames"),
        (good, np.array([-1, 9]), "-1"),
        (good.astype(np.int16), lengths, "int16"),
        (nan, lengths, "NaN"),
    ):
        with pytest.raises(ModelError, match=said):
            engine(features, n)
    nan[1, 3, 5], nan[1, 10:] = 0, np.nan  # behind the utterance nothing matters
    out = engine(nan, lengths)
    np.testing.assert_array_equal(out[0], engine(good, lengths)[0])


def test_a_missing_or_foreign_onnx_engine_names_the_remedy(golden_folders, tmp_path):
    target = shutil.copytree(golden_folders["3m-dense-80"], tmp_path / "model")
    folder = ModelFolder.read(target)
    manifest = target / "engines" / "onnx" / "manifest.json"
    text = manifest.read_text()
    graph = target / "engines" / "onnx" / "encoder.onnx"
    data = graph.read_bytes()

    def refused(said):
        with pytest.raises(ModelError, match=said):
            load_engine(folder, "onnx")

    manifest.write_text(text.replace('"format_version": 1', '"format_version": 7'))
    refused("format 7.*m3asr build")
    manifest.write_text(text.replace(folder.config_digest(), "0" * 64))
    refused("another config.json.*m3asr build")
    manifest.write_text(text[:40])
    refused("damaged.*m3asr build")
    manifest.write_text(text)
    for size in (0, 1000, len(data) // 2):
        graph.write_bytes(data[:size])
        refused("damaged.*onnx engine again")
    shutil.rmtree(target / "engines")
    refused("no onnx engine.*m3asr build")


def test_engines_are_named():
    assert set(available()) >= {"onnx", "eager", "cuda"}
    with pytest.raises(ModelError, match="available: auto, onnx, eager, cuda"):
        load_engine(None, "cublas")
