"""Matrix products and convolutions: what computes in the low precision, and what Q/DQ quantisation wraps."""

import torch
import torch.nn.functional as F

from . import layers as L
from .table import converter

aten = torch.ops.aten


@converter(F.linear, aten.linear, kind="matmul")
def linear(net, x, weight, bias=None):
    x_node = net.operand(x)
    if x.dim() == 1:
        x_node = L.reshape(x_node, (1, x.shape[0]))
    w_node = L.lift(net.operand(weight), x_node.rank)
    x_node, w_node = net.quantised(x_node, w_node, x_node.rank - 2)
    out = L.matmul(x_node, w_node, transpose_b=True)
    if bias is not None:
        out = out + net.operand(bias)
    return L.reshape(out, (weight.shape[0],)) if x.dim() == 1 else out


def _product(a, b):
    """Of nodes of any rank from 1 on."""
    vectors = a.rank == 1, b.rank == 1
    a = L.reshape(a, (1, *a.shape)) if vectors[0] else a
    b = L.reshape(b, (*b.shape, 1)) if vectors[1] else b
    out = L.matmul(a, b)
    out = L.reshape(out, [*out.shape[:-2], out.shape[-1]]) if vectors[0] else out
    return L.reshape(out, out.shape[:-1]) if vectors[1] else out


@converter(
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    aten.matmul,
    aten.mm,
    aten.bmm,
    aten.mv,
    aten.dot,
    kind="matmul",
)
def matmul(net, a, b):
    dtype = net.result_type(a, b)
    if not dtype.is_floating_point:  # TensorRT multiplies float matrices only; float32 is exact up to 2^24
        a_node, b_node = (L.cast(net.node(v), torch.float32) for v in (a, b))
        return L.cast(_product(a_node, b_node), net.package.dtype(dtype))
    return _product(*net.operands(a, b))


@converter(torch.Tensor.__rmatmul__)
def rmatmul(net, a, b):
    return torch.matmul(b, a)


def _scaled(value, factor):
    return value if factor == 1 else value * factor


@converter(aten.addmm, aten.addmv, aten.baddbmm, kind="matmul")
def addmm(net, bias, a, b, *, beta=1, alpha=1):
    product = _scaled(_product(*net.operands(a, b)), alpha)
    return product + _scaled(net.operand(bias), beta)


@converter(aten.addbmm, kind="matmul")
def addbmm(net, bias, a, b, *, beta=1, alpha=1):
    return torch.matmul(a, b).sum(0) * alpha + bias * beta


def _dims(net, values):
    return net.trt.Dims([int(v) for v in values])


@converter(aten.convolution, kind="matmul")
def convolution(net, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    spatial = weight.dim() - 2
    batched = x.dim() == weight.dim()
    stride, padding, dilation, output_padding = (
        [int(n) for n in v] * (spatial if len(v) == 1 else 1) for v in (stride, padding, dilation, output_padding)
    )
    shape = _convolved(
        x.shape if batched else (1, *x.shape), weight, stride, padding, dilation, transposed, output_padding, groups
    )
    if transposed and any(d > 1 for d in dilation):
        # TensorRT has no transposed convolution that is strided and dilated; zeros between the kernel's entries say it.
        weight, dilation = _spread(weight, dilation), [1] * spatial
    x_node, w_node = net.operand(x), net.operand(weight)
    if transposed and x_node.dtype.name == "BF16":  # TensorRT has no bfloat16 kernel for it
        x_node, w_node = L.cast(x_node, torch.float32), L.cast(w_node, torch.float32)
    if not batched:
        x_node = L.reshape(x_node, (1, *x_node.shape))
    if spatial == 1:  # TensorRT convolves in 2 or 3 dimensions
        x_node = L.reshape(x_node, (*x_node.shape, 1))
        w_node = L.reshape(w_node, (*w_node.shape, 1))
        shape = (*shape, 1)
        stride, padding, dilation, output_padding = (
            [*v, n] for v, n in ((stride, 1), (padding, 0), (dilation, 1), (output_padding, 0))
        )
    x_node, w_node = net.quantised(x_node, w_node, 1 if transposed else 0)
    kernel = [*weight.shape[2:], *([1] if spatial == 1 else [])]
    maps = int(weight.shape[1] * groups if transposed else weight.shape[0])
    kind = "deconvolution_nd" if transposed else "convolution_nd"
    layer = net.layer(kind, x_node.tensor, maps, _dims(net, kernel), net.trt.Weights())
    layer.set_input(1, w_node.tensor)
    layer.stride_nd, layer.dilation_nd = _dims(net, stride), _dims(net, dilation)
    layer.num_groups = int(groups)
    layer.pre_padding = _dims(net, padding)
    if transposed:  # less padding after the image is what torch calls output padding
        layer.post_padding = _dims(net, [max(p - o, 0) for p, o in zip(padding, output_padding, strict=True)])
    else:
        layer.post_padding = _dims(net, padding)
    short = [max(o - p, 0) for p, o in zip(padding, output_padding, strict=True)] if transposed else [0] * len(padding)
    inner = [s - e for s, e in zip(shape[2:], short, strict=True)]
    out = net.output(layer, [*shape[:2], *inner])
    if any(short):  # output padding beyond the padding: rows that no kernel position reaches
        out = L.slice_(out, [0] * out.rank, shape, [1] * out.rank, fill=0.0)
    if spatial == 1:
        out = L.reshape(out, shape[:-1])
    if bias is not None:
        out = out + L.reshape(L.cast(net.operand(bias), out.dtype), (1, maps, *[1] * spatial))
    out = L.cast(out, net.compute_type(x.dtype))
    # Torch's own formula for symbolic sizes would choose a CPU or GPU kernel first and ask about batch sizes for that.
    return net.tensor(out if batched else L.reshape(out, out.shape[1:]), x.dtype)


def _convolved(shape, weight, stride, padding, dilation, transposed, output_padding, groups):
    """Output sizes (torch.nn.Conv2d and ConvTranspose2d documentation); x (B, C, ...)."""
    sizes = []
    for n, k, s, p, d, o in zip(shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True):
        sizes.append(
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1 if transposed else (n + 2 * p - d * (k - 1) - 1) // s + 1
        )
    return (shape[0], weight.shape[1] * groups if transposed else weight.shape[0], *sizes)


def _spread(weight, dilation):
    for i, d in enumerate(dilation):
        dim = 2 + i
        size = weight.shape[dim]
        gaps = [weight.unsqueeze(dim + 1)] + [torch.zeros_like(weight).unsqueeze(dim + 1)] * (d - 1)
        weight = torch.cat(gaps, dim + 1).flatten(dim, dim + 1).narrow(dim, 0, (size - 1) * d + 1)
    return weight
