"""Where sound comes from: arrays, paths, open files and pipes; and recordings block by block."""

import os
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pytest
import soundfile as sf
from sounds import encoded, muxed, tone

from m3asr.audio import load_audio, read_blocks
from m3asr.errors import AudioError

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
