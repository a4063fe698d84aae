"""Triton kernels of a training step, each with its gradient and what it computes in plain torch beside it.

A step is bound by memory and by launches, not by products: what these do in one pass takes PyTorch three to ten.
"""
