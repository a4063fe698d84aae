"""Writing in place, what a forward keeps, and that a trace leaves module and torch as they were."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx")

import torch
from torch import nn
from tracing import check, traced

import m3asr.trt as trt
from m3asr.trt import table

# writing in place


def test_views_and_bases_share_what_is_written():
    def forward(x):
        y = x + 0.0
        first, flat = y[:, 0], y.view(-1)
        first += 10.0
        flat[1::2] = 0.0
        y[:, 1:, 2] *= 2
        return y + first.unsqueeze(1), flat

    check(lambda x: forward(x)[0])
    check(lambda x: forward(x)[1])


def test_a_write_through_a_transposed_view_needs_no_scatter():
    def forward(x):
        y = x * 1.0
        turned = y.permute(1, 2, 0)
        turned.transpose(0, 1).masked_fill_(turned.transpose(0, 1) > 0, 0.5)
        return y

    network = check(forward)
    assert not any("scatter" in network.network.get_layer(i).name for i in range(len(network)))


def test_a_view_of_a_weight_is_not_written():
    layer = nn.Linear(6, 6)
    before = layer.weight.clone()
    with pytest.raises(trt.TraceError, match="no state"):
        traced(nn.Sequential(Writes(layer)).eval())
    assert torch.equal(layer.weight, before)


class Writes(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        self.layer.weight.detach()[0].mul_(2)
        return self.layer(x)


def test_a_buffer_made_in_forward_can_be_filled():
    def forward(x):
        out = torch.zeros(x.shape[0], 3, 6)
        out[:, 1] = x[:, 0]
        out[:, 2].copy_(x[:, -1])
        fixed = torch.zeros(2, 6)
        fixed[0] = x[0, 0]
        return out.sum(1) + fixed.sum(0)

    check(forward)


def test_state_is_refused():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(6))

        def forward(self, x):
            self.seen.add_(x.sum((0, 1)))
            return x + self.seen

    with pytest.raises(trt.TraceError, match="no state"):
        traced(Counter().eval())


def test_a_symbolic_tensor_does_not_outlive_its_trace():
    kept = []
    traced(lambda x: kept.append(x) or x * 2)
    with pytest.raises(trt.TraceError, match="trace"):
        kept[0] + 1


def test_the_module_is_left_as_it_was():
    module = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    traced(module)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert not torch.nn.modules.module._global_forward_hooks
    assert module(torch.randn(1, 4, 6)).shape == (1, 4, 6)


def test_a_failed_trace_leaves_torch_as_it_was(monkeypatch):
    """A stack overflow cuts torch's clean-up short; the next call must not notice."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    @trt.converter(torch.special.erfcx)
    def endless(net, x):
        return torch.special.erfcx(x)

    with pytest.raises(trt.TraceError, match="without end"):
        trt.trace(lambda x: torch.special.erfcx(x), {"x": trt.Input("float32", (2,))})
    assert not _get_current_dispatch_mode_stack()
    assert type(torch.ones(2) + 1) is torch.Tensor
    monkeypatch.delitem(table.CONVERTERS, torch.special.erfcx)


def test_out_names_no_tensor_of_the_module():
    weight = torch.zeros(2)
    with pytest.raises(trt.TraceError, match="out="):
        trt.trace(lambda x: torch.add(x, 1, out=weight), {"x": trt.Input("float32", (2,))})
    with pytest.raises(trt.TraceError, match="other sizes"):
        trt.trace(lambda x: torch.add(x, 1, out=torch.empty(3)), {"x": trt.Input("float32", (2,))})


class GrowingTable(nn.Module):
    """Keeps what it computed, as positional encodings do."""

    def __init__(self):
        super().__init__()
        self.table = None
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        if self.table is None or self.table.shape[0] < x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype).unsqueeze(-1)
        self.last = x.sum()
        self.runs = 1
        return x + self.table[: x.shape[1]]


def test_what_a_forward_keeps_is_forgotten():
    module = GrowingTable().eval()
    network = trt.trace(module, {"x": trt.Input("float32", ("B", "T", 3))}, {"B": (1, 2, 4), "T": (2, 5, 9)})
    assert module.table is None and not hasattr(module, "runs") and torch.equal(module.last, torch.zeros(1))
    for shape in ((2, 5, 3), (1, 9, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(network.interpret([x])["output0"], module(x))


def test_a_cache_in_a_dict_is_forgotten():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.cache = {}

        def forward(self, x):
            if "bias" not in self.cache:
                self.cache["bias"] = x.sum() * 0 + 1
            return x + self.cache["bias"]

    module = Cached()
    trt.trace(module, {"x": trt.Input("float32", (2, 3))})
    assert module.cache == {}
