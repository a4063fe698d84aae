"""A network against the module it came from: module by module, first departure, first NaN."""

from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves

from .interpret import Interpreter


@dataclass(frozen=True)
class Row:
    """One module's output. error: largest |difference| / largest |reference|; worst: index of that element."""

    path: str
    error: float
    worst: tuple
    got: float
    want: float


@dataclass(frozen=True)
class Comparison:
    """rows stand in the order in which the forward left the modules; the last is the whole ("")."""

    rows: list
    outputs: dict
    not_finite: str | None

    def first_departing(self, tolerance):
        """The first module whose error exceeds the tolerance, or None."""
        return next((r for r in self.rows if not r.error <= tolerance), None)

    @property
    def worst(self):
        return max(self.rows, key=lambda r: r.error if r.error == r.error else float("inf"))


def compare(network, module, inputs):
    """Interprets the network and runs the module itself on the same inputs, {name: tensor} -> Comparison.

    Only modules that run once and return a tensor of the same sizes are compared; `not_finite` names the first layer
    that made a NaN or infinity from finite inputs.
    """
    wanted, calls = {}, {}
    names = {id(m): n for n, m in module.named_modules()}
    handles = []

    def leave(m, args, output):
        path = names.get(id(m))
        leaves = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        if path is not None and leaves:
            calls[path] = calls.get(path, 0) + 1
            wanted.setdefault(path, leaves[0].detach().clone())

    handles.append(torch.nn.modules.module.register_module_forward_hook(leave))
    try:
        with torch.no_grad():
            module(**inputs) if network.by_name else module(*inputs.values())
    finally:
        for handle in handles:
            handle.remove()
    interpreter = Interpreter(network.network, network.package, network.values)
    outputs = interpreter.run(inputs)
    rows = []
    for path, tensor in network.modules.items():
        value, reference = interpreter.known.get(tensor), wanted.get(path)
        if value is not None and reference is not None and calls[path] == 1 and value.shape == reference.shape:
            rows.append(_row(path, value, reference))
    return Comparison(rows, outputs, first_not_finite(interpreter))


def _row(path, got, want):
    got, want = got.double(), want.double()
    if not want.numel():
        return Row(path, 0.0, (), 0.0, 0.0)
    finite = want.isfinite() & got.isfinite()
    same = (got == want) | (got.isnan() & want.isnan())
    difference = torch.where(same, 0.0, torch.where(finite, (got - want).abs(), torch.inf))
    at = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    scale = want[want.isfinite()].abs().max() if want.isfinite().any() else torch.ones(())
    error = float(difference[at] / scale.clamp_min(1e-30))
    return Row(path, error, at, float(got[at]), float(want[at]))


def first_not_finite(interpreter):
    """Of the interpreter's last run: the first layer with a NaN or infinity in its output and none in its inputs.

    Constants do not count (a mask of -inf is meant); None when every layer is clean.
    """

    def bad(name):
        value = interpreter.known.get(name)
        return value is not None and value.dtype.is_floating_point and not value.isfinite().all()

    for layer in interpreter.layers:
        outputs = [layer.get_output(i).name for i in range(layer.num_outputs)]
        if interpreter.kind(layer) == "CONSTANT" or not any(map(bad, outputs)):
            continue
        if not any(t is not None and bad(t.name) for t in interpreter.inputs_of(layer)):
            return layer.name
    return None
