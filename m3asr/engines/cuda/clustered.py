"""What CUDA C++ does (`kernels.clusters`): blocks of few tokens in four launches, the experts of up to 256 in one, and
the products of many.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from m3asr.config import EncoderConfig
from m3asr.engines.cuda.packing import Block, Linear, Stack, Weights
from m3asr.kernels.clusters import MOST_FRAMES, MOST_TOKENS, Clusters, Sizes, machine
from m3asr.kernels.clusters.experts import MOST_TOKENS as MOST_WITH_EXPERTS
from m3asr.kernels.clusters.experts import Experts, ExpertSizes
from m3asr.kernels.clusters.products import MANY, OUT_COLUMNS, ROUTERS, SOME, Cut, Products, ProductSizes


@dataclass(frozen=True)
class Limits:
    """The most tokens for which blocks, and experts, run so; 0: never. each: the most tokens an expert, of so many that
    its weights come slower than they are multiplied. The fewest tokens for which products run so; inf: never; from how
    many on a program has more columns; and the most where the feed-forward leaves it less than OUT_COLUMNS. The fewest
    for which the router does where products do not. All by measurement (benchmarks/VERSIONS.md, 9 to 13). timed: see
    `clusters.Sizes`.
    """

    block: int = MOST_TOKENS
    experts: int = MOST_WITH_EXPERTS
    each: int = 8
    products: float = 640
    many: int = 2560
    narrow: int = 4096
    router: float = 257
    timed: bool = False

    def cut(self, tokens: int) -> Cut:
        """How products of so many tokens are shared out."""
        return MANY if tokens >= self.many else SOME


class ClusteredStack:
    """What of one stack the kernels cover, on one device."""

    def __init__(self, stack: Stack, experts: int, dtype: torch.dtype, experts_dtype: torch.dtype, load=None):
        """experts: of the main stack, so that both are run by the same kernels."""
        config, block = stack.config, stack.blocks[0]
        moe, up = config.moe, block.up
        self._device, self._load, self.made = stack.after_norm[0].device, load, {}
        self._sizes = Sizes(
            width=config.attention_dim, hidden=config.linear_units, heads=config.attention_heads,
            taps=config.cnn_module_kernel, experts=experts,
            half=dtype == torch.float16, experts_half=experts_dtype == torch.float16,
            swish=config.activation_type == "swish",
        )  # fmt: skip
        usable = (
            (load is not None or on_hopper(self._device))
            and dtype != torch.float32
            and config.activation_type in ("swish", "relu")
            and _aligned(stack.blocks)
        )
        self._blocks = usable and config.macaron_style and not config.causal and self._sizes.fit()
        self._expert_sizes = ExpertSizes(
            config.attention_dim, moe.hidden_units if moe else 0, moe.num_experts if moe else 0,
            self._sizes.experts_half, self._sizes.swish, up.weight.element_size(),
        )  # fmt: skip
        self._experts = usable and moe is not None and self._expert_sizes.fit()
        self._product_sizes = ProductSizes(
            config.attention_dim, config.linear_units, experts, self._sizes.half,
            self._sizes.experts_half, self._sizes.swish,
        )  # fmt: skip
        self._products = usable and config.macaron_style and self._product_sizes.fit()
        self._made_products = {}

    def _given(self) -> dict:
        return {} if self._load is None else {"load": self._load}

    def kernels(self, timed: bool = False) -> Clusters:
        if timed not in self.made:
            self.made[timed] = Clusters(replace(self._sizes, timed=timed), self._device, **self._given())
        return self.made[timed]

    @cached_property
    def experts(self) -> Experts:
        return Experts(self._expert_sizes, self._device, **self._given())

    def products(self, cut: Cut) -> Products:
        if cut not in self._made_products:
            self._made_products[cut] = Products(replace(self._product_sizes, cut=cut), self._device, **self._given())
        return self._made_products[cut]

    def compile(self) -> None:
        """Compile what will be used, which then lies beside what Triton keeps."""
        if self._products:
            _ = [self.products(cut).kernels for cut in (SOME, MANY)]
            if self._product_sizes.experts:  # the same for both stacks
                _ = [self.products(MANY).router(*which) for which in ROUTERS]
        if self._blocks:
            _ = self.kernels().kernels
        if self._experts:
            _ = self.experts.kernels

    def for_blocks(self, limits: Limits, tokens: int, frames: int, chunk) -> Clusters | None:
        """The kernels for blocks of so many tokens, if they are to be run so."""
        fits = tokens <= limits.block and frames <= MOST_FRAMES and frames % 16 == 0 and chunk is None
        return self.kernels(limits.timed) if self._blocks and fits else None

    def for_experts(self, limits: Limits, tokens: int) -> Experts | None:
        """The kernel for a layer of experts with so many tokens, if it is to be run so."""
        most = min(limits.experts, MOST_WITH_EXPERTS, limits.each * self._expert_sizes.experts)
        return self.experts if self._experts and tokens <= most else None

    def for_router(self, limits: Limits, tokens: int) -> Products | None:
        """The kernels for the router of a stream in float32, if it is to be run so."""
        return self.products(SOME) if self._products and tokens >= limits.router else None

    def for_products(self, limits: Limits, tokens: int) -> Products | None:
        """The kernels for products of so many tokens, if they are to be run so."""
        narrow = self._product_sizes.down_columns < OUT_COLUMNS
        if not self._products or tokens < limits.products or (narrow and tokens > limits.narrow):
            return None
        return self.products(limits.cut(tokens))


@cache
def on_hopper(device: torch.device) -> bool:
    """Whether the device has clusters, and what compiles kernels for them is there."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    missing = machine.missing()
    if missing:
        warnings.warn(f"short utterances will be slower: {missing}, so they are run by Triton's kernels", stacklevel=2)
    return missing is None


