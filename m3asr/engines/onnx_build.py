"""Builds the ONNX graphs of a model by exporting the PyTorch model's own forward.

The graphs hold no weights: every parameter stays an external tensor of its name in `model.safetensors`, which the
engine hands to ONNX Runtime. So one file of weights serves all engines, whatever its precision, and a graph depends
on `config.json` alone. The top-1 experts become one branch an expert with constant, hence prepacked, weights.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from m3asr import __version__
from m3asr.config import ModelConfig
from m3asr.engines.onnx import GRAPH_FORMAT
from m3asr.engines.streaming import cache_names, stream_start
from m3asr.errors import MissingExtra
from m3asr.model import Experts, Model, TransformerDecoder

OPSET = 18


class _SymbolicExperts(nn.Module):
    """Stands in for `Experts` during export: one opaque node, replaced by branches afterwards."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.w_1, self.w_2, self.activation = experts.w_1, experts.w_2, experts.activation

    def forward(self, x, expert_idx):
        weights = (self.w_1.weight, self.w_1.bias, self.w_2.weight, self.w_2.bias)
        attrs = {"activation": self.activation}
        return torch.onnx.ops.symbolic(
            "m3asr::Experts", (x, expert_idx, *weights), attrs=attrs, dtype=x.dtype, shape=x.shape, version=1
        )


class _EncoderGraph(nn.Module):
    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, feats, lengths, compat, chunk_size, left_chunks):
        return self.model(feats, lengths, chunk_size, left_chunks, compat)


class _StreamGraph(nn.Module):
    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, feats, lengths, offsets, cached, *caches):
        return self.model.stream(feats, lengths, offsets, cached, *caches)


def build(config: ModelConfig, config_digest: str, target: Path) -> None:
    """Write encoder.onnx, manifest.json, and what the model has of stream.onnx, decoder.onnx, reverse_decoder.onnx."""
    target.mkdir(parents=True, exist_ok=True)
    with FakeTensorMode():
        # Shapes are all that export needs: no memory is spent on weights.
        model = Model(config).eval()
        for name, module in list(model.named_modules()):
            if isinstance(module, Experts):
                model.set_submodule(name, _SymbolicExperts(module))
        graphs = {"encoder.onnx": _encoder(model)}
        if config.encoder.can_stream:
            graphs["stream.onnx"] = _stream(model)
        left, right = model.left_decoder, model.right_decoder
        if left is not None:
            graphs["decoder.onnx"] = _decoder(left, model)
        if right is not None and config.decoder.num_blocks == config.decoder.r_num_blocks:
            # The same graph on other weights; an export takes many seconds.
            old, new = _name(left, model), _name(right, model)
            graphs["reverse_decoder.onnx"] = _on_weights(graphs["decoder.onnx"], old, new)
        elif right is not None:
            graphs["reverse_decoder.onnx"] = _decoder(right, model)
    for name, graph in graphs.items():
        ir.save(graph, target / name)
    manifest = {
        "format_version": GRAPH_FORMAT,
        "m3asr": __version__,
        "opset": OPSET,
        "torch": torch.__version__,
        "config_sha256": config_digest,
        "weights": {name: _external_names(graph) for name, graph in graphs.items()},
    }
    (target / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _encoder(model: Model) -> ir.Model:
    """Inputs feats (B, T, F), lengths (B,), compat (), chunk_size (), left_chunks (), the last two where they act."""
    encoder = model.config.encoder
    frames = 4 * encoder.min_frames
    args = (
        torch.zeros(3, frames, encoder.input_dim),
        torch.zeros(3, dtype=torch.int32),
        torch.zeros((), dtype=torch.bool),
        torch.zeros((), dtype=torch.int64) if encoder.use_dynamic_chunk else 0,
        torch.zeros((), dtype=torch.int64) if encoder.use_dynamic_chunk or encoder.static_chunk_size else -1,
    )
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, None, None, None)
    names = ["feats", "lengths", "compat", "chunk_size", "left_chunks"]
    return _export(_EncoderGraph(model), args, shapes, names, ["log_probs", "hidden", "out_lengths"])


def _stream(model: Model) -> ir.Model:
    """Inputs feats (B, T, F), lengths (B,), offsets (B,), cached (B,), attention (blocks, B, H, t, 2K+1)... as
    `Model.stream`.
    """
    encoder = model.config.encoder
    frames = 4 * encoder.min_frames
    args = [torch.zeros(3, frames, encoder.input_dim), torch.zeros(3, dtype=torch.int32)]
    args += [torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)]
    caches = stream_start(encoder).caches
    batch, time, earlier = Dim.DYNAMIC, Dim.DYNAMIC, Dim.DYNAMIC
    shapes = [{0: batch, 1: time}, {0: batch}, {0: batch}, {0: batch}]
    cache_shapes = []
    for i, cache in enumerate(caches):
        size = list(cache.shape)
        size.insert(1, 3)
        if i % 2 == 0:
            size[3] = 5
        args.append(torch.zeros(size))
        cache_shapes.append({1: batch} if i % 2 else {1: batch, 3: earlier})
    names = cache_names(encoder)
    return _export(
        _StreamGraph(model),
        tuple(args),
        (*shapes, tuple(cache_shapes)),
        ["feats", "lengths", "offsets", "cached", *names],
        ["log_probs", "hidden", "out_lengths", *(f"new_{name}" for name in names)],
    )


def _decoder(decoder: TransformerDecoder, model: Model) -> ir.Model:
    """Inputs hidden (1, S, D), lengths (1,), tokens (N, L)."""
    args = (
        torch.zeros(1, 7, model.config.encoder.attention_dim),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(3, 5, dtype=torch.int64),
    )
    shapes = ({1: Dim.DYNAMIC}, None, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC})
    return _export(decoder, args, shapes, ["hidden", "lengths", "tokens"], ["log_probs"], _name(decoder, model))


