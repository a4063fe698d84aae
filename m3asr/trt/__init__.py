"""PyTorch is the TensorRT API: networks from unmodified forwards, plugins without CUDA. Knows nothing of speech."""

from . import layers
from .build import build, serialize
from .errors import BuildError, PluginError, TensorRTMissing, TraceError, TrtError, UncoveredOperation
from .plugin import OneKernel, cdiv, numel, plugin
from .plugin_check import check_plugin
from .table import converter
from .trace import Input, Network, trace

__all__ = [
    "BuildError",
    "Input",
    "Network",
    "OneKernel",
    "PluginError",
    "TensorRTMissing",
    "TraceError",
    "TrtError",
    "UncoveredOperation",
    "build",
    "cdiv",
    "check_plugin",
    "converter",
    "layers",
    "numel",
    "plugin",
    "serialize",
    "trace",
]
