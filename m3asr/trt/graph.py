"""The network under construction: nodes (a TensorRT tensor and its symbolic sizes), constants, names, size tensors."""

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import sizes
from .errors import TraceError

LARGE = 1 << 18  # elements


class Node:
    """A TensorRT tensor with its sizes (ints and SymInts). Arithmetic operators add elementwise layers."""

    __slots__ = ("graph", "_tensor", "shape", "dtype", "source")

    def __init__(self, graph, tensor, shape, source=None, dtype=None):
        self.graph, self._tensor, self.shape = graph, tensor, tuple(shape)
        self.dtype = tensor.dtype if dtype is None else dtype
        self.source = source  # the torch tensor behind a constant, which becomes a layer when it is first used

    @property
    def tensor(self):
        if self._tensor is None:
            self._tensor = self.graph.add_constant(self.source, self.dtype)
            if not self.graph.lasts(self.source):
                self.source = None
        return self._tensor

    @property
    def rank(self):
        return len(self.shape)

    def _with(self, operation, other, swap=False):
        from .layers import binary

        if not isinstance(other, Node):
            other = self.graph.scalar(other, self.dtype)
        return binary(operation, other, self) if swap else binary(operation, self, other)

    def __add__(self, other):
        return self._with("SUM", other)

    def __radd__(self, other):
        return self._with("SUM", other, True)

    def __sub__(self, other):
        return self._with("SUB", other)

    def __rsub__(self, other):
        return self._with("SUB", other, True)

    def __mul__(self, other):
        return self._with("PROD", other)

    def __rmul__(self, other):
        return self._with("PROD", other, True)

    def __truediv__(self, other):
        return self._with("DIV", other)

    def __rtruediv__(self, other):
        return self._with("DIV", other, True)

    def __neg__(self):
        return self._with("PROD", -1)

    def __repr__(self):
        return f"Node({self.tensor.name}, {self.shape}, {self.dtype.name})"


