"""Views, slices, joins, repetition, indexing by position, and tensors made from sizes."""

import torch

from . import layers as L
from .errors import UncoveredOperation
from .sizes import is_fixed, same
from .table import converter

aten = torch.ops.aten


def sized(net, *args, **kwargs):
    """The sizes torch gives the running call."""
    _, function, call_args, call_kwargs, _ = net.calls[-1]
    return net.fake_call(function, call_args, call_kwargs).shape


@converter(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.unsqueeze, aten.squeeze, aten.flatten)
def view(net, x, *args, **kwargs):
    return L.reshape(net.node(x), sized(net))


@converter(torch.ops.prims.squeeze)
def prims_squeeze(net, x, dims):
    return L.reshape(net.node(x), sized(net))


@converter(aten.view.dtype)
def view_dtype(net, x, dtype):
    raise UncoveredOperation(f"{net.where()}reading bits as another dtype (view({dtype})) has no TensorRT layer")


@converter(aten.permute)
def permute(net, x, dims):
    return L.transpose(net.node(x), dims)


@converter(aten.transpose)
def transpose(net, x, a, b):
    order = list(range(x.dim()))
    if order:
        order[a], order[b] = order[b], order[a]
    return L.transpose(net.node(x), order)


@converter(aten.t)
def t(net, x):
    return L.transpose(net.node(x), [1, 0] if x.dim() == 2 else list(range(x.dim())))


@converter(aten.expand, aten.broadcast_to)
def expand(net, x, size, implicit=False):
    return L.expand(net.node(x), sized(net))


@converter(torch.ops.prims.broadcast_in_dim)
def broadcast_in_dim(net, x, shape, dims):
    placed = [1] * len(shape)
    for own, dim in enumerate(dims):
        placed[dim] = x.shape[own]
    return L.expand(L.reshape(net.node(x), placed), shape)


@converter(aten.slice)
def slice(net, x, dim=0, start=None, end=None, step=1):
    dim %= x.dim()
    shape = sized(net)
    size = x.shape[dim]
    start = 0 if start is None else start
    if isinstance(start, int) and start < 0:
        start = size + start
        start = 0 if is_fixed(start) and start < 0 else start
    elif not isinstance(start, int) and not is_fixed(start) and bool(start < 0):
        start = size + start
    if is_fixed(size) and is_fixed(start):
        start = min(int(start), int(size))
    starts = [0] * x.dim()
    starts[dim] = start
    steps = [1] * x.dim()
    steps[dim] = step
    if step == 1 and same(shape[dim], size):
        return net.node(x)
    return L.slice_(net.node(x), starts, shape, steps)


@converter(aten.select)
def select(net, x, dim, index):
    dim %= x.dim()
    size = x.shape[dim]
    index = index + size if (index < 0 if isinstance(index, int) else bool(index < 0)) else index
    starts = [0] * x.dim()
    starts[dim] = index
    window = list(x.shape)
    window[dim] = 1
    piece = L.slice_(net.node(x), starts, window, [1] * x.dim())
    return L.reshape(piece, [s for i, s in enumerate(x.shape) if i != dim])


@converter(aten.narrow)
def narrow(net, x, dim, start, length):
    return aten.slice.Tensor(x, dim, start, start + length)


def _pieces(net, x, sizes, dim):
    dim %= x.dim()
    node, at, result = net.node(x), 0, []
    for size in sizes:
        starts, window = [0] * x.dim(), list(x.shape)
        starts[dim], window[dim] = at, size
        result.append(L.slice_(node, starts, window, [1] * x.dim()))
        at = at + size
    return result


@converter(aten.split, aten.chunk, aten.tensor_split)
def split(net, x, sections, dim=0):
    _, function, args, kwargs, _ = net.calls[-1]
    shapes = [piece.shape for piece in net.fake_call(function, args, kwargs)]
    return _pieces(net, x, [s[dim % x.dim()] for s in shapes], dim)


@converter(aten.split_with_sizes)
def split_with_sizes(net, x, sizes, dim=0):
    return _pieces(net, x, sizes, dim)


@converter(aten.unbind)
def unbind(net, x, dim=0):
    if not is_fixed(x.shape[dim]):
        raise UncoveredOperation(
            f"{net.where()}unbind (or a Python loop) over a size that varies: {net.sizes.text(x.shape[dim])}"
        )
    dim %= x.dim()
    rest = [s for i, s in enumerate(x.shape) if i != dim]
    return [L.reshape(p, rest) for p in _pieces(net, x, [1] * int(x.shape[dim]), dim)]


