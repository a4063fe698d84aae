"""While a forward runs, `isinstance`, `max`, `min` and `torch.tensor` take a symbolic size for the int it stands for.

torch.SymInt is no int to Python, so `if isinstance(offset, int)` would take the wrong way, and `max(a, b)` would have
to know which is larger. The names are put into the namespaces of the forward's own package and taken out again.
"""

import builtins
import contextlib
import functools
import sys
import types
from unittest import mock

import torch

STANDS_FOR = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


def _isinstance(value, kinds):
    if builtins.isinstance(value, kinds):
        return True
    stands_for = STANDS_FOR.get(type(value))
    return stands_for is not None and issubclass(stands_for, kinds)


def _extreme(name, of_two):
    ordinary = getattr(builtins, name)

    def extreme(*values, **options):
        given = values[0] if len(values) == 1 and builtins.isinstance(values[0], (list, tuple)) else values
        if options or len(given) < 2 or not any(type(v) in (torch.SymInt, torch.SymFloat) for v in given):
            return ordinary(*values, **options)
        found = given[0]
        for value in given[1:]:
            found = of_two(found, value)
        return found

    return extreme


NAMES = {
    "isinstance": _isinstance,
    "max": _extreme("max", torch.sym_max),
    "min": _extreme("min", torch.sym_min),
}


def _numbers(function):
    """torch.tensor and torch.as_tensor, also of a list with symbolic sizes in it."""

    def made(data, *args, **kwargs):
        if not _symbolic(data):
            return function(data, *args, **kwargs)
        dtype = kwargs.get("dtype")
        return _stacked(data) if dtype is None else _stacked(data).to(dtype)

    return made


def _symbolic(data):
    return type(data) in STANDS_FOR or (isinstance(data, (list, tuple)) and any(_symbolic(d) for d in data))


def _stacked(data):
    if isinstance(data, (list, tuple)):
        parts = [_stacked(d) for d in data]
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in parts))
        return torch.stack([p.to(dtype) for p in parts])
    if isinstance(data, torch.Tensor):
        return data
    kind = STANDS_FOR.get(type(data), type(data))
    dtype = {bool: torch.bool, int: torch.int64}.get(kind, torch.get_default_dtype())
    return torch.ops.aten.scalar_tensor(data, dtype=dtype)


ATTENTION = torch.nn.functional.scaled_dot_product_attention


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
    """`is_causal=size > 1` gives torch a bool: it takes no symbolic one."""
    return ATTENTION(query, key, value, attn_mask, dropout_p, bool(is_causal), **kwargs)


def _package(name):
    return name.partition(".")[0]


def _namespaces(module):
    """Of the modules' classes, and of what those files import from their own package."""
    if isinstance(module, torch.nn.Module):
        waiting = [vars(sys.modules[n]) for n in {type(m).__module__ for m in module.modules()} if n in sys.modules]
        waiting += [vars(m)[k].__globals__ for m in module.modules() for k in vars(m) if _is_function(vars(m)[k])]
    else:
        waiting = [getattr(module, "__globals__", {})]
    found = {}
    while waiting:
        space = waiting.pop()
        name = space.get("__name__", "torch")
        if id(space) in found or _package(name) == "torch" or f"{name}.".startswith(f"{__package__}."):
            continue
        found[id(space)] = space
        for value in list(space.values()):
            if _is_function(value):
                other = value.__globals__
            elif isinstance(value, type) and value.__module__ in sys.modules:
                other = vars(sys.modules[value.__module__])
            elif isinstance(value, types.ModuleType):
                other = vars(value)
            else:
                continue
            if _package(other.get("__name__", "torch")) == _package(name):
                waiting.append(other)
    return list(found.values())


def _is_function(value):
    return isinstance(value, types.FunctionType)


@contextlib.contextmanager
def known_to_python(module):
    changed = []
    try:
        for space in _namespaces(module):
            for name, replacement in NAMES.items():
                if name not in space:
                    changed.append((space, name, None))
                    space[name] = replacement
            for name in [n for n, value in space.items() if value is ATTENTION]:
                changed.append((space, name, ATTENTION))
                space[name] = _attention
        with (
            mock.patch.object(torch, "tensor", _numbers(torch.tensor)),
            mock.patch.object(torch, "as_tensor", _numbers(torch.as_tensor)),
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention),
        ):
            yield
    finally:
        for space, name, before in changed:
            if before is None:
                del space[name]
            else:
                space[name] = before
