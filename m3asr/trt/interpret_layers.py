"""One function for each TensorRT layer type: (interpreter, layer, input tensors) -> output tensors."""

import math

import torch
import torch.nn.functional as F

EVALUATE = {}

CLASSES = {
    "ELEMENTWISE": "IElementWiseLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
    "TOPK": "ITopKLayer",
    "SOFTMAX": "ISoftMaxLayer",
    "PARAMETRIC_RELU": "IParametricReLULayer",
    "ONE_HOT": "IOneHotLayer",
    "LRN": "ILRNLayer",
    "TRIP_LIMIT": "ITripLimitLayer",
    "LOOP_OUTPUT": "ILoopOutputLayer",
    "PLUGIN_V3": "IPluginV3Layer",
    "NON_ZERO": "INonZeroLayer",
}


def class_of(trt, kind):
    name = CLASSES.get(kind.name) or "I" + "".join(p.capitalize() for p in kind.name.split("_")) + "Layer"
    return getattr(trt, name, trt.ILayer)


def evaluates(*kinds):
    def register(function):
        for kind in kinds:
            EVALUATE[kind] = function
        return function

    return register


def axes_of(bits):
    return [i for i in range(32) if bits >> i & 1]


@evaluates("CONSTANT")
def constant(run, layer, given):
    shape = tuple(layer.shape)
    if layer.name in run.values:
        return run.values[layer.name].reshape(shape)
    return torch.from_numpy(layer.weights.copy()).reshape(shape)


@evaluates("IDENTITY", "ASSERTION")
def identity(run, layer, given):
    return given[0]


@evaluates("CAST")
def cast(run, layer, given):
    return given[0].to(run.package.torch_dtype(layer.to_type))


@evaluates("SHAPE")
def shape(run, layer, given):
    return torch.tensor(given[0].shape, dtype=torch.int64)


UNARY = {
    "EXP": torch.exp, "LOG": torch.log, "SQRT": torch.sqrt, "RECIP": torch.reciprocal, "ABS": torch.abs,
    "NEG": torch.neg, "SIN": torch.sin, "COS": torch.cos, "TAN": torch.tan, "SINH": torch.sinh, "COSH": torch.cosh,
    "ASIN": torch.asin, "ACOS": torch.acos, "ATAN": torch.atan, "ASINH": torch.asinh, "ACOSH": torch.acosh,
    "ATANH": torch.atanh, "CEIL": torch.ceil, "FLOOR": torch.floor, "ERF": torch.erf, "NOT": torch.logical_not,
    "SIGN": torch.sign, "ROUND": torch.round, "ISINF": torch.isinf, "ISNAN": torch.isnan,
}  # fmt: skip


@evaluates("UNARY")
def unary(run, layer, given):
    return UNARY[layer.op.name](given[0])


def _divide(a, b):
    return a / b if a.dtype.is_floating_point else torch.div(a, b, rounding_mode="trunc")


BINARY = {
    "SUM": torch.add, "PROD": torch.mul, "SUB": torch.sub, "DIV": _divide, "MAX": torch.maximum,
    "MIN": torch.minimum, "POW": torch.pow, "FLOOR_DIV": torch.floor_divide, "EQUAL": torch.eq, "GREATER": torch.gt,
    "LESS": torch.lt, "AND": torch.logical_and, "OR": torch.logical_or, "XOR": torch.logical_xor,
}  # fmt: skip


@evaluates("ELEMENTWISE")
def elementwise(run, layer, given):
    a, b = given
    if a.dtype != b.dtype:
        raise ValueError(f"operand types {a.dtype} and {b.dtype} differ")
    return BINARY[layer.op.name](a, b)


@evaluates("SELECT")
def select(run, layer, given):
    return torch.where(*given)


