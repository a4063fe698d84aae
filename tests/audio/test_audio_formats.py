"""Kinds of files, rates and channels: what libsndfile reads, and what PyAV reads."""

import io
import sys

import av
import numpy as np
import pytest
import soundfile as sf
from sounds import encoded, error_ratio, muxed, tone

from m3asr.audio import load_audio, read_blocks
from m3asr.errors import AudioError, MissingExtra

# --- files that libsndfile reads ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "tolerance"),
    [
        ({"subtype": "PCM_16"}, 1e-4),
        ({"subtype": "PCM_U8"}, 2.5e-2),
        ({"subtype": "PCM_24"}, 1e-6),
        ({"subtype": "DOUBLE"}, 0),
        ({"subtype": "ULAW"}, 2e-2),
        ({"format": "FLAC"}, 1e-4),
        ({"format": "AIFF"}, 1e-4),
        ({"format": "OGG", "subtype": "VORBIS"}, 5e-2),
        ({"format": "OGG", "subtype": "OPUS"}, 5e-2),
        ({"format": "MP3"}, 5e-2),
    ],
    ids=str,
)
def test_formats(kinds, tolerance):
    want = tone()
    got = load_audio(encoded(want, **kinds))
    assert got.dtype == np.float32 and got.ndim == 1
    assert abs(len(got) - 16000) <= 1152  # mp3 pads to its frame
    if kinds.get("format") == "OGG":  # opus rounds the start a little
        spectrum = np.abs(np.fft.rfft(got[:16000]))
        assert abs(spectrum.argmax() * 16000 / 16000 - 440) <= 1
        assert abs(np.std(got) - np.std(want)) < tolerance * np.std(want)
    else:
        assert error_ratio(got, want) <= tolerance


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_rates(rate):
    got = load_audio(encoded(tone(rate), rate, subtype="FLOAT"))
    assert len(got) == 16000
    assert error_ratio(got[1000:-1000], tone()[1000:-1000]) < 1e-3
    np.testing.assert_array_equal(load_audio(tone(rate), rate), got)


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 44100])
@pytest.mark.parametrize(
    "kinds", [{"format": "MP3"}, {"format": "OGG", "subtype": "VORBIS"}, {"format": "FLAC"}], ids=str
)
def test_reading_in_pieces_loses_nothing(rate, kinds):
    """mp3 frames share bits: a decoder that is moved between reads gives clicks."""
    data = encoded(tone(rate, 4) + tone(rate, 4, 1234), rate, **kinds)
    at_once, _ = sf.read(io.BytesIO(data), dtype="float32")
    np.testing.assert_allclose(load_audio(data), load_audio(at_once, rate), rtol=0, atol=1e-6)


def test_resampling_leaves_no_alias():
    assert np.abs(load_audio(tone(48000, hertz=11000), 48000)[500:-500]).max() < 1e-4


@pytest.mark.parametrize("milliseconds", [0, 1, 5])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_very_short(milliseconds, rate):
    got = load_audio(encoded(tone(rate, milliseconds / 1000), rate))
    assert abs(len(got) - 16 * milliseconds) <= 1
    assert load_audio(np.zeros(0), rate).shape == load_audio(encoded(np.zeros((0, 2)), rate)).shape == (0,)


# --- channels -----------------------------------------------------------------------------------------------------


