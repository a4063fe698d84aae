"""A file of sound -> blocks of samples, by whoever reads its container.

libsndfile reads wav, flac, mp3, ogg and opus. Other containers (m4a, aac, webm, the sound of videos) go through PyAV,
the extra `media`, and only when their first bytes say what they are: a demuxer is never left to guess, because some
of them (playlists) open other files and addresses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeAlias

import numpy as np

from m3asr.errors import AudioError, MissingExtra, reason

Blocks: TypeAlias = "Iterator[tuple[int, np.ndarray]]"  # (sample rate, (N, C) float32)

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


def decode(file: BinaryIO, name: str, damaged: Callable[[str], None]) -> Blocks:
    """From the file's start. name: what it is called in messages; damaged: is told if not all of it could be decoded.

    Raises AudioError for what is no sound or gives none, MissingExtra when PyAV is needed and not installed.
    """
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


def _decode_libsndfile(sound, name: str, damaged: Callable[[str], None]) -> Blocks:
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


def _decode_pyav(file: BinaryIO, name: str, refusal: str, damaged: Callable[[str], None]) -> Blocks:
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
            cause = reason(error)
    if not cause and demuxer in _LIBSNDFILE_READS and "malformed" in refusal:
        cause = refusal
    _report_damage(name, seconds, expected, cause, damaged)


def _pyav_blocks(container, stream) -> Blocks:
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