class Graph:
    """Wraps one INetworkDefinition: adds layers under the current module path, keeps constants alive and readable."""

    def __init__(self, package, network):
        self.package, self.network, self.trt = package, network, package.module
        self.path = []  # module paths, outermost first; layers are named after the last
        self.operation = ""  # what is being converted
        self.values = {}  # constant layer name -> torch tensor: TensorRT cannot read bf16 back, and frees nothing of it
        self._constants = {}  # what a constant is made of -> Node
        self._stored = {}
        self.weights = set()  # addresses of the module's own tensors
        self._counts = {}
        self._sizes = {}  # (sympy expression, dtype) -> Node
        self._shapes = {}  # input name -> shape layer output
        self.symbols = {}  # sympy symbol -> (input node, dimension)
        self._scope = ()  # >0 inside a loop body, where size tensors must not be cached for the outside

    # names and layers

    def where(self):
        return f"in module {self.module_path or '(root)'}: "

    @property
    def module_path(self):
        return self.path[-1] if self.path else ""

    def layer(self, kind, *arguments, **keywords):
        """Adds `network.add_<kind>(...)`, named <module path>/<operation>[.<kind>]#<n>."""
        add = getattr(self.network, f"add_{kind}", None)
        if add is None:
            raise TraceError(f"{self.where()}{self.package} has no add_{kind}, needed for {self.operation}")
        return self.named(add(*arguments, **keywords), kind)

    def named(self, layer, kind):
        if layer is None:
            raise TraceError(
                f"{self.where()}{self.package} refused a {kind} layer for {self.operation} {self.package.logger.text()}"
            )
        name = "/".join(part for part in (self.module_path, self.operation, kind) if part)
        count = self._counts[name] = self._counts.get(name, 0) + 1
        layer.name = name if count == 1 else f"{name}#{count}"
        return layer

    def output(self, layer, shape, index=0):
        """The layer's output as a Node; asking TensorRT for its shape brings type errors up here, not at build."""
        tensor = layer.get_output(index)
        try:
            rank = len(tensor.shape)
        except (RuntimeError, ValueError) as error:
            raise TraceError(
                f"{self.where()}{self.package} refuses {self.operation} ({layer.name}): "
                f"{self.package.logger.text() or error}"
            ) from None
        if rank != len(shape):
            raise TraceError(
                f"{self.where()}{self.operation} gave rank {rank} in {self.package} where torch has {tuple(shape)} "
                f"({layer.name}) {self.package.logger.text()}"
            )
        tensor.name = layer.name if index == 0 else f"{layer.name}:{index}"
        return Node(self, tensor, shape)

    # constants

    def type(self, dtype):
        """torch dtype or TensorRT dtype -> TensorRT dtype."""
        return self.package.dtype(dtype) if isinstance(dtype, torch.dtype) else dtype

    def constant(self, value, dtype=None):
        """A torch tensor as a constant, stored once however often it is used. dtype: TensorRT's, default its own."""
        value = getattr(value, "const", value)
        dtype = self.package.dtype(value.dtype) if dtype is None else dtype
        with _disable_current_modes():
            if not self.lasts(value):
                # Computed from weights while tracing: not worth keeping beside its converted copy.
                return Node(self, None, [int(s) for s in value.shape], value, dtype)
            return self._constant(value, dtype)

    def lasts(self, value):
        """A weight of the module, or too small to matter: may be kept, and is recognised when it comes again."""
        return value.numel() <= LARGE or value.untyped_storage().data_ptr() in self.weights

    def _constant(self, value, dtype):
        key = (value.data_ptr(), value._version, tuple(value.shape), value.stride(), value.dtype, dtype.name)
        if value.numel() == 1:
            key = (str(value.item()), tuple(value.shape), dtype.name)
        # The node keeps `value`, so its address cannot be given to another tensor while the key lives.
        if key not in self._constants:
            self._constants[key] = Node(self, None, [int(s) for s in value.shape], value, dtype)
        return self._constants[key]

    def add_constant(self, value, dtype):
        """The constant layer; its memory lives as long as the graph, in one copy whatever shapes it is seen in."""
        with _disable_current_modes():
            key = (value.data_ptr(), value._version, value.numel(), value.dtype, dtype.name)
            stored = self._stored[key][0] if key in self._stored else None
            if stored is None:
                stored = self._convert(value.detach(), self.package.torch_dtype(dtype)).contiguous().cpu()
                if value.is_contiguous() and self.lasts(value):
                    self._stored[key] = stored, value
            weights = self.trt.Weights(dtype, stored.data_ptr(), stored.numel())
            shape = tuple(int(s) for s in value.shape)
            layer = self.layer("constant", self.trt.Dims(shape), weights)
            self.values[layer.name] = stored.reshape(shape)
            return self.output(layer, shape).tensor

    def _convert(self, value, dtype):
        """Narrowing keeps finite numbers finite: torch.finfo(float32).min as a mask must not become -inf * 0."""
        if dtype in (torch.float16, torch.bfloat16) and value.dtype in (torch.float32, torch.float64):
            limit = torch.finfo(dtype).max
            if value.numel() > LARGE and max(abs(float(v)) for v in value.aminmax()) <= limit:
                return value.to(dtype)
            return torch.where(value.isfinite(), value.clamp(-limit, limit), value).to(dtype)
        if dtype in (torch.int32,) and value.dtype == torch.int64:
            return value.clamp(-(2**31), 2**31 - 1).to(dtype)
        return value.to(dtype)

    def scalar(self, number, dtype, rank=0):
        """A Python number or SymInt as a node of shape (1,) * rank."""
        from . import layers

        if isinstance(number, (torch.SymInt, torch.SymFloat)) and not sizes.is_fixed(number):
            node = layers.cast(self.size(number), dtype)
            return layers.reshape(node, (1,) * rank) if rank != 1 else node
        if isinstance(number, (torch.SymInt, torch.SymFloat)):
            number = int(number) if isinstance(number, torch.SymInt) else float(number)
        if isinstance(number, complex):
            raise TraceError(f"{self.where()}{self.operation}: TensorRT has no complex numbers")
        carrier = (
            torch.float64 if isinstance(number, float) else torch.bool if isinstance(number, bool) else torch.int64
        )
        return self.constant(torch.full((1,) * rank, number, dtype=carrier), dtype)

    # sizes

    def size(self, number):
        """An int, SymInt or SymFloat as a node of shape (1,), int64 or float32."""
        return self._lower(sizes.expression(number))

    def _lower(self, expr):
        from . import layers

        key = (expr, self._scope)
        if key in self._sizes:
            return self._sizes[key]

        def constant(value):
            dtype = torch.int64 if isinstance(value, int) else torch.float32
            return self.constant(torch.tensor([value], dtype=dtype))

        def symbol(s):
            if (s, ()) in self._sizes:
                return self._sizes[s, ()]
            node, dim = self.symbols[s]
            name = node.tensor.name
            if name not in self._shapes:
                self._shapes[name] = self.output(self.layer("shape", node.tensor), (node.rank,))
            return layers.slice_(self._shapes[name], (dim,), (1,), (1,))

        def floor(node):
            return layers.cast(layers.unary("FLOOR", node), torch.int64)

        previous, self.operation = self.operation, "size"
        path, self.path = self.path, []
        try:
            node = sizes.lower(expr, symbol, constant, layers.binary, floor, lambda n: layers.cast(n, torch.float32))
        finally:
            self.operation, self.path = previous, path
        self._sizes[key] = node
        return node

    def size_tensor(self, numbers):
        """A list of ints and SymInts as one int64 shape tensor (len,)."""
        from . import layers

        numbers = list(numbers)
        if all(sizes.is_fixed(n) for n in numbers):
            return self.constant(torch.tensor([int(n) for n in numbers], dtype=torch.int64))
        parts, run = [], []
        for n in numbers:
            if sizes.is_fixed(n):
                run.append(int(n))
                continue
            if run:
                parts.append(self.constant(torch.tensor(run, dtype=torch.int64)))
                run = []
            parts.append(self.size(n))
        if run:
            parts.append(self.constant(torch.tensor(run, dtype=torch.int64)))
        key = (tuple(sizes.expression(n) for n in numbers), "tensor", self._scope)
        if key not in self._sizes:
            self._sizes[key] = layers.concat(parts, 0)
        return self._sizes[key]
