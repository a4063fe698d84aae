"""Views and writing in place: a network has neither, so a write makes a new value and passes it on to the base."""

import torch
from torch.utils._mode_utils import no_dispatch

from . import sizes
from .errors import TraceError, UncoveredOperation
from .tensor import SymTensor

aten = torch.ops.aten


def remember_views(tracer, function, args, kwargs, result):
    """Results that look into args[0] are tied to it, so that writing to either shows in the other."""
    results = result if isinstance(result, (list, tuple)) else [result]
    for i, view in enumerate(results):
        if not isinstance(view, SymTensor) or view is args[0]:
            continue

        def replay(base, i=i):
            again = tracer.dispatch(function, (base, *args[1:]), kwargs)
            return again[i] if isinstance(again, (list, tuple)) else again

        view.base, view.replay, view.seen = args[0], replay, args[0].version
        args[0].viewed = True
        view.look = function.overloadpacket, args[1:]


OTHER_SIZES = ("unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_")


def in_place(tracer, function, args, kwargs, symbolic, written):
    name = function._schema.name.split("::")[1]
    target = args[0] if written == [0] else None
    if name in OTHER_SIZES and isinstance(target, SymTensor) and not target.viewed:
        return _with_other_sizes(tracer, function, target, args, kwargs)
    if not symbolic and target is not None and isinstance(target, SymTensor):
        new = tracer.fold(_functional(tracer, function), args, kwargs)
    elif not symbolic and not any(isinstance(a, torch.Tensor) and not isinstance(a, SymTensor) for a in args):
        return tracer.fold(function, args, kwargs)
    elif target is None or not isinstance(target, SymTensor):
        raise TraceError(
            f"{tracer.where()}{name} writes into a tensor of the module (or into out=); a network has no state. Pass "
            "the tensor in as an input and return the new one"
        )
    else:
        new = tracer.dispatch(_functional(tracer, function), args, kwargs)
    if target.const is not None and target.const.untyped_storage().data_ptr() in tracer.weights:
        raise TraceError(
            f"{tracer.where()}{name} writes into a view of the module's own tensor; a network has no state"
        )
    if len(new.shape) != target.dim() or not all(map(sizes.equal, new.shape, target.shape)):
        raise TraceError(f"{tracer.where()}{name} changes the sizes of a tensor in place; use the form without '_'")
    if new.dtype != target.dtype:
        new = new.to(target.dtype)
    write(tracer, target, new)
    return target


def _with_other_sizes(tracer, function, target, args, kwargs):
    """y.unsqueeze_(0): the same values, seen otherwise from now on."""
    functional = _functional(tracer, function)
    new = tracer.dispatch(functional, args, kwargs)
    with no_dispatch():
        function(*args, **kwargs)  # the sizes that Python sees
    target.fake, target._node, target._const = new.fake, new._node, new._const
    if target.base is not None:
        before, rest = target.replay, args[1:]
        target.replay = lambda base: tracer.dispatch(functional, (before(base), *rest), kwargs)
        target.look = None, ()
    return target


def into_out(tracer, function, args, kwargs):
    """A call with out=: the same call without, whose results the tensors given there take."""
    out, rest = kwargs["out"], {k: v for k, v in kwargs.items() if k != "out"}
    plain = function.overloadpacket if isinstance(function, torch._ops.OpOverload) else function
    result = plain(*args, **rest)
    targets, results = ((t,) if isinstance(t, torch.Tensor) else tuple(t) for t in (out, result))
    for target, new in zip(targets, results, strict=True):
        if not isinstance(target, SymTensor):
            raise TraceError(
                f"{tracer.where()}out= names a tensor of the module; a network has no state. Use the result instead"
            )
        if len(new.shape) != target.dim() or not all(map(sizes.equal, new.shape, target.shape)):
            raise TraceError(f"{tracer.where()}out= names a tensor of other sizes; leave out= away")
        write(tracer, target, new if new.dtype == target.dtype else new.to(target.dtype))
    return out


def _functional(tracer, function):
    name = function._schema.name.split("::")[1]
    if name == "copy_":
        return aten.copy.default
    if name == "zero_":
        return aten.zeros_like.default
    packet = getattr(aten, name.rstrip("_"), None)
    wanted = [(a.name, str(a.type)) for a in function._schema.arguments]
    overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
    overload = next((o for o in overloads if [(a.name, str(a.type)) for a in o._schema.arguments] == wanted), None)
    if overload is None or not name.endswith("_"):
        raise UncoveredOperation(
            f"{tracer.where()}the in-place operation {name} has no form without '_' to use instead"
        )
    return overload


def write(tracer, target, new):
    """`target` takes the value of `new`; a view passes it on into its base."""
    target.become(new)
    if target.base is None:
        return
    base = target.base
    with torch._C.DisableTorchFunctionSubclass():
        write(tracer, base, _put_back(base, target, new))
    target.seen = base.version


SAME_ORDER = (
    *(aten.view, aten._unsafe_view, aten._reshape_alias, aten.reshape, aten.unsqueeze, aten.squeeze),
    *(aten.alias, aten.detach, aten.lift_fresh),
)


def _put_back(base, view, new):
    """The base with `new` where the view looks."""
    look, rest = view.look
    if look in SAME_ORDER:
        return new.reshape(base.shape)
    if look is aten.transpose:
        return new.transpose(*rest)
    if look is aten.t:
        return new.t()
    if look is aten.permute:
        order = [d % base.dim() for d in rest[0]]
        return new.permute([order.index(d) for d in range(base.dim())])
    # Where each element of the view lies in its base: the same view of 0, 1, 2, ...
    count = 1
    for s in base.shape:
        count = count * s
    index = view.replay(torch.arange(count).view(base.shape))
    return base.reshape(-1).scatter(0, index.reshape(-1), new.reshape(-1)).view(base.shape)
