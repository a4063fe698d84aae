"""CUDA C++ compiled by NVRTC, which comes with torch, and launched through the driver: for what Triton cannot say."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import triton

FOLDER = Path(__file__).parent
NVRTC_NAMES, DRIVER_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"), ("libcuda.so.1",)
CLUSTER, DEPENDENT = 4, 6  # CUlaunchAttributeID
DYNAMIC_SHARED, ANY_CLUSTER = 8, 14  # CUfunction_attribute
SHARED_BYTES = 227 << 10  # that a program of a Hopper card may have
TENSOR_TYPES = {torch.int8: 0, torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
SWIZZLED, PROMOTED_256 = {32: 1, 64: 2, 128: 3}, 3  # by a tile row's bytes: CUtensorMapSwizzle; CUtensorMapL2promotion


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


def library(names) -> ctypes.CDLL:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"none of {', '.join(names)} is there")


@cache
def missing() -> str | None:
    """What is not there of what this module needs."""
    for name, names in (("NVRTC, CUDA's compiler for programs", NVRTC_NAMES), ("the CUDA driver", DRIVER_NAMES)):
        try:
            library(names)
        except OSError as error:
            return f"{name} was not found ({error})"
    return None


def compiled(source: str, architecture: str = "sm_90a", nvrtc: ctypes.CDLL | None = None) -> bytes:
    """The machine code of CUDA C++. Raises ValueError with what the compiler says."""
    nvrtc = nvrtc or library(NVRTC_NAMES)
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", b"-lineinfo"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    if failed:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise ValueError(log.value.decode())
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def kept(source: str) -> bytes:
    """`compiled`, once a machine: the code lies beside what Triton keeps."""
    folder = Path(triton.knobs.cache.dir)
    key = hashlib.sha256(f"{torch.version.cuda} {triton.__version__} {source}".encode()).hexdigest()
    path = folder / f"{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    code = compiled(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_bytes(code)
        aside.replace(path)
    except OSError:
        pass  # a folder that cannot be written to costs the next process some seconds
    return code


def parameters(args) -> tuple[list, ctypes.Array]:
    """Tensors, None, ints, floats and ctypes' own as a kernel's parameters: their values, and the pointers to them."""
    values = []
    for a in args:
        if isinstance(a, (ctypes.Structure, ctypes.Array)):
            values.append(a)
        elif a is None or isinstance(a, torch.Tensor):
            values.append(ctypes.c_void_p(a.data_ptr() if a is not None else 0))
        else:
            values.append(ctypes.c_float(a) if isinstance(a, float) else ctypes.c_int(a))
    return values, (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))


class Kernels:
    """The `extern "C"` kernels of a source, loaded into the current context."""

    def __init__(self, source: str):
        torch.cuda.current_stream()  # there must be a context
        self._driver, self._module = library(DRIVER_NAMES), ctypes.c_void_p()
        self._found, self._most = {}, {}
        self._code = kept(source)
        self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), self._code))

    def _check(self, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"CUDA error {code}: {text.value and text.value.decode()}")

    def _function(self, name: str, shared: int) -> ctypes.c_void_p:
        if name not in self._found:
            function = ctypes.c_void_p()
            self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()))
            self._check(self._driver.cuFuncSetAttribute(function, ANY_CLUSTER, 1))
            self._check(self._driver.cuFuncSetAttribute(function, DYNAMIC_SHARED, shared))
            self._found[name] = function
        return self._found[name]

    def launch(self, name: str, programs: int, threads: int, *args, shared=0, cluster=1, pdl=False) -> None:
        """args: see `parameters`. shared: dynamic shared memory in bytes; cluster: programs of a cluster."""
        function = self._function(name, shared)
        values, pointers = parameters(args)  # values are kept until the launch
        attributes, count = (_Attribute * 2)(), 0
        if cluster > 1:
            attributes[count].id, attributes[count].value[:3] = CLUSTER, (cluster, 1, 1)
            count += 1
        if pdl:
            attributes[count].id, attributes[count].value[0] = DEPENDENT, 1
            count += 1
        stream = torch.cuda.current_stream().cuda_stream
        config = _Config(programs, 1, 1, threads, 1, 1, shared, stream, attributes, count)
        self._check(self._driver.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None))

    def most_clusters(self, name: str, threads: int, shared: int, cluster: int) -> int:
        """How many clusters of a kernel the card runs at once."""
        if name not in self._most:
            attributes, most = (_Attribute * 1)(), ctypes.c_int()
            attributes[0].id, attributes[0].value[:3] = CLUSTER, (cluster, 1, 1)
            config = _Config(cluster, 1, 1, threads, 1, 1, shared, None, attributes, 1)
            function = self._function(name, shared)
            self._check(self._driver.cuOccupancyMaxActiveClusters(ctypes.byref(most), function, ctypes.byref(config)))
            self._most[name] = most.value
        return self._most[name]

    def matrix(self, tensor: torch.Tensor, rows: int, columns: int = 64) -> ctypes.Array:
        """A matrix as the copy engine takes it, in tiles of so many rows and columns."""
        room = (ctypes.c_char * (128 + 64))()
        described = (ctypes.c_char * 128).from_buffer(room, -ctypes.addressof(room) % 64)
        (count, inner), size = tensor.shape, tensor.element_size()
        sizes, row_bytes = (ctypes.c_ulonglong * 2)(inner, count), (ctypes.c_ulonglong * 1)(size * inner)
        tile, steps, at = (ctypes.c_uint * 2)(columns, rows), (ctypes.c_uint * 2)(1, 1), tensor.data_ptr()
        values = TENSOR_TYPES[tensor.dtype], 2, ctypes.c_void_p(at), sizes, row_bytes, tile, steps
        self._check(
            self._driver.cuTensorMapEncodeTiled(described, *values, 0, SWIZZLED[columns * size], PROMOTED_256, 0)
        )
        return described

    def numbers(self, name: str, count: int) -> list[int]:
        """What an array of 64-bit integers of the source holds, once all launches are done."""
        place, size, values = ctypes.c_void_p(), ctypes.c_size_t(), (ctypes.c_longlong * count)()
        torch.cuda.synchronize()
        self._check(
            self._driver.cuModuleGetGlobal_v2(ctypes.byref(place), ctypes.byref(size), self._module, name.encode())
        )
        self._check(self._driver.cuMemcpyDtoH_v2(values, place, ctypes.c_size_t(8 * count)))
        return list(values)


class PerWeight:
    """What is made of a weight, once: `make(weight, *args)`. The weight is kept, so that its id is no other's."""

    def __init__(self, make: Callable):
        self._make, self._made = make, {}

    def __call__(self, weight: torch.Tensor, *args):
        key = id(weight), *args
        if key not in self._made:
            self._made[key] = weight, self._make(weight, *args)
        return self._made[key][1]


def row_sums(weight: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Float32 sums over a weight's inner dimension: what its product takes of a row's mean."""
    return weight.float().sum(dim)


def sources(files: tuple[str, ...]) -> str:
    """CUDA C++ of files of this folder, one behind the other."""
    return "".join((FOLDER / name).read_text(encoding="utf-8") for name in files)


@cache
def on_card(defined: str, files: tuple[str, ...], device: torch.device) -> Kernels:
    """The kernels of these files behind some definitions, on a device, for all that ask."""
    with torch.cuda.device(device):
        return Kernels(defined + sources(files))
