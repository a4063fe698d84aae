"""A module's forward becomes a network: `trace`, and the Network it returns."""

import inspect
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

# The converters register themselves.
from . import (  # noqa: F401
    ops_attention,
    ops_data,
    ops_elementwise,
    ops_index,
    ops_matmul,
    ops_nn,
    ops_pool,
    ops_rare,
    ops_recurrent,
    ops_reduce,
    ops_shape,
    ops_special,
)
from .errors import TraceError
from .graph import Node
from .package import Package
from .precision import Precision
from .python_sizes import known_to_python
from .sizes import is_fixed
from .tensor import SymTensor
from .tracer import Tracer


@dataclass(frozen=True)
class Input:
    """One input of a network: a dtype ("float32", "int32", "int64", "float16", "bool") and its sizes.

    A size is a number, or a name such as "T" whose range is given to `build` or `trace`; one name means one size.
    """

    dtype: str
    dims: tuple = ()

    @property
    def torch_dtype(self):
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if not isinstance(dtype, torch.dtype):
            raise TraceError(f"unknown dtype {self.dtype!r} of an input; use a torch name such as 'float32'")
        return dtype


@dataclass
class Network:
    """A finished INetworkDefinition with what is needed to build, read and evaluate it.

    Attributes:
        network: the INetworkDefinition; builder, package: what made it.
        inputs: name -> Input; outputs: names in order; profiles: list of {size name: (min, opt, max)}.
        points: where Q/DQ can go, module path -> tensor name (see `calibrate`).
        modules: module path -> name of the tensor it returned, in the order of leaving; by_name: inputs are keywords.
        values: constant layer name -> torch tensor (TensorRT cannot read bf16 and fp8 constants back).
    """

    package: Package
    builder: object
    network: object
    inputs: dict
    outputs: list
    profiles: list
    values: dict
    points: dict = field(default_factory=dict)
    modules: dict = field(default_factory=dict)
    by_name: bool = True
    alive: list = field(default_factory=list)

    def interpret(self, inputs, layers=None):
        """Evaluates every layer in torch on the CPU.

        Args:
            inputs: name -> tensor (a positional list or tuple works too), any sizes within range.
            layers: None, or a dict that receives {layer name: first output} of every layer that was evaluated.

        Returns:
            name -> tensor of each output.
        """
        from .interpret import Interpreter

        if not isinstance(inputs, dict):
            inputs = dict(zip(self.inputs, inputs, strict=True))
        return Interpreter(self.network, self.package, self.values).run(inputs, layers)

    def __len__(self):
        return self.network.num_layers


def trace(
    module,
    inputs,
    ranges=None,
    *,
    precision="fp32",
    keep_float32=(),
    outputs=None,
    quantize=None,
    branches=None,
    package=None,
):
    """Runs `module`'s own forward on symbolic tensors and writes down the network.

    Args:
        module: a torch.nn.Module in eval mode (dropout and batch norm refuse training mode), or a function of tensors.
        inputs: {argument name: Input}; names that are no arguments of forward are passed in order.
        ranges: {size name: (min, opt, max)} or a list of those, one for each optimisation profile.
        precision: "fp32", "fp16" or "bf16"; see `Precision`.
        keep_float32: shell patterns of module paths that compute in float32 whatever the precision.
        outputs: names for the results in order; else keys of a returned dict, else "output0", "output1", ...
        quantize: a `Quantization` from `calibrate`, for Q/DQ around linear layers and convolutions.
        branches: True or False takes every branch that depends on values that way; None puts all paths into the
            network and chooses by value, which is exact and costs the work of each (a warning says so).
        package: "tensorrt", "tensorrt_rtx" or None for what is installed.

    Raises:
        UncoveredOperation: forward calls something without a converter; the message says where and how to add it.
        TraceError: forward depends on sizes or data in a way that a network cannot.
    """
    package = package if isinstance(package, Package) else Package(package)
    precision = Precision(precision, tuple(keep_float32))
    profiles = ranges if isinstance(ranges, (list, tuple)) else [ranges or {}]
    profiles = [{n: r if isinstance(r, (tuple, list)) else (r, r, r) for n, r in p.items()} for p in profiles]
    _check_inputs(inputs, profiles)
    from .plugin_parser import with_plugins

    options = quantize, branches
    return with_plugins(
        package, lambda prepare: _trace(module, inputs, profiles, precision, outputs, options, package, prepare)
    )


def _check_inputs(inputs, profiles):
    names = {d for i in inputs.values() for d in i.dims if isinstance(d, str)}
    for profile in profiles:
        missing = names - set(profile)
        if missing:
            raise TraceError(
                f"no range for the size {', '.join(sorted(missing))}; add ranges={{'{min(missing)}': (min, opt, max)}}"
            )
    for name, given in inputs.items():
        if not isinstance(given, Input):
            raise TraceError(f"input {name!r} is {given!r}; describe it as Input(dtype, dims)")


def whole_range(profiles):
    """Every profile at once: the smallest minimum, the first usual size, the largest maximum."""
    return {
        name: (min(p[name][0] for p in profiles), profiles[0][name][1], max(p[name][2] for p in profiles))
        for name in profiles[0]
    }


