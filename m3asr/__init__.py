"""Conformer mixture-of-experts speech recognition: one model, several engines.

>>> import m3asr
>>> m3asr.load().transcribe("speech.wav").text  # doctest: +SKIP
"""

from m3asr.audio import DamagedAudio
from m3asr.decode import Word
from m3asr.errors import AudioError, M3asrError, MissingExtra, ModelError
from m3asr.formats import Segment, Transcript
from m3asr.segment import SegmentOptions
from m3asr.stream import EndpointRule, Stream, StreamOptions, Update
from m3asr.transcribe import DecodeOptions, Recording, Transcriber, UnusableHotword, load

__version__ = "0.1.0"
__all__ = [
    "AudioError",
    "DamagedAudio",
    "DecodeOptions",
    "EndpointRule",
    "M3asrError",
    "MissingExtra",
    "ModelError",
    "Recording",
    "Segment",
    "SegmentOptions",
    "Stream",
    "StreamOptions",
    "Transcriber",
    "Transcript",
    "UnusableHotword",
    "Update",
    "Word",
    "load",
]
