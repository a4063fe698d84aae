import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3asr.config import LEVEL, FbankConfig
from m3asr.errors import AudioError, ModelError
from m3asr.features import Cmvn, compress_levels, fbank, num_frames, pad_batch


def speechlike(samples, seed=0):
    """A gliding harmonic tone in noise with pauses: loud, quiet and silent frames."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 16000
    tone = sum(np.sin(2 * np.pi * k * (120 * t + 15 * t**2)) / k for k in range(1, 20))
    return (0.1 * tone * (np.sin(3 * t) > -0.5) + 0.001 * rng.standard_normal(samples)).astype(np.float32)


def reference_fbank(waveform, bins):
    """The filterbank from its definition, in float64: 25 ms / 10 ms frames, povey window, 512-point FFT."""
    x = waveform.astype(np.float64) * 32768
    mel = lambda f: 1127 * np.log(1 + f / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), bins + 2)
    at = mel(np.arange(256) * 16000 / 512)
    rise = (at - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - at) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rise, fall))  # (F, 256)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    rows = []
    for start in range(0, len(x) - 399, 160):
        frame = x[start : start + 400] - x[start : start + 400].mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, 512)[:256]) ** 2
        rows.append(np.log(np.maximum(filters @ power, 2.0**-23)))
    return np.array(rows).reshape(-1, bins)


@pytest.mark.parametrize("bins", [40, 80])
@pytest.mark.parametrize("samples", [400, 559, 560, 16000, 33333])
def test_fbank_is_the_definition(bins, samples):
    x = speechlike(samples)
    got, want = fbank(x, FbankConfig(num_mel_bins=bins)), reference_fbank(x, bins)
    assert got.dtype == np.float32 and got.shape == want.shape == (num_frames(samples, FbankConfig()), bins)
    # 1e-4 in the log is a relative 1e-4 of the power: float32 FFT against float64.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)


def test_fbank_over_a_wide_range_of_levels():
    """float32 leaves noise of 1e-5 of a frame's loudest bin, which a bin 100 dB below it shows as 0.01 in the log."""
    x = speechlike(16000 * 20)
    got, want = fbank(x), reference_fbank(x, 80)
    power = np.exp(want)
    assert (np.abs(np.exp(got) - power) / power.max(1, keepdims=True)).max() < 3e-5
    assert np.quantile(np.abs(got - want), 0.999) < 1e-3


def test_a_pure_tone_lands_in_its_bin():
    x = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    centres = 700 * (np.exp(np.linspace(1127 * np.log(1 + 20 / 700), 1127 * np.log(1 + 8000 / 700), 82) / 1127) - 1)
    assert abs(centres[1:-1][fbank(x).mean(0).argmax()] - 1000) < 40


def test_silence_is_the_floor():
    np.testing.assert_allclose(fbank(np.zeros(1600, np.float32)), np.log(2.0**-23), rtol=1e-6)


@pytest.mark.parametrize("samples", [0, 1, 80, 399])
def test_shorter_than_a_frame_gives_no_frames(samples):
    assert fbank(np.zeros(samples, np.float32)).shape == (0, 80)


def test_long_audio_in_chunks_is_the_same_as_its_parts():
    x = speechlike(16000 * 61)  # crosses the extractor's chunk of a minute
    whole, start = fbank(x), 5990 * 160
    np.testing.assert_array_equal(whole[5990:], fbank(x[start:]))


def test_repeatable():
    x = speechlike(8000)
    np.testing.assert_array_equal(fbank(x), fbank(x))


@pytest.mark.parametrize("share", [0.0, 0.35, 1.0])
def test_levels_are_compressed_frame_by_frame(share):
    x = np.concatenate([np.zeros(3200, np.float32), speechlike(16000)])  # digital silence too
    features = fbank(x)
    got = compress_levels(features, share)
    level = np.log(np.exp(features.astype(np.float64)).sum(axis=-1, keepdims=True))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, features - share * (level - LEVEL), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(got[40:], compress_levels(features[40:], share))  # no memory: live as in a file
    assert compress_levels(features[:0], share).shape == (0, 80)
    # Half as loud is 1 - share as much quieter; what is loudest in a frame stays so.
    quieter = compress_levels(fbank(x / 2)[20:], share) - got[20:]
    np.testing.assert_allclose(quieter, -2 * np.log(2) * (1 - share), rtol=0, atol=5e-3)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_no_other_share_of_the_level(share):
    with pytest.raises((ValueError, TypeError), match="level_compression"):
        FbankConfig(level_compression=share)


def test_fbank_refuses():
    with pytest.raises(AudioError, match=r"\(2, 800\)"):
        fbank(np.zeros((2, 800)))
    for bad in ({"num_mel_bins": 0}, {"frame_shift": 0.0}, {"high_freq": 9000.0}, {"low_freq": 8000.0}):
        with pytest.raises(ModelError, match="expected"):
            fbank(np.zeros(800), FbankConfig(**bad))
    with pytest.raises(ModelError, match="povey"):
        fbank(np.zeros(800), FbankConfig(window_type="flat"))
    with pytest.raises(ModelError, match="num_mel_bins=300"):
        fbank(np.zeros(800), FbankConfig(num_mel_bins=300))


D = 5
FRAMES = np.random.default_rng(1).normal(3, 2, (200, D))
SUMS, SQUARES = FRAMES.sum(0), (FRAMES**2).sum(0)
NUMBERS = [*SUMS, 200, *SQUARES, 0]


