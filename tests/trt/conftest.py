"""Triton kernels of the tests run in Triton's interpreter where there is no GPU."""

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
pytest.importorskip("tensorrt_rtx")
