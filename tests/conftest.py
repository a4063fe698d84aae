"""Shared fixtures."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Before torch is imported: the tests' arrays are small, and other processes test beside this one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before triton is imported, by whichever test comes first: without a GPU, kernels run in its interpreter.
if importlib.util.find_spec("torch") is not None:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
        if importlib.util.find_spec("triton") is not None:
            from triton_interpreter import hasten

            hasten()

import pytest  # noqa: E402
from golden import GOLDEN  # noqa: E402


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`made_once(name, make)`: the folder that `make(path)` writes, whole or not at all, when it is first asked for.

    Once for all processes of a run: an onnx engine takes many seconds to build. Only to be read: change a copy.
    """
    base = tmp_path_factory.getbasetemp()  # of this process; those of one run lie side by side
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"
    root.mkdir(exist_ok=True)

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        import fcntl

        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # freed when the file closes
            if not (root / name).exists():
                make(root / name)
        return root / name

    return folder


class _Golden(dict):
    """Folders by the checkpoint's name, converted when first asked for."""

    def __init__(self, made_once):
        super().__init__()
        self._made_once = made_once

    def __missing__(self, name: str) -> Path:
        from m3asr.checkpoint import read_checkpoint
        from m3asr.convert import write_model_folder

        self[name] = self._made_once(name, lambda path: write_model_folder(read_checkpoint(GOLDEN / name), path))
        return self[name]


@pytest.fixture(scope="session")
def golden_folders(made_once) -> dict[str, Path]:
    """Golden checkpoints as model folders with their onnx engine, by name. Only to be read: change a copy."""
    return _Golden(made_once)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the kernels run: the CPU under the interpreter, or the GPU."""
    on_gpu = torch.cuda.is_available()
    if request.param == "cuda" and not on_gpu:
        pytest.skip("no CUDA device")
    if request.param == "interpreter" and on_gpu:
        pytest.skip("the interpreter is for machines without a GPU")
    torch.manual_seed(0)
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture
def m3(monkeypatch, capfd):
    """Run `m3asr ARGUMENTS` in this process -> (exit code, standard output, standard error)."""
    from m3asr.cli import main

    def call(*arguments, stdin: bytes | None = None):
        monkeypatch.setattr(sys, "argv", ["m3asr", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return call


# The files that take longest, in the order in which they start, so that no process is left alone with one of them at
# the end. The first makes the golden folders that others read, meanwhile the second needs none.
LONGEST = (
    "test_engines.py",
    "test_tensorrt_engine.py",
    "test_verify.py",
    "test_trt_conformance.py",
    "test_cli_build.py",
    "test_streaming.py",
    "test_trt_modules.py",
    "test_cli.py",
    "test_cuda_waveforms.py",
    "test_cuda_engine.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first; GPU tests are skipped with a printed reason where there is no GPU."""
    import torch

    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
