"""Products of many tokens by pairs of programs, each of which keeps its columns' weights: see products.cu."""

from __future__ import annotations

import ctypes
from dataclasses import astuple, dataclass, fields, replace
from functools import cache, cached_property

import torch

from m3asr.kernels.clusters import FOLDER
from m3asr.kernels.clusters.machine import Kernels
from m3asr.kernels.stream import Stream

FILES = ("activation.cu", "results.cu", "products.cu")
PROGRAMS, ROWS = 2, 64
GROUPS = 3  # of four warps that multiply; two more warps ask for copies
THREADS = 128 * GROUPS + 64
COLUMNS, ADDED_COLUMNS = 128, 64  # of a program: of a product by itself, and of one that is added to x
SHARED_BYTES = 227 << 10
MOST_WEIGHTS = 128 << 10  # bytes of weights that a program keeps: as many again are for tiles


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, kind)
        for kind, names in (
            (ctypes.c_void_p, "bias sums parts table lengths x_parts"),
            (ctypes.c_int, "tokens frames columns count more"),
            (ctypes.c_float, "each eps scale"),
        )
        for name in names.split()
    ]  # fmt: skip


@dataclass(frozen=True)
class ProductSizes:
    """What the kernels are compiled for: widths of the residual stream and of the feed-forward, and types."""

    width: int
    hidden: int
    half: bool  # float16, else bfloat16
    swish: bool

    def fit(self) -> bool:
        return (
            self.width in (256, 512)
            and self.hidden % (2 * COLUMNS) == 0
            and 2 * ADDED_COLUMNS * self.hidden <= MOST_WEIGHTS
        )

    def source(self) -> tuple[str, str]:
        """Definitions, and CUDA C++ that needs them, machine.cu and warpgroups.cu before it."""
        names = {f.name.upper(): int(value) for f, value in zip(fields(self), astuple(self), strict=True)}
        names |= {"THREADS": THREADS, "PROGRAMS": PROGRAMS, "RESIDENT": 1, "TIMED": 0, "GROUPS": GROUPS}
        names |= {"COLUMNS": COLUMNS, "ADDED_COLUMNS": ADDED_COLUMNS, "SHARED_BYTES": SHARED_BYTES}
        defined = "".join(f"#define {name} {value}\n" for name, value in names.items())
        return defined, "".join((FOLDER / f).read_text() for f in FILES)


@cache
def on_card(defined: str, source: str, device: torch.device) -> Kernels:
    with torch.cuda.device(device):
        return Kernels(defined + "".join((FOLDER / f).read_text() for f in ("machine.cu", "warpgroups.cu")) + source)


