"""Plans really built, quantisation, comparison, and networks that came from elsewhere."""

import os

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx")

import torch
from test_trt_conformance import RANGES
from torch import nn
from trt_rows import ROWS

import m3asr.trt as trt
from m3asr.trt import runtime
from m3asr.trt.interpret import Interpreter
from m3asr.trt.plugin_parser import make_findable

# A few of each kind; M3ASR_BUILD_ALL=1 builds a plan for every row of the table (a minute or two).
SAMPLE = {
    "torch.add", "Tensor.__getitem__(step)", "torch.topk", "torch.where", "nn.Conv1d", "nn.ConvTranspose2d",
    "nn.MultiheadAttention(mask)", "nn.LSTM", "F.interpolate(linear)", "torch.scatter_add", "Tensor.mul_(view)",
    "torch.cumsum", "F.pad(reflect)", "nn.GroupNorm",
}  # fmt: skip
BUILT = [r for r in ROWS if os.environ.get("M3ASR_BUILD_ALL") or r[0] in SAMPLE]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("function, inputs", [r[1:] for r in BUILT], ids=[r[0] for r in BUILT])
def test_row_builds(function, inputs, precision):
    given = {f"x{i}": trt.Input(m.dtype, m.dims) for i, m in enumerate(inputs)}
    module = function if isinstance(function, nn.Module) else lambda *a: function(*a)
    assert len(trt.build(module, given, RANGES, precision=precision)) > 1000


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.up, self.conv, self.down = nn.Linear(16, 32), nn.Conv1d(32, 32, 3, padding=1), nn.Linear(32, 8)

    def forward(self, x):
        y = torch.relu(self.up(x)).transpose(1, 2)
        return self.down(self.conv(y).transpose(1, 2))


X = {"x": trt.Input("float32", ("B", "T", 16))}


def small(**options):
    return trt.trace(Small().eval(), X, RANGES, **options)


def test_several_profiles_and_targets():
    ranges = [{"B": (1, 1, 1), "T": (1, 10, 50)}, {"B": (1, 8, 32), "T": (40, 100, 400)}]
    network = trt.trace(Small().eval(), X, ranges)
    assert network.interpret([torch.randn(32, 400, 16)])["output0"].shape == (32, 400, 8)
    assert trt.serialize(network, compute_capabilities=("SM89", "SM120"))
    with pytest.raises(trt.BuildError, match="unknown compute capability"):
        trt.serialize(network, compute_capabilities=("SM1",))


def test_a_refused_network_quotes_tensorrt():
    with pytest.raises(trt.BuildError, match="fp8|sm86"):
        network = small(quantize=trt.calibrate(small(), [{"x": torch.randn(2, 9, 16)}], "fp8"))
        trt.serialize(network, compute_capabilities=("SM86",))


def test_a_plan_is_written_whole_or_not_at_all(tmp_path):
    assert trt.write(small(), tmp_path / "a.plan") == (tmp_path / "a.plan").stat().st_size
    with pytest.raises(OSError):
        trt.write(small(), tmp_path / "missing" / "a.plan")
    assert [p.name for p in tmp_path.iterdir()] == ["a.plan"]


@pytest.mark.parametrize("kind, low, high", [("int8", 1e-3, 0.05), ("fp8", 5e-3, 0.12)])
def test_quantisation(kind, low, high):
    module, x = Small().eval(), torch.randn(3, 20, 16)
    scales = trt.calibrate(small(), [{"x": torch.randn(4, 30, 16)} for _ in range(3)], kind)
    assert set(scales.largest) == {"up", "conv", "down"}
    network = trt.trace(module, X, RANGES, precision="fp16", quantize=scales)
    kinds = [network.network.get_layer(i).type.name for i in range(len(network))]
    assert kinds.count("QUANTIZE") == kinds.count("DEQUANTIZE") == 6
    got, want = network.interpret([x])["output0"], module(x)
    assert low < (got - want).norm() / want.norm() < high  # there is an error, and it is a small one
    assert len(trt.serialize(network)) > 1000
    some = trt.calibrate(small(), [{"x": x}], kind, exclude=["conv"])
    assert set(some.largest) == {"up", "down"}
    with pytest.raises(trt.TraceError, match="no batch"):
        trt.calibrate(small(), [], kind)


