"""Rows of shapes and views, slices and indexing, and tensors made from sizes."""

import torch
import torch.nn.functional as F
from trt_rows import X, bools, f, ints, row

# shapes and views
row("Tensor.view", lambda x: x.view(x.size(0), -1), X)
row("Tensor.view(sizes)", lambda x: x.view(x.shape[0], x.shape[1], 2, 3), X)
row("Tensor.view_as", lambda x, y: x.view_as(y), f("B", "T", 6), f("B", "T", 2, 3))
row("Tensor.reshape", lambda x: x.reshape(-1, 3), X)
row("torch.reshape", lambda x: torch.reshape(x, (x.shape[1], -1)), X)
row("Tensor.reshape_as", lambda x, y: x.reshape_as(y), f("B", 6), f(6, "B"))
row("torch.flatten", lambda x: torch.flatten(x, 1), X)
row("Tensor.flatten", lambda x: x.flatten(), X)
row("Tensor.unflatten", lambda x: x.unflatten(-1, (2, 3)), X)
row("torch.squeeze", lambda x: torch.squeeze(x, 1), f("B", 1, 6))
row("Tensor.squeeze", lambda x: x.squeeze(-1), f("B", "T", 1))
row("torch.unsqueeze", lambda x: torch.unsqueeze(x, 1), X)
row("Tensor.unsqueeze", lambda x: x.unsqueeze(-1), X)
row("Tensor.transpose", lambda x: x.transpose(1, 2), X)
row("torch.transpose", lambda x: torch.transpose(x, 0, -1), X)
row("Tensor.permute", lambda x: x.permute(2, 0, 1), X)
row("torch.permute", lambda x: torch.permute(x, (1, 2, 0)), X)
row("torch.swapaxes", lambda x: torch.swapaxes(x, 0, 1), X)
row("torch.movedim", lambda x: torch.movedim(x, 0, -1), X)
row("Tensor.t", lambda x: x.t(), f("B", 6))
row("Tensor.T", lambda x: x.T, f("B", 6))
row("Tensor.mT", lambda x: x.mT, X)
row("torch.adjoint", lambda x: torch.adjoint(x), X)
row("Tensor.expand", lambda x: x.expand(-1, 4, 6), f("B", 1, 6))
row("Tensor.expand(sizes)", lambda x, y: x.expand(y.shape[0], y.shape[1], 6), f(6), f("B", "T"))
row("Tensor.expand_as", lambda x, y: x.expand_as(y), f("B", 1, 6), X)
row("torch.broadcast_to", lambda x, y: torch.broadcast_to(x, y.shape), f(6), X)
row("torch.broadcast_tensors", lambda x, y: torch.broadcast_tensors(x, y), f("B", 1, 6), f("T", 1))
row("Tensor.repeat", lambda x: x.repeat(1, 2, 3), X)
row("Tensor.repeat(new)", lambda x: x.repeat(x.shape[0], 1, 1, 2), X)
row("torch.tile", lambda x: torch.tile(x, (2, 1)), X)
row("torch.repeat_interleave", lambda x: torch.repeat_interleave(x, 3, dim=1), X)
row("Tensor.repeat_interleave", lambda x: x.repeat_interleave(2, -1), X)
row("torch.cat", lambda x, y: torch.cat([x, y, x], 1), X, f("B", 2, 6))
row("torch.concat", lambda x: torch.concat([x, x], -1), X)
row("torch.stack", lambda x: torch.stack([x, x * 2], 1), X)
row("torch.hstack", lambda x: torch.hstack([x, x]), X)
row("torch.vstack", lambda x: torch.vstack([x, x]), X)
row("torch.dstack", lambda x: torch.dstack([x, x]), X)
row("torch.column_stack", lambda x: torch.column_stack([x, x]), f("B", 3))
row("torch.split", lambda x: torch.split(x, 4, -1), X)
row("Tensor.split(sizes)", lambda x: x.split([1, 2, 3], dim=-1), X)
row("torch.chunk", lambda x: torch.chunk(x, 3, dim=2), X)
row("Tensor.chunk", lambda x: x.chunk(2, dim=-1), X)
row("torch.tensor_split", lambda x: torch.tensor_split(x, 4, -1), X)
row("torch.unbind", lambda x: torch.unbind(x, 2)[1:3], X)
row("Tensor.unbind", lambda x: x.unbind(-1)[0], X)
row("torch.narrow", lambda x: torch.narrow(x, 1, 1, 2), X)
row("Tensor.narrow", lambda x: x.narrow(1, 0, x.shape[1] - 1), X)
row("torch.select", lambda x: torch.select(x, 1, -1), X)
row("Tensor.select", lambda x: x.select(0, 1), X)
row("torch.flip", lambda x: torch.flip(x, [1, 2]), X)
row("Tensor.flip", lambda x: x.flip(0), X)
row("torch.fliplr", torch.fliplr, X)
row("torch.rot90", lambda x: torch.rot90(x, 1, [1, 2]), X)
row("torch.roll", lambda x: torch.roll(x, 2, 1), X)
row("torch.roll(dims)", lambda x: torch.roll(x, (1, -2), (0, 2)), X)
row("Tensor.unfold", lambda x: x.unfold(-1, 3, 2), f("B", 9))
row("torch.diagonal", lambda x: torch.diagonal(x, 0, 1, 2), f("B", 4, 4))
row("torch.diag", lambda x: torch.diag(x), f(5, 5))
row("torch.tril", lambda x: torch.tril(x), f("B", "T", "T"))
row("torch.triu", lambda x: torch.triu(x, 1), f("B", "T", "T"))
row("Tensor.tril", lambda x: x.tril(-1), f("T", "T"))
row("torch.meshgrid", lambda x, y: torch.meshgrid(x, y, indexing="ij"), f("B"), f("T"))
row("Tensor.size", lambda x: x * x.size(1), X)
row("Tensor.shape", lambda x: x / x.shape[0], X)
row("Tensor.numel", lambda x: x * x.numel(), f("B", "T"))
row("Tensor.dim", lambda x: x * x.dim(), X)
row("torch.atleast_3d", torch.atleast_3d, f("B", "T"))
row("torch.view_as_real", lambda x: x.unflatten(-1, (3, 2)), X)

