"""Operations that TensorRT has no layer for and that are seldom large: triangles, one-hot products and bit arithmetic.

Each is exact, and costs the square of a dimension where its comment says so.
"""

import torch
import torch.nn.functional as F

from . import layers as L
from .errors import UncoveredOperation
from .sizes import same
from .table import converter

aten = torch.ops.aten


def _prefixes(x, dim, fill):
    """(..., T, T): row i holds x[..., :i+1] along `dim` and `fill` after it (costs T squared)."""
    moved = x.movedim(dim, -1)
    at = torch.arange(moved.shape[-1])
    return torch.where(at <= at.unsqueeze(-1), moved.unsqueeze(-2), fill)


@converter(aten.cumprod, kind="float32")
def cumprod(net, x, dim, *, dtype=None):
    dtype = dtype or (x.dtype if x.dtype.is_floating_point else torch.int64)
    return _prefixes(x.to(dtype), dim, 1).prod(-1).to(dtype).movedim(-1, dim)


@converter(aten.cummax, aten.cummin)
def cummax(net, x, dim):
    largest = "cummax" in str(net.calls[-1][1])
    if not x.dtype.is_floating_point:
        raise UncoveredOperation(f"{net.where()}{net.operation} of integers")
    rows = _prefixes(x, dim, float("-inf") if largest else float("inf"))
    values = rows.amax(-1) if largest else rows.amin(-1)
    # Of equal values torch keeps the last position.
    at = torch.arange(rows.shape[-1])
    index = torch.where((rows == values.unsqueeze(-1)) & (at <= at.unsqueeze(-1)), at, -1).amax(-1)
    return values.movedim(-1, dim), index.movedim(-1, dim)


@converter(aten.logcumsumexp, kind="float32")
def logcumsumexp(net, x, dim):
    return torch.logsumexp(_prefixes(x, dim, float("-inf")), -1).movedim(-1, dim)


# scatter with reduction, by comparison with every position of the target (costs target x source along `dim`)


def _meeting(x, dim, index, source, fill):
    moved, at, values = (v.movedim(dim, -1) for v in (x, index, source))
    values = values[tuple(slice(0, s) for s in at.shape)]
    if at.dim() != moved.dim() or not all(map(same, at.shape[:-1], moved.shape[:-1])):
        raise UncoveredOperation("scatter_reduce into a larger tensor in the other dimensions")
    hit = at.unsqueeze(-2) == torch.arange(moved.shape[-1]).unsqueeze(-1)  # (..., target, source)
    return torch.where(hit, values.unsqueeze(-2), fill), hit


@converter(aten.scatter_reduce, kind="float32")
def scatter_reduce(net, x, dim, index, source, reduce, *, include_self=True):
    neutral = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "amax": float("-inf"), "amin": float("inf")}[reduce]
    met, hit = _meeting(x, dim, index, source, neutral)
    count = hit.sum(-1)
    own = x.movedim(dim, -1)
    start = own if include_self else torch.where(count > 0, neutral, own)
    if reduce in ("sum", "mean"):
        out = start + met.sum(-1)
        if reduce == "mean":
            out = out / (count + (1 if include_self else 0)).clamp_min(1).to(out.dtype)
    elif reduce == "prod":
        out = start * met.prod(-1)
    else:
        out = torch.maximum(start, met.amax(-1)) if reduce == "amax" else torch.minimum(start, met.amin(-1))
    return out.movedim(-1, dim)


@converter(F.embedding_bag)
def embedding_bag(
    net,
    index,
    weight,
    offsets=None,
    max_norm=None,
    norm_type=2,
    scale_grad_by_freq=False,
    mode="mean",
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
):
    if max_norm is not None:
        raise UncoveredOperation(f"{net.where()}embedding_bag with max_norm")
    rows = F.embedding(index, weight)  # (B, N, D) or (N, D)
    if index.dim() == 2:
        member = torch.ones_like(index, dtype=torch.bool)  # (B, N)
    else:
        if include_last_offset:
            start, end = offsets[:-1], offsets[1:]
        else:
            start, end = offsets, torch.cat([offsets[1:], torch.full_like(offsets[:1], index.shape[0])])
        at = torch.arange(index.shape[0])
        member = (at >= start.unsqueeze(1)) & (at < end.unsqueeze(1))  # (B, N)
    if padding_idx is not None:
        member = member & (index != padding_idx % weight.shape[0])
    count = member.sum(1, keepdim=True)  # (B, 1)
    if mode == "max":
        rows = torch.where(member.unsqueeze(-1), rows, float("-inf"))
        return torch.where(count == 0, 0.0, rows.amax(1))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    total = torch.matmul(member.unsqueeze(-2).to(rows.dtype), rows).squeeze(-2)  # (B, D)
    return total / count.clamp_min(1).to(rows.dtype) if mode == "mean" else total


