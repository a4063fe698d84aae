"""The joined stages on small models with random weights: order, times, batches, memory, errors, options."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

import m3asr
from m3asr.audio import SAMPLE_RATE, load_audio
from m3asr.decode.arpa import ArpaModel
from m3asr.errors import AudioError, M3asrError, ModelError
from m3asr.segment import SegmentOptions
from m3asr.transcribe import DecodeOptions, Transcriber, UnusableHotword, batches, joined

EXAMPLES = Path(__file__).parent.parent / "examples"
GREEDY = DecodeOptions("greedy")


@pytest.fixture(scope="module")
def transcriber(golden_folders):
    return m3asr.load(golden_folders["3m-moe-80"], threads=1)


@pytest.fixture(scope="module")
def speech():
    return load_audio(EXAMPLES / "goforward.flac")


@pytest.fixture(scope="module")
def long_recording(speech):
    """A minute: the same words five times, with a pause of another length before each."""
    other = load_audio(EXAMPLES / "librivox-0880.flac")
    parts, places, at = [], [], 0
    for i, clip in enumerate([speech, other, speech, other, speech]):
        gap = np.zeros(SAMPLE_RATE * (5 + 2 * i), np.float32)
        parts += [gap, clip]
        places.append(((at + len(gap)) / SAMPLE_RATE, (at + len(gap) + len(clip)) / SAMPLE_RATE))
        at += len(gap) + len(clip)
    return np.concatenate(parts), places


@pytest.mark.parametrize("decoder", [None, "greedy", "beam", "rescoring", "joint", "attention"])
def test_what_made_it_is_said(transcriber, speech, decoder):
    transcript = transcriber.transcribe(speech, options=DecodeOptions(decoder))
    assert (transcript.model, transcript.engine, transcript.device) == ("3m-moe-80", "onnx", transcriber.engine.device)
    assert transcript.decoder == (decoder or "joint")
    assert transcript.duration == len(speech) / SAMPLE_RATE
    if decoder != "attention":
        (segment,) = transcript.segments
        assert segment.text == transcript.text and (segment.start, segment.end) == (0.0, transcript.duration)
        assert "".join(word.text for word in segment.words) == transcript.text.replace(" ", "")
        assert all(0 <= a.start <= a.end <= b.end for a, b in zip(segment.words, segment.words[1:], strict=False))


def test_each_way_to_give_audio(transcriber, speech, tmp_path):
    path = EXAMPLES / "goforward.flac"
    expected = transcriber.transcribe(path)
    assert expected.text and expected.name == "goforward.flac"
    assert transcriber.transcribe(str(path)).text == expected.text
    assert transcriber.transcribe(path.read_bytes()).text == expected.text
    assert transcriber.transcribe(speech).text == expected.text
    assert transcriber.transcribe((speech * 32768).astype(np.int16), SAMPLE_RATE, "mine").name == "mine"
    with open(path, "rb") as file:
        assert transcriber.transcribe(file).text == expected.text


@pytest.mark.parametrize("samples", [0, 1, 80, 399, 400, 1000])
def test_too_short_for_words(transcriber, samples):
    for waveform in (np.zeros(samples, np.float32), np.full(samples, 0.1, np.float32)):
        transcript = transcriber.transcribe(waveform)
        assert transcript.text == "" and transcript.segments == []
        assert transcript.duration == samples / SAMPLE_RATE


def test_too_short_for_a_frame_without_speech_detection(transcriber):
    for samples in (0, 1, 80, 399, 400, 900):
        options = SegmentOptions(vad=False)
        transcript = transcriber.transcribe(np.full(samples, 0.1, np.float32), segmentation=options)
        assert transcript.text == ""


def test_silence_and_noise_give_no_text_however_long(transcriber):
    noise = np.random.default_rng(0).normal(0, 0.05, 40 * SAMPLE_RATE).astype(np.float32)
    for waveform in (np.zeros_like(noise), noise, noise[: 3 * SAMPLE_RATE]):
        assert transcriber.transcribe(waveform).text == ""
    # The detector is what keeps it out: the random weights would say something.
    assert transcriber.transcribe(noise[: 3 * SAMPLE_RATE], segmentation=SegmentOptions(vad=False)).text


def test_long_audio_has_the_text_and_times_of_its_segments(transcriber, long_recording):
    waveform, places = long_recording
    transcript = transcriber.transcribe(waveform, options=GREEDY)
    assert len(transcript.segments) == len(places)
    assert transcript.text == joined(segment.text for segment in transcript.segments)
    for segment, (start, end) in zip(transcript.segments, places, strict=True):
        assert start - 0.25 < segment.start < segment.end < end + 0.3
        assert all(segment.start <= word.start <= word.end <= segment.end for word in segment.words)
        # The same samples alone give the same text, whatever they shared a batch with.
        first, last = (round(time * SAMPLE_RATE) for time in (segment.start, segment.end))
        assert transcriber.transcribe(waveform[first:last], options=GREEDY).text == segment.text


def test_order_and_text_do_not_depend_on_company(transcriber, speech, long_recording, monkeypatch):
    """Short and long ones mixed, enough for several pools."""
    monkeypatch.setattr(transcriber, "batch_frames", 700)
    clips = [
        ("short", speech),
        ("long", long_recording[0]),
        ("empty", speech[:0]),
        ("half", speech[: len(speech) // 2]),
    ]
    alone = {name: transcriber.transcribe(clip, options=GREEDY).text for name, clip in clips}
    many = [(f"{name} {i}", clip) for i in range(5) for name, clip in clips]
    seconds = []
    transcripts = list(transcriber.transcribe_each(iter(many), GREEDY, progress=seconds.append))
    assert [transcript.name for transcript in transcripts] == [name for name, _ in many]
    assert all(transcript.text == alone[transcript.name.split()[0]] for transcript in transcripts)
    assert sum(seconds) == pytest.approx(sum(len(clip) for _, clip in many) / SAMPLE_RATE)
    assert all(s >= 0 for s in seconds)


def test_recordings_are_asked_for_when_their_turn_comes(transcriber, speech, monkeypatch):
    asked = 0
    monkeypatch.setattr(transcriber, "batch_frames", 200)

    def recordings():
        nonlocal asked
        for i in range(50):
            asked += 1
            yield str(i), speech

    transcripts = transcriber.transcribe_each(recordings(), GREEDY)
    assert asked == 0
    next(transcripts)
    assert asked <= 10
    transcripts.close()
    assert asked <= 10


def test_a_bad_recording_does_not_stop_the_others(transcriber, speech, tmp_path):
    (tmp_path / "empty.wav").touch()
    late = np.tile(speech, 40)  # broken after its first segments are on their way
    late[-1000] = np.nan
    soundfile.write(tmp_path / "late.wav", late, SAMPLE_RATE, "FLOAT")
    recordings = [
        ("a", speech),
        ("empty", tmp_path / "empty.wav"),
        ("missing", tmp_path / "missing.wav"),
        ("late", tmp_path / "late.wav"),
        ("b", speech),
    ]
    complaints = []
    transcripts = list(
        transcriber.transcribe_each(
            recordings, GREEDY, failed=lambda name, error: complaints.append((name, str(error)))
        )
    )
    assert [transcript.name for transcript in transcripts] == ["a", "b"]
    assert transcripts[0].text == transcripts[1].text != ""
    assert [name for name, _ in complaints] == ["empty", "missing", "late"]
    assert "0 bytes" in complaints[0][1] and "no such file" in complaints[1][1] and "NaN" in complaints[2][1]
    with pytest.raises(AudioError, match="0 bytes"):
        list(transcriber.transcribe_each(recordings, GREEDY))


def test_nbest(transcriber, speech):
    (segment,) = transcriber.transcribe(speech, options=DecodeOptions("rescoring", nbest=4)).segments
    assert len(segment.nbest) == 4 and segment.nbest[0].text == segment.text
    scores = [alternative.score for alternative in segment.nbest]
    assert scores == sorted(scores, reverse=True) and scores[0] == segment.score
    assert len({tuple(alternative.tokens) for alternative in segment.nbest}) == 4
    assert transcriber.transcribe(speech).segments[0].nbest == []


def test_hotwords_change_the_text(transcriber, speech):
    plain = transcriber.transcribe(speech, options=DecodeOptions("beam"))
    symbols = transcriber.folder.tokenizer.symbols
    # A token that is near the top somewhere and not in the text, found in the n-best list.
    nbest = transcriber.transcribe(speech, options=DecodeOptions("beam", nbest=10)).segments[0].nbest
    wanted = next(t for other in nbest for t in other.tokens if t not in plain.segments[0].tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        favoured = transcriber.transcribe(
            speech, options=DecodeOptions("beam", hotwords=(symbols[wanted],), hotword_score=20.0)
        )
    assert wanted in favoured.segments[0].tokens


def test_an_unusable_hotword_is_told_once(transcriber, speech):
    options = DecodeOptions("beam", hotwords=("\U0001f600", " "), hotword_score=1.5)
    with pytest.warns(UnusableHotword, match="\U0001f600") as told:
        assert (
            transcriber.transcribe(speech, options=options).text
            == transcriber.transcribe(speech, options=DecodeOptions("beam")).text
        )
    assert len([w for w in told if w.category is UnusableHotword]) == 1


def test_blank_penalty_gives_more_tokens(transcriber, speech):
    counts = [
        len(transcriber.transcribe(speech, options=DecodeOptions(decoder, blank_penalty=p)).text)
        for decoder in ("greedy", "beam")
        for p in (-6.0, 0.0)
    ]
    assert counts[0] < counts[1] and counts[2] < counts[3]


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ({"decoder": "magic"}, "magic"),
        ({"beam_size": 0}, "beam size"),
        ({"nbest": 11}, "nbest"),
        ({"nbest": 2, "decoder": "greedy"}, "one hypothesis"),
        ({"ctc_weight": 1.5}, "ctc_weight"),
        ({"blank_penalty": float("nan")}, "blank_penalty"),
        ({"hotwords": ("a",), "decoder": "greedy"}, "hotwords"),
        ({"hotwords": "a,b"}, "hotwords"),
        ({"lm": "x.arpa", "decoder": "attention"}, "lm"),
        ({"lm_weight": 0.2, "decoder": "greedy"}, "lm_weight"),
        ({"lm_unit": "letter"}, "lm_unit"),
        ({"blank_penalty": 1.0, "decoder": "attention"}, "blank"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(bad, what):
    with pytest.raises(M3asrError, match=what):
        DecodeOptions(**bad)


def test_what_cannot_be_done_is_said_before_anything_is_read(transcriber, tmp_path):
    def recordings():
        raise AssertionError("read too early")
        yield

    with pytest.raises(M3asrError):
        list(transcriber.transcribe_each(recordings(), DecodeOptions("beam", lm=str(tmp_path / "missing.arpa"))))

    folder = replace(transcriber.folder, config=replace(transcriber.folder.config, decoder=None))
    for decoder in ("rescoring", "joint", "attention"):
        with pytest.raises(ModelError, match="attention decoder"):
            list(Transcriber(folder, transcriber.engine).transcribe_each(recordings(), DecodeOptions(decoder)))


def test_a_language_model_changes_the_text(transcriber, speech, tmp_path):
    symbols = transcriber.folder.tokenizer.symbols
    tokens = transcriber.transcribe(speech, options=DecodeOptions("beam")).segments[0].tokens
    rare = symbols[tokens[0]]
    entries = [("-1.5", "<unk>"), ("-99", "<s>"), ("-1.5", "</s>"), ("-6", rare)]
    entries += [("-1.5", symbol) for symbol in symbols[2:] if symbol not in (rare, "<sos/eos>")]
    unigrams = "".join(f"{score}\t{entry}\t0\n" for score, entry in entries)
    arpa = f"\\data\\\nngram 1={len(entries)}\nngram 2=1\n\n\\1-grams:\n{unigrams}\n"
    arpa += f"\\2-grams:\n-6\t<s> {rare}\n\n\\end\\\n"
    (tmp_path / "lm.arpa").write_text(arpa, encoding="utf-8")
    options = DecodeOptions("beam", lm=str(tmp_path / "lm.arpa"), lm_weight=1.0, lm_bonus=3.5, lm_unit="token")
    assert transcriber.transcribe(speech, options=options).segments[0].tokens.count(tokens[0]) < tokens.count(tokens[0])


def test_batches_hold_everything_once_and_no_more_than_the_limit():
    random = np.random.default_rng(0)
    for _ in range(50):
        frames = random.integers(0, 3000, random.integers(0, 60)).tolist()
        groups = list(batches(frames, 5000))
        assert sorted(i for group in groups for i in group) == list(range(len(frames)))
        assert all(max(frames[i] for i in group) * len(group) <= 5000 or len(group) == 1 for group in groups)


def test_texts_are_joined_as_their_script_is_written():
    assert joined(["a b", "", "c"]) == "a b c"
    assert joined(["你好", "世界", "ok", "好"]) == "你好世界 ok 好"
    assert joined(["人々", "の", "ラーメン", "屋"]) == "人々のラーメン屋"
    assert joined([]) == ""


def test_a_transcript_is_plain_json(transcriber, speech):
    from m3asr.formats import formatted

    transcript = transcriber.transcribe(speech, options=DecodeOptions(nbest=2))
    document = json.loads("".join(formatted(transcript, "json")))
    assert document["engine"] == "onnx" and document["decoder"] == "joint" and document["model"] == "3m-moe-80"
    assert len(document["segments"][0]["nbest"]) == 2


def test_a_models_own_language_model_counts_unless_another_or_none_is_asked_for(transcriber, tmp_path):
    arpa = "\\data\\\nngram 1=3\n\n\\1-grams:\n-9\t<unk>\n-99\t<s>\n-1\t</s>\n\n\\end\\\n"
    (tmp_path / "other.arpa").write_text(arpa, encoding="utf-8")
    ArpaModel(tmp_path / "other.arpa").write_packed(tmp_path / "lm.npz")
    model = Transcriber(replace(transcriber.folder, path=tmp_path), transcriber.engine)
    lm = model.scorers(DecodeOptions())[1]
    assert (lm.weight, lm.bonus, lm.unit) == (0.3, 0.5, "word")
    # Beside CTC alone it would drown what was heard.
    beam = model.scorers(DecodeOptions("beam"))[1]
    assert (beam.weight, beam.bonus) == (0.15, 0.25)
    live = model.scorers(DecodeOptions(), "beam")[1]  # the same one, not read once more
    assert live._model is lm._model
    assert (live.weight, live.bonus) == (0.15, 0.25)
    assert model.scorers(DecodeOptions("beam", lm_weight=0.4))[1].weight == 0.4
    assert transcriber.scorers(DecodeOptions()) == (None, None)
    other = {"lm": str(tmp_path / "other.arpa"), "lm_unit": "token"}
    assert model.scorers(DecodeOptions(**other))[1].unit == "token"
    assert model.scorers(DecodeOptions(lm="none"))[1] is None
    # A decoder without a beam does not even read it.
    (tmp_path / "lm.npz").write_text("PK")
    assert model.scorers(DecodeOptions("greedy")) == model.scorers(DecodeOptions("greedy", lm="none")) == (None, None)
    with pytest.raises(ModelError, match="lm.npz"):
        Transcriber(model.folder, model.engine).scorers(DecodeOptions())
