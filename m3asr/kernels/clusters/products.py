"""Products by pairs of programs, each of which keeps its columns' weights, and the router of what they make: see
products.cu and route.cu.
"""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property

import torch

from m3asr.kernels.clusters.machine import SHARED_BYTES, Kernels, PerWeight, on_card, row_sums
from m3asr.kernels.epilogue import Unnormed
from m3asr.kernels.stream import Stream

FILES, ROUTER_FILES = ("activation.cu", "stream.cu", "results.cu", "products.cu"), ("stream.cu", "route.cu")
PROGRAMS, ROWS = 2, 64
OUT_COLUMNS = 64  # of a program of a product that is added to the stream
MOST_WEIGHTS = 128 << 10  # bytes of weights that a program keeps: as many again are for tiles
ROUTER_THREADS, MOST_EXPERTS = 128, 64
ROUTED = 16, ROWS  # rows of a program of the router: of 16 its four warps share the columns
MOST_SHARED = 6144  # tokens, up to which they do
ROUTERS = tuple((rows, False) for rows in ROUTED) + ((ROUTED[0], True),)  # and whether the stream is float32


def routed(tokens: int) -> int:
    """Rows of a program of the router, which leaves a row of counts."""
    return ROUTED[tokens > MOST_SHARED]


@dataclass(frozen=True)
class Cut:
    """How products are shared out: columns of a program, where they are not added to the stream, and its groups of four
    warps, which multiply in turn.
    """

    columns: int
    groups: int

    @property
    def threads(self) -> int:
        return 128 * self.groups + 64  # two more warps ask for copies


# With some thousand tokens twice the programs are worth more than half the traffic.
SOME, MANY = Cut(64, 2), Cut(128, 3)


def _fields(*kinds) -> list:
    return [(name, kind) for kind, names in kinds for name in names.split()]


def _addresses(tensors: dict) -> dict:
    return {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}


class _Layer(ctypes.Structure):
    _fields_ = _fields(
        (ctypes.c_void_p, "bias sums parts table lengths x_parts"),
        (ctypes.c_int, "tokens frames columns count more"),
        (ctypes.c_float, "each eps scale"),
    )


class _Router(ctypes.Structure):
    _fields_ = _fields((ctypes.c_void_p, "raw low x heard y chosen gate counts"), (ctypes.c_int, "stride"))


@dataclass(frozen=True)
class ProductSizes:
    """What the kernels are compiled for: widths of the residual stream and of the feed-forward, experts, and types."""

    width: int
    hidden: int
    experts: int  # 0: no router
    half: bool  # float16, else bfloat16
    experts_half: bool
    swish: bool
    cut: Cut = MANY

    def fit(self) -> bool:
        return (
            self.width in (256, 512)
            and self.hidden % (PROGRAMS * self.cut.columns) == 0
            and self.experts <= MOST_EXPERTS
            and self.experts_half >= self.half
            and 2 * self.down_columns * self.hidden <= MOST_WEIGHTS
        )

    @property
    def down_columns(self) -> int:
        """Of a program of the product that adds the feed-forward's result to the stream."""
        return OUT_COLUMNS if 2 * OUT_COLUMNS * self.hidden <= MOST_WEIGHTS else OUT_COLUMNS // 2

    def shared_bytes(self, inner: int, columns: int, made: int, slots: int) -> int:
        """As a kernel cuts it: weights of columns, stages of a's tiles, and `slots` tiles of `made` bytes a row."""
        steps = inner // 64 // PROGRAMS
        stages = next(n for n in (4, 3, 2, 1) if steps % n == 0)
        return 2 * columns * inner + stages * PROGRAMS * ROWS * 128 + slots * ROWS * made + 8 * columns + 512

    def source(self) -> tuple[str, tuple[str, ...]]:
        """Definitions, and all files of CUDA C++ that stand behind them."""
        rest = {"threads": self.cut.threads, "programs": PROGRAMS, "resident": 1, "shared_bytes": SHARED_BYTES}
        return self._defined(FILES, **asdict(self.cut), **rest, out_columns=OUT_COLUMNS)

    def router_source(self, rows: int, floats: bool) -> tuple[str, tuple[str, ...]]:
        """The same for the router, with so many rows a program, of a stream of floats."""
        threads = {"threads": ROUTER_THREADS, "programs": 1, "resident": 2}
        return self._defined(ROUTER_FILES, **threads, routed=rows, floats=floats)

    def _defined(self, files, **names) -> tuple[str, tuple[str, ...]]:
        names = {"floats": 0, **asdict(self), **names, "down_columns": self.down_columns, "timed": 0}
        del names["cut"]
        defined = "".join(f"#define {name.upper()} {int(value)}\n" for name, value in names.items())
        return defined, ("machine.cu", "warpgroups.cu", *files)


