"""The plugin object that TensorRT sees (IPluginV3) and its creator, made from a `Plugin`.

One class for every plugin and both packages. An instance holds its description and its attributes and nothing else:
`clone` costs a few bytes, and weights are inputs of the layer.
"""

import ctypes

import numpy as np
import torch

from .errors import PluginError
from .plugin import PLUGINS

_CLASSES = {}
_CREATORS = {}


class Size:
    """Arithmetic on TensorRT's dimension expressions, as shape functions write it."""

    def __init__(self, builder, expr, trt):
        self.builder, self.trt = builder, trt
        self.expr = builder.constant(int(expr)) if isinstance(expr, int) else expr

    def _with(self, operation, other, swap=False):
        other = other if isinstance(other, Size) else Size(self.builder, other, self.trt)
        a, b = (other, self) if swap else (self, other)
        made = self.builder.operation(getattr(self.trt.DimensionOperation, operation), a.expr, b.expr)
        return Size(self.builder, made, self.trt)

    def __add__(self, other):
        return self._with("SUM", other)

    __radd__ = __add__

    def __sub__(self, other):
        return self._with("SUB", other)

    def __rsub__(self, other):
        return self._with("SUB", other, True)

    def __mul__(self, other):
        return self._with("PROD", other)

    __rmul__ = __mul__

    def __floordiv__(self, other):
        return self._with("FLOOR_DIV", other)

    def __rfloordiv__(self, other):
        return self._with("FLOOR_DIV", other, True)


def tensor_at(pointer, shape, dtype, device):
    """The tensor that lies at an address; nothing is copied."""
    shape = tuple(int(s) for s in shape)
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    if not pointer:
        raise PluginError(f"a tensor of {shape} was handed over without an address")
    if device == "cpu":
        size = count * torch.empty(0, dtype=dtype).element_size()
        memory = (ctypes.c_char * size).from_address(pointer)
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
    # The interface knows no bfloat16 or float8: pass integers of that width and look at them again.
    width = torch.empty(0, dtype=dtype).element_size()
    interface = {
        "shape": shape,
        "typestr": f"{'|' if width == 1 else '<'}i{width}",
        "data": (pointer, False),
        "version": 3,
        "strides": None,
    }
    holder = type("Pointer", (), {"__cuda_array_interface__": interface})()
    return torch.as_tensor(holder, device="cuda").view(dtype)


def launch_at(description, attributes, inputs, outputs, workspace, device):
    """The plugin's launch on raw addresses: inputs and outputs are (shape, torch dtype, address)."""
    given = [tensor_at(address, shape, dtype, device) for shape, dtype, address in inputs]
    written = [tensor_at(address, shape, dtype, device) for shape, dtype, address in outputs]
    size = description.workspace_bytes([shape for shape, _, _ in inputs])
    description.launch_on(given, written, attributes, tensor_at(workspace, (size,), torch.uint8, device))


