import io
import os
import subprocess
import sys
import tempfile
import threading
import warnings

import av
import numpy as np
import pytest
import soundfile as sf

from m3asr.audio import DamagedAudio, load_audio, read_blocks
from m3asr.errors import AudioError, MissingExtra


@pytest.fixture(autouse=True)
def no_unexpected_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DamagedAudio)
        yield


def tone(rate=16000, seconds=1.0, hertz=440, level=0.3):
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def encoded(samples, rate=16000, **kinds):
    """The bytes of an audio file that libsndfile writes; samples (N,) or (N, C)."""
    file = io.BytesIO()
    sf.write(file, samples, rate, **({"format": "WAV"} | kinds))
    return file.getvalue()


def muxed(container, codec, samples=None, rate=48000, picture=False):
    """The bytes of a file that PyAV writes, with sound (samples (C, N)), a picture or both."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        video = out.add_stream("mpeg4", rate=25) if picture else None
        if video:
            video.width = video.height = 32
            video.pix_fmt = "yuv420p"
        sound = None
        if samples is not None:
            sound = out.add_stream(codec, rate=rate)
            sound.layout = layout = "mono" if len(samples) == 1 else "stereo"
        if video:
            for _ in range(5):
                out.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
            out.mux(video.encode())
        if sound:
            out.start_encoding()
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
            frame.rate, frame.pts = rate, 0
            queue = av.AudioFifo()
            queue.write(frame)
            while piece := queue.read(sound.codec_context.frame_size or 960, partial=True):
                out.mux(sound.encode(piece))
            out.mux(sound.encode())
    return file.getvalue()


def error_ratio(got, want):
    n = min(len(got), len(want))
    return np.linalg.norm(got[:n] - want[:n]) / np.linalg.norm(want[:n])


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


# --- arrays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["i1", "<i2", ">i2", "i4", "u1", "f2", "f4", "f8", ">f8"])
def test_array_types(dtype):
    want = tone()
    scale = {"i": 2.0 ** (8 * np.dtype(dtype).itemsize - 1), "u": 128.0, "f": 1.0}[np.dtype(dtype).kind]
    samples = np.round(want.astype(np.float64) * scale) if scale > 1 else want
    got = load_audio((samples + (128 if dtype == "u1" else 0)).astype(dtype))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=max(1 / scale if scale > 1 else 0, 2e-4 if dtype == "f2" else 1e-7))


def test_array_extremes():
    np.testing.assert_array_equal(load_audio(np.array([-32768, 0, 16384], np.int16)), [-1, 0, 0.5])
    np.testing.assert_array_equal(load_audio(np.array([0, 128, 192], np.uint8)), [-1, 0, 0.5])
    np.testing.assert_array_equal(load_audio(np.array([-(2**31), 2**30], np.int32)), [-1, 0.5])


def test_array_shapes():
    x = np.stack([tone(), tone(hertz=900)])
    np.testing.assert_array_equal(load_audio(x), load_audio(x.T))
    np.testing.assert_array_equal(load_audio(x[:1]), tone())
    np.testing.assert_array_equal(load_audio(x[:1].T), tone())
    np.testing.assert_array_equal(load_audio([0.25, -0.5]), np.array([0.25, -0.5], np.float32))
    x = tone()
    load_audio(x)[:] = 0
    assert x.any(), "the caller's array was returned, not a copy"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([0.1, np.nan]), "NaN or infinite at 0.000 s"),
        (np.r_[np.zeros(16000), np.inf], "at 1.000 s"),
        (np.array([1e300]), "infinite"),
        (np.array([0.0, 12000.0]), "full scale is 1.0"),
        (np.zeros(10, np.int64), "int64"),
        (np.zeros(10, np.uint16), "uint16"),
        (np.zeros(10, complex), "complex128"),
        (np.zeros(10, bool), "bool"),
        (np.array(["a"]), "type <U1"),
        (np.zeros((2, 3, 4)), r"\(2, 3, 4\)"),
        (3.0, "shape"),
        (None, "shape"),
        ([[1.0], [1.0, 2.0]], "list"),
        pytest.param(object(), "shape", id="object"),
    ],
    ids=str,
)
def test_arrays_refused(bad, message):
    with pytest.raises(AudioError, match=message):
        load_audio(bad)


@pytest.mark.parametrize("rate", [0, -16000, 100, 10**7])
def test_impossible_rates(rate):
    with pytest.raises(AudioError, match="sample rate"):
        load_audio(tone(), rate)


def test_a_rate_with_a_file_is_a_mistake():
    with pytest.raises(AudioError, match="leave it out"):
        load_audio(encoded(tone()), 8000)


# --- where a file comes from --------------------------------------------------------------------------------------


def test_paths_and_files(tmp_path):
    want = load_audio(encoded(tone()))
    path = tmp_path / "grüße 你好.wav"
    path.write_bytes(encoded(tone()))
    with open(path, "rb") as file:
        file.seek(100)
        for source in (path, str(path), file, file, bytearray(path.read_bytes()), memoryview(path.read_bytes())):
            np.testing.assert_array_equal(load_audio(source), want)
        assert not file.closed
    with tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(encoded(tone()))
        np.testing.assert_array_equal(load_audio(spooled), want)
    misnamed = tmp_path / "wav.mp3"
    misnamed.write_bytes(encoded(tone()))
    np.testing.assert_array_equal(load_audio(misnamed), want)
    raw = tmp_path / "wav.raw"
    raw.write_bytes(encoded(tone()))
    np.testing.assert_array_equal(load_audio(raw), want)


@pytest.mark.parametrize("data", [encoded(tone()), muxed("ipod", "aac", tone(48000)[None])], ids=["wav", "m4a"])
def test_pipes_and_standard_input(data):
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as reading, open(write_end, "wb") as writing:
        thread = threading.Thread(target=lambda: (writing.write(data), writing.close()))
        thread.start()
        np.testing.assert_array_equal(load_audio(reading), load_audio(data))
        thread.join()
    program = "from m3asr.audio import load_audio; print(len(load_audio('-')))"
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=True)
    assert int(done.stdout) == len(load_audio(data))


def test_paths_refused(tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not a recording\n" * 50)
    (tmp_path / "audio.raw").write_bytes(bytes(1000))
    for name, message in {
        "none.wav": "none.wav: no such file",
        "": "directory",
        "empty.wav": r"empty.wav is empty \(0 bytes\)",
        "notes.txt": "notes.txt is not audio: it starts with b'not a recording",
        "audio.raw": "not audio",
        "nul\0.wav": "cannot be opened",
        "x" * 300: "cannot be opened",
    }.items():
        with pytest.raises(AudioError, match=message):
            load_audio(f"{tmp_path}/{name}")
    with open(tmp_path / "notes.txt") as text, pytest.raises(AudioError, match="binary mode"):
        load_audio(text)
    with pytest.raises(AudioError, match="closed"):
        load_audio(text)


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


# --- damage -------------------------------------------------------------------------------------------------------

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


# --- blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("seconds", [0.01, 0.77, 1.0, 100.0])
def test_blocks_are_the_whole(rate, seconds):
    stereo = np.stack([tone(rate, 3.3), tone(rate, 3.3, 901)], 1)
    for source in (encoded(stereo, rate), encoded(stereo, rate, format="MP3")):
        blocks = list(read_blocks(source, seconds))
        np.testing.assert_array_equal(np.concatenate(blocks), load_audio(source))
        size = round(seconds * 16000)
        assert all(len(block) == size for block in blocks[:-1]) and 0 < len(blocks[-1]) <= size


def test_blocks_of_nothing_and_of_no_length():
    assert list(read_blocks(encoded(np.zeros(0)))) == []
    with pytest.raises(AudioError, match="longer"):
        list(read_blocks(tone(), 0))
    blocks = list(read_blocks(tone(8000), 0.5, sample_rate=8000))
    assert [len(block) for block in blocks] == [8000, 8000]


def test_blocks_need_little_memory(tmp_path):
    """15 minutes of stereo are 115 MB as floats; the peak is measured in numpy's own allocations."""
    import tracemalloc

    path = tmp_path / "long.flac"
    with sf.SoundFile(path, "w", 16000, 2) as file:
        for _ in range(15):
            file.write(np.zeros((16000 * 60, 2), np.int16))
    tracemalloc.start()
    samples = sum(len(block) for block in read_blocks(path, 10.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert samples == 15 * 60 * 16000
    assert peak < 10e6
