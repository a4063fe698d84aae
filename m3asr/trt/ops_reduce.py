"""Reductions, softmax, cumulative sums. Sums of low-precision tensors are formed in float32."""

import torch

from . import layers as L
from .errors import UncoveredOperation
from .table import converter

aten = torch.ops.aten


def axes_of(x, dim):
    if dim is None or (isinstance(dim, (list, tuple)) and not len(dim)):
        return list(range(x.dim()))
    return [d % max(x.dim(), 1) for d in ([dim] if isinstance(dim, int) else dim)]


def _reduced(operation):
    def convert(net, x, dim=None, keepdim=False, *, dtype=None):
        dtype = dtype or (x.dtype if x.dtype.is_floating_point else torch.int64)
        return L.reduce(operation, net.operand(x, dtype), axes_of(x, dim), keepdim)

    return convert


converter(aten.sum, kind="float32")(_reduced("SUM"))
converter(aten.prod, kind="float32")(_reduced("PROD"))


@converter(aten.mean, kind="float32")
def mean(net, x, dim=None, keepdim=False, *, dtype=None):
    return L.reduce("AVG", net.operand(x, dtype), axes_of(x, dim), keepdim)


@converter(aten.nansum, kind="float32")
def nansum(net, x, dim=None, keepdim=False, *, dtype=None):
    known = torch.where(torch.isnan(x), 0.0, x) if x.dtype.is_floating_point else x
    return torch.sum(known, [] if dim is None else dim, keepdim, dtype=dtype)


def _extreme(operation):
    def convert(net, x, dim=None, keepdim=False):
        node = net.operand(x)
        if x.dtype == torch.bool:
            return L.cast(L.reduce(operation, L.cast(node, torch.int32), axes_of(x, dim), keepdim), torch.bool)
        return L.reduce(operation, node, axes_of(x, dim), keepdim)

    return convert


converter(aten.amax, aten.max)(_extreme("MAX"))
converter(aten.amin, aten.min)(_extreme("MIN"))


@converter(aten.max.other, aten.min.other)
def max_other(net, a, b):
    return torch.maximum(a, b) if "max" in str(net.calls[-1][1]) else torch.minimum(a, b)


@converter(aten.any)
def any_(net, x, dim=None, keepdim=False):
    return _truth_over(net, x, dim, keepdim, "MAX")


@converter(aten.all)
def all_(net, x, dim=None, keepdim=False):
    return _truth_over(net, x, dim, keepdim, "MIN")


def _truth_over(net, x, dim, keepdim, operation):
    from .ops_elementwise import truth

    return L.cast(L.reduce(operation, L.cast(truth(net, x), torch.int32), axes_of(x, dim), keepdim), torch.bool)


def _variance(net, x, dim, correction, keepdim):
    axes = axes_of(x, dim)
    correction = 1 if correction is None else correction
    node = net.operand(x)
    mean = L.reduce("AVG", node, axes, True)
    centred = node - mean
    count = 1
    for a in axes:
        count = count * x.shape[a]
    total = L.reduce("SUM", centred * centred, axes, keepdim)
    # max(0, n - correction), as torch: one sample with correction 1 gives 0/0 = NaN
    return total / net.scalar(count - correction, node.dtype), mean if keepdim else L.reshape(
        mean, L.reduced(x.shape, axes, False)
    )


@converter(aten.var.correction, kind="float32")
def var(net, x, dim=None, *, correction=None, keepdim=False):
    return _variance(net, x, dim, correction, keepdim)[0]


@converter(aten.std.correction, kind="float32")
def std(net, x, dim=None, *, correction=None, keepdim=False):
    return L.unary("SQRT", _variance(net, x, dim, correction, keepdim)[0])


@converter(aten.var_mean.correction, kind="float32")
def var_mean(net, x, dim=None, *, correction=None, keepdim=False):
    return _variance(net, x, dim, correction, keepdim)


@converter(aten.std_mean.correction, kind="float32")
def std_mean(net, x, dim=None, *, correction=None, keepdim=False):
    variance, mean = _variance(net, x, dim, correction, keepdim)
    return L.unary("SQRT", variance), mean


