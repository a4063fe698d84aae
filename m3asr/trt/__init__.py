"""PyTorch is the TensorRT API: networks from unmodified forwards, plugins without CUDA. Knows nothing of speech."""

from . import layers
from .build import build, serialize, write
from .compare import Comparison, compare
from .errors import BuildError, PluginError, TensorRTMissing, TraceError, TrtError, UncoveredOperation
from .package import Package
from .plugin import OneKernel, cdiv, numel, plugin
from .plugin_check import check_plugin
from .quantize import Quantization, calibrate
from .runtime import Engine
from .table import converter
from .trace import Input, Network, trace

__all__ = [
    "BuildError",
    "Comparison",
    "Engine",
    "Input",
    "Network",
    "OneKernel",
    "Package",
    "PluginError",
    "Quantization",
    "TensorRTMissing",
    "TraceError",
    "TrtError",
    "UncoveredOperation",
    "build",
    "calibrate",
    "cdiv",
    "check_plugin",
    "compare",
    "converter",
    "layers",
    "numel",
    "plugin",
    "serialize",
    "trace",
    "write",
]
