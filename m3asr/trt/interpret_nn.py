"""Norms, convolutions, pooling, resizing and quantisation, evaluated as the layers of interpret_layers.py are."""

import torch
import torch.nn.functional as F

from .interpret_layers import axes_of, evaluates


@evaluates("NORMALIZATION")
def normalization(run, layer, given):
    """(x - mean) / sqrt(var + eps) * scale + bias over the stated axes."""
    x, scale, bias = given
    axes = axes_of(layer.axes)
    if layer.num_groups != 1:
        raise ValueError("grouped normalization layers are not evaluated")
    y = x.float()
    mean = y.mean(axes, keepdim=True)
    var = (y - mean).square().mean(axes, keepdim=True)
    return ((y - mean) / torch.sqrt(var + layer.epsilon) * scale.float() + bias.float()).to(x.dtype)


@evaluates("CONVOLUTION", "DECONVOLUTION")
def convolution(run, layer, given):
    transposed = run.kind(layer) == "DECONVOLUTION"
    x = given[0]
    kernel = tuple(layer.kernel_size_nd)
    n = len(kernel)
    weight = given[1] if len(given) > 1 and given[1] is not None else torch.from_numpy(layer.kernel.copy())
    groups, maps = layer.num_groups, layer.num_output_maps
    if weight.dim() == 1:
        first, second = (x.shape[1], maps // groups) if transposed else (maps, x.shape[1] // groups)
        weight = weight.reshape(first, second, *kernel)
    bias = given[2] if len(given) > 2 else None
    if bias is None and len(given) < 2 and layer.bias.size:
        bias = torch.from_numpy(layer.bias.copy())
    pre, post = list(layer.pre_padding), list(layer.post_padding)
    stride, dilation = list(layer.stride_nd), list(layer.dilation_nd)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # tensor cores accumulate in float32
    weight = weight.to(wide.dtype)
    bias = None if bias is None else bias.to(wide.dtype)
    if transposed:
        run_conv = (None, None, F.conv_transpose2d, F.conv_transpose3d)[n]
        out = run_conv(wide, weight, bias, stride, 0, 0, groups, dilation)
        for i in range(n):
            out = out.narrow(2 + i, pre[i], out.shape[2 + i] - pre[i] - post[i])
    else:
        pads = [p for i in reversed(range(n)) for p in (pre[i], post[i])]
        run_conv = (None, None, F.conv2d, F.conv3d)[n]
        out = run_conv(F.pad(wide, pads), weight, bias, stride, 0, dilation, groups)
    return out.to(x.dtype)


@evaluates("POOLING")
def pooling(run, layer, given):
    x, kernel = given[0], tuple(layer.window_size_nd)
    n = len(kernel)
    up = layer.padding_mode.name == "EXPLICIT_ROUND_UP"
    padding, stride = tuple(layer.pre_padding), tuple(layer.stride_nd)
    if tuple(layer.post_padding) != padding:
        raise ValueError("pooling with unequal padding is not evaluated")
    if layer.type.name == "MAX":
        return (None, None, F.max_pool2d, F.max_pool3d)[n](x, kernel, stride, padding, 1, up)
    average = (None, None, F.avg_pool2d, F.avg_pool3d)[n]
    return average(x, kernel, stride, padding, up, not layer.average_count_excludes_padding)


@evaluates("RESIZE")
def resize(run, layer, given):
    x = given[0]
    if len(given) > 1 and given[1] is not None:
        shape, scales = given[1].tolist(), None
    elif len(layer.scales):
        scales = list(layer.scales)
        shape = [int(s * d) for s, d in zip(scales, x.shape, strict=True)]
    else:
        shape, scales = list(layer.shape), None
    spatial = x.dim() - 2
    mode = {"LINEAR": ("linear", "bilinear", "trilinear")[spatial - 1], "CUBIC": "bicubic"}.get(layer.resize_mode.name)
    transform = layer.coordinate_transformation.name
    if mode is None or transform not in ("ALIGN_CORNERS", "HALF_PIXEL"):
        raise ValueError(f"resize {layer.resize_mode.name} with {transform} is not evaluated")
    if layer.resize_mode.name == "CUBIC" and abs(layer.cubic_coeff + 0.75) > 1e-6:
        raise ValueError("torch's cubic has the coefficient -0.75")
    if scales is not None:
        return F.interpolate(x, scale_factor=scales[2:], mode=mode, recompute_scale_factor=False)
    return F.interpolate(x, size=shape[2:], mode=mode, align_corners=transform == "ALIGN_CORNERS")


LIMITS = {torch.int8: (-128, 127), torch.float8_e4m3fn: (-448.0, 448.0)}


def _scale_shape(scale, x, axis):
    if scale.dim() == 0 or scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == x.dim():  # blocked
        for d in range(x.dim()):
            scale = scale.repeat_interleave(x.shape[d] // scale.shape[d], d)
        return scale
    return scale.reshape([-1] + [1] * (x.dim() - axis - 1))


@evaluates("QUANTIZE")
def quantize(run, layer, given):
    x, scale = given[:2]
    kind = run.package.torch_dtype(layer.get_output(0).dtype)
    low, high = LIMITS[kind]
    scaled = (x.float() / _scale_shape(scale, x, layer.axis).float()).clamp(low, high)
    return (scaled.round() if kind == torch.int8 else scaled).to(kind)


@evaluates("DEQUANTIZE")
def dequantize(run, layer, given):
    x, scale = given[:2]
    out = x.float() * _scale_shape(scale, x, layer.axis).float()
    return out.to(run.package.torch_dtype(layer.get_output(0).dtype))
