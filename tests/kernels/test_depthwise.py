from itertools import product

import pytest
import torch
import torch.nn.functional as F

from m3asr.kernels.depthwise import depthwise

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def cases():
    """All of them on a GPU; the interpreter, which is slow, takes each kind in float32 and one of each other type."""
    kinds = [(15, False), (3, False), (8, True), (15, True)]
    for (taps, causal), normed, (rows, parts), dtype in product(kinds, [True, False], [(1, 1), (4, 1), (4, 2)], TYPES):
        once = (taps, causal, normed) == (3, False, True) and (dtype == torch.float32 or rows == 4)
        marks = () if once or (dtype == torch.float32 and rows == 4) else pytest.mark.gpu
        if normed or parts == 1:
            yield pytest.param(dtype, rows, parts, taps, causal, normed, marks=marks)


@pytest.mark.parametrize("dtype, rows, parts, taps, causal, normed", list(cases()))
def test_depthwise(device, options, check, poisoned, tile, dtype, rows, parts, taps, causal, normed):
    batch, frames, width = 3, 12, 40
    x = torch.randn(batch, frames, width, device=device).to(dtype)
    taps_weight, bias = torch.randn(taps, width, device=device), torch.randn(width, device=device)
    before = torch.randn(width, device=device) if causal else None
    norm_w, norm_b = torch.randn(2, width, device=device)
    left = taps - 1 if causal else taps // 2
    padded = F.pad(x.double(), (0, 0, left, 0 if causal else taps // 2))
    if causal:
        padded[:, :left] = before.double()
    reference = F.conv1d(padded.transpose(1, 2), taps_weight.double().t().unsqueeze(1), bias.double(), groups=width)
    reference = reference.transpose(1, 2).flatten(0, 1)
    if normed:
        reference = F.layer_norm(reference, (width,), norm_w.double(), norm_b.double(), 1e-5)
    out = poisoned(batch * frames, width, dtype=dtype)
    depthwise(
        x.flatten(0, 1), taps_weight, bias, out, frames=frames, left=left, activation="swish", before=before,
        tile=tile(rows, n=4, parts=parts), norm=(norm_w, norm_b, 1e-5) if normed else None, pdl=options(dtype)["pdl"],
    )  # fmt: skip
    check(out, F.silu(reference), dtype)
