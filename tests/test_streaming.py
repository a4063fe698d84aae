"""Live speech: chunks with caches equal the chunk-masked forward, and packets of any size give the text of one piece.

No streaming model with trained weights exists here: the golden and the random weights say that the numbers and the
bookkeeping are right, nothing about recognition quality.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import soundfile
from golden import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import VARIANTS, random_model
from safetensors.numpy import save_file
from typer.testing import CliRunner

from m3asr.audio import read_pcm
from m3asr.cli import app
from m3asr.config import FbankConfig
from m3asr.convert import build_onnx
from m3asr.decode import DecodeOptions
from m3asr.engines import load_engine
from m3asr.engines.streaming import stream_start
from m3asr.errors import AudioError, M3asrError, ModelError
from m3asr.features import OnlineFbank, fbank
from m3asr.folder import ModelFolder, write_model_files
from m3asr.segment import SegmentOptions
from m3asr.stream import EndpointRule, Stream, StreamOptions, advance
from m3asr.tokenizer import Tokenizer
from m3asr.transcribe import Transcriber

TOLERANCE = 1e-5  # float32; the order of sums differs
CHUNKED = {"causal": True, "use_dynamic_chunk": True}
STREAMING = {
    "layer_norm-8": {"cnn_module_kernel": 8},
    "layer_norm-15": {"cnn_module_kernel": 15},
    "batch_norm-8": {"cnn_module_kernel": 8, "cnn_module_norm": "batch_norm"},
    "batch_norm-15": {"cnn_module_kernel": 15, "cnn_module_norm": "batch_norm"},
    "other-embedding": {
        "num_blocks": 1,
        "cnn_module_kernel": 8,
        "embed": {"attention_dim": 48, "attention_heads": 3, "num_blocks": 2},
    },
    "conv2d6": {"input_layer": "conv2d6"},
    "no_pos": {"pos_enc_layer_type": "no_pos", "selfattention_layer_type": "selfattn"},
    "dense": {"moe": None, "embed": None},
    "static": {"use_dynamic_chunk": False, "static_chunk_size": 3},
}
EXPORTED = "other-embedding"
UNITS = ["<blank>", "<unk>", "▁", *"abcdefghijklmnop", "<sos/eos>"]


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


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Model folders with random weights, by the name of the variant."""

    @cache
    def folder(name: str) -> ModelFolder:
        VARIANTS["streaming"] = CHUNKED | STREAMING[name] if name in STREAMING else VARIANTS[name]
        model = random_model("streaming")
        del VARIANTS["streaming"]
        config = replace(model.config, fbank=FbankConfig(num_mel_bins=model.config.encoder.input_dim))
        state = {key: value.numpy() for key, value in model.state_dict().items()}
        path = tmp_path_factory.mktemp("streaming") / name
        path.mkdir()
        write_model_files(path, config, state, Tokenizer(UNITS), None, "")
        return ModelFolder.read(path)

    return folder


@pytest.fixture(scope="module")
def engine_of(folder_of):
    @cache
    def engine(name: str, kind: str):
        if kind == "onnx":
            build_onnx(folder_of(name))
        return load_engine(folder_of(name), kind, threads=1)

    return engine


@pytest.fixture(scope="module")
def wenet(golden_folders) -> ModelFolder:
    return ModelFolder.read(golden_folders["wenet-u2pp-80"])


@pytest.mark.parametrize("kind", ["eager", "onnx"])
def test_wenets_own_chunk_loop(kind, wenet):
    golden = np.load(GOLDEN / "wenet-u2pp-80" / "golden.npz")
    engine = load_engine(wenet, kind, threads=1)
    size, left = golden["chunk"].tolist()
    hidden = stream(engine, golden["fbank"][0, : golden["feat_lens"][0]], size, left)
    assert relative(hidden, golden["stream_hidden"][0]) < TOLERANCE
    assert relative(hidden, golden["chunk_hidden"][0]) < TOLERANCE


# Exporting takes seconds, so the onnx engine is built for one model here; the golden one is the other.
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