def test_stereo_is_the_mean_of_what_sounds():
    left, right = tone(hertz=300), tone(hertz=700)
    both = np.stack([left, right], 1)
    np.testing.assert_allclose(load_audio(both), (left + right) / 2, atol=1e-7)
    np.testing.assert_allclose(load_audio(encoded(both, subtype="FLOAT")), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("silent", [0, 1])
@pytest.mark.parametrize("level", [0, 3e-5])
def test_a_silent_channel_does_not_matter(silent, level):
    sound, silence = tone(48000), np.full(48000, level, np.float32)
    stereo = np.stack([silence, sound] if silent == 0 else [sound, silence], 1)
    alone = load_audio(sound, 48000)
    np.testing.assert_array_equal(load_audio(stereo, 48000), alone)
    np.testing.assert_array_equal(load_audio(encoded(stereo, 48000, subtype="FLOAT")), alone)
    assert np.std(load_audio(muxed("ipod", "aac", stereo.T))) == pytest.approx(np.std(alone), rel=0.02)


def test_a_channel_that_speaks_late_is_heard():
    early, late = tone(seconds=4), tone(seconds=4, hertz=900)
    early[32000:], late[:32000] = 0, 0
    np.testing.assert_allclose(
        load_audio(encoded(np.stack([early, late], 1), subtype="FLOAT")), (early + late) / 2, atol=1e-7
    )
    assert not load_audio(np.zeros((100, 2))).any()


# --- PyAV ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "codec", "picture"),
    [
        ("ipod", "aac", False),
        ("adts", "aac", False),
        ("webm", "libopus", False),
        ("matroska", "aac", True),
        ("mp4", "aac", True),
        ("mov", "pcm_s16le", False),
        ("avi", "mp2", True),
        ("mpegts", "aac", False),
        ("flv", "aac", False),
    ],
)
def test_containers(container, codec, picture):
    want = tone(48000)
    data = muxed(container, codec, np.stack([want, want]), picture=picture)
    got = load_audio(data)
    assert abs(len(got) - 16000) <= 2 * 2048 / 3  # a codec's padding at either end
    assert np.std(got[2000:14000]) == pytest.approx(np.std(want), rel=0.05)
    spectrum = np.abs(np.fft.rfft(got[2000:14000] * np.hanning(12000)))
    assert abs(spectrum.argmax() * 16000 / 12000 - 440) < 2
    np.testing.assert_array_equal(np.concatenate(list(read_blocks(data, 0.1))), got)


def test_a_silent_film():
    with pytest.raises(AudioError, match="no sound"):
        load_audio(muxed("mp4", None, picture=True))


@pytest.mark.parametrize("channels", [6, 8, 16])
def test_many_channels(channels):
    """PyAV reads past the planes of a frame of more than 8 channels, so such a stream must not reach that code."""
    layout = {6: "5.1", 8: "7.1", 16: "hexadecagonal"}[channels]
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        sound = out.add_stream("pcm_s16le", rate=16000)
        sound.layout = layout
        samples = (np.repeat(tone()[:, None], channels, 1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=layout)
        frame.rate, frame.pts = 16000, 0
        out.mux([*sound.encode(frame), *sound.encode()])
    if channels > 8:
        with pytest.raises(AudioError, match="16 channels where 8 are the most"):
            load_audio(file.getvalue())
    else:
        np.testing.assert_allclose(load_audio(file.getvalue()), tone(), atol=1e-4)


def test_without_pyav(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(load_audio(encoded(tone(), format="MP3"))) == 16000
    with pytest.raises(MissingExtra, match=r"MP4 or M4A.*pip install 'm3asr\[media\]'"):
        load_audio(muxed("ipod", "aac", tone(48000)[None]))
    with pytest.raises(AudioError, match="not audio"):
        load_audio(b"nothing to hear here" * 99)
    with pytest.raises(AudioError, match=r"Ogg but is damaged.*m3asr\[media\]"):
        load_audio(encoded(tone(), format="OGG", subtype="VORBIS")[:300])


def test_playlists_are_never_followed(tmp_path):
    """FFmpeg would open what a playlist names; a server must not read its own files for a stranger."""
    (tmp_path / "secret.wav").write_bytes(encoded(tone()))
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n",
    ):
        (tmp_path / "list.mp4").write_text(text)
        for source in (text.encode(), tmp_path / "list.mp4"):
            with pytest.raises(AudioError, match="not audio"):
                load_audio(source)
