"""What several kernels share: tile sizes, activations, the wait of a dependent launch, a row's norm."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra import cuda


@dataclass(frozen=True)
class Tile:
    """How one launch is cut: output tile m x n, inner step k, and the warps and pipeline stages of a program."""

    m: int
    n: int
    k: int = 64
    warps: int = 4
    stages: int = 3

    def options(self, pdl: bool) -> dict:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        # Only where it is wanted: the interpreter does not know the option.
        return {**options, "launch_pdl": True} if pdl else options


def at_least_16(size: int) -> int:
    """The next power of two, and no smaller than a tensor-core operand may be."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def wait(PDL: tl.constexpr):
    """Let the next kernel start its prologue, and wait until everything before this kernel is finished and visible.

    Each program of each kernel of a chain must call this, also one that has nothing to do: a kernel's completion
    then implies that of all kernels before it.
    """
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activations of `m3asr.ops.ACTIVATIONS`, on float32."""
    if ACTIVATION == "swish":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "tanh":
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    elif ACTIVATION == "hardtanh":
        x = tl.minimum(tl.maximum(x, -1.0), 1.0)
    elif ACTIVATION == "selu":
        negative = 1.6732632423543772 * (tl.exp(tl.minimum(x, 0.0)) - 1.0)
        x = 1.0507009873554805 * tl.where(x > 0.0, x, negative)
    else:
        tl.static_assert(ACTIVATION == "none")
    return x


@triton.jit
def dot(a, b, acc, DOT: tl.constexpr):
    """acc + a b, accumulated in float32. DOT is Triton's input_precision; "upcast" makes the operands float32 first,
    for the interpreter, whose product of bfloat16 operands multiplies their bit patterns (triton 3.9).
    """
    if DOT == "upcast":
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=DOT)
    return acc


@triton.jit
def normalise(x, inside, width, eps):
    """(x - mean) / sqrt(var + eps) of each row, two passes over float32 (rows, BLOCK); zero outside the width."""
    mean = tl.sum(x, axis=1) / width
    x = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(x * x, axis=1) / width
    return x * (1.0 / tl.sqrt(variance + eps))[:, None]
