"""Recordings made on the spot, as bytes of files of many kinds."""

import io

import av
import numpy as np
import soundfile as sf


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
