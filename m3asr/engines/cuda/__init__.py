"""The fast engine: Triton kernels, packed weights, one CUDA graph a batch shape."""

from m3asr.engines.cuda.engine import CudaEngine

__all__ = ["CudaEngine"]
