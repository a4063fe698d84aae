"""`inspect` shows the choices that the experts were called with, counts them right, and draws them in their place."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from golden import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from m3asr import ops
from m3asr.audio import SAMPLE_RATE, load_audio
from m3asr.checkpoint import read_checkpoint
from m3asr.convert import write_model_folder
from m3asr.decode import Word
from m3asr.engines import load_engine
from m3asr.errors import AudioError, ModelError
from m3asr.folder import ModelFolder
from m3asr.routing import LayerLoad, RoutedRecording, Stretch, loads, route_recording, summary_line
from m3asr.segment import SegmentOptions
from m3asr.transcribe import Transcriber

EXAMPLES = Path(__file__).parent.parent / "examples"
ONE, TWO = EXAMPLES / "goforward.flac", EXAMPLES / "jfk.flac"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Golden checkpoints as model folders, without the onnx engine, which takes long to build."""
    root = tmp_path_factory.mktemp("models")
    for name in ("3m-moe-80", "3m-dense-80"):
        write_model_folder(read_checkpoint(GOLDEN / name), root / name, onnx=False)
    return root


@pytest.fixture(scope="module")
def folder(folders):
    return ModelFolder.read(folders / "3m-moe-80")


@pytest.fixture(scope="module")
def transcriber(folder):
    return Transcriber(folder, load_engine(folder, "eager"))


def made(folder, experts, confidence=None, words=(), name="made.wav", start=0.0):
    """A recording of one stretch with the given choices (L, S)."""
    experts = np.asarray(experts, np.int16)
    sure = np.full(experts.shape, 0.5, np.float32) if confidence is None else np.asarray(confidence, np.float32)
    seconds = experts.shape[1] * 0.04
    stretch = Stretch(start, seconds, "text", list(words), experts, sure, np.ones(experts.shape[1], np.float32))
    return RoutedRecording(name, start + seconds, [stretch])


def test_the_experts_that_were_called(folder, transcriber, monkeypatch):
    route, routed = ops.route, []

    def recorded(logits):
        routed.append(route(logits))
        return routed[-1]

    monkeypatch.setattr(ops, "route", recorded)
    waveform = load_audio(ONE)
    found = route_recording(transcriber, ONE, "one")
    (stretch,) = found.stretches
    calls, routed[:] = list(routed), []
    features = folder.features(waveform)[None]
    _, _, lengths = transcriber.engine(features, np.array([features.shape[1]], np.int32))
    blocks = folder.config.encoder.num_blocks
    assert len(calls) == len(routed) == blocks and found.frames == lengths[0] and found.seconds == len(waveform) / 16000
    gates, chosen = (np.stack([call[i].numpy() for call in routed]) for i in (0, 1))
    assert np.array_equal(stretch.experts, chosen) and len(np.unique(chosen)) > 1
    assert np.allclose(stretch.confidence, gates, rtol=1e-6) and stretch.confidence.min() >= 0.25
    assert stretch.loudness.shape == lengths and stretch.loudness.max() <= np.abs(waveform).max()


def test_a_long_recording_is_cut_and_its_frames_stand_in_their_time(transcriber):
    whole = route_recording(transcriber, TWO, "two", segmentation=SegmentOptions(max_seconds=20))
    cut = route_recording(transcriber, TWO, "two", segmentation=SegmentOptions(max_seconds=4))
    assert len(whole.stretches) == 1 < len(cut.stretches) and whole.seconds == cut.seconds == 11.0
    ends = [stretch.start + stretch.experts.shape[1] * 0.04 for stretch in cut.stretches]
    assert all(end <= after.start + 1e-6 for end, after in zip(ends, cut.stretches[1:], strict=False))
    assert all(stretch.experts.shape == stretch.confidence.shape for stretch in cut.stretches)


