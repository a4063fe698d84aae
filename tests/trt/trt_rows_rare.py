"""More rows: forms of calls that converters' own test collections contain, and operations seldom used."""

import torch
import torch.nn.functional as F
from torch import nn
from trt_rows import IMAGE, X, bools, f, ints, module, pos, row

aten = torch.ops.aten


def written_into(make, call):
    def forward(*inputs):
        out = make(*inputs)
        call(*inputs, out=out)
        return out

    return forward


row("torch.add(out=)", written_into(torch.empty_like, lambda x, out: torch.add(x, 1, out=out)), X)
row("aten.atan2.out", written_into(lambda x, y: torch.empty_like(x), lambda x, y, out: aten.atan2(x, y, out=out)), X, X)
row("aten.add.Scalar(alpha)", lambda x: aten.add.Scalar(x, 3, 2), X)
row("torch.mean(dtype)", lambda x: torch.mean(x, 1, dtype=torch.float32), ints(0, 5, "B", 3))
row("torch.softmax(integers)", lambda x: torch.softmax(x, -1, dtype=torch.float32), ints(0, 5, "B", 3))
row("torch.logsumexp(integers)", lambda x: torch.logsumexp(x, 1), ints(0, 5, "B", 3))
row("torch.nansum", lambda x, m: torch.nansum(torch.where(m, x, float("nan")), 1), f("B", 7), bools("B", 7))
row("torch.nanmedian", lambda x, m: torch.nanmedian(torch.where(m, x, float("nan")), 1)[0], f("B", 7), bools("B", 7))
row("torch.nanmedian(all)", lambda x, m: torch.nanmedian(torch.where(m, x, float("nan"))), f("B", 7), bools("B", 7))
for name in ("and", "or", "xor"):
    row(f"aten.bitwise_{name}.Scalar_Tensor", lambda x, n=name: getattr(aten, f"bitwise_{n}")(True, x), bools("B", 4))
row("aten._local_scalar_dense", lambda x: x * aten._local_scalar_dense(x.sum()), X)
row("torch.equal", lambda x, y: torch.as_tensor(torch.equal(x, y)), X, X)
row("torch.equal(same)", lambda x: torch.as_tensor(torch.equal(x, x * 1)), X)
row("torch.cond", lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), X)
row("F.pdist", lambda x: F.pdist(x), f(5, 6))
row("F.pdist(1)", lambda x: F.pdist(x, 1.0), f(5, 6))
row("torch.diagonal_scatter", lambda x: torch.diagonal_scatter(x, x[:3, 0] * 2, 1), f(3, 4))
row("torch.masked_scatter", lambda x, m, s: torch.masked_scatter(x, m, s), X, bools("B", "T", 1), X)
row(
    "aten.batch_norm",
    lambda x, v: aten.batch_norm(x, None, None, v, v, False, 0.1, 1e-5, False),
    f("B", 4, "T"),
    pos(4),
)
row("aten.native_layer_norm", lambda x, w: aten.native_layer_norm(x, [6], w, None, 1e-5), X, f(6))
row("aten.native_group_norm", lambda x: aten.native_group_norm(x, None, None, 3, 6, 4, 2, 1e-5), f(3, 6, 4))
row(
    "aten._native_batch_norm_legit.no_stats",
    lambda x: aten._native_batch_norm_legit.no_stats(x, None, None, True, 0.1, 1e-5),
    X,
)
row("aten._fused_rms_norm", lambda x, w: aten._fused_rms_norm(x, [6], w, 1e-6), X, f(6))
row("F.layer_norm(varying sizes)", lambda x: F.layer_norm(x, x.shape[1:]), X)
row("F.scaled_dot_product_attention(width varies)", lambda q: F.scaled_dot_product_attention(q, q, q), f("B", 3, "T"))
for n in (1, 2, 3):
    pool = getattr(F, f"adaptive_max_pool{n}d")
    row(f"F.adaptive_max_pool{n}d(indices)", lambda x, p=pool: p(x, 3, return_indices=True), f("B", 2, *(7, 5, 4)[:n]))
row("aten.adaptive_max_pool1d", lambda x: aten.adaptive_max_pool1d(x, [2])[0], f("B", 4, 7))
for mode in ("bilinear", "bicubic"):
    row(
        f"F.interpolate({mode}, antialias)",
        lambda x, m=mode: F.interpolate(x, size=(3, 5), mode=m, antialias=True),
        f("B", 2, 8, 9),
    )
row(
    "F.interpolate(factor, antialias)",
    lambda x: F.interpolate(x, scale_factor=0.4, mode="bilinear", antialias=True),
    f("B", 2, 8, 9),
)
for mode in ("sum", "mean", "max"):
    row(
        f"F.embedding_bag({mode}, offsets)",
        lambda i, w, o, m=mode: F.embedding_bag(i, w, o, mode=m),
        *(ints(0, 9, 8), f(9, 4), ints(0, 1, 3)),
    )
    row(
        f"F.embedding_bag({mode}, empty bag)",
        lambda i, w, m=mode: F.embedding_bag(i, w, torch.tensor([0, 2, 2, 8]), mode=m, include_last_offset=True),
        *(ints(0, 9, 8), f(9, 4)),
    )
    row(
        f"F.embedding_bag({mode}, padding)",
        lambda i, w, m=mode: F.embedding_bag(i, w, mode=m, padding_idx=1),
        *(ints(0, 3, "B", 8), f(3, 4)),
    )
    number = ("sum", "mean", "max").index(mode)
    row(
        f"aten.embedding_bag({mode})",
        lambda w, i, n=number: aten.embedding_bag(w, i, torch.tensor([0, 3]), False, n, False)[0],
        *(f(9, 4), ints(0, 9, 8)),
    )