# From samples to text.


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose loudness changes ten times a second: random weights at least say something different each time."""
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.uniform(0, 0.2, 100), 1600)
    return (rng.standard_normal(160000) * loudness)[: round(seconds * 16000)].astype(np.float32)


def in_packets(stream: Stream, samples: np.ndarray, sizes) -> list:
    """Updates of a stream fed packets of these sizes, the rest at once."""
    updates, start = [], 0
    for size in sizes:
        updates += stream.accept(samples[start : start + size])
        start += size
    return updates + stream.accept(samples[start:]) + stream.finish()


SHORT_SEGMENTS = (EndpointRule(False, 0.0, 1.2),)
OPTIONS = {
    "chunks": StreamOptions("chunks", 4, endpoints=SHORT_SEGMENTS),
    "chunks-left": StreamOptions("chunks", 3, left_chunks=2, endpoints=SHORT_SEGMENTS),
    "windows": StreamOptions("windows", 5, left=10, right=3, endpoints=SHORT_SEGMENTS),
    "windows-alone": StreamOptions("windows", 4, left=0, right=0, endpoints=SHORT_SEGMENTS),
}


@pytest.fixture(scope="module")
def transcriber(folder_of, engine_of):
    return Transcriber(folder_of(EXPORTED), engine_of(EXPORTED, "eager"))


@given(sizes=st.lists(st.integers(0, 2000), max_size=30), length=st.integers(0, 6000))
@settings(max_examples=40, deadline=None)
def test_filterbank_in_packets_is_the_filterbank(sizes, length):
    samples, online, start, pieces = noise(1)[:length], OnlineFbank(), 0, []
    for size in [*sizes, length]:
        pieces.append(online.accept(samples[start : start + size]))
        start += size
    assert np.array_equal(np.concatenate(pieces), fbank(samples))


@given(
    name=st.sampled_from(list(OPTIONS)),
    sizes=st.lists(st.integers(0, 9000), max_size=12),
    length=st.integers(0, 40000) | st.integers(1300, 1420),
)
@settings(max_examples=25, deadline=None)
def test_packets_of_any_size_give_the_text_of_one_piece(transcriber, name, sizes, length):
    samples = noise(2.5)[:length]
    whole = in_packets(Stream(transcriber, OPTIONS[name]), samples, [])
    assert in_packets(Stream(transcriber, OPTIONS[name]), samples, sizes) == whole
    assert bool(whole) == (length >= 6 * 160 + 400)  # of sound enough for one frame, these weights say something
    finals = [update.segment for update in whole if update.final]
    for before, after in zip(finals, finals[1:], strict=False):
        assert before.end <= after.start + 1e-6
    assert not whole or whole[-1].final


@pytest.mark.parametrize("left", [-1, 2])
def test_a_stream_says_what_the_chunk_masked_whole_says(transcriber, left):
    samples = noise(3, seed=1)
    options = StreamOptions(chunk=4, left_chunks=left, endpoints=())
    features = fbank(samples, transcriber.folder.config.fbank)
    outputs = transcriber.engine(features[None], np.array([len(features)]), chunk_size=4, left_chunks=left)
    (expected,) = transcriber.decode(*outputs, DecodeOptions("rescoring"))
    stream = Stream(transcriber, options)
    assert stream.mode == "chunks"
    final = in_packets(stream, samples, [777] * 20)[-1]
    assert final.final and final.segment.tokens == expected.tokens and expected.tokens
    assert final.segment.score == pytest.approx(expected.score, rel=1e-4)


LENGTHS = 2.53, 0.07, 0.51, 1.2345, 3.0  # seconds, of odd numbers of frames; the second gives none


@pytest.fixture(scope="module")
def talkative(folder_of, engine_of, tmp_path_factory) -> ModelFolder:
    """The exported model, changed so that it says something else in every frame, and that attention has a say in it."""
    path = tmp_path_factory.mktemp("talkative") / "model"
    engine_of(EXPORTED, "onnx")
    folder = ModelFolder.read(shutil.copytree(folder_of(EXPORTED).path, path))
    weights = {key: value.copy() for key, value in folder.weights().items()}
    for key in weights:
        if key.startswith("encoder.") and key.endswith("self_attn.linear_out.weight"):
            weights[key] *= 30
    save_file(weights, path / "model.safetensors")
    features = fbank(noise(3, seed=9), folder.config.fbank)
    hidden = load_engine(folder, "eager")(features[None], np.array([len(features)]))[1][0]
    weights["encoder.out_linear.bias"] = -weights["encoder.out_linear.weight"] @ hidden.mean(axis=0)
    save_file(weights, path / "model.safetensors")
    return ModelFolder.read(path)


@pytest.mark.parametrize("kind", ["eager", "onnx"])
@pytest.mark.parametrize("size, left", [(1, -1), (4, 2), (7, 0), (500, 1)])
def test_recordings_in_chunks_say_what_the_engine_says_in_chunks(kind, size, left, talkative):
    engine = load_engine(talkative, kind, threads=1)
    transcriber = Transcriber(talkative, engine, chunk_size=size, left_chunks=left)
    sounds = {str(seed): noise(seconds, seed) for seed, seconds in enumerate(LENGTHS)}
    segmentation = SegmentOptions(vad=False)
    for decoder in ("greedy", "joint"):
        options = DecodeOptions(decoder)
        together = list(transcriber.transcribe_each(sounds.items(), options, segmentation))
        assert [bool(transcript.text) for transcript in together] == [True, False, True, True, True]
        for transcript, samples in zip(together, sounds.values(), strict=True):
            features = fbank(samples, talkative.config.fbank)
            outputs = engine(features[None], np.array([len(features)]), chunk_size=size, left_chunks=left)
            (expected,) = transcriber.decode(*outputs, options)
            for segment in transcript.segments:
                assert segment.tokens == list(expected.tokens)
                assert segment.score == pytest.approx(expected.score, rel=1e-4)
        whole = Transcriber(talkative, engine).transcribe_each(sounds.items(), options, segmentation)
        same = [transcript.text for transcript in whole] == [transcript.text for transcript in together]
        assert same == (size == 500)  # one chunk for all of it


def test_greedy_search_in_chunks_takes_no_way_that_knows_none(talkative):
    engine = load_engine(talkative, "eager", threads=1)
    engine.best_path = lambda features, lengths: pytest.fail("of the whole recording")
    in_chunks, greedy = Transcriber(talkative, engine, chunk_size=4), DecodeOptions("greedy")
    assert in_chunks.transcribe(noise(2), 16000, options=greedy, segmentation=SegmentOptions(vad=False)).text


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A list of them with texts."""
    path = tmp_path_factory.mktemp("recordings")
    for seed, seconds in enumerate(LENGTHS):
        soundfile.write(path / f"{seed}.wav", noise(seconds, seed), 16000, "FLOAT")
    lines = [json.dumps({"audio": f"{seed}.wav", "text": "a b c"}) for seed in range(len(LENGTHS))]
    (path / "list.jsonl").write_text("\n".join(lines))
    return path / "list.jsonl"


