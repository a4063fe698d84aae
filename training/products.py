"""Products in the training step: bfloat16 on a GPU, and a bias gradient that does not take longer than they do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class _Linear(torch.autograd.Function):
    """x W^T + b. Its own gradient because PyTorch's sum for the bias takes as long as the two products."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        d_bias = (rows.new_ones(1, len(rows)) @ rows)[0] if ctx.needs_input_grad[2] else None
        return dy @ weight, rows.t() @ x.flatten(0, -2), d_bias


def half(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.is_cuda else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = half(x)
    return _Linear.apply(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
