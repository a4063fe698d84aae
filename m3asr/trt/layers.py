"""TensorRT layers as functions of nodes; each returns a node with its symbolic sizes. No torch functions here."""

import torch

from .errors import TraceError
from .sizes import is_fixed, same

INT_TYPES = ("INT32", "INT64")


def cast(x, dtype):
    dtype = x.graph.type(dtype)
    if x.dtype == dtype:
        return x
    return x.graph.output(x.graph.layer("cast", x.tensor, dtype), x.shape)


def unary(operation, x):
    return x.graph.output(x.graph.layer("unary", x.tensor, getattr(x.graph.trt.UnaryOperation, operation)), x.shape)


def activation(kind, x, alpha=None, beta=None):
    layer = x.graph.layer("activation", x.tensor, getattr(x.graph.trt.ActivationType, kind))
    if alpha is not None:
        layer.alpha = alpha
    if beta is not None:
        layer.beta = beta
    return x.graph.output(layer, x.shape)


def broadcast_shape(*shapes):
    rank = max(map(len, shapes))
    result = []
    for i in range(rank):
        dims = [s[i - rank + len(s)] for s in shapes if i - rank + len(s) >= 0]
        wide = [d for d in dims if not (isinstance(d, int) and d == 1)]
        result.append(next((d for d in wide if isinstance(d, int)), wide[0]) if wide else 1)
    return tuple(result)


def lift(x, rank):
    """Leading ones up to `rank`, as broadcasting in TensorRT needs equal ranks."""
    if x.rank < rank and x.source is not None:
        return x.graph.constant(x.source.reshape((1,) * (rank - x.rank) + tuple(x.shape)), x.dtype)
    return x if x.rank == rank else reshape(x, (1,) * (rank - x.rank) + x.shape)


def binary(operation, a, b):
    graph = a.graph
    rank = max(a.rank, b.rank)
    a, b = lift(a, rank), lift(b, rank)
    layer = graph.layer("elementwise", a.tensor, b.tensor, getattr(graph.trt.ElementWiseOperation, operation))
    return graph.output(layer, broadcast_shape(a.shape, b.shape))


def select(condition, a, b):
    graph = a.graph
    rank = max(condition.rank, a.rank, b.rank)
    condition, a, b = (lift(t, rank) for t in (condition, a, b))
    layer = graph.layer("select", condition.tensor, a.tensor, b.tensor)
    return graph.output(layer, broadcast_shape(condition.shape, a.shape, b.shape))


def _static_reshape(old, new):
    """Reshape dims with 0 (copy) and one -1, or None when only a shape tensor can say it."""
    dims, free = [], 0
    for i, n in enumerate(new):
        if is_fixed(n) and int(n) != 0:
            dims.append(int(n))
        elif i < len(old) and same(n, old[i]):
            dims.append(0)
        else:
            dims.append(-1)
            free += 1
    return dims if free <= 1 and not any(is_fixed(n) and int(n) == 0 for n in new) else None


def reshape(x, shape):
    shape = tuple(shape)
    if x.source is not None and all(map(is_fixed, shape)):
        return x.graph.constant(x.source.reshape([int(s) for s in shape]), x.dtype)
    if len(shape) == x.rank and all(same(a, b) for a, b in zip(shape, x.shape, strict=True)):
        return x
    layer = x.graph.layer("shuffle", x.tensor)
    dims = _static_reshape(x.shape, shape)
    if dims is not None:
        layer.reshape_dims = x.graph.trt.Dims(dims)
    else:
        layer.zero_is_placeholder = False
        layer.set_input(1, x.graph.size_tensor(shape).tensor)
    return x.graph.output(layer, shape)


def transpose(x, order):
    order = [int(d) % x.rank for d in order]
    if order == list(range(x.rank)):
        return x
    layer = x.graph.layer("shuffle", x.tensor)
    layer.first_transpose = x.graph.trt.Permutation(order)
    return x.graph.output(layer, [x.shape[d] for d in order])


