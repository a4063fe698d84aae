"""Pooling, resizing and pixel shuffling."""

import itertools
import math

import torch
import torch.nn.functional as F

from . import layers as L
from .errors import UncoveredOperation
from .ops_shape import sized
from .sizes import is_fixed
from .table import converter

aten = torch.ops.aten


def _pool(net, x, kind, kernel, stride, padding, ceil_mode, count_include_pad=True):
    shape = sized(net)
    shape = shape if not isinstance(shape, list) else shape[0]
    spatial = len(kernel)
    node = net.operand(x)
    batched = node.rank == spatial + 2
    node = node if batched else L.reshape(node, (1, *node.shape))
    out_shape = list(shape if batched else (1, *shape))
    if spatial == 1:
        node = L.reshape(node, (*node.shape, 1))
        kernel, stride, padding = [*kernel, 1], [*stride, 1], [*padding, 0]
        out_shape.append(1)
    dims = net.trt.Dims
    layer = net.layer("pooling_nd", node.tensor, getattr(net.trt.PoolingType, kind), dims([int(k) for k in kernel]))
    layer.stride_nd = dims([int(s) for s in stride])
    layer.padding_mode = net.trt.PaddingMode.EXPLICIT_ROUND_UP if ceil_mode else net.trt.PaddingMode.EXPLICIT_ROUND_DOWN
    layer.pre_padding = layer.post_padding = dims([int(p) for p in padding])
    if kind == "AVERAGE":
        layer.average_count_excludes_padding = not count_include_pad
    out = net.output(layer, out_shape)
    return L.reshape(out, shape)


def _tuple(value, n):
    value = [value] if isinstance(value, int) else list(value)
    return value * n if len(value) == 1 else value


def _spatial(net):
    name = getattr(net.calls[-1][1], "__name__", str(net.calls[-1][1]))
    return next(n for n in (1, 2, 3) if f"{n}d" in name)