def test_evaluate_and_transcribe_in_chunks_say_what_a_stream_says(m3, talkative, recordings, tmp_path):
    results = tmp_path / "results.jsonl"
    common = "-m", talkative.path, "-e", "eager", "--decoder", "rescoring", "--no-vad"
    in_chunks = *common, "--chunk-size", 4, "--left-chunks", 2
    stream_of = Transcriber(talkative, load_engine(talkative, "eager"))
    options = StreamOptions("chunks", 4, left_chunks=2, endpoints=(), decode=DecodeOptions("rescoring"))
    audio = [recordings.parent / f"{seed}.wav" for seed in range(len(LENGTHS))]
    expected = []
    for path in audio:
        updates = in_packets(Stream(stream_of, options), soundfile.read(path, dtype="float32")[0], [1600] * 9)
        expected.append(updates[-1].text if updates else "")
    code, out, err = m3("transcribe", *audio, *in_chunks)
    assert code == 0 and out.splitlines() == expected and "chunk size 4, left chunks 2" in err

    code, out, err = m3("evaluate", recordings, *in_chunks, "--results", results)
    assert code == 0 and "chunk size 4, left chunks 2" in err and "4 frames" in out
    (run,) = json.loads(out.splitlines()[-1])["runs"]
    assert (run["chunk_size"], run["left_chunks"]) == (4, 2)
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    found = {entry["key"]: entry["hypothesis"] for entry in entries if "hypothesis" in entry}
    assert list(found.values()) == expected

    # Whole utterances are another run with other texts, and nothing is said of chunks.
    code, out, err = m3("evaluate", recordings, *common, "--results", results)
    (run,) = json.loads(out.splitlines()[-1])["runs"]
    assert code == 0 and "chunk_size" not in run and "chunk" not in out + err
    entries = [json.loads(line) for line in results.read_text().splitlines()][len(entries) :]
    assert "chunk_size" not in entries[0]["settings"] and len(entries) == 1 + len(LENGTHS)
    assert [entry["hypothesis"] for entry in entries[1:]] != expected


