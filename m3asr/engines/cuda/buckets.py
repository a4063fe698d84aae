"""Which batch shapes are captured: a small set, so that memory and the number of captures stay bounded."""

from __future__ import annotations

# (up to, in steps of): subsampled frames of a bucket. Steps grow with the size, so padding stays near a sixteenth.
_STEPS = ((256, 16), (512, 32), (1024, 64), (2048, 128))
_LAST_STEP = 256


def bucket_frames(frames: int) -> int:
    """The bucket's subsampled frames for a batch of at most `frames`."""
    frames = max(frames, 1)
    for limit, step in _STEPS:
        if frames <= limit:
            return -(-frames // step) * step
    return -(-frames // _LAST_STEP) * _LAST_STEP


def bucket_batch(batch: int) -> int:
    """The bucket's number of utterances: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    size = 1
    while size < batch:
        if size + size // 2 >= batch and size > 1:
            return size + size // 2
        size *= 2
    return size