def max_pool(net, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    n = _spatial(net)
    kernel = _tuple(kernel_size, n)
    stride = _tuple(stride, n) if stride not in (None, [], ()) else kernel
    padding, dilation = _tuple(padding, n), _tuple(dilation, n)
    if return_indices:
        return _max_with_indices(net, x, kernel, stride, padding, dilation)
    if n == 1:
        flat = F.max_pool2d(x.unsqueeze(-1), (*kernel, 1), (*stride, 1), (*padding, 0), (*dilation, 1), ceil_mode)
        return flat.squeeze(-1)
    if all(d == 1 for d in dilation) and not (ceil_mode and any(padding)):
        return _pool(net, x, "MAX", kernel, stride, padding, ceil_mode)
    return _max_over_shifts(net, x, kernel, stride, padding, dilation)


def _max_over_shifts(net, x, kernel, stride, padding, dilation):
    """Dilated windows: the maximum over one strided slice for each kernel position."""
    out_shape = list(sized(net))
    n = len(kernel)
    node, lead = net.operand(x), x.dim() - n
    best = None
    for offset in itertools.product(*map(range, kernel)):
        starts = [0] * lead + [o * d - p for o, d, p in zip(offset, dilation, padding, strict=True)]
        piece = L.slice_(node, starts, out_shape, [1] * lead + list(stride), fill=float("-inf"))
        best = piece if best is None else L.binary("MAX", best, piece)
    return best


def _max_with_indices(net, x, kernel, stride, padding, dilation):
    """Values, and where in the flattened image each came from."""
    values_shape = net.fake_call(*net.calls[-1][1:4])[0].shape
    lead = x.dim() - len(kernel)
    count = 1
    for s in x.shape[lead:]:
        count = count * s
    node = net.operand(x)
    positions = net.node(torch.arange(count).view(x.shape[lead:]).expand(x.shape))
    best = where = None
    for offset in itertools.product(*map(range, kernel)):
        starts = [0] * lead + [o * d - p for o, d, p in zip(offset, dilation, padding, strict=True)]
        steps = [1] * lead + list(stride)
        piece = L.slice_(node, starts, values_shape, steps, fill=float("-inf"))
        place = L.slice_(positions, starts, values_shape, steps, fill=0)
        if best is not None:
            better = L.binary("GREATER", piece, best)
            place, piece = L.select(better, place, where), L.select(better, piece, best)
        best, where = piece, place
    return best, where


for n in (1, 2, 3):
    converter(getattr(torch, f"max_pool{n}d"), getattr(aten, f"max_pool{n}d"))(max_pool)


@converter(F.max_pool1d, F.max_pool2d, F.max_pool3d)
def f_max_pool(net, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    return max_pool(net, x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@converter(aten.max_pool2d_with_indices, aten.max_pool3d_with_indices)
def max_pool_with_indices(net, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    n = _spatial(net)
    kernel = _tuple(kernel_size, n)
    stride = _tuple(stride, n) if stride not in (None, [], ()) else kernel
    return _max_with_indices(net, x, kernel, stride, _tuple(padding, n), _tuple(dilation, n))


@converter(F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices)
def f_max_pool_with_indices(
    net, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    n = _spatial(net)
    arguments = [_tuple(kernel_size, n), _tuple(stride or kernel_size, n), _tuple(padding, n), _tuple(dilation, n)]
    if n == 1:
        wide = [[a[0], b] for a, b in zip(arguments, (1, 1, 0, 1), strict=True)]
        return tuple(t.squeeze(-1) for t in aten.max_pool2d_with_indices(x.unsqueeze(-1), *wide, ceil_mode))
    return getattr(aten, f"max_pool{n}d_with_indices")(x, *arguments, ceil_mode)


@converter(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d)
def avg_pool(
    net, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    n = _spatial(net)
    kernel = _tuple(kernel_size, n)
    stride = _tuple(stride, n) if stride not in (None, [], ()) else kernel
    padding = _tuple(padding, n)
    if divisor_override:
        area = 1
        for k in kernel:
            area *= k
        wide = F.pad(x, [p for amount in reversed(padding) for p in (amount, amount)])
        shape = net.fake_call(*net.calls[-1][1:4]).shape
        extra = [e - w for e, w in zip(shape, _pooled(wide, kernel, stride), strict=True)]
        wide = F.pad(
            wide,
            [
                p
                for e, s in zip(reversed(extra), reversed([1] * (x.dim() - n) + stride), strict=True)
                for p in (0, e * s)
            ],
        )
        return getattr(F, f"avg_pool{n}d")(wide, kernel, stride) * (area / divisor_override)
    if ceil_mode and any(padding) and count_include_pad:
        # Padding counts, what ceil_mode reads beyond it does not: so the padding becomes part of the image.
        wide = F.pad(x, [p for amount in reversed(padding) for p in (amount, amount)])
        return getattr(F, f"avg_pool{n}d")(wide, kernel, stride, 0, True)
    return _pool(net, x, "AVERAGE", kernel, stride, padding, ceil_mode, count_include_pad)


def _pooled(x, kernel, stride):
    lead = x.dim() - len(kernel)
    return [*x.shape[:lead], *((s - k) // t + 1 for s, k, t in zip(x.shape[lead:], kernel, stride, strict=True))]


def _adaptive(net, x, output_size, n, average):
    """Windows of unequal size are one small averaging matrix (or maximum) for each spatial dimension."""
    output_size = _tuple(output_size, n)
    for i, wanted in enumerate(output_size):
        dim = x.dim() - n + i
        size = x.shape[dim]
        if wanted is None or (is_fixed(size) and int(size) == wanted):
            continue
        if wanted == 1:
            x = x.mean(dim, keepdim=True) if average else x.amax(dim, keepdim=True)
            continue
        if not is_fixed(size):
            if not average:
                raise UncoveredOperation(
                    f"{net.where()}adaptive max pooling to {wanted} of a size that varies: {net.sizes.text(size)}"
                )
            cell = torch.arange(wanted).unsqueeze(1)
            start, end = (cell * size) // wanted, ((cell + 1) * size + wanted - 1) // wanted
            at = torch.arange(size).unsqueeze(0)
            weight = ((at >= start) & (at < end)).to(x.dtype) / (end - start).to(x.dtype)
            x = torch.matmul(x.movedim(dim, -1), weight.transpose(0, 1)).movedim(-1, dim)
            continue
        bounds = [(j * size // wanted, -(-(j + 1) * size // wanted)) for j in range(wanted)]
        parts = [x.narrow(dim, a, b - a) for a, b in bounds]
        x = torch.cat([p.mean(dim, keepdim=True) if average else p.amax(dim, keepdim=True) for p in parts], dim)
    return x


@converter(
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
    aten._adaptive_avg_pool2d,
    aten._adaptive_avg_pool3d,
)
def adaptive_avg_pool(net, x, output_size):
    return _adaptive(net, x, output_size, _spatial(net), True)


@converter(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
def adaptive_max_pool(net, x, output_size, return_indices=False):
    if return_indices:
        return _adaptive_with_indices(net, x, output_size)
    return _adaptive(net, x, output_size, _spatial(net), False)


@converter(
    *(F.adaptive_max_pool1d_with_indices, F.adaptive_max_pool2d_with_indices, F.adaptive_max_pool3d_with_indices),
    *(aten.adaptive_max_pool1d, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d),
)
def adaptive_max_pool_with_indices(net, x, output_size, return_indices=True):
    return _adaptive_with_indices(net, x, output_size)


def _adaptive_with_indices(net, x, output_size):
    """Window by window: its largest value, and where that lies in the flattened image."""
    n = _spatial(net)
    sizes = list(x.shape[-n:])
    if not all(map(is_fixed, sizes)):
        raise UncoveredOperation(f"{net.where()}adaptive max pooling with indices of a size that varies")
    sizes = [int(s) for s in sizes]
    wanted = [s if w is None else w for w, s in zip(_tuple(output_size, n), sizes, strict=True)]
    positions = torch.arange(math.prod(sizes)).view(sizes)
    values, indices = [], []
    for cell in itertools.product(*map(range, wanted)):
        bounds = ((j * s // w, -(-(j + 1) * s // w)) for j, s, w in zip(cell, sizes, wanted, strict=True))
        window = tuple(slice(a, b) for a, b in bounds)
        value, at = x[(..., *window)].flatten(-n).max(-1)
        values.append(value)
        indices.append(positions[window].reshape(-1)[at])
    return tuple(torch.stack(t, -1).unflatten(-1, wanted) for t in (values, indices))


# resizing

RESIZE = {"nearest": "NEAREST", "linear": "LINEAR", "bilinear": "LINEAR", "trilinear": "LINEAR", "bicubic": "CUBIC"}


@converter(F.interpolate)
def interpolate(
    net,
    x,
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
):
    if mode == "area" and not antialias:
        shape = sized(net)
        return _adaptive(net, x, list(shape[2:]), x.dim() - 2, True)
    if mode not in (*RESIZE, "nearest-exact"):
        raise UncoveredOperation(f"{net.where()}interpolate with mode {mode!r}")
    spatial = x.dim() - 2
    shape = sized(net)
    if antialias:
        factors = [None] * 2 if scale_factor is None or recompute_scale_factor else _floats(scale_factor, 2)
        return _antialiased(net, x, shape[2:], factors, mode, align_corners)
    if mode in ("nearest", "nearest-exact"):
        return _nearest(net, x, shape, scale_factor, mode == "nearest-exact")
    scales = None if scale_factor is None or recompute_scale_factor else _floats(scale_factor, spatial)
    layer = net.layer("resize", net.operand(x).tensor)
    layer.resize_mode = getattr(net.trt.InterpolationMode, RESIZE[mode])
    transform = net.trt.ResizeCoordinateTransformation
    layer.coordinate_transformation = transform.ALIGN_CORNERS if align_corners else transform.HALF_PIXEL
    if mode == "bicubic":
        layer.cubic_coeff = -0.75
    if scales is not None and not align_corners:
        layer.scales = [1.0, 1.0, *scales]
    elif all(map(is_fixed, shape)):
        layer.shape = net.trt.Dims([int(s) for s in shape])
    else:
        layer.set_input(1, net.size_tensor(shape).tensor)
    return net.output(layer, shape)


def _antialiased(net, x, wanted, factors, mode, align_corners):
    """Each dimension of an image is resized by a matrix: what torch makes of the columns of a unit matrix."""
    for dim, size, factor in zip((2, 3), wanted, factors, strict=True):
        have = x.shape[dim]
        if not is_fixed(size) or not is_fixed(have):
            raise UncoveredOperation(f"{net.where()}interpolate with antialias of a size that varies")
        with net.plainly():
            target = {"size": (int(size), int(have))} if factor is None else {"scale_factor": (factor, 1.0)}
            unit = torch.eye(int(have))[None, None]
            matrix = F.interpolate(unit, **target, mode=mode, align_corners=align_corners, antialias=True)[0, 0]
        x = torch.matmul(x.movedim(dim, -1), matrix.transpose(0, 1)).movedim(-1, dim)  # matrix (size, have)
    return x


def _floats(value, n):
    return [float(value)] * n if isinstance(value, (int, float)) else [float(v) for v in value]


def _nearest(net, x, shape, scale_factor, exact):
    """Position i reads floor(i * scale) (floor((i + 1/2) * scale) when exact), as one gather for each dimension."""
    scales = None if scale_factor is None else _floats(scale_factor, x.dim() - 2)
    for i in range(x.dim() - 2):
        dim, wanted, have = 2 + i, shape[2 + i], x.shape[2 + i]
        at = torch.arange(wanted)
        if scales is not None and scales[i] == int(scales[i]):
            source = at // int(scales[i])
        elif scales is not None:
            source = torch.floor((at.to(torch.float32) + (0.5 if exact else 0.0)) * (1.0 / scales[i])).to(torch.int64)
        elif exact:
            source = ((2 * at + 1) * have) // (2 * wanted)
        else:
            source = (at * have) // wanted
        x = x.index_select(dim, torch.clamp(source, max=have - 1))
    return x


@converter(F.pixel_shuffle, aten.pixel_shuffle)
def pixel_shuffle(net, x, upscale_factor):
    r = upscale_factor
    *lead, c, h, w = x.shape
    node = L.reshape(net.node(x), (*lead, c // (r * r), r, r, h, w))
    n = len(lead)
    node = L.transpose(node, [*range(n), n, n + 3, n + 1, n + 4, n + 2])
    return L.reshape(node, (*lead, c // (r * r), h * r, w * r))


@converter(F.pixel_unshuffle, aten.pixel_unshuffle)
def pixel_unshuffle(net, x, downscale_factor):
    r = downscale_factor
    *lead, c, h, w = x.shape
    n = len(lead)
    node = L.reshape(net.node(x), (*lead, c, h // r, r, w // r, r))
    node = L.transpose(node, [*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return L.reshape(node, (*lead, c * r * r, h // r, w // r))