def slice_(x, start, size, stride, fill=None, mode=None):
    """start, size: ints or SymInts; stride: ints. `fill`: a number, puts SampleMode.FILL around the tensor."""
    graph = x.graph
    if x.dtype.name == "BOOL" and fill is not None:
        return cast(slice_(cast(x, torch.int32), start, size, stride, int(fill), mode), torch.bool)
    start, size, stride = list(start), list(size), [int(s) for s in stride]
    dynamic = not all(map(is_fixed, [*start, *size]))
    ones = [1] * len(start)
    dims = [
        graph.trt.Dims(d)
        for d in ((ones, ones, stride) if dynamic else ([*map(int, start)], [*map(int, size)], stride))
    ]
    layer = graph.layer("slice", x.tensor, *dims)
    if dynamic:
        layer.set_input(1, graph.size_tensor(start).tensor)
        layer.set_input(2, graph.size_tensor(size).tensor)
    if fill is not None:
        layer.mode = graph.trt.SampleMode.FILL
        layer.set_input(4, graph.scalar(fill, x.dtype).tensor)
    elif mode is not None:
        layer.mode = getattr(graph.trt.SampleMode, mode)
    return graph.output(layer, size)


def expand(x, shape):
    """Broadcast to `shape` (a stride of 0 repeats a dimension of size 1)."""
    shape = tuple(shape)
    x = lift(x, len(shape))
    if all(same(a, b) for a, b in zip(x.shape, shape, strict=True)):
        return x
    stride = [
        0 if is_fixed(old) and int(old) == 1 and not same(old, new) else 1
        for old, new in zip(x.shape, shape, strict=True)
    ]
    if x.dtype.name == "BOOL":
        return cast(slice_(cast(x, torch.int32), [0] * len(shape), shape, stride), torch.bool)
    return slice_(x, [0] * len(shape), shape, stride)


def concat(nodes, axis):
    nodes = list(nodes)
    if len(nodes) == 1:
        return nodes[0]
    graph, axis = nodes[0].graph, axis % nodes[0].rank
    layer = graph.layer("concatenation", [n.tensor for n in nodes])
    layer.axis = axis
    shape = list(nodes[0].shape)
    shape[axis] = sum((n.shape[axis] for n in nodes[1:]), shape[axis])
    return graph.output(layer, shape)


def _bits(axes):
    return sum(1 << int(a) for a in axes)


def reduced(shape, axes, keep):
    return [1 if i in axes else s for i, s in enumerate(shape) if keep or i not in axes]


def reduce(operation, x, axes, keep=False):
    axes = sorted({int(a) % x.rank for a in axes}) if x.rank else []
    if not axes:
        return x
    layer = x.graph.layer("reduce", x.tensor, getattr(x.graph.trt.ReduceOperation, operation), _bits(axes), bool(keep))
    return x.graph.output(layer, reduced(x.shape, axes, keep))


def softmax(x, axis):
    layer = x.graph.layer("softmax", x.tensor)
    layer.axes = _bits([axis % x.rank])
    return x.graph.output(layer, x.shape)


def matmul(a, b, transpose_a=False, transpose_b=False):
    """Batched matrix product of equal ranks >= 2 with broadcasting over the leading dimensions."""
    graph = a.graph
    rank = max(a.rank, b.rank, 2)
    a, b = lift(a, rank), lift(b, rank)
    operation = graph.trt.MatrixOperation
    layer = graph.layer(
        "matrix_multiply",
        a.tensor,
        operation.TRANSPOSE if transpose_a else operation.NONE,
        b.tensor,
        operation.TRANSPOSE if transpose_b else operation.NONE,
    )
    shape = [
        *broadcast_shape(a.shape[:-2], b.shape[:-2]),
        a.shape[-1 if transpose_a else -2],
        b.shape[-2 if transpose_b else -1],
    ]
    return graph.output(layer, shape)


