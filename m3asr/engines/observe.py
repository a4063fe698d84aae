"""What stands between an engine's input and output, module by module, for the engines that can show it.

eager: hooks on the modules. onnx: a second session of the same graph and weights in which every node that adds or
applies the parameter `X.bias` shows its output as that of module X. tensorrt-interpreted: the tensors that the network
was told are the modules' outputs. Other engines show their outputs alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m3asr.engines import padded
from m3asr.model import MoEFeedForward


@dataclass
class Observation:
    """One batch through an engine.

    outputs: log_probs (B, S, V), hidden (B, S, D), lengths (B,). values: module path -> its output, in the order in
    which modules finish; empty for engines that show none. choices: path of each expert layer -> expert of each token
    int (B*S,). routers: likewise the probabilities float32 (B*S, E), by eager alone. not_finite: the first operation
    that gave a NaN or an infinity, and its module; None when all that was seen is finite.
    """

    outputs: tuple[np.ndarray, np.ndarray, np.ndarray]
    values: dict[str, np.ndarray] = field(default_factory=dict)
    choices: dict[str, np.ndarray] = field(default_factory=dict)
    routers: dict[str, np.ndarray] = field(default_factory=dict)
    not_finite: str | None = None


def observe(engine, features: np.ndarray, lengths: np.ndarray, **options) -> Observation:
    """features float32 (B, T, F), lengths int32 (B,), and the keywords of `Engine.__call__`; B from 1 on."""
    encoder = engine.config.encoder
    features, lengths = padded(features, lengths, encoder.input_dim, encoder.min_frames)
    special = {"eager": _eager, "onnx": _onnx, "tensorrt-interpreted": _interpreted}.get(engine.name)
    if special is not None:
        seen = special(engine, features, lengths, options)
    else:
        seen = Observation(engine(features, lengths, **options))
    if seen.not_finite is None:
        for name, output in zip(("log_probs", "hidden"), seen.outputs, strict=False):
            if not np.isfinite(output).all():
                seen.not_finite = f"the output {name}"
                break
    return seen


def _clean(values) -> bool:
    return all(np.isfinite(value).all() for value in values if value.dtype.kind == "f")


# eager


def _eager(engine, features, lengths, options) -> Observation:
    model = engine.model
    values, calls, choices, routers, handles = {}, {}, {}, {}, []

    def left(path):
        def hook(module, args, output):
            tensor = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
            calls[path] = calls.get(path, 0) + 1
            if tensor is not None and tensor.is_floating_point():
                values[path] = tensor.detach().float().cpu().numpy().copy()

        return hook

    def entered(path):
        def hook(module, args):  # experts(x, expert_idx)
            choices[path] = args[1].cpu().numpy()

        return hook

    def routed(path):
        def hook(module, args, output):
            logits = module.router_logits(*args).flatten(0, 1)
            routers[path] = torch.softmax(logits, dim=-1).cpu().numpy()

        return hook

    for path, module in model.named_modules():
        if isinstance(module, MoEFeedForward):
            handles.append(module.experts.register_forward_pre_hook(entered(path)))
            handles.append(module.register_forward_hook(routed(path)))
        if path and not isinstance(module, nn.Dropout):
            handles.append(module.register_forward_hook(left(path)))
    device = engine.device
    given = torch.from_numpy(features).to(device), torch.from_numpy(lengths).to(device)
    settings = options.get("chunk_size", 0), options.get("left_chunks", -1), options.get("compat", False)
    try:
        with torch.no_grad():
            outputs = tuple(output.cpu().numpy() for output in model(*given, *settings))
    finally:
        for handle in handles:
            handle.remove()
    values = {path: value for path, value in values.items() if calls[path] == 1}
    seen = Observation(outputs, values, choices, routers)
    if not _clean(outputs) or not _clean(values.values()):
        finder = _FirstNotFinite(model)
        with torch.no_grad(), finder:
            model(*given, *settings)
        seen.not_finite = finder.found
    return seen


class _FirstNotFinite(TorchDispatchMode):
    """Names the first torch operation, in order of execution, whose result holds a NaN or an infinity."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.found: str | None = None
        self._path, self._handles, self._model = [""], [], model

    def __enter__(self):
        for path, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(lambda m, a, path=path: self._path.append(path)))
            self._handles.append(module.register_forward_hook(lambda m, a, o: self._path.pop() and None))
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        # What is only allocated holds whatever stood there.
        if self.found is None and "empty" not in str(func):
            floating = [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            if not all(t.isfinite().all() for t in floating):
                given = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.is_floating_point()]
                cause = "" if all(t.isfinite().all() for t in given) else ", whose inputs or weights hold it already"
                self.found = f"{str(func)} in {self._path[-1] or 'the model'}{cause}"
        return outputs


