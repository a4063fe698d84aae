"""Sizes while tracing: arithmetic, comparisons, ranges, Python numbers, and changes in place."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx")

import torch
import torch.nn.functional as F
from torch import nn
from tracing import RANGES, X, check, traced

import m3asr.trt as trt


def test_size_arithmetic():
    def forward(x):
        t = x.shape[1]
        half = t // 2 + t % 3 - 1
        return x[:, :half] * t + (x.size(0) * 2 - 1) / t + float(x.shape[2])

    check(forward)


def test_size_functions():
    import math

    check(lambda x: x * math.ceil(x.shape[1] / 3) + math.sqrt(x.shape[2]))
    check(lambda x: x[:, : torch.sym_max(x.shape[1] - 5, 1)])
    check(lambda x: x / x.shape[1] ** 0.5)
    check(lambda x: x[:, : torch.sym_min(x.shape[1], 7)])


def test_decidable_comparisons_choose_a_branch():
    check(lambda x: x * 2 if x.shape[1] > 3 else x * 3)
    check(lambda x: x * 2 if x.shape[1] >= 61 else x * 3)
    check(lambda x: x * 2 if x.shape[2] == 6 else x * 3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2 if x.shape[1] > 20 else x,
        lambda x: x * 2 if x.shape[0] == 1 else x,
        lambda x: sum(x[:, i] for i in range(x.shape[1])),
        lambda x: x + torch.zeros(x.shape[0], 10, 6),
        lambda x: x * int(x.shape[1]),
        lambda x: torch.stack([row for row in x]),
    ],
    ids=["branch", "one", "range", "broadcast", "int", "iterate"],
)
def test_undecidable_sizes_are_errors(function):
    with pytest.raises((trt.TraceError, RuntimeError)) as caught:
        traced(function)
    assert "B" in str(caught.value) or "T" in str(caught.value) or "10" in str(caught.value)


def test_messages_use_the_names_given():
    with pytest.raises(trt.TraceError, match=r"T > 20.*T = 4\.\.60"):
        traced(lambda x: x * 2 if x.shape[1] > 20 else x)


def test_size_one_broadcasts_at_run_time():
    network = traced(lambda x, y: x + y, {"x": trt.Input("float32", ("B", "T")), "y": trt.Input("float32", (1, "T"))})
    for b in (1, 3):
        x, y = torch.randn(b, 5), torch.randn(1, 5)
        assert torch.equal(network.interpret([x, y])["output0"], x + y)


def test_fixed_sizes_need_no_range():
    network = trt.trace(lambda x: x.flatten() * 2, {"x": trt.Input("float32", (2, 3))})
    assert network.interpret([torch.ones(2, 3)])["output0"].tolist() == [2.0] * 6


def test_inputs_are_checked():
    with pytest.raises(trt.TraceError, match="no range for the size T"):
        trt.trace(lambda x: x, X, {"B": (1, 2, 3)})
    with pytest.raises(trt.TraceError, match="smallest <= usual"):
        trt.trace(lambda x: x, X, {"B": (3, 2, 1), "T": (1, 2, 3)})
    with pytest.raises(trt.TraceError, match="unknown dtype"):
        trt.trace(lambda x: x, {"x": trt.Input("float99", ("B",))}, RANGES)
    with pytest.raises(trt.TrtError, match="missing"):
        traced(lambda x: x).interpret({})
    with pytest.raises(trt.TrtError, match="shape"):
        traced(lambda x: x).interpret([torch.ones(1, 4, 7)])


def test_a_range_that_only_the_data_has_is_refused():
    with pytest.raises(trt.TraceError, match="only the data has"):
        trt.trace(lambda n: torch.arange(0, n.max().item()) < n[:, None], {"n": trt.Input("int32", (3,))})


class AsksForInts(nn.Module):
    """What ordinary forwards do with sizes as Python numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(1, 50, 4))

    def forward(self, x):
        size = x.shape[1]
        assert isinstance(size, int) and not isinstance(size, (str, bool))
        size = max(size, 3, x.shape[0] - 100)
        return x + self.table[:, : min(size, 100)]


def test_sizes_pass_for_python_numbers():
    module = AsksForInts()
    names = dict(globals())
    network = trt.trace(module, {"x": trt.Input("float32", ("B", "T", 4))}, {"B": (1, 2, 4), "T": (3, 5, 50)})
    for shape in ((2, 3, 4), (1, 50, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(network.interpret([x])["output0"], module(x))
    assert globals() == names and isinstance is __builtins__["isinstance"]


def test_sizes_equal_by_another_formula_are_equal():
    """A mask that was subsampled beside the features has the same length, though not the same expression for it."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Sequential(nn.Conv1d(2, 2, 3, 2), nn.Conv1d(2, 2, 3, 2))

        def forward(self, x, mask):
            x = self.convolution(x)
            x.masked_fill_(~mask[:, :, 2::2][:, :, 2::2], 0.0)
            return x

    module = Masked().eval()
    inputs = {"x": trt.Input("float32", (1, 2, "T")), "mask": trt.Input("bool", (1, 1, "T"))}
    network = trt.trace(module, inputs, {"T": (7, 50, 400)})
    for frames in range(7, 20):
        x, mask = torch.randn(1, 2, frames), torch.rand(1, 1, frames) > 0.3
        with torch.no_grad():
            torch.testing.assert_close(network.interpret([x, mask])["output0"], module(x.clone(), mask))


def unsqueezed(x):
    y = x + 0
    y.unsqueeze_(1)
    y += 1
    return y, y.shape[3] * y


def transposed_and_written(x):
    y = x + 0
    z = y[:, 0]
    z.transpose_(0, 1)
    z[0] = 7
    return y, z


def written_before_and_after(x):
    y = x + 0
    z = y[:, 0]
    y += 1
    z.unsqueeze_(0)
    y += 1
    return y, z


def constant(x):
    mask = torch.ones(2, 3)
    mask.unsqueeze_(0)
    return x[:, :2, :3] + mask


@pytest.mark.parametrize("function", [unsqueezed, transposed_and_written, written_before_and_after, constant])
def test_sizes_that_change_in_place(function):
    network = traced(function)
    for shape in ((2, 4, 6), (1, 9, 6)):
        x = torch.randn(shape)
        want = function(x.clone())
        got = network.interpret([x.clone()]).values()
        for g, w in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
            torch.testing.assert_close(g, w)


def test_sizes_of_what_others_look_into_stay():
    def forward(x):
        y = x + 0
        part = y[:, 0]
        y.unsqueeze_(0)
        return y, part

    with pytest.raises(trt.TraceError, match="unsqueeze_ changes the sizes"):
        traced(forward)


def test_a_comparison_of_sizes_as_an_argument():
    def forward(q):
        return F.scaled_dot_product_attention(q, q, q, is_causal=q.shape[1] > 1)

    inputs = {"q": trt.Input("float32", (2, "T", 4))}
    network = trt.trace(forward, inputs, {"T": (2, 5, 9)})
    q = torch.randn(2, 7, 4)
    torch.testing.assert_close(network.interpret([q])["output0"], forward(q), rtol=1e-4, atol=1e-5)
    with pytest.raises(trt.TraceError, match="T > 1"):
        trt.trace(forward, inputs, {"T": (1, 5, 9)})
    assert F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"
