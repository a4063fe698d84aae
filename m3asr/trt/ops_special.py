"""Pointwise functions that TensorRT has no layer for, written with other torch functions."""

import math

import torch
import torch.nn.functional as F

from .sizes import same
from .table import converter

aten = torch.ops.aten


@converter(aten.expm1, kind="float32")
def expm1(net, x):
    # tanh keeps the digits that exp(x) - 1 loses near 0: expm1(x) = tanh(x/2) (exp(x) + 1)
    return torch.where(x.abs() < 1.0, torch.tanh(x / 2) * (torch.exp(x) + 1), torch.exp(x) - 1)


@converter(aten.log1p, kind="float32")
def log1p(net, x):
    # log(1+x) * x / ((1+x) - 1) repairs the rounding of 1+x (Higham, Accuracy and Stability, 1.14.1)
    one = x + 1
    lost = one - 1
    return torch.where(lost == 0, x, torch.log(one) * x / torch.where(lost == 0, torch.ones_like(lost), lost))


@converter(aten.log2, kind="float32")
def log2(net, x):
    return torch.log(x) * (1 / math.log(2.0))


@converter(aten.log10, kind="float32")
def log10(net, x):
    return torch.log(x) * (1 / math.log(10.0))


@converter(aten.erfc, kind="float32")
def erfc(net, x):
    return 1 - torch.erf(x)


@converter(aten.atan2, kind="float32")
def atan2(net, y, x):
    y, x = torch.broadcast_tensors(y, x)
    safe = torch.where(x == 0, torch.ones_like(x), x)
    angle = torch.atan(y / safe)
    turned = torch.where(x < 0, angle + torch.where(y < 0, -math.pi, math.pi), angle)
    return torch.where(x == 0, torch.sign(y) * (math.pi / 2), turned)


@converter(aten.signbit)
def signbit(net, x):
    return (x < 0) | ((x == 0) & (1.0 / x < 0))  # -0 has its sign bit set, and 1 / -0 is -inf


@converter(aten.angle)
def angle(net, x):
    return torch.where(torch.isnan(x), x, torch.where(x < 0, math.pi, 0.0))


@converter(aten.fmax)
def fmax(net, a, b):
    return torch.where(torch.isnan(a), b, torch.where(torch.isnan(b), a, torch.maximum(a, b)))


@converter(aten.fmin)
def fmin(net, a, b):
    return torch.where(torch.isnan(a), b, torch.where(torch.isnan(b), a, torch.minimum(a, b)))


@converter(aten.hypot, kind="float32")
def hypot(net, a, b):
    return torch.sqrt(a * a + b * b)


@converter(aten.copysign)
def copysign(net, a, b):
    size = torch.abs(a)
    if not isinstance(b, torch.Tensor):
        return -size if math.copysign(1.0, b) < 0 else size
    return torch.where(torch.signbit(b), -size, size)


@converter(aten._cdist_forward, kind="float32")
def cdist(net, a, b, p=2.0, compute_mode=None):
    return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


@converter(F.pdist, aten._pdist_forward, kind="float32")
def pdist(net, x, p=2.0):
    first, second = torch.triu_indices(x.shape[0], x.shape[0], 1)
    return torch.linalg.vector_norm(x.index_select(0, first) - x.index_select(0, second), p, -1)


@converter(torch.equal)
def equal(net, a, b):
    """A tensor of no dimensions, as `.item()` gives: an `if` on it is a branch on values."""
    if len(a.shape) != len(b.shape) or not all(map(same, a.shape, b.shape)):
        return False
    return (a == b).all()


@converter(F.bilinear)
def bilinear(net, a, b, weight, bias=None):
    # y_o = a^T W_o b: (..., 1, I) @ (O, I, J) -> (..., O, 1, J), then a sum over J
    left = torch.matmul(a.unsqueeze(-2).unsqueeze(-2), weight).squeeze(-2)
    out = (left * b.unsqueeze(-2)).sum(-1)
    return out if bias is None else out + bias


@converter(torch.kron, torch.Tensor.kron)
def kron(net, a, b):
    rank = max(a.dim(), b.dim())
    a, b = (t.reshape(*[1] * (rank - t.dim()), *t.shape) for t in (a, b))
    wide_a = a.reshape(*(n for s in a.shape for n in (s, 1)))
    wide_b = b.reshape(*(n for s in b.shape for n in (1, s)))
    return (wide_a * wide_b).reshape(*(p * q for p, q in zip(a.shape, b.shape, strict=True)))


@converter(torch.take_along_dim, torch.Tensor.take_along_dim)
def take_along_dim(net, x, indices, dim=None):
    if dim is None:
        return x.reshape(-1).gather(0, indices.reshape(-1))
    dim %= x.dim()
    wide = [
        max(p, q) if isinstance(p, int) and isinstance(q, int) else p
        for p, q in zip(x.shape, indices.shape, strict=True)
    ]
    own, at = list(wide), list(wide)
    own[dim], at[dim] = x.shape[dim], indices.shape[dim]
    return x.expand(own).gather(dim, indices.expand(at))
