"""Indexing with tensors: gather, scatter, embedding, advanced indexing, sorting and selection."""

import torch

from . import layers as L
from .errors import UncoveredOperation
from .sizes import is_fixed
from .table import converter

aten = torch.ops.aten


def _wrapped(index, size):
    """Negative positions count from the end."""
    if not isinstance(index, torch.Tensor):
        return index
    return torch.where(index < 0, index + size, index)


@converter(aten.index_select)
def index_select(net, x, dim, index):
    if x.dim() == 0:
        return x
    node, index_node = net.node(x), net.node(index)
    return L.gather(node, index_node if index.dim() == 1 else L.reshape(index_node, (1,)), dim)


@converter(aten.embedding, kind="matmul")
def embedding(net, weight, index, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    return L.gather(net.operand(weight), net.node(index), 0)


@converter(aten.gather)
def gather(net, x, dim, index, sparse_grad=False):
    if x.dim() == 0:
        return x.reshape(1).gather(0, index.reshape(-1)).reshape(index.shape)
    dim %= x.dim()
    if any(
        not is_fixed(a) or not is_fixed(b) or int(a) != int(b)
        for i, (a, b) in enumerate(zip(x.shape, index.shape, strict=True))
        if i != dim
    ):
        starts, window = [0] * x.dim(), list(index.shape)
        window[dim] = x.shape[dim]
        node = L.slice_(net.node(x), starts, window, [1] * x.dim())
    else:
        node = net.node(x)
    return L.gather_elements(node, net.node(index), dim)


@converter(aten.scatter)
def scatter(net, x, dim, index, source, *, reduce=None):
    if reduce is not None:
        source = torch.full(index.shape, source, dtype=x.dtype) if not isinstance(source, torch.Tensor) else source
        return x.scatter_reduce(dim, index, source, {"add": "sum", "multiply": "prod"}[reduce])
    if not isinstance(source, torch.Tensor):
        source = torch.full(index.shape, source, dtype=x.dtype)
    x, source = net.operands(x, source, dtype=x.dtype)
    source = (
        L.slice_(source, [0] * source.rank, index.shape, [1] * source.rank)
        if tuple(source.shape) != tuple(index.shape)
        else source
    )
    return L.scatter(x, net.node(index), source, dim)


@converter(aten.scatter_add, aten.index_add, kind="float32")
def scatter_add(net, x, dim, index, source, *, alpha=1):
    """No atomic addition in TensorRT: a 0/1 matrix (target, source) times the source, for one index vector."""
    if index.dim() != 1:
        # Every vector along `dim` has its own index: one-hot (..., target, source) @ (..., source, 1)
        moved, at, values = (v.movedim(dim, -1) for v in (x, index, source))
        values = values[tuple(slice(0, s) for s in at.shape)]
        hot = (at.unsqueeze(-2) == torch.arange(moved.shape[-1]).unsqueeze(-1)).to(x.dtype)
        added = (hot * values.unsqueeze(-2)).sum(-1)
        if tuple(added.shape[:-1]) != tuple(moved.shape[:-1]):
            raise UncoveredOperation(f"{net.where()}scatter_add into a larger tensor in the other dimensions")
        return (moved + added).movedim(-1, dim)
    hot = (index.unsqueeze(0) == torch.arange(x.shape[dim]).unsqueeze(1)).to(x.dtype)  # (target, source)
    moved = source.movedim(dim, 0)
    added = torch.matmul(hot, moved.reshape(moved.shape[0], -1)).reshape(x.shape[dim], *moved.shape[1:])
    return x + alpha * added.movedim(0, dim)


def _without_masks(net, indices):
    """A mask known while tracing is the positions it holds; another has as many results as the data says."""
    plain = []
    for i in indices:
        if i is None or i.dtype not in (torch.bool, torch.uint8):
            plain.append(i)
            continue
        mask = getattr(i, "const", i)
        if mask is None:
            raise UncoveredOperation(
                f"{net.where()}x[mask] has as many results as the data says; use torch.where or masked_fill, whose "
                "sizes are known"
            )
        with net.plainly():
            plain.extend(mask.bool().nonzero(as_tuple=True))
    return plain


@converter(aten.index, aten._unsafe_index)
def index(net, x, indices):
    """Advanced indexing: the indexed dimensions broadcast together, by one flat gather."""
    indices = _without_masks(net, list(indices))
    indices += [None] * (x.dim() - len(indices))
    used = [d for d, i in enumerate(indices) if i is not None]
    shape = L.broadcast_shape(*(tuple(indices[d].shape) for d in used))
    adjacent = used == list(range(used[0], used[-1] + 1))
    rest = [d for d in range(x.dim()) if d not in used]
    moved = x.permute(*used, *rest)
    flat, at = 1, None
    for d in used:
        own = _wrapped(indices[d].to(torch.int64), x.shape[d])
        at = own if at is None else at * x.shape[d] + own
        flat = flat * x.shape[d]
    at = at.expand(shape)
    picked = moved.reshape(flat, *(x.shape[d] for d in rest)).index_select(0, at.reshape(-1))
    picked = picked.reshape(*shape, *(x.shape[d] for d in rest))
    if adjacent and used[0] > 0:
        n = len(shape)
        order = [*range(n, n + used[0]), *range(n), *range(n + used[0], n + len(rest))]
        picked = picked.permute(order)
    return picked


@converter(aten.index_put, aten._unsafe_index_put)
def index_put(net, x, indices, values, accumulate=False):
    indices = list(indices)
    if len(indices) == 1 and indices[0].dtype == torch.bool:
        mask = indices[0]
        if values.dim() == 0 or values.numel() == 1:
            mask = mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))
            return torch.where(mask, values.reshape(()).to(x.dtype), x)
        raise UncoveredOperation(f"{net.where()}x[mask] = tensor needs as many values as the data says")
    indices = _without_masks(net, indices)
    count = 1
    for s in x.shape:
        count = count * s
    positions = aten.index.Tensor(torch.arange(count).view(x.shape), indices)
    values = values.to(x.dtype).expand(positions.shape)
    flat = x.reshape(-1)
    if accumulate:
        return flat.index_add(0, positions.reshape(-1), values.reshape(-1)).view(x.shape)
    return flat.scatter(0, positions.reshape(-1), values.reshape(-1)).view(x.shape)


