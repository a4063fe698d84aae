"""PyTorch is the TensorRT API: networks from unmodified forwards, plugins without CUDA. Knows nothing of speech."""

from . import layers
from .build import build, serialize
from .errors import BuildError, PluginError, TensorRTMissing, TraceError, TrtError, UncoveredOperation
from .table import converter
from .trace import Input, Network, trace

__all__ = [
    "BuildError",
    "Input",
    "Network",
    "PluginError",
    "TensorRTMissing",
    "TraceError",
    "TrtError",
    "UncoveredOperation",
    "build",
    "converter",
    "layers",
    "serialize",
    "trace",
]