@converter(aten.cat)
def cat(net, tensors, dim=0):
    tensors = [t for t in tensors if not (t.dim() == 1 and is_fixed(t.shape[0]) and int(t.shape[0]) == 0)]
    dtype = net.result_type(*tensors)
    nodes = net.operands(*tensors, dtype=dtype)
    if dtype == torch.bool:
        return L.cast(L.concat([L.cast(n, torch.int32) for n in nodes], dim), torch.bool)
    return L.concat(nodes, dim)


@converter(aten.stack)
def stack(net, tensors, dim=0):
    return torch.cat([t.unsqueeze(dim) for t in tensors], dim)


@converter(aten.repeat)
def repeat(net, x, repeats):
    node = L.lift(net.node(x), len(repeats))
    for axis, times in enumerate(repeats):
        if is_fixed(times) and int(times) == 1:
            continue
        if is_fixed(node.shape[axis]) and int(node.shape[axis]) == 1:
            wide = list(node.shape)
            wide[axis] = times
            node = L.expand(node, wide)
            continue
        before, after = node.shape[:axis], node.shape[axis + 1 :]
        size = node.shape[axis]
        node = L.expand(L.reshape(node, [*before, 1, size, *after]), [*before, times, size, *after])
        node = L.reshape(node, [*before, times * size, *after])
    return node


@converter(aten.repeat_interleave.self_int)
def repeat_interleave(net, x, repeats, dim=None, *, output_size=None):
    if dim is None:
        x, dim = x.reshape(-1), 0
    dim %= x.dim()
    spread = x.unsqueeze(dim + 1).expand(*x.shape[: dim + 1], repeats, *x.shape[dim + 1 :])
    return spread.reshape(*x.shape[:dim], x.shape[dim] * repeats, *x.shape[dim + 1 :])


@converter(aten.flip)
def flip(net, x, dims):
    node = net.node(x)
    starts, steps = [0] * x.dim(), [1] * x.dim()
    for d in dims:
        starts[d], steps[d] = x.shape[d] - 1, -1
    return (
        L.slice_(node, starts, x.shape, steps)
        if x.dtype != torch.bool
        else L.cast(L.slice_(L.cast(node, torch.int32), starts, x.shape, steps), torch.bool)
    )


@converter(aten.roll)
def roll(net, x, shifts, dims=()):
    if not dims:
        return torch.roll(x.reshape(-1), shifts, 0).view(x.shape)
    for shift, dim in zip(
        [shifts] if isinstance(shifts, int) else shifts, [dims] if isinstance(dims, int) else dims, strict=True
    ):
        size = x.shape[dim]
        at = (size - shift) % size
        x = torch.cat([x.narrow(dim, at, size - at), x.narrow(dim, 0, at)], dim)
    return x


@converter(aten.unfold)
def unfold(net, x, dimension, size, step):
    if x.dim() == 0:
        return x.expand(size)
    dimension %= x.dim()
    count = sized(net)[dimension]
    at = torch.arange(count).unsqueeze(1) * step + torch.arange(size)  # (windows, size)
    windows = x.index_select(dimension, at.reshape(-1))
    windows = windows.reshape(*x.shape[:dimension], count, size, *x.shape[dimension + 1 :])
    return windows.movedim(dimension + 1, -1)


# tensors made from sizes


