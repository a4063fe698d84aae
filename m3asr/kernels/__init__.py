"""Triton kernels of the CUDA engine: one file an operation, each the kernel and its launcher.

Every launcher writes into tensors that its caller allocated, never reads a value back to the host, and takes `pdl`:
True on cards with programmatic dependent launch, where a kernel starts while its predecessor still runs, loads its
weights, and waits (`pieces.wait`) before it touches anything that another kernel wrote.
"""
