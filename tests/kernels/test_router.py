import pytest
import torch
import torch.nn.functional as F

from m3asr.kernels.router import route


@pytest.mark.parametrize("rows", [1, 16], ids=lambda r: f"rows{r}")
@pytest.mark.parametrize("experts", [4, 5, 32])
def test_route(device, options, check, poisoned, tile, rows, experts):
    batch, frames, width = 3, 9, 48
    tokens = batch * frames
    x = torch.randn(tokens, width, device=device) + 2
    weight, bias = torch.randn(width, experts, device=device), torch.randn(experts, device=device)
    heard = torch.randn(tokens, 3 * experts, device=device)[:, experts : 2 * experts]
    lengths = torch.tensor([9, 0, 5], dtype=torch.int32, device=device)
    valid = (torch.arange(frames, device=device) < lengths[:, None]).flatten()
    y, gate = poisoned(tokens, width, dtype=torch.bfloat16), poisoned(tokens)
    expert_idx = poisoned(tokens, dtype=torch.int32)
    counts = poisoned(-(-tokens // rows), experts, dtype=torch.int32)
    route(
        x, weight / 4, bias, heard, lengths, y, expert_idx, gate, frames=frames, eps=1e-12, tile=tile(rows),
        scale=4.0, counts=counts, pdl=options(torch.float32)["pdl"],
    )  # fmt: skip
    normed = F.layer_norm(x.double(), (width,), eps=1e-12)
    probability, expected = torch.softmax(normed @ weight.double() + bias + heard, -1).max(-1)
    check(y, normed, torch.bfloat16)
    assert torch.equal(expert_idx[valid].long(), expected[valid])
    assert (expert_idx[~valid] == -1).all() and not gate[~valid].any()
    check(gate[valid], probability[valid])
    for i, chosen in enumerate(expert_idx.split(rows)):
        assert counts[i].tolist() == [int((chosen == e).sum()) for e in range(experts)]


@pytest.mark.parametrize("rows", [1, 16], ids=lambda r: f"rows{r}")
def test_the_first_expert_wins_a_tie(device, options, poisoned, tile, rows):
    x = torch.randn(4, 32, device=device)
    weight = torch.randn(32, 1, device=device).expand(32, 6).contiguous()
    bias = torch.tensor([0.0, 1, 2, 2, 2, -1], device=device)
    lengths = torch.tensor([4], dtype=torch.int32, device=device)
    y, gate, expert_idx = poisoned(4, 32), poisoned(4), poisoned(4, dtype=torch.int32)
    route(
        x, weight, bias, torch.zeros(4, 6, device=device), lengths, y, expert_idx, gate, frames=4, eps=1e-12,
        tile=tile(rows), pdl=options(torch.float32)["pdl"],
    )  # fmt: skip
    assert expert_idx.tolist() == [2] * 4