def _gather(x, index, mode, axis, shape):
    graph = x.graph
    if x.dtype.name == "BOOL":
        return cast(_gather(cast(x, torch.int32), index, mode, axis, shape), torch.bool)
    layer = graph.layer("gather_v2", x.tensor, index.tensor, getattr(graph.trt.GatherMode, mode))
    if mode != "ND":
        layer.axis = axis % x.rank
    return graph.output(layer, shape)


def gather(x, index, axis):
    """Whole slices along `axis`: shape x[:axis] + index + x[axis+1:]."""
    axis %= x.rank
    return _gather(x, index, "DEFAULT", axis, [*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def gather_elements(x, index, axis):
    return _gather(x, index, "ELEMENT", axis, index.shape)


def scatter(x, index, update, axis=None):
    """Elements along `axis`, or with axis None slices addressed by index (..., k)."""
    graph = x.graph
    if x.dtype.name == "BOOL":
        return cast(scatter(cast(x, torch.int32), index, cast(update, torch.int32), axis), torch.bool)
    mode = graph.trt.ScatterMode.ND if axis is None else graph.trt.ScatterMode.ELEMENT
    layer = graph.layer("scatter", x.tensor, index.tensor, update.tensor, mode)
    if axis is not None:
        layer.axis = axis % x.rank
    return graph.output(layer, x.shape)


def topk(x, k, axis, largest=True):
    """-> values, indices (int32). TensorRT allows k up to 3840."""
    graph, axis = x.graph, axis % x.rank
    if is_fixed(k) and int(k) > 3840:
        raise TraceError(f"{graph.where()}{graph.operation}: TensorRT's top-k allows k up to 3840, found {k}")
    operation = graph.trt.TopKOperation.MAX if largest else graph.trt.TopKOperation.MIN
    layer = graph.layer("topk", x.tensor, operation, int(k) if is_fixed(k) else 1, _bits([axis]))
    if not is_fixed(k):
        layer.set_input(1, reshape(cast(graph.size(k), torch.int32), ()).tensor)
    shape = [*x.shape[:axis], k, *x.shape[axis + 1 :]]
    return graph.output(layer, shape, 0), graph.output(layer, shape, 1)


def fill(graph, shape, value, dtype):
    """A tensor of one value; the sizes may be symbolic."""
    dtype = graph.type(dtype)
    if all(map(is_fixed, shape)):
        return graph.constant(torch.full([int(s) for s in shape], value, dtype=graph.package.torch_dtype(dtype)))
    return expand(graph.scalar(value, dtype, len(shape)), shape)


def iota(graph, size, start=0, step=1, dtype=torch.int64):
    """start, start + step, ... with `size` entries; start and step are numbers, the size may be symbolic."""
    dtype = graph.type(dtype)
    if is_fixed(size) and is_fixed(start) and is_fixed(step):
        values = torch.arange(int(size)).to(
            torch.float64 if isinstance(start, float) or isinstance(step, float) else torch.int64
        )
        return graph.constant(values * step + start, dtype)
    counted = dtype if dtype.name in (*INT_TYPES, "FLOAT") else graph.trt.float32
    layer = graph.layer("fill", graph.trt.Dims([1]), graph.trt.FillOperation.LINSPACE, counted)
    layer.set_input(0, graph.size_tensor([size]).tensor)
    layer.set_input(1, graph.scalar(start, counted).tensor)
    layer.set_input(2, graph.scalar(step, counted, 1).tensor)
    return cast(graph.output(layer, [size]), dtype)


def cumulative_sum(x, axis):
    graph, axis = x.graph, axis % x.rank
    index = graph.constant(torch.tensor(axis, dtype=torch.int32))
    layer = graph.layer("cumulative", x.tensor, index.tensor, graph.trt.CumulativeOperation.SUM, False, False)
    return graph.output(layer, x.shape)