def kaldi_binary(kind, dtype, rows=2, columns=D + 1):
    header = b"\0B" + kind + b" " + struct.pack("<bibi", 4, rows, 4, columns)
    return header + np.array(NUMBERS, dtype).tobytes()


def text(numbers):
    return " ".join(repr(float(n)) for n in numbers)


WRITTEN = {
    "json": json.dumps({"mean_stat": list(SUMS), "var_stat": list(SQUARES), "frame_num": 200}).encode(),
    "json-bom": b"\xef\xbb\xbf"
    + json.dumps({"frame_num": 200, "var_stat": list(SQUARES), "mean_stat": list(SUMS)}).encode(),
    "line": f"[ {text(NUMBERS[:-1])} 0 ]\n".encode(),
    "matrix-text": f" [\n  {text(NUMBERS[: D + 1])} \n  {text(NUMBERS[D + 1 :])} ]\n".encode(),
    "matrix-float": kaldi_binary(b"FM", "<f4"),
    "matrix-double": kaldi_binary(b"DM", "<f8"),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_cmvn_reads(kind, tmp_path):
    (tmp_path / "global_cmvn").write_bytes(WRITTEN[kind])
    cmvn = Cmvn.read(tmp_path / "global_cmvn")
    assert cmvn.dim == D and cmvn.mean.dtype == cmvn.istd.dtype == np.float32
    np.testing.assert_allclose(cmvn.mean, FRAMES.mean(0), rtol=1e-6)
    np.testing.assert_allclose(cmvn.istd, 1 / FRAMES.std(0), rtol=1e-5)
    normal = cmvn.apply(FRAMES)
    assert normal.dtype == np.float32
    np.testing.assert_allclose([normal.mean(0), normal.std(0)], [[0] * D, [1] * D], atol=1e-4)


BROKEN = {
    "empty": b"",
    "words": b"hello",
    "truncated json": WRITTEN["json"][:-20],
    "missing key": b'{"mean_stat": [1], "frame_num": 3}',
    "json of words": b'{"mean_stat": ["a"], "var_stat": ["b"], "frame_num": 3}',
    "ragged json": b'{"mean_stat": [1, [2]], "var_stat": [1, 2], "frame_num": 3}',
    "two lengths": b'{"mean_stat": [1, 2], "var_stat": [1], "frame_num": 3}',
    "no frames": b'{"mean_stat": [1], "var_stat": [1], "frame_num": 0}',
    "null": b'{"mean_stat": null, "var_stat": null, "frame_num": null}',
    "nan": b'{"mean_stat": [NaN], "var_stat": [1], "frame_num": 3}',
    "deep": b'{"a":' + b"[" * 100000,
    "odd count": b"[ 1 2 3 4 5 ]",
    "no last zero": b"[ 1 2 3 4 ]",
    "letters": b"[ 1 x 3 0 ]",
    "truncated line": WRITTEN["line"][:-6],
    "truncated binary": WRITTEN["matrix-double"][:-1],
    "header only": b"\0BFM \4",
    "kind": b"\0BCM " + bytes(40),
    "three rows": kaldi_binary(b"FM", "<f4", rows=3, columns=4),
    "negative": kaldi_binary(b"FM", "<f4", columns=-6),
    "binary noise": b"\xff\xfe\x00\x01" * 9,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_cmvn_refuses(kind, tmp_path):
    path = tmp_path / "global_cmvn"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(ModelError, match="global_cmvn"):
        Cmvn.read(path)


def test_cmvn_of_a_missing_file(tmp_path):
    with pytest.raises(ModelError, match="No such file"):
        Cmvn.read(tmp_path / "none")


def test_cmvn_variance_floor():
    constant = Cmvn.from_sums([30.0], [90.0], 10)
    np.testing.assert_allclose(constant.istd, 1e10, rtol=1e-6)


def test_cmvn_storage_is_exact():
    cmvn = Cmvn.from_sums(SUMS, SQUARES, 200)
    again = Cmvn.from_dict(json.loads(json.dumps(cmvn.to_dict())))
    np.testing.assert_array_equal(again.mean, cmvn.mean)
    np.testing.assert_array_equal(again.istd, cmvn.istd)
    for bad in ({"mean": [1.0]}, None, [], {"mean": [1.0], "istd": [1.0, 2.0]}, {"mean": [], "istd": []}):
        with pytest.raises(ModelError):
            Cmvn.from_dict(bad)


def test_cmvn_refuses_other_widths():
    with pytest.raises(ModelError, match=r"\(3, 4\)"):
        Cmvn(np.zeros(D), np.ones(D)).apply(np.zeros((3, 4)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=6), st.integers(1, 8))
def test_pad_batch(frames, bins):
    utterances = [np.full((t, bins), i + 1, np.float32) for i, t in enumerate(frames)]
    features, lengths = pad_batch(utterances)
    assert features.dtype == np.float32 and lengths.dtype == np.int32
    assert features.shape == (len(frames), max(frames, default=0), bins if frames else 0)
    assert lengths.tolist() == frames
    for i, t in enumerate(frames):
        assert (features[i, :t] == i + 1).all() and (features[i, t:] == 0).all()


def test_pad_batch_refuses_mixed_widths():
    with pytest.raises(ModelError, match="same bins"):
        pad_batch([np.zeros((2, 3)), np.zeros((2, 4))])
