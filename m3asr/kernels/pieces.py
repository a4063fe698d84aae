"""What several kernels share: tile sizes, activations, the wait of a dependent launch, a row's norm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@dataclass(frozen=True)
class Tile:
    """How one launch is cut: output tile m x n, inner step k, and the warps and pipeline stages of a program.

    parts: so many programs share the sort of an expert's tokens, if they have counts. Above 1, a program of the
    depthwise convolution sums for the norms of all rows of a run together.
    copied: operands come by the card's copy engine. A product then runs so many programs a multiprocessor, which make
    one tile after another and fetch the next one's operands while they finish the last.
    stored: results, too, go by the copy engine, in so many slices of a tile's columns, a power of two: while they are
    under way the program multiplies on, and each slice needs few registers and little shared memory.
    """

    m: int
    n: int
    k: int = 64
    warps: int = 4
    stages: int = 3
    parts: int = 1
    copied: int = 0
    stored: int = 0

    def options(self, pdl: bool) -> dict:
        """Launch options of Triton."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        # Only where it is wanted: the interpreter does not know the option.
        return {**options, "launch_pdl": True} if pdl else options


def at_least_16(size: int) -> int:
    """The next power of two, and no smaller than a tensor-core operand may be."""
    return max(16, triton.next_power_of_2(size))


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; 3 stand for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; a Hopper card's stand for Triton's interpreter."""
    if device.type != "cuda":
        return 227 << 10
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]


@cache
def copies(device: torch.device) -> bool:
    """Whether the device has a copy engine. Without one a tile's copies become loads, one waiting for the other."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major >= 9


def copyable(tensor: torch.Tensor) -> bool:
    """Whether the copy engine takes tiles of this matrix: numbers of 16 bits, rows of whole 16 bytes."""
    return tensor.element_size() == 2 and storable(tensor) and copies(tensor.device)


def storable(tensor: torch.Tensor) -> bool:
    """Whether the copy engine writes tiles of this matrix: rows of whole 16 bytes."""
    size = tensor.element_size()
    return tensor.dim() == 2 and tensor.stride(0) * size % 16 == 0 and tensor.stride(1) == 1 and size in (2, 4)


@triton.jit
def release(PDL: tl.constexpr):
    """Let the next kernel begin its own prologue as soon as there is room for it: once each program called this or
    ended. First thing in a kernel.
    """
    if PDL:
        cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until everything before this kernel is finished and visible.

    Each program of each kernel of a chain must call this, also one that has nothing to do: a kernel's completion
    then implies that of all kernels before it.
    """
    if PDL:
        cuda.gdc_wait()


@triton.jit
def ask(ptr, size, BYTES: tl.constexpr):
    """Let this program's share of `size` bytes be brought into the L2 cache, BYTES at a time: what a wait is for is not
    known yet, weights are. Nothing waits for it, and what is behind the last whole BYTES is not asked for.
    """
    if BYTES:
        requests = size // BYTES
        for start in range(tl.program_id(0) * 128, requests, tl.num_programs(0) * 128):
            i = start + tl.arange(0, 128)
            each: tl.constexpr = BYTES // (ptr.dtype.element_ty.primitive_bitwidth // 8)
            tl.inline_asm_elementwise(
                "{.reg .pred p;\n setp.ne.s32 p, $2, 0;\n @p cp.async.bulk.prefetch.L2.global [$1], $3;\n"
                " mov.u32 $0, 0;}",
                "=r,l,r,r",
                [ptr + i.to(tl.int64) * each, (i < requests).to(tl.int32), tl.full((), BYTES, tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


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
def gated(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Gated linear unit of columns that alternate value, gate: (BLOCK_M, BLOCK_N) -> (BLOCK_M, BLOCK_N / 2)."""
    value, gate = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_N // 2, 2)))
    return value * tl.sigmoid(gate)


@triton.jit
def copied_product(
    a, w, row, col, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """The tile at (row, col) of a w^T, float32, its operands fetched by the copy engine."""
    if BLOCK_M < 64:
        # Turned: of few rows the weights are the operand that the matrix unit wants 64 high.
        turned = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            turned = dot(w.load([col, start]), tl.trans(a.load([row, start])), turned, DOT)
        acc = tl.trans(turned)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            acc = dot(a.load([row, start]), tl.trans(w.load([col, start])), acc, DOT)
    return acc


@triton.jit
def slices(x, COUNT: tl.constexpr):
    """x (M, N) cut into COUNT tensors (M, N / COUNT), left to right; a power of two."""
    if COUNT == 1:
        parts = (x,)
    else:
        halves = tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        parts = slices(left, COUNT // 2) + slices(right, COUNT // 2)
    return parts


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
    mean = mean_of(tl.sum(x, axis=1), width)
    x = tl.where(inside, x - mean[:, None], 0.0)
    variance = mean_of(tl.sum(x * x, axis=1), width)
    return x * (1.0 / tl.sqrt(variance + eps))[:, None]


@triton.jit
def mean_of(total, width):
    """total / width, rounded to nearest. Plain division compiles to an approximation that misses by up to 2 ulp: a
    constant row would then have a variance far above an eps of 1e-12, and come out as 0.2 instead of 0.
    """
    return tl.div_rn(total, total * 0.0 + width)