# slices and indexing
row("Tensor.__getitem__(slice)", lambda x: x[:, 1:-1], X)
row("Tensor.__getitem__(step)", lambda x: x[:, ::2, 1::3], X)
row("Tensor.__getitem__(negative)", lambda x: x[:, -3:, -1], X)
row("Tensor.__getitem__(ellipsis)", lambda x: x[..., :-2], X)
row("Tensor.__getitem__(none)", lambda x: x[:, None, :, None, 0], X)
row("Tensor.__getitem__(int)", lambda x: x[0], X)
row("Tensor.__getitem__(size)", lambda x, y: x[:, : y.shape[1]], f("B", 40, 3), f("B", "T"))
row("Tensor.__getitem__(half)", lambda x: x[:, x.shape[1] // 2 :], X)
row("Tensor.__getitem__(tensor)", lambda x, i: x[i], X, ints(0, 2, 5))
row("Tensor.__getitem__(tensors)", lambda x, i, j: x[i, j], X, ints(0, 2, "B", 1), ints(0, 3, 4))
row("Tensor.__getitem__(mixed)", lambda x, i: x[:, i, 2], X, ints(-2, 3, 4))
row("Tensor.__getitem__(apart)", lambda x, i, j: x[i, :, j], X, ints(0, 2, 4), ints(0, 6, 4))
row("Tensor.__getitem__(list)", lambda x: x[:, :, [0, 3, 5]], X)
row("Tensor.__getitem__(arange)", lambda x, i: x[torch.arange(x.shape[0]), i], f("B", 6), ints(0, 6, "B"))


def _setitem(x):
    y = x.clone()
    y[:, 1:3] = 0.0
    y[..., -1] = y[..., 0] * 2
    return y


def _setitem_tensor(x, v):
    y = torch.zeros_like(x)
    y[:, 0] = v
    return y


def _setitem_mask(x, m):
    y = x.clone()
    y[m] = 5.0
    return y


def _setitem_index(x, i):
    y = x * 1.0
    y[:, i] = -1.0
    return y


def _view_write(x):
    y = x + 0.0
    v = y[:, 1]
    v.mul_(3)
    w = y.view(-1)
    w[0] = 7.0
    return y, v, w


row("Tensor.__setitem__", _setitem, X)
row("Tensor.__setitem__(tensor)", _setitem_tensor, X, f("B", 6))
row("Tensor.__setitem__(mask)", _setitem_mask, X, bools("B", "T", 6))
row("Tensor.__setitem__(index)", _setitem_index, X, ints(0, 3, 2))
row("Tensor.mul_(view)", _view_write, X)
row("torch.gather", lambda x, i: torch.gather(x, 2, i), X, ints(0, 6, "B", "T", 3))
row("Tensor.gather", lambda x, i: x.gather(-1, i), f("B", 6), ints(0, 6, "B", 2))
row("torch.take_along_dim", lambda x, i: torch.take_along_dim(x, i, -1), f("B", 6), ints(0, 6, "B", 2))
row("torch.take", lambda x, i: torch.take(x, i), f("B", 6), ints(0, 9, 4))
row("torch.index_select", lambda x, i: torch.index_select(x, 1, i), X, ints(0, 3, 4))
row("Tensor.index_select", lambda x, i: x.index_select(-1, i), X, ints(0, 6, 2))
row("torch.scatter", lambda x, i, s: torch.scatter(x, -1, i, s), f("B", 6), ints(2, 3, "B", 1), f("B", 1))
row("Tensor.scatter", lambda x, i: x.scatter(-1, i, 2.0), f("B", 6), ints(2, 5, "B", 2))
row("Tensor.scatter_", lambda x, i: (x * 1).scatter_(1, i, 1.0), f("B", 6), ints(2, 5, "B", 2))
row("torch.scatter_add", lambda x, i, s: torch.scatter_add(x, -1, i, s), f("B", 6), ints(0, 6, "B", 4), f("B", 4))
row("torch.index_add", lambda x, i, s: torch.index_add(x, 1, i, s), f("B", 6, 2), ints(0, 6, 4), f("B", 4, 2))
row("Tensor.index_put", lambda x, i: x.index_put((i,), torch.tensor(3.0)), X, ints(0, 1, 1))
row("Tensor.index_fill", lambda x, i: x.index_fill(1, i, 2.0), X, ints(0, 3, 2))
row("torch.select_scatter", lambda x, s: torch.select_scatter(x, s, 1, 0), X, f("B", 6))
row("torch.slice_scatter", lambda x, s: torch.slice_scatter(x, s, 1, 0, 2), X, f("B", 2, 6))
row("F.one_hot", lambda i: F.one_hot(i, 5), ints(0, 5, "B", "T"))
row("F.embedding", lambda i, w: F.embedding(i, w), ints(0, 9, "B", "T"), f(9, 4))

# tensors from sizes
row("torch.arange", lambda x: torch.arange(x.shape[1]) + 0 * x[0, :, 0], X)
row("torch.arange(step)", lambda x: torch.arange(1, x.shape[1] + 1, 2), X)
row("torch.arange(float)", lambda x: torch.arange(0, x.shape[1], dtype=torch.float32) * 0.5, X)
row("torch.arange(down)", lambda x: torch.arange(x.shape[1] - 1, -1, -1), X)
row("torch.linspace", lambda x: torch.linspace(0, 1, 5) + x, f("B", 5))
row("torch.zeros", lambda x: torch.zeros(x.shape[0], x.shape[1], 3), X)
row("torch.ones", lambda x: torch.ones(x.shape[:2]), X)
row("torch.full", lambda x: torch.full((x.shape[0], 2), 3.5), X)
row("torch.zeros_like", torch.zeros_like, X)
row("torch.ones_like", lambda x: torch.ones_like(x, dtype=torch.int64), X)
row("torch.full_like", lambda x: torch.full_like(x, 2.5), X)
row("Tensor.new_zeros", lambda x: x.new_zeros(x.shape[0], 2), X)
row("Tensor.new_ones", lambda x: x.new_ones((3, x.shape[1])), X)
row("Tensor.new_full", lambda x: x.new_full((x.shape[0],), 7.0), X)
row("Tensor.new_tensor", lambda x: x + x.new_tensor([1.0, 2, 3, 4, 5, 6]), X)
row("torch.tensor", lambda x: x + torch.tensor([1.0, 2, 3, 4, 5, 6]), X)
row("torch.eye", lambda x: torch.eye(x.shape[1]), X)
row("torch.mask", lambda n, x: torch.arange(x.shape[1])[None, :] < n[:, None], ints(1, 5, "B"), X)
