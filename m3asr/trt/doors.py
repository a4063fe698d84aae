"""The doors through which torch's calls come to a tracer (see tracer.py), and how torch is left as it was."""

import contextlib
import types
from unittest import mock

from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)


class Everything(TorchDispatchMode):
    """Catches calls without a symbolic tensor in them: torch.arange(x.shape[1]), torch.zeros(...)."""

    supports_higher_order_operators = True

    def __init__(self, tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with self:  # converters written as torch calls create tensors too
            return self.tracer.dispatch(function, args, kwargs or {})


def uncompiled():
    """torch.cond compiles itself, and what the compiler learns in here would break its later calls."""
    from torch._higher_order_ops import utils

    if not hasattr(utils, "_hop_compile_and_call"):
        return contextlib.nullcontext()
    return mock.patch.object(utils, "_hop_compile_and_call", lambda call, args, kw=None: call(*args, **(kw or {})))


@contextlib.contextmanager
def restored():
    """Torch's own clean-up fails where the stack overflows; what is left over would change every later torch call."""
    wanted = _get_current_dispatch_mode_stack()
    try:
        yield
    finally:
        now = _get_current_dispatch_mode_stack()
        if len(now) != len(wanted) or any(a is not b for a, b in zip(now, wanted, strict=True)):
            for _ in now:
                _pop_mode()
            for mode in wanted:
                _push_mode(mode)


_BODIES = {}
COMPOSED = ("torch.nn.functional", "torch.functional")


def body_of(function):
    """A Python function of torch.nn.functional without its opening question "does anybody override me?".

    Its body then runs on symbolic tensors, and the functions it calls come to the first door one by one.
    """
    if not isinstance(function, types.FunctionType) or function.__module__ not in COMPOSED:
        return None
    if function not in _BODIES:
        asks = [n for n in function.__code__.co_names if n.startswith("has_torch_function")]
        body = None
        if asks:
            no = {name: lambda *_: False for name in asks}
            body = types.FunctionType(
                function.__code__, {**function.__globals__, **no}, None, function.__defaults__, function.__closure__
            )
            body.__kwdefaults__ = function.__kwdefaults__
        _BODIES[function] = body
    return _BODIES[function]