ACTIVATION = {
    "RELU": lambda x, a, b: torch.relu(x),
    "SIGMOID": lambda x, a, b: torch.sigmoid(x),
    "TANH": lambda x, a, b: torch.tanh(x),
    "LEAKY_RELU": lambda x, a, b: F.leaky_relu(x, a),
    "ELU": lambda x, a, b: F.elu(x, a),
    "SELU": lambda x, a, b: b * (torch.relu(x) + torch.clamp(a * torch.exp(x) - a, max=0.0)),
    "SOFTSIGN": lambda x, a, b: x / (1 + x.abs()),
    "SOFTPLUS": lambda x, a, b: a * torch.log(torch.exp(b * x) + 1),
    "CLIP": lambda x, a, b: torch.clamp(x, a, b),
    "HARD_SIGMOID": lambda x, a, b: torch.clamp(a * x + b, 0, 1),
    "SCALED_TANH": lambda x, a, b: a * torch.tanh(b * x),
    "THRESHOLDED_RELU": lambda x, a, b: torch.where(x > a, x, torch.zeros_like(x)),
    "GELU_ERF": lambda x, a, b: F.gelu(x),
    "GELU_TANH": lambda x, a, b: F.gelu(x, approximate="tanh"),
}


@evaluates("ACTIVATION")
def activation(run, layer, given):
    return ACTIVATION[layer.type.name](given[0], layer.alpha, layer.beta)


def _asked(layer):
    """reshape_dims, or None when no reshape was asked for (the binding answers None or an invalid Dims)."""
    try:
        return layer.reshape_dims if layer.reshape_dims is None or len(layer.reshape_dims) >= 0 else None
    except ValueError:
        return None


@evaluates("SHUFFLE")
def shuffle(run, layer, given):
    x = given[0]
    if x.dim():
        x = x.permute(*[layer.first_transpose[i] for i in range(x.dim())])
    if len(given) > 1:
        dims = given[1].tolist()
    else:
        asked = _asked(layer)
        dims = list(x.shape) if asked is None else list(asked)
    if layer.zero_is_placeholder:
        dims = [x.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    x = x.reshape(dims)
    return x.permute(*[layer.second_transpose[i] for i in range(x.dim())]) if x.dim() else x


@evaluates("SQUEEZE")
def squeeze(run, layer, given):
    return given[0].squeeze(tuple(given[1].tolist()))


@evaluates("UNSQUEEZE")
def unsqueeze(run, layer, given):
    x = given[0]
    for axis in sorted(given[1].tolist()):
        x = x.unsqueeze(axis)
    return x


@evaluates("SLICE")
def slice_(run, layer, given):
    """Reads x[start + stride * i] in each dimension; outside of x the mode says what is there."""
    x = given[0]

    def of(index, dims):
        given_here = given[index] if len(given) > index and given[index] is not None else None
        return given_here.tolist() if given_here is not None else list(dims)

    start, size, stride = of(1, layer.start), of(2, layer.shape), of(3, layer.stride)
    mode = layer.mode.name
    inside = None
    for dim, (begin, count, step) in enumerate(zip(start, size, stride, strict=True)):
        at = begin + step * torch.arange(count)
        length = x.shape[dim]
        if mode == "FILL":
            ok = (at >= 0) & (at < length)
            ok = ok.reshape([-1] + [1] * (x.dim() - dim - 1))
            inside = ok if inside is None else inside & ok
            at = at.clamp(0, max(length - 1, 0))
        elif mode == "CLAMP":
            at = at.clamp(0, length - 1)
        elif mode == "WRAP":
            at = at % length
        elif mode == "REFLECT":
            period = max(2 * (length - 1), 1)
            at = at % period
            at = torch.where(at >= length, period - at, at)
        elif count and (int(at.min()) < 0 or int(at.max()) >= length):
            raise ValueError(f"slice reads {int(at.min())}..{int(at.max())} of {length} in dimension {dim}")
        x = x.index_select(dim, at) if length else x.new_zeros([*x.shape[:dim], count, *x.shape[dim + 1 :]])
    if mode == "FILL":
        value = given[4] if len(given) > 4 and given[4] is not None else torch.zeros((), dtype=x.dtype)
        x = torch.where(inside, x, value.to(x.dtype))
    return x


@evaluates("CONCATENATION")
def concatenation(run, layer, given):
    return torch.cat(given, layer.axis)


@evaluates("REDUCE")
def reduce(run, layer, given):
    x, axes, keep = given[0], axes_of(layer.axes), layer.keep_dims
    operation = layer.op.name
    if operation == "SUM":
        return x.sum(axes, keepdim=keep).to(x.dtype)
    if operation == "AVG":
        if x.dtype.is_floating_point:
            return x.mean(axes, keepdim=keep)
        return _divide(x.sum(axes, keepdim=keep), math.prod(x.shape[a] for a in axes)).to(x.dtype)
    if operation == "MAX":
        return x.amax(axes, keepdim=keep)
    if operation == "MIN":
        return x.amin(axes, keepdim=keep)
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep).to(x.dtype)
    return x


