"""Tracing a function of a batch of sequences, and comparing the network with the function at several sizes."""

import torch

import m3asr.trt as trt

RANGES = {"B": (1, 4, 16), "T": (4, 10, 60)}
X = {"x": trt.Input("float32", ("B", "T", 6))}


def traced(function, inputs=None, ranges=None, **options):
    return trt.trace(function, inputs or X, ranges or RANGES, **options)


def check(function, *shapes, inputs=None, tolerance=1e-6, **options):
    network = traced(function, inputs, **options)
    for shape in shapes or ((1, 4, 6), (3, 11, 6)):
        x = torch.randn(shape)
        with torch.no_grad():
            want = function(x)
        got = network.interpret([x])["output0"]
        assert got.shape == want.shape
        assert (got.double() - want.double()).abs().max() <= tolerance * want.abs().max().clamp_min(1)
    return network
