"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: the tests' arrays are small, and other processes test beside this one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
from golden import GOLDEN  # noqa: E402


class _Folders(dict):
    """Golden checkpoints as model folders, converted when first asked for: an onnx engine takes seconds to build."""

    def __init__(self, root: Path):
        super().__init__()
        self._root = root

    def __missing__(self, name: str) -> Path:
        from m3asr.checkpoint import read_checkpoint
        from m3asr.convert import write_model_folder

        write_model_folder(read_checkpoint(GOLDEN / name), self._root / name)
        self[name] = self._root / name
        return self[name]


@pytest.fixture(scope="session")
def golden_folders(tmp_path_factory) -> dict[str, Path]:
    """Golden checkpoints as model folders with their onnx engine, by name."""
    return _Folders(tmp_path_factory.mktemp("models"))


def pytest_collection_modifyitems(items):
    """GPU tests are skipped with a printed reason where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
