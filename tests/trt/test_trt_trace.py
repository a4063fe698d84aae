"""What tracing promises: sizes, names, types, in-place writes, and errors that say what to do."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx")

import torch
import torch.nn.functional as F
from torch import nn

import m3asr.trt as trt
from m3asr.trt import table

RANGES = {"B": (1, 4, 16), "T": (4, 10, 60)}
X = {"x": trt.Input("float32", ("B", "T", 6))}


def traced(function, inputs=None, ranges=None, **options):
    return trt.trace(function, inputs or X, ranges or RANGES, **options)


def check(function, *shapes, inputs=None, tolerance=1e-6, **options):
    network = traced(function, inputs, **options)
    for shape in shapes or ((1, 4, 6), (3, 11, 6)):
        x = torch.randn(shape)
        with torch.no_grad():
            want = function(x)
        got = network.interpret([x])["output0"]
        assert got.shape == want.shape
        assert (got.double() - want.double()).abs().max() <= tolerance * want.abs().max().clamp_min(1)
    return network


# sizes


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


def test_training_mode_is_refused():
    with pytest.raises(trt.TraceError, match="eval"):
        traced(nn.Sequential(nn.Dropout()))


# names


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.router = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(block(x))
        return {"routes": torch.softmax(self.router(x), -1), "x": x}


def test_layers_carry_the_module_path():
    network = traced(Deep().eval())
    names = [network.network.get_layer(i).name for i in range(len(network))]
    assert "blocks.0/linear/matrix_multiply" in names and "blocks.1/linear/matrix_multiply" in names
    assert len(set(names)) == len(names)
    assert network.outputs == ["routes", "x"]
    record = {}
    network.interpret([torch.randn(1, 4, 6)], layers=record)
    assert record["blocks.0/linear/matrix_multiply"].shape == (1, 4, 6)


def test_outputs_are_named():
    assert traced(lambda x: (x, x * 2), outputs=["a", "b"]).outputs == ["a", "b"]
    with pytest.raises(trt.TraceError, match="3 output names"):
        traced(lambda x: (x, x * 2), outputs=["a", "b", "c"])
    with pytest.raises(trt.TraceError, match="no tensor"):
        traced(lambda x: None)


def test_an_input_and_a_constant_can_be_outputs():
    network = traced(lambda x: (x, torch.arange(3), x))
    got = network.interpret([torch.ones(1, 4, 6)])
    assert got["output1"].tolist() == [0, 1, 2] and torch.equal(got["output0"], got["output2"])


def test_one_constant_for_one_tensor():
    weight = torch.randn(6, 6)
    network = traced(lambda x: x @ weight @ weight + weight[0])
    sizes = [v.numel() for v in network.values.values()]
    assert sizes.count(36) == 1


# types


def kinds(network):
    """Type of every matrix product and softmax, by module."""
    trt_module, found = network.package.module, {}
    for i in range(len(network)):
        layer = network.network.get_layer(i)
        if layer.type in (trt_module.LayerType.MATRIX_MULTIPLY, trt_module.LayerType.SOFTMAX):
            found[layer.name] = layer.get_output(0).dtype.name
    return found


@pytest.mark.parametrize("precision, low", [("fp16", "HALF"), ("bf16", "BF16")])
def test_products_are_low_and_softmax_is_not(precision, low):
    found = kinds(traced(Deep().eval(), precision=precision))
    assert found["blocks.0/linear/matrix_multiply"] == low
    assert found["_softmax/softmax"] == "FLOAT"


def test_keep_float32():
    found = kinds(traced(Deep().eval(), precision="fp16", keep_float32=["router"]))
    assert found["router/linear/matrix_multiply"] == "FLOAT"
    assert found["blocks.1/linear/matrix_multiply"] == "HALF"


def test_an_explicit_float_holds_until_it_meets_the_low_type():
    weight = torch.randn(6, 6)

    def forward(x):
        low = x @ weight
        high = low.float() @ weight  # stays float32
        back = high.to(x.dtype).to(x.dtype)
        return back, (low * torch.sigmoid(high)) @ weight

    found = list(kinds(traced(forward, precision="fp16")).values())
    assert found == ["HALF", "FLOAT", "HALF"]


def test_masks_stay_finite_in_half():
    lowest = torch.finfo(torch.float32).min

    def forward(x):
        scores = x @ x.transpose(1, 2)
        return torch.softmax(scores.masked_fill(scores < 0, lowest) * 2, -1)

    network = traced(forward, precision="fp16")
    assert network.interpret([torch.randn(2, 5, 6)])["output0"].isfinite().all()


def test_a_half_module_is_built_as_it_is():
    module = nn.Linear(6, 6).half().eval()
    network = traced(module, {"x": trt.Input("float16", ("B", 6))})
    assert network.interpret([torch.randn(2, 6)])["output0"].dtype == torch.float16


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


# what is not covered


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


def test_nested_results_are_named_by_their_keys():
    network = trt.trace(
        lambda x: {"a": [x + 1, (x * 2,)], "b": x, "none": None, "n": 3}, {"x": trt.Input("float32", (2,))}
    )
    assert network.outputs == ["a.0", "a.1.0", "b"]


def test_scripted_modules():
    module = nn.Sequential(torch.jit.script(nn.Linear(4, 5)), nn.ReLU()).eval()
    network = trt.trace(module, {"x": trt.Input("float32", ("B", 4))}, {"B": (1, 2, 4)})
    x = torch.randn(3, 4)
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


def test_random_numbers_are_refused():
    with pytest.raises(trt.UncoveredOperation, match="no random numbers"):
        traced(lambda x: x + torch.randn_like(x))


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
