"""Activations and norms. Norms compute in float32, with eps inside the root."""

import torch
import torch.nn.functional as F

from . import layers as L
from .errors import UncoveredOperation
from .sizes import is_fixed
from .table import converter

aten = torch.ops.aten

ACTIVATIONS = {aten.relu: "RELU", aten.sigmoid: "SIGMOID", aten.tanh: "TANH"}

for function, kind in ACTIVATIONS.items():

    @converter(function)
    def activation(net, x, kind=kind):
        if not x.dtype.is_floating_point:
            if kind == "RELU":
                return L.binary("MAX", *net.operands(x, 0))
            return L.activation(kind, net.operand(x, torch.float32))
        return L.activation(kind, net.operand(x))


@converter(F.silu, aten.silu)
def silu(net, x, inplace=False):
    node = net.operand(x)
    return node * L.activation("SIGMOID", node)


@converter(aten.gelu)
def gelu(net, x, *, approximate="none"):
    return L.activation("GELU_TANH" if approximate == "tanh" else "GELU_ERF", net.operand(x))


@converter(aten.elu)
def elu(net, x, alpha=1.0, scale=1.0, input_scale=1.0):
    node = net.operand(x)
    if scale == input_scale == 1.0:
        return L.activation("ELU", node, alpha=float(alpha))
    if input_scale == 1.0:
        return L.activation("SELU", node, alpha=float(alpha), beta=float(scale))
    negative = (L.unary("EXP", L.binary("MIN", node, node * 0) * input_scale) - 1.0) * (alpha * scale)
    return L.activation("RELU", node) * scale + negative


@converter(aten.leaky_relu)
def leaky_relu(net, x, negative_slope=0.01):
    return L.activation("LEAKY_RELU", net.operand(x), alpha=float(negative_slope))


@converter(F.rrelu)
def rrelu(net, x, lower=1 / 8, upper=1 / 3, training=False, inplace=False):
    return F.leaky_relu(x, (lower + upper) / 2)


@converter(aten.softplus, kind="float32")
def softplus(net, x, beta=1, threshold=20):
    node = net.operand(x)
    soft = L.activation(
        "SOFTPLUS", L.binary("MIN", node * float(beta), net.scalar(float(threshold), node.dtype)), alpha=1.0, beta=1.0
    )
    steep = L.binary("GREATER", node * float(beta), net.scalar(float(threshold), node.dtype))
    return L.select(steep, node, soft / float(beta))


@converter(F.softsign)
def softsign(net, x):
    return L.activation("SOFTSIGN", net.operand(x))


@converter(aten.hardsigmoid)
def hardsigmoid(net, x):
    return L.activation("HARD_SIGMOID", net.operand(x), alpha=1 / 6, beta=0.5)


@converter(aten.hardtanh)
def hardtanh(net, x, min_val=-1.0, max_val=1.0):
    return torch.clamp(x, min_val, max_val)


@converter(aten.log_sigmoid_forward)
def log_sigmoid(net, x):
    return -F.softplus(-x), torch.zeros(0)


@converter(F.logsigmoid, kind="float32")
def logsigmoid(net, x):
    return -F.softplus(-x)


@converter(aten._prelu_kernel, aten.prelu)
def prelu(net, x, weight):
    node, slope = net.operands(x, weight)
    zero = net.scalar(0.0, node.dtype)
    if slope.rank == 1 and node.rank > 1:
        slope = L.reshape(slope, (1, slope.shape[0], *[1] * (node.rank - 2)))
    return L.binary("MAX", node, zero) + slope * L.binary("MIN", node, zero)


@converter(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)
def dropout(net, x, p=0.5, training=False, inplace=False):
    if training and p > 0:
        raise UncoveredOperation(f"{net.where()}dropout in training mode; call module.eval() before building")
    return x


# norms, in float32


def _affine(net, node, weight, bias, shape):
    if weight is not None:
        node = node * L.reshape(net.operand(weight), shape)
    return node if bias is None else node + L.reshape(net.operand(bias), shape)


def _normalised(node, axes, eps):
    """(x - mean) / sqrt(var + eps); the two-pass variance cannot be negative, and eps is inside the root."""
    centred = node - L.reduce("AVG", node, axes, True)
    variance = L.reduce("AVG", centred * centred, axes, True)
    return centred / L.unary("SQRT", variance + float(eps))


def _statistics(x, axes, eps):
    """Mean and 1 / sqrt(var + eps) over `axes`, kept: what the native_* functions return besides the norm."""
    mean = x.mean(axes, keepdim=True)
    return mean, torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + eps)


def _layer_norm_node(net, x, shape, weight, bias, eps):
    node = net.operand(x)
    axes = list(range(node.rank - len(shape), node.rank))
    wide = [1] * (node.rank - len(shape)) + [int(s) for s in shape]
    one, zero = (torch.full(wide, v) for v in (1.0, 0.0))
    scale = net.constant(one.const) if weight is None else L.reshape(net.operand(weight), wide)
    shift = net.constant(zero.const) if bias is None else L.reshape(net.operand(bias), wide)
    layer = net.package.normalization(net.network, node.tensor, scale.tensor, shift.tensor, sum(1 << a for a in axes))
    layer = net.named(layer, "normalization")
    layer.epsilon = float(eps)
    return net.output(layer, node.shape)