class Products:
    """The launchers for one stack's sizes. All tensors contiguous, weights and biases as `engines.cuda.packing` has
    them; `a` is (N, K) in the compute type, or a `Stream`, whose norm is then multiplied.
    """

    def __init__(self, sizes: ProductSizes, device: torch.device, load=on_card):
        self.sizes, self._device, self._load = sizes, device, load
        self.sums, self._halves = PerWeight(row_sums), PerWeight(_halves)
        # Not of self, which would then live until the garbage collector comes.
        self.router = cache(lambda *which: load(*sizes.router_source(*which), device))
        self._matrix = PerWeight(lambda weight, kernels, rows: kernels.matrix(weight, rows))

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
        both = {"out": out, "eps": eps}
        if activation is not None:
            self._launch("product_activated", a, layer, pdl, **both)
        elif glu is not None:
            self._launch("product_gated", a, layer, pdl, lengths=glu[0], frames=glu[1], **both)
        else:
            table, frames = table or (None, 1)
            self._launch("product_keyed", a, layer, pdl, table=table, frames=frames, **both)

    def add(self, a, layer, stream: Stream, *, scale, mask=None, normed=True, pdl=False) -> Stream:
        """The stream (N, D) += scale * layer(a), in its place; nothing past the lengths of mask = (lengths, frames).

        normed: with the `parts` that its norm takes.
        """
        from_hidden = layer.weight.shape[1] == self.sizes.hidden
        (tokens, width), (lengths, frames) = stream.raw.shape, mask or (None, 1)
        its = self.sizes.down_columns if from_hidden else OUT_COLUMNS
        parts = torch.empty(width // its, tokens, 2, device=stream.raw.device) if normed else None
        self._launch(
            "product_added_from_hidden" if from_hidden else "product_added", a, layer, pdl, its=its, out=stream.raw,
            low=stream.low, lengths=lengths, frames=frames, scale=scale, x_parts=parts,
        )  # fmt: skip
        return replace(stream, parts=parts)

    def route(
        self, x, layer, heard, lengths, y, expert_idx, gate, *, frames, eps, scale, counts=None, pdl=False
    ) -> None:  # fmt: skip
        """What `kernels.router.route` does, of a `Stream` or `Unnormed` x; y of the experts' type, counts of `routed`
        tokens each.
        """
        high, rest = self._halves(layer.weight)
        floats = isinstance(x, Unnormed)
        count, tokens, _ = x.parts.shape
        (choices, width), rows = high.shape, routed(tokens)
        each = x.columns if floats else width / count
        tensors = {"bias": layer.bias, "parts": x.parts, "lengths": lengths}
        task = _Layer(tokens=tokens, frames=frames, count=count, each=each, eps=eps, scale=scale, **_addresses(tensors))
        stream = {"x": x.x} if floats else {"raw": x.raw, "low": x.low}
        tensors = {"heard": heard, "y": y, "chosen": expert_idx, "gate": gate, "counts": counts, **stream}
        kernels, sums = self.router(rows, floats), (ROWS - rows) * choices  # of all warps but the first that share rows
        weights = (kernels.matrix(half, choices) for half in (high, rest))
        kernels.launch(
            "route", -(-tokens // rows), ROUTER_THREADS, *weights, task,
            _Router(stride=heard.stride(0), **_addresses(tensors)),
            shared=4 * (choices * width + rows + sums) + 8, pdl=pdl,
        )  # fmt: skip

    def _launch(
        self, name: str, a, layer, pdl: bool, *, out, low=None, its=None, frames=1, eps=0.0, scale=1.0, **tensors
    ) -> None:
        """its: columns of a program, where they are added to the stream `out`, `low`."""
        kernels, cut, count = self.kernels, self.sizes.cut, 0
        if isinstance(a, Stream):
            tensors |= {"parts": a.parts, "sums": self.sums(layer.weight)}
            a, count = a.raw, a.parts.shape[0]
        tensors["bias"] = layer.bias
        (columns, inner), tokens = layer.weight.shape, a.shape[0]
        if low is None:
            its, slots = cut.columns, cut.groups
            wide = min(64, its * out.shape[1] // columns)
            made, matrices = 2 * wide, (kernels.matrix(out, ROWS, wide),)
        else:
            slots = 2 if 2 * its * inner > 65536 else 4
            made, matrices = 3 * its, tuple(kernels.matrix(t, ROWS, its) for t in (out, low))
        pairs, shared = columns // (PROGRAMS * its), self.sizes.shared_bytes(inner, its, made, slots)
        most = kernels.most_clusters(name, cut.threads, shared, PROGRAMS)
        tiles = -(-tokens // ROWS)
        together, more = max(1, min(most // pairs, tiles)), 0
        if tensors.get("table") is not None:
            together, more = with_keys(most, pairs, tiles)
        programs = PROGRAMS * (pairs * together + pairs // 3 * more)
        task = _Layer(
            tokens=tokens, frames=frames, columns=columns, count=count, more=more,
            each=self.sizes.width / max(1, count), eps=eps, scale=scale,
            **_addresses(tensors),
        )  # fmt: skip
        kernels.launch(
            name, programs, cut.threads, kernels.matrix(a, ROWS), self._matrix(layer.weight, kernels, its), *matrices,
            task, shared=shared, cluster=PROGRAMS, pdl=pdl,
        )  # fmt: skip


def _halves(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A router's weight (D, E), turned, as a sum of two float16 (E to whole eights, D)."""
    padded = torch.nn.functional.pad(weight.t(), (0, 0, 0, -weight.shape[1] % 8))
    high = padded.half().contiguous()
    return high, (padded - high.float()).half().contiguous()


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
