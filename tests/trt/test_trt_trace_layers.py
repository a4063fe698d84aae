"""What a traced network consists of: names of layers and outputs, constants, types, scripted modules."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx")

import torch
from torch import nn
from tracing import traced

import m3asr.trt as trt

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
