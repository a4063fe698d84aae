"""Any recording -> float32 mono waveform at 16 kHz.

libsndfile reads wav, flac, mp3, ogg and opus. Other containers (m4a, aac, webm, the sound of videos) go through PyAV,
the extra `media`, and only when their first bytes say what they are: a demuxer is never left to guess, because some
of them (playlists) open other files and addresses.

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
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from m3asr.errors import AudioError, MissingExtra

SAMPLE_RATE = 16000

AudioSource: TypeAlias = "str | Path | bytes | BinaryIO | np.ndarray"
_Blocks: TypeAlias = "Iterator[tuple[int, np.ndarray]]"  # (sample rate, (N, C) float32)

_SILENCE = 1e-4  # -80 dBFS: three steps of 16 bits
_PEAK_LIMIT = 10.0
_RATES = (2000, 768000)
_READ_FRAMES = 8192  # what a decoding error inside a file costs at most

# Offset, first bytes, name, FFmpeg demuxer. libsndfile has had its turn before this table is read.
_CONTAINERS = (
    (4, b"ftyp", "MP4 or M4A", "mov"),
    (4, b"moov", "QuickTime", "mov"),
    (4, b"mdat", "QuickTime", "mov"),
    (4, b"wide", "QuickTime", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "WebM or Matroska", "matroska"),
    (0, b"OggS", "Ogg", "ogg"),
    (8, b"WAVE", "WAV", "wav"),
    (8, b"AVI ", "AVI", "avi"),
    (0, b"fLaC", "FLAC", "flac"),
    (0, b"FORM", "AIFF", "aiff"),
    (0, b"caff", "CAF", "caf"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMA or WMV", "asf"),
    (0, b"FLV\x01", "Flash video", "flv"),
    (0, b"#!AMR", "AMR", "amr"),
    (0, b"MAC ", "Monkey's Audio", "ape"),
    (0, b"wvpk", "WavPack", "wv"),
    (0, b"TTA1", "True Audio", "tta"),
    (0, b"\x0b\x77", "AC-3", "ac3"),
    (0, b"\x00\x00\x01\xba", "MPEG program stream", "mpeg"),
)
_LIBSNDFILE_READS = {"ogg", "wav", "flac", "aiff", "caf", "mp3"}


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
            yield from _mono_16k(lambda damaged: _decode(file, name, damaged), name)
    else:
        rate = SAMPLE_RATE if sample_rate is None else sample_rate
        samples = _from_array(source)  # (N, C)
        yield from _mono_16k(lambda damaged: iter([(rate, samples)]), "the array")


def _mono_16k(start: Callable[[Callable[[str], None]], _Blocks], name: str) -> Iterator[np.ndarray]:
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


def _heard_channels(blocks: _Blocks) -> np.ndarray | None:
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
    if peak > _PEAK_LIMIT:
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
                raise AudioError(f"{name} cannot be opened: {error}.") from None
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


def _decode(file: BinaryIO, name: str, damaged: Callable[[str], None]) -> _Blocks:
    import soundfile

    file.seek(0)
    try:
        sound = soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        refusal = error.error_string
    except TypeError:  # a name in .raw: soundfile asks for the format instead of looking at the bytes
        refusal = "no header"
    else:
        with sound:
            if sound.subtype != "MPEG_LAYER_I":  # nobody records it, and two bytes of other data can look like it
                yield from _decode_libsndfile(sound, name, damaged)
                return
        refusal = "MPEG layer I"
    yield from _decode_pyav(file, name, refusal, damaged)


def _decode_libsndfile(sound, name: str, damaged: Callable[[str], None]) -> _Blocks:
    import soundfile

    rate = sound.samplerate
    expected = sound.frames if sound.frames < 2**62 else 0  # a streamed header does not know
    log = sound.extra_info
    if expected == 0 and re.search(r"data : 0\n\*\*\* ", log):
        raise AudioError(
            f"{name}: the WAV header says 0 samples, yet data follows (an interrupted recording); "
            "rewrite the header, for example with: ffmpeg -i IN.wav OUT.wav"
        )
    # libsndfile clips a WAV or AIFF header to the bytes there are and notes it in its log only. Sizes near 2^31 and
    # 2^32 are what programs write that do not know the length yet.
    clipped = re.search(r"(?:data|SSND) *: (\d+) \(should be (\d+)\)", log)
    if clipped and 0 < int(clipped[2]) < int(clipped[1]) < 0x7FFF0000:
        expected = round(expected * int(clipped[1]) / int(clipped[2]))
    # soundfile seeks after each read to where it is anyway; in mp3 that loses the bits that frames share.
    sound.seekable = lambda: False
    n_read, cause = 0, ""
    try:
        while len(block := sound.read(_READ_FRAMES, dtype="float32", always_2d=True)):
            n_read += len(block)
            yield rate, block
    except soundfile.LibsndfileError as error:
        cause = error.error_string
    _report_damage(name, n_read / rate, expected / rate, cause, damaged)


def _decode_pyav(file: BinaryIO, name: str, refusal: str, damaged: Callable[[str], None]) -> _Blocks:
    head, title, demuxer = _sniff(file)
    if demuxer is None:
        raise AudioError(
            f"{name} is not audio: it starts with {head[:16]!r}; "
            "expected wav, flac, mp3, ogg, opus, m4a, aac, webm, mp4 or mkv."
        )
    trouble = f"{name} looks like {title} but is damaged, cut short or in an unknown encoding"
    try:
        import av
    except ImportError:
        if demuxer in _LIBSNDFILE_READS:
            raise AudioError(f"{trouble} ({refusal.rstrip('.')}); pip install 'm3asr[media]' reads more.") from None
        raise MissingExtra(f"{name} ({title})", "media") from None

    file.seek(0)
    try:
        container = av.open(file, format=demuxer, metadata_errors="ignore")
    except av.error.FFmpegError as error:
        raise AudioError(f"{trouble} ({error.strerror}).") from None
    with container:
        if not container.streams.audio:
            raise AudioError(f"{name} ({title}) holds no sound; expected at least one audio stream.")
        stream = container.streams.audio[0]
        expected = 0.0
        if stream.duration and demuxer == "mov":
            expected = float(stream.duration * stream.time_base)
        elif container.duration and demuxer == "matroska" and not container.streams.video:
            expected = container.duration / av.time_base
        seconds, cause = 0.0, ""
        try:
            for rate, block in _pyav_blocks(container, stream):
                seconds += len(block) / rate
                yield rate, block
        except av.error.FFmpegError as error:
            cause = error.strerror or str(error)
    if not cause and demuxer in _LIBSNDFILE_READS and "malformed" in refusal:
        cause = refusal
    _report_damage(name, seconds, expected, cause, damaged)


def _pyav_blocks(container, stream) -> _Blocks:
    """Frames as float32 (N, C). Rate and channels may change inside a stream; those of the first frame are kept.

    Converted to packed samples, one plane: PyAV reads past the planes of a frame with more than 8 channels.
    """
    import av

    resampler, kind, target = None, None, None

    def samples(frames):
        return ((target["rate"], frame.to_ndarray().reshape(-1, frame.layout.nb_channels)) for frame in frames)

    for frame in container.decode(stream):
        frame.pts = None
        if kind != (frame.format.name, frame.layout.name, frame.rate):
            kind = (frame.format.name, frame.layout.name, frame.rate)
            if frame.layout.nb_channels > 8:
                raise av.error.InvalidDataError(0, f"{frame.layout.nb_channels} channels where 8 are the most")
            target = target or {"format": "flt", "layout": frame.layout.name, "rate": frame.rate}
            if resampler is not None:
                yield from samples(resampler.resample(None))
            resampler = av.AudioResampler(**target)
        yield from samples(resampler.resample(frame))
    if resampler is not None:
        yield from samples(resampler.resample(None))


def _report_damage(name: str, got: float, expected: float, cause: str, damaged: Callable[[str], None]) -> None:
    """got and expected in seconds; lengths in headers may be off by a codec's padding."""
    missing = got < 0.99 * expected - 0.1 or got == 0 < expected
    if not cause and not missing:
        return
    because = f" ({cause.strip().rstrip('.')})" if cause else ""
    if got == 0:
        raise AudioError(f"{name} is damaged or cut short: nothing in it can be decoded{because}.")
    of = f" of {expected:.1f} s" if missing else ""
    damaged(f"{name} is damaged or cut short: {got:.1f} s{of} could be decoded{because}")


def _sniff(file: BinaryIO) -> tuple[bytes, str, str | None]:
    """(first bytes, name, demuxer), the demuxer None when the bytes are of no known container."""
    file.seek(0)
    head = file.read(256)
    id3 = head[:3] == b"ID3"
    if id3:  # a tag before mp3 or aac; its size has 7 bits a byte
        size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=False))
        file.seek(10 + size)
        head = file.read(256)
    for offset, magic, title, demuxer in _CONTAINERS:
        if head[offset : offset + len(magic)] == magic:
            return head, title, demuxer
    if len(head) >= 4 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return head, "AAC", "aac"
    if id3 or (len(head) >= 4 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2 and head[2] & 0xF0 != 0xF0):
        return head, "MP3", "mp3"
    if len(head) > 188 and head[0] == head[188] == 0x47:
        return head, "MPEG transport stream", "mpegts"
    return head, "", None