row(
    "F.embedding_bag(weights)",
    lambda i, w, p: F.embedding_bag(i, w, torch.tensor([0, 3]), mode="sum", per_sample_weights=p),
    *(ints(0, 9, 8), f(9, 4), f(8)),
)
row("F.linear(input=)", lambda x, w: F.linear(input=x, weight=w, bias=None), X, f(5, 6))
row("torch.matmul(other=, input=)", lambda x, w: torch.matmul(other=w, input=x), X, f(6, 5))
row("torch.sub(other=)", lambda x, y: torch.sub(other=y, input=x, alpha=2), X, X)
row("F.gelu(input=)", lambda x: F.gelu(input=x, approximate="tanh"), X)
row("torch.softmax(input=)", lambda x: torch.softmax(dim=1, input=x), X)
row("torch.tensor(sizes)", lambda x: torch.tensor([x.shape[0], x.shape[1] * 2]), X)
row("torch.tensor(size, dtype=)", lambda x: x / torch.tensor(x.shape[1], dtype=torch.float32).sqrt(), X)
row("torch._shape_as_tensor", lambda x: torch._shape_as_tensor(x), X)
row("nn.InstanceNorm2d(as constructed)", nn.InstanceNorm2d(4), IMAGE)

# seldom used
row("torch.cumprod", lambda x: torch.cumprod(x, 1), X)
row("torch.cummax", lambda x: torch.cummax(x, 1), X)
row("torch.cummin", lambda x: torch.cummin(x, -1), X)
row("torch.logcumsumexp", lambda x: torch.logcumsumexp(x, 1), X)
row("torch.scatter_reduce", lambda x, i: x.scatter_reduce(1, i, x * 2, "amax"), f("B", 6), ints(0, 6, "B", 6))
row("torch.scatter_reduce(mean)", lambda x, i: x.scatter_reduce(1, i, x * 2, "mean"), f("B", 6), ints(0, 6, "B", 6))
row("Tensor.index_put(accumulate)", lambda x, i: x.index_put((i,), x[:2] * 1, True), f(4, 5), ints(0, 4, 2))
row("F.embedding_bag", lambda i, w: F.embedding_bag(i, w, mode="sum"), ints(0, 9, "B", 5), f(9, 4))
row("F.max_pool2d(indices)", lambda x: F.max_pool2d(x, 2, 1, 1, return_indices=True), IMAGE)
row("F.avg_pool2d(divisor)", lambda x: F.avg_pool2d(x, 3, 2, divisor_override=5), IMAGE)
row("F.avg_pool2d(ceil)", lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), f("B", 2, 11, 12))
row("F.interpolate(area)", lambda x: F.interpolate(x, size=(3, 5), mode="area"), f("B", 2, 7, 9))
row("F.fold", lambda x: F.fold(x, (4, 4), (2, 2)), f("B", 8, 9))
row("torch.searchsorted", lambda x: torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), x), X)
row("torch.bucketize", lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])), X)
row("torch.quantile", lambda x: torch.quantile(x, 0.3, dim=-1), f("B", 7))
row("torch.bitwise_and(int)", lambda a, b: a & b, ints(-99, 99, "B", 6), ints(-99, 99, 6))
row("torch.bitwise_xor(int)", lambda a, b: a ^ b, ints(-99, 99, "B", 6, dtype="int32"), ints(-99, 99, 6, dtype="int32"))
row("torch.bitwise_left_shift", lambda a: a << 3, ints(-99, 99, "B", 6))
row("torch.bitwise_right_shift", lambda a: a >> 2, ints(-99, 99, "B", 6))
row("torch.as_strided", lambda x: torch.as_strided(x, (2, 3), (2, 1), 1), f("B", 9))
row("Tensor.__getitem__(constant mask)", lambda x: x[:, :, torch.tensor([1, 0, 1, 1, 0, 0]) > 0], X)
row("Tensor.item", lambda x: x * x.sum().item(), X)
row("torch.cov", torch.cov, f(4, 7))
row("torch.cross", lambda x, y: torch.cross(x, y, dim=-1), f("B", 3), f("B", 3))
row("F.cross_entropy", lambda x, i: F.cross_entropy(x, i), f("B", 5), ints(0, 5, "B"))
module("nn.LSTM(projection)", lambda: nn.LSTM(6, 5, proj_size=3), X)
module("nn.Transformer", lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), f("B", "T", 8), f("B", 5, 8))
module("nn.EmbeddingBag", lambda: nn.EmbeddingBag(9, 4), ints(0, 9, "B", 5))
