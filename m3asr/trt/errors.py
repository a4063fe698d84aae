"""What can go wrong between a module and a plan, each with one sentence that says what to do."""


class TrtError(Exception):
    """Base of every error of this package."""


class TensorRTMissing(TrtError):
    """Neither `tensorrt` nor `tensorrt_rtx` can be imported."""


class TraceError(TrtError):
    """The module's forward cannot become a network: found, where, and what to do about it."""


class UncoveredOperation(TraceError):
    """The forward calls a torch function that no converter covers."""


class BuildError(TrtError):
    """TensorRT refused the network; the message carries TensorRT's own words."""


class PluginError(TrtError):
    """A plugin's description is wrong, or its kernel departs from its reference."""
