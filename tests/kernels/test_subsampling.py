import pytest
import torch
import torch.nn.functional as F

from m3asr import ops
from m3asr.config import SUBSAMPLINGS
from m3asr.kernels.subsampling import first_convolution, next_convolution


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("normalised", [False, True], ids=["", "cmvn"])
def test_first_convolution(device, check, poisoned, tile, dtype, channels, normalised):
    groups, batch, frames, bins, width = 2, 3, 17, 12, 24
    x = torch.randn(batch, frames, channels * bins, device=device)
    lengths = torch.tensor([17, 10, 6], dtype=torch.int32, device=device)
    weight, bias = torch.randn(groups, width, channels, 3, 3, device=device), torch.randn(groups, width, device=device)
    mean, istd = torch.randn(2, channels * bins, device=device)
    seen = x.masked_fill(~ops.frame_mask(lengths, frames).unsqueeze(-1), 0.0).double()
    if normalised:
        seen = (seen - mean) * istd
    seen = seen.unflatten(-1, (channels, bins)).transpose(1, 2)
    reference = torch.stack([F.conv2d(seen, w.double(), b.double(), 2) for w, b in zip(weight, bias, strict=True)])
    reference = F.relu(reference).permute(0, 1, 3, 4, 2)  # (G, B, T', bins', D)
    x[1, 10:] = float("nan")
    x[2, 6:] = float("inf")
    out, out_lengths = poisoned(*reference.shape, dtype=dtype), poisoned(batch, dtype=torch.int32)
    first_convolution(
        x, lengths, weight.flatten(2).transpose(1, 2).contiguous(), bias, out, out_lengths, kernel=3, stride=2,
        receptive_field=7, rate=4, tile=tile(m=4, k=4), cmvn=(mean, istd) if normalised else None,
    )  # fmt: skip
    check(out, reference, dtype)
    assert torch.equal(out_lengths, ops.subsampled_lengths(lengths, SUBSAMPLINGS["conv2d"]).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel, stride", [(3, 2), (5, 3)])
@pytest.mark.parametrize("k", [16, 64])
def test_next_convolution(device, options, check, poisoned, tile, dtype, kernel, stride, k):
    groups, batch, frames, bins, width = 2, 2, 11, 9, 24
    x = torch.randn(groups, batch, frames, bins, width, device=device).to(dtype)
    weight = (torch.randn(groups, width, kernel, kernel, width, device=device) / 10).to(dtype)
    bias = torch.randn(groups, width, device=device)
    reference = torch.stack(
        [
            F.relu(F.conv2d(x[g].permute(0, 3, 1, 2).double(), weight[g].permute(0, 3, 1, 2).double(),
                            bias[g].double(), stride)).permute(0, 2, 3, 1)
            for g in range(groups)
        ]
    )  # fmt: skip
    out = poisoned(*reference.shape, dtype=dtype)
    next_convolution(x, weight, bias, out, kernel=kernel, stride=stride, tile=tile(k=k), **options(dtype))
    check(out, reference, dtype)
