"""Where a forward asks for a value that only the data has: item(), if tensor, int(tensor)."""

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from .errors import TraceError, UncoveredOperation
from .table import converter

aten = torch.ops.aten


@converter(torch.Tensor.item, torch.ops.aten._local_scalar_dense)
def item(net, x):
    """The value stays a tensor of no dimensions: arithmetic with it works as with the number."""
    return x.const.item() if x.const is not None else x.reshape(())


@converter(torch.Tensor.__bool__, torch.is_nonzero, torch.Tensor.is_nonzero)
def boolean(net, x):
    if x.const is not None:
        return bool(x.const)
    if net.branches is not None:
        return net.branches
    return net.paths.decide(x.reshape(()) if x.dtype == torch.bool else x.reshape(()) != 0)


@converter(
    torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__, torch.Tensor.tolist, torch.Tensor.numpy
)
def number(net, x, *arguments, **options):
    name = net.calls[-1][1].__name__
    if x.const is not None:
        with net.plainly():
            return getattr(x.const, name)(*arguments, **options)
    raise TraceError(
        f"{net.where()}{name} asks for values that only the data has (a size or a loop that depends on them?); take "
        "sizes from shapes, as x.shape[1], or pass the number in when tracing"
    )


@converter(torch.ops.higher_order.cond)
def cond(net, condition, yes, no, operands=()):
    """Both branches, chosen between by value: they have no side effects."""
    if not isinstance(condition, torch.Tensor):
        return (yes if condition else no)(*operands)
    (a, spec), (b, other) = (tree_flatten(branch(*operands)) for branch in (yes, no))
    if spec != other:
        raise TraceError(f"{net.where()}the branches of torch.cond return results of different kinds")
    return tree_unflatten([torch.where(condition, p, q) for p, q in zip(a, b, strict=True)], spec)


@converter(torch._shape_as_tensor)
def shape_as_tensor(net, x):
    return torch.tensor(list(x.shape))


@converter(
    *(aten.rand_like, aten.randn_like, aten.randint_like, aten.bernoulli, aten.rand, aten.randn, aten.randint),
    *(aten.normal, aten.multinomial, aten.randperm, aten.exponential, aten.uniform),
)
def random(net, *args, **kwargs):
    raise UncoveredOperation(
        f"{net.where()}{net.operation}: a network has no random numbers; call module.eval(), or pass them in as an "
        "input"
    )