class Products:
    """The launchers for one stack's sizes. All tensors contiguous, weights and biases as `engines.cuda.packing` has
    them; `a` is (N, K) in the compute type, or a `Stream`, whose norm is then multiplied.
    """

    def __init__(self, sizes: ProductSizes, device: torch.device, load=on_card):
        self.sizes, self._device, self._load = sizes, device, load
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._matrices: dict[int, tuple[torch.Tensor, object]] = {}

    @cached_property
    def kernels(self) -> Kernels:
        """Compiled, or found where they are kept, when they are first asked for."""
        return self._load(*self.sizes.source(), self._device)

    def up(self, a, layer, out, *, activation=None, glu=None, table=None, eps=0.0, pdl=False) -> None:
        """out (N, C) = layer(a), and then one of three.

        activation: that of the sizes. glu = (lengths int32 (B,), frames): out (N, C / 2) is the gated unit of
        neighbouring columns, zero past the lengths. table = (positions (>= frames, C / 3), frames): added to the middle
        third of the columns.
        """
        if activation is not None:
            self._launch("product_activated", a, layer, pdl, out=out, eps=eps)
        elif glu is not None:
            self._launch("product_gated", a, layer, pdl, out=out, lengths=glu[0], frames=glu[1], eps=eps)
        else:
            table, frames = table or (None, 1)
            self._launch("product_keyed", a, layer, pdl, out=out, table=table, frames=frames, eps=eps)

    def add(self, a, layer, stream: Stream, *, scale, mask=None, normed=True, pdl=False) -> Stream:
        """The stream (N, D) += scale * layer(a), in its place; nothing past the lengths of mask = (lengths, frames).

        normed: with the `parts` that its norm takes.
        """
        from_hidden = layer.weight.shape[1] == self.sizes.hidden
        (tokens, width), (lengths, frames) = stream.raw.shape, mask or (None, 1)
        parts = torch.empty(width // ADDED_COLUMNS, tokens, 2, device=stream.raw.device) if normed else None
        self._launch(
            "product_added_from_hidden" if from_hidden else "product_added", a, layer, pdl, out=stream.raw,
            low=stream.low, lengths=lengths, frames=frames, scale=scale, x_parts=parts,
        )  # fmt: skip
        return replace(stream, parts=parts)

    def _launch(
        self, name: str, a, layer, pdl: bool, *, out, low=None, frames=1, eps=0.0, scale=1.0, **tensors
    ) -> None:
        kernels, count = self.kernels, 0
        if isinstance(a, Stream):
            tensors |= {"parts": a.parts, "sums": self.sums(layer.weight)}
            a, count = a.raw, a.parts.shape[0]
        tensors["bias"] = layer.bias
        tokens, columns = a.shape[0], layer.weight.shape[0]
        pairs = columns // (PROGRAMS * (COLUMNS if low is None else ADDED_COLUMNS))
        most = kernels.most_clusters(name, THREADS, SHARED_BYTES, PROGRAMS)
        tiles = -(-tokens // ROWS)
        together, more = max(1, min(most // pairs, tiles)), 0
        if tensors.get("table") is not None:
            together, more = with_keys(most, pairs, tiles)
        task = _Layer(
            tokens=tokens, frames=frames, columns=columns, count=count, more=more,
            each=self.sizes.width / max(1, count), eps=eps, scale=scale,
            **{key: None if t is None else t.data_ptr() for key, t in tensors.items()},
        )  # fmt: skip
        weight = self._weight(layer.weight, COLUMNS if low is None else ADDED_COLUMNS)
        made = (out,) if low is None else (out, low)
        kernels.launch(
            name, PROGRAMS * (pairs * together + pairs // 3 * more), THREADS, kernels.matrix(a, ROWS), weight,
            *(kernels.matrix(t, ROWS) for t in made), task, shared=SHARED_BYTES, cluster=PROGRAMS, pdl=pdl,
        )  # fmt: skip

    def _weight(self, weight: torch.Tensor, rows: int):
        if id(weight) not in self._matrices:  # the weight is kept, so that its id is no other's
            self._matrices[id(weight)] = weight, self.kernels.matrix(weight, rows)
        return self._matrices[id(weight)][1]

    def sums(self, weight: torch.Tensor) -> torch.Tensor:
        """Float32 sums of a weight's rows, made once."""
        if id(weight) not in self._sums:
            self._sums[id(weight)] = weight, weight.float().sum(1)
        return self._sums[id(weight)][1]


def with_keys(most: int, pairs: int, tiles: int) -> tuple[int, int]:
    """Of `most` clusters how many share each pair's tiles of rows, and how many more those of keys, which are a third
    of the pairs and take 1.3 times as long.
    """
    best = (max(1, min(most // pairs, tiles)), 0)
    for together in range(1, best[0] + 1):
        more = max(0, min((most - together * pairs) // (pairs // 3), tiles - together))
        if _time(tiles, together, more) < _time(tiles, *best):
            best = together, more
    return best


def _time(tiles: int, together: int, more: int) -> float:
    return max(-(-tiles // together), 1.3 * -(-tiles // (together + more)))