def test_the_first_module_that_departs_is_named():
    network = small()
    other = Small().eval()
    with torch.no_grad():
        other.conv.weight[3, 1, 1] += 0.5
    comparison = trt.compare(network, other, {"x": torch.randn(2, 9, 16)})
    assert [r.path for r in comparison.rows] == ["up", "conv", "down", ""]
    assert comparison.first_departing(1e-4).path == "conv" and comparison.rows[0].error < 1e-5
    assert comparison.first_departing(1e-4).worst[1] == 3
    assert trt.compare(network, Small().eval(), {"x": torch.randn(2, 9, 16)}).first_departing(1e-4) is None


def test_the_first_layer_that_makes_a_nan_is_named():
    class Divides(nn.Module):
        def forward(self, x):
            return torch.relu(torch.log(x) * 2) + 1

    network = trt.trace(Divides().eval(), X, RANGES)
    assert trt.compare(network, Divides(), {"x": torch.ones(1, 4, 16)}).not_finite is None
    assert trt.compare(network, Divides(), {"x": -torch.ones(1, 4, 16)}).not_finite == "log/unary"


def test_a_network_from_the_onnx_parser_is_interpreted():
    """The interpreter reads any finished network, constants included, not only what was traced here."""
    from onnx import TensorProto, helper, numpy_helper

    weight = torch.randn(16, 8)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Softmax", ["h"], ["p"], axis=-1),
            helper.make_node("ReduceMean", ["p"], ["y"], axes=[1], keepdims=0),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight.numpy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    package = trt.Package("tensorrt_rtx")
    make_findable(package)
    builder = package.builder()
    network = package.network(builder)
    parser = package.module.OnnxParser(network, package.logger)
    assert parser.parse(model.SerializeToString()), package.logger.text()
    x = torch.randn(2, 5, 16)
    got = Interpreter(network, package).run({"x": x})["y"]
    torch.testing.assert_close(got, torch.softmax(x @ weight, -1).mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_an_average_of_integers_is_over_the_reduced_dimensions(dtype):
    package = trt.Package("tensorrt_rtx")
    module, builder = package.module, package.builder()
    network = package.network(builder)
    x = network.add_input("x", getattr(module, dtype), module.Dims([2, 3]))
    y = network.add_reduce(x, module.ReduceOperation.AVG, 1 << 1, False).get_output(0)
    y.name = "y"
    network.mark_output(y)
    assert Interpreter(network, package).run({"x": torch.tensor([[1, 2, 3], [4, 5, 9]])})["y"].tolist() == [2, 6]


def test_packages():
    assert trt.Package().is_rtx
    with pytest.raises(trt.TensorRTMissing, match="pip install"):
        trt.Package("tensorrt")
    with pytest.raises(trt.TensorRTMissing, match="no TensorRT package"):
        trt.Package("tensorflow")


def test_no_gpu_is_one_sentence(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(trt.TrtError, match="needs a CUDA GPU"):
        trt.Engine(b"plan")


def test_the_nearest_profile_is_chosen():
    """The choice alone: no engine is needed for it."""
    small_profile = runtime._Profile(None, {"x": ((1, 1, 16), (1, 10, 16), (1, 50, 16))})
    large_profile = runtime._Profile(None, {"x": ((1, 1, 16), (8, 100, 16), (32, 400, 16))})
    engine = trt.Engine.__new__(trt.Engine)
    engine.profiles = [small_profile, large_profile]
    assert engine.choose({"x": (1, 12, 16)}) is small_profile
    assert engine.choose({"x": (1, 51, 16)}) is large_profile
    assert engine.choose({"x": (6, 40, 16)}) is large_profile
    with pytest.raises(trt.TrtError, match="no profile"):
        engine.choose({"x": (33, 1, 16)})