@pytest.mark.parametrize("command", ["evaluate", "transcribe"])
@pytest.mark.parametrize(
    ("variant", "arguments", "found"),
    [
        ("moe", ("--chunk-size", 4), "this model was not trained on dynamic chunks (use_dynamic_chunk is false)"),
        ("static", ("--chunk-size", 3), "this model was not trained on dynamic chunks (use_dynamic_chunk is false)"),
        (EXPORTED, ("--left-chunks", 2), "there are no chunks"),
    ],
)
def test_chunks_that_the_model_does_not_have_are_refused(m3, folder_of, recordings, command, variant, arguments, found):
    what = recordings if command == "evaluate" else recordings.parent / "0.wav"
    code, out, err = m3(command, what, "-m", folder_of(variant).path, "-e", "eager", *arguments)
    assert code == 2 and out == "" and f"{arguments[0]}: {found}" in err and len(err.splitlines()) == 1


def test_windows_that_see_everything_say_what_the_whole_says(folder_of, engine_of):
    """With as much context as there is sound, the overlapping windows change nothing."""
    transcriber = Transcriber(folder_of("moe"), engine_of("moe", "eager"))
    samples = noise(2, seed=2)
    features = fbank(samples, transcriber.folder.config.fbank)
    (expected,) = transcriber.recognise([features], DecodeOptions("rescoring"))
    stream = Stream(transcriber, StreamOptions(chunk=5, left=100, right=100, endpoints=()))
    assert stream.mode == "windows"
    final = in_packets(stream, samples, [4000] * 3)[-1]
    assert final.segment.tokens == expected.tokens and expected.tokens
    narrow = in_packets(Stream(transcriber, StreamOptions(chunk=5, left=5, right=2, endpoints=())), samples, [])[-1]
    assert narrow.segment.tokens != expected.tokens  # it does differ where the model looks further than the window


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["eager", "onnx"])
def test_many_streams_in_one_call(name, kind, folder_of, engine_of):
    engine = engine_of(EXPORTED, kind)
    calls = []

    class Counting:
        name, config = engine.name, engine.config
        stream_start, decode = engine.stream_start, engine.decode

        def __call__(self, features, lengths):
            calls.append(len(lengths))
            return engine(features, lengths)

        def stream_step(self, features, lengths, states, keep):
            calls.append(len(lengths))
            return engine.stream_step(features, lengths, states, keep)

    transcriber = Transcriber(folder_of(EXPORTED), Counting())
    sounds = [noise(seconds, seed) for seed, seconds in enumerate((2.5, 0.01, 1.3, 2.5, 0.0, 1.9))]
    alone = [in_packets(Stream(transcriber, OPTIONS[name]), sound, []) for sound in sounds]
    calls.clear()
    streams = [Stream(transcriber, OPTIONS[name]) for _ in sounds]
    updates = [[] for _ in sounds]
    for start in range(0, 40000, 3200):
        for i, (stream, sound) in enumerate(zip(streams, sounds, strict=True)):
            if start > 3200 * i:
                stream.push(sound[start - 3200 * i - 3200 :][:3200])
        for all_of_it, new in zip(updates, advance(streams), strict=True):
            all_of_it += new
    for i, (stream, sound) in enumerate(zip(streams, sounds, strict=True)):
        stream.push(sound[len(range(0, 40000, 3200)) * 3200 - 3200 * (i + 1) :])
        stream.close()
    for all_of_it, new in zip(updates, advance(streams), strict=True):
        all_of_it += new
    assert [[(u.final, u.text) for u in one] for one in updates] == [[(u.final, u.text) for u in one] for one in alone]
    assert max(calls) >= 4
    assert advance(streams) == [[]] * 6  # they have ended