@pytest.mark.parametrize("samples", [0, 1, 399, 700, SAMPLE_RATE])
def test_too_short_and_silent(transcriber, tmp_path, samples):
    soundfile.write(tmp_path / "silent.wav", np.zeros(samples), SAMPLE_RATE)
    found = route_recording(transcriber, tmp_path / "silent.wav", "x")
    assert found.stretches == [] and found.frames == 0 and found.seconds == samples / SAMPLE_RATE
    with pytest.raises(ModelError, match="no speech"):
        loads(transcriber.folder.config, [found])
    unheard = SegmentOptions(vad=False)
    assert route_recording(transcriber, tmp_path / "silent.wav", "x", segmentation=unheard).frames == max(
        ((samples - 400) // 160 + 1 - 3) // 4, 0
    )


def test_what_is_no_recording_or_has_no_experts(transcriber, folders, tmp_path):
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(AudioError):
        route_recording(transcriber, tmp_path / "text.wav", "x")
    dense = ModelFolder.read(folders / "3m-dense-80")
    with pytest.raises(ModelError, match="dense"):
        route_recording(Transcriber(dense, load_engine(dense, "eager")), ONE, "x")


def test_loads_by_hand(folder):
    assert (folder.config.encoder.num_blocks, folder.config.encoder.moe.num_experts) == (2, 4)
    # Even, and everything to one expert, in two recordings.
    chosen = [[0, 1, 2, 3, 0, 1, 2, 3], [2] * 8]
    first = made(folder, [row[:3] for row in chosen], [[0.2, 0.4, 0.6], [1, 1, 1]])
    second = made(folder, [row[3:] for row in chosen], [[0.8] * 5, [1] * 5])
    even, one = loads(folder.config, [first, second])
    assert even.shares == [0.25] * 4 and even.entropy == pytest.approx(1) and even.unused == []
    assert one.shares == [0, 0, 1, 0] and one.entropy == 0 and str(one.entropy) == "0.0" and one.unused == [0, 1, 3]
    uneven, _ = loads(folder.config, [made(folder, [[1, 1, 1, 1, 1, 1, 3, 3]] * 2)])
    two = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)
    assert uneven.shares == [0, 0.75, 0, 0.25] and uneven.entropy == pytest.approx(two) and uneven.unused == [0, 2]
    assert even.confidence == pytest.approx(0.65) and even.percentiles[50] == pytest.approx(0.8)
    assert (even.percentiles[10], one.percentiles[5]) == (pytest.approx(0.34), 1) and even.frames == 8
    assert [layer.path for layer in (even, one)] == [f"encoder.blocks.{i}.feed_forward" for i in (0, 1)]
    json.dumps([layer.as_dict() for layer in (even, one, uneven)], allow_nan=False)
    line = summary_line([even, one, uneven])
    assert "0.00-1.00 of 1" in line and "0.0-100.0 %" in line and "25.0 %" in line and "5 of 12 experts" in line
    assert "no expert is unused" in summary_line([even]) and "1.00 of 1" in summary_line([even])


def test_one_expert_is_an_even_load():
    assert LayerLoad("x", 3, [1.0], 1.0, {}).entropy == 1.0


def test_command(m3, folder, tmp_path):
    decoder = ("--decoder", "rescoring")  # of the random model's words, joint finds but two
    code, out, err = m3("inspect", folder.path, ONE, TWO, *decoder, "--json", tmp_path / "all.json")
    lines = out.splitlines()
    assert (
        code == 0
        and err == ""
        and "frames of 2 recordings," in lines[0]
        and lines[-1].startswith("load entropy per layer")
    )
    report = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    one, two = report["recordings"]
    assert [one["name"], two["name"]] == ["goforward.flac", "jfk.flac"] and report["summary"] == lines[-1]
    assert report["frames"] == one["frames"] + two["frames"] > 100 and f"{report['frames']} frames" in lines[0]
    for i, layer in enumerate(report["layers"]):
        chosen = np.concatenate([stretch["experts"][i] for r in (one, two) for stretch in r["stretches"]])
        assert layer["shares"] == pytest.approx((np.bincount(chosen, minlength=4) / len(chosen)).tolist())
        assert layer["smallest"] == min(layer["shares"]) and layer["largest"] == max(layer["shares"])
        assert f"{layer['entropy']:.3f}" in out
    # The words are those of `transcribe`, at their times.
    transcript = json.loads(m3("transcribe", "-m", folder.path, "-e", "eager", "-f", "json", *decoder, TWO)[1])
    words = [(word["text"], word["start"]) for s in transcript["segments"] for word in s["words"]]
    found = [(word["text"], word["start"]) for s in two["stretches"] for word in s["words"]]
    assert [text for text, _ in found] == [text for text, _ in words] and len(found) > 3
    assert np.allclose([start for _, start in found], [start for _, start in words], atol=2e-3)
    assert m3("inspect", "-m", folder.path, ONE, TWO, *decoder)[1] == out


