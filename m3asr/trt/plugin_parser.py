"""How a plugin layer comes into a network. Full TensorRT: `add_plugin_v3`. tensorrt_rtx: only its ONNX parser adds
plugins, and only to an empty network; so the forward runs twice there, once to learn which plugins it calls, and once
on a network that begins with them.
"""

import ctypes
import os
import platform
import struct
import tempfile

from . import layers, plugin_v3
from .errors import BuildError
from .graph import Node
from .sizes import is_fixed

ONNX_TYPES = {"FLOAT": 1, "INT8": 3, "INT32": 6, "INT64": 7, "BOOL": 9, "HALF": 10, "BF16": 16}


def with_plugins(package, run):
    """run(prepare) traces once; prepare(tracer, network) is called before the forward."""
    if package.adds_plugins:

        def direct(tracer, network):
            tracer.plugin_layer = lambda *call: _added(tracer, *call)

        return run(direct)
    calls = []

    def record(tracer, network):
        tracer.plugin_layer = lambda *call: _placeholder(tracer, calls, *call)

    traced = run(record)
    if not calls:
        return traced

    def splice(tracer, network):
        parser, found = _parsed(package, network, calls)
        tracer.keep = parser  # its weights belong to the network until that is built
        waiting = iter(found)
        tracer.plugin_layer = lambda *call: _spliced(tracer, next(waiting), *call)

    return run(splice)


def _placeholder(tracer, calls, description, nodes, attributes, shapes, dtypes):
    _check_aot(tracer.package, description)
    at = len(calls)
    inputs = [(n.dtype.name, [_small(s) for s in n.shape]) for n in nodes]
    calls.append((description, inputs, attributes, [d.name for d in dtypes]))
    outputs = []
    for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        dims = tracer.trt.Dims([int(s) if is_fixed(s) else -1 for s in shape])
        outputs.append(Node(tracer, tracer.network.add_input(f"__plugin{at}_{i}", dtype, dims), shape))
    return outputs


def _small(size):
    return min(int(size), 4) if is_fixed(size) else 4


def _added(tracer, description, nodes, attributes, shapes, dtypes):
    if description.aot:
        layer = _compiled(tracer, description, nodes, attributes)
        return _outputs(tracer, tracer.named(layer, "plugin"), shapes)
    plugin_v3.register(tracer.package, description)
    instance = plugin_v3.plugin_class(tracer.package)(description, attributes)
    layer = tracer.network.add_plugin_v3([n.tensor for n in nodes], [], instance)
    return _outputs(tracer, tracer.named(layer, "plugin"), shapes)


def _compiled(tracer, description, nodes, attributes):
    """NOT EXECUTED HERE: needs full TensorRT and the GPU that the plan is for."""
    import torch

    from . import plugin_aot

    _check_aot(tracer.package, description)
    major, minor = torch.cuda.get_device_capability()
    operator = plugin_aot.declare(tracer.package, description, attributes, 10 * major + minor)
    return tracer.network.add_plugin(operator(*(n.tensor for n in nodes)), aot=True)


def _check_aot(package, description):
    if description.aot and not package.adds_aot_plugins:
        raise BuildError(
            f"plugin {description.name!r} wants its kernel inside the plan (aot=True): {package} cannot do that, full "
            "TensorRT from 10.9 on can; declare it without aot"
        )


def _spliced(tracer, layer, description, nodes, attributes, shapes, dtypes):
    for i, node in enumerate(nodes):
        layer.set_input(i, node.tensor)
    return _outputs(tracer, tracer.named(layer, "plugin"), shapes)


def _outputs(tracer, layer, shapes):
    return [tracer.output(layer, shape, i) for i, shape in enumerate(shapes)]


