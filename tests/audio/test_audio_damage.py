"""Garbage, recordings that are cut off, headers and samples that mean nothing."""

import warnings

import numpy as np
import pytest
from sounds import encoded, error_ratio, muxed, tone

from m3asr.audio import DamagedAudio, load_audio, read_blocks
from m3asr.errors import AudioError

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(100)


@pytest.mark.parametrize(
    "garbage",
    [
        bytes(1),
        bytes(5000),
        b"\xff" * 5000,
        PNG,
        b"%PDF-1.7\n" * 20,
        ("hi" * 999).encode("utf-16"),
        "hi".encode("utf-16") * 99,
        b"RIFF",
        b"ID3",
        b"PK\3\4",
    ]
    + [np.random.default_rng(seed).bytes(20000) for seed in range(5)],
    ids=lambda data: repr(data[:6]),
)
def test_garbage(garbage):
    with pytest.raises(AudioError):
        load_audio(garbage)


@pytest.mark.parametrize(
    "data",
    [
        encoded(tone()),
        encoded(tone(), format="FLAC"),
        encoded(tone(), format="MP3"),
        encoded(tone(), format="OGG", subtype="OPUS"),
        encoded(tone(), format="OGG", subtype="VORBIS"),
        muxed("ipod", "aac", tone(48000)[None]),
        muxed("webm", "libopus", tone(48000)[None]),
        muxed("adts", "aac", tone(48000)[None]),
    ],
    ids=["wav", "flac", "mp3", "opus", "vorbis", "m4a", "webm", "aac"],
)
def test_cut_at_every_size_gives_sound_or_one_clear_error(data):
    whole = len(load_audio(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedAudio)
        for size in [*range(1, 100, 9), *range(100, len(data), len(data) // 40)]:
            try:
                got = load_audio(data[:size])
            except AudioError:
                continue
            assert len(got) <= whole + 2048 and np.isfinite(got).all()


@pytest.mark.parametrize("kinds", [{}, {"format": "AIFF"}, {"format": "FLAC"}, {"format": "MP3"}], ids=str)
def test_a_cut_recording_gives_its_start_and_warns(kinds):
    rng = np.random.default_rng(0)
    noise = (0.1 * rng.standard_normal(16000 * 10)).astype(np.float32)
    data = encoded(noise, **kinds)
    whole = load_audio(data)
    with pytest.warns(DamagedAudio, match=r"of 10\.\d s could be decoded|lost sync") as caught:
        got = load_audio(data[: len(data) // 2])
    assert len(caught) == 1
    assert 0.35 * len(whole) < len(got) < 0.55 * len(whole)
    assert error_ratio(got[:-2000], whole) < 0.02
    with pytest.warns(DamagedAudio) as caught:  # also when the search for sound in both channels meets the damage
        stereo = encoded(np.stack([noise, 0 * noise], 1), **kinds)
        load_audio(stereo[: len(stereo) // 2])
    assert len(caught) == 1


def test_headers_of_streams():
    """Programs that write to a pipe do not know the length: 0xFFFFFFFF means 'to the end', and is no damage."""
    data = bytearray(encoded(tone()))
    data[4:8] = data[40:44] = b"\xff" * 4
    np.testing.assert_array_equal(load_audio(data), load_audio(encoded(tone())))
    data[40:44] = bytes(4)  # a recorder that died before it came back to write the length
    with pytest.raises(AudioError, match="interrupted"):
        load_audio(data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(value):
    samples = tone(seconds=3)
    samples[40000] = value
    data = encoded(samples, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"NaN or infinite at 2\.500 s"):
        load_audio(data)
    with pytest.raises(AudioError, match=r"at 2\.500 s"):
        list(read_blocks(data, 1.0))


def test_integers_stored_as_floats():
    with pytest.raises(AudioError, match="full scale"):
        load_audio(encoded(tone() * 32768, subtype="FLOAT"))
    np.testing.assert_allclose(load_audio(encoded(tone(level=1.5), subtype="FLOAT")), tone(level=1.5))
