"""Rows of functions of one element, or of two or three that stand at the same place; and of types."""

import torch
from trt_rows import POSITIVE, Make, X, bools, f, ints, pos, row, unit

# pointwise, one argument
POINTWISE = """abs neg negative ceil floor sign round trunc fix frac exp exp2 expm1 sin cos tan sinh cosh atan arctan
    asinh arcsinh erf erfc square sigmoid tanh relu reciprocal sgn positive isnan isinf isfinite isposinf isneginf
    signbit deg2rad rad2deg sinc nan_to_num logical_not angle"""
for name in POINTWISE.split():
    row(f"torch.{name}", getattr(torch, name), X)
for name in "log log2 log10 log1p sqrt rsqrt".split():
    row(f"torch.{name}", getattr(torch, name), POSITIVE)
for name in "asin acos atanh arcsin arccos arctanh".split():
    row(f"torch.{name}", getattr(torch, name), unit("B", 7))
row("torch.acosh", torch.acosh, Make("B", 5, low=1.1, high=9.0))
row("torch.special.expit", torch.special.expit, X)
row("torch.special.logit", torch.special.logit, Make("B", 7, low=0.05, high=0.95))
row("torch.logit", lambda x: torch.logit(x, 0.1), Make("B", 7, low=0.0, high=1.0))
row("torch.special.xlogy", torch.special.xlogy, X, POSITIVE)
row("torch.xlogy", torch.xlogy, pos("B", 3), pos("B", 3))
for name in "abs neg exp log sqrt rsqrt sigmoid tanh relu square reciprocal round floor ceil sin cos".split():
    row(f"Tensor.{name}", lambda x, n=name: getattr(x, n)(), POSITIVE)
for name in "abs_ neg_ exp_ sigmoid_ tanh_ relu_ sqrt_ square_ round_ floor_".split():
    row(f"Tensor.{name}", lambda x, n=name: getattr(x + 0.0, n)(), POSITIVE)
row("Tensor.__neg__", lambda x: -x, X)
row("Tensor.__abs__", lambda x: abs(x), X)
row("Tensor.__invert__", lambda x: ~x, bools("B", 5))
row("torch.bitwise_not", torch.bitwise_not, ints(-5, 5, "B", 5))
row("torch.round(decimals)", lambda x: torch.round(x, decimals=2), X)

# pointwise, two arguments
for (
    name
) in "add sub mul div true_divide maximum minimum fmax fmin atan2 arctan2 hypot subtract multiply divide".split():
    row(f"torch.{name}", getattr(torch, name), X, f("T", 6))
    if name in ("add", "sub", "mul", "div", "maximum", "minimum"):
        row(f"Tensor.{name}", lambda a, b, n=name: getattr(a, n)(b), X, f("T", 1))
for name in "eq ne lt le gt ge greater less greater_equal less_equal not_equal".split():
    row(f"torch.{name}", getattr(torch, name), ints(0, 3, "B", 6), ints(0, 3, 6))
    row(f"Tensor.{name}", lambda a, n=name: getattr(a, n)(1), ints(0, 3, "B", 6))
for name in "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor".split():
    row(f"torch.{name}", getattr(torch, name), bools("B", 6), bools(6))
