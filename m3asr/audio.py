"""Any recording -> float32 mono waveform at 16 kHz.

Rules, the same for a file, bytes, a stream and an array:

- Channels: the mean of those that hold sound. A channel that stays below -80 dBFS throughout is left out, so a
  one-sided stereo recording is as loud as its mono version. (The original 3M-ASR takes the first channel.)
- Rate: soxr, quality HQ.
- Level: full scale is 1.0. What overshoots a little (mp3, resampling) is kept; a peak over 10 is an error, because
  it means integers stored as floats.
- A damaged or cut-off recording gives what could be decoded and warns `DamagedAudio`; nothing decoded is an error.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from m3asr.containers import Blocks, decode
from m3asr.errors import AudioError, reason

SAMPLE_RATE = 16000

AudioSource: TypeAlias = "str | Path | bytes | BinaryIO | np.ndarray"

_SILENCE = 1e-4  # -80 dBFS: three steps of 16 bits
PEAK_LIMIT = 10.0  # full scale is 1: more means integers stored as floats
_RATES = (2000, 768000)


class DamagedAudio(UserWarning):
    """A recording ends before its header says, or cannot be decoded to its end; the rest of it was used."""


def load_audio(source: AudioSource, sample_rate: int | None = None) -> np.ndarray:
    """Read a whole recording.

    source: a path; "-" for standard input; the bytes of a file; a binary file object (read from its start, left
        open); or an array of samples. A 1-D array is mono; in a 2-D array the shorter axis is the channels (columns,
        if both are equal). Float samples have full scale 1.0; int8, int16, int32 and uint8 are scaled by their range.
    sample_rate: Hz, of an array only (default 16000); files say their own.

    Returns float32 (N,), mono, 16 kHz, nominally in [-1, 1]. A recording without samples gives N = 0.
    Raises AudioError for what cannot be read, is not audio, has NaN or infinite samples or an impossible rate;
    MissingExtra when PyAV is needed and not installed. Warns DamagedAudio.
    """
    chunks = list(_waveform(source, sample_rate))
    return np.concatenate(chunks) if chunks else np.zeros(0, np.float32)


def read_blocks(source: AudioSource, seconds: float = 30.0, sample_rate: int | None = None) -> Iterator[np.ndarray]:
    """Read a recording block by block: float32 (seconds * 16000,), the last one shorter, none for empty audio.

    Memory is bounded by the block, not by the recording; a source that cannot seek is copied to a temporary file.
    The blocks together are the samples of `load_audio`, bit for bit: both read through the same decoder and
    streaming resampler. Arguments and errors as there; errors may come late, when a bad place is reached.
    """
    size = round(seconds * SAMPLE_RATE)
    if size < 1:
        raise AudioError(f"A block of {seconds} s holds no sample; ask for a longer one.")
    held: list[np.ndarray] = []
    n_held = 0
    for chunk in _waveform(source, sample_rate):
        held.append(chunk)
        n_held += len(chunk)
        if n_held >= size:
            joined = np.concatenate(held)
            while len(joined) >= size:
                yield joined[:size].copy()
                joined = joined[size:]
            held, n_held = [joined.copy()], len(joined)
    if n_held:
        yield np.concatenate(held)


def read_pcm(file: BinaryIO, sample_rate: int = SAMPLE_RATE) -> Iterator[np.ndarray]:
    """Raw 16-bit little-endian mono samples, each packet as soon as it is there -> float32 (N,) at 16 kHz.

    file: a binary file or pipe. Raises AudioError for an impossible rate, and where a file with a header begins.
    """
    import soxr

    if not _RATES[0] <= sample_rate <= _RATES[1]:
        raise AudioError(f"A sample rate of {sample_rate} Hz; expected {_RATES[0]} to {_RATES[1]} Hz.")
    resampler = None
    if sample_rate != SAMPLE_RATE:
        resampler = soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    read = getattr(file, "read1", file.read)  # what is there, without waiting for more
    rest, first = b"", True
    while data := read(8192):
        data = rest + data
        if first and data[:4] in (b"RIFF", b"fLaC", b"OggS"):
            raise AudioError(f"The sound starts with {data[:4]!r}, as a file does; expected raw 16-bit samples alone.")
        rest, first = data[len(data) // 2 * 2 :], False
        samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / np.float32(32768)
        yield samples if resampler is None else resampler.resample_chunk(samples)
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def standard_input() -> BinaryIO:
    """Its bytes. Raises AudioError where it is closed."""
    if sys.stdin is None:
        raise AudioError("Standard input is closed; expected a recording.")
    return sys.stdin.buffer


def _waveform(source: AudioSource, sample_rate: int | None) -> Iterator[np.ndarray]:
    """Mono 16 kHz chunks of any length."""
    if isinstance(source, (str, Path, bytes, bytearray, memoryview)) or hasattr(source, "read"):
        if sample_rate is not None:
            raise AudioError("sample_rate describes an array of samples; a file says its own rate, so leave it out.")
        with _opened(source) as (file, name):
            yield from _mono_16k(lambda damaged: decode(file, name, damaged), name)
    else:
        rate = SAMPLE_RATE if sample_rate is None else sample_rate
        samples = _from_array(source)  # (N, C)
        yield from _mono_16k(lambda damaged: iter([(rate, samples)]), "the array")


def _mono_16k(start: Callable[[Callable[[str], None]], Blocks], name: str) -> Iterator[np.ndarray]:
    """start(damaged) begins decoding; it is called twice, first only until every channel has been heard."""
    import soxr

    heard = _heard_channels(start(lambda message: None))
    resampler = None
    n_read = 0
    for rate, block in start(lambda message: warnings.warn(message, DamagedAudio, stacklevel=2)):  # (N, C)
        _check(rate, block, n_read, name)
        n_read += len(block)
        mono = block[:, 0] if block.shape[1] == 1 else block[:, heard].mean(axis=1, dtype=np.float32)  # (N,)
        if rate == SAMPLE_RATE:
            yield np.array(mono, np.float32)
            continue
        if resampler is None:
            resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        yield resampler.resample_chunk(np.ascontiguousarray(mono, np.float32))
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _heard_channels(blocks: Blocks) -> np.ndarray | None:
    """(C,) bool: which channels rise above silence; all of them when none does; None when there are no samples."""
    heard = None
    for _, block in blocks:
        if block.shape[1] == 1:
            return np.ones(1, bool)
        now = (np.abs(block) > _SILENCE).any(axis=0)  # (C,)
        heard = now if heard is None else heard | now
        if heard.all():
            break
    return heard if heard is None or heard.any() else np.ones_like(heard)


def _check(rate: int, block: np.ndarray, n_before: int, name: str) -> None:
    if not _RATES[0] <= rate <= _RATES[1]:
        raise AudioError(f"{name} has a sample rate of {rate} Hz; expected {_RATES[0]} to {_RATES[1]} Hz.")
    if not len(block):
        return
    if not np.isfinite(block).all():
        first = int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
        raise AudioError(
            f"{name} has a sample that is NaN or infinite at {(n_before + first) / rate:.3f} s; "
            "expected finite numbers, so repair what produced it."
        )
    peak = float(np.abs(block).max())
    if peak > PEAK_LIMIT:
        raise AudioError(
            f"{name} has float samples up to {peak:.4g} where full scale is 1.0; "
            "divide them by their range or pass them as integers."
        )


def _from_array(samples: object) -> np.ndarray:
    """Samples (N,), (N, C) or (C, N) of any accepted type -> float32 (N, C)."""
    try:
        x = np.asarray(samples)
    except (ValueError, TypeError, RuntimeError) as error:
        raise AudioError(f"A {type(samples).__name__} is no array of samples: {error}.") from None
    if x.ndim not in (1, 2):
        raise AudioError(f"An array of shape {x.shape} is no waveform; expected (samples,) or (samples, channels).")
    if x.ndim == 1:
        x = x[:, None]
    elif x.shape[0] < x.shape[1]:
        x = x.T
    if x.size == 0:
        return np.zeros((0, 1), np.float32)
    kind, bits = x.dtype.kind, 8 * x.dtype.itemsize
    if kind == "u" and bits == 8:
        return (x.astype(np.float32) - 128) / 128
    if kind == "i" and bits <= 32:
        return x.astype(np.float32) / np.float32(2 ** (bits - 1))
    if kind == "f":
        with np.errstate(over="ignore"):  # becomes inf, which is refused with its place
            return x.astype(np.float32)
    raise AudioError(f"Samples of type {x.dtype} have no known range; expected float, int8, int16, int32 or uint8.")


@contextlib.contextmanager
def _opened(source: AudioSource) -> Iterator[tuple[BinaryIO, str]]:
    """A seekable binary file and what to call it in messages."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, (bytes, bytearray, memoryview)):
            file, name = io.BytesIO(source), "the audio"
        elif hasattr(source, "read"):
            file, name = source, str(getattr(source, "name", "the audio"))
        elif source == "-":
            file, name = standard_input(), "standard input"
        else:
            name = str(source)
            try:
                if Path(source).is_dir():
                    raise AudioError(f"{name} is a directory; expected an audio file.")
                file = stack.enter_context(open(source, "rb"))
            except FileNotFoundError:
                raise AudioError(f"{name}: no such file.") from None
            except (OSError, ValueError) as error:
                raise AudioError(f"{name} cannot be opened: {reason(error)}.") from None
        try:
            if isinstance(file.read(0), str):
                raise AudioError(f"{name} is open as text; open it in binary mode ('rb').")
            if not (hasattr(file, "seekable") and file.seekable()):
                spool = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(file, spool)
                file = spool
            file.seek(0, io.SEEK_END)
            size = file.tell()
        except (OSError, ValueError) as error:  # ValueError: a closed file
            raise AudioError(f"{name} cannot be read: {error}.") from None
        if size == 0:
            raise AudioError(f"{name} is empty (0 bytes); expected an audio file.")
        yield file, name
