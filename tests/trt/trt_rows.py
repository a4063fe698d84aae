"""The conformance table: every torch function that a forward may call, one row each, with inputs of named sizes."""

import torch
import torch.nn.functional as F
from torch import nn

ROWS = []


class Make:
    """An input: its sizes ("B" and "T" vary), its dtype, and how to fill it."""

    def __init__(self, *dims, dtype="float32", low=None, high=None, positive=False):
        self.dims, self.dtype, self.low, self.high, self.positive = dims, dtype, low, high, positive

    def values(self, sizes, generator):
        shape = [sizes.get(d, d) for d in self.dims]
        if self.dtype == "bool":
            return torch.rand(shape, generator=generator) > 0.4
        if self.low is not None and self.dtype.startswith("int"):
            return torch.randint(self.low, self.high, shape, generator=generator).to(getattr(torch, self.dtype))
        x = torch.randn(shape, generator=generator)
        if self.positive:
            x = x.abs() + 0.1
        if self.low is not None:
            x = torch.rand(shape, generator=generator) * (self.high - self.low) + self.low
        return x


def f(*dims):
    return Make(*dims)


def pos(*dims):
    return Make(*dims, positive=True)


def unit(*dims):
    return Make(*dims, low=-0.95, high=0.95)


def ints(low, high, *dims, dtype="int64"):
    return Make(*dims, dtype=dtype, low=low, high=high)


def bools(*dims):
    return Make(*dims, dtype="bool")


def row(name, function, *inputs):
    ROWS.append((name, function, inputs))


X = f("B", "T", 6)
IMAGE = f("B", 4, "T", 9)
POSITIVE = pos("B", "T", 6)

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

# shapes and views
row("Tensor.view", lambda x: x.view(x.size(0), -1), X)
row("Tensor.view(sizes)", lambda x: x.view(x.shape[0], x.shape[1], 2, 3), X)
row("Tensor.view_as", lambda x, y: x.view_as(y), f("B", "T", 6), f("B", "T", 2, 3))
row("Tensor.reshape", lambda x: x.reshape(-1, 3), X)
row("torch.reshape", lambda x: torch.reshape(x, (x.shape[1], -1)), X)
row("Tensor.reshape_as", lambda x, y: x.reshape_as(y), f("B", 6), f(6, "B"))
row("torch.flatten", lambda x: torch.flatten(x, 1), X)
row("Tensor.flatten", lambda x: x.flatten(), X)
row("Tensor.unflatten", lambda x: x.unflatten(-1, (2, 3)), X)
row("torch.squeeze", lambda x: torch.squeeze(x, 1), f("B", 1, 6))
row("Tensor.squeeze", lambda x: x.squeeze(-1), f("B", "T", 1))
row("torch.unsqueeze", lambda x: torch.unsqueeze(x, 1), X)
row("Tensor.unsqueeze", lambda x: x.unsqueeze(-1), X)
row("Tensor.transpose", lambda x: x.transpose(1, 2), X)
row("torch.transpose", lambda x: torch.transpose(x, 0, -1), X)
row("Tensor.permute", lambda x: x.permute(2, 0, 1), X)
row("torch.permute", lambda x: torch.permute(x, (1, 2, 0)), X)
row("torch.swapaxes", lambda x: torch.swapaxes(x, 0, 1), X)
row("torch.movedim", lambda x: torch.movedim(x, 0, -1), X)
row("Tensor.t", lambda x: x.t(), f("B", 6))
row("Tensor.T", lambda x: x.T, f("B", 6))
row("Tensor.mT", lambda x: x.mT, X)
row("torch.adjoint", lambda x: torch.adjoint(x), X)
row("Tensor.expand", lambda x: x.expand(-1, 4, 6), f("B", 1, 6))
row("Tensor.expand(sizes)", lambda x, y: x.expand(y.shape[0], y.shape[1], 6), f(6), f("B", "T"))
row("Tensor.expand_as", lambda x, y: x.expand_as(y), f("B", 1, 6), X)
row("torch.broadcast_to", lambda x, y: torch.broadcast_to(x, y.shape), f(6), X)
row("torch.broadcast_tensors", lambda x, y: torch.broadcast_tensors(x, y), f("B", 1, 6), f("T", 1))
row("Tensor.repeat", lambda x: x.repeat(1, 2, 3), X)
row("Tensor.repeat(new)", lambda x: x.repeat(x.shape[0], 1, 1, 2), X)
row("torch.tile", lambda x: torch.tile(x, (2, 1)), X)
row("torch.repeat_interleave", lambda x: torch.repeat_interleave(x, 3, dim=1), X)
row("Tensor.repeat_interleave", lambda x: x.repeat_interleave(2, -1), X)
row("torch.cat", lambda x, y: torch.cat([x, y, x], 1), X, f("B", 2, 6))
row("torch.concat", lambda x: torch.concat([x, x], -1), X)
row("torch.stack", lambda x: torch.stack([x, x * 2], 1), X)
row("torch.hstack", lambda x: torch.hstack([x, x]), X)
row("torch.vstack", lambda x: torch.vstack([x, x]), X)
row("torch.dstack", lambda x: torch.dstack([x, x]), X)
row("torch.column_stack", lambda x: torch.column_stack([x, x]), f("B", 3))
row("torch.split", lambda x: torch.split(x, 4, -1), X)
row("Tensor.split(sizes)", lambda x: x.split([1, 2, 3], dim=-1), X)
row("torch.chunk", lambda x: torch.chunk(x, 3, dim=2), X)
row("Tensor.chunk", lambda x: x.chunk(2, dim=-1), X)
row("torch.tensor_split", lambda x: torch.tensor_split(x, 4, -1), X)
row("torch.unbind", lambda x: torch.unbind(x, 2)[1:3], X)
row("Tensor.unbind", lambda x: x.unbind(-1)[0], X)
row("torch.narrow", lambda x: torch.narrow(x, 1, 1, 2), X)
row("Tensor.narrow", lambda x: x.narrow(1, 0, x.shape[1] - 1), X)
row("torch.select", lambda x: torch.select(x, 1, -1), X)
row("Tensor.select", lambda x: x.select(0, 1), X)
row("torch.flip", lambda x: torch.flip(x, [1, 2]), X)
row("Tensor.flip", lambda x: x.flip(0), X)
row("torch.fliplr", torch.fliplr, X)
row("torch.rot90", lambda x: torch.rot90(x, 1, [1, 2]), X)
row("torch.roll", lambda x: torch.roll(x, 2, 1), X)
row("torch.roll(dims)", lambda x: torch.roll(x, (1, -2), (0, 2)), X)
row("Tensor.unfold", lambda x: x.unfold(-1, 3, 2), f("B", 9))
row("torch.diagonal", lambda x: torch.diagonal(x, 0, 1, 2), f("B", 4, 4))
row("torch.diag", lambda x: torch.diag(x), f(5, 5))
row("torch.tril", lambda x: torch.tril(x), f("B", "T", "T"))
row("torch.triu", lambda x: torch.triu(x, 1), f("B", "T", "T"))
row("Tensor.tril", lambda x: x.tril(-1), f("T", "T"))
row("torch.meshgrid", lambda x, y: torch.meshgrid(x, y, indexing="ij"), f("B"), f("T"))
row("Tensor.size", lambda x: x * x.size(1), X)
row("Tensor.shape", lambda x: x / x.shape[0], X)
row("Tensor.numel", lambda x: x * x.numel(), f("B", "T"))
row("Tensor.dim", lambda x: x * x.dim(), X)
row("torch.atleast_3d", torch.atleast_3d, f("B", "T"))
row("torch.view_as_real", lambda x: x.unflatten(-1, (3, 2)), X)

