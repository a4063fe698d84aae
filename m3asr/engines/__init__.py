"""Engines: (features, lengths) -> (log_probs, hidden, lengths), each its own way.

An engine knows frames and log-probabilities, nothing of files or text. `load_engine` picks one and says which.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from m3asr.config import ModelConfig
from m3asr.errors import MissingExtra, ModelError
from m3asr.folder import ModelFolder

if TYPE_CHECKING:
    from m3asr.engines.streaming import StreamState

# Frames of a chunk, or chunks before it: eleven hours, and the product is far from the end of 64 bits.
MOST_CHUNKS = 2**20
NAMES = ("onnx", "eager", "cuda", "tensorrt")


class Engine(Protocol):
    """What every engine offers."""

    name: str  # "eager", "onnx", ...
    device: str  # what it runs on, for people

    def __call__(
        self,
        features: np.ndarray,
        lengths: np.ndarray,
        *,
        compat: bool = False,
        chunk_size: int = 0,
        left_chunks: int = -1,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """features float32 (B, T, F), lengths int32 (B,) -> log_probs float32 (B, S, V), hidden float32 (B, S, D),
        lengths int32 (B,). Features are normalised unless the model does it itself; any T, also 0, is accepted.
        """

    def decode(
        self,
        hidden: np.ndarray,
        lengths: np.ndarray,
        tokens: np.ndarray,
        *,
        reversed_tokens: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The attention decoder over one utterance: hidden (1, S, D), lengths (1,), tokens int64 (N, L) from sos on,
        reversed_tokens likewise right to left -> log_probs (N, L, V), and the same right to left or None.
        """


class StreamingEngine(Engine, Protocol):
    """An engine that also works chunk by chunk, as onnx and eager do."""

    def stream_start(self) -> StreamState:
        """The state of a new stream. Raises ModelError for a model that cannot stream."""

    def stream_step(
        self, features: np.ndarray, lengths: np.ndarray, states: Sequence[StreamState], keep: int = -1
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[StreamState]]:
        """The next chunk of each of B streams, which need not be of one age.

        features float32 (B, T, F), lengths int32 (B,) with the subsampling's right context: T = (C - 1) * rate +
        min_frames for chunks of C encoder frames, and only a stream's last chunk may be shorter. keep: encoder frames
        that the next chunk sees, C * left_chunks, or below 0 for all. -> log_probs (B, C, V), hidden (B, C, D),
        lengths (B,), and the states after the chunk; the states given stay as they were.
        """


def available() -> dict[str, tuple[str, str]]:
    """Which engines can run here: name -> (device, "" or the reason why not)."""
    engines = {}
    for name, package, extra in (("onnx", "onnxruntime", ""), ("eager", "torch", "torch")):
        reason = ""
        if importlib.util.find_spec(package) is None:
            reason = f"{package} is not installed" + (f": pip install 'm3asr[{extra}]'" if extra else "")
        engines[name] = ("CPU", reason)
    engines["cuda"] = _cuda_here()
    engines["tensorrt"] = _tensorrt_here()
    return engines


def _cuda_here() -> tuple[str, str]:
    """The GPU's name, and "" or why the cuda engine cannot run."""
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            return "NVIDIA GPU", f"{package} is not installed: pip install 'm3asr[cuda]'"
    import torch

    if not torch.cuda.is_available():
        return "NVIDIA GPU", "no CUDA device is found"
    return torch.cuda.get_device_name(), ""


def _tensorrt_here() -> tuple[str, str]:
    """The GPU's name, and "" or why plans cannot run. They can be built without a GPU."""
    try:
        need_tensorrt("it")
    except MissingExtra as error:
        return "NVIDIA GPU", f"neither tensorrt_rtx nor tensorrt is installed: pip install 'm3asr[{error.extra}]'"
    import torch

    if not torch.cuda.is_available():
        return "NVIDIA GPU", "no CUDA device is found; plans can be built"
    device = torch.cuda.get_device_name()
    if importlib.util.find_spec("tensorrt") is None:
        import tensorrt_rtx

        known = [name for name in tensorrt_rtx.ComputeCapability.__members__ if name.startswith("SM")]
        here = "SM{}{}".format(*torch.cuda.get_device_capability())
        if here not in known:
            return device, f"tensorrt_rtx runs on {', '.join(known)}, this GPU is {here}; full TensorRT is needed"
    return device, ""


