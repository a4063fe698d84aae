"""The golden checkpoints, and how outputs are compared with their numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "data" / "golden"
GOLDEN_NAMES = ("3m-moe-80", "3m-moe-40", "3m-dense-80", "wenet-u2pp-80")


def relative_error(out: np.ndarray, reference: np.ndarray, lengths) -> float:
    """||out - reference|| / ||reference|| over the valid frames of a batch (B, S, ...)."""
    out = np.concatenate([row[:n] for row, n in zip(out, lengths, strict=True)]).astype(np.float64)
    reference = np.concatenate([row[:n] for row, n in zip(reference, lengths, strict=True)]).astype(np.float64)
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))