def test_the_shipped_model(m3, tmp_path):
    config = ModelFolder.read().config
    code, out, _ = m3("inspect", ONE, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert code == 0 and report["experts"] == config.encoder.moe.num_experts
    assert len(report["layers"]) == config.encoder.num_blocks and "frames of 1 recording," in out.splitlines()[0]
    for layer in report["layers"]:
        assert sum(layer["shares"]) == pytest.approx(1) and 0 < layer["entropy"] <= 1 + 1e-9
        assert list(layer["percentiles"].values()) == sorted(layer["percentiles"].values())


def test_one_bad_recording_among_several(m3, folder, tmp_path):
    (tmp_path / "text.wav").write_text("hello")
    code, out, err = m3("inspect", folder.path, tmp_path / "text.wav", ONE, tmp_path / "missing.wav")
    assert code == 2 and "frames of 1 recording," in out and len(err.splitlines()) == 2 and "no such file" in err
    code, out, err = m3("inspect", folder.path, tmp_path / "text.wav", "--json", tmp_path / "report.json")
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], "name recordings"),
        (["SILENT"], "no speech is found"),
        ([ONE, "--json", "/nonexistent/report.json"], "cannot be written"),
        (["told-before-this-is-missed.wav", "--json", "/"], "is a directory"),
        ([ONE, "--plot", "/nonexistent/picture.png"], "cannot be written"),
        ([ONE, "--max-seconds", "0.1"], "max_seconds"),
    ],
)
def test_bad_input(m3, folder, tmp_path, arguments, found):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    soundfile.write(tmp_path / "silent.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    arguments = [tmp_path / "silent.wav" if argument == "SILENT" else argument for argument in arguments]
    code, out, err = m3("inspect", folder.path, *arguments)
    assert code == 2 and out == "" and found in err and len(err.splitlines()) == 1


def test_models_that_have_no_experts_or_are_none(m3, folders, tmp_path):
    code, out, err = m3("inspect", folders / "3m-dense-80", ONE)
    assert code == 2 and out == "" and "the model is dense" in err
    code, out, err = m3("inspect", tmp_path, ONE)
    assert code == 2 and out == "" and "not a model folder" in err


@pytest.mark.parametrize(("missing", "line"), [("torch", "m3asr[torch]"), ("matplotlib", "m3asr[plot]")])
def test_missing_extras(m3, folder, monkeypatch, tmp_path, missing, line):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    code, out, err = m3("inspect", folder.path, ONE, "--plot", tmp_path / "picture.png")
    assert code == 2 and out == "" and f"pip install '{line}'" in err and not list(tmp_path.iterdir())


# The picture


def test_pictures(m3, folder, tmp_path):
    pytest.importorskip("matplotlib")
    assert m3("inspect", folder.path, ONE, TWO, "--plot", tmp_path / "picture.png")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    (tmp_path / "more").mkdir()
    (tmp_path / "pictures").mkdir()
    shutil.copy(TWO, tmp_path / "more" / ONE.name)
    soundfile.write(tmp_path / "silent.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    recordings = ONE, tmp_path / "silent.wav", TWO, tmp_path / "more" / ONE.name
    assert m3("inspect", folder.path, *recordings, "--plot", tmp_path / "pictures")[0] == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert set(written) == {"goforward.flac.png", "goforward.flac-2.png", "jfk.flac.png"}
    assert all(content[:4] == b"\x89PNG" for content in written.values()) and len(set(written.values())) == 3


def test_frames_are_painted_in_their_expert_s_colour_as_high_as_they_are_sure(folder):
    pytest.importorskip("matplotlib")
    from m3asr.routing_plot import STEPS, _image, palette

    colours = palette(4)
    (stretch,) = made(folder, [[0, 3], [1, 1], [2, 0]], [[1.0, 0.5], [0.25, 0.75], [0.0, 1.0]]).stretches
    image = _image(stretch, colours).reshape(3, STEPS + 2, 2, 3)
    for layer, (chosen, sure) in enumerate(zip(stretch.experts, stretch.confidence, strict=True)):
        for frame in range(2):
            column = image[layer, 1:-1, frame]
            solid = (column == colours[chosen[frame]]).all(axis=-1)
            assert solid.sum() == round(STEPS * sure[frame]) and (np.diff(solid.astype(int)) >= 0).all()
    assert (image[:, [0, -1]] == 1).all()


@pytest.mark.parametrize("count", [1, 2, 4, 8, 12, 16, 32])
def test_colours_are_told_apart(count):
    from m3asr.routing_plot import palette

    colours = palette(count)
    assert colours.shape == (count, 3) and colours.min() >= 0 and colours.max() <= 1
    distance = np.linalg.norm(colours[:, None] - colours, axis=-1) + 9 * np.eye(count)
    assert distance.min() > (0.25 if count <= 12 else 0.1)


@given(
    lengths=st.lists(st.floats(0.0, 0.6), max_size=80),
    sizes=st.lists(st.integers(1, 40), min_size=80, max_size=80),
    window=st.sampled_from([(0.0, 12.0), (12.0, 24.0), (0.3, 2.0)]),
)
def test_words_never_touch(lengths, sizes, window):
    from m3asr.routing_plot import LEFT, RIGHT, WIDTH, place_words

    words, at = [], 0.0
    for length, size in zip(lengths, sizes, strict=False):
        words.append(Word("w" * size, at, at + length))
        at += length
    placed = place_words(words, window, lambda text: 0.08 * len(text))
    per_inch = (window[1] - window[0]) / (WIDTH - LEFT - RIGHT)
    inside = [word for word in words if window[0] <= (word.start + word.end) / 2 < window[1]]
    assert [entry[0] for entry in placed] == inside
    for level in {entry[4] for entry in placed} - {None}:
        spans = [
            (middle - half, middle + half)
            for word, _, _, middle, where in placed
            if where == level
            for half in [0.04 * len(word.text) * per_inch]
        ]
        assert all(end < begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
        assert all(begin >= window[0] - 1e-9 for begin, _ in spans)
    if inside:
        assert placed[0][4] == 0


def test_long_recordings_many_experts_and_odd_words(folder, tmp_path):
    """What has no end, no room or no font is drawn as far as it goes, and nobody is warned."""
    pytest.importorskip("matplotlib")
    import dataclasses
    import warnings

    from m3asr.routing_plot import LINE_SECONDS, MOST_LINES, _lines, plot

    encoder = dataclasses.replace(
        folder.config.encoder, moe=dataclasses.replace(folder.config.encoder.moe, num_experts=32)
    )
    config = dataclasses.replace(folder.config, encoder=encoder)
    random = np.random.default_rng(0)
    texts = "$x$", "_y^2", "\u4f60\u597d", "internationalization" * 4, "a\\frac", ""
    words = [Word(texts[i % len(texts)], 5 + i * 0.2, 5.2 + i * 0.2) for i in range(400)]
    long = made(folder, random.integers(0, 32, (2, 2500)), random.random((2, 2500)), words, "$100%_.wav", start=5.0)
    assert _lines(long) == [(5 + i * LINE_SECONDS, 5 + (i + 1) * LINE_SECONDS) for i in range(MOST_LINES)]
    short = made(folder, [[0]] * 2)
    assert _lines(short) == [(0.0, 0.04)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for recording in (long, short):
            plot(recording, loads(config, [recording]), config, tmp_path / "picture.png", "model_$")
            assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ModelError, match="nothing to plot"):
        plot(RoutedRecording("silent.wav", 1.0, []), loads(config, [long]), config, tmp_path / "none.png")