# onnx


def _onnx(engine, features, lengths, options) -> Observation:
    import onnx_ir as ir

    outputs = engine(features, lengths, **options)
    model = ir.from_proto(ir.to_proto(ir.load(engine.graph_path)))
    taps, routers = {}, {}  # path -> value
    waiting = None  # a router whose choice has not come yet
    for node in model.graph:
        for value in node.inputs:
            name = "" if value is None else value.name
            if name not in model.graph.initializers:
                continue
            if name.endswith(".bias"):
                taps[name.removesuffix(".bias")] = node.outputs[0]
            if name.endswith(".router_weights"):
                waiting = name.removesuffix(".router_weights")
        if node.op_type == "ArgMax" and waiting is not None:
            routers[waiting], waiting = node.outputs[0], None
    results = _shown(engine, model, [*taps.values(), *routers.values()], features, lengths, options)
    values = {path: results[value.name] for path, value in taps.items()}
    seen = Observation(outputs, values, {path: results[value.name].reshape(-1) for path, value in routers.items()})
    if not _clean(outputs[:2]) or not _clean(values.values()):
        seen.not_finite = _first_node(engine, model, features, lengths, options)
    return seen


def _shown(engine, model, values, features, lengths, options) -> dict[str, np.ndarray]:
    """Runs the graph with further outputs: name of the value -> array."""
    import onnx_ir as ir

    have = {value.name for value in model.graph.outputs}
    new = [value for value in dict.fromkeys(values) if value.name not in have]
    model.graph.outputs.extend(new)
    try:
        graph = ir.to_proto(model).SerializeToString()
    finally:
        del model.graph.outputs[len(have) :]
    return engine.run_graph(graph, features, lengths, **options)


def _first_node(engine, model, features, lengths, options) -> str | None:
    """The first node, in the graph's order, whose output holds a NaN or an infinity."""
    nodes = [node for node in model.graph if node.op_type != "Constant"]
    results = _shown(engine, model, [v for node in nodes for v in node.outputs], features, lengths, options)
    place = "the model"
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.name in model.graph.initializers:
                part = re.sub(r"\[\d+\]$", "", value.name)
                if part.startswith(("encoder.", "cmvn.")):
                    place = part.rpartition(".")[0]
        if not _clean([results[value.name] for value in node.outputs if value.name in results]):
            return f"{node.op_type} ({node.name}) in or after {place}"
    return None


# the interpreted TensorRT network


def _interpreted(engine, features, lengths, options) -> Observation:
    from m3asr.trt.compare import first_not_finite
    from m3asr.trt.interpret import Interpreter

    engine.check_options(**options)
    network = engine.networks["encoder"]
    interpreter = Interpreter(network.network, network.package, network.values)
    out = interpreter.run({"feats": torch.from_numpy(features), "lengths": torch.from_numpy(lengths)})
    outputs = out["log_probs"].float().numpy(), out["hidden"].float().numpy(), out["out_lengths"].numpy()
    values = {}
    for path, tensor in network.modules.items():
        value, path = interpreter.known.get(tensor), path.removeprefix("model").removeprefix(".")
        if path and value is not None and value.dtype.is_floating_point:
            values[path] = value.float().numpy()
    choices = {}
    for layer in interpreter.layers:
        path, _, operation = layer.name.removeprefix("model.").partition("/")
        if interpreter.kind(layer) == "TOPK" and operation.startswith("max/"):
            known = interpreter.known.get(layer.get_output(1).name)
            if known is not None:
                choices[path] = known.numpy().reshape(-1)
    seen = Observation(outputs, values, choices)
    if not _clean(outputs[:2]) or not _clean(values.values()):
        seen.not_finite = first_not_finite(interpreter) or _first_layer(interpreter)
    return seen


def _first_layer(interpreter) -> str | None:
    """The first layer whose output is not finite, of those not made of constants alone: a weight may hold the NaN."""
    constants = set()
    for layer in interpreter.layers:
        outputs = [layer.get_output(i).name for i in range(layer.num_outputs)]
        inputs = [tensor.name for tensor in interpreter.inputs_of(layer) if tensor is not None]
        if all(name in constants for name in inputs):
            constants.update(outputs)
            continue
        for name in outputs:
            value = interpreter.known.get(name)
            if value is not None and value.dtype.is_floating_point and not value.isfinite().all():
                return f"{layer.name}, whose inputs or weights hold it already"
    return None
