"""Shared fixtures: the golden checkpoints, and model folders converted from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "data" / "golden"
GOLDEN_NAMES = ("3m-moe-80", "3m-moe-40", "3m-dense-80", "wenet-u2pp-80")


def relative_error(out: np.ndarray, reference: np.ndarray, lengths) -> float:
    """||out - reference|| / ||reference|| over the valid frames of a batch (B, S, ...)."""
    out = np.concatenate([row[:n] for row, n in zip(out, lengths, strict=True)]).astype(np.float64)
    reference = np.concatenate([row[:n] for row, n in zip(reference, lengths, strict=True)]).astype(np.float64)
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))


@pytest.fixture(scope="session")
def golden_folders(tmp_path_factory) -> dict[str, Path]:
    """Golden checkpoints as model folders with their onnx engine, by name."""
    from m3asr.checkpoint import read_checkpoint
    from m3asr.convert import write_model_folder

    folders = {}
    for name in GOLDEN_NAMES:
        folders[name] = tmp_path_factory.mktemp("models") / name
        write_model_folder(read_checkpoint(GOLDEN / name), folders[name])
    return folders


def pytest_collection_modifyitems(items):
    """GPU tests are skipped with a printed reason where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
