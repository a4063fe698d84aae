"""Where recordings are cut: the rule on made-up probabilities, and Silero VAD on real speech, silence and sounds."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3asr.audio import SAMPLE_RATE, load_audio
from m3asr.errors import M3asrError
from m3asr.segment import FRAME, SegmentOptions, speech_segments

EXAMPLES = Path(__file__).parent.parent / "examples"
SECOND = SAMPLE_RATE / FRAME  # frames


class Scripted:
    """A detector that says what it was told, frame by frame, whatever it hears."""

    def __init__(self, probabilities):
        self.rest = list(probabilities)

    def __call__(self, frames):
        now, self.rest = self.rest[: len(frames)], self.rest[len(frames) :]
        return np.array(now + [0.0] * (len(frames) - len(now)), np.float32)


def cut(probabilities, options, extra=0, block=10_000):
    """Segments as (start, end) in samples of a recording with these frames, `extra` samples longer."""
    waveform = np.arange(len(probabilities) * FRAME + extra, dtype=np.float32) / 1e7
    blocks = [waveform[i : i + block] for i in range(0, len(waveform), block)]
    spans = []
    for start, samples in speech_segments(blocks, options, Scripted(probabilities)):
        np.testing.assert_array_equal(samples, waveform[start : start + len(samples)])
        spans.append((start, start + len(samples)))
    return spans


def runs(*pairs):
    """Probabilities: (seconds, probability), ..."""
    return [p for seconds, p in pairs for _ in range(round(seconds * SECOND))]


@pytest.fixture(scope="module")
def clips():
    return [load_audio(EXAMPLES / name) for name in ("goforward.flac", "jfk.flac", "librivox-0880.flac")]


# The rule


def test_short_recordings_stay_whole_if_there_is_speech():
    probabilities = runs((6, 0.0), (0.5, 0.9), (6, 0.0))
    assert cut(probabilities, SegmentOptions(), extra=77) == [(0, len(probabilities) * FRAME + 77)]
    assert cut(runs((6, 0.0), (0.07, 0.9), (6, 0.0)), SegmentOptions()) == []
    assert cut(runs((6, 0.0), (3, 0.75), (6, 0.0)), SegmentOptions()) == [], "not sure enough in a short one"
    assert list(speech_segments([], SegmentOptions(), Scripted([]))) == []


def test_long_recordings_are_cut_at_pauses_with_padding():
    probabilities = runs((5, 0.0), (2, 0.9), (0.3, 0.0), (2, 0.9), (8, 0.0), (1, 0.9), (5, 0.0))
    (first, second) = cut(probabilities, SegmentOptions())
    frames = [i for i, p in enumerate(probabilities) if p]
    gap = next(i for i in range(1, len(frames)) if frames[i] - frames[i - 1] > SECOND)
    padding = int(0.2 * SAMPLE_RATE)
    assert first == (frames[0] * FRAME - padding, (frames[gap - 1] + 1) * FRAME + padding)
    assert second == (frames[gap] * FRAME - padding, (frames[-1] + 1) * FRAME + padding)


def test_padding_stays_inside_the_recording():
    probabilities = runs((1, 0.9), (21, 0.0), (1, 0.9))
    (_, _), (_, end) = spans = cut(probabilities, SegmentOptions(padding=0.4), extra=100)
    assert spans[0][0] == 0 and end == len(probabilities) * FRAME + 100


def test_a_blip_is_noise_but_its_neighbours_are_not():
    probabilities = runs((10, 0.0), (0.1, 0.99), (3, 0.0), (0.2, 0.55), (10, 0.0))
    spans = cut(probabilities, SegmentOptions())
    assert len(spans) == 1 and spans[0][0] > 12.8 * SAMPLE_RATE


def test_speech_goes_on_a_little_below_the_threshold():
    pauses = (15, 0.0), (0.7, 0.4)
    (alone,) = cut(runs(pauses[0], (0.3, 0.9), (15, 0.0)), SegmentOptions())
    (longer,) = cut(runs(pauses[0], (0.3, 0.9), pauses[1], (15, 0.0)), SegmentOptions())
    (before,) = cut(runs(pauses[0], pauses[1], (0.3, 0.9), (15, 0.0)), SegmentOptions())
    assert longer[1] - longer[0] == alone[1] - alone[0] + round(0.7 * SECOND) * FRAME
    assert before[1] - before[0] == alone[1] - alone[0]


def test_endless_speech_is_cut_where_it_is_least_like_speech():
    options = SegmentOptions(max_seconds=10)
    probabilities = runs((7, 0.95), (0.3, 0.55), (8, 0.95), (0.3, 0.55), (7, 0.95))
    spans = cut(probabilities, options)
    assert spans[0][0] == 0 and spans[-1][1] == len(probabilities) * FRAME
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False)), "nothing is lost between the pieces"
    for (_, end), place in zip(spans, (7.15, 15.45), strict=False):
        assert abs(end / SAMPLE_RATE - place) < 0.2


def test_without_detection_all_of_it_is_kept_and_cut_where_it_is_quiet():
    random = np.random.default_rng(0)
    waveform = random.normal(0, 0.1, 60 * SAMPLE_RATE).astype(np.float32)
    pauses = [12.0, 26.0, 43.0]
    for pause in pauses:
        waveform[int((pause - 0.2) * SAMPLE_RATE) : int((pause + 0.2) * SAMPLE_RATE)] *= 0.01
    pieces = list(speech_segments([waveform], SegmentOptions(vad=False, max_seconds=20)))
    np.testing.assert_array_equal(np.concatenate([piece.waveform for piece in pieces]), waveform)
    ends = [(piece.start + len(piece.waveform)) / SAMPLE_RATE for piece in pieces]
    assert abs(ends[0] - 12) < 0.2 and abs(ends[1] - 26) < 0.2 and abs(ends[2] - 43) < 0.2


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_probabilities(data):
    """In order, apart, not too long, no stretch of sure speech lost; and the same in blocks of any size."""
    pairs = data.draw(
        st.lists(st.tuples(st.integers(1, 200), st.sampled_from([0.0, 0.3, 0.45, 0.6, 0.9])), min_size=1, max_size=25)
    )
    probabilities = [p for count, p in pairs for _ in range(count)]
    options = SegmentOptions(
        max_seconds=data.draw(st.sampled_from([1.0, 3.3, 20.0])),
        min_silence=data.draw(st.sampled_from([0.0, 0.1, 0.5])),
        padding=data.draw(st.sampled_from([0.0, 0.2, 1.0])),
    )
    extra = data.draw(st.integers(0, FRAME - 1))
    spans = cut(probabilities, options, extra)
    total = len(probabilities) * FRAME + extra
    assert all(0 <= start < end <= total for start, end in spans)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    if total <= options.max_seconds * SAMPLE_RATE:
        assert spans in ([], [(0, total)])
    else:
        assert all(end - start <= (options.max_seconds + 2 * options.padding) * SAMPLE_RATE for start, end in spans)
    first = 0
    for count, p in pairs:
        needed = options.sure if total <= options.max_seconds * SAMPLE_RATE else options.threshold
        if p >= needed and count * FRAME >= (options.min_speech + 0.04) * SAMPLE_RATE:
            covered = sum(max(0, min(end, (first + count) * FRAME) - max(start, first * FRAME)) for start, end in spans)
            assert covered == count * FRAME, (first, count, spans)
        first += count
    assert cut(probabilities, options, extra, block=data.draw(st.integers(100, 50_000))) == spans


def test_memory_does_not_grow_with_the_recording():
    def blocks(hours):
        for _ in range(hours * 120):
            yield np.zeros(30 * SAMPLE_RATE, np.float32)

    def peak(hours):
        tracemalloc.start()
        detector = lambda frames: (np.arange(len(frames)) % 100 < 70).astype(np.float32)  # noqa: E731
        count = sum(1 for _ in speech_segments(blocks(hours), SegmentOptions(), detector))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count > 100 * hours
        return found

    assert peak(4) < 1.2 * peak(1) < 60e6


@pytest.mark.parametrize(
    "bad", [{"max_seconds": 0.5}, {"max_seconds": float("nan")}, {"padding": -1}, {"threshold": 1.5}], ids=str
)
def test_options_outside_their_range(bad):
    with pytest.raises(M3asrError, match=next(iter(bad))):
        SegmentOptions(**bad)


# Silero VAD


@pytest.mark.parametrize("gain", [1.0, 0.03, 0.0005])
def test_speech_is_found_at_any_level(clips, gain):
    for clip in clips:
        (speech,) = speech_segments([clip * np.float32(gain)])
        assert speech.start == 0 and len(speech.waveform) == len(clip)


def places(waveform):
    return [(start, start + len(samples)) for start, samples in speech_segments([waveform])]


@pytest.mark.parametrize("offset", [0.1, -0.3, 0.5])
def test_speech_beside_an_offset_is_found(clips, offset):
    """As sound cards add it, from the start or from some moment on: it is no loudness, and where speech begins and ends
    stays the same but for a frame."""
    quiet = np.concatenate([0.1 * clip / np.abs(clip).max() for clip in clips * 2]).astype(np.float32)
    for waveform, begin in ((quiet[: 10 * SAMPLE_RATE], 0), (quiet, 0), (quiet, 8 * SAMPLE_RATE)):
        added = waveform.copy()
        added[begin:] += np.float32(offset)
        plain, found = places(waveform), places(added)
        assert len(plain) == len(found) > 0
        np.testing.assert_allclose(found, plain, atol=FRAME)


def test_a_short_word_in_a_long_silence_is_found(clips):
    """Its level is not that of the silence around it: bringing that up would make a rectangle of the word."""
    begin = int(np.abs(clips[1]).argmax()) - SAMPLE_RATE // 4
    word = clips[1][begin : begin + SAMPLE_RATE // 2]
    for gain in (1.0, 0.01):
        waveform = np.zeros(30 * SAMPLE_RATE, np.float32)
        waveform[12 * SAMPLE_RATE :][: len(word)] = word * gain
        (speech,) = speech_segments([waveform])
        assert 11.5 * SAMPLE_RATE < speech.start < 12.3 * SAMPLE_RATE


def sounds():
    random = np.random.default_rng(3)
    t = np.arange(30 * SAMPLE_RATE) / SAMPLE_RATE
    yield "zeros", np.zeros_like(t)
    for level in (1e-4, 0.01, 0.3):
        yield f"noise {level}", random.normal(0, level, len(t))
    for pitch in (50, 440, 3000):
        yield f"tone {pitch}", 0.3 * np.sin(2 * np.pi * pitch * t)
    yield "chord", 0.1 * sum(np.sin(2 * np.pi * pitch * t) for pitch in (220, 277, 330))
    yield "clicks", (random.random(len(t)) < 2e-4) * 0.9
    yield "hum", np.clip(0.5 * np.sin(2 * np.pi * 50 * t), -0.2, 0.2) + random.normal(0, 0.005, len(t))


@pytest.mark.parametrize("sound", list(sounds()), ids=lambda sound: sound[0])
@pytest.mark.parametrize("seconds", [0.005, 3, 30])
def test_no_speech_in_other_sounds(sound, seconds):
    assert not list(speech_segments([sound[1][: round(seconds * SAMPLE_RATE)].astype(np.float32)]))


def test_each_clip_is_found_where_it_was_put(clips):
    places, parts, at = [], [], 0
    for clip in clips * 2:
        gap = np.zeros(round(3.37 * SAMPLE_RATE), np.float32)
        parts += [gap, clip]
        places.append((at + len(gap), at + len(gap) + len(clip)))
        at += len(gap) + len(clip)
    found = list(speech_segments([np.concatenate(parts)]))
    for start, end in places:
        inside = [s for s in found if s.start < end and s.start + len(s.waveform) > start]
        first, last = inside[0].start, inside[-1].start + len(inside[-1].waveform)
        assert start - 0.25 * SAMPLE_RATE < first < start + 0.6 * SAMPLE_RATE
        assert end - 0.8 * SAMPLE_RATE < last < end + 0.5 * SAMPLE_RATE
    spans = [(s.start, s.start + len(s.waveform)) for s in found]
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
