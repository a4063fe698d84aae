import pytest
import torch

from m3asr.kernels.best import best_path
from m3asr.kernels.pieces import Tile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens, columns", [(1, 5), (70, 77), (33, 200)])
@pytest.mark.parametrize("rows", [16, 64])
def test_best_path(device, options, check, poisoned, dtype, tokens, columns, rows):
    """More tiles than programs, rows and columns past the last; of equals the first, within a tile and across."""
    a = torch.randn(tokens, 48, device=device).to(dtype)
    weight = (torch.randn(columns, 48, device=device) / 3).to(dtype)
    bias = torch.randn(columns, device=device)
    if columns > 5:
        weight[[3, 9, 60, 70]], bias[[3, 9, 60, 70]] = 0.0, 9.0
    log_probs = torch.log_softmax(a.double() @ weight.double().t() + bias, -1)
    best, peak = poisoned(tokens, dtype=torch.int32), poisoned(tokens)
    tile = Tile(rows, 32, 32, stages=2, copied=1)
    best_path(a, weight, bias, best, peak, tile=tile, **options(dtype))
    assert best.tolist() == log_probs.argmax(-1).tolist()
    check(peak, log_probs.max(-1).values, factor=4.0)
