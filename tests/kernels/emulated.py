"""CUDA C++ of m3asr/kernels/clusters run by fibres on the CPU: emulated.h in place of machine.cu, and
emulated_warpgroups.h in place of warpgroups.cu.
"""

import ctypes
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from m3asr.kernels.clusters.machine import parameters, sources

FOLDER = Path(__file__).parent


class Matrix(ctypes.Structure):
    _fields_ = [("first", ctypes.c_void_p), ("inner", ctypes.c_longlong), ("count", ctypes.c_longlong)]
    _fields_ += [("rows", ctypes.c_int), ("size", ctypes.c_int), ("columns", ctypes.c_int)]


class Emulated:
    """`machine.Kernels` for a CPU; `seed` decides the order in which threads run."""

    seed = 0
    clusters = 7  # that run at once, as the launchers are told

    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def launch(self, name, programs, threads, *args, shared=0, cluster=1, pdl=False):
        assert shared <= 227 << 10
        _, pointers = parameters(args)
        getattr(self._library, f"launch_{name}")(programs // cluster, self.seed, shared, pointers)

    def most_clusters(self, name, threads, shared, cluster):
        return self.clusters

    def matrix(self, tensor, rows, columns=64):
        return Matrix(tensor.data_ptr(), tensor.shape[1], tensor.shape[0], rows, tensor.element_size(), columns)


def emulator(folder: Path, *headers: str):
    """What loads kernels for the CPU, compiled into `folder`. Skips where there is no compiler."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to emulate a card with")
    # The standard headers are compiled once. The checked longjmp of _FORTIFY_SOURCE knows of one stack only.
    command = ["g++", "-O2", "-std=c++17", "-w", "-fPIC", "-U_FORTIFY_SOURCE"]
    standard, own = folder / "standard.h", [FOLDER / header for header in ("emulated.h", *headers)]
    standard.write_text("".join(re.findall("^#include <.*\n", "".join(map(Path.read_text, own)), re.MULTILINE)))
    first, included = f'#include "{standard}"\n', "".join(f'#include "{header}"\n' for header in own)
    subprocess.run([*command, "-x", "c++-header", standard], check=True)

    @cache
    def load(defined: str, files: tuple[str, ...], device) -> Emulated:
        source = sources(tuple(name for name in files if name not in ("machine.cu", "warpgroups.cu")))
        names = re.findall(r"^KERNEL (\w+)\(", source, re.MULTILINE)
        text = first + defined + included + source + "".join(f"LAUNCHED({name})\n" for name in names)
        path = folder / f"emulated{abs(hash(text))}.cpp"
        path.write_text(text)
        subprocess.run([*command, "-shared", "-o", path.with_suffix(".so"), path], check=True)
        return Emulated(ctypes.CDLL(str(path.with_suffix(".so"))))

    return load
