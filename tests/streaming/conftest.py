"""Models for streams, made once a run."""

from __future__ import annotations

from functools import cache

import pytest
from streaming_models import write_model

from m3asr.engines import load_engine
from m3asr.folder import ModelFolder


@pytest.fixture(scope="session")
def folder_of(made_once):
    """Model folders with random weights, by the name of the variant."""

    @cache
    def folder(name: str) -> ModelFolder:
        return ModelFolder.read(made_once(f"streaming-{name}", lambda path: write_model(name, path)))

    return folder


@pytest.fixture(scope="session")
def engine_of(folder_of):
    """Engines by the name of the variant and their own."""

    @cache
    def engine(name: str, kind: str):
        return load_engine(folder_of(name), kind, threads=1)

    return engine


@pytest.fixture(scope="session")
def wenet(golden_folders) -> ModelFolder:
    return ModelFolder.read(golden_folders["wenet-u2pp-80"])