@evaluates("SOFTMAX")
def softmax(run, layer, given):
    return torch.softmax(given[0], axes_of(layer.axes)[0])


@evaluates("MATRIX_MULTIPLY")
def matrix_multiply(run, layer, given):
    a, b = given
    if a.dtype != b.dtype:
        raise ValueError(f"operand types {a.dtype} and {b.dtype} differ")
    a = a.transpose(-1, -2) if layer.op0.name == "TRANSPOSE" else a
    b = b.transpose(-1, -2) if layer.op1.name == "TRANSPOSE" else b
    return torch.matmul(a, b)


@evaluates("EINSUM")
def einsum(run, layer, given):
    return torch.einsum(layer.equation, *given)


@evaluates("GATHER")
def gather(run, layer, given):
    x, index = given
    mode = layer.mode.name
    index = index.long()
    if mode == "DEFAULT":
        flat = x.index_select(layer.axis, index.reshape(-1))
        return flat.reshape(*x.shape[: layer.axis], *index.shape, *x.shape[layer.axis + 1 :])
    if mode == "ELEMENT":
        return torch.gather(x, layer.axis, index)
    return x[tuple(index.unbind(-1))]


@evaluates("SCATTER")
def scatter(run, layer, given):
    x, index, update = given
    if layer.mode.name == "ELEMENT":
        return x.scatter(layer.axis, index.long(), update)
    out = x.clone()
    out[tuple(index.long().unbind(-1))] = update
    return out


@evaluates("TOPK")
def topk(run, layer, given):
    k = int(given[1]) if len(given) > 1 and given[1] is not None else layer.k
    axis = axes_of(layer.axes)[0]
    # Ties: the lower index first, as a stable sort gives it.
    values, indices = torch.sort(given[0], dim=axis, descending=layer.op.name == "MAX", stable=True)
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k).to(torch.int32)


@evaluates("FILL")
def fill(run, layer, given):
    dims = given[0].tolist() if given and given[0] is not None else list(layer.shape)
    dtype = run.package.torch_dtype(layer.get_output(0).dtype)
    if layer.operation.name != "LINSPACE":
        raise ValueError("random fills have no reproducible value")
    alpha = given[1] if len(given) > 1 and given[1] is not None else torch.tensor(layer.alpha)
    beta = given[2] if len(given) > 2 and given[2] is not None else torch.tensor([layer.beta] * len(dims))
    out = alpha.to(dtype).expand(dims).clone()
    for dim, (n, step) in enumerate(zip(dims, beta.reshape(-1), strict=True)):
        out += (torch.arange(n).to(dtype) * step.to(dtype)).reshape([-1] + [1] * (len(dims) - dim - 1))
    return out


@evaluates("CUMULATIVE")
def cumulative(run, layer, given):
    x, axis = given[0], int(given[1])
    return torch.cumsum(x, axis, dtype=x.dtype)


@evaluates("ONE_HOT")
def one_hot(run, layer, given):
    index, values, depth = given
    hot = F.one_hot(index.long() % int(depth), int(depth)).movedim(-1, layer.axis)
    return torch.where(hot.bool(), values[1], values[0])


@evaluates("PLUGIN_V3")
def plugin(run, layer, given):
    reference = getattr(layer.plugin, "reference", None)
    if reference is None:
        raise ValueError(f"plugin {layer.plugin!r} has no `reference` in torch")
    return reference(*given)