def _parsed(package, network, calls):
    """Parses an ONNX model of plugin nodes on constants into the empty network -> parser, plugin layers in order."""
    from onnx import TensorProto, helper

    make_findable(package)
    nodes, initializers, outputs = [], [], []
    for at, (description, inputs, attributes, types) in enumerate(calls):
        plugin_v3.register(package, description)
        names = []
        for i, (dtype, dims) in enumerate(inputs):
            kind = ONNX_TYPES[dtype]
            width = {1: 4, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 16: 2}[kind]
            count = 1
            for d in dims:
                count *= d
            names.append(f"__dummy{at}_{i}")
            initializers.append(TensorProto(data_type=kind, dims=dims, name=names[-1], raw_data=bytes(count * width)))
        results = [f"__plugin{at}_{i}" for i in range(len(description.dtypes))]
        # Attributes cross as float, int or string; a flag as 0 or 1.
        crossing = {k: int(v) if isinstance(v, bool) else v for k, v in attributes.items()}
        nodes.append(
            helper.make_node(
                description.name,
                names,
                results,
                name=f"__plugin{at}",
                plugin_version=description.version,
                plugin_namespace=description.namespace,
                **crossing,
            )
        )
        outputs += [helper.make_tensor_value_info(r, ONNX_TYPES[t], None) for r, t in zip(results, types, strict=True)]
    graph = helper.make_graph(nodes, "plugins", [], outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    parser = package.module.OnnxParser(network, package.logger)
    if not parser.parse(model.SerializeToString()):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise BuildError(f"{package} did not take the plugins: {errors} {package.logger.text()}")
    for i in reversed(range(network.num_outputs)):
        network.unmark_output(network.get_output(i))
    found = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == package.module.LayerType.PLUGIN_V3:
            found.append(layer)
        else:
            layer.name = f"__unused{i}"
    if len(found) != len(calls):
        raise BuildError(f"{package} parsed {len(found)} plugin layers of {len(calls)}")
    return parser, found


def plugin_call(tracer, description, tensors, attributes):
    """The converter behind a plugin called in a forward."""
    nodes = [tracer.operand(t) for t in tensors]
    shapes = description.output_shapes([n.shape for n in nodes], attributes)
    dtypes = description.output_dtypes([n.dtype for n in nodes])
    import torch

    dtypes = [tracer.package.dtype(getattr(torch, d)) if isinstance(d, str) else d for d in dtypes]
    return [layers.cast(n, n.dtype) for n in tracer.plugin_layer(description, nodes, attributes, shapes, dtypes)]


def make_findable(package):
    """The parser loads `libtensorrt_rtx.so`, the wheel ships `libtensorrt_rtx.so.1`, and a miss aborts the process.

    A library of that name which contains nothing and needs the real one is written and loaded before.
    """
    if not package.is_rtx or platform.system() != "Linux":
        return
    try:
        ctypes.CDLL("libtensorrt_rtx.so")
        return
    except OSError:
        pass
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "libtensorrt_rtx.so")
        with open(path, "wb") as file:
            file.write(empty_library("libtensorrt_rtx.so", "libtensorrt_rtx.so.1"))
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            ctypes.CDLL("libtensorrt_rtx.so")  # by its name now, as the parser will ask
        except OSError as error:
            raise BuildError(
                f"the ONNX parser of {package} needs a libtensorrt_rtx.so: {error}; put a link of that name to "
                "libtensorrt_rtx.so.1 on LD_LIBRARY_PATH"
            ) from error


def empty_library(name, needs):
    """The bytes of a 64-bit ELF shared library without symbols, called `name`, that depends on `needs`."""
    machine = {"x86_64": 62, "aarch64": 183}[platform.machine()]
    strings = b"\0" + name.encode() + b"\0" + needs.encode() + b"\0"
    header, headers, dynamic_size = 64, 3 * 56, 8 * 16
    dynamic_at = header + headers
    hash_at = dynamic_at + dynamic_size
    symbols_at = hash_at + 16
    strings_at = symbols_at + 24
    total = strings_at + len(strings)
    dynamic = struct.pack(
        "<16Q",
        *(14, 1),  # SONAME
        *(1, 2 + len(name)),  # NEEDED
        *(4, hash_at),
        *(5, strings_at),
        *(6, symbols_at),
        *(10, len(strings)),
        *(11, 24),  # size of one symbol
        *(0, 0),
    )
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    elf = struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 3, 64, 0, 0)
    segments = b"".join(
        struct.pack("<IIQQQQQQ", kind, 6, at, at, at, size, size, align)
        for kind, at, size, align in (
            (1, 0, total, 4096),  # LOAD
            (2, dynamic_at, dynamic_size, 8),  # DYNAMIC
            (0x6474E551, 0, 0, 16),  # GNU_STACK: no executable stack
        )
    )
    empty_hash = struct.pack("<4I", 1, 1, 0, 0)
    return identity + elf + segments + dynamic + empty_hash + bytes(24) + strings