@converter(F.layer_norm, aten.layer_norm, kind="float32")
def layer_norm(net, x, normalized_shape, weight=None, bias=None, eps=1e-5, *_):
    if x.dim() > len(normalized_shape) and all(map(is_fixed, normalized_shape)):
        return _layer_norm_node(net, x, normalized_shape, weight, bias, eps)
    node = _normalised(net.operand(x), list(range(x.dim() - len(normalized_shape), x.dim())), eps)
    lead = [1] * (x.dim() - len(normalized_shape))
    return _affine(net, node, weight, bias, (*lead, *normalized_shape))


@converter(aten.native_layer_norm, kind="float32")
def native_layer_norm(net, x, shape, weight, bias, eps):
    axes = list(range(x.dim() - len(shape), x.dim()))
    return F.layer_norm(x, shape, weight, bias, eps), *_statistics(x, axes, eps)


@converter(F.rms_norm, aten.rms_norm, kind="float32")
def rms_norm(net, x, normalized_shape, weight=None, eps=None):
    node = net.operand(x)
    axes = list(range(node.rank - len(normalized_shape), node.rank))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    root = L.unary("SQRT", L.reduce("AVG", node * node, axes, True) + float(eps))
    lead = [1] * (node.rank - len(normalized_shape))
    return _affine(net, node / root, weight, None, (*lead, *normalized_shape))


@converter(aten._fused_rms_norm, kind="float32")
def fused_rms_norm(net, x, shape, weight, eps):
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    axes = list(range(x.dim() - len(shape), x.dim()))
    return F.rms_norm(x, shape, weight, eps), torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)


@converter(F.batch_norm, kind="float32")
def batch_norm(net, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training and running_mean is not None:
        raise UncoveredOperation(f"{net.where()}batch_norm in training mode; call module.eval() before building")
    shape = [1, x.shape[1], *[1] * (x.dim() - 2)]
    node = net.operand(x)
    if running_mean is None:
        return _affine(net, _normalised(node, [0, *range(2, x.dim())], eps), weight, bias, shape)
    if any(getattr(v, "tracer", None) and v.const is None for v in (running_mean, running_var, weight, bias)):
        mean, var = (L.reshape(net.operand(v), shape) for v in (running_mean, running_var))
        return _affine(net, (node - mean) / L.unary("SQRT", var + float(eps)), weight, bias, shape)
    # The four statistics fold into one scale and one shift, in float64 so that folding costs no accuracy.
    mean, var, weight, bias = (
        v.const if hasattr(v, "tracer") else v for v in (running_mean, running_var, weight, bias)
    )
    with net.plainly():
        scale = (var.double() + eps).rsqrt() * (1.0 if weight is None else weight.double())
        shift = (0.0 if bias is None else bias.double()) - mean.double() * scale
        scale, shift = scale.float().reshape(shape), shift.float().reshape(shape)
    return node * net.constant(scale) + net.constant(shift)


@converter(aten.batch_norm, kind="float32")
def aten_batch_norm(net, x, weight, bias, running_mean, running_var, training, momentum, eps, *_):
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


@converter(aten._native_batch_norm_legit.no_stats, kind="float32")
def batch_norm_without_statistics(net, x, weight, bias, training, momentum, eps):
    mean, root = _statistics(x, [0, *range(2, x.dim())], eps)
    out = F.batch_norm(x, None, None, weight, bias, True, momentum, eps)
    return out, mean.reshape(x.shape[1]), root.reshape(x.shape[1])


@converter(aten.native_batch_norm, aten._native_batch_norm_legit, kind="float32")
def native_batch_norm(net, x, weight, bias, running_mean, running_var, training, momentum, eps):
    out = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return out, torch.zeros(0), torch.zeros(0)


@converter(aten._native_batch_norm_legit_no_training, kind="float32")
def batch_norm_no_training(net, x, weight, bias, running_mean, running_var, momentum, eps):
    out = F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return out, torch.zeros(0), torch.zeros(0)


@converter(F.group_norm, aten.group_norm, kind="float32")
def group_norm(net, x, num_groups, weight=None, bias=None, eps=1e-5, *_):
    batch, channels, *rest = x.shape
    node = L.reshape(net.operand(x), (batch, num_groups, channels // num_groups, *rest))
    node = L.reshape(_normalised(node, list(range(2, node.rank)), eps), x.shape)
    return _affine(net, node, weight, bias, (1, channels, *[1] * len(rest)))


@converter(aten.native_group_norm, kind="float32")
def native_group_norm(net, x, weight, bias, n, c, hw, groups, eps):
    mean, root = _statistics(x.reshape(n, groups, -1), [2], eps)
    return F.group_norm(x, groups, weight, bias, eps), mean.squeeze(2), root.squeeze(2)


@converter(F.instance_norm, aten.instance_norm, kind="float32")
def instance_norm(
    net,
    x,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
    *_,
):
    shape = (1, x.shape[1], *[1] * (x.dim() - 2))
    if not use_input_stats:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return _affine(net, _normalised(net.operand(x), list(range(2, x.dim())), eps), weight, bias, shape)


@converter(F.local_response_norm)
def local_response_norm(net, x, size, alpha=1e-4, beta=0.75, k=1.0):
    squares = (x * x).unsqueeze(1)
    padded = F.pad(squares.flatten(3) if x.dim() > 3 else squares, (0, 0, size // 2, (size - 1) // 2))
    total = sum(padded.narrow(2, i, x.shape[1]) for i in range(size)) / size
    return x / (k + alpha * total.reshape(x.shape)).pow(beta)