class Loudness:
    """An engine that hears "a" in loud frames, "b" in louder ones, and nothing else."""

    name, device = "loudness", "none"

    def __call__(self, features, lengths):
        size = (features.shape[1] - 7) // 4 + 1
        level = np.stack([features[:, 4 * t + 3].mean(axis=-1) for t in range(size)], axis=1)  # (B, S)
        token = np.where(level > 18, 4, np.where(level > 8, 3, 0))
        log_probs = np.where(np.arange(len(UNITS)) == token[..., None], 0.95, 0.05 / (len(UNITS) - 1))
        return np.log(log_probs).astype(np.float32), np.zeros((*token.shape, 8), np.float32), (lengths - 7) // 4 + 1


def sound(*parts: tuple[float, float]) -> np.ndarray:
    """(seconds, loudness) each."""
    rng = np.random.default_rng(0)
    pieces = [rng.standard_normal(round(seconds * 16000)) * loudness for seconds, loudness in parts]
    return np.concatenate(pieces).astype(np.float32)


A, B, QUIET = 0.003, 0.2, 1e-5


@pytest.fixture(scope="module")
def loudness(folder_of):
    return Transcriber(folder_of("moe"), Loudness())


def finals(updates) -> list[tuple[str, float, float]]:
    return [(u.text, round(u.segment.start, 1), round(u.segment.end, 1)) for u in updates if u.final]


def test_a_pause_ends_a_segment_and_a_short_one_does_not(loudness):
    samples = sound((1, QUIET), (0.5, A), (0.6, QUIET), (0.5, B), (1.5, QUIET), (0.5, A), (0.2, QUIET))
    options = StreamOptions(chunk=5, left=5, right=2, decode=DecodeOptions("beam"))
    stream = Stream(loudness, options)
    updates, times = [], []
    for start in range(0, len(samples), 160):
        new = stream.accept(samples[start : start + 160])
        updates += new
        times += [(start + 160) / 16000] * len(new)
    assert [(u.final, u.text) for u in updates] == [(False, "a"), (False, "ab"), (True, "ab"), (False, "a")]
    assert 1.0 < times[0] < 1.0 + 0.2 + stream.latency
    # A second after the end of "b" at 2.6 s, in steps of a chunk.
    assert 3.6 - 0.05 < times[2] < 3.6 + 0.2 + stream.latency
    updates += stream.finish()
    (first, second) = [u.segment for u in updates if u.final]
    assert (first.text, second.text) == ("ab", "a")
    assert 0.5 <= first.start <= 1.1 and 2.1 < first.end < 3.2 and 3.6 < second.start < 4.2 and second.end <= 4.8
    assert stream.finish() == []


def test_silence_says_nothing_and_the_longest_segment_is_bounded(loudness):
    options = StreamOptions(chunk=5, left=5, right=2, decode=DecodeOptions("beam"))
    assert in_packets(Stream(loudness, options), sound((12, QUIET)), []) == []
    babble = sound(*[(0.2, A), (0.2, B)] * 60)  # 24 s without a pause
    updates = in_packets(Stream(loudness, options), babble, [])
    texts = [u.text for u in updates if u.final]
    assert len(texts) == 2 and "".join(texts) == "ab" * 60
    first = next(u.segment for u in updates if u.final)
    assert 20 <= first.end <= 20.2
    # Without a rule for the length it is one; with a rule of its own it is another.
    never = replace(options, endpoints=(EndpointRule(True, 1.0),))
    assert [u.text for u in in_packets(Stream(loudness, never), babble, []) if u.final] == ["ab" * 60]
    strict = replace(options, endpoints=(EndpointRule(True, 0.1),))
    pauses = sound((0.3, A), (0.4, QUIET), (0.3, A), (0.4, QUIET))
    assert [u.text for u in in_packets(Stream(loudness, strict), pauses, []) if u.final] == ["a", "a"]


