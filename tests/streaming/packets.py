"""Sound for streams, and how it is fed to them."""

from __future__ import annotations

import numpy as np

from m3asr.stream import Stream


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose loudness changes ten times a second: random weights at least say something different each time."""
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.uniform(0, 0.2, 100), 1600)
    return (rng.standard_normal(160000) * loudness)[: round(seconds * 16000)].astype(np.float32)


def in_packets(stream: Stream, samples: np.ndarray, sizes) -> list:
    """Updates of a stream fed packets of these sizes, the rest at once."""
    updates, start = [], 0
    for size in sizes:
        updates += stream.accept(samples[start : start + size])
        start += size
    return updates + stream.accept(samples[start:]) + stream.finish()