def _trace(module, inputs, profiles, precision, outputs, options, package, prepare):
    builder = package.builder()
    network = package.network(builder)
    tracer = Tracer(package, network, whole_range(profiles), precision)
    tracer.quantization, tracer.branches = options
    prepare(tracer, network)
    nodes = {name: _add_input(tracer, name, given) for name, given in inputs.items()}

    state = _State(module)

    def forward():
        """Anew for each path: fresh inputs, since a forward may write into them, and points counted from the start."""
        tracer.start_path()
        state.restore()
        args, kwargs = _arguments(module, {name: SymTensor(tracer, *made) for name, made in nodes.items()})
        return module(*args, **kwargs)

    if isinstance(module, torch.nn.Module):
        own = [*module.parameters(), *module.buffers()]
        tracer.weights = {t.untyped_storage().data_ptr() for t in own}
    try:
        with _module_paths(tracer, module), known_to_python(module), tracer.tracing():
            result = tracer.paths.run(forward)
            names = _mark_outputs(tracer, result, outputs)
    finally:
        state.restore()
    return Network(
        package,
        builder,
        network,
        dict(inputs),
        names,
        profiles,
        tracer.values,
        tracer.points,
        tracer.module_outputs,
        bool(_arguments(module, nodes)[1]),
        [getattr(tracer, "keep", None)],
    )


def _add_input(tracer, name, given):
    dtype = given.torch_dtype
    dims = [tracer.sizes.named[d] if isinstance(d, str) else int(d) for d in given.dims]
    shape = tracer.trt.Dims([int(d) if is_fixed(d) else -1 for d in dims])
    tensor = tracer.network.add_input(name, tracer.package.dtype(dtype), shape)
    node = Node(tracer, tensor, dims)
    for i, d in enumerate(given.dims):
        if isinstance(d, str):
            if hasattr(tensor, "set_dimension_name"):
                tensor.set_dimension_name(i, d)
            if not is_fixed(dims[i]):
                tracer.symbols.setdefault(dims[i].node.expr, (node, i))
    with tracer.asking_torch(), tracer.fakes:
        fake = torch.empty(dims, dtype=dtype)
    return fake, node


def _arguments(module, symbolic):
    forward = module.forward if isinstance(module, torch.nn.Module) else module
    try:
        parameters = inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return list(symbolic.values()), {}
    named = {
        n
        for n, p in parameters.items()
        if p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    if set(symbolic) <= named:
        return [], symbolic
    return list(symbolic.values()), {}


class _State:
    """What stands on the modules before the trace: a forward that keeps something (a table grown to the input, a
    cache) kept a symbolic tensor, which must not be there when the module runs for real.
    """

    def __init__(self, module):
        modules = module.modules() if isinstance(module, torch.nn.Module) else ()
        attributes = [vars(m) for m in modules if not isinstance(m, torch.jit.ScriptModule)]
        inside = [v for own in attributes for v in own.values() if isinstance(v, (dict, list))]
        self.before = [(held, held.copy()) for held in (*attributes, *inside)]

    def restore(self):
        for held, before in self.before:
            if isinstance(held, list):
                held[:] = before
            elif held.keys() != before.keys() or any(held[k] is not v for k, v in before.items()):
                held.clear()
                held.update(before)


class _module_paths:
    """While it is entered, the tracer's path follows the module that runs."""

    def __init__(self, tracer, module):
        self.tracer, self.handles = tracer, []
        self.names = {}
        if isinstance(module, torch.nn.Module):
            self.names = {id(m): n for n, m in module.named_modules()}

    def __enter__(self):
        def enter(module, *_):
            self.tracer.path.append(self.names.get(id(module), type(module).__name__))

        def leave(module, args, output):
            zeroed = self.tracer.zero_at_leaving.pop(self.tracer.path[-1], None)
            if zeroed is not None:
                output = torch.where(zeroed.unsqueeze(-1), 0.0, output)
            path = self.tracer.path.pop()
            tensors = [t for t in tree_leaves(output) if isinstance(t, SymTensor) and t.const is None]
            if id(module) in self.names and tensors:
                # To the end, should it run again: a module stands where it was left last.
                self.tracer.module_outputs.pop(path, None)
                self.tracer.module_outputs[path] = tensors[0].node.tensor.name
            return output

        hooks = torch.nn.modules.module
        self.handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def _mark_outputs(tracer, result, names):
    if isinstance(result, dict) and names is None:
        names = _keys(result)
    tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
    if not tensors:
        tensors = (
            [t for t in tree_leaves(vars(result)) if isinstance(t, torch.Tensor)] if hasattr(result, "__dict__") else []
        )
    if not tensors:  # a size alone: return x.shape[0]
        numbers = [n for n in tree_leaves(result) if isinstance(n, (int, float, torch.SymInt, torch.SymFloat))]
        tensors = [torch.ops.aten.scalar_tensor(n, dtype=_number_type(n)) for n in numbers]
    if not tensors:
        raise TraceError(f"forward returned no tensor but {type(result).__name__}")
    if names is None:
        names = [f"output{i}" for i in range(len(tensors))]
    if len(names) != len(tensors):
        raise TraceError(f"{len(names)} output names {list(names)} for {len(tensors)} results of forward")
    for name, tensor in zip(names, tensors, strict=True):
        node = tracer.node(tensor)
        tracer.operation = f"output {name}"
        # Its own layer: an input or constant cannot be an output, nor one tensor two, and names stay the layers' own.
        wanted = tracer.package.dtype(tensor.dtype)
        layer = (
            tracer.layer("cast", node.tensor, wanted) if node.dtype != wanted else tracer.layer("identity", node.tensor)
        )
        out = layer.get_output(0)
        out.name = name
        tracer.network.mark_output(out)
    return list(names)


def _keys(result):
    """Names of the tensors in a dict: their keys, joined by dots where it is nested."""
    found = []
    for path, leaf in tree_flatten_with_path(result)[0]:
        if isinstance(leaf, torch.Tensor):
            steps = (getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in path)
            found.append(".".join(str(step) for step in steps))
    return found or None


def _number_type(number):
    if isinstance(number, bool):
        return torch.bool
    return torch.int64 if isinstance(number, (int, torch.SymInt)) else torch.float32
