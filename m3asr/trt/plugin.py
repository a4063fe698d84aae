"""Plugins in Python: what TensorRT lacks, as a torch reference, a shape function and a Triton launch.

    @trt.plugin("scale_rows", shape=lambda x, scale: x)
    def scale_rows(x, scale):                              # the reference, in torch
        return x * scale

    @scale_rows.kernel
    def launch(x, scale, out):                             # inputs, then outputs to write to
        rows_kernel[(x.shape[0],)](x, scale, out, x.shape[-1], BLOCK=1024)

`scale_rows(x, w)` is then an ordinary function: on CPU tensors the reference, on CUDA tensors the kernel, in a traced
forward a plugin layer. Weights are inputs and never members, so nothing is copied when TensorRT clones the plugin.
"""

import inspect
from dataclasses import dataclass, field

import torch

from .errors import PluginError

ATTRIBUTE_TYPES = (bool, int, float, str)
PLUGINS = {}


@dataclass(frozen=True)
class OneKernel:
    """A launch that is a single Triton kernel, so that it can also be compiled into a plan without Python.

    The kernel's parameters stand in the order: input pointers, integer scalars, output pointers, constexprs.

    Args:
        function: the @triton.jit kernel.
        grid: input shapes -> one to three sizes (use `cdiv` and `numel`).
        scalars: input shapes -> the kernel's integer arguments.
        constants: the constexprs; the plugin's attributes of the same name are added.
        num_warps: warps of one block.
    """

    function: object
    grid: object
    scalars: object = lambda *shapes: ()
    constants: dict = field(default_factory=dict)
    num_warps: int = 4

    def __call__(self, *tensors, **attributes):
        inputs = tensors[: self._inputs(tensors)]
        shapes = [tuple(t.shape) for t in inputs]
        grid = self.grid(*shapes)
        grid = grid if isinstance(grid, tuple) else (grid,)
        scalars = self.scalars(*shapes)
        outputs = tensors[len(inputs) :]
        self.function[grid](*inputs, *scalars, *outputs, **{**self.constants, **attributes}, num_warps=self.num_warps)

    def _inputs(self, tensors):
        """How many of the tensors are inputs: the parameters that `grid` takes."""
        return len(inspect.signature(self.grid).parameters) if _fixed_arity(self.grid) else len(tensors) - 1


def _fixed_arity(function):
    return all(p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(function).parameters.values())


def cdiv(a, b):
    """Ceiling of a / b, for sizes of any kind (numbers, symbolic sizes, TensorRT expressions)."""
    return (a + b - 1) // b


def numel(shape):
    count = 1
    for size in shape:
        count = count * size
    return count