def load_engine(folder: ModelFolder, name: str = "auto", *, threads: int = 0) -> Engine:
    """Load an engine for a model. "auto" is onnx, the default everywhere; it never falls back to another one.

    threads: 0 leaves the number to the library. Raises ModelError for an unknown name or a model without that engine,
    MissingExtra when its package is not installed.
    """
    if name in ("auto", "onnx"):
        from m3asr.engines.onnx import OnnxEngine

        return OnnxEngine(folder, threads=threads)
    if name == "eager":
        if importlib.util.find_spec("torch") is None:
            raise MissingExtra("the eager engine", "torch")
        from m3asr.engines.eager import EagerEngine

        return EagerEngine(folder, threads=threads)
    if name == "cuda":
        need_cuda("the cuda engine")
        from m3asr.engines.cuda.built import load

        return load(folder)
    if name == "tensorrt":
        need_tensorrt("the tensorrt engine")
        from m3asr.engines.tensorrt import TensorrtEngine

        return TensorrtEngine(folder, threads=threads)
    raise ModelError(f"there is no engine {name!r}; available: auto, {', '.join(NAMES)}")


def need_cuda(what: str) -> None:
    """Raises MissingExtra unless what the cuda engine imports is installed. A missing GPU is the engine's to report."""
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(what, "cuda")


def need_tensorrt(what: str) -> None:
    """Raises MissingExtra unless torch and one of the TensorRT packages are installed."""
    packages = [importlib.util.find_spec(name) for name in ("tensorrt_rtx", "tensorrt")]
    if importlib.util.find_spec("torch") is None or not any(packages):
        raise MissingExtra(what, "tensorrt")


def check_chunks(config: ModelConfig, chunk_size: int, left_chunks: int = -1) -> None:
    """Raises ModelError for chunks that the model does not work in: an engine would ignore them without a word; and for
    numbers past any recording, which would overflow."""
    for option, value in (("--chunk-size", chunk_size), ("--left-chunks", left_chunks)):
        if value > MOST_CHUNKS:
            raise ModelError(f"{option}: found {value}, expected at most {MOST_CHUNKS}")
    if chunk_size > 0 and not config.encoder.use_dynamic_chunk:
        raise ModelError("--chunk-size: this model was not trained on dynamic chunks (use_dynamic_chunk is false)")
    fixed = config.encoder.static_chunk_size > 0 and not config.encoder.use_dynamic_chunk
    if left_chunks >= 0 and chunk_size <= 0 and not fixed:
        raise ModelError("--left-chunks: there are no chunks, the utterance is seen whole; give --chunk-size too")


def no_utterances(config: ModelConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What an engine gives for a batch of none: log_probs (0, 0, V), hidden (0, 0, D), lengths (0,)."""
    widths = config.vocab_size, config.encoder.attention_dim
    return *(np.zeros((0, 0, width), np.float32) for width in widths), np.zeros(0, np.int32)


def padded(features: np.ndarray, lengths: np.ndarray, input_dim: int, min_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Check a batch and lengthen it to the fewest frames that the convolutions take.

    Raises ModelError for other ranks, widths, counts, lengths past the frames, NaN or infinite values inside them.
    """
    features, lengths = np.asarray(features), np.asarray(lengths)
    if features.ndim != 3 or features.shape[2] != input_dim:
        raise ModelError(f"features have shape {features.shape}, the model reads (batch, frames, {input_dim})")
    if lengths.shape != features.shape[:1]:
        raise ModelError(f"lengths have shape {lengths.shape} for a batch of {features.shape[0]}: expected one each")
    if not np.issubdtype(lengths.dtype, np.integer) or not np.issubdtype(features.dtype, np.floating):
        raise ModelError(f"features are {features.dtype} and lengths {lengths.dtype}: expected float32 and integers")
    if lengths.size and (lengths.min() < 0 or lengths.max() > features.shape[1]):
        raise ModelError(
            f"lengths reach from {lengths.min()} to {lengths.max()}, features have {features.shape[1]} frames"
        )
    features = features.astype(np.float32, copy=False)
    inside = np.arange(features.shape[1]) < lengths[:, None]  # (B, T)
    if not np.isfinite(np.where(inside, np.abs(features).max(axis=-1, initial=0.0), 0.0)).all():
        raise ModelError("features hold NaN or infinite values inside an utterance")
    if features.shape[1] < min_frames:
        features = np.pad(features, ((0, 0), (0, min_frames - features.shape[1]), (0, 0)))
    return np.ascontiguousarray(features), np.ascontiguousarray(lengths, dtype=np.int32)
