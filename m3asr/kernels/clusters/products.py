"""Products of many tokens by pairs of programs, several in a launch: see products.cu."""

from __future__ import annotations

import ctypes
from dataclasses import astuple, dataclass, fields
from functools import cache
from operator import mul

import torch

from m3asr.kernels.clusters import FOLDER
from m3asr.kernels.clusters.machine import Kernels

PROGRAMS, ROWS = 2, 64
GROUPS = 3  # of four warps that multiply; two more warps ask for copies
THREADS = 128 * GROUPS + 64
COLUMNS, ADDED_COLUMNS = 128, 64  # of a program: of a product by itself, and of one that is added to x
SHARED_BYTES = 227 << 10
MOST_WEIGHTS = 128 << 10  # bytes of weights that a program keeps: as many again are for tiles


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in "bias sums parts table lengths x_parts ready done".split()),
        *((name, ctypes.c_int) for name in "tokens frames columns count needed clusters".split()),
        *((name, ctypes.c_float) for name in ("each", "eps", "scale")),
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
        names |= {"THREADS": THREADS, "PROGRAMS": PROGRAMS, "GROUPS": GROUPS, "RESIDENT": 1, "TIMED": 0, "SHARED_BYTES": SHARED_BYTES}
        names |= {"COLUMNS": COLUMNS, "ADDED_COLUMNS": ADDED_COLUMNS}
        defined = "".join(f"#define {name} {value}\n" for name, value in names.items())
        return defined, "".join((FOLDER / f).read_text() for f in ("activation.cu", "products.cu"))


@cache
def on_card(defined: str, source: str, device: torch.device) -> Kernels:
    with torch.cuda.device(device):
        return Kernels(defined + "".join((FOLDER / f).read_text() for f in ("machine.cu", "warpgroups.cu")) + source)


@dataclass
class _Part:
    """One product of a launch: a program makes so many columns, and a tile takes `cost` (thousands of cycles)."""

    layer: object  # with weight and bias
    columns: int
    cost: float
    task: _Layer


@dataclass
class Stream:
    """A residual stream's rows in the compute type (N, D), as they are, and what their norm takes: of each part of a
    row's columns mean and sum of squares, float32 (parts, N, 2).
    """

    raw: torch.Tensor
    parts: torch.Tensor


