"""The table {torch function: converter} and the decorator that adds to it."""

import functools
import inspect

import torch

CONVERTERS = {}

KINDS = ("plain", "matmul", "float32")


def converter(*functions, kind="plain"):
    """Teaches the tracer a torch function.

    Args:
        functions: what the forward calls: `torch.foo`, `torch.Tensor.foo`, `torch.nn.functional.foo`,
            `torch.ops.library.name` or one of its overloads.
        kind: in which type it computes when the build asks for fp16 or bf16. "plain": the type of its inputs;
            "matmul": the low type; "float32": always float32, the result goes back to the type of the inputs.

    The decorated function gets `net` and then the torch function's own arguments, tensors being symbolic. It either
    calls other torch functions on them and returns the result, or adds TensorRT layers: `net.operand(x)` is x as a
    Node in the type to compute in, `Node.tensor` its `ITensor`, `net.network` the `INetworkDefinition`,
    `m3asr.trt.layers` the layers as functions of nodes; it then returns a Node (or a tuple of them) whose sizes and
    dtype are checked against what torch says of the same call.

        @trt.converter(torch.special.erfcx, kind="float32")
        def erfcx(net, x):
            return torch.exp(x * x) * torch.erfc(x)
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}; there are {', '.join(KINDS)}")

    def register(convert):
        convert.kind = kind
        for function in functions:
            CONVERTERS[function] = convert
        return convert

    return register


def find(function):
    """The converter of a function: its own, its overload packet's, or None."""
    found = CONVERTERS.get(function)
    if found is None and isinstance(function, torch._ops.OpOverload):
        found = CONVERTERS.get(function.overloadpacket)
    return found


@functools.cache
def _parameters(convert):
    """The names a converter's parameters have, after `net`."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset([n for n, p in inspect.signature(convert).parameters.items() if p.kind in kinds][1:])


def as_declared(convert, function, args, kwargs):
    """A call by torch's own keywords, as F.linear(input=x), for a converter that names its parameters otherwise."""
    if kwargs.keys() <= _parameters(convert):
        return args, kwargs
    declared = torch.overrides.get_testing_overrides().get(function)
    if declared is None:
        return args, kwargs
    try:
        bound = inspect.signature(declared).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a keyword that torch's list does not know, as memory_format
        return args, kwargs
    return bound.args, bound.kwargs


def name_of(function):
    """A function as a user would write it."""
    if isinstance(function, torch._ops.OpOverload):
        return f"torch.ops.{function.overloadpacket}"
    if isinstance(function, torch._ops.OpOverloadPacket):
        return f"torch.ops.{function}"
    return torch.overrides.resolve_name(function) or getattr(function, "__qualname__", repr(function))