class Plugin:
    """What `@plugin` makes of a reference. Call it like the function it was."""

    def __init__(self, name, reference, shape, dtypes, workspace=None, kernel=None, *, version="1", namespace="",
                 kind="plain", aot=False):  # fmt: skip
        parameters = inspect.signature(reference).parameters.values()
        self.name, self.version, self.namespace, self.kind, self.aot = name, version, namespace, kind, aot
        self.reference, self.shape, self.dtypes, self.workspace = reference, shape, tuple(dtypes), workspace
        self.inputs = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        kinds = {t.__name__: t for t in ATTRIBUTE_TYPES}  # annotations may be strings
        self.attributes = {
            p.name: p.replace(annotation=kinds.get(p.annotation, p.annotation) if p.annotation is not p.empty else None)
            for p in parameters
            if p.kind is p.KEYWORD_ONLY
        }
        self.launch = kernel
        self.__doc__, self.__name__ = reference.__doc__, name
        for p in self.attributes.values():
            if p.annotation not in ATTRIBUTE_TYPES:
                raise PluginError(
                    f"plugin {name!r}: give the attribute {p.name!r} one of the types "
                    f"{', '.join(t.__name__ for t in ATTRIBUTE_TYPES)}, as in `def f(x, *, {p.name}: float)`"
                )
        if not self.inputs:
            raise PluginError(f"plugin {name!r} has no tensor inputs")
        if aot and workspace is not None:
            raise PluginError(f"plugin {name!r}: a kernel inside the plan (aot=True) gets no workspace")

    def kernel(self, launch):
        """Decorator: launch(*inputs, *outputs, **attributes) writes the outputs; or pass a `OneKernel`."""
        self.launch = launch
        return launch

    def bound(self, attributes):
        """Attributes with their defaults, as the declared types."""
        unknown = set(attributes) - set(self.attributes)
        if unknown:
            raise PluginError(f"plugin {self.name!r} has no attribute {', '.join(sorted(unknown))}")
        values = {}
        for name, p in self.attributes.items():
            value = attributes.get(name, p.default)
            if value is p.empty:
                raise PluginError(f"plugin {self.name!r} needs the attribute {name!r}")
            values[name] = p.annotation(value)
        return values

    def output_shapes(self, shapes, attributes=None):
        """The shape function's answer as a list of tuples, one an output. Sizes of any kind go in and come out."""
        wanted = inspect.signature(self.shape).parameters
        known = {k: v for k, v in (attributes or {}).items() if k in wanted}
        result = self.shape(*shapes, **known)
        result = [result] if len(self.dtypes) == 1 and not isinstance(result, list) else list(result)
        if len(result) != len(self.dtypes):
            raise PluginError(f"plugin {self.name!r}: shape gives {len(result)} shapes for {len(self.dtypes)} dtypes")
        result = [tuple(s) for s in result]
        if any(isinstance(size, (float, torch.SymFloat)) for shape in result for size in shape):
            raise PluginError(f"plugin {self.name!r}: shape gives {result}; sizes divide by // or trt.cdiv, not by /")
        return result

    def output_dtypes(self, dtypes):
        """Output types from input types, of torch or of TensorRT."""
        return [dtypes[d] if isinstance(d, int) else d for d in self.dtypes]

    def allocate(self, tensors, attributes, make=torch.empty):
        shapes = self.output_shapes([tuple(t.shape) for t in tensors], attributes)
        types = self.output_dtypes([t.dtype for t in tensors])
        types = [getattr(torch, t) if isinstance(t, str) else t for t in types]
        return [make(s, dtype=t, device=tensors[0].device) for s, t in zip(shapes, types, strict=True)]

    def workspace_bytes(self, shapes):
        """Scratch memory for inputs of these shapes."""
        return 0 if self.workspace is None else int(self.workspace(*(tuple(int(n) for n in s) for s in shapes)))

    def run_kernel(self, tensors, attributes):
        if self.launch is None:
            raise PluginError(f"plugin {self.name!r} has no kernel; write one with @{self.reference.__name__}.kernel")
        outputs = self.allocate(tensors, attributes)
        size = self.workspace_bytes([t.shape for t in tensors])
        scratch = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
        self.launch_on([t.contiguous() for t in tensors], outputs, attributes, scratch)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def launch_on(self, inputs, outputs, attributes, workspace):
        """The user's launch; none where there is nothing to write."""
        if any(t.numel() for t in outputs):
            given = attributes if self.workspace is None else {**attributes, "workspace": workspace}
            self.launch(*inputs, *outputs, **given)

    def __call__(self, *tensors, **attributes):
        from .tensor import SymTensor

        if len(tensors) != len(self.inputs):
            raise PluginError(f"plugin {self.name!r} takes {', '.join(self.inputs)}; got {len(tensors)} tensors")
        attributes = self.bound(attributes)
        symbolic = next((t for t in tensors if isinstance(t, SymTensor)), None)
        if symbolic is not None:
            return symbolic.tracer.plugin(self, tensors, attributes)
        if all(t.is_cuda for t in tensors):
            return self.run_kernel(tensors, attributes)
        return self.reference(*tensors, **attributes)

    def __repr__(self):
        return f"<plugin {self.name} ({', '.join(self.inputs)})>"


def plugin(
    name,
    *,
    shape=None,
    dtypes=(0,),
    workspace=None,
    kernel=None,
    version="1",
    namespace="",
    kind="plain",
    aot=False,
):
    """Declares a plugin; decorates its torch reference.

    Args:
        name: the plugin's name in TensorRT's registry.
        shape: input shapes -> output shape (a list of them for several outputs), with + - * // on sizes.
            Default: the shape of the first input.
        dtypes: one entry an output: the number of the input whose dtype it has, or a dtype name.
        workspace: input shapes -> bytes of scratch memory, never fewer for larger shapes; `launch` gets them as the
            keyword `workspace`, a uint8 tensor.
        kernel: launch function or OneKernel; or decorate it with @<plugin>.kernel.
        aot: compile the kernel, a `OneKernel`, into the plan: no Python at run time. Full TensorRT 10.9+ only.
        kind: in a low-precision build, "plain" takes the type of the inputs, "matmul" the low type, "float32" float32.

    The reference takes tensors as positional and attributes as keyword-only parameters (`*, eps: float = 1e-5`).
    Raises PluginError for a wrong description.
    """

    def declare(reference):
        first = shape or (lambda *shapes: shapes[0] if len(dtypes) == 1 else [shapes[0]] * len(dtypes))
        names = {"version": version, "namespace": namespace}
        made = Plugin(name, reference, first, dtypes, workspace, kernel, kind=kind, aot=aot, **names)
        PLUGINS[namespace, name, version] = made
        return made

    return declare