@converter(aten.embedding_bag, aten._embedding_bag, aten._embedding_bag_forward_only)
def aten_embedding_bag(
    net,
    weight,
    index,
    offsets,
    scale_grad_by_freq=False,
    mode=0,
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
):
    """The three other results are torch's notes for the gradient: empty here."""
    padding_idx = None if padding_idx == -1 and net.operation != "embedding_bag" else padding_idx
    out = F.embedding_bag(
        index,
        weight,
        offsets,
        mode=("sum", "mean", "max")[mode],
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )
    return out, *(torch.zeros(0, dtype=torch.int64) for _ in range(3))


@converter(aten.searchsorted)
def searchsorted(net, edges, x, *, out_int32=False, right=False, side=None, sorter=None):
    if sorter is not None or not isinstance(x, torch.Tensor):
        raise UncoveredOperation(f"{net.where()}searchsorted with a sorter or of a number")
    below = edges.unsqueeze(-2) if edges.dim() > 1 else edges
    right = right or side == "right"
    count = (below <= x.unsqueeze(-1) if right else below < x.unsqueeze(-1)).sum(-1)
    return count.to(torch.int32 if out_int32 else torch.int64)


@converter(aten.as_strided)
def as_strided(net, x, size, stride, storage_offset=None):
    if not x.fake.is_contiguous():
        raise UncoveredOperation(f"{net.where()}as_strided of a tensor that is itself a strided view")
    at = 0 if storage_offset is None else storage_offset
    for n, step in zip(size, stride, strict=True):
        at = (at.unsqueeze(-1) if isinstance(at, torch.Tensor) else at) + torch.arange(n) * step
    if not isinstance(at, torch.Tensor):
        return x.reshape(-1).narrow(0, at, 1).reshape(())
    return x.reshape(-1).index_select(0, at.reshape(-1)).view(tuple(size))


@converter(torch.quantile, torch.Tensor.quantile, kind="float32")
def quantile(net, x, q, dim=None, keepdim=False, *, interpolation="linear"):
    flat = x.reshape(-1) if dim is None else x
    dim_ = 0 if dim is None else dim
    size = flat.shape[dim_]
    if not isinstance(q, float) or interpolation != "linear" or not isinstance(size, int):
        raise UncoveredOperation(f"{net.where()}quantile of several q, of a size that varies, or not linear")
    at = q * (size - 1)
    ordered = torch.sort(flat, dim_)[0]
    low, high = (ordered.narrow(dim_, i, 1) for i in (int(at), min(int(at) + 1, size - 1)))
    out = low + (high - low) * (at - int(at))
    if dim is None:
        return out.reshape([1] * x.dim() if keepdim else ())
    return out if keepdim else out.squeeze(dim_)


# integers bit by bit


def _bits(x, width, signed):
    """The lowest first; the highest of a signed integer is its sign and stands for -2^(width-1)."""
    low = width - 1 if signed else width
    bits = [torch.remainder(torch.div(x, 2**i, rounding_mode="floor"), 2) for i in range(low)]
    return bits + [(x < 0).to(torch.int64)] if signed else bits


INTEGER_BITS = (
    *(aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.bitwise_and.Scalar_Tensor, aten.__and__),
    *(aten.bitwise_or.Tensor, aten.bitwise_or.Scalar, aten.bitwise_or.Scalar_Tensor, aten.__or__),
    *(aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar, aten.bitwise_xor.Scalar_Tensor, aten.__xor__),
)


@converter(*INTEGER_BITS)
def bitwise(net, a, b):
    name = str(net.calls[-1][1])
    kind = "and" if "and" in name else "xor" if "xor" in name else "or"
    dtype = net.result_type(a, b)
    if dtype == torch.bool:
        return L.binary(kind.upper(), *net.operands(a, b))
    if kind == "and" and isinstance(b, int) and b > 0 and b & (b + 1) == 0:
        return torch.remainder(a, b + 1).to(dtype)  # a mask of low bits
    width, signed = torch.iinfo(dtype).bits, dtype != torch.uint8
    a, b = (torch.as_tensor(v).to(torch.int64) for v in (a, b))
    total = None
    for i, (p, q) in enumerate(zip(_bits(a, width, signed), _bits(b, width, signed), strict=True)):
        bit = p * q if kind == "and" else p + q - p * q * (2 if kind == "xor" else 1)
        value = bit * (-(2**i) if signed and i == width - 1 else 2**i)
        total = value if total is None else total + value
    return total.to(dtype)


@converter(aten.bitwise_left_shift, aten.__lshift__)
def left_shift(net, a, b):
    return (a * (2**b if isinstance(b, int) else torch.pow(2, b))).to(a.dtype)


@converter(aten.bitwise_right_shift, aten.__rshift__)
def right_shift(net, a, b):
    return torch.div(a, 2**b if isinstance(b, int) else torch.pow(2, b).to(a.dtype), rounding_mode="floor")
