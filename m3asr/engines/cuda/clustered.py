"""Blocks of few tokens by clusters of programs (`kernels.clusters`): five launches in place of eleven."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m3asr.config import EncoderConfig
from m3asr.engines.cuda.packing import Block, Stack
from m3asr.kernels.clusters import MOST_KEYS, MOST_TOKENS, Clusters, Sizes

_SUMS: dict[int, tuple[Tensor, Tensor]] = {}


def sums(weight: Tensor, dim: int = -1) -> Tensor:
    """Float32 sums of a weight, made once: what its product takes of a row's mean."""
    known = _SUMS.get(id(weight))
    if known is None or known[0] is not weight:
        known = _SUMS[id(weight)] = weight, weight.float().sum(dim)
    return known[1]


@dataclass(frozen=True)
class Limits:
    """The most tokens for which blocks, and experts, run by clusters; 0: never. The rest: see `clusters.Sizes`."""

    block: int = 128
    experts: int = 128
    timed: bool = False


class ClusteredStack:
    """What of one stack clusters can run, on one device."""

    def __init__(self, stack: Stack, dtype: torch.dtype, experts_dtype: torch.dtype, load=None):
        self.config, self._load = stack.config, load
        self._stack, self._types, self._made = stack, (dtype, experts_dtype), {}

    def _sizes(self, limits: Limits, keys: int) -> Sizes:
        config, (dtype, experts_dtype) = self.config, self._types
        return Sizes(
            width=config.attention_dim, hidden=config.linear_units, heads=config.attention_heads,
            taps=config.cnn_module_kernel, experts=config.moe.num_experts if config.moe else 0,
            half=dtype == torch.float16, experts_half=experts_dtype == torch.float16,
            swish=config.activation_type == "swish", keys=keys,
            timed=limits.timed,
        )  # fmt: skip

    def _kernels(self, sizes: Sizes) -> Clusters:
        if sizes not in self._made:
            device = self._stack.after_norm[0].device
            load = {} if self._load is None else {"load": self._load}
            self._made[sizes] = Clusters(sizes, device, **load)
        return self._made[sizes]

    def made(self) -> dict[Sizes, Clusters]:
        """The kernels used so far."""
        return self._made

    def _usable(self) -> bool:
        device = self._stack.after_norm[0].device
        on_card = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        return (on_card or self._load is not None) and self.config.activation_type in ("swish", "relu")

    def for_blocks(self, limits: Limits, tokens: int, frames: int, chunk) -> Clusters | None:
        """The kernels for blocks of so many tokens, if they are to be run so."""
        config, sizes = self.config, self._sizes(limits, 128 if frames <= 128 else MOST_KEYS)
        fits = (
            tokens <= limits.block
            and frames <= MOST_KEYS
            and frames % 16 == 0
            and chunk is None
            and config.macaron_style
            and not config.causal
            and torch.float32 not in self._types
        )
        return self._kernels(sizes) if fits and self._usable() and sizes.block_fits() else None

    def for_experts(self, limits: Limits, tokens: int) -> Clusters | None:
        """The kernels for a layer of experts with so many tokens, if they are to be run so."""
        block, sizes = self._stack.blocks[0], self._sizes(limits, 128)
        fits = (
            tokens <= min(limits.experts, MOST_TOKENS)
            and block.router is not None
            and block.up.scale is None
            and self.config.moe.hidden_units == self.config.linear_units
            and torch.float32 not in self._types
            and self._types[0] == self._types[1]
        )
        return self._kernels(sizes) if fits and self._usable() and sizes.experts_fit() else None


def attention_part(kernels: Clusters, x: Tensor, shape, config: EncoderConfig, block: Block, prior, new, pdl) -> Tensor:
    """The block up to the gated unit in front of the convolution, which it returns; x is overwritten."""
    qkv, glu = new((x.shape[0], 3 * x.shape[1])), new(x.shape)
    kernels.feed_forward_qkv(
        x, block.macaron_up, block.macaron_down, block.qkv, sums(block.qkv.weight), block.key_table, qkv,
        frames=shape.frames, scale=0.5, eps=config.norm_eps, prior=prior, pdl=pdl,
    )  # fmt: skip
    kernels.attention_gated(
        qkv, shape.lengths, block.key_bias, x, block.attention_out, block.pointwise_1, sums(block.pointwise_1.weight),
        glu, frames=shape.frames, eps=config.norm_eps, pdl=pdl,
    )  # fmt: skip
    return glu


def convolution_part(
    kernels: Clusters, x: Tensor, glu, shape, config: EncoderConfig, block: Block, routed, pdl
) -> None:
    """The convolution; routed = (heard, y, expert_idx, gate) for a block with experts, else with the feed-forward."""
    convolution = (
        glu, block.depthwise, block.depthwise_bias, block.depthwise_norm, block.pointwise_2, shape.lengths, x,
    )  # fmt: skip
    options = {"frames": shape.frames, "left": (config.cnn_module_kernel - 1) // 2, "pdl": pdl}
    if routed is not None:
        kernels.convolution_router(
            *convolution,
            block.router,
            sums(block.router.weight, 0),
            *routed,
            eps=config.norm_eps,
            scale=block.router_scale,
            **options,
        )
        return
    kernels.convolution(*convolution, **options)
    kernels.feed_forward(x, block.up, block.down, scale=0.5, eps=config.norm_eps, pdl=pdl)
