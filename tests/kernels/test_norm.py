import pytest
import torch
import torch.nn.functional as F

from m3asr.kernels.log_softmax import log_softmax
from m3asr.kernels.norm import norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4], ids=lambda r: f"rows{r}")
@pytest.mark.parametrize("prior", [False, True], ids=["", "prior"])
def test_norm(device, options, check, poisoned, tile, dtype, rows, prior):
    x = torch.randn(13, 48, device=device) * 2 - 5
    w, b, prior_w, prior_b = torch.randn(4, 48, device=device)
    x[5] = 3.25  # a constant row has no variance: zeros, not NaN
    stream = F.layer_norm(x.double(), (48,), prior_w.double(), prior_b.double(), 1e-5) if prior else x.double()
    reference = F.layer_norm(stream, (48,), w.double(), b.double(), 1e-12)
    out, hidden = poisoned(13, 48, dtype=dtype), poisoned(13, 48)
    norm(
        x, out, eps=1e-12, tile=tile(rows), prior=(prior_w, prior_b, 1e-5, x) if prior else None,
        affine=(w, b, hidden), pdl=options(dtype)["pdl"],
    )  # fmt: skip
    check(out, reference, dtype)
    check(hidden, reference)
    check(x, stream)


def test_log_softmax(device, options, check, poisoned, tile):
    x = torch.randn(5, 77, device=device) * 10
    x[1, 3] = 1e4
    x[2] = 0.5  # all equal: the first is the best
    x[3, 70] = x[3, 6] = x[3, 40] = 99.0
    reference = torch.log_softmax(x.double(), -1)
    best, peak = poisoned(5, dtype=torch.int32), poisoned(5)
    log_softmax(x, best, peak, tile=tile(1, 32), pdl=options(torch.float32)["pdl"])
    check(x, reference)
    check(peak, reference.max(-1).values)
    assert best.tolist() == [reference[0].argmax().item(), 3, 0, 6, reference[4].argmax().item()]
