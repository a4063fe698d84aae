"""Whole recordings seen in chunks, as a stream would hear them: the option of `evaluate` and `transcribe`."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import soundfile
from packets import in_packets, noise
from safetensors.numpy import save_file
from streaming_models import EXPORTED

from m3asr.decode import DecodeOptions
from m3asr.engines import load_engine
from m3asr.features import fbank
from m3asr.folder import ModelFolder
from m3asr.segment import SegmentOptions
from m3asr.stream import Stream, StreamOptions
from m3asr.transcribe import Transcriber

LENGTHS = 2.53, 0.07, 0.51, 1.2345, 3.0  # seconds, of odd numbers of frames; the second gives none


@pytest.fixture(scope="module")
def talkative(folder_of, tmp_path_factory) -> ModelFolder:
    """The exported model, changed so that it says something else in every frame, and that attention has a say in it."""
    path = tmp_path_factory.mktemp("talkative") / "model"
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
        (EXPORTED, ("--chunk-size", 10**20), "found 100000000000000000000, expected at most 1048576"),
        (EXPORTED, ("--left-chunks", 2**62, "--chunk-size", 4), "found 4611686018427387904, expected at most 1048576"),
    ],
)
def test_chunks_that_the_model_does_not_have_are_refused(m3, folder_of, recordings, command, variant, arguments, found):
    what = recordings if command == "evaluate" else recordings.parent / "0.wav"
    code, out, err = m3(command, what, "-m", folder_of(variant).path, "-e", "eager", *arguments)
    assert code == 2 and out == "" and f"{arguments[0]}: {found}" in err and len(err.splitlines()) == 1
