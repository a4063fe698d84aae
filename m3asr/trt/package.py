"""The two TensorRT packages, `tensorrt` (10.x, 11.x) and `tensorrt_rtx`: every difference between them is here."""

import importlib

import torch

from .errors import BuildError, TensorRTMissing

PACKAGES = ("tensorrt_rtx", "tensorrt")

# A builder without a GPU reports the missing driver as an error on every call; nothing is wrong then.
HARMLESS = ("catchCudaError", "cudaError 35", "CUDA initialization failure with error: 35")


class Package:
    """One importable TensorRT package, its logger, and what it can do.

    Args:
        name: "tensorrt", "tensorrt_rtx" or None for whichever is installed (`tensorrt_rtx` first: it builds
            without a GPU).

    Raises:
        TensorRTMissing: the package cannot be imported.
    """

    def __init__(self, name=None):
        names = PACKAGES if name is None else (name,)
        if name is not None and name not in PACKAGES:
            raise TensorRTMissing(f"no TensorRT package is called {name!r}; there are {', '.join(PACKAGES)}")
        for candidate in names:
            try:
                self.module = importlib.import_module(candidate)
            except ImportError:
                continue
            self.name = candidate
            break
        else:
            raise TensorRTMissing(
                f"found no {' or '.join(names)}; install one: pip install 'm3asr[tensorrt]' (tensorrt_rtx, builds "
                "without a GPU) or pip install tensorrt (full TensorRT)"
            )
        self.is_rtx = self.name == "tensorrt_rtx"
        self.version = tuple(int(part) for part in self.module.__version__.split(".")[:2])
        self.logger = _logger_class(self.module)()
        # Full TensorRT adds plugins through the network; tensorrt_rtx only through its ONNX parser.
        self.adds_plugins = hasattr(self.module.INetworkDefinition, "add_plugin_v3")
        # Python kernels baked into the plan (no Python at run time) came with 10.9 and are not in tensorrt_rtx.
        self.adds_aot_plugins = hasattr(self.module, "QuickPluginCreationRequest")

    def __repr__(self):
        return f"{self.name} {self.module.__version__}"

    def builder(self):
        self.logger.clear()
        builder = self.module.Builder(self.logger)
        if not builder:
            raise BuildError(f"{self} made no builder: {self.logger.text()}")
        return builder

    def network(self, builder):
        """An empty strongly typed network. 10.x needs the flag; 11.x and RTX ignore it."""
        flags = self.module.NetworkDefinitionCreationFlag
        strongly_typed = getattr(flags, "STRONGLY_TYPED", None)
        return builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))

    def config(self, builder, workspace=None, compute_capabilities=()):
        """A builder configuration. `compute_capabilities`, as ("SM89", "SM120"), exists in tensorrt_rtx only."""
        config = builder.create_builder_config()
        if workspace is not None:
            config.set_memory_pool_limit(self.module.MemoryPoolType.WORKSPACE, int(workspace))
        if compute_capabilities:
            if not self.is_rtx:
                raise BuildError(
                    f"{self} builds for the GPU it runs on; compute_capabilities={compute_capabilities!r} needs "
                    "tensorrt_rtx"
                )
            known = self.module.ComputeCapability.__members__
            config.num_compute_capabilities = len(compute_capabilities)
            for i, name in enumerate(compute_capabilities):
                if name not in known:
                    raise BuildError(f"unknown compute capability {name!r}; {self} knows {', '.join(known)}")
                config.set_compute_capability(known[name], i)
        return config

    def build(self, builder, network, config):
        """-> IHostMemory with the plan. Raises BuildError with what TensorRT logged."""
        self.logger.clear()
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildError(f"{self} refused the network: {self.logger.text() or 'without a reason'}")
        return plan

    def normalization(self, network, *arguments):
        """add_normalization_v2 came with 10.15; the first form means the same for what is built here."""
        add = getattr(network, "add_normalization_v2", None) or network.add_normalization
        return add(*arguments)

    def runtime(self):
        return self.module.Runtime(self.logger)

    def dtype(self, torch_dtype):
        """The TensorRT data type that carries a torch dtype: small integers ride in int32, float64 in float32."""
        return getattr(self.module, _CARRIED[torch_dtype])

    def torch_dtype(self, trt_dtype):
        return _TORCH[trt_dtype.name]


_CARRIED = {
    torch.float64: "float32",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "fp8",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int32",
    torch.int8: "int32",
    torch.uint8: "int32",
    torch.bool: "bool",
}

_TORCH = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


def _logger_class(module):
    class Logger(module.ILogger):
        """Keeps warnings and errors to quote them, prints nothing."""

        def __init__(self):
            module.ILogger.__init__(self)
            self.lines = []

        def log(self, severity, message):
            if severity <= module.ILogger.ERROR and not any(part in message for part in HARMLESS):
                self.lines.append(message)
                del self.lines[:-20]

        def clear(self):
            self.lines = []

        def text(self):
            return " | ".join(self.lines)

    return Logger