def plugin_class(package):
    """The IPluginV3 subclass for a package's bindings."""
    trt = package.module
    if package.name in _CLASSES:
        return _CLASSES[package.name]
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class TorchPlugin(*bases):
        def __init__(self, description, attributes):
            for base in bases:
                base.__init__(self)
            self.description, self.attributes = description, attributes
            self.plugin_name = description.name
            self.plugin_version = description.version
            self.plugin_namespace = description.namespace
            self.num_outputs = len(description.dtypes)

        def reference(self, *tensors):
            return self.description.reference(*tensors, **self.attributes)

        def get_capability_interface(self, kind):
            return self

        def clone(self):
            return TorchPlugin(self.description, self.attributes)

        def get_output_data_types(self, input_types):
            types = self.description.output_dtypes(list(input_types))
            return [package.dtype(getattr(torch, t)) if isinstance(t, str) else t for t in types]

        def get_output_shapes(self, inputs, shape_inputs, builder):
            shapes = [tuple(Size(builder, d[i], trt) for i in range(len(d))) for d in inputs]
            outputs = []
            for shape in self.description.output_shapes(shapes, self.attributes):
                dims = trt.DimsExprs(len(shape))
                for i, s in enumerate(shape):
                    dims[i] = s.expr if isinstance(s, Size) else builder.constant(int(s))
                outputs.append(dims)
            return outputs

        def supports_format_combination(self, position, in_out, num_inputs):
            description = in_out[position].desc
            if description.format != trt.TensorFormat.LINEAR:
                return False
            if position < num_inputs:
                return True
            given = [in_out[i].desc.type for i in range(num_inputs)]
            return description.type == self.get_output_data_types(given)[position - num_inputs]

        def configure_plugin(self, inputs, outputs):
            pass

        def on_shape_change(self, inputs, outputs):
            pass

        def attach_to_context(self, context):
            return self.clone()

        def get_workspace_size(self, inputs, outputs):
            return self.description.workspace_bytes([tuple(d.max) for d in inputs])

        def get_valid_tactics(self):
            return []

        def set_tactic(self, tactic):
            pass

        def get_fields_to_serialize(self):
            return trt.PluginFieldCollection([_field(trt, k, v) for k, v in self.attributes.items()])

        def enqueue(self, input_desc, output_desc, inputs, outputs, workspace, stream):
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                self.run(input_desc, output_desc, inputs, outputs, workspace, "cuda")

        def run(self, input_desc, output_desc, inputs, outputs, workspace, device):
            """`enqueue` without a stream, so that a test can drive it on the CPU."""

            def described(group, addresses):
                types = [package.torch_dtype(d.type) for d in group]
                return [(tuple(d.dims), t, a) for d, t, a in zip(group, types, addresses, strict=True)]

            given, written = described(input_desc, inputs), described(output_desc, outputs)
            launch_at(self.description, self.attributes, given, written, workspace, device)

    _CLASSES[package.name] = TorchPlugin
    return TorchPlugin


def _field(trt, name, value):
    if isinstance(value, str):
        return trt.PluginField(name, np.frombuffer(value.encode(), np.uint8).copy(), trt.PluginFieldType.CHAR)
    if isinstance(value, float):
        return trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)
    return trt.PluginField(name, np.array([int(value)], np.int32), trt.PluginFieldType.INT32)


def _creator_class(package):
    trt = package.module

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self, description):
            trt.IPluginCreatorV3One.__init__(self)
            self.description = description
            self.name = description.name
            self.plugin_version = description.version
            self.plugin_namespace = description.namespace
            empty = [trt.PluginField(n, np.array([]), _field_type(trt, p)) for n, p in description.attributes.items()]
            self.field_names = trt.PluginFieldCollection(empty)

        def create_plugin(self, name, fields, phase):
            values = {}
            for f in fields:
                if f.name in self.description.attributes:
                    values[f.name] = _read(f, self.description.attributes[f.name].annotation)
            return plugin_class(package)(self.description, self.description.bound(values))

    return Creator


def _field_type(trt, parameter):
    kinds = {str: "CHAR", float: "FLOAT32", int: "INT32", bool: "INT32"}
    return getattr(trt.PluginFieldType, kinds[parameter.annotation])


def _read(field, kind):
    data = field.data
    if kind is not str:
        return kind(np.asarray(data).reshape(-1)[0])
    if isinstance(data, str):
        return data
    return data.decode() if isinstance(data, bytes) else bytes(np.asarray(data).astype(np.uint8)).decode().rstrip("\0")


def register(package, description):
    """Makes a plugin known to TensorRT's registry, once a process; -> its creator."""
    key = package.name, description.namespace, description.name, description.version
    known = _CREATORS.get(key)
    if known is None or known.description is not description:
        registry = package.module.get_plugin_registry()
        if known is not None:
            registry.deregister_creator(known)
        creator = _creator_class(package)(description)
        registry.register_creator(creator, description.namespace)
        _CREATORS[key] = creator  # the registry does not keep Python creators alive
    return _CREATORS[key]


def register_all(package):
    """Every declared plugin: a process that loads a plan calls this first (`Engine` does)."""
    for description in PLUGINS.values():
        register(package, description)
