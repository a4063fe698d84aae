"""Plugins as a user would write them, right and wrong, for the tests."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

import m3asr.trt as trt  # noqa: E402


@triton.jit
def rows_kernel(x, scale, out, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside).to(tl.float32)
    factor = tl.load(scale + columns, mask=inside).to(tl.float32)
    tl.store(out + row * width + columns, (value * factor + eps).to(out.dtype.element_ty), mask=inside)


@trt.plugin("test_scale_rows", kind="plain")
def scale_rows(x, scale, *, eps: float = 0.5):
    return (x.float() * scale.float() + eps).to(x.dtype)


@scale_rows.kernel
def launch(x, scale, out, eps):
    rows_kernel[(x.numel() // x.shape[-1],)](x, scale, out, x.shape[-1], eps, BLOCK=64)


# Two outputs of other sizes and types than the input.
@triton.jit
def peak_kernel(x, value, index, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    numbers = tl.load(x + row * width + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
    tl.store(value + row, tl.max(numbers, 0).to(value.dtype.element_ty))
    tl.store(index + row, tl.argmax(numbers, 0))


@trt.plugin("test_peak", shape=lambda x: [x[:-1], x[:-1]], dtypes=(0, "int32"))
def peak(x):
    value, index = x.max(-1)
    return value, index.to(torch.int32)


@peak.kernel
def launch_peak(x, value, index):
    peak_kernel[(x.numel() // x.shape[-1],)](x, value, index, x.shape[-1], BLOCK=64)


# One kernel, so that it can be compiled into a plan.
@triton.jit
def double_kernel(x, count, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < count) * 2, mask=at < count)


@trt.plugin("test_double")
def double(x):
    return x * 2


double.kernel(
    trt.OneKernel(
        double_kernel,
        grid=lambda x: trt.cdiv(trt.numel(x), 128),
        scalars=lambda x: (trt.numel(x),),
        constants={"BLOCK": 128},
    )
)


# With scratch memory: a copy of the rows, sorted there.
@trt.plugin("test_sorted_rows", workspace=lambda x: 4 * trt.numel(x))
def sorted_rows(x):
    return x.sort(-1).values


@sorted_rows.kernel
def launch_sorted(x, out, workspace):
    assert workspace.numel() == 4 * x.numel()
    rows = workspace[: x.numel() * x.element_size()].view(x.dtype).view(x.shape).copy_(x)
    out.copy_(rows.sort(-1).values)


# How kernels go wrong: what check_plugin has to notice.


def _wrong(name, launch_function, **options):
    @trt.plugin(f"test_wrong_{name}", **options)
    def reference(x):
        return x * 2

    reference.kernel(launch_function)
    return reference


def _value(x, out):
    out.copy_(x * 2.001)


def _last_element(x, out):
    out.view(-1)[:-1] = x.reshape(-1)[:-1] * 2


@triton.jit
def too_far_kernel(x, out, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < count) * 2, mask=at < count + 1)


def _outside(x, out):
    too_far_kernel[(1,)](x, out, x.numel(), BLOCK=64)


def _input(x, out):
    x.mul_(2)
    out.copy_(x)


def _right(x, out):
    out.copy_(x * 2)


def _outside_workspace(x, out, workspace):
    out.copy_(x * 2)
    byte_kernel[(1,)](workspace, workspace.numel())


@triton.jit
def byte_kernel(where, at):
    tl.store(where + at, 1)


def _nan(x, out):
    out.copy_(x * 2)
    out.view(-1)[0] = float("nan")


WRONG = {
    "value": (_wrong("value", _value), "relative error"),
    "unwritten": (_wrong("unwritten", _last_element), "never written"),
    "outside": (_wrong("outside", _outside), "outside"),
    "input": (_wrong("input", _input), "into an input"),
    "nan": (_wrong("nan", _nan), "NaN"),
    "shape": (_wrong("shape", _right, shape=lambda x: (x[0], x[1] + 1)), "shape function"),
    "workspace": (_wrong("workspace", _outside_workspace, workspace=lambda x: 16), "outside of its workspace"),
    "fraction": (_wrong("fraction", _right, shape=lambda x: (x[0], x[1] / 1)), "not by /"),
    "dtype": (_wrong("dtype", _right, dtypes=("int32",)), "declared"),
}
