"""Every row of the table: trace, network really built by TensorRT's API, interpreted, compared with torch."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx")

import torch
import trt_rows_functional  # noqa: E402, F401
import trt_rows_modules  # noqa: E402, F401
import trt_rows_pointwise  # noqa: E402, F401
import trt_rows_rare  # noqa: E402, F401
import trt_rows_reductions  # noqa: E402, F401
import trt_rows_shapes  # noqa: E402, F401
from torch.utils._pytree import tree_leaves
from trt_rows import ROWS  # noqa: E402

import m3asr.trt as trt  # noqa: E402

SIZES = ({"B": 2, "T": 7}, {"B": 3, "T": 12}, {"B": 5, "T": 5})
RANGES = {"B": (1, 4, 16), "T": (4, 10, 60)}
TOLERANCE = 1e-4


def compare(got, want):
    """Relative to the largest finite value; the same places must be NaN or infinite."""
    assert tuple(got.shape) == tuple(want.shape)
    assert got.dtype.is_floating_point == want.dtype.is_floating_point, (got.dtype, want.dtype)
    if not want.dtype.is_floating_point:
        assert torch.equal(got.to(want.dtype), want)
        return
    got, want = got.double(), want.double()
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert torch.equal(got[~finite].nan_to_num(), want[~finite].nan_to_num())
    if finite.any():
        scale = want[finite].abs().max().clamp_min(1e-3)
        error = ((got - want)[finite].abs().max() / scale).item()
        assert error <= TOLERANCE, error


@pytest.mark.parametrize("function, inputs", [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_row(function, inputs):
    described = {f"x{i}": trt.Input(m.dtype, m.dims) for i, m in enumerate(inputs)}
    network = trt.trace(
        function if isinstance(function, torch.nn.Module) else lambda *a: function(*a), described, RANGES
    )
    generator = torch.Generator().manual_seed(3)
    for sizes in SIZES:
        values = [m.values(sizes, generator) for m in inputs]
        with torch.no_grad():
            want = tree_leaves(function(*[v.clone() for v in values]))
        got = network.interpret(values)
        assert len(got) == len(want)
        for g, w in zip(got.values(), want, strict=True):
            compare(g, w)


def test_the_table_is_large_enough():
    assert len({name.split("(")[0] for name, *_ in ROWS}) >= 300
