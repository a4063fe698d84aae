"""A Conformer block for few tokens in five launches, three of them of several steps each, in CUDA C++.

With few tokens a launch of one step spends most of its time on beginning, on reading what the launch before it wrote
and on waiting for its last program. Here the steps of a launch are for 16 rows, and the programs that share them are a
cluster: they exchange results through each other's shared memory, 0.3 us a barrier in place of 0.6 to 1 us a launch.
Triton has no barrier of a cluster that a kernel could use, and keeps no weights in registers across steps, hence CUDA
C++: BLOCK and EXPERTS name the files, steps.cu is what they share, machine.cu what they need of the card. What
pairs of programs do for many tokens is in products.py.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields

import torch

from m3asr.kernels.clusters.machine import Kernels, PerWeight, on_card, row_sums
from m3asr.kernels.pieces import multiprocessors

BLOCK, EXPERTS = ("feed_forward.cu", "attention.cu", "convolution.cu"), ("experts.cu",)
THREADS = 256
BLOCK_COLUMNS = 32  # of the residual stream, for each program of a cluster
UP_COLUMNS, DOWN_COLUMNS = 64, 32  # of an expert's products, for each program
MOST_FRAMES, MOST_TOKENS = 128, 128


@dataclass(frozen=True)
class Sizes:
    """What the kernels are compiled for: sizes of a stack, and types.

    timed: the first program leaves the clock at each MARK in `marks`.
    """

    width: int
    hidden: int
    heads: int
    taps: int
    experts: int
    half: bool  # float16, else bfloat16
    experts_half: bool
    swish: bool
    timed: bool = False

    @property
    def block_programs(self) -> int:
        return self.width // BLOCK_COLUMNS

    def block_fits(self) -> bool:
        head = self.width // self.heads
        return (
            self.block_programs in (8, 16)
            and self.width % BLOCK_COLUMNS == head % BLOCK_COLUMNS == 0
            and self.hidden == 2 * self.width
            and self.experts <= 32
            and self.experts % 16 == 0
        )

    def experts_fit(self) -> bool:
        """Experts of 16 bits alone."""
        return (
            self.width in (128, 256, 384, 512)
            and self.hidden % 256 == 0
            and self.hidden <= 1024
            and 0 < self.experts <= 32
        )

    def source(self, files: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        """Definitions for BLOCK or EXPERTS, and all files of CUDA C++ that stand behind them."""
        names = {f.name.upper(): int(value) for f, value in zip(fields(self), astuple(self), strict=True)}
        together, resident = (self.block_programs, 1) if files == BLOCK else (1, 2)
        names |= {"THREADS": THREADS, "PROGRAMS": together, "RESIDENT": resident, "EXPERTS": max(self.experts, 16)}
        defined = "".join(f"#define {name} {value}\n" for name, value in names.items())
        return defined, ("machine.cu", "activation.cu", "steps.cu", *files)

    # Bytes of shared memory, as the kernels cut it.
    @property
    def _line(self) -> int:
        return 16 * 2 * (self.width + 32)

    @property
    def _sums(self) -> int:
        return 4 * 64 * (3 * BLOCK_COLUMNS + 8)

    def feed_forward_bytes(self) -> int:
        inner = 16 * 2 * (self.hidden + 32)
        weights = 3 * BLOCK_COLUMNS * 2 * (self.width + 32)
        rows = 4 * 16 * BLOCK_COLUMNS + 128 * self.block_programs
        return weights + self._line + inner + self._sums + rows + 16

    def attention_bytes(self) -> int:
        scores = 4 * 16 * (MOST_FRAMES + 8)
        return 2 * self._line + 2 * MOST_FRAMES * BLOCK_COLUMNS + self._sums + scores + 128 * self.block_programs

    def convolution_bytes(self) -> int:
        experts = 4 * max(self.experts, 16)
        rows = 4 * 16 * (BLOCK_COLUMNS + 4) + 16 * experts + 2 * 128 * self.block_programs
        return self._line + self._sums + rows + BLOCK_COLUMNS * experts

    def expert_bytes(self) -> tuple[int, int]:
        """For the first product and the second."""
        lists, inner = 4 * (2 * MOST_TOKENS + 32 + 1), 16 * 2 * (self.hidden + 32)
        return self._line + 4 * 64 * (UP_COLUMNS + 8) + lists, inner + 4 * 128 * (DOWN_COLUMNS + 8) + lists


class Clusters:
    """The launchers for one stack's sizes. All tensors contiguous, weights and biases as `engines.cuda.packing` has
    them. N, and the S frames of an utterance, are multiples of 16; S is at most MOST_FRAMES, and N at most MOST_TOKENS
    for experts.
    """

    def __init__(self, sizes: Sizes, device: torch.device, load=on_card):
        self.sizes, self._device, self._load = sizes, device, load
        self.sums = PerWeight(row_sums)

    def loaded(self, files: tuple[str, ...]) -> Kernels:
        """The kernels of BLOCK or of EXPERTS."""
        return self._load(*self.sizes.source(files), self._device)

    def _block(self, name: str, tokens: int, shared: int, *args, pdl: bool) -> None:
        programs = self.sizes.block_programs
        self.loaded(BLOCK).launch(
            name, tokens // 16 * programs, THREADS, *args, shared=shared, cluster=programs, pdl=pdl
        )

    def feed_forward_qkv(
        self, x, up, down, qkv, qkv_sums, table, out, *, frames, scale, eps, prior=None, pdl=False
    ) -> None:
        """x += scale * down(act(up(norm(x)))); out = qkv(norm(x)) + table, of its keys at each position.

        x float32 (N, D) in place; up, down, qkv with `weight` and `bias`; table (>= S, D) or None; out (N, 3D).
        prior = (weight, bias, eps): x counts as its layer norm.
        qkv_sums float32 (3D,): of the rows of qkv's weights.
        """
        tokens = x.shape[0]
        prior_w, prior_b, prior_eps = prior or (None, None, 0.0)
        self._block(
            "feed_forward_qkv", tokens, self.sizes.feed_forward_bytes(), x, prior_w, prior_b, up.weight, up.bias,
            down.weight, down.bias, qkv.weight, qkv.bias, table, out, qkv_sums, frames,
            float(scale), float(eps), float(prior_eps), pdl=pdl,
        )  # fmt: skip

    def feed_forward(self, x, up, down, *, scale, eps, pdl=False) -> None:
        """The same without prior and qkv."""
        self._block(
            "feed_forward_alone", x.shape[0], self.sizes.feed_forward_bytes(), x, up.weight, up.bias, down.weight,
            down.bias, float(scale), float(eps), pdl=pdl,
        )  # fmt: skip

    def attention_gated(
        self, qkv, lengths, key_bias, x, out, gated, gated_sums, glu, *, frames, eps, pdl=False
    ) -> None:
        """x += out(attention(qkv)); glu = gated(norm(x)), zero past the length: see `attention` and `norm_linear`.

        qkv (N, 3D), lengths int32 (B,), key_bias float32 (H, >= S) or None, glu (N, D).
        """
        tokens, width = x.shape
        self._block(
            "attention_gated", tokens, self.sizes.attention_bytes(), qkv, lengths, key_bias,
            0 if key_bias is None else key_bias.stride(0), x, out.weight, out.bias, gated.weight, gated.bias, glu,
            gated_sums, frames,
            math.log2(math.e) / math.sqrt(width // self.sizes.heads), float(eps), pdl=pdl,
        )  # fmt: skip

    def convolution(self, glu, taps, bias, norm, out, lengths, x, *, frames, left, pdl=False) -> None:
        """x += out(act(norm(depthwise(glu)))), nothing past the length: see `depthwise`. norm: (weight, bias, eps)."""
        norm_w, norm_b, norm_eps = norm or (None, None, 0.0)
        self._block(
            "convolution_alone", x.shape[0], self.sizes.convolution_bytes(), glu, taps, bias, norm_w, norm_b,
            out.weight, out.bias, lengths, x, frames, left, float(norm_eps), pdl=pdl,
        )  # fmt: skip

    def convolution_router(
        self, glu, taps, bias, norm, out, lengths, x, router, router_sums, heard, y, expert_idx, gate, *, frames, left,
        eps, scale, pdl=False,
    ) -> None:  # fmt: skip
        """The same, then y = norm(x), expert_idx and gate as `router.route` has them."""
        norm_w, norm_b, norm_eps = norm or (None, None, 0.0)
        self._block(
            "convolution_router", x.shape[0], self.sizes.convolution_bytes(), glu, taps, bias, norm_w, norm_b,
            out.weight, out.bias, lengths, x, router.weight, router.bias, router_sums, heard,
            heard.stride(0), y, expert_idx, gate, frames, left, float(norm_eps), float(eps), float(scale), pdl=pdl,
        )  # fmt: skip

    def experts(self, y, expert_idx, gate, up, down, x, *, scale, pdl=False) -> None:
        """x[n] += scale * gate[n] * down[e](act(up[e](y[n]))), e = expert_idx[n]; nothing where e is -1.

        y (N, D); gate float32 (N,) or None.
        """
        sizes, tokens, kernels = self.sizes, x.shape[0], self.loaded(EXPERTS)
        most, resident = min(tokens, sizes.experts), 2 * multiprocessors(self._device)
        h = torch.empty(tokens, sizes.hidden, dtype=y.dtype, device=y.device)
        shared, slices = sizes.expert_bytes(), (sizes.hidden // UP_COLUMNS, sizes.width // DOWN_COLUMNS)
        kernels.launch(
            "experts_up", min(resident, most * slices[0]), THREADS, y, expert_idx, up.weight, up.bias, down.weight, h,
            tokens, shared=shared[0], pdl=pdl,
        )  # fmt: skip
        kernels.launch(
            "experts_down", min(resident, most * slices[1]), THREADS, h, expert_idx, gate, down.weight, down.bias, x,
            tokens, float(scale), shared=shared[1], pdl=pdl,
        )  # fmt: skip