@converter(aten.slice_scatter)
def slice_scatter(net, x, source, dim=0, start=None, end=None, step=1):
    count = 1
    for s in x.shape:
        count = count * s
    positions = aten.slice.Tensor(torch.arange(count).view(x.shape), dim, start, end, step)
    return x.reshape(-1).scatter(0, positions.reshape(-1), source.reshape(-1)).view(x.shape)


@converter(aten.select_scatter)
def select_scatter(net, x, source, dim, index):
    count = 1
    for s in x.shape:
        count = count * s
    positions = aten.select.int(torch.arange(count).view(x.shape), dim, index)
    return x.reshape(-1).scatter(0, positions.reshape(-1), source.reshape(-1)).view(x.shape)


@converter(aten.masked_select, aten.nonzero)
def data_dependent(net, *args, **kwargs):
    raise UncoveredOperation(
        f"{net.where()}{net.operation} has as many results as the data says; the plan needs sizes that follow from the "
        "inputs' sizes. Use torch.where, masked_fill or a plugin"
    )


def _ordered(net, x, k, dim, largest):
    """topk with int64 indices; int64 values and bools travel as float or int32, which TensorRT can sort."""
    node = net.node(x)
    original = node.dtype
    if original.name in ("BOOL", "INT64"):
        node = L.cast(node, torch.int32)
    values, indices = _topk(net, node, k, dim, largest)
    return L.cast(values, original), L.cast(indices, torch.int64)


def _topk(net, node, k, dim, largest):
    if node.rank == 1:  # TensorRT's top-k wants two dimensions
        values, indices = L.topk(L.reshape(node, (1, node.shape[0])), k, 1, largest)
        return L.reshape(values, (k,)), L.reshape(indices, (k,))
    return L.topk(node, k, dim, largest)


@converter(aten.topk)
def topk(net, x, k, dim=-1, largest=True, sorted=True):
    return _ordered(net, x, k, dim, largest)


@converter(aten.sort)
def sort(net, x, dim=-1, descending=False, stable=None):
    return _ordered(net, x, x.shape[dim], dim, descending)


@converter(aten.sort.stable)
def sort_stable(net, x, *, stable=None, dim=-1, descending=False):
    return _ordered(net, x, x.shape[dim], dim, descending)


@converter(aten.argsort)
def argsort(net, x, dim=-1, descending=False):
    return _ordered(net, x, x.shape[dim], dim, descending)[1]


@converter(aten.argmax, aten.argmin)
def argmax(net, x, dim=None, keepdim=False):
    largest = "argmax" in str(net.calls[-1][1])
    if dim is None:
        node = L.reshape(net.node(x), (x.numel(),))
        found = _topk(net, node, 1, 0, largest)[1]
        return L.cast(L.reshape(found, [1] * x.dim() if keepdim else ()), torch.int64)
    _, indices = _ordered(net, x, 1, dim, largest)
    return indices if keepdim else L.reshape(indices, L.reduced(x.shape, [dim % x.dim()], False))


@converter(aten.max.dim, aten.min.dim)
def max_dim(net, x, dim, keepdim=False):
    values, indices = _ordered(net, x, 1, dim, "max" in str(net.calls[-1][1]))
    shape = L.reduced(x.shape, [dim % x.dim()], keepdim)
    return L.reshape(values, shape), L.reshape(indices, shape)


@converter(aten.kthvalue)
def kthvalue(net, x, k, dim=-1, keepdim=False):
    values, indices = torch.topk(x, k, dim, largest=False)
    at = (values.narrow(dim, k - 1, 1), indices.narrow(dim, k - 1, 1))
    return at if keepdim else tuple(v.squeeze(dim) for v in at)


@converter(aten.one_hot)
def one_hot(net, x, num_classes=-1):
    return _one_hot(net, x, num_classes)


@converter(torch.nn.functional.one_hot)
def _one_hot(net, x, num_classes=-1):
    if num_classes < 0:
        raise UncoveredOperation(f"{net.where()}one_hot without num_classes has as many columns as the data says")
    return (x.unsqueeze(-1) == torch.arange(num_classes)).to(torch.int64)


@converter(aten.diagonal_scatter)
def diagonal_scatter(net, x, source, offset=0, dim1=0, dim2=1):
    count = 1
    for s in x.shape:
        count = count * s
    positions = torch.arange(count).view(x.shape).diagonal(offset, dim1, dim2)
    return x.reshape(-1).scatter(0, positions.reshape(-1), source.reshape(-1)).view(x.shape)


@converter(aten.masked_scatter)
def masked_scatter(net, x, mask, source):
    """The n-th place that the mask allows takes the n-th value of the source."""
    x, mask = torch.broadcast_tensors(x, mask)
    at = torch.cumsum(mask.reshape(-1).to(torch.int64), 0) - 1
    taken = source.reshape(-1).index_select(0, at.clamp(0, source.numel() - 1))
    return torch.where(mask, taken.view(x.shape), x)