def _aligned(blocks: list[Block]) -> bool:
    """Whether all weights begin where 16 bytes can be read at once."""
    parts = [getattr(block, field.name) for block in blocks for field in fields(block)]
    parts += [t for p in parts if isinstance(p, Linear) for t in (p.weight, p.bias, p.scale)]
    return all(p.data_ptr() % 16 == 0 for p in parts if isinstance(p, Tensor))


def clustered(weights: Weights, dtype: torch.dtype, experts_dtype: torch.dtype) -> list[ClusteredStack | None]:
    """Of the main stack and of the embedding network."""
    moe = weights.main.config.moe
    return [
        None if stack is None else ClusteredStack(stack, moe.num_experts if moe else 0, dtype, experts_dtype)
        for stack in (weights.main, weights.embed)
    ]


def attention_part(kernels: Clusters, x: Tensor, shape, config: EncoderConfig, block: Block, prior, new, pdl) -> Tensor:
    """The block up to the gated unit in front of the convolution, which it returns; x is overwritten."""
    qkv, glu = new((x.shape[0], 3 * x.shape[1])), new(x.shape)
    kernels.feed_forward_qkv(
        x, block.macaron_up, block.macaron_down, block.qkv, kernels.sums(block.qkv.weight), block.key_table, qkv,
        frames=shape.frames, scale=0.5, eps=config.norm_eps, prior=prior, pdl=pdl,
    )  # fmt: skip
    kernels.attention_gated(
        qkv, shape.lengths, block.key_bias, x, block.attention_out, block.pointwise_1,
        kernels.sums(block.pointwise_1.weight), glu, frames=shape.frames, eps=config.norm_eps, pdl=pdl,
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
            kernels.sums(block.router.weight, 0),
            *routed,
            eps=config.norm_eps,
            scale=block.router_scale,
            **options,
        )
        return
    kernels.convolution(*convolution, **options)
    kernels.feed_forward(x, block.up, block.down, scale=0.5, eps=config.norm_eps, pdl=pdl)
