"""What the commonest calls return, written down: sizes and type, without asking torch.

Most of a model's calls are these, whose results are plain to see, and torch takes them apart into a dozen operations
over symbolic sizes to find them. Whatever is not the usual case returns None: torch decides.
"""

import torch

from . import sizes


def _linear(input, weight, bias=None):
    given = [input, weight] if bias is None else [input, weight, bias]
    if weight.dim() == 2 and input.dim() and len({t.dtype for t in given}) == 1:
        (rows, columns), width = weight.shape, input.shape[-1]
        fits = bias is None or (bias.dim() == 1 and _same_numbers(bias.shape, (rows,)))
        if fits and _same_numbers((width, rows), (columns, rows)):
            return torch.empty((*input.shape[:-1], rows), dtype=input.dtype)
    return None


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    given = [t for t in (weight, bias) if t is not None]
    own = input.shape[input.dim() - len(normalized_shape) :]
    alike = all(t.dtype == input.dtype and _same_numbers(t.shape, own) for t in given)
    if alike and input.dtype.is_floating_point and _same_numbers(normalized_shape, own) and len(own):
        return torch.empty_like(input)
    return None


def _matmul(input, other):
    if input.dim() == other.dim() > 2 and input.dtype == other.dtype:
        if _same((*input.shape[:-2], input.shape[-1]), other.shape[:-1]):
            return torch.empty((*input.shape[:-1], other.shape[-1]), dtype=input.dtype)
    return None


def _masked_fill(input, mask, value):
    own = input.shape[input.dim() - mask.dim() :]
    if not mask.dim() or mask.dim() > input.dim() or mask.dtype != torch.bool or isinstance(value, torch.Tensor):
        return None
    if all((isinstance(m, int) and m == 1) or _same((m,), (n,)) for m, n in zip(mask.shape, own, strict=True)):
        return torch.empty_like(input)
    return None


def _same(left, right):
    """Equal sizes, as numbers or to the letter."""
    if len(left) != len(right):
        return False
    return all(sizes.expression(a) == sizes.expression(b) for a, b in zip(left, right, strict=True))


def _same_numbers(left, right):
    """Equal sizes, each a plain number."""
    return len(left) == len(right) and all(
        isinstance(a, int) and isinstance(b, int) and a == b for a, b in zip(left, right, strict=True)
    )


PLAIN = {
    torch.nn.functional.linear: _linear,
    torch.nn.functional.layer_norm: _layer_norm,
    torch.matmul: _matmul,
    torch.ops.aten.masked_fill.Scalar: _masked_fill,
}
