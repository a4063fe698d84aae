"""Evaluates a finished network in torch on the CPU, layer by layer, following TensorRT's documented semantics."""

import torch

from . import interpret_nn  # noqa: F401 - its layers register themselves
from .errors import TrtError
from .interpret_layers import EVALUATE, class_of


class Interpreter:
    """Walks an INetworkDefinition.

    Args:
        network: the finished INetworkDefinition, built by this package or by anything else.
        package: the Package it belongs to.
        values: constant layer name -> torch tensor, for constants that TensorRT cannot read back (bf16, fp8).
    """

    def __init__(self, network, package, values=None):
        self.network, self.package, self.trt = network, package, package.module
        self.values = values or {}
        self.layers, self.kinds = [], {}
        self.producer = {}  # tensor name -> (layer, output index)
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            kind = layer.type  # read before the downcast: some classes have their own `type`
            layer.__class__ = class_of(self.trt, kind)
            self.layers.append(layer)
            self.kinds[layer.name] = kind.name
            for j in range(layer.num_outputs):
                self.producer[layer.get_output(j).name] = (layer, j)
        self._in_loop = self._loop_members()

    def kind(self, layer):
        return self.kinds[layer.name]

    def run(self, inputs, record=None):
        """name -> tensor; `record`, a dict, receives {layer name: first output} in order of evaluation."""
        known = self.known = {}  # tensor name -> value, of the last run
        for i in range(self.network.num_inputs):
            tensor = self.network.get_input(i)
            if tensor.name not in inputs:
                raise TrtError(f"input {tensor.name!r} is missing; the network takes {self.input_names()}")
            value = torch.as_tensor(inputs[tensor.name]).to(self.package.torch_dtype(tensor.dtype))
            if len(tensor.shape) != value.dim() or any(
                d >= 0 and d != s for d, s in zip(tuple(tensor.shape), value.shape, strict=True)
            ):
                raise TrtError(
                    f"input {tensor.name!r} has shape {tuple(value.shape)}, the network {tuple(tensor.shape)}"
                )
            known[tensor.name] = value
        self.record = record
        with torch.no_grad():
            names = [self.network.get_output(i).name for i in range(self.network.num_outputs)]
            return {name: self.value(name, known) for name in names}

    def input_names(self):
        return [self.network.get_input(i).name for i in range(self.network.num_inputs)]

    def value(self, name, known):
        """The tensor of that name; evaluates what it needs first, without recursion (networks are deep)."""
        stack = [name]
        while stack:
            wanted = stack[-1]
            if wanted in known:
                stack.pop()
                continue
            layer, _ = self.producer[wanted]
            needs = [t for t in self.needs(layer) if t not in known]
            if needs:
                stack.extend(needs)
                continue
            self.evaluate(layer, known)
        return known[name]

    def inputs_of(self, layer):
        return [layer.get_input(i) for i in range(layer.num_inputs)]

    def needs(self, layer):
        if self.kind(layer) == "LOOP_OUTPUT":
            return self.loop_needs(layer)
        return [t.name for t in self.inputs_of(layer) if t is not None]

    def evaluate(self, layer, known):
        kind = self.kind(layer)
        if kind == "LOOP_OUTPUT":
            return self.evaluate_loop(layer, known)
        evaluate = EVALUATE.get(kind)
        if evaluate is None:
            raise TrtError(f"layer {layer.name!r} of type {kind} is unknown to the interpreter")
        given = [None if t is None else known[t.name] for t in self.inputs_of(layer)]
        try:
            outputs = evaluate(self, layer, given)
        except (RuntimeError, IndexError, ValueError) as error:
            shapes = [None if g is None else (tuple(g.shape), str(g.dtype)) for g in given]
            raise TrtError(f"layer {layer.name!r} ({kind}) fails on inputs {shapes}: {error}") from error
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        for i, out in enumerate(outputs):
            tensor = layer.get_output(i)
            stated = self.package.torch_dtype(tensor.dtype)
            if out.dtype != stated:
                raise TrtError(f"layer {layer.name!r} ({kind}) gave {out.dtype} where TensorRT states {stated}")
            if len(tensor.shape) != out.dim() or any(
                d >= 0 and d != s for d, s in zip(tuple(tensor.shape), out.shape, strict=True)
            ):
                raise TrtError(
                    f"layer {layer.name!r} ({kind}) gave {tuple(out.shape)} where TensorRT states {tuple(tensor.shape)}"
                )
            known[tensor.name] = out
        if self.record is not None:
            self.record[layer.name] = outputs[0]

    # loops

    def _loop_members(self):
        """Loop name -> its boundary layers, and the names of layers that change from step to step."""
        self.loops = {}
        for layer in self.layers:
            if self.kind(layer) in ("RECURRENCE", "ITERATOR", "TRIP_LIMIT", "LOOP_OUTPUT"):
                self.loops.setdefault(layer.loop.name, []).append(layer)
        changing = {}
        for name, members in self.loops.items():
            changed = {m.get_output(0).name for m in members if self.kind(m) in ("RECURRENCE", "ITERATOR")}
            grew = True
            while grew:
                grew = False
                for layer in self.layers:
                    if self.kind(layer) in ("LOOP_OUTPUT", "RECURRENCE", "ITERATOR"):
                        continue
                    if any(t is not None and t.name in changed for t in self.inputs_of(layer)):
                        new = {layer.get_output(j).name for j in range(layer.num_outputs)} - changed
                        grew |= bool(new)
                        changed |= new
            changing[name] = changed
        return changing

    def _members(self, layer, kind):
        return [m for m in self.loops[layer.loop.name] if self.kind(m) == kind]

    def loop_needs(self, layer):
        """What has to be known before a loop runs: all that its body takes from outside."""
        changed, needs, seen = self._in_loop[layer.loop.name], [], set()
        for m in self._members(layer, "TRIP_LIMIT") + self._members(layer, "ITERATOR"):
            needs.append(m.get_input(0).name)
        stack = [layer.get_input(0).name]
        for m in self._members(layer, "RECURRENCE"):
            needs.append(m.get_input(0).name)
            stack.append(m.get_input(1).name)
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            producer = self.producer.get(name)
            if name not in changed:
                needs.append(name)
            elif self.kind(producer[0]) not in ("RECURRENCE", "ITERATOR"):
                stack.extend(t.name for t in self.inputs_of(producer[0]) if t is not None)
        return needs

    def evaluate_loop(self, layer, known):
        """Runs the loop once for all of its outputs."""
        limit = self._members(layer, "TRIP_LIMIT")[0]
        iterators, recurrences = self._members(layer, "ITERATOR"), self._members(layer, "RECURRENCE")
        outputs = self._members(layer, "LOOP_OUTPUT")
        count = int(known[limit.get_input(0).name])
        states = [known[r.get_input(0).name] for r in recurrences]
        changed = self._in_loop[layer.loop.name]
        outside = {k: v for k, v in known.items() if k not in changed}
        kinds = [str(o.kind).rsplit(".", 1)[-1] for o in outputs]
        collected = [[] for _ in outputs]
        for step in range(count):
            inside = dict(outside)
            for iterator in iterators:
                values = known[iterator.get_input(0).name]
                at = values.shape[iterator.axis] - 1 - step if iterator.reverse else step
                inside[iterator.get_output(0).name] = values.select(iterator.axis, at)
            for recurrence, state in zip(recurrences, states, strict=True):
                inside[recurrence.get_output(0).name] = state
            for kept, output, kind in zip(collected, outputs, kinds, strict=True):
                if kind != "LAST_VALUE":
                    kept.append(self.value(output.get_input(0).name, inside))
            states = [self.value(r.get_input(1).name, inside) for r in recurrences]
        last = {r.get_output(0).name: s for r, s in zip(recurrences, states, strict=True)}
        for output, kind, kept in zip(outputs, kinds, collected, strict=True):
            name = output.get_output(0).name
            if kind == "LAST_VALUE":
                known[name] = last[output.get_input(0).name]
            else:
                known[name] = torch.stack(kept if kind == "CONCATENATE" else kept[::-1], output.axis)
            if self.record is not None:
                self.record[output.name] = known[name]