# slices and indexing
row("Tensor.__getitem__(slice)", lambda x: x[:, 1:-1], X)
row("Tensor.__getitem__(step)", lambda x: x[:, ::2, 1::3], X)
row("Tensor.__getitem__(negative)", lambda x: x[:, -3:, -1], X)
row("Tensor.__getitem__(ellipsis)", lambda x: x[..., :-2], X)
row("Tensor.__getitem__(none)", lambda x: x[:, None, :, None, 0], X)
row("Tensor.__getitem__(int)", lambda x: x[0], X)
row("Tensor.__getitem__(size)", lambda x, y: x[:, : y.shape[1]], f("B", 40, 3), f("B", "T"))
row("Tensor.__getitem__(half)", lambda x: x[:, x.shape[1] // 2 :], X)
row("Tensor.__getitem__(tensor)", lambda x, i: x[i], X, ints(0, 2, 5))
row("Tensor.__getitem__(tensors)", lambda x, i, j: x[i, j], X, ints(0, 2, "B", 1), ints(0, 3, 4))
row("Tensor.__getitem__(mixed)", lambda x, i: x[:, i, 2], X, ints(-2, 3, 4))
row("Tensor.__getitem__(apart)", lambda x, i, j: x[i, :, j], X, ints(0, 2, 4), ints(0, 6, 4))
row("Tensor.__getitem__(list)", lambda x: x[:, :, [0, 3, 5]], X)
row("Tensor.__getitem__(arange)", lambda x, i: x[torch.arange(x.shape[0]), i], f("B", 6), ints(0, 6, "B"))


def _setitem(x):
    y = x.clone()
    y[:, 1:3] = 0.0
    y[..., -1] = y[..., 0] * 2
    return y


def _setitem_tensor(x, v):
    y = torch.zeros_like(x)
    y[:, 0] = v
    return y


def _setitem_mask(x, m):
    y = x.clone()
    y[m] = 5.0
    return y


def _setitem_index(x, i):
    y = x * 1.0
    y[:, i] = -1.0
    return y


def _view_write(x):
    y = x + 0.0
    v = y[:, 1]
    v.mul_(3)
    w = y.view(-1)
    w[0] = 7.0
    return y, v, w


row("Tensor.__setitem__", _setitem, X)
row("Tensor.__setitem__(tensor)", _setitem_tensor, X, f("B", 6))
row("Tensor.__setitem__(mask)", _setitem_mask, X, bools("B", "T", 6))
row("Tensor.__setitem__(index)", _setitem_index, X, ints(0, 3, 2))
row("Tensor.mul_(view)", _view_write, X)
row("torch.gather", lambda x, i: torch.gather(x, 2, i), X, ints(0, 6, "B", "T", 3))
row("Tensor.gather", lambda x, i: x.gather(-1, i), f("B", 6), ints(0, 6, "B", 2))
row("torch.take_along_dim", lambda x, i: torch.take_along_dim(x, i, -1), f("B", 6), ints(0, 6, "B", 2))
row("torch.take", lambda x, i: torch.take(x, i), f("B", 6), ints(0, 9, 4))
row("torch.index_select", lambda x, i: torch.index_select(x, 1, i), X, ints(0, 3, 4))
row("Tensor.index_select", lambda x, i: x.index_select(-1, i), X, ints(0, 6, 2))
row("torch.scatter", lambda x, i, s: torch.scatter(x, -1, i, s), f("B", 6), ints(2, 3, "B", 1), f("B", 1))
row("Tensor.scatter", lambda x, i: x.scatter(-1, i, 2.0), f("B", 6), ints(2, 5, "B", 2))
row("Tensor.scatter_", lambda x, i: (x * 1).scatter_(1, i, 1.0), f("B", 6), ints(2, 5, "B", 2))
row("torch.scatter_add", lambda x, i, s: torch.scatter_add(x, -1, i, s), f("B", 6), ints(0, 6, "B", 4), f("B", 4))
row("torch.index_add", lambda x, i, s: torch.index_add(x, 1, i, s), f("B", 6, 2), ints(0, 6, 4), f("B", 4, 2))
row("Tensor.index_put", lambda x, i: x.index_put((i,), torch.tensor(3.0)), X, ints(0, 1, 1))
row("Tensor.index_fill", lambda x, i: x.index_fill(1, i, 2.0), X, ints(0, 3, 2))
row("torch.select_scatter", lambda x, s: torch.select_scatter(x, s, 1, 0), X, f("B", 6))
row("torch.slice_scatter", lambda x, s: torch.slice_scatter(x, s, 1, 0, 2), X, f("B", 2, 6))
row("F.one_hot", lambda i: F.one_hot(i, 5), ints(0, 5, "B", "T"))
row("F.embedding", lambda i, w: F.embedding(i, w), ints(0, 9, "B", "T"), f(9, 4))

# reductions
for name in "sum mean amax amin prod logsumexp std var".split():
    row(f"torch.{name}", lambda x, n=name: getattr(torch, n)(x, dim=-1), X)
    row(f"Tensor.{name}", lambda x, n=name: getattr(x, n)(dim=1, keepdim=True), X)
row("torch.sum(all)", lambda x: torch.sum(x), X)
row("torch.sum(int)", lambda x: x.sum(1), ints(0, 9, "B", 6))
row("torch.sum(bool)", lambda x: x.sum(-1), bools("B", 6))
row("torch.sum(dims)", lambda x: x.sum((0, 2)), X)
row("torch.mean(all)", lambda x: x.mean(), X)
row("torch.mean(dims)", lambda x: x.mean((-2, -1), keepdim=True), X)
row("torch.max", torch.max, X)
row("torch.min", torch.min, X)
row("torch.max(dim)", lambda x: torch.max(x, -1), X)
row("torch.min(dim)", lambda x: torch.min(x, 1, keepdim=True), X)
row("torch.max(other)", lambda x, y: torch.max(x, y), X, f(6))
row("torch.argmax", lambda x: torch.argmax(x, -1), X)
row("Tensor.argmax", lambda x: x.argmax(1, keepdim=True), X)
row("torch.argmin", lambda x: torch.argmin(x, -1), X)
row("torch.argmax(all)", lambda x: torch.argmax(x), X)
row("torch.aminmax", lambda x: torch.aminmax(x, dim=-1), X)
row("torch.any", lambda x: torch.any(x, -1), bools("B", 3))
row("torch.all", lambda x: torch.all(x, -1), bools("B", 3))
row("Tensor.any", lambda x: x.any(), bools("B", 3))
row("torch.var(correction)", lambda x: torch.var(x, (1, 2), correction=0), X)
row("torch.var_mean", lambda x: torch.var_mean(x, -1), X)
row("torch.std_mean", lambda x: torch.std_mean(x, -1, keepdim=True), X)
row("torch.norm", lambda x: torch.norm(x, dim=-1), X)
row("Tensor.norm", lambda x: x.norm(p=1, dim=-1), X)
row("torch.linalg.norm", lambda x: torch.linalg.norm(x, dim=-1), X)
row("torch.linalg.vector_norm", lambda x: torch.linalg.vector_norm(x, 3, -1), X)
row("torch.dist", lambda x, y: torch.dist(x, y), X, X)
row("torch.cumsum", lambda x: torch.cumsum(x, 1), X)
row("Tensor.cumsum", lambda x: x.cumsum(-1), ints(0, 5, "B", 7))
row("torch.logcumsumexp", lambda x: torch.log(torch.cumsum(torch.exp(x), 1)), X)
row("torch.topk", lambda x: torch.topk(x, 3), X)
row("Tensor.topk", lambda x: x.topk(2, dim=1, largest=False), X)
row("torch.sort", lambda x: torch.sort(x, -1), X)
row("torch.sort(descending)", lambda x: torch.sort(x, 1, descending=True), X)
row("torch.argsort", lambda x: torch.argsort(x, -1), X)
row("torch.kthvalue", lambda x: torch.kthvalue(x, 2, -1), X)
row("torch.median", lambda x: torch.median(x, -1), f("B", 7))
row("torch.count_nonzero", lambda x: torch.count_nonzero(x, -1), ints(0, 2, "B", 7))
row("torch.diff", lambda x: torch.diff(x, dim=1), X)
row("torch.cosine_similarity", lambda x, y: torch.cosine_similarity(x, y, -1), X, X)
row("torch.softmax", lambda x: torch.softmax(x, 1), X)
row("Tensor.softmax", lambda x: x.softmax(-1), X)
row("torch.log_softmax", lambda x: torch.log_softmax(x, -1), X)
row("Tensor.log_softmax", lambda x: x.log_softmax(1), X)

# products
row("torch.matmul", torch.matmul, X, f(6, 3))
row("torch.matmul(vector)", lambda x, v: x @ v, X, f(6))
row("Tensor.matmul", lambda x, y: x.matmul(y), f("B", 3, "T", 4), f("B", 3, 4, "T"))
row("Tensor.__matmul__", lambda x, y: x @ y.transpose(-1, -2), X, X)
row("torch.mm", torch.mm, f("B", 6), f(6, 3))
row("torch.bmm", torch.bmm, f("B", "T", 6), f("B", 6, 3))
row("Tensor.bmm", lambda x, y: x.bmm(y), f("B", 3, 6), f("B", 6, "T"))
row("torch.mv", torch.mv, f("B", 6), f(6))
row("torch.dot", torch.dot, f(6), f(6))
row("torch.inner", torch.inner, f("B", 6), f(3, 6))
row("torch.outer", torch.outer, f("B"), f("T"))
row("torch.addmm", lambda b, x, y: torch.addmm(b, x, y, beta=0.5, alpha=2), f(3), f("B", 6), f(6, 3))
row("torch.addmv", torch.addmv, f("B"), f("B", 6), f(6))
row("torch.baddbmm", torch.baddbmm, f("B", "T", 3), f("B", "T", 6), f("B", 6, 3))
row("torch.addbmm", torch.addbmm, f("T", 3), f("B", "T", 6), f("B", 6, 3))
row("torch.einsum(linear)", lambda x, w: torch.einsum("btd,de->bte", x, w), X, f(6, 3))
row("torch.einsum(attention)", lambda q, k: torch.einsum("bqhd,bkhd->bhqk", q, k), f("B", "T", 2, 3), f("B", 5, 2, 3))
row("torch.einsum(outer)", lambda x, y: torch.einsum("i,j->ij", x, y), f("B"), f("T"))
row("torch.einsum(trace)", lambda x, y: torch.einsum("bij,bij->b", x, y), X, X)
row("torch.tensordot", lambda x, y: torch.tensordot(x, y, dims=([2], [0])), X, f(6, 3))
row("torch.kron", lambda x, y: torch.kron(x, y), f("B", 2), f(3, 2))
row("torch.linalg.matmul", torch.linalg.matmul, X, f(6, 3))
row("torch.cdist", lambda x, y: torch.cdist(x, y), f("B", 3, 4), f("B", 5, 4))
row("F.linear", F.linear, X, f(3, 6), f(3))
row("F.bilinear", F.bilinear, f("B", 4), f("B", 3), f(5, 4, 3))

# tensors from sizes
row("torch.arange", lambda x: torch.arange(x.shape[1]) + 0 * x[0, :, 0], X)
row("torch.arange(step)", lambda x: torch.arange(1, x.shape[1] + 1, 2), X)
row("torch.arange(float)", lambda x: torch.arange(0, x.shape[1], dtype=torch.float32) * 0.5, X)
row("torch.arange(down)", lambda x: torch.arange(x.shape[1] - 1, -1, -1), X)
row("torch.linspace", lambda x: torch.linspace(0, 1, 5) + x, f("B", 5))
row("torch.zeros", lambda x: torch.zeros(x.shape[0], x.shape[1], 3), X)
row("torch.ones", lambda x: torch.ones(x.shape[:2]), X)
row("torch.full", lambda x: torch.full((x.shape[0], 2), 3.5), X)
row("torch.zeros_like", torch.zeros_like, X)
row("torch.ones_like", lambda x: torch.ones_like(x, dtype=torch.int64), X)
row("torch.full_like", lambda x: torch.full_like(x, 2.5), X)
row("Tensor.new_zeros", lambda x: x.new_zeros(x.shape[0], 2), X)
row("Tensor.new_ones", lambda x: x.new_ones((3, x.shape[1])), X)
row("Tensor.new_full", lambda x: x.new_full((x.shape[0],), 7.0), X)
row("Tensor.new_tensor", lambda x: x + x.new_tensor([1.0, 2, 3, 4, 5, 6]), X)
row("torch.tensor", lambda x: x + torch.tensor([1.0, 2, 3, 4, 5, 6]), X)
row("torch.eye", lambda x: torch.eye(x.shape[1]), X)
row("torch.mask", lambda n, x: torch.arange(x.shape[1])[None, :] < n[:, None], ints(1, 5, "B"), X)

# torch.nn.functional
for name in """relu relu6 elu selu celu gelu silu mish hardswish hardsigmoid hardtanh leaky_relu softsign softplus
    logsigmoid tanhshrink softshrink hardshrink sigmoid tanh""".split():
    row(f"F.{name}", getattr(F, name), X)
row("F.gelu(tanh)", lambda x: F.gelu(x, approximate="tanh"), X)
row("F.elu(alpha)", lambda x: F.elu(x, 0.5), X)
row("F.celu(alpha)", lambda x: F.celu(x, 0.7), X)
row("F.glu", F.glu, X)
row("F.glu(dim)", lambda x: F.glu(x, 1), f("B", 4, "T"))
row("F.threshold", lambda x: F.threshold(x, 0.1, -2.0), X)
row("F.rrelu", F.rrelu, X)
row("F.prelu", F.prelu, f("B", 6, "T"), f(6))
row("F.softmax", lambda x: F.softmax(x, -1), X)
row("F.log_softmax", lambda x: F.log_softmax(x, -1), X)
row("F.softmin", lambda x: F.softmin(x, -1), X)
row("F.normalize", lambda x: F.normalize(x, dim=-1), X)
row("F.dropout", lambda x: F.dropout(x, 0.5, training=False), X)
row("F.layer_norm", lambda x, w, b: F.layer_norm(x, (6,), w, b, 1e-3), X, f(6), f(6))
row("F.layer_norm(plain)", lambda x: F.layer_norm(x, (6,)), X)
row("F.rms_norm", lambda x, w: F.rms_norm(x, (6,), w, 1e-6), X, f(6))
row("F.group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), f("B", 4, "T"), f(4), f(4))
row("F.instance_norm", lambda x: F.instance_norm(x), f("B", 4, "T"))
row("F.batch_norm", lambda x, m, v: F.batch_norm(x, m, v.abs() + 1), f("B", 4, "T"), f(4), f(4))
row("F.local_response_norm", lambda x: F.local_response_norm(x, 3), IMAGE)
row("F.pad", lambda x: F.pad(x, (1, 2)), X)
row("F.pad(value)", lambda x: F.pad(x, (0, 0, 2, -1), value=3.0), X)
row("F.pad(int)", lambda x: F.pad(x, (1, 1), value=4), ints(0, 9, "B", 6))
row("F.pad(bool)", lambda x: F.pad(x, (0, 2), value=True), bools("B", 6))
row("F.pad(reflect)", lambda x: F.pad(x, (2, 1), mode="reflect"), f("B", 3, "T"))
row("F.pad(replicate)", lambda x: F.pad(x, (2, 1), mode="replicate"), f("B", 3, "T"))
row("F.pad(circular)", lambda x: F.pad(x, (2, 1), mode="circular"), f("B", 3, "T"))
row("F.conv1d", lambda x, w: F.conv1d(x, w, padding=1), f("B", 4, "T"), f(5, 4, 3))
row("F.conv1d(same)", lambda x, w: F.conv1d(x, w, padding="same", dilation=2), f("B", 4, "T"), f(5, 4, 3))
row("F.conv2d", lambda x, w, b: F.conv2d(x, w, b, stride=(1, 2)), IMAGE, f(5, 4, 3, 3), f(5))
row("F.conv2d(groups)", lambda x, w: F.conv2d(x, w, groups=2, padding=(1, 0)), IMAGE, f(6, 2, 3, 3))
row("F.conv3d", lambda x, w: F.conv3d(x, w), f("B", 2, "T", 5, 4), f(3, 2, 2, 3, 2))
row("F.conv_transpose1d", lambda x, w: F.conv_transpose1d(x, w, stride=2), f("B", 4, "T"), f(4, 5, 3))
row(
    "F.conv_transpose2d",
    lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1),
    IMAGE,
    f(4, 5, 3, 3),
)
row("F.conv_transpose3d", lambda x, w: F.conv_transpose3d(x, w), f("B", 2, "T", 3, 4), f(2, 3, 2, 2, 2))
row("F.max_pool1d", lambda x: F.max_pool1d(x, 2), f("B", 4, "T"))
row("F.max_pool2d", lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE)
row("F.max_pool2d(dilation)", lambda x: F.max_pool2d(x, 2, 1, 1, dilation=2), IMAGE)
row("F.max_pool2d(ceil)", lambda x: F.max_pool2d(x, 2, ceil_mode=True), IMAGE)
row("F.max_pool3d", lambda x: F.max_pool3d(x, 2), f("B", 2, "T", 5, 4))
row("F.avg_pool1d", lambda x: F.avg_pool1d(x, 3, 1, 1), f("B", 4, "T"))
row("F.avg_pool2d", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), IMAGE)
row("F.avg_pool3d", lambda x: F.avg_pool3d(x, 2), f("B", 2, "T", 5, 4))
row("F.adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 3), f("B", 4, "T"))
row("F.adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (1, 4)), IMAGE)
row("F.adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, (1, 2, 2)), f("B", 2, "T", 5, 4))
row("F.adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 1), f("B", 4, "T"))
row("F.adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, (1, 4)), IMAGE)
row("F.lp_pool1d", lambda x: F.lp_pool1d(x, 2, 3), pos("B", 4, "T"))
row("F.interpolate", lambda x: F.interpolate(x, scale_factor=2), IMAGE)
row("F.interpolate(size)", lambda x: F.interpolate(x, size=7), f("B", 4, "T"))
row("F.interpolate(exact)", lambda x: F.interpolate(x, size=(7, 5), mode="nearest-exact"), IMAGE)
row("F.interpolate(linear)", lambda x: F.interpolate(x, scale_factor=1.5, mode="linear"), f("B", 4, "T"))
row("F.interpolate(bilinear)", lambda x: F.interpolate(x, size=(11, 6), mode="bilinear", align_corners=True), IMAGE)
row("F.interpolate(bicubic)", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), IMAGE)
row("F.pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), IMAGE)
row("F.pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 3), f("B", 2, 6, 9))
row("F.channel_shuffle", lambda x: F.channel_shuffle(x, 2), IMAGE)
row("F.unfold", lambda x: F.unfold(x, (2, 3)), f("B", 2, 5, 6))
row("F.cosine_similarity", lambda x, y: F.cosine_similarity(x, y, -1), X, X)
row("F.pairwise_distance", F.pairwise_distance, f("B", 6), f("B", 6))
row(
    "F.scaled_dot_product_attention",
    F.scaled_dot_product_attention,
    f("B", 2, "T", 4),
    f("B", 2, "T", 4),
    f("B", 2, "T", 4),
)
row(
    "F.scaled_dot_product_attention(mask)",
    lambda q, m: F.scaled_dot_product_attention(q, q, q, m),
    f("B", 2, "T", 4),
    f("T", "T"),
)
row(
    "F.scaled_dot_product_attention(causal)",
    lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    f("B", 2, "T", 4),
)
row("F.mse_loss", lambda x, y: F.mse_loss(x, y, reduction="none"), X, X)


# torch.nn modules


def module(name, make, *inputs):
    torch.manual_seed(7)
    built = make().eval()
    with torch.no_grad():
        for n, p in [*built.named_parameters(), *built.named_buffers()]:
            if p.dtype.is_floating_point:  # running statistics and affine weights other than 0 and 1
                p.copy_(torch.rand_like(p) * 0.8 + 0.3 if "var" in n else torch.randn_like(p) * 0.3)
    row(name, built, *inputs)


SEQUENCE = f("B", 4, "T")
module("nn.Linear", lambda: nn.Linear(6, 5), X)
module("nn.Bilinear", lambda: nn.Bilinear(4, 3, 5), f("B", 4), f("B", 3))
module("nn.Conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), SEQUENCE)
module("nn.Conv1d(reflect)", lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), SEQUENCE)
module("nn.Conv1d(depthwise)", lambda: nn.Conv1d(4, 4, 5, padding=2, groups=4), SEQUENCE)
module("nn.Conv2d", lambda: nn.Conv2d(4, 6, 3, 2), IMAGE)
module("nn.Conv3d", lambda: nn.Conv3d(2, 3, 2), f("B", 2, "T", 5, 4))
module("nn.ConvTranspose1d", lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), SEQUENCE)
module("nn.ConvTranspose2d", lambda: nn.ConvTranspose2d(4, 6, 3, 2, dilation=2), IMAGE)
module("nn.ConvTranspose3d", lambda: nn.ConvTranspose3d(2, 3, 2), f("B", 2, "T", 3, 4))
module("nn.BatchNorm1d", lambda: nn.BatchNorm1d(4), SEQUENCE)
module("nn.BatchNorm1d(2d)", lambda: nn.BatchNorm1d(6), f("B", 6))
module("nn.BatchNorm2d", lambda: nn.BatchNorm2d(4), IMAGE)
module("nn.BatchNorm3d", lambda: nn.BatchNorm3d(2), f("B", 2, "T", 3, 4))
module("nn.LayerNorm", lambda: nn.LayerNorm(6), X)
module("nn.LayerNorm(2d)", lambda: nn.LayerNorm((3, 6)), f("B", 3, 6))
module("nn.RMSNorm", lambda: nn.RMSNorm(6), X)
module("nn.GroupNorm", lambda: nn.GroupNorm(2, 4), IMAGE)
module("nn.InstanceNorm1d", lambda: nn.InstanceNorm1d(4, affine=True), SEQUENCE)
module("nn.InstanceNorm2d", lambda: nn.InstanceNorm2d(4), IMAGE)
module("nn.LocalResponseNorm", lambda: nn.LocalResponseNorm(2), IMAGE)
module("nn.Embedding", lambda: nn.Embedding(9, 4, padding_idx=0), ints(0, 9, "B", "T"))
module("nn.Embedding(int32)", lambda: nn.Embedding(9, 4), ints(0, 9, "B", "T", dtype="int32"))
NAMES = """ReLU ReLU6 ELU SELU CELU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh LeakyReLU Softsign Softplus LogSigmoid
    Tanhshrink Softshrink Hardshrink Sigmoid Tanh GLU PReLU RReLU Identity Flatten Dropout AlphaDropout"""
for name in NAMES.split():
    module(f"nn.{name}", getattr(nn, name), X)
module("nn.PReLU(channels)", lambda: nn.PReLU(4), IMAGE)
module("nn.Threshold", lambda: nn.Threshold(0.1, 5.0), X)
module("nn.Softmax", lambda: nn.Softmax(-1), X)
module("nn.LogSoftmax", lambda: nn.LogSoftmax(-1), X)
module("nn.Softmin", lambda: nn.Softmin(-1), X)
module("nn.Softmax2d", nn.Softmax2d, IMAGE)
module("nn.MaxPool1d", lambda: nn.MaxPool1d(3, 2), SEQUENCE)
module("nn.MaxPool2d", lambda: nn.MaxPool2d(3, 2, 1), IMAGE)
module("nn.AvgPool1d", lambda: nn.AvgPool1d(2), SEQUENCE)
module("nn.AvgPool2d", lambda: nn.AvgPool2d(2, padding=1), IMAGE)
module("nn.AdaptiveAvgPool1d", lambda: nn.AdaptiveAvgPool1d(4), SEQUENCE)
module("nn.AdaptiveAvgPool2d", lambda: nn.AdaptiveAvgPool2d(1), IMAGE)
module("nn.AdaptiveMaxPool2d", lambda: nn.AdaptiveMaxPool2d(1), IMAGE)
module("nn.ZeroPad2d", lambda: nn.ZeroPad2d((1, 2, 0, 1)), IMAGE)
module("nn.ConstantPad1d", lambda: nn.ConstantPad1d(2, 1.5), SEQUENCE)
module("nn.ReflectionPad1d", lambda: nn.ReflectionPad1d(2), SEQUENCE)
module("nn.ReflectionPad2d", lambda: nn.ReflectionPad2d((1, 2, 1, 0)), IMAGE)
module("nn.ReplicationPad2d", lambda: nn.ReplicationPad2d(2), IMAGE)
module("nn.CircularPad1d", lambda: nn.CircularPad1d(2), SEQUENCE)
module("nn.PixelShuffle", lambda: nn.PixelShuffle(2), IMAGE)
module("nn.PixelUnshuffle", lambda: nn.PixelUnshuffle(3), f("B", 2, 6, 9))
module("nn.ChannelShuffle", lambda: nn.ChannelShuffle(2), IMAGE)
module("nn.Upsample", lambda: nn.Upsample(scale_factor=2), IMAGE)
module("nn.Upsample(bilinear)", lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE)
module("nn.UpsamplingNearest2d", lambda: nn.UpsamplingNearest2d(scale_factor=3), IMAGE)
module("nn.Unflatten", lambda: nn.Unflatten(2, (2, 3)), X)
module("nn.Unfold", lambda: nn.Unfold(2), f("B", 2, 5, 6))
module("nn.CosineSimilarity", lambda: nn.CosineSimilarity(-1), X, X)


class SelfAttention(nn.Module):
    def __init__(self, batch_first=True, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first, **options)

    def forward(self, x, mask=None):
        return self.attention(x, x, x, key_padding_mask=mask)


module("nn.MultiheadAttention", SelfAttention, X)
module("nn.MultiheadAttention(mask)", SelfAttention, X, Make("B", "T", dtype="bool"))
module("nn.MultiheadAttention(bias_kv)", lambda: SelfAttention(add_bias_kv=True), X)
module("nn.MultiheadAttention(time first)", lambda: SelfAttention(False), f("T", "B", 6))
module("nn.TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), X)
module(
    "nn.TransformerEncoderLayer(pre)",
    lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, norm_first=True),
    X,
)
module(
    "nn.TransformerEncoder",
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), 2),
    X,
)
module("nn.TransformerDecoderLayer", lambda: nn.TransformerDecoderLayer(6, 2, 12, batch_first=True), X, f("B", 5, 6))
module("nn.LSTM", lambda: nn.LSTM(6, 4, 2, batch_first=True), X)
module("nn.LSTM(bidirectional)", lambda: nn.LSTM(6, 4, bidirectional=True), X)
module("nn.GRU", lambda: nn.GRU(6, 4, 2, batch_first=True, bidirectional=True), X)
module("nn.RNN", lambda: nn.RNN(6, 4, batch_first=True), X)
module("nn.RNN(relu)", lambda: nn.RNN(6, 4, nonlinearity="relu", bias=False), X)
module("nn.LSTMCell", lambda: nn.LSTMCell(6, 4), f("B", 6))
module("nn.GRUCell", lambda: nn.GRUCell(6, 4), f("B", 6))
module("nn.Sequential", lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.LayerNorm(5)), X)

# seldom used
row("torch.cumprod", lambda x: torch.cumprod(x, 1), X)
row("torch.cummax", lambda x: torch.cummax(x, 1), X)
row("torch.cummin", lambda x: torch.cummin(x, -1), X)
row("torch.logcumsumexp", lambda x: torch.logcumsumexp(x, 1), X)
row("torch.scatter_reduce", lambda x, i: x.scatter_reduce(1, i, x * 2, "amax"), f("B", 6), ints(0, 6, "B", 6))
row("torch.scatter_reduce(mean)", lambda x, i: x.scatter_reduce(1, i, x * 2, "mean"), f("B", 6), ints(0, 6, "B", 6))
row("Tensor.index_put(accumulate)", lambda x, i: x.index_put((i,), x[:2] * 1, True), f(4, 5), ints(0, 4, 2))
row("F.embedding_bag", lambda i, w: F.embedding_bag(i, w, mode="sum"), ints(0, 9, "B", 5), f(9, 4))
row("F.max_pool2d(indices)", lambda x: F.max_pool2d(x, 2, 1, 1, return_indices=True), IMAGE)
row("F.avg_pool2d(divisor)", lambda x: F.avg_pool2d(x, 3, 2, divisor_override=5), IMAGE)
row("F.avg_pool2d(ceil)", lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), f("B", 2, 11, 12))
row("F.interpolate(area)", lambda x: F.interpolate(x, size=(3, 5), mode="area"), f("B", 2, 7, 9))
row("F.fold", lambda x: F.fold(x, (4, 4), (2, 2)), f("B", 8, 9))
row("torch.searchsorted", lambda x: torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), x), X)
row("torch.bucketize", lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])), X)
row("torch.quantile", lambda x: torch.quantile(x, 0.3, dim=-1), f("B", 7))
row("torch.bitwise_and(int)", lambda a, b: a & b, ints(-99, 99, "B", 6), ints(-99, 99, 6))
row("torch.bitwise_xor(int)", lambda a, b: a ^ b, ints(-99, 99, "B", 6, dtype="int32"), ints(-99, 99, 6, dtype="int32"))
row("torch.bitwise_left_shift", lambda a: a << 3, ints(-99, 99, "B", 6))
row("torch.bitwise_right_shift", lambda a: a >> 2, ints(-99, 99, "B", 6))
row("torch.as_strided", lambda x: torch.as_strided(x, (2, 3), (2, 1), 1), f("B", 9))
row("Tensor.__getitem__(constant mask)", lambda x: x[:, :, torch.tensor([1, 0, 1, 1, 0, 0]) > 0], X)
row("Tensor.item", lambda x: x * x.sum().item(), X)
row("torch.cov", torch.cov, f(4, 7))
row("torch.cross", lambda x, y: torch.cross(x, y, dim=-1), f("B", 3), f("B", 3))
row("F.cross_entropy", lambda x, i: F.cross_entropy(x, i), f("B", 5), ints(0, 5, "B"))
module("nn.LSTM(projection)", lambda: nn.LSTM(6, 5, proj_size=3), X)
module("nn.Transformer", lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), f("B", "T", 8), f("B", 5, 8))
module("nn.EmbeddingBag", lambda: nn.EmbeddingBag(9, 4), ints(0, 9, "B", 5))
