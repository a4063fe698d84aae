"""int8 and fp8 by Q/DQ: scales from calibration, written around linear layers and convolutions while tracing.

The points that are quantised are the same in every trace of a module, so calibration interprets the unquantised
network on recorded inputs and reads the tensors at those points.
"""

import fnmatch
from dataclasses import dataclass, field

import torch

from . import layers as L
from .errors import TraceError
from .interpret import Interpreter

LARGEST = {"int8": 127.0, "fp8": 448.0}  # fp8 is e4m3


@dataclass(frozen=True)
class Quantization:
    """What `calibrate` found. kind: "int8" or "fp8"; largest: point -> largest |input| seen there.

    Weights get one scale an output channel, from their own values; activations one scale a tensor.
    """

    kind: str
    largest: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in LARGEST:
            raise TraceError(f"unknown quantisation {self.kind!r}; there are {', '.join(LARGEST)}")

    def wrap(self, net, point, x, weight, axis):
        """x and weight through quantise and dequantise, or as they are where nothing was calibrated."""
        amount = self.largest.get(point)
        if not amount or weight.source is None or net.pinned:
            return x, weight
        with net.plainly():
            value = weight.source.detach().float()
            others = [d for d in range(value.dim()) if d != axis]
            channels = value.abs().amax(others).clamp_min(1e-12) / LARGEST[self.kind]
        scale = net.constant(torch.full((), amount / LARGEST[self.kind]))
        return self._through(net, x, scale, None), self._through(net, weight, net.constant(channels), axis)

    def _through(self, net, node, scale, axis):
        low = getattr(net.trt, self.kind)
        original = node.dtype
        scale = L.cast(scale, original).tensor
        quantize = net.layer("quantize", node.tensor, scale, low)
        if axis is not None:
            quantize.axis = axis
        dequantize = net.layer("dequantize", net.output(quantize, node.shape).tensor, scale, original)
        if axis is not None:
            dequantize.axis = axis
        return net.output(dequantize, node.shape)


def calibrate(network, batches, kind="int8", *, include=("*",), exclude=()):
    """Interprets an unquantised network on batches of inputs and keeps the largest values.

    Args:
        network: from `trace(..., precision="fp32")`.
        batches: an iterable of {input name: tensor}.
        kind: "int8" or "fp8".
        include, exclude: shell patterns over the points, which are module paths; a module's second product is
            "path#2".

    Returns:
        Quantization, to be given to `trace` or `build`. Raises TraceError without any batch.
    """
    chosen = {
        point: name
        for point, name in network.points.items()
        if any(fnmatch.fnmatch(point, p) for p in include) and not any(fnmatch.fnmatch(point, p) for p in exclude)
    }
    largest = {}
    interpreter = Interpreter(network.network, network.package, network.values)
    for batch in batches:
        interpreter.run(batch)
        for point, name in chosen.items():
            value = interpreter.known.get(name)
            if value is not None and value.numel():
                largest[point] = max(largest.get(point, 0.0), float(value.abs().max()))
    if not largest:
        raise TraceError("calibration saw no batch or no point to quantise")
    return Quantization(kind, largest)