@converter(aten.linalg_vector_norm, kind="float32")
def vector_norm(net, x, ord=2, dim=None, keepdim=False, *, dtype=None):
    node, axes = net.operand(x), axes_of(x, dim)
    if ord == float("inf"):
        return L.reduce("MAX", L.unary("ABS", node), axes, keepdim)
    if ord == float("-inf"):
        return L.reduce("MIN", L.unary("ABS", node), axes, keepdim)
    if ord == 0:
        return L.reduce("SUM", L.cast(L.unary("NOT", L.binary("EQUAL", node, node * 0)), torch.float32), axes, keepdim)
    if ord == 1:
        return L.reduce("SUM", L.unary("ABS", node), axes, keepdim)
    if ord == 2:
        return L.unary("SQRT", L.reduce("SUM", node * node, axes, keepdim))
    power = L.reduce("SUM", L.binary("POW", L.unary("ABS", node), net.scalar(float(ord), node.dtype)), axes, keepdim)
    return L.binary("POW", power, net.scalar(1.0 / ord, node.dtype))


def _as_float(net, x):
    return net.operand(x) if x.dtype.is_floating_point else net.operand(x, torch.float32)


@converter(aten.logsumexp, kind="float32")
def logsumexp(net, x, dim, keepdim=False):
    node, axes = _as_float(net, x), axes_of(x, dim)
    top = L.reduce("MAX", node, axes, True)
    total = L.unary("LOG", L.reduce("SUM", L.unary("EXP", node - top), axes, True)) + top
    return total if keepdim else L.reshape(total, L.reduced(x.shape, axes, False))


@converter(aten._softmax, aten._safe_softmax, aten.softmax, kind="float32")
def softmax(net, x, dim, *_, **__):
    node = _as_float(net, x)
    if x.dim() == 0:
        return node * 0 + 1
    if net.operation == "_safe_softmax":  # a row of -inf gives zeros, not NaN
        masked = L.binary("EQUAL", L.reduce("MAX", node, [dim], True), net.scalar(float("-inf"), node.dtype))
        soft = L.softmax(node, dim)
        return L.select(masked, net.scalar(0.0, node.dtype), soft)
    return L.softmax(node, dim)


@converter(aten._log_softmax, aten.log_softmax, kind="float32")
def log_softmax(net, x, dim, *_, **__):
    """x - max - log(sum(exp(x - max))): the logarithm of a softmax would lose the small probabilities."""
    node = _as_float(net, x)
    shifted = node - L.reduce("MAX", node, [dim], True)
    return shifted - L.unary("LOG", L.reduce("SUM", L.unary("EXP", shifted), [dim], True))


@converter(aten.cumsum, kind="float32")
def cumsum(net, x, dim, *, dtype=None):
    dtype = dtype or (x.dtype if x.dtype.is_floating_point else torch.int64)
    node = net.operand(x, dtype)
    if x.dim() == 0:
        return node
    if node.dtype.name == "INT64":
        return L.cast(L.cumulative_sum(L.cast(node, torch.int32), dim), torch.int64)
    return L.cumulative_sum(node, dim)


@converter(aten.nanmedian)
def nanmedian(net, x, dim=None, keepdim=False):
    if dim is None:
        return torch.nanmedian(x.reshape(-1), 0)[0]
    missing = torch.isnan(x)
    values, order = torch.sort(torch.where(missing, float("inf"), x), dim)
    at = torch.div((~missing).sum(dim, keepdim=True) - 1, 2, rounding_mode="floor")
    value, index = (torch.gather(t, dim, at.clamp_min(0)) for t in (values, order))
    value = torch.where(at < 0, float("nan"), value)
    return (value, index) if keepdim else (value.squeeze(dim), index.squeeze(dim))


@converter(aten.median)
def median(net, x, dim=None, keepdim=False):
    if dim is None:
        x, dim = x.reshape(-1), 0
        return torch.sort(x, 0)[0].select(0, (x.shape[0] - 1) // 2)
    return torch.kthvalue(x, (x.shape[dim] + 1) // 2, dim, keepdim)


@converter(aten.bincount, aten.unique_consecutive, aten._unique2)
def data_dependent(net, *args, **kwargs):
    raise UncoveredOperation(f"{net.where()}{net.operation} has as many results as the data says; no TensorRT layer")
