"""Arithmetic, comparisons, logic and pointwise mathematics."""

import math

import torch

from . import layers as L
from .table import converter

aten = torch.ops.aten

UNARY = {  # exact in low precision too
    aten.abs: "ABS",
    aten.neg: "NEG",
    aten.ceil: "CEIL",
    aten.floor: "FLOOR",
    aten.sign: "SIGN",
    aten.sgn: "SIGN",
    aten.round: "ROUND",
}
FLOAT_UNARY = {  # computed in float32
    aten.exp: "EXP",
    aten.log: "LOG",
    aten.sqrt: "SQRT",
    aten.reciprocal: "RECIP",
    aten.sin: "SIN",
    aten.cos: "COS",
    aten.tan: "TAN",
    aten.sinh: "SINH",
    aten.cosh: "COSH",
    aten.asin: "ASIN",
    aten.acos: "ACOS",
    aten.atan: "ATAN",
    aten.asinh: "ASINH",
    aten.acosh: "ACOSH",
    aten.atanh: "ATANH",
    aten.erf: "ERF",
}


def _exact_unary(operation):
    def convert(net, x, decimals=0):
        if decimals:
            scale = 10.0**decimals
            return L.unary("ROUND", net.operand(x) * scale) / scale
        node = net.operand(x)
        if not x.dtype.is_floating_point:
            if operation in ("CEIL", "FLOOR", "ROUND"):
                return node
            if operation == "NEG":
                return 0 - node
            if operation == "SIGN":
                return L.cast(L.unary("SIGN", L.cast(node, torch.float32)), node.dtype)
            return L.binary("MAX", node, 0 - node)
        return L.unary(operation, node)

    return convert


def _float_unary(operation):
    def convert(net, x):
        return L.unary(operation, L.cast(net.operand(x), torch.float32))

    return convert


for function, operation in UNARY.items():
    converter(function)(_exact_unary(operation))
for function, operation in FLOAT_UNARY.items():
    converter(function, kind="float32")(_float_unary(operation))


@converter(aten.trunc, aten.fix)
def trunc(net, x):
    node = net.operand(x)
    return L.unary("SIGN", node) * L.unary("FLOOR", L.unary("ABS", node)) if x.dtype.is_floating_point else node


@converter(aten.rsqrt, kind="float32")
def rsqrt(net, x):
    return L.unary("RECIP", L.unary("SQRT", L.cast(net.operand(x), torch.float32)))


@converter(aten.exp2, kind="float32")
def exp2(net, x):
    return torch.exp(x * math.log(2.0))


@converter(aten.square)
def square(net, x):
    node = net.operand(x)
    return node * node


for function, operation in {aten.mul: "PROD", aten.maximum: "MAX", aten.minimum: "MIN"}.items():

    @converter(function)
    def convert(net, a, b, operation=operation):
        dtype = net.result_type(a, b)
        if dtype == torch.bool:  # no arithmetic on bools: product and minimum are "and", maximum is "or"
            return L.binary("OR" if operation == "MAX" else "AND", *net.operands(a, b, dtype=dtype))
        return L.binary(operation, *net.operands(a, b, dtype=dtype))


def _sum(net, operation, a, b, alpha=1):
    dtype = net.result_type(a, b)
    if dtype == torch.bool:
        return L.binary("OR", *net.operands(a, b))
    a, b = net.operands(a, b, dtype=dtype)
    return L.binary(operation, a, b if alpha == 1 else b * alpha)


@converter(aten.add)
def add(net, a, b, alpha=1):
    return _sum(net, "SUM", a, b, alpha)


@converter(aten.sub)
def sub(net, a, b, alpha=1):
    return _sum(net, "SUB", a, b, alpha)


@converter(aten.rsub)
def rsub(net, a, b, alpha=1):
    return _sum(net, "SUB", b, a if alpha == 1 else a * alpha)


@converter(aten.div)
def div(net, a, b, *, rounding_mode=None):
    dtype = net.result_type(a, b)
    if rounding_mode is None:
        dtype = dtype if dtype.is_floating_point else torch.float32
        return L.binary("DIV", *net.operands(a, b, dtype=dtype))
    if rounding_mode == "floor":
        return _floor_div(net, a, b)
    a, b = net.operands(a, b)
    if dtype.is_floating_point:
        quotient = L.binary("DIV", a, b)
        return L.unary("SIGN", quotient) * L.unary("FLOOR", L.unary("ABS", quotient))
    return L.binary("DIV", a, b)


@converter(aten.floor_divide)
def _floor_div(net, a, b):
    return L.binary("FLOOR_DIV", *net.operands(a, b))


@converter(aten.remainder)
def remainder(net, a, b):
    a, b = net.operands(a, b)
    return a - L.binary("FLOOR_DIV", a, b) * b


@converter(aten.fmod)
def fmod(net, a, b):
    return a - torch.div(a, b, rounding_mode="trunc") * b


@converter(aten.pow, kind="float32")
def pow(net, a, b):
    dtype = net.result_type(a, b)
    known = float(b) if isinstance(b, (int, float)) else None
    if known in (1.0, 2.0, 3.0, 4.0):
        base = net.operand(a, dtype)
        result = base
        for _ in range(int(known) - 1):
            result = result * base
        return result
    if not dtype.is_floating_point:
        power = L.binary("POW", *net.operands(a, b, dtype=torch.float32))
        return L.unary("ROUND", power)
    if known == 0.5:
        return L.unary("SQRT", net.operand(a, dtype))
    if known == -0.5:
        return L.unary("RECIP", L.unary("SQRT", net.operand(a, dtype)))
    if known == -1.0:
        return L.unary("RECIP", net.operand(a, dtype))
    return L.binary("POW", *net.operands(a, b, dtype=dtype))