def _name(part: nn.Module, model: Model) -> str:
    """What the names of a part's parameters begin with in the model's state_dict."""
    return next(name for name, module in model.named_modules() if module is part) + "."


def _on_weights(model: ir.Model, old: str, new: str) -> ir.Model:
    """A copy in which the weights called `old`... are those called `new`..."""
    model = ir.from_proto(ir.to_proto(model))
    initializers = model.graph.initializers
    for name, value in list(initializers.items()):
        del initializers[name]
        if name.startswith(old):
            value.name = new + name.removeprefix(old)
            _make_external(value, value.name, value.const_value.shape)
        initializers[value.name] = value
    return model


def _export(module: nn.Module, args, shapes, inputs: list[str], outputs: list[str], prefix: str = "") -> ir.Model:
    """Export a module whose parameters are `prefix` + their names in the model's state_dict."""
    parameters = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    inputs = [name for name, arg in zip(inputs, args, strict=True) if isinstance(arg, torch.Tensor)]
    # It warns of optional packages that have nothing to do with this model.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.export.export(
            module, args, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )
        try:
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,  # the runtime does, with the weights at hand
                verbose=False,
                input_names=inputs,
                output_names=outputs,
            )
        except ImportError:
            raise MissingExtra("building ONNX graphs", "torch") from None
    model = onnx_program.model
    for name, value in list(model.graph.initializers.items()):
        if name in parameters:
            del model.graph.initializers[name]
            value.name = prefix + name.removeprefix("model.")
            _make_external(value, value.name, value.const_value.shape)
            model.graph.initializers[value.name] = value
    for node in list(model.graph):
        if node.op_type == "Experts":
            _lower_experts(model.graph, node)
    used = {value.name for node in ir.traversal.RecursiveGraphIterator(model.graph) for value in node.inputs if value}
    for name in list(model.graph.initializers):
        if name not in used:
            del model.graph.initializers[name]
    model.opset_imports.pop("m3asr", None)
    for node in model.graph:
        node.metadata_props.clear()  # names of source files and lines of the machine that built it
        node.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name = "m3asr"
    return model


def _external_names(model: ir.Model) -> list[str]:
    """The initializers that the engine has to supply."""
    return [n for n, value in model.graph.initializers.items() if isinstance(value.const_value, ir.ExternalTensor)]


def _make_external(value: ir.Value, name: str, shape) -> None:
    """Declare an initializer whose data the engine supplies by name; nothing is read from this location."""
    value.const_value = ir.ExternalTensor(
        location="model.safetensors", offset=0, length=0, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name
    )
    value.shape, value.dtype = ir.Shape(shape), ir.DataType.FLOAT


def _lower_experts(graph: ir.Graph, node: ir.Node) -> None:
    """One branch an expert: the rows routed to it, two Gemms, and at the end all rows back to their places."""
    x, expert_idx, w_1, b_1, w_2, b_2 = node.inputs
    nodes: list[ir.Node] = []
    prefix = node.outputs[0].name

    def op(kind: str, *inputs, **attributes) -> ir.Value:
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        made = ir.Node("", kind, inputs, attrs, num_outputs=1, name=f"{prefix}.{len(nodes)}")
        made.outputs[0].name = f"{prefix}.{len(nodes)}.out"
        nodes.append(made)
        return made.outputs[0]

    def constant(value) -> ir.Value:
        return op("Constant", value=ir.tensor(value, dtype=ir.DataType.INT64))

    def slice_of(weights: ir.Value, e: int) -> ir.Value:
        name = f"{weights.name}[{e}]"
        value = ir.Value(name=name)
        _make_external(value, name, list(weights.const_value.shape)[1:])
        graph.initializers[name] = value
        return value

    rows, outputs = [], []
    for e in range(w_1.const_value.shape[0]):
        mine = op("Squeeze", op("NonZero", op("Equal", expert_idx, constant(e))), constant([0]))  # (n,)
        tokens = op("Gather", x, mine, axis=0)  # (n, D)
        hidden = op("Gemm", tokens, slice_of(w_1, e), slice_of(b_1, e), transB=1)  # (n, F)
        hidden = _activation(op, node.attributes["activation"].as_string(), hidden)
        outputs.append(op("Gemm", hidden, slice_of(w_2, e), slice_of(b_2, e), transB=1))  # (n, D)
        rows.append(mine)
    places = op("Unsqueeze", op("Concat", *rows, axis=0), constant([1]))  # (N, 1)
    # Every row is overwritten, so what the scatter starts from does not matter.
    result = op("ScatterND", x, places, op("Concat", *outputs, axis=0))  # (N, D)
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(node.outputs[0], result)
    graph.remove(node, safe=True)


def _activation(op, name: str, x: ir.Value) -> ir.Value:
    if name == "swish":
        return op("Mul", x, op("Sigmoid", x))
    if name == "gelu":
        half = op("Constant", value=ir.tensor(0.5, dtype=ir.DataType.FLOAT))
        one = op("Constant", value=ir.tensor(1.0, dtype=ir.DataType.FLOAT))
        root = op("Constant", value=ir.tensor(2.0**-0.5, dtype=ir.DataType.FLOAT))
        return op("Mul", op("Mul", x, half), op("Add", op("Erf", op("Mul", x, root)), one))
    if name == "hardtanh":
        low = op("Constant", value=ir.tensor(-1.0, dtype=ir.DataType.FLOAT))
        high = op("Constant", value=ir.tensor(1.0, dtype=ir.DataType.FLOAT))
        return op("Clip", x, low, high)
    return op({"relu": "Relu", "tanh": "Tanh", "selu": "Selu"}[name], x)
