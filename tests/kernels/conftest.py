"""Kernels against torch: in Triton's interpreter where there is no GPU, compiled where there is one (`-m gpu`)."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from m3asr.kernels.pieces import Tile  # noqa: E402

# Relative error, ||out - reference|| / ||reference||, by the compute type.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
TYPES = list(TOLERANCE)


@pytest.fixture
def options(device):
    """Options every launcher takes, for a compute type."""

    def of(dtype):
        pdl = device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 9
        if dtype == torch.float32:
            return {"dot": "tf32x3", "pdl": pdl}
        return {"dot": "ieee" if device.type == "cuda" else "upcast", "pdl": pdl}

    return of


@pytest.fixture
def check():
    """check(out, reference, dtype): nothing unwritten, and as near as the type allows."""

    def compare(out, reference, dtype=torch.float32, factor=1.0):
        assert out.shape == reference.shape
        assert torch.isfinite(out).all(), "an element was not written, or read from where nothing was"
        out, reference = out.double(), reference.double()
        error = float((out - reference).norm() / reference.norm().clamp(min=1e-30))
        assert error <= factor * TOLERANCE[dtype], f"relative error {error:.2e}"

    return compare


@pytest.fixture
def poisoned(device):
    """poisoned(*shape): a tensor whose unwritten elements show."""

    def make(*shape, dtype=torch.float32):
        if dtype == torch.int32:
            return torch.full(shape, -(10**6), dtype=dtype, device=device)
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    return make


@pytest.fixture
def tile():
    """A small tile that leaves remainders."""
    return lambda m=16, n=16, k=16, warps=4, stages=2, parts=1: Tile(m, n, k, warps, stages, parts)