COMPARISONS = {aten.eq: "EQUAL", aten.gt: "GREATER", aten.lt: "LESS"}
NEGATED = {aten.ne: "EQUAL", aten.le: "GREATER", aten.ge: "LESS"}


def _compare(net, operation, a, b):
    dtype = net.result_type(a, b)
    if dtype == torch.bool:
        dtype = torch.int32
    return L.binary(operation, *net.operands(a, b, dtype=dtype))


for function, operation in COMPARISONS.items():

    @converter(function)
    def compare(net, a, b, operation=operation):
        return _compare(net, operation, a, b)


for function, operation in NEGATED.items():

    @converter(function)
    def compare_not(net, a, b, operation=operation):
        # "not less" counts NaN as greater or equal; torch says no comparison with NaN holds, except !=.
        opposite = L.unary("NOT", _compare(net, operation, a, b))
        if operation == "EQUAL" or not net.result_type(a, b).is_floating_point:
            return opposite
        strict = _compare(net, "GREATER" if operation == "LESS" else "LESS", a, b)
        return L.binary("OR", strict, _compare(net, "EQUAL", a, b))


def truth(net, x):
    """x != 0 as a bool node."""
    if isinstance(x, torch.Tensor) and x.dtype == torch.bool:
        return net.node(x)
    node = net.node(x)
    return L.unary("NOT", L.binary("EQUAL", node, net.scalar(0, node.dtype, node.rank)))


for function, operation in {aten.logical_and: "AND", aten.logical_or: "OR", aten.logical_xor: "XOR"}.items():

    @converter(function)
    def logical(net, a, b, operation=operation):
        return L.binary(operation, truth(net, a), truth(net, b))


@converter(aten.logical_not)
def logical_not(net, x):
    return L.unary("NOT", truth(net, x))


@converter(aten.bitwise_not)
def bitwise_not(net, x):
    return L.unary("NOT", net.node(x)) if x.dtype == torch.bool else -1 - net.operand(x)


@converter(aten.isnan)
def isnan(net, x):
    return L.unary("ISNAN", net.operand(x)) if x.dtype.is_floating_point else torch.zeros_like(x, dtype=torch.bool)


@converter(aten.isinf)
def isinf(net, x):
    return L.unary("ISINF", net.operand(x)) if x.dtype.is_floating_point else torch.zeros_like(x, dtype=torch.bool)


@converter(aten.where)
def where(net, condition, a, b):
    dtype = net.result_type(a, b)
    if dtype == torch.bool:
        a, b = net.operands(a, b, dtype=torch.int32)
        return L.select(truth(net, condition), a, b)
    return L.select(truth(net, condition), *net.operands(a, b, dtype=dtype))


@converter(aten.masked_fill)
def masked_fill(net, x, mask, value):
    if x.dtype == torch.bool:
        return torch.where(mask, torch.full_like(x, value) if not isinstance(value, torch.Tensor) else value, x)
    x, value = net.operands(x, value, dtype=x.dtype)
    return L.select(truth(net, mask), value, x)


@converter(aten.clamp)
def clamp(net, x, min=None, max=None):
    dtype = net.result_type(x, *(v for v in (min, max) if v is not None))
    node = net.operand(x, dtype)
    if min is not None:
        node = L.binary("MAX", node, net.operand(min, dtype))
    return node if max is None else L.binary("MIN", node, net.operand(max, dtype))


@converter(aten.clamp_min)
def clamp_min(net, x, min):
    return torch.clamp(x, min=min)


@converter(aten.clamp_max)
def clamp_max(net, x, max):
    return torch.clamp(x, max=max)


@converter(aten._to_copy, torch.ops.prims.convert_element_type)
def to_copy(net, x, dtype=None, **_):
    dtype = x.dtype if dtype is None or not isinstance(dtype, torch.dtype) else dtype
    if dtype == torch.bool:
        return truth(net, x)
    node = net.node(x)
    if dtype.is_floating_point and x.dtype.is_floating_point:
        return L.cast(node, net.compute_type(dtype))
    if dtype == torch.uint8 and x.dtype.is_floating_point:
        node = L.cast(node, torch.int32)
    return L.cast(node, net.package.dtype(dtype))


@converter(torch.Tensor.float)
def to_float(net, x, **_):
    return hold(net, x, True) if x.dtype == torch.float32 else x.to(torch.float32)


@converter(torch.Tensor.to)
def to(net, x, *args, **kwargs):
    """`.to(torch.float32)` of a low-precision tensor holds it in float32, of a held one lets go (`.to(input.dtype)`).

    Of a tensor that is in float32 anyhow it is taken for `.to(input.dtype)` too, and changes nothing.
    """
    wanted = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
    if wanted == x.dtype == torch.float32 and x.const is None:
        if not x.pinned and x.node.dtype == net.trt.float32:
            return x
        return hold(net, x, not x.pinned)
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor.to(x, *args, **kwargs)


def hold(net, x, pinned):
    from .tensor import SymTensor

    if x.const is not None:
        return x
    dtype = net.trt.float32 if pinned else net.package.dtype(net.precision.low)
    return SymTensor(net, x.fake, node=L.cast(x.node, dtype), pinned=pinned)


@converter(aten.copy)
def copy(net, x, source, non_blocking=False):
    return source.to(x.dtype).expand(x.shape) if source.dtype != x.dtype else source.expand(x.shape).clone()


@converter(aten.clone, aten.detach, aten.alias, aten.contiguous, aten.lift_fresh, aten.lift_fresh_copy)
def clone(net, x, **_):
    return net.node(x)


@converter(torch.ops.prims.view_of)
def view_of(net, x):
    return net.node(x)
