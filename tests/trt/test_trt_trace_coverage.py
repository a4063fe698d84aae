"""What tracing does not cover and says so, converters that cover more, and branches on values."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx")

import torch
import torch.nn.functional as F
from torch import nn
from tracing import check, traced

import m3asr.trt as trt


def test_uncovered_operations_say_where_and_what_to_do():
    class Inner(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    module = nn.Sequential(nn.Linear(6, 6), Inner()).eval()
    with pytest.raises(trt.UncoveredOperation) as caught:
        traced(module)
    message = str(caught.value)
    assert "in module 1" in message and "bessel_j0" in message and "@trt.converter(" in message


def test_a_converter_in_torch_or_in_layers():
    @trt.converter(torch.special.bessel_j1)
    def with_torch(net, x):
        return x * 2 + 1

    @trt.converter(torch.special.bessel_y0, kind="float32")
    def with_layers(net, x):
        return trt.layers.unary("ABS", net.operand(x))

    x = torch.randn(2, 5, 6)
    network = traced(lambda x: torch.special.bessel_j1(x) + torch.special.bessel_y0(x), precision="fp16")
    torch.testing.assert_close(network.interpret([x])["output0"], x * 2 + 1 + x.abs(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x),
        lambda x: torch.unique(x),
        lambda x: x[: int(x.sum())],
        lambda x: F.one_hot(x[..., 0].long()),
    ],
    ids=["mask", "nonzero", "unique", "int", "one_hot"],
)
def test_what_depends_on_data_is_refused(function):
    with pytest.raises(trt.TraceError):
        traced(function)


def test_a_value_can_be_computed_with():
    check(lambda x: x * x.sum().item() + x.abs().max().item() ** 2)


def test_branches_on_values_are_taken_as_told():
    def forward(x):
        rows = x.sum(-1) > 100.0
        if rows.sum().item() != 0:
            x = x.masked_fill(rows.unsqueeze(-1), 0.0)
        return x * 2

    network = traced(forward, branches=True)
    for x in (torch.ones(2, 4, 6), 50 * torch.ones(2, 4, 6)):
        assert torch.equal(network.interpret([x])["output0"], forward(x))


def test_every_path_is_in_the_network_unless_told():
    def forward(x):
        if x.max() > 1:
            x /= x.max()
            if x.min().item() < -0.5:
                return x.clamp_min(-0.5), x.sum()
        assert not x.isnan().any(), "checked"
        return x * 3, x.mean()

    with pytest.warns(UserWarning, match="3 paths"):
        network = traced(forward)
    x = torch.rand(2, 4, 6)
    for given in (x, x * 5, x * 5 - 4):
        for got, want in zip(network.interpret([given]).values(), forward(given.clone()), strict=True):
            torch.testing.assert_close(got, want)


def test_a_loop_until_something_holds_is_refused():
    def forward(x):
        while x.max() > 1:
            x = x / 2
        return x

    with pytest.raises(trt.TraceError, match="more than 8 ways"):
        traced(forward)


@pytest.mark.filterwarnings("ignore")
def test_paths_of_different_kinds_are_refused():
    with pytest.raises(trt.TraceError, match="different kinds"):
        traced(lambda x: x if x.sum() > 0 else x.sum())


def test_random_numbers_are_refused():
    with pytest.raises(trt.UncoveredOperation, match="no random numbers"):
        traced(lambda x: x + torch.randn_like(x))


def test_training_mode_is_refused():
    with pytest.raises(trt.TraceError, match="eval"):
        traced(nn.Sequential(nn.Dropout()))
