"""Waveform -> Kaldi filterbank -> mean and variance normalisation -> padded batch.

The filterbank is the one of 3M-ASR, WeNet and Kaldi's `compute-fbank-feats`. Whether a model normalises its input
itself (WeNet) or gets it normalised (3M-ASR) is the model's business: here are only the functions.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m3asr.config import LEVEL, FbankConfig
from m3asr.errors import AudioError, ModelError

_WINDOWS = ("povey", "hanning", "hamming", "rectangular", "blackman")
_CHUNK = 16000 * 60  # samples given to the extractor at a time, so that an hour needs no second copy of its features


def num_frames(num_samples: int, config: FbankConfig) -> int:
    """T of a waveform: only whole frames count (Kaldi's snip_edges), so 0 below one frame length."""
    length, shift = _frame_samples(config)
    return 0 if num_samples < length else 1 + (num_samples - length) // shift


def _frame_samples(config: FbankConfig) -> tuple[int, int]:
    """Length and shift in samples, rounded down as in Kaldi."""
    return int(config.sample_rate * config.frame_length / 1000), int(config.sample_rate * config.frame_shift / 1000)


def _refuse_unusable(config: FbankConfig) -> None:
    nyquist = config.sample_rate / 2
    top = config.high_freq if config.high_freq > 0 else nyquist + config.high_freq
    length, shift = _frame_samples(config)
    if config.num_mel_bins < 3:  # Kaldi's own limit
        raise ModelError(f"num_mel_bins is {config.num_mel_bins}; expected at least 3 (usual: 40 or 80).")
    if not 0 < shift <= length <= config.sample_rate:
        raise ModelError(
            f"frame_shift is {config.frame_shift} ms and frame_length {config.frame_length} ms; "
            "expected 0 < frame_shift <= frame_length <= 1000."
        )
    if not 0 <= config.low_freq < top <= nyquist:
        raise ModelError(
            f"low_freq is {config.low_freq} Hz and high_freq {top} Hz; expected 0 <= low_freq < high_freq <= {nyquist}."
        )
    if config.window_type not in _WINDOWS:
        raise ModelError(f"window_type is {config.window_type!r}; expected one of {', '.join(_WINDOWS)}.")


def fbank(waveform: np.ndarray, config: FbankConfig = FbankConfig()) -> np.ndarray:
    """Log mel filterbank of one utterance.

    waveform: (samples,) float, full scale 1.0, at config.sample_rate; it is scaled to the int16 range, as in Kaldi.
    Returns float32 (T, F), T = num_frames(samples, config), F = config.num_mel_bins; (0, F) below one frame.
    Per frame: subtract the mean, pre-emphasis of 0.97, window, power spectrum of a power-of-two FFT, triangles linear
    in mel(f) = 1127 ln(1 + f/700), natural log floored at 2^-23 (Kaldi's `compute-fbank-feats` without energy). Levels
    are not compressed: that is `compress_levels`.
    Raises AudioError for another shape, ModelError for more bins than the FFT can separate.
    """
    extractor = OnlineFbank(config)
    waveform = np.asarray(waveform)
    if waveform.ndim != 1:
        raise AudioError(f"A waveform of shape {waveform.shape} has no filterbank; expected one dimension (samples,).")
    features = np.empty((num_frames(len(waveform), config), config.num_mel_bins), np.float32)  # (T, F)
    done = 0
    for start in range(0, len(waveform), _CHUNK):
        ready = extractor.accept(waveform[start : start + _CHUNK])
        features[done : done + len(ready)] = ready
        done += len(ready)
    if done != len(features):
        raise AssertionError(f"the extractor gave {done} frames, the formula {len(features)}")
    return features


def compress_levels(features: np.ndarray, share: float) -> np.ndarray:
    """Quiet frames come nearer to loud ones: x - share * (ln(sum over bins of exp(x)) - LEVEL), frame by frame.

    features: float32 (..., F), natural log of mel energies; share 0 (nothing changes) to 1 (all frames equally loud).
    It is a compressor without memory: what comes in pieces, or beside others, comes out the same.
    """
    if not share or not features.size:
        return features
    top = features.max(axis=-1, keepdims=True)
    level = top + np.log(np.exp(features - top).sum(axis=-1, keepdims=True))
    return features - np.float32(share) * (level - np.float32(LEVEL))


class OnlineFbank:
    """The filterbank of a waveform that comes in pieces: together the frames of `fbank`, bit for bit.

    Raises ModelError for more bins than the FFT can separate.
    """

    def __init__(self, config: FbankConfig = FbankConfig()):
        import kaldi_native_fbank as knf

        _refuse_unusable(config)
        options = knf.FbankOptions()
        options.frame_opts.samp_freq = config.sample_rate
        options.frame_opts.frame_length_ms = config.frame_length
        options.frame_opts.frame_shift_ms = config.frame_shift
        options.frame_opts.dither = 0.0  # the originals dither in training only
        options.frame_opts.preemph_coeff = 0.97
        options.frame_opts.window_type = config.window_type
        options.frame_opts.snip_edges = True
        options.mel_opts.num_bins = config.num_mel_bins
        options.mel_opts.low_freq = config.low_freq
        options.mel_opts.high_freq = config.high_freq
        options.use_energy = False
        try:
            self._extractor = knf.OnlineFbank(options)
        except ValueError as error:
            raise ModelError(f"No filterbank for {config}: {error}") from None
        self.config = config
        self._done = 0

    def accept(self, waveform: np.ndarray) -> np.ndarray:
        """The next samples, float (N,), N also 0 -> the frames that became whole, float32 (T, F)."""
        if len(waveform):
            # Kaldi's scale: that of 16 bits.
            self._extractor.accept_waveform(self.config.sample_rate, waveform.astype(np.float32) * np.float32(32768))
        ready = self._extractor.num_frames_ready
        features = np.empty((ready - self._done, self.config.num_mel_bins), np.float32)
        for t in range(self._done, ready):
            features[t - self._done] = self._extractor.get_frame(t)
        self._extractor.pop(ready - self._done)
        self._done = ready
        return features


@dataclass(frozen=True, eq=False)
class Cmvn:
    """Global cepstral mean and variance normalisation: y = (x - mean) * istd.

    mean, istd: float32 (F,); istd is one over the standard deviation.
    """

    mean: np.ndarray
    istd: np.ndarray

    def __post_init__(self):
        for name in ("mean", "istd"):
            try:
                values = np.asarray(getattr(self, name), np.float32)
            except (TypeError, ValueError):
                raise ModelError(f"CMVN {name} is not a list of numbers.") from None
            object.__setattr__(self, name, values)
        if self.mean.ndim != 1 or self.mean.shape != self.istd.shape or not len(self.mean):
            raise ModelError(
                f"CMVN mean has shape {self.mean.shape} and istd {self.istd.shape}; expected two lists of one length."
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.istd).all()):
            raise ModelError("CMVN holds NaN or infinite values; expected finite numbers.")

    @property
    def dim(self) -> int:
        """F, the number of feature bins."""
        return len(self.mean)

    def apply(self, features: np.ndarray) -> np.ndarray:
        """(..., F) -> float32 (..., F), a new array. Raises ModelError for another F."""
        features = np.asarray(features, np.float32)
        if features.shape[-1:] != (self.dim,):
            raise ModelError(f"Features have shape {features.shape}; expected (..., {self.dim}) for this CMVN.")
        return (features - self.mean) * self.istd

    @classmethod
    def from_sums(cls, sums: Sequence[float], squares: Sequence[float], count: float) -> Cmvn:
        """From the sums over frames of x and of x^2, and the number of frames, in float64.

        istd = 1 / sqrt(max(E[x^2] - mean^2, 1e-20)), as 3M-ASR and WeNet compute it.
        """
        try:
            sums, squares = np.asarray(sums, np.float64), np.asarray(squares, np.float64)
            count = float(count)
        except (TypeError, ValueError, OverflowError):
            raise ModelError("CMVN statistics are not lists of numbers.") from None
        if sums.ndim != 1 or sums.shape != squares.shape or not len(sums):
            raise ModelError(
                f"CMVN sums have shape {sums.shape} and sums of squares {squares.shape}; "
                "expected two lists of one length."
            )
        if not count >= 1 or not (np.isfinite(sums).all() and np.isfinite(squares).all() and np.isfinite(count)):
            raise ModelError(f"CMVN statistics of {count:g} frames are unusable; expected finite sums over >= 1 frame.")
        mean = sums / count
        return cls(mean, 1 / np.sqrt(np.maximum(squares / count - mean**2, 1e-20)))

    @classmethod
    def read(cls, path: str | Path) -> Cmvn:
        """Read a `global_cmvn` file in any format that 3M-ASR or WeNet training leaves behind.

        JSON with mean_stat, var_stat and frame_num; Kaldi text "[ sums count squares 0 ]"; a Kaldi matrix of 2 rows
        (sums and count; squares and 0), as text or as binary float or double. Raises ModelError for all else.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ModelError(f"CMVN file {path} cannot be read: {error.strerror}.") from None
        try:
            if data[:2] == b"\0B":
                return cls._from_kaldi(_kaldi_binary_matrix(data).ravel())
            text = data.decode("utf-8-sig").strip()
            if text.startswith("{"):
                return cls._from_json(json.loads(text))
            if text.startswith("[") and text.endswith("]"):
                return cls._from_kaldi([float(number) for number in text[1:-1].split()])
        except ModelError as error:
            raise ModelError(f"CMVN file {path}: {error}") from None
        except (ValueError, RecursionError) as error:  # bad numbers, bad JSON, not UTF-8
            raise ModelError(f"CMVN file {path} is damaged or of another kind: {error}.") from None
        raise ModelError(
            f"CMVN file {path} starts with {data[:16]!r}; expected JSON with mean_stat, var_stat, frame_num, "
            "or Kaldi statistics (text '[ ... ]' or binary)."
        )

    @classmethod
    def _from_json(cls, stats: dict) -> Cmvn:
        missing = [key for key in ("mean_stat", "var_stat", "frame_num") if key not in stats]
        if missing:
            raise ModelError(f"found the keys {', '.join(stats) or '(none)'}; {', '.join(missing)} missing.")
        return cls.from_sums(stats["mean_stat"], stats["var_stat"], stats["frame_num"])

    @classmethod
    def _from_kaldi(cls, numbers: Sequence[float]) -> Cmvn:
        """WeNet's single line and Kaldi's two rows hold the same numbers in the same order."""
        if len(numbers) < 4 or len(numbers) % 2 or numbers[-1] != 0:
            raise ModelError(
                f"found {len(numbers)} numbers; expected sums, count, as many sums of squares and a last 0."
            )
        dim = len(numbers) // 2 - 1
        return cls.from_sums(numbers[:dim], numbers[dim + 1 : -1], numbers[dim])

    def to_dict(self) -> dict[str, list[float]]:
        """JSON-ready {"mean": [...], "istd": [...]}; from_dict gives back the same float32 values."""
        return {"mean": self.mean.tolist(), "istd": self.istd.tolist()}

    @classmethod
    def from_dict(cls, stored: dict) -> Cmvn:
        if not isinstance(stored, dict) or set(stored) != {"mean", "istd"}:
            found = ", ".join(map(str, stored)) if isinstance(stored, dict) else type(stored).__name__
            raise ModelError(f"Stored CMVN holds {found or 'nothing'}; expected mean and istd.")
        return cls(stored["mean"], stored["istd"])


def _kaldi_binary_matrix(data: bytes) -> np.ndarray:
    """Kaldi's "\\0B", "FM " or "DM ", then rows and columns (each a byte 4 and an int32), then the values by row."""
    dtype = {b"FM ": "<f4", b"DM ": "<f8"}.get(data[2:5])
    if dtype is None:
        raise ModelError(f"found a Kaldi binary of type {data[2:5]!r}; expected a float or double matrix (FM, DM).")
    if len(data) < 15:
        raise ModelError("the Kaldi matrix ends inside its header.")
    size_rows, rows, size_columns, columns = struct.unpack("<bibi", data[5:15])
    if size_rows != 4 or size_columns != 4 or rows != 2 or columns < 2:
        raise ModelError(f"found a Kaldi matrix of {rows} x {columns}; expected 2 rows: sums, count and squares, 0.")
    if len(data) - 15 != 2 * columns * np.dtype(dtype).itemsize:
        raise ModelError(f"the Kaldi matrix of 2 x {columns} {dtype} has {len(data) - 15} bytes of values.")
    return np.frombuffer(data, dtype, offset=15).reshape(rows, columns).astype(np.float64)


def pad_batch(utterances: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Utterances (T_i, F) -> features float32 (B, T, F), zero behind each utterance, and lengths int32 (B,).

    T is the longest T_i; no utterances give (0, 0, 0). Raises ModelError when they differ in F.
    """
    shapes = [np.shape(utterance) for utterance in utterances]
    if any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) > 1:
        raise ModelError(f"A batch of shapes {sorted(set(shapes))}; expected (frames, bins) with the same bins.")
    lengths = np.array([shape[0] for shape in shapes], np.int32)  # (B,)
    features = np.zeros((len(shapes), lengths.max(initial=0), shapes[0][1] if shapes else 0), np.float32)  # (B, T, F)
    for row, utterance in zip(features, utterances, strict=True):
        row[: len(utterance)] = utterance
    return features, lengths