@converter(aten.arange)
def arange(net, *bounds, dtype=None, **_):
    start, end, step = (0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    size = sized(net)[0]
    whole = all(isinstance(v, (int, torch.SymInt)) for v in (start, end, step))
    wanted = dtype if dtype is not None else torch.int64 if whole else torch.float32
    counted = torch.int64 if whole else torch.float32
    return L.cast(L.iota(net, size, start, step, counted), net.package.dtype(wanted))


@converter(torch.ops.prims.iota)
def iota(net, length, *, start, step, dtype, device=None, requires_grad=False):
    return L.iota(net, length, start, step, dtype)


@converter(aten.linspace)
def linspace(net, start, end, steps, *, dtype=None, **_):
    if not is_fixed(steps):
        ramp = torch.arange(steps, dtype=torch.float32)
        return start + ramp * ((end - start) / (steps - 1))
    return net.constant(torch.linspace(start, end, int(steps), dtype=dtype))


def _filled(net, value, dtype):
    dtype = net.package.dtype(dtype)
    shape = sized(net)
    if isinstance(value, (torch.SymInt, torch.SymFloat)) and not is_fixed(value):
        return L.expand(net.scalar(value, dtype, len(shape)), shape)
    return L.fill(net, shape, value, dtype)


@converter(aten.zeros, aten.empty, aten.new_zeros, aten.new_empty, aten.zeros_like, aten.empty_like)
def zeros(net, *args, **kwargs):
    return _filled(net, 0, _dtype(net))


@converter(aten.empty_strided, aten.empty_permuted, aten.new_empty_strided)
def empty(net, *args, **kwargs):
    return _filled(net, 0, _dtype(net))


@converter(aten.ones, aten.new_ones, aten.ones_like)
def ones(net, *args, **kwargs):
    return _filled(net, 1, _dtype(net))


@converter(aten.full)
def full(net, size, value, **_):
    return _filled(net, value, _dtype(net))


@converter(aten.new_full, aten.full_like)
def full_like(net, x, *args, **_):
    value = args[-1]
    return _filled(net, value, _dtype(net))


@converter(aten.fill)
def fill(net, x, value):
    if isinstance(value, torch.Tensor):
        return L.expand(net.node(value, net.package.dtype(x.dtype)), x.shape)
    return _filled(net, value, x.dtype)


@converter(aten.scalar_tensor)
def scalar_tensor(net, value, *, dtype=None, **_):
    return net.scalar(value, net.package.dtype(_dtype(net)))


def _dtype(net):
    _, function, args, kwargs, _ = net.calls[-1]
    return net.fake_call(function, args, kwargs).dtype


def _triangle(net, x, diagonal, lower):
    rows = torch.arange(x.shape[-2]).unsqueeze(1)
    columns = torch.arange(x.shape[-1]).unsqueeze(0)
    keep = columns <= rows + diagonal if lower else columns >= rows + diagonal
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype))


@converter(aten.tril)
def tril(net, x, diagonal=0):
    return _triangle(net, x, diagonal, True)


@converter(aten.triu)
def triu(net, x, diagonal=0):
    return _triangle(net, x, diagonal, False)


@converter(aten.eye)
def eye(net, n, m=None, *, dtype=None, **_):
    rows, columns = torch.arange(n).unsqueeze(1), torch.arange(n if m is None else m).unsqueeze(0)
    return (rows == columns).to(torch.float32 if dtype is None else dtype)


@converter(aten.diagonal)
def diagonal(net, x, offset=0, dim1=0, dim2=1):
    size = sized(net)[-1]
    steps = torch.arange(size)
    order = [d for d in range(x.dim()) if d not in (dim1 % x.dim(), dim2 % x.dim())]
    x = x.permute(*order, dim1, dim2)
    rows, columns = (steps, steps + offset) if offset >= 0 else (steps - offset, steps)
    flat = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    return flat.index_select(-1, rows * x.shape[-1] + columns)


@converter(aten.constant_pad_nd)
def constant_pad_nd(net, x, pad, value=0.0):
    starts = [0] * x.dim()
    for i in range(len(pad) // 2):
        starts[x.dim() - 1 - i] = -pad[2 * i]
    value = value if x.dtype.is_floating_point else int(value)
    return L.slice_(net.node(x), starts, sized(net), [1] * x.dim(), fill=value)


@converter(
    aten.reflection_pad1d,
    aten.reflection_pad2d,
    aten.reflection_pad3d,
    aten.replication_pad1d,
    aten.replication_pad2d,
    aten.replication_pad3d,
)
def border_pad(net, x, pad):
    starts = [0] * x.dim()
    for i in range(len(pad) // 2):
        starts[x.dim() - 1 - i] = -pad[2 * i]
    mode = "REFLECT" if "reflection" in str(net.calls[-1][1]) else "CLAMP"
    return L.slice_(net.node(x), starts, sized(net), [1] * x.dim(), mode=mode)


@converter(aten._pad_circular)
def pad_circular(net, x, pad):
    starts = [0] * x.dim()
    for i in range(len(pad) // 2):
        starts[x.dim() - 1 - i] = -pad[2 * i]
    return L.slice_(net.node(x), starts, sized(net), [1] * x.dim(), mode="WRAP")
