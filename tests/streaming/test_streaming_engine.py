"""Engines chunk by chunk: with caches they give what the chunk-masked forward gives, alone and in a batch."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from golden import GOLDEN
from streaming_models import EXPORTED, STREAMING

from m3asr.engines import load_engine
from m3asr.engines.streaming import stream_start
from m3asr.errors import ModelError
from m3asr.folder import ModelFolder

TOLERANCE = 1e-5  # float32; the order of sums differs


def relative(out: np.ndarray, reference: np.ndarray) -> float:
    assert out.shape == reference.shape
    return float(np.linalg.norm(out.astype(np.float64) - reference) / np.linalg.norm(reference))


def stream(engine, features: np.ndarray, size: int, left: int) -> np.ndarray:
    """All chunks of one utterance (T, F), one after the other -> hidden (S, D)."""
    encoder, state, hidden = engine.config.encoder, engine.stream_start(), []
    window = (size - 1) * encoder.subsampling_rate + encoder.min_frames
    for start in range(0, len(features) - encoder.min_frames + 1, size * encoder.subsampling_rate):
        chunk = features[start : start + window]
        out = engine.stream_step(chunk[None], np.array([len(chunk)]), [state], size * left)
        hidden.append(out[1][0, : out[2][0]])
        (state,) = out[3]
    assert state.offset == sum(map(len, hidden))
    return np.concatenate(hidden)


@pytest.mark.parametrize("kind", ["eager", "onnx"])
def test_wenets_own_chunk_loop(kind, wenet):
    golden = np.load(GOLDEN / "wenet-u2pp-80" / "golden.npz")
    engine = load_engine(wenet, kind, threads=1)
    size, left = golden["chunk"].tolist()
    hidden = stream(engine, golden["fbank"][0, : golden["feat_lens"][0]], size, left)
    assert relative(hidden, golden["stream_hidden"][0]) < TOLERANCE
    assert relative(hidden, golden["chunk_hidden"][0]) < TOLERANCE


@pytest.mark.parametrize(("name", "kind"), [*((name, "eager") for name in STREAMING), (EXPORTED, "onnx")])
def test_chunks_equal_the_chunk_masked_forward(name, kind, engine_of):
    engine, whole = engine_of(name, kind), engine_of(name, "eager")
    encoder = engine.config.encoder
    rng = np.random.default_rng(0)
    for size, left in ((3, -1), (3, 0), (3, 2), (1, 5), (16, 1)):
        if encoder.static_chunk_size and size != encoder.static_chunk_size:
            continue
        for count in (encoder.min_frames, 63, 3 * size * encoder.subsampling_rate + encoder.min_frames - 1):
            features = rng.standard_normal((count, encoder.input_dim)).astype(np.float32)
            expected = whole(features[None], np.array([count]), chunk_size=size, left_chunks=left)[1][0]
            assert relative(stream(engine, features, size, left), expected) < TOLERANCE, (size, left, count)


@pytest.mark.parametrize("kind", ["eager", "onnx"])
@pytest.mark.parametrize("left", [-1, 0, 2])
def test_streams_of_different_ages_in_one_call(kind, left, engine_of):
    """Streams start, run and end in one batch; each gives what it gives alone."""
    engine, size = engine_of(EXPORTED, kind), 4
    encoder = engine.config.encoder
    rate, window = encoder.subsampling_rate, (size - 1) * encoder.subsampling_rate + encoder.min_frames
    rng = np.random.default_rng(1)
    utterances = [rng.standard_normal((t, encoder.input_dim)).astype(np.float32) for t in (150, 9, 77, 64, 23, 151)]
    starts = [0, 1, 2, 2, 5, 6]  # the step in which each joins
    states, hidden = [engine.stream_start() for _ in utterances], [[] for _ in utterances]
    for step in range(20):
        chunks = {}
        for i, (utterance, start) in enumerate(zip(utterances, starts, strict=True)):
            if step >= start:
                chunk = utterance[(step - start) * size * rate :][:window]
                if len(chunk) >= encoder.min_frames:
                    chunks[i] = chunk
        if not chunks:
            continue
        features = np.full((len(chunks), window, encoder.input_dim), np.nan, np.float32)
        for row, chunk in zip(features, chunks.values(), strict=True):
            row[: len(chunk)] = chunk
        lengths = np.array([len(chunk) for chunk in chunks.values()])
        _, out, out_lengths, after = engine.stream_step(features, lengths, [states[i] for i in chunks], size * left)
        for row, i in enumerate(chunks):
            hidden[i].append(out[row, : out_lengths[row]])
            states[i] = after[row]
    for utterance, pieces in zip(utterances, hidden, strict=True):
        assert relative(np.concatenate(pieces), stream(engine, utterance, size, left)) < TOLERANCE


def test_memory_of_a_stream_is_bounded_and_a_step_changes_no_state(engine_of):
    engine = engine_of(EXPORTED, "onnx")
    start = engine.stream_start()
    features = np.random.default_rng(2).standard_normal((1, 19, 40)).astype(np.float32)
    state, sizes = start, []
    for _ in range(9):
        *_, (state,) = engine.stream_step(features, np.array([19]), [state], 8)
        sizes.append(sum(cache.nbytes for cache in state.caches))
    assert sizes[0] < sizes[1] == sizes[2] == sizes[-1]
    assert state.offset == 36 and all(cache.base is None for cache in state.caches)
    first = engine.stream_step(features, np.array([19]), [start], 8)
    again = engine.stream_step(features, np.array([19]), [start], 8)
    assert np.array_equal(first[1], again[1]) and start.caches[0].shape[2] == 0


@pytest.mark.parametrize("kind", ["eager", "onnx"])
def test_what_does_not_fit_is_refused(kind, engine_of, folder_of):
    for name in ("moe", "causal"):  # looks ahead; causal, but with unlimited attention
        with pytest.raises(ModelError, match="chunk by chunk"):
            stream_start(folder_of(name).config.encoder)
    engine = engine_of(EXPORTED, kind)
    with pytest.raises(ModelError, match="states of 2 streams"):
        engine.stream_step(np.zeros((1, 19, 40), np.float32), np.array([19]), [engine.stream_start()] * 2)
    with pytest.raises(ModelError, match="NaN"):
        engine.stream_step(np.full((1, 19, 40), np.nan, np.float32), np.array([19]), [engine.stream_start()])


def test_an_engine_built_without_the_graph_says_so(wenet, tmp_path):
    old = shutil.copytree(wenet.path, tmp_path / "old")
    manifest = old / "engines" / "onnx" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["weights"]["stream.onnx"]
    manifest.write_text(json.dumps(content))
    engine = load_engine(ModelFolder.read(old), "onnx")
    with pytest.raises(ModelError, match="no graph for streams.*m3asr build"):
        engine.stream_start()
