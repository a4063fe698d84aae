"""Runs a forward on symbolic tensors and sends every torch call to its converter.

Two doors. `__torch_function__` sees the call as the user wrote it (F.scaled_dot_product_attention, torch.lstm); where
the table has no row for that, torch takes the call apart itself and the pieces arrive at the second door,
`__torch_dispatch__`, as aten operations. Sizes and dtypes of every result are torch's own (FakeTensorMode).
"""

import contextlib

import torch
from torch._decomp import decomposition_table
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from . import layers, sizes, table
from .doors import Everything, body_of, restored, uncompiled
from .errors import TraceError, UncoveredOperation
from .graph import Graph, Node
from .paths import Paths
from .plain import PLAIN
from .tensor import SymTensor
from .writing import in_place, into_out, remember_views


class Tracer(Graph):
    """One trace. Also the `net` that converters get: `operand`, `type`s, and all of Graph."""

    def __init__(self, package, network, ranges, precision):
        super().__init__(package, network)
        self.precision = precision
        self.sizes = sizes.NamedSizes(ranges)
        self.sizes.where = self.where
        self.fakes = FakeTensorMode(shape_env=self.sizes, allow_non_fake_inputs=True)
        self.fakes.cache_enabled = False  # its keys over symbolic sizes cost more than the call they would save
        self.active = False
        self.quantization, self.branches = None, None
        self.paths = Paths(self)
        self.module_outputs = {}
        self.zero_at_leaving = {}  # module path -> where its result (B, T, D) becomes zero, bool (B, T)
        self.points, self._points_in = {}, {}  # where Q/DQ may go: point -> name of the tensor there
        self.forced = 0  # >0 inside a converter that computes in float32 throughout
        self.asked = []  # torch functions as the forward wrote them, while torch takes them apart
        self.calls = []  # one entry per converter now running: (converter kind, function, args, kwargs, operands)

    # running

    def start_path(self):
        """The forward begins (again: see `Paths`)."""
        self._points_in.clear()
        self.module_outputs.clear()

    @contextlib.contextmanager
    def tracing(self):
        self.active = True
        try:
            # Scripted modules run unoptimised: the optimiser looks at sizes as fixed numbers.
            with restored(), torch.no_grad(), enable_python_dispatcher(), torch.jit.optimized_execution(False):
                with uncompiled(), Everything(self):
                    yield
        except RecursionError as error:
            asked = table.name_of(self.asked[0]) if self.asked else self.operation
            raise TraceError(f"{self.where()}{asked} is taken apart without end ({error})") from None
        except RuntimeError as error:
            if "cast SymTensor" not in str(error):  # torch's words where arange(x.max()) wants a number
                raise
            raise TraceError(
                f"{self.where()}a value that only the data has is needed as a number (a size or the end of a range?); "
                "take sizes from shapes, as x.shape[1], or pass the number in when tracing"
            ) from None
        finally:
            self.active = False

    @contextlib.contextmanager
    def asking_torch(self):
        """Size questions inside come from torch, not from the user's forward."""
        self.sizes.internal += 1
        try:
            yield
        finally:
            self.sizes.internal -= 1

    def function(self, function, args, kwargs):
        """First door: the call as written."""
        if kwargs.get("out") is not None:
            return into_out(self, function, args, kwargs)
        convert = table.find(function)
        if convert is not None:
            if kwargs:
                args, kwargs = table.as_declared(convert, function, args, kwargs)
            return self.convert(convert, function, args, kwargs)
        body = body_of(function)
        if body is not None:
            with self.asking_torch():
                return body(*args, **kwargs)
        self.asked.append(function)
        try:
            with torch._C.DisableTorchFunctionSubclass(), self.asking_torch():
                return function(*args, **kwargs)
        finally:
            self.asked.pop()

    def dispatch(self, function, args, kwargs):
        """Second door: an aten (or custom) operation."""
        if isinstance(function, torch._ops.HigherOrderOperator):
            return self.higher(function, args, kwargs)
        if function is torch.ops.aten.size.default:
            asked = table.name_of(self.asked[-1]) if self.asked else "the forward"
            raise TraceError(f"{self.where()}inside of torch, {asked} needs sizes that are fixed numbers")
        with self.asking_torch():
            flat, _ = tree_flatten((args, kwargs))
            symbolic = any(isinstance(a, SymTensor) and a.const is None for a in flat)
            symbolic |= any(isinstance(a, (torch.SymInt, torch.SymFloat)) and not sizes.is_fixed(a) for a in flat)
            schema = function._schema
            written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
            if written and table.find(function) is None:
                return in_place(self, function, args, kwargs, symbolic, written)
            if not symbolic:
                result = self.fold(function, args, kwargs)
            else:
                result = self.symbolic(function, args, kwargs)
            if any(r.alias_info is not None for r in schema.returns) and args and isinstance(args[0], SymTensor):
                remember_views(self, function, args, kwargs, result)
            return result

    def higher(self, function, args, kwargs):
        convert = table.find(function)
        if convert is None:
            raise UncoveredOperation(f"{self.where()}no converter for torch.{function}, which takes functions")
        return convert(self, *args, **kwargs)

    def symbolic(self, function, args, kwargs):
        convert = table.find(function)
        if convert is not None:
            return self.convert(convert, function, args, kwargs)
        decomposed = decomposition_table.get(function)
        if decomposed is not None:
            return decomposed(*args, **kwargs)
        result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        asked = table.name_of(self.asked[-1]) if self.asked else table.name_of(function)
        raise UncoveredOperation(
            f"{self.where()}no converter for {asked}, called as {table.name_of(function)}"
            f"({self._describe(args, kwargs)}); add one with @trt.converter({asked}), written with other torch "
            "functions or with TensorRT layers, or wrap a kernel with @trt.plugin"
        )

    def _describe(self, args, kwargs):
        def text(a):
            if isinstance(a, torch.Tensor):
                shape = ", ".join(self.sizes.readable(sizes.expression(s)) for s in a.shape)
                return f"{str(a.dtype).removeprefix('torch.')}[{shape}]"
            return "(" + ", ".join(map(text, a)) + ")" if isinstance(a, (list, tuple)) else repr(a)

        return ", ".join([*map(text, args), *(f"{k}={text(v)}" for k, v in kwargs.items())])

    # constants

    def fold(self, function, args, kwargs):
        """Nothing symbolic goes in, so the result is computed now."""
        real = tree_map(lambda a: self._plain(a), (args, kwargs))
        with _disable_current_modes():
            out = function(*real[0], **real[1])
        return tree_map(lambda t: self.wrap_const(t) if isinstance(t, torch.Tensor) else t, out)

    def _plain(self, a):
        if isinstance(a, SymTensor):
            return a.const
        if isinstance(a, (torch.SymInt, torch.SymFloat)):
            return int(a) if isinstance(a, torch.SymInt) else float(a)
        return a

    def wrap_const(self, tensor):
        if isinstance(tensor, SymTensor):
            return tensor
        return SymTensor(self, self.fake_like(tensor), const=tensor)

    def fake_like(self, tensor):
        with _disable_current_modes(), self.fakes:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    # converters

    def convert(self, convert, function, args, kwargs):
        """Calls a converter and wraps what it returns; nodes get the sizes and dtype that torch gives the same call."""
        flat, _ = tree_flatten((args, kwargs))
        operands = [a for a in flat if isinstance(a, SymTensor) and a.const is None and a.dtype.is_floating_point]
        forces = convert.kind == "float32"
        self.forced += forces
        self.calls.append((convert.kind, function, args, kwargs, operands))
        previous = self.operation
        self.operation = previous if previous and len(self.calls) > 1 else getattr(function, "__name__", str(function))
        self.operation = self.operation.split(".")[0]
        try:
            result = convert(self, *args, **kwargs)
            self.forced -= forces
            forces = False
            return self.wrap(result, function, args, kwargs)
        finally:
            self.forced -= forces
            self.calls.pop()
            self.operation = previous

    def wrap(self, result, function, args, kwargs):
        flat, spec = tree_flatten(result)
        if not any(isinstance(r, Node) for r in flat):
            return tree_map(self.release, result) if self.calls[-1][0] == "float32" else result
        fake = self.fake_call(function, args, kwargs)
        fake_flat, fake_spec = tree_flatten(fake)
        if len(fake_flat) != len(flat):
            raise TraceError(
                f"{self.where()}the converter of {table.name_of(function)} returned {len(flat)} results where torch "
                f"returns {len(fake_flat)}"
            )
        wrapped = [self.wrap_node(n, f) if isinstance(n, Node) else n for n, f in zip(flat, fake_flat, strict=True)]
        return tree_unflatten(wrapped, fake_spec)

    def release(self, result):
        """Out of a float32 converter a result goes back to the type of what went in."""
        if isinstance(result, SymTensor) and result.const is None and result.dtype in (torch.float32, torch.float64):
            node = layers.cast(result.node, self.out_type)
            return SymTensor(self, result.fake, node=node, pinned=self.pinned)
        return result

    def tensor(self, node, dtype):
        """A node as a symbolic tensor, for converters whose function torch cannot evaluate on symbolic sizes."""
        with _disable_current_modes(), self.fakes, self.asking_torch():
            fake = torch.empty(node.shape, dtype=dtype)
        return self.wrap_node(node, fake)

    def wrap_node(self, node, fake):
        if node.rank != fake.dim():
            raise TraceError(
                f"{self.where()}the converter of {self.operation} gave rank {node.rank} where torch gives {fake.shape}"
            )
        pinned = fake.dtype == torch.float32 and self.pinned and not self.keeps
        if fake.dtype in (torch.float32, torch.float64):
            target = node.dtype if self.calls and self.calls[-1][0] == "matmul" else self.out_type
        else:
            target = self.package.dtype(fake.dtype)
        node = layers.cast(node, target)
        return SymTensor(self, fake, node=Node(self, node.tensor, fake.shape), pinned=pinned)

    def fake_call(self, function, args, kwargs):
        def fake(a):
            if isinstance(a, SymTensor):
                return a.fake
            if isinstance(a, torch.Tensor) and not isinstance(a, FakeTensor):
                return self.fake_like(a)
            return a

        fake_args, fake_kwargs = tree_map(fake, (args, kwargs))
        with contextlib.ExitStack() as stack:
            stack.enter_context(_disable_current_modes())
            stack.enter_context(torch._C.DisableTorchFunctionSubclass())
            stack.enter_context(enable_python_dispatcher())  # the size formulas in Python know symbols, C++ not all
            stack.enter_context(self.fakes)
            stack.enter_context(self.asking_torch())
            plain = PLAIN.get(function)
            made = None if plain is None else plain(*fake_args, **fake_kwargs)
            return function(*fake_args, **fake_kwargs) if made is None else made

    def plugin(self, description, tensors, attributes):
        """A plugin called in the forward: a layer of its own, with sizes from its shape function."""
        from .plugin_parser import plugin_call

        def convert(net, *tensors):
            nodes = plugin_call(net, description, tensors, attributes)
            return nodes[0] if len(nodes) == 1 else tuple(nodes)

        def sizes_and_types(*fakes):
            made = description.allocate(fakes, attributes)
            return made[0] if len(made) == 1 else tuple(made)

        convert.kind = description.kind
        sizes_and_types.__name__ = description.name
        return self.convert(convert, sizes_and_types, tensors, {})

    # types

    @property
    def keeps(self):
        return self.forced > 0 or self.precision.keeps(self.module_path)

    @property
    def pinned(self):
        """Every tensor that goes into the running call is held in float32 (or the module is)."""
        operands = self.calls[-1][4] if self.calls else []
        return self.keeps or (bool(operands) and all(o.pinned for o in operands))

    @property
    def out_type(self):
        """The type a float result travels in: float32, or the low type once anything in it is low."""
        operands = self.calls[-1][4] if self.calls else []
        if not self.pinned:
            low = [o.node.dtype for o in operands if o.node.dtype != self.trt.float32]
            if low:
                return low[0]
        return self.trt.float32

    @property
    def float_type(self):
        """The type the running call computes floats in."""
        kind = self.calls[-1][0] if self.calls else "plain"
        if kind == "float32" or self.pinned:
            return self.trt.float32
        if kind == "matmul":
            return self.package.dtype(self.precision.low)
        return self.out_type

    def compute_type(self, dtype):
        """The TensorRT type in which the running call computes a torch dtype."""
        if dtype in (torch.float32, torch.float64):
            return self.float_type
        if dtype in (torch.float16, torch.bfloat16) and self.calls and self.calls[-1][0] == "float32":
            return self.trt.float32
        return self.package.dtype(dtype)

    def operand(self, x, dtype=None):
        """A tensor or number as a Node in the type to compute in; `dtype` (torch) defaults to the tensor's own."""
        if isinstance(x, Node):
            return x if dtype is None else layers.cast(x, self.compute_type(dtype))
        if isinstance(x, torch.Tensor):
            return self.node(x, self.compute_type(x.dtype if dtype is None else dtype))
        if dtype is None:
            dtype = torch.float32 if isinstance(x, (float, torch.SymFloat)) else torch.int64
        return self.scalar(x, self.compute_type(dtype))

    def node(self, x, dtype=None):
        """A tensor as a Node, as it is or cast to a TensorRT type."""
        if isinstance(x, SymTensor):
            if x.const is None:
                return x.node if dtype is None else layers.cast(x.node, dtype)
        return self.constant(x, self.package.dtype(x.dtype) if dtype is None else dtype)

    def result_type(self, *values):
        """torch's type promotion over tensors and numbers."""

        def plain(v):
            if isinstance(v, SymTensor):
                return v.fake
            return (1.0 if isinstance(v, torch.SymFloat) else 1) if isinstance(v, (torch.SymInt, torch.SymFloat)) else v

        values = [plain(v) for v in values]
        with _disable_current_modes(), torch._C.DisableTorchFunctionSubclass():
            if len(values) == 1:
                values.append(values[0])
            dtype = torch.result_type(*values[:2])
            for v in values[2:]:
                dtype = torch.promote_types(dtype, torch.result_type(v, v))
        return dtype

    @contextlib.contextmanager
    def plainly(self):
        """Inside, torch computes on real tensors undisturbed by the trace."""
        with _disable_current_modes():
            yield

    def quantised(self, x, weight, axis):
        """x and weight of a product, through Q/DQ when this point was calibrated; weight scales lie along `axis`."""
        count = self._points_in[self.module_path] = self._points_in.get(self.module_path, 0) + 1
        point = self.module_path if count == 1 else f"{self.module_path}#{count}"
        self.points[point] = x.tensor.name
        return (x, weight) if self.quantization is None else self.quantization.wrap(self, point, x, weight, axis)

    def operands(self, *values, dtype=None):
        """Tensors and numbers as nodes of one type: torch's promotion, then the type to compute in."""
        dtype = self.result_type(*values) if dtype is None else dtype
        return [self.operand(v, dtype) for v in values]
