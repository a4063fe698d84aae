"""Live speech: packets of any size give the text of one piece, and segments end where they should.

No streaming model with trained weights exists here: the golden and the random weights say that the numbers and the
bookkeeping are right, nothing about recognition quality.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from packets import in_packets, noise
from streaming_models import EXPORTED, UNITS
from typer.testing import CliRunner

from m3asr.audio import read_pcm
from m3asr.cli import app
from m3asr.decode import DecodeOptions
from m3asr.errors import AudioError, M3asrError
from m3asr.features import OnlineFbank, fbank
from m3asr.stream import EndpointRule, Stream, StreamOptions, advance
from m3asr.transcribe import Transcriber

SHORT_SEGMENTS = (EndpointRule(False, 0.0, 1.2),)
OPTIONS = {
    "chunks": StreamOptions("chunks", 4, endpoints=SHORT_SEGMENTS),
    "chunks-left": StreamOptions("chunks", 3, left_chunks=2, endpoints=SHORT_SEGMENTS),
    "windows": StreamOptions("windows", 5, left=10, right=3, endpoints=SHORT_SEGMENTS),
    "windows-alone": StreamOptions("windows", 4, left=0, right=0, endpoints=SHORT_SEGMENTS, reread=False),
    "chunks-reread": StreamOptions("chunks", 4, endpoints=SHORT_SEGMENTS, reread=True),
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


def test_windows_that_see_everything_say_what_the_whole_says(folder_of, engine_of):
    """With as much context as there is sound, the overlapping windows change nothing."""
    transcriber = Transcriber(folder_of("moe"), engine_of("moe", "eager"))
    samples = noise(2, seed=2)
    features = fbank(samples, transcriber.folder.config.fbank)
    (expected,) = transcriber.recognise([features], DecodeOptions("rescoring"))
    wide = StreamOptions(chunk=5, left=100, right=100, endpoints=(), reread=False)
    stream = Stream(transcriber, wide)
    assert stream.mode == "windows"
    final = in_packets(stream, samples, [4000] * 3)[-1]
    assert final.segment.tokens == expected.tokens and expected.tokens
    narrow = in_packets(Stream(transcriber, replace(wide, left=5, right=2)), samples, [])[-1]
    assert narrow.segment.tokens != expected.tokens  # it does differ where the model looks further than the window


def test_an_ended_segment_is_read_again_as_a_whole(folder_of, engine_of):
    """Narrow windows, and final texts of the joint search over each segment, which starts where the last one ended."""
    transcriber = Transcriber(folder_of("moe"), engine_of("moe", "eager"))
    samples = noise(3.3, seed=2)
    features, config = fbank(samples, transcriber.folder.config.fbank), transcriber.folder.config.encoder
    stream = Stream(transcriber, StreamOptions(chunk=5, left=5, right=2, endpoints=SHORT_SEGMENTS))
    assert stream.reread
    finals = [update.segment for update in in_packets(stream, samples, [4000] * 6) if update.final]
    assert len(finals) == 3
    first = 0
    for segment in finals:
        frames = min(30, (len(features) - config.min_frames) // config.subsampling_rate + 1 - first)
        begin = first * config.subsampling_rate
        whole = features[begin : begin + (frames - 1) * config.subsampling_rate + config.min_frames]
        (expected,) = transcriber.recognise([whole], DecodeOptions())
        assert segment.tokens == expected.tokens and expected.tokens
        assert segment.score == pytest.approx(expected.score, rel=1e-5)
        assert first * 0.04 - 1e-6 <= segment.start <= segment.end <= (first + frames) * 0.04 + 1e-6
        first += frames
    assert len(stream._heard) < config.min_frames + config.subsampling_rate  # what ended is forgotten


def test_a_stream_takes_no_notice_of_the_chunks_that_recordings_are_seen_in(folder_of, engine_of):
    folder, engine = folder_of("layer_norm-8"), engine_of("layer_norm-8", "eager")
    whole, chunked = Transcriber(folder, engine), Transcriber(folder, engine, chunk_size=4, left_chunks=2)
    samples = noise(1.5, seed=3)
    features = [folder.features(samples)]
    scores = [each.recognise(features, DecodeOptions("beam"))[0].score for each in (whole, chunked)]
    assert abs(scores[0] - scores[1]) > 1e-3
    for name in ("windows", "chunks-reread"):
        expected, got = (in_packets(Stream(t, OPTIONS[name]), samples, [1600] * 15) for t in (whole, chunked))
        assert got == expected and any(update.final for update in got)


def test_silence_around_a_segment_is_not_read_again(loudness, monkeypatch):
    """Seconds of silence before words would only confuse; half a second on either side stays."""
    given = []
    monkeypatch.setattr(
        loudness,
        "recognise",
        lambda features, *args, **how: given.append(len(features[0])) or original(features, *args, **how),
    )
    original = Transcriber.recognise.__get__(loudness)
    options = StreamOptions(chunk=5, left=5, right=2, decode=DecodeOptions("beam"))
    samples = sound((3, QUIET), (0.5, A), (0.3, QUIET), (0.5, B), (2, QUIET))
    finals = [u.segment for u in in_packets(Stream(loudness, options), samples, [1600] * 60) if u.final]
    assert [segment.text for segment in finals] == ["ab"]
    assert 2.9 <= finals[0].words[0].start <= 3.6  # a word starts a little before its first token
    assert len(given) == 1 and 1.3 + 0.7 < given[0] / 100 < 1.3 + 1.3


def test_a_segment_without_end_keeps_the_text_of_its_windows(loudness, monkeypatch):
    monkeypatch.setattr(loudness, "recognise", None)  # it would raise
    options = StreamOptions(chunk=5, left=5, right=2, endpoints=(), decode=DecodeOptions("beam"))
    babble = sound(*[(0.2, A), (0.2, B)] * 80)  # 32 s
    assert in_packets(Stream(loudness, options), babble, [])[-1].text == "ab" * 80


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
    with pytest.raises(M3asrError, match="joint .* read segments again"):
        Stream(transcriber, StreamOptions("chunks", decode=DecodeOptions("joint")))
    nan = float("nan")
    for bad in (
        {"mode": "fast"}, {"chunk": -1}, {"chunk": 4.5}, {"left_chunks": -2}, {"silence_threshold": nan},
        {"decode": DecodeOptions("greedy")}, {"chunk": 751}, {"left_chunks": 751}, {"left": 1000000}, {"right": 10**30},
    ):  # fmt: skip
        with pytest.raises(M3asrError, match="mode|expected|stream"):
            StreamOptions(**bad)
    for seconds in (-1, 3601, float("inf"), nan):
        for rule in ((True, seconds), (False, 0.0, seconds)):
            with pytest.raises(M3asrError, match="expected 0 to 3600"):
                EndpointRule(*rule)


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
    with pytest.raises(M3asrError, match="--rate is for raw samples"):
        run(str(tmp_path / "a.wav"), "--rate", "8000")
    with pytest.raises(M3asrError, match="--left-chunks is for the mode chunks"):
        run(str(tmp_path / "a.wav"), "--mode", "windows", "--left-chunks", "2")
    with pytest.raises(M3asrError, match="left is 1000000, expected"):
        run(str(tmp_path / "a.wav"), "--left", "1000000")


def test_command_reads_lines_again(folder_of, tmp_path, monkeypatch):
    """In windows by default, or when told so; joint search needs it."""
    samples = (noise(2) * 32767).astype("<i2").tobytes()
    seen, again = [], Stream._again
    monkeypatch.setattr(Stream, "_again", lambda self, frames: seen.append(frames) or again(self, frames))

    def lines(*arguments):
        seen.clear()
        options = [
            "stream",
            "-",
            "-m",
            str(folder_of("moe").path),
            "-e",
            "eager",
            "--chunk",
            "5",
            "--longest",
            "1",
            "-q",
        ]
        return (
            CliRunner().invoke(app, [*options, *arguments], input=samples, catch_exceptions=False).stdout.splitlines()
        )

    assert lines() and len(seen) == 2
    assert lines("--no-reread") and not seen
    assert lines("--decoder", "joint") == lines() and seen
    with pytest.raises(M3asrError, match="read segments again"):
        lines("--decoder", "joint", "--no-reread")