def test_rescoring_changes_final_texts_alone(transcriber):
    samples = noise(2.5, seed=5)
    beam = in_packets(Stream(transcriber, replace(OPTIONS["chunks"], decode=DecodeOptions("beam"))), samples, [])
    both = in_packets(Stream(transcriber, replace(OPTIONS["chunks"], decode=DecodeOptions("rescoring"))), samples, [])
    assert [u.text for u in beam if not u.final] == [u.text for u in both if not u.final]
    assert [u.text for u in beam if u.final] != [u.text for u in both if u.final]


def test_bad_use_of_a_stream_is_refused(transcriber, loudness):
    stream = Stream(transcriber, OPTIONS["chunks"])
    for samples in (np.zeros(9, np.int16), np.zeros((2, 9), np.float32), np.full(9, np.nan), np.full(9, 30000.0)):
        with pytest.raises(AudioError, match="samples"):
            stream.accept(samples)
    before = stream.accept(noise(1))
    with pytest.raises(M3asrError, match="twice"):
        advance([stream, stream])
    with pytest.raises(M3asrError, match="same"):
        advance([stream, Stream(transcriber, OPTIONS["windows"])])
    assert before + stream.accept(noise(2)[16000:]) + stream.finish() == in_packets(
        Stream(transcriber, OPTIONS["chunks"]), noise(2), []
    )
    with pytest.raises(M3asrError, match="finished"):
        stream.accept(noise(1))
    with pytest.raises(M3asrError, match="loudness does not run chunk by chunk"):
        Stream(loudness, StreamOptions("chunks"))
    for bad in ({"mode": "fast"}, {"chunk": -1}, {"left_chunks": -2}, {"decode": DecodeOptions("greedy")}):
        with pytest.raises(M3asrError, match="mode|expected|stream"):
            StreamOptions(**bad)


def test_a_model_with_one_chunk_size_takes_no_other(folder_of, engine_of):
    transcriber = Transcriber(folder_of("static"), engine_of("static", "eager"))
    with pytest.raises(M3asrError, match="chunks of 3"):
        Stream(transcriber, StreamOptions(chunk=4))
    samples = noise(2, seed=6)
    features = fbank(samples, transcriber.folder.config.fbank)
    (expected,) = transcriber.recognise([features], DecodeOptions("rescoring"))
    final = in_packets(Stream(transcriber, StreamOptions(endpoints=())), samples, [])[-1]
    assert final.segment.tokens == expected.tokens


@given(cuts=st.lists(st.integers(1, 3000), max_size=8))
@settings(max_examples=20, deadline=None)
def test_raw_samples_come_through_pipes_of_any_packets(cuts):
    samples = (noise(0.3) * 32767).astype("<i2")

    class Pipe:
        def __init__(self):
            self.data, self.cuts = io.BytesIO(samples.tobytes()), list(cuts)

        def read1(self, size):
            return self.data.read(min(size, self.cuts.pop() if self.cuts else size))

        read = None

    assert np.array_equal(np.concatenate(list(read_pcm(Pipe()))), samples.astype(np.float32) / 32768)
    half = np.concatenate(list(read_pcm(Pipe(), 8000)))
    assert len(half) == 2 * len(samples)


def test_command(wenet, tmp_path):
    samples = (noise(2) * 32767).astype("<i2")
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    common = ["-m", str(wenet.path), "--chunk", "4", "--longest", "1", "-q"]

    def run(*arguments, stdin=None):
        return CliRunner().invoke(app, ["stream", *arguments, *common], input=stdin, catch_exceptions=False)

    lines = run(str(tmp_path / "a.wav")).stdout.splitlines()
    assert len(lines) >= 2
    assert run("-", stdin=samples.tobytes() + b"\0").stdout.splitlines() == lines  # half a sample at the end
    updates = [json.loads(line) for line in run("-", "--format", "jsonl", stdin=samples.tobytes()).stdout.splitlines()]
    assert [update["text"] for update in updates if update["final"] and update["text"]] == lines
    assert any(not update["final"] for update in updates) and updates[-1]["words"]
    with pytest.raises(AudioError, match="expected raw"):
        run("-", stdin=(tmp_path / "a.wav").read_bytes())
    with pytest.raises(AudioError, match="no such file"):
        run(str(tmp_path / "b.wav"))
