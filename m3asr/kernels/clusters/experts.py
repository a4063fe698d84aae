"""Both products of a layer's experts in one launch, for up to 256 tokens: see experts.cu."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from functools import cached_property

import torch

from m3asr.kernels.clusters.machine import SHARED_BYTES, Kernels, PerWeight, on_card
from m3asr.kernels.pieces import multiprocessors

FILES = ("activation.cu", "experts.cu")
THREADS = 320  # eight warps that multiply, one that brings rows, one that takes slices and brings weights
SLICE_BYTES = 64 << 10  # of weights, at most
MOST_TOKENS, MOST_EXPERTS, PART = 256, 32, 64
MOST_STAGES = 4


@dataclass(frozen=True)
class ExpertSizes:
    """What the kernel is compiled for: the experts' widths, and types. weight_bytes 1: e4m3, inputs float16."""

    width: int
    hidden: int
    experts: int
    half: bool  # inputs float16, else bfloat16
    swish: bool
    weight_bytes: int

    @property
    def columns(self) -> tuple[int, int]:
        """Of a slice of each product."""
        up = 64 if self.hidden % 64 == 0 and 64 * self.width * self.weight_bytes <= SLICE_BYTES else 32
        return up, 32 if 32 * self.hidden * self.weight_bytes <= SLICE_BYTES else 16

    def fit(self) -> bool:
        return (
            0 < self.experts <= MOST_EXPERTS
            and self.width % 32 == self.hidden % 32 == 0
            and self.weight_bytes + self.half >= 2
            and self._cut() != (0, 0)
        )

    # Bytes of shared memory, as the kernel cuts it.
    @property
    def _stage(self) -> int:
        up, down = (-(-inner * self.weight_bytes // 128) * 128 for inner in (self.width, self.hidden))
        return max(self.columns[0] * up, self.columns[1] * down)

    def _rest(self, stages: int, buffers: int) -> int:
        (up, down), rows = self.columns, 2 * 16 * (max(self.width, self.hidden) + 8)
        routing = 3 * (MOST_EXPERTS + MOST_TOKENS // PART) + 3 * MOST_TOKENS + 32 + 1
        each = stages * (16 * up + 4 * 8 + 4) + buffers * (rows + 2 * 8)
        return each + 4 * 16 * max(4 * (up + 8), 8 * (down + 8)) + 4 * routing

    def _cut(self) -> tuple[int, int]:
        """Slices whose weights are under way or in use at once, and passes whose rows are."""
        for buffers in (2, 1):
            for stages in range(MOST_STAGES, 1, -1):
                if stages * self._stage + self._rest(stages, buffers) <= SHARED_BYTES:
                    return stages, buffers
        return 0, 0

    @property
    def shared_bytes(self) -> int:
        stages, buffers = self._cut()
        return stages * self._stage + self._rest(stages, buffers)

    def source(self) -> tuple[str, tuple[str, ...]]:
        """Definitions, and all files of CUDA C++ that stand behind them."""
        names = {f.name.upper(): int(value) for f, value in zip(fields(self), astuple(self), strict=True)}
        names |= {"THREADS": THREADS, "PROGRAMS": 1, "RESIDENT": 1, "TIMED": 0}
        names |= {"MOST_TOKENS": MOST_TOKENS, "MOST_EXPERTS": MOST_EXPERTS, "PART": PART}
        names["STAGES"], names["BUFFERS"] = self._cut()
        names["UP_COLUMNS"], names["DOWN_COLUMNS"] = self.columns
        defined = "".join(f"#define {name} {value}\n" for name, value in names.items())
        return defined, ("machine.cu", "warpgroups.cu", *FILES)


class Experts:
    """The launcher for one stack's sizes. Launches of one of these must follow each other: they share what their
    programs tell each other.
    """

    def __init__(self, sizes: ExpertSizes, device: torch.device, load=on_card):
        self.sizes, self._device, self._load = sizes, device, load
        # Not of self, which would then live until the garbage collector comes.
        self._matrix = PerWeight(lambda weight, kernels, rows: kernels.matrix(_flat(weight), rows))
        self._state = torch.zeros(2 + MOST_EXPERTS + MOST_TOKENS // PART, dtype=torch.int32, device=device)

    @cached_property
    def kernels(self) -> Kernels:
        """Compiled, or found where they are kept, when they are first asked for."""
        return self._load(*self.sizes.source(), self._device)

    def __call__(self, y, expert_idx, gate, up, down, x, *, scale, pdl=False) -> None:
        """x[n] += scale * gate[n] * down[e](act(up[e](y[n]))), e = expert_idx[n]; nothing where e is -1.

        y (N, D), N at most MOST_TOKENS; expert_idx int32 (N,); gate float32 (N,) or None; x float32 (N, D). All
        contiguous. up, down with `weight` (E, ., .), `bias` float32 (E, .) and, of 8 bits, `scale` float32 (E, .).
        """
        sizes, tokens, kernels = self.sizes, x.shape[0], self.kernels
        assert tokens <= MOST_TOKENS, f"{tokens} tokens: at most {MOST_TOKENS}"
        h = torch.empty(tokens, sizes.hidden, dtype=y.dtype, device=y.device)
        weights = (self._matrix(layer.weight, kernels, n) for layer, n in zip((up, down), sizes.columns, strict=True))
        kernels.launch(
            "experts", multiprocessors(self._device), THREADS, *weights, y, expert_idx, gate, up.scale, up.bias,
            down.scale, down.bias, h, x, self._state, tokens, float(scale), shared=sizes.shared_bytes, pdl=pdl,
        )  # fmt: skip


def _flat(weight: torch.Tensor) -> torch.Tensor:
    """All experts' rows one behind the other, two numbers of 8 bits as one of 16: the copy engine only moves them."""
    rows = weight.flatten(0, 1)
    return rows.view(torch.float16) if rows.element_size() == 1 else rows
