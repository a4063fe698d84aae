"""Rows of torch.nn.functional."""

import torch.nn.functional as F
from trt_rows import IMAGE, X, bools, f, ints, pos, row

for name in """relu relu6 elu selu celu gelu silu mish hardswish hardsigmoid hardtanh leaky_relu softsign softplus
    logsigmoid tanhshrink softshrink hardshrink sigmoid tanh""".split():
    row(f"F.{name}", getattr(F, name), X)
row("F.gelu(tanh)", lambda x: F.gelu(x, approximate="tanh"), X)
row("F.elu(alpha)", lambda x: F.elu(x, 0.5), X)
row("F.celu(alpha)", lambda x: F.celu(x, 0.7), X)
row("F.glu", F.glu, X)
row("F.glu(dim)", lambda x: F.glu(x, 1), f("B", 4, "T"))
row("F.threshold", lambda x: F.threshold(x, 0.1, -2.0), X)
row("F.rrelu", F.rrelu, X)
row("F.prelu", F.prelu, f("B", 6, "T"), f(6))
row("F.softmax", lambda x: F.softmax(x, -1), X)
row("F.log_softmax", lambda x: F.log_softmax(x, -1), X)
row("F.softmin", lambda x: F.softmin(x, -1), X)
row("F.normalize", lambda x: F.normalize(x, dim=-1), X)
row("F.dropout", lambda x: F.dropout(x, 0.5, training=False), X)
row("F.layer_norm", lambda x, w, b: F.layer_norm(x, (6,), w, b, 1e-3), X, f(6), f(6))
row("F.layer_norm(plain)", lambda x: F.layer_norm(x, (6,)), X)
row("F.rms_norm", lambda x, w: F.rms_norm(x, (6,), w, 1e-6), X, f(6))
row("F.group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), f("B", 4, "T"), f(4), f(4))
row("F.instance_norm", lambda x: F.instance_norm(x), f("B", 4, "T"))
row("F.batch_norm", lambda x, m, v: F.batch_norm(x, m, v.abs() + 1), f("B", 4, "T"), f(4), f(4))
row("F.local_response_norm", lambda x: F.local_response_norm(x, 3), IMAGE)
row("F.pad", lambda x: F.pad(x, (1, 2)), X)
row("F.pad(value)", lambda x: F.pad(x, (0, 0, 2, -1), value=3.0), X)
row("F.pad(int)", lambda x: F.pad(x, (1, 1), value=4), ints(0, 9, "B", 6))
row("F.pad(bool)", lambda x: F.pad(x, (0, 2), value=True), bools("B", 6))
row("F.pad(reflect)", lambda x: F.pad(x, (2, 1), mode="reflect"), f("B", 3, "T"))
row("F.pad(replicate)", lambda x: F.pad(x, (2, 1), mode="replicate"), f("B", 3, "T"))
row("F.pad(circular)", lambda x: F.pad(x, (2, 1), mode="circular"), f("B", 3, "T"))
row("F.conv1d", lambda x, w: F.conv1d(x, w, padding=1), f("B", 4, "T"), f(5, 4, 3))
row("F.conv1d(same)", lambda x, w: F.conv1d(x, w, padding="same", dilation=2), f("B", 4, "T"), f(5, 4, 3))
row("F.conv2d", lambda x, w, b: F.conv2d(x, w, b, stride=(1, 2)), IMAGE, f(5, 4, 3, 3), f(5))
row("F.conv2d(groups)", lambda x, w: F.conv2d(x, w, groups=2, padding=(1, 0)), IMAGE, f(6, 2, 3, 3))
row("F.conv3d", lambda x, w: F.conv3d(x, w), f("B", 2, "T", 5, 4), f(3, 2, 2, 3, 2))
row("F.conv_transpose1d", lambda x, w: F.conv_transpose1d(x, w, stride=2), f("B", 4, "T"), f(4, 5, 3))
row(
    "F.conv_transpose2d",
    lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1),
    IMAGE,
    f(4, 5, 3, 3),
)
row("F.conv_transpose3d", lambda x, w: F.conv_transpose3d(x, w), f("B", 2, "T", 3, 4), f(2, 3, 2, 2, 2))
row("F.max_pool1d", lambda x: F.max_pool1d(x, 2), f("B", 4, "T"))
row("F.max_pool2d", lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE)
row("F.max_pool2d(dilation)", lambda x: F.max_pool2d(x, 2, 1, 1, dilation=2), IMAGE)
row("F.max_pool2d(ceil)", lambda x: F.max_pool2d(x, 2, ceil_mode=True), IMAGE)
row("F.max_pool3d", lambda x: F.max_pool3d(x, 2), f("B", 2, "T", 5, 4))
row("F.avg_pool1d", lambda x: F.avg_pool1d(x, 3, 1, 1), f("B", 4, "T"))
row("F.avg_pool2d", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), IMAGE)
row("F.avg_pool3d", lambda x: F.avg_pool3d(x, 2), f("B", 2, "T", 5, 4))
row("F.adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 3), f("B", 4, "T"))
row("F.adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (1, 4)), IMAGE)
row("F.adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, (1, 2, 2)), f("B", 2, "T", 5, 4))
row("F.adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 1), f("B", 4, "T"))
row("F.adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, (1, 4)), IMAGE)
row("F.lp_pool1d", lambda x: F.lp_pool1d(x, 2, 3), pos("B", 4, "T"))
row("F.interpolate", lambda x: F.interpolate(x, scale_factor=2), IMAGE)
row("F.interpolate(size)", lambda x: F.interpolate(x, size=7), f("B", 4, "T"))
row("F.interpolate(exact)", lambda x: F.interpolate(x, size=(7, 5), mode="nearest-exact"), IMAGE)
row("F.interpolate(linear)", lambda x: F.interpolate(x, scale_factor=1.5, mode="linear"), f("B", 4, "T"))
row("F.interpolate(bilinear)", lambda x: F.interpolate(x, size=(11, 6), mode="bilinear", align_corners=True), IMAGE)
row("F.interpolate(bicubic)", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), IMAGE)
row("F.pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), IMAGE)
row("F.pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 3), f("B", 2, 6, 9))
row("F.channel_shuffle", lambda x: F.channel_shuffle(x, 2), IMAGE)
row("F.unfold", lambda x: F.unfold(x, (2, 3)), f("B", 2, 5, 6))
row("F.cosine_similarity", lambda x, y: F.cosine_similarity(x, y, -1), X, X)
row("F.pairwise_distance", F.pairwise_distance, f("B", 6), f("B", 6))
row(
    "F.scaled_dot_product_attention",
    F.scaled_dot_product_attention,
    f("B", 2, "T", 4),
    f("B", 2, "T", 4),
    f("B", 2, "T", 4),
)
row(
    "F.scaled_dot_product_attention(mask)",
    lambda q, m: F.scaled_dot_product_attention(q, q, q, m),
    f("B", 2, "T", 4),
    f("T", "T"),
)
row(
    "F.scaled_dot_product_attention(causal)",
    lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    f("B", 2, "T", 4),
)
row("F.mse_loss", lambda x, y: F.mse_loss(x, y, reduction="none"), X, X)