class Products:
    """The launchers for one stack's sizes. All tensors contiguous, weights and biases as `engines.cuda.packing` has
    them; `a` is (N, K) in the compute type, or a `Stream`, whose norm is then multiplied. `counts`: int32 zeros, see
    `counts_for`, of which each launch needs its own.
    """

    def __init__(self, sizes: ProductSizes, device: torch.device, load=on_card):
        self.sizes, self._device, self._load = sizes, device, load
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._matrices: dict[int, tuple[torch.Tensor, object]] = {}

    def loaded(self) -> Kernels:
        return self._load(*self.sizes.source(), self._device)

    @staticmethod
    def counts_for(tokens: int) -> tuple[int, int]:
        """The shape of a launch's `counts`."""
        return 2, -(-tokens // ROWS)

    def feed_forward(self, a, up, down, x, counts, *, scale, qkv=None, frames=1, eps=0.0, pdl=False) -> None:
        """x (N, D) float32 += scale * down(act(up(a))).

        qkv = (layer, out (N, 3D), table or None): then out = layer(norm(x)), table (>= frames, D) added to the middle
        third of the columns at each position of an utterance of so many frames.
        """
        tokens, width = x.shape
        h = torch.empty(tokens, up.weight.shape[0], dtype=down.weight.dtype, device=x.device)
        parts = [
            _Part(up, COLUMNS, 2.4, self._task(up, a, tokens, frames, eps, done=counts[0])),
            _Part(down, ADDED_COLUMNS, 3.5, self._task(down, h, tokens, frames, ready=counts[0], scale=scale)),
        ]
        stream, out = None, None
        if qkv:
            layer, out, table = qkv
            stream = _new_stream(x, down)
            parts[1].task.x_parts, parts[1].task.done = stream.parts.data_ptr(), counts[1].data_ptr()
            task = self._task(layer, stream, tokens, frames, eps, table=table, ready=counts[1])
            parts.append(_Part(layer, COLUMNS, 2.7, task))
        self._launch("products_feed_forward", parts, 3, [a, 0, h, 1, x, stream, 2, out], pdl)

    def add(
        self, a, layer, x, counts, *, scale, lengths=None, frames=1, gated=None, streams=False, eps=0.0, pdl=False
    ) -> Stream | None:
        """x (N, D) float32 += scale * layer(a), nothing past lengths int32 (N / frames,).

        gated = (layer, out (N, D), lengths): then out = the gated unit of neighbouring columns of layer(norm(x)), zero
        past the lengths. streams: returns x as a `Stream`, too.
        """
        tokens = x.shape[0]
        stream, out = _new_stream(x, layer) if streams or gated else None, None
        task = self._task(layer, a, tokens, frames, lengths=lengths, scale=scale, x_parts=stream and stream.parts)
        parts = [_Part(layer, ADDED_COLUMNS, 2.5, task)]
        if gated:
            following, out, lengths = gated
            task.done = counts[0].data_ptr()
            task = self._task(following, stream, tokens, frames, eps, lengths=lengths, ready=counts[0])
            parts.append(_Part(following, COLUMNS, 2.7, task))
        self._launch("products_added", parts, 2, [a, 0, x, stream, 1, out], pdl)
        return stream if streams else None

    def _task(self, layer, a, tokens: int, frames: int, eps=0.0, *, scale=1.0, **tensors) -> _Layer:
        """A product's parameters but for what depends on its neighbours in the launch."""
        tensors["bias"], count = layer.bias, 0
        if isinstance(a, Stream):
            tensors |= {"parts": a.parts, "sums": self.sums(layer.weight)}
            count = a.parts.shape[0]
        return _Layer(
            tokens=tokens, frames=frames, columns=layer.weight.shape[0], count=count, each=ADDED_COLUMNS, eps=eps,
            scale=scale, **{key: None if t is None else t.data_ptr() for key, t in tensors.items()},
        )  # fmt: skip

    def _launch(self, name: str, parts: list[_Part], most_parts: int, matrices: list, pdl: bool) -> None:
        """matrices: in the kernel's order tensors, streams, and numbers of the parts whose weights stand there."""
        kernels, tokens = self.loaded(), parts[0].task.tokens
        most = kernels.most_clusters(name, THREADS, SHARED_BYTES, PROGRAMS)
        for part, clusters in zip(parts, shares(most, parts, -(-tokens // ROWS)), strict=True):
            part.task.clusters = clusters
        for before, part in zip(parts, parts[1:], strict=False):
            part.task.needed = before.task.columns // before.columns
        described = []
        for each in matrices:
            if isinstance(each, int):
                each = self._weight_of(parts[each]) if each < len(parts) else described[0]
            elif isinstance(each, Stream):
                each = kernels.matrix(each.raw, ROWS)
            else:
                each = described[0] if each is None else kernels.matrix(each, ROWS)  # nobody reads what is not there
            described.append(each)
        tasks = [part.task for part in parts] + [_Layer()] * (most_parts - len(parts))
        programs = PROGRAMS * sum(part.task.clusters for part in parts)
        kernels.launch(name, programs, THREADS, *described, *tasks, shared=SHARED_BYTES, cluster=PROGRAMS, pdl=pdl)

    def _weight_of(self, part: _Part):
        weight = part.layer.weight
        if id(weight) not in self._matrices:  # the weight is kept, so that its id is no other's
            self._matrices[id(weight)] = weight, self.loaded().matrix(weight, part.columns)
        return self._matrices[id(weight)][1]

    def sums(self, weight: torch.Tensor) -> torch.Tensor:
        """Float32 sums of a weight's rows, made once."""
        if id(weight) not in self._sums:
            self._sums[id(weight)] = weight, weight.float().sum(1)
        return self._sums[id(weight)][1]


def _new_stream(x, layer) -> Stream:
    parts = torch.empty(x.shape[1] // ADDED_COLUMNS, x.shape[0], 2, device=x.device)
    return Stream(torch.empty(x.shape, dtype=layer.weight.dtype, device=x.device), parts)


def shares(most: int, parts: list[_Part], tiles: int) -> list[int]:
    """How many clusters of a launch make each product, so that all take about as long: `most` together, if they are
    enough for one each.
    """
    pairs = [part.task.columns // (PROGRAMS * part.columns) for part in parts]
    rounds = [1] * len(parts)
    while True:
        slowest = max(range(len(parts)), key=lambda i: parts[i].cost * -(-tiles // rounds[i]))
        if rounds[slowest] == tiles or sum(map(mul, pairs, rounds)) + pairs[slowest] > most:
            return list(map(mul, pairs, rounds))
        rounds[slowest] += 1
