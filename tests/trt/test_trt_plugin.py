"""Plugins: parity through the real plugin objects, in a network, compiled into PTX; and the check really fails."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)  # not imported here: the interpreter is chosen before

import torch
from trt_plugins import WRONG, double, peak, scale_rows, sorted_rows

import m3asr.trt as trt
from m3asr.trt import plugin_aot, plugin_parser, plugin_v3
from m3asr.trt.package import Package

INSTALLED = importlib.util.find_spec("tensorrt_rtx") is not None
needs_tensorrt = pytest.mark.skipif(not INSTALLED, reason="needs tensorrt_rtx: its plugin object or network")
# With TensorRT the plugin object enqueues, without it the launch alone runs on raw addresses.
FORMS = [pytest.param(True, marks=needs_tensorrt, id="object"), pytest.param(False, id="launch")]

ODD = [(1, 1), (3, 7), (5, 33), (2, 64), (0, 5)]
SCALED = [(torch.randn(s), torch.randn(s[-1])) for s in ODD]


@pytest.mark.parametrize("life_cycle", FORMS)
def test_kernel_is_right(life_cycle):
    def check(plugin, cases, **attributes):
        return trt.check_plugin(plugin, cases, attributes=attributes, life_cycle=life_cycle)

    assert check(scale_rows, SCALED, eps=0.25) < 1e-6
    for plugin in (peak, double, sorted_rows):
        assert check(plugin, [(torch.randn(s),) for s in ODD]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernel_is_right_in_low_precision(dtype):
    cases = [tuple(t.to(dtype) for t in case) for case in SCALED]
    assert trt.check_plugin(scale_rows, cases, life_cycle=False) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("life_cycle", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_enqueue_on_the_gpu(dtype, life_cycle):
    cases = [tuple(t.to(dtype) for t in case) for case in [*SCALED, (torch.randn(1021, 61), torch.randn(61))]]
    assert trt.check_plugin(scale_rows, cases, life_cycle=life_cycle) < 1e-2
    for plugin in (peak, double, sorted_rows):
        assert trt.check_plugin(plugin, [case[:1] for case in cases], life_cycle=life_cycle) == 0


@pytest.mark.gpu
def test_called_on_the_gpu_it_runs_the_kernel(monkeypatch):
    ran = []
    right = scale_rows.launch
    monkeypatch.setattr(scale_rows, "launch", lambda *a, **k: (ran.append(a[0].is_cuda), right(*a, **k)))
    x, scale = torch.randn(5, 33).cuda(), torch.randn(33).cuda()
    torch.testing.assert_close(scale_rows(x, scale), scale_rows.reference(x, scale))
    torch.testing.assert_close(scale_rows(x.T, scale[:5]), scale_rows.reference(x.T, scale[:5]))  # not contiguous
    torch.testing.assert_close(sorted_rows(x), x.sort(-1).values)
    assert ran == [True, True]


@pytest.mark.gpu
def test_enqueue_in_a_cuda_graph():
    """As the runtime captures it: on a stream of its own, replayed with other numbers at the same addresses."""
    x, scale = torch.randn(5, 33).cuda(), torch.randn(33).cuda()
    (out,) = scale_rows.allocate([x, scale], {"eps": 0.5})

    def run():
        at = [[(tuple(t.shape), t.dtype, t.data_ptr()) for t in group] for group in ((x, scale), (out,))]
        plugin_v3.launch_at(scale_rows, {"eps": 0.5}, *at, 0, "cuda")

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    x.normal_()
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, scale_rows.reference(x, scale))


@pytest.mark.parametrize("life_cycle", FORMS)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_plugins_are_noticed(name, life_cycle):
    plugin, message = WRONG[name]
    with pytest.raises(trt.PluginError, match=message):
        trt.check_plugin(plugin, [(torch.randn(3, 7) + 3,)], life_cycle=life_cycle)


@needs_tensorrt
def test_workspace_for_the_largest_shapes():
    """TensorRT asks once, with the ends of a profile."""
    package = Package("tensorrt_rtx")
    one = package.module.DynamicPluginTensorDesc()
    one.min, one.max = package.module.Dims((1, 7)), package.module.Dims((30, 7))
    assert plugin_v3.plugin_class(package)(sorted_rows, {}).get_workspace_size([one], []) == 30 * 7 * 4
    assert plugin_v3.plugin_class(package)(double, {}).get_workspace_size([one], []) == 0


def test_nothing_is_checked_in_silence(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU checks for real")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(trt.PluginError, match="was not checked"):
        trt.check_plugin(scale_rows, SCALED)
    with pytest.raises(trt.PluginError, match="no cases"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        trt.check_plugin(scale_rows, [])


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear = torch.nn.Linear(6, 8)
        self.scale = torch.nn.Parameter(torch.randn(8))

    def forward(self, x):
        y = scale_rows(self.linear(x), self.scale, eps=0.25)
        value, index = peak(scale_rows(y.relu(), self.scale))
        return y, value, index


@needs_tensorrt
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-6), ("fp16", 1e-2)])
def test_in_a_network(precision, tolerance):
    net = Net().eval()
    ranges = {"B": (1, 2, 4), "T": (3, 5, 50)}
    network = trt.trace(net, {"x": trt.Input("float32", ("B", "T", 6))}, ranges, precision=precision)
    for sizes in ((1, 3), (3, 9)):
        x = torch.randn(*sizes, 6)
        got, want = network.interpret({"x": x}), net(x)
        for g, w in zip(list(got.values())[:2], want, strict=False):
            assert (g - w).abs().max() <= tolerance * w.abs().max()
        if precision == "fp32":
            assert torch.equal(got["output2"], want[2])
    assert len(trt.serialize(network)) > 1000
    plugins = [n for n in network.values]  # the weight is a constant layer of the network, not a member
    assert any("scale_rows" in n for n in plugins)


@needs_tensorrt
def test_clones_share_everything():
    package = Package("tensorrt_rtx")
    creator = plugin_v3.register(package, scale_rows)
    fields = package.module.PluginFieldCollection([])
    first = creator.create_plugin("a", fields, package.module.TensorRTPhase.BUILD)
    second = first.clone()
    assert second is not first
    assert second.attributes is first.attributes and second.description is first.description
    assert not [v for v in vars(second).values() if isinstance(v, torch.Tensor)]


@needs_tensorrt
def test_formats():
    """The answers TensorRT asks for while it builds: linear layout only, outputs of the declared type."""
    package = Package("tensorrt_rtx")
    module = package.module
    instance = plugin_v3.plugin_class(package)(peak, {})

    def described(dtype, layout=module.TensorFormat.LINEAR):
        one = module.DynamicPluginTensorDesc()
        one.desc.type, one.desc.format = dtype, layout
        return one

    good = [described(module.float32), described(module.float32), described(module.int32)]
    assert [instance.supports_format_combination(i, good, 1) for i in range(3)] == [True, True, True]
    other = [described(module.float32), described(module.float16), described(module.float32)]
    assert [instance.supports_format_combination(i, other, 1) for i in range(3)] == [True, False, False]
    assert not instance.supports_format_combination(0, [described(module.float32, module.TensorFormat.HWC8)], 1)
    assert instance.get_output_data_types([module.float16]) == [module.float16, module.int32]


def test_attributes():
    with pytest.raises(trt.PluginError, match="no attribute"):
        scale_rows(torch.ones(1, 2), torch.ones(2), epsilon=1.0)
    with pytest.raises(trt.PluginError, match="takes x, scale"):
        scale_rows(torch.ones(1, 2))
    with pytest.raises(trt.PluginError, match="one of the types"):

        @trt.plugin("test_untyped")
        def untyped(x, *, eps=1.0):
            return x


@needs_tensorrt
def test_a_kernel_inside_the_plan_needs_full_tensorrt():
    @trt.plugin("test_compiled", kernel=double.launch, aot=True)
    def compiled(x):
        return x * 2

    with pytest.raises(trt.BuildError, match="full TensorRT"):
        trt.trace(lambda x: compiled(x), {"x": trt.Input("float32", (2, 3))})


def test_empty_library():
    """What is written where the wheel lacks a library's plain name loads, and leads to the real one."""
    import ctypes
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "libtest_m3asr_empty.so"
        path.write_bytes(plugin_parser.empty_library("libtest_m3asr_empty.so", "libm.so.6"))
        library = ctypes.CDLL(str(path))
        library.cos.restype, library.cos.argtypes = ctypes.c_double, [ctypes.c_double]
        assert library.cos(0.0) == 1.0


COMPILE = """
from trt_plugins import double, scale_rows
from m3asr.trt.plugin_aot import compile_kernel
name, ptx, threads, shared = compile_kernel(double, ["FLOAT", "FLOAT"], {}, 80)
head = ptx[ptx.index(".entry"):ptx.index(")", ptx.index(".entry"))]
print(name, threads, shared, head.count(".param"), "sm_80" in ptx)
try:
    compile_kernel(scale_rows, ["FLOAT"] * 3, {}, 80)
except Exception as error:
    print(type(error).__name__)
"""


def test_compiled_without_python():
    """PTX with TensorRT's parameters only: input, count, output. A process of its own: no interpreter there."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1])])
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["double_kernel", "128", "0", "3", "True", "PluginError"], done.stderr


def test_hidden_parameter_in_use_is_refused():
    ptx = (
        ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n{ ld.param.u64 %rd1, [k_param_1]; }"
    )
    with pytest.raises(trt.PluginError, match="hidden parameter 1"):
        plugin_aot.without_hidden_parameters(ptx, "k", 1)
    assert ".param .u64 k_param_1" in plugin_aot.without_hidden_parameters(ptx, "k", 2)