row("Tensor.__and__", lambda a, b: a & b, bools("B", 6), bools(6))
row("Tensor.__or__", lambda a, b: a | b, bools("B", 6), bools(6))
row("Tensor.__xor__", lambda a, b: a ^ b, bools("B", 6), bools(6))
row("Tensor.__add__", lambda a, b: a + b + 2, X, f("B", 1, 6))
row("Tensor.__radd__", lambda a: 2 + a, X)
row("Tensor.__sub__", lambda a, b: a - b, X, f(6))
row("Tensor.__rsub__", lambda a: 1.5 - a, X)
row("Tensor.__mul__", lambda a, b: a * b * 3, X, f(6))
row("Tensor.__truediv__", lambda a, b: a / b, X, pos(6))
row("Tensor.__rtruediv__", lambda a: 2 / a, POSITIVE)
row("Tensor.__floordiv__", lambda a: a // 0.7, X)
row("Tensor.__mod__", lambda a: a % 0.7, X)
row("Tensor.__pow__", lambda a: a**2 + a**3.0, X)
row("Tensor.__rpow__", lambda a: 2**a, X)
row("Tensor.__iadd__", lambda a, b: a.clone().__iadd__(b), X, f(6))
row("Tensor.__eq__", lambda a: a == 1, ints(0, 3, "B", 6))
row("Tensor.__lt__", lambda a, b: a < b, X, f(6))
row("torch.rsub", lambda a, b: torch.rsub(a, b, alpha=2), X, f(6))
row("torch.add(alpha)", lambda a, b: torch.add(a, b, alpha=0.5), X, f(6))
row("torch.add(int, float)", lambda a, b: a + b, ints(0, 9, "B", 6), f(6))
row("torch.add(bool)", lambda a, b: a + b, bools("B", 6), bools(6))
row("torch.mul(bool, float)", lambda a, b: a * b, bools("B", 6), f("B", 6))
row("torch.div(int)", lambda a: a / 4, ints(0, 9, "B", 6))
row("torch.div(floor)", lambda a, b: torch.div(a, b, rounding_mode="floor"), ints(-9, 9, "B", 6), ints(1, 4, 6))
row("torch.div(trunc)", lambda a, b: torch.div(a, b, rounding_mode="trunc"), ints(-9, 9, "B", 6), ints(1, 4, 6))
row("torch.div(trunc, float)", lambda a: torch.div(a, 0.3, rounding_mode="trunc"), X)
row("torch.floor_divide", torch.floor_divide, ints(-9, 9, "B", 6), ints(1, 4, 6))
row("torch.remainder", torch.remainder, ints(-9, 9, "B", 6), ints(1, 4, 6))
row("torch.fmod", torch.fmod, ints(-9, 9, "B", 6), ints(1, 4, 6))
row("torch.pow", torch.pow, POSITIVE, f(6))
row("torch.pow(scalar)", lambda x: torch.pow(x, -0.5) + x.pow(0.3), POSITIVE)
row("torch.float_power", lambda x: torch.float_power(x, 2).float(), POSITIVE)
row("torch.lerp", lambda a, b: torch.lerp(a, b, 0.3), X, f(6))
row("torch.addcmul", lambda a, b, c: torch.addcmul(a, b, c, value=0.5), X, f(6), f(6))
row("torch.addcdiv", lambda a, b, c: torch.addcdiv(a, b, c, value=0.5), X, f(6), pos(6))
row("torch.clamp", lambda x: torch.clamp(x, -0.5, 0.5), X)
row("torch.clip", lambda x: torch.clip(x, min=0.1), X)
row("Tensor.clamp_min", lambda x: x.clamp_min(0.2), X)
row("Tensor.clamp_max", lambda x: x.clamp_max(0.2), X)
row("Tensor.clamp_", lambda x: (x * 2).clamp_(-1, 1), X)
row("torch.where", torch.where, bools("B", 6), f("B", 6), f(6))
row("torch.where(scalar)", lambda c, x: torch.where(c, x, 0.0), bools("B", 6), f("B", 6))
row("Tensor.where", lambda x, c: x.where(c, x * 2), f("B", 6), bools(6))
row("Tensor.masked_fill", lambda x, m: x.masked_fill(m, float("-inf")), f("B", 6), bools("B", 1))
row("Tensor.masked_fill_", lambda x, m: (x + 1).masked_fill_(m, 0.0), f("B", 6), bools("B", 1))
row("torch.heaviside", torch.heaviside, f("B", 6), f(6))
row("torch.copysign", torch.copysign, f("B", 6), f(6))
row("torch.logaddexp", torch.logaddexp, X, f(6))
row("torch.isclose", lambda a: torch.isclose(a, a.round(), atol=0.1), X)
row("Tensor.add_", lambda a, b: (a * 1).add_(b, alpha=2), X, f(6))
row("Tensor.sub_", lambda a, b: (a * 1).sub_(b), X, f(6))
row("Tensor.mul_", lambda a, b: (a * 1).mul_(b), X, f(6))
row("Tensor.div_", lambda a, b: (a * 1).div_(b), X, pos(6))
row("Tensor.copy_", lambda a, b: (a * 1).copy_(b), X, f(6))
row("Tensor.fill_", lambda a: (a * 1).fill_(3.0), X)
row("Tensor.zero_", lambda a: (a * 1).zero_(), X)

# types
row("Tensor.float", lambda x: x.float(), ints(0, 9, "B", 3))
row("Tensor.int", lambda x: (x * 5).int(), X)
row("Tensor.long", lambda x: (x * 5).long(), X)
row("Tensor.bool", lambda x: x.bool(), ints(0, 2, "B", 4))
row("Tensor.half", lambda x: x.half().float(), X)
row("Tensor.bfloat16", lambda x: x.bfloat16().float(), X)
row("Tensor.to", lambda x: x.to(torch.int32), POSITIVE)
row("Tensor.to(other)", lambda x, y: x.to(y), ints(0, 4, "B", 3), f(2))
row("Tensor.type_as", lambda x, y: x.type_as(y), ints(0, 4, "B", 3), f(2))
row("Tensor.type", lambda x: x.type(torch.int64), POSITIVE)
row("Tensor.double", lambda x: x.double() * 2, X)
row("Tensor.contiguous", lambda x: x.transpose(1, 2).contiguous(), X)
row("Tensor.clone", lambda x: x.clone(), X)
row("Tensor.detach", lambda x: x.detach() + 1, X)
row("Tensor.cpu", lambda x: x.cpu() + 1, X)
