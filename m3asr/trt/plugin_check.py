"""Is a plugin's kernel right? Drives the real plugin object through its life cycle and compares with the reference."""

import os

import torch

from . import plugin_v3
from .errors import PluginError
from .package import Package

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2, torch.float64: 1e-6}
GUARD = 64  # elements before and after every output, to catch writes out of bounds


def check_plugin(description, cases, *, attributes=None, tolerance=None, package=None, life_cycle=True):
    """Runs the kernel on every case and compares it with the reference. Raises PluginError at the first difference.

    On a machine with a GPU the tensors go there and `enqueue` gets real device addresses. Without one the kernel runs
    in Triton's interpreter; TRITON_INTERPRET=1 must then be set before the module with the kernel is imported.

    Args:
        description: the Plugin.
        cases: a list of tuples of input tensors; take odd sizes.
        attributes: the plugin's attributes.
        tolerance: largest |difference| / largest |reference|; default 1e-4 for float32, 5e-3 for float16, 2e-2 for
            bfloat16, 0 for integers.
        life_cycle: False checks the kernel alone, on raw addresses like TensorRT's, and needs no TensorRT package.

    Returns:
        The largest relative error over all cases and outputs.

    It fails when the shape function or the dtypes disagree with the reference, when an output element is left
    unwritten, when something outside an output or the workspace or inside an input is written, when the values differ,
    and when a clone or an object made again from the serialised attributes computes something else.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise PluginError(
            f"plugin {description.name!r} was not checked: no GPU, and TRITON_INTERPRET=1 is not set (before the "
            "kernel's module is imported)"
        )
    if description.launch is None:
        raise PluginError(f"plugin {description.name!r} has no kernel to check")
    cases = list(cases)
    if not cases:
        raise PluginError(f"plugin {description.name!r}: no cases to check")
    attributes = description.bound(attributes or {})
    if life_cycle:
        package = package if isinstance(package, Package) else Package(package)
        makers = (LifeCycle.created, LifeCycle.cloned, LifeCycle.deserialized)
        runners = [make(package, description, attributes) for make in makers]
    else:
        runners = [OnAddresses(description, attributes)]
    return max(
        _compare(description, runner, case, attributes, tolerance, device) for case in cases for runner in runners
    )


def _compare(description, runner, case, attributes, tolerance, device):
    where = f"plugin {description.name!r} on inputs {[tuple(t.shape) for t in case]}"
    inputs = [t.to(device).contiguous() for t in case]
    before = [t.clone() for t in inputs]
    wanted = description.reference(*inputs, **attributes)
    wanted = [wanted] if isinstance(wanted, torch.Tensor) else list(wanted)
    shapes = description.output_shapes([tuple(t.shape) for t in inputs], attributes)
    dtypes = runner.output_dtypes([t.dtype for t in inputs])
    for i, (w, s, d) in enumerate(zip(wanted, shapes, dtypes, strict=True)):
        if tuple(w.shape) != s:
            raise PluginError(f"{where}: the shape function says {s} for output {i}, the reference {tuple(w.shape)}")
        if w.dtype != d:
            raise PluginError(f"{where}: output {i} is declared {d}, the reference gives {w.dtype}")
    guarded = [_guarded(s, d, device) for s, d in zip(shapes, dtypes, strict=True)]
    scratch, workspace = _guarded((description.workspace_bytes([t.shape for t in inputs]),), torch.uint8, device)
    runner.enqueue(inputs, [inner for _, inner in guarded], workspace, device)
    for t, b in zip(inputs, before, strict=True):
        if not torch.equal(_bits(t), _bits(b)):
            raise PluginError(f"{where}: the kernel writes into an input")
    if not _untouched(scratch):
        raise PluginError(f"{where}: the kernel writes outside of its workspace")
    worst = 0.0
    for i, (w, (whole, inner)) in enumerate(zip(wanted, guarded, strict=True)):
        if not _untouched(whole):
            raise PluginError(f"{where}: the kernel writes outside of output {i}")
        worst = max(worst, _error(f"{where}, output {i}", inner, w, tolerance))
    return worst


def _untouched(whole):
    edge = torch.cat([whole[:GUARD], whole[len(whole) - GUARD :]])
    return torch.equal(_bits(edge), _bits(_filler(edge)))


def _bits(t):
    """For comparisons in which NaN equals NaN."""
    return t.view(torch.uint8) if t.is_floating_point() else t


def _filler(t):
    if t.dtype.is_floating_point:
        return torch.full_like(t, float("nan"))
    return torch.full_like(t, True if t.dtype == torch.bool else torch.iinfo(t.dtype).max)


def _guarded(shape, dtype, device):
    count = 1
    for s in shape:
        count *= s
    whole = _filler(torch.empty(count + 2 * GUARD, dtype=dtype, device=device))
    return whole, whole[GUARD : GUARD + count].view(shape)


def _error(where, got, want, tolerance):
    if not want.dtype.is_floating_point:
        if not torch.equal(got, want):
            raise PluginError(f"{where}: {int((got != want).sum())} of {want.numel()} values differ")
        return 0.0
    got, exact = got.double(), want.double()
    if not torch.equal(got.isnan(), exact.isnan()):
        count = int((got.isnan() & ~exact.isnan()).sum())
        raise PluginError(f"{where}: {count} values are NaN or were never written")
    finite = exact.isfinite()
    if not torch.equal(got[~finite].nan_to_num(), exact[~finite].nan_to_num()) or not got[finite].isfinite().all():
        raise PluginError(f"{where}: infinities stand in other places than in the reference")
    if not finite.any():
        return 0.0
    difference = (got - exact).abs().masked_fill(~finite, 0)
    scale = exact[finite].abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = float(difference.max() / scale)
    limit = TOLERANCE[want.dtype] if tolerance is None else tolerance
    if error > limit:
        at = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
        raise PluginError(
            f"{where}: relative error {error:.2e} > {limit:.0e}, worst at {at}: kernel "
            f"{float(got[tuple(at)]):.6g}, reference {float(exact[tuple(at)]):.6g}"
        )
    return error


class OnAddresses:
    """The launch alone, as `enqueue` calls it, without any TensorRT object."""

    def __init__(self, description, attributes):
        self.description, self.attributes = description, attributes

    def output_dtypes(self, dtypes):
        return [getattr(torch, d) if isinstance(d, str) else d for d in self.description.output_dtypes(dtypes)]

    def enqueue(self, inputs, outputs, workspace, device):
        given, written = ([(tuple(t.shape), t.dtype, t.data_ptr()) for t in group] for group in (inputs, outputs))

        def launch():
            plugin_v3.launch_at(self.description, self.attributes, given, written, workspace.data_ptr(), device)

        if device == "cpu":
            return launch()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            launch()
        stream.synchronize()


class LifeCycle:
    """One plugin object as TensorRT would come by it, and its enqueue on real addresses."""

    def __init__(self, package, description, instance):
        self.package, self.description, self.instance = package, description, instance

    @classmethod
    def created(cls, package, description, attributes):
        """By its creator, from fields, as in a build."""
        trt = package.module
        creator = plugin_v3.register(package, description)
        fields = trt.PluginFieldCollection([plugin_v3._field(trt, k, v) for k, v in attributes.items()])
        return cls(package, description, creator.create_plugin(description.name, fields, trt.TensorRTPhase.BUILD))

    @classmethod
    def cloned(cls, package, description, attributes):
        made = cls.created(package, description, attributes)
        return cls(package, description, made.instance.clone().clone())

    @classmethod
    def deserialized(cls, package, description, attributes):
        """From what the first object serialises, as at load time, attached to a context."""
        trt = package.module
        first = cls.cloned(package, description, attributes)
        fields = first.instance.get_fields_to_serialize()
        creator = plugin_v3.register(package, description)
        made = creator.create_plugin(description.name, fields, trt.TensorRTPhase.RUNTIME)
        return cls(package, description, made.attach_to_context(None))

    def output_dtypes(self, dtypes):
        types = self.instance.get_output_data_types([self.package.dtype(d) for d in dtypes])
        return [self.package.torch_dtype(t) for t in types]

    def enqueue(self, inputs, outputs, workspace, device):
        """Hands over addresses and descriptions, as TensorRT does."""
        descriptions = [[self._described(t) for t in group] for group in (inputs, outputs)]
        addresses = [[t.data_ptr() for t in group] for group in (inputs, outputs)]
        self.instance.on_shape_change(*descriptions)
        if device == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            self.instance.enqueue(*descriptions, *addresses, workspace.data_ptr(), stream.cuda_stream)
            stream.synchronize()
        else:
            self.instance.run(*descriptions, *addresses, workspace.data_ptr(), "cpu")

    def _described(self, tensor):
        trt = self.package.module
        description = trt.PluginTensorDesc()
        description.dims = trt.Dims(tuple(tensor.shape))
        description.type = self.package.dtype(tensor.dtype)
        description.format = trt.TensorFormat.LINEAR
        return description
