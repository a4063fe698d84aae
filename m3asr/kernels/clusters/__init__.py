"""A Conformer block for few tokens in four launches of several steps each, in CUDA C++; one of them is the experts'.

With few tokens a launch of one step spends most of its time on beginning, on reading what the launch before it wrote
and on waiting for its last program. Here the steps of a launch are for 16 rows, and the programs that share them are a
cluster: they send results into each other's shared memory, 16 KB to each in 0.9 us. Triton has nothing that a kernel
could do so with, and keeps no weights in registers across steps, hence CUDA C++: FILES, of which steps.cu is what the
others share; machine.cu is what they need of the card. The experts are in experts.py, and what pairs of programs do for
many tokens in products.py.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields
from functools import cached_property

import torch

from m3asr.kernels.clusters.machine import Kernels, PerWeight, on_card, row_sums

FILES = ("activation.cu", "steps.cu", "feed_forward.cu", "attention.cu", "convolution.cu")
THREADS = 256
COLUMNS = 32  # of the residual stream, for each program of a cluster
MOST_FRAMES = 128
MOST_TOKENS = 112  # of 16 programs seven clusters fit an H100 at once: with 128 tokens 1.96 ms in place of 1.44


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
    def programs(self) -> int:
        """Of a cluster."""
        return self.width // COLUMNS

    def fit(self) -> bool:
        head = self.width // self.heads
        return (
            self.programs in (8, 16)
            and self.width % COLUMNS == head % COLUMNS == 0
            and self.hidden == 2 * self.width
            and self.experts <= 32
            and self.experts % 16 == 0
        )

    def source(self) -> tuple[str, tuple[str, ...]]:
        """Definitions, and all files of CUDA C++ that stand behind them."""
        names = {f.name.upper(): int(value) for f, value in zip(fields(self), astuple(self), strict=True)}
        names |= {"THREADS": THREADS, "PROGRAMS": self.programs, "RESIDENT": 1, "EXPERTS": max(self.experts, 16)}
        defined = "".join(f"#define {name} {value}\n" for name, value in names.items())
        return defined, ("machine.cu", *FILES)

    # Bytes of shared memory, as the kernels cut it.
    @property
    def _line(self) -> int:
        return 16 * 2 * (self.width + 32)

    @property
    def _sums(self) -> int:
        return 4 * 64 * (3 * COLUMNS + 8)

    def feed_forward_bytes(self) -> int:
        inner = 16 * 2 * (self.hidden + 32)
        weights = 3 * COLUMNS * 2 * (self.width + 32)
        rows = 4 * 16 * COLUMNS + 128 * self.programs
        return weights + self._line + inner + self._sums + rows + 4 * 8

    def attention_bytes(self) -> int:
        scores = 4 * 16 * (MOST_FRAMES + 8)
        return 2 * self._line + 2 * MOST_FRAMES * COLUMNS + self._sums + scores + 128 * self.programs + 2 * 8

    def convolution_bytes(self) -> int:
        experts = 4 * max(self.experts, 16)
        rows = 4 * 16 * (COLUMNS + 4) + 16 * experts + 2 * 128 * self.programs
        return self._line + self._sums + rows + 4 * 8 + COLUMNS * experts


class Clusters:
    """The launchers for one stack's sizes. All tensors contiguous, weights and biases as `engines.cuda.packing` has
    them. N, and the S frames of an utterance, are multiples of 16; S is at most MOST_FRAMES.
    """

    def __init__(self, sizes: Sizes, device: torch.device, load=on_card):
        self.sizes, self._device, self._load = sizes, device, load
        self.sums = PerWeight(row_sums)

    @cached_property
    def kernels(self) -> Kernels:
        """Compiled, or found where they are kept, when they are first asked for."""
        return self._load(*self.sizes.source(), self._device)

    def _launch(self, name: str, tokens: int, shared: int, *args, pdl: bool) -> None:
        programs = self.sizes.programs
        self.kernels.launch(name, tokens // 16 * programs, THREADS, *args, shared=shared, cluster=programs, pdl=pdl)

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
        self._launch(
            "feed_forward_qkv", tokens, self.sizes.feed_forward_bytes(), x, prior_w, prior_b, up.weight, up.bias,
            down.weight, down.bias, qkv.weight, qkv.bias, table, out, qkv_sums, frames,
            float(scale), float(eps), float(prior_eps), pdl=pdl,
        )  # fmt: skip

    def feed_forward(self, x, up, down, *, scale, eps, pdl=False) -> None:
        """The same without prior and qkv."""
        self._launch(
            "feed_forward_alone", x.shape[0], self.sizes.feed_forward_bytes(), x, up.weight, up.bias, down.weight,
            down.bias, float(scale), float(eps), pdl=pdl,
        )  # fmt: skip

    def attention_gated(
        self, qkv, lengths, key_bias, x, out, gated, gated_sums, glu, *, frames, eps, pdl=False
    ) -> None:
        """x += out(attention(qkv)); glu = gated(norm(x)), zero past the length: see `attention` and `linear`.

        qkv (N, 3D), lengths int32 (B,), key_bias float32 (H, >= S) or None, glu (N, D).
        """
        tokens, width = x.shape
        self._launch(
            "attention_gated", tokens, self.sizes.attention_bytes(), qkv, lengths, key_bias,
            0 if key_bias is None else key_bias.stride(0), x, out.weight, out.bias, gated.weight, gated.bias, glu,
            gated_sums, frames,
            math.log2(math.e) / math.sqrt(width // self.sizes.heads), float(eps), pdl=pdl,
        )  # fmt: skip

    def convolution(self, glu, taps, bias, norm, out, lengths, x, *, frames, left, pdl=False) -> None:
        """x += out(act(norm(depthwise(glu)))), nothing past the length: see `depthwise`. norm: (weight, bias, eps)."""
        norm_w, norm_b, norm_eps = norm or (None, None, 0.0)
        self._launch(
            "convolution_alone", x.shape[0], self.sizes.convolution_bytes(), glu, taps, bias, norm_w, norm_b,
            out.weight, out.bias, lengths, x, frames, left, float(norm_eps), pdl=pdl,
        )  # fmt: skip

    def convolution_router(
        self, glu, taps, bias, norm, out, lengths, x, router, router_sums, heard, y, expert_idx, gate, *, frames, left,
        eps, scale, pdl=False,
    ) -> None:  # fmt: skip
        """The same, then y = norm(x), expert_idx and gate as `router.route` has them."""
        norm_w, norm_b, norm_eps = norm or (None, None, 0.0)
        self._launch(
            "convolution_router", x.shape[0], self.sizes.convolution_bytes(), glu, taps, bias, norm_w, norm_b,
            out.weight, out.bias, lengths, x, router.weight, router.bias, router_sums, heard,
            heard.stride(0), y, expert_idx, gate, frames, left, float(norm_eps), float(eps), float(scale), pdl=pdl,
        )  # fmt: skip
