import pytest
import torch
import torch.nn.functional as F
from streams import floats, stream_of

from m3asr.kernels.pieces import Tile
from m3asr.kernels.stream import from_stream, norm_stream, to_stream

kinds = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# Half of the last bit: of 16, and of 11 and 3.
LOST = {torch.bfloat16: 2**-16, torch.float16: 2**-14}


@pytest.fixture
def both(options):
    return {"tile": Tile(4, 1), "pdl": options(torch.float32)["pdl"]}


@kinds
def test_there_and_back(device, both, dtype):
    x = torch.randn(9, 80, device=device) * torch.logspace(-3, 4, 9, device=device)[:, None]
    x[0, :6] = torch.tensor([0.0, -0.0, 1.0, -1.0, 65280.0, 1.00390625])  # the last is halfway between two bfloat16
    stream = to_stream(x, dtype, **both)
    reference, back = stream_of(x, dtype, 80), torch.full_like(x, float("nan"))
    assert torch.equal(stream.raw, reference.raw) and torch.equal(stream.low, reference.low)
    torch.testing.assert_close(stream.parts, reference.parts, rtol=1e-5, atol=1e-6)
    from_stream(stream, back, **both)
    assert torch.equal(back, floats(reference))
    assert ((back - x).abs() <= x.abs() * LOST[dtype] + 1e-6 * (dtype == torch.float16)).all()


@kinds
@pytest.mark.parametrize("adds", [False, True])
def test_norm(device, both, check, poisoned, dtype, adds):
    x, (w, b) = torch.randn(13, 48, device=device) * 2 - 5, torch.randn(2, 48, device=device)
    x[5] = 3.25  # no variance: what is left is b
    stream, more, expected = stream_of(x, dtype, 48), None, x.double()
    if adds:
        rows = poisoned(20, 48, dtype=dtype)  # of slots that no token has nothing is read
        slot = torch.randperm(20, device=device)[:13].int()
        slot[3] = -1
        rows[slot[slot >= 0].long()] = torch.randn(12, 48, device=device).to(dtype)
        more, expected = (rows, slot), expected + torch.where(slot[:, None] >= 0, rows[slot.long()].double(), 0.0)
    closed = poisoned(13, 48)
    from_stream(stream, closed, more=more, **both)
    normed = norm_stream(stream, w, b, eps=1e-5, more=more, **both)
    check(closed, expected, factor=10.0)
    expected = F.layer_norm(expected, (48,), w.double(), b.double(), 1e-5)
    assert normed.raw is stream.raw and normed.low is stream.low
    check(floats(normed), expected, factor=10.0)
    check(normed.parts, stream_of(expected, dtype, 48).parts, factor=10.0)
