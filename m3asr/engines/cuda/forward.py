"""The encoder as a sequence of kernel launches, for one batch shape.

Nothing here waits for the device or reads from it, so a run can be captured in a graph. Intermediate tensors are made
with `torch.empty` and every element that is read was written before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from m3asr.config import ModelConfig
from m3asr.engines.cuda import clustered, tiles
from m3asr.engines.cuda.packing import EXPERTS_TYPES, TYPES, Block, Stack, Subsampling, Weights
from m3asr.kernels.attention import attention
from m3asr.kernels.best import best_path
from m3asr.kernels.clusters.machine import PerWeight, row_sums
from m3asr.kernels.clusters.products import Products, routed
from m3asr.kernels.depthwise import depthwise
from m3asr.kernels.epilogue import Unnormed
from m3asr.kernels.expert_product import expert_product
from m3asr.kernels.linear import linear
from m3asr.kernels.log_softmax import log_softmax
from m3asr.kernels.norm import norm
from m3asr.kernels.pieces import Tile, copyable, shared_memory
from m3asr.kernels.router import route
from m3asr.kernels.sort import slots, sort_tokens
from m3asr.kernels.stream import Stream, from_stream, norm_stream, to_stream
from m3asr.kernels.subsampling import first_convolution, next_convolution

MOST_ASKED = 1024  # tokens, up to which products ask for their weights before they may begin
JOINED = 192, 4096  # tokens, from which and up to which products by Triton make the norms in front of them


@dataclass
class Shape:
    """Sizes of a batch: B utterances of S subsampled frames, and its lengths on the device."""

    batch: int
    frames: int
    lengths: Tensor  # int32 (B,), in subsampled frames
    chunk: tuple[int, int] | None

    @property
    def tokens(self) -> int:
        return self.batch * self.frames


class Forward:
    """features, lengths -> log_probs, hidden, out_lengths, best path, by Triton kernels.

    `best_alone`: where the best path is all that is wanted, log-probabilities are not written.
    `beside`: the embedding network is a branch of its own, beside the main stack's first sub-layers, up to the router.
    `trace`, if set, is called with ("blocks", block, x), x the block's output before its final norm, and ("routes",
    block, expert_idx). `limits`: for how many tokens CUDA C++ takes the place of Triton. `fetches`: products by Triton
    of up to MOST_ASKED tokens ask for their weights before they may begin. `joined`: see JOINED.
    """

    def __init__(self, config: ModelConfig, weights: Weights, precision: str, pdl: bool):
        self.config, self.weights, self.pdl = config, weights, pdl
        self.dtype, self.experts_dtype = TYPES[precision], EXPERTS_TYPES[precision]
        self.wide = precision == "fp32"
        # Three tf32 products keep float32's accuracy; plain tf32 would not.
        self.dot = "tf32x3"
        if not self.wide:
            self.dot = "upcast" if weights.head.weight.device.type == "cpu" else "ieee"
        self.beside, self.fetches, self.best_alone = True, True, True
        self.joined, self._sums = JOINED, PerWeight(row_sums)
        self._side = None
        self.limits = clustered.Limits()
        self.clustered = clustered.clustered(weights, self.dtype, self.experts_dtype)
        self.trace = None
        # Where log_probs go, float32, flat: they are larger than all else, and all graphs can share one place.
        self.shared: Tensor | None = None

    def __call__(self, features: Tensor, lengths: Tensor, chunk: tuple[int, int] | None = None, best_alone=False):
        """features float32 (B, T, F), lengths int32 (B,) -> log_probs float32 (B, S, V), hidden float32 (B, S, D),
        out_lengths int32 (B,), the best symbols int32 (B, S) and their log-probabilities float32 (B, S).

        T at least the receptive field; chunk = (size, left), left >= 0, or None. log_probs lie in `self.shared`, if it
        is set: then the next run overwrites them, whatever its shape.
        """
        encoder = self.config.encoder
        frames = (features.shape[1] - encoder.min_frames) // encoder.subsampling_rate + 1
        out_lengths = torch.empty_like(lengths)
        shape = Shape(features.shape[0], frames, out_lengths, chunk)
        streams = []
        for front in self.weights.subsamplings:
            streams += self._subsample(features, lengths, shape, front)
        heard = None if self.weights.heard is None else self._heard(streams[0], shape)
        y, hidden = self._stack(streams[-1], shape, self.weights.main, heard)
        head = self.weights.head
        best, peaks = self._new((shape.tokens,), torch.int32), self._new((shape.tokens,), torch.float32)
        if best_alone and self.best_alone and copyable(y) and copyable(head.weight):
            tile = self._tiles(shape, hidden.shape[1], hidden.shape[1]).best
            best_path(y, head.weight, head.bias, best, peaks, tile=tile, dot=self.dot, pdl=self.pdl)
            hidden, best, peaks = (t.unflatten(0, (shape.batch, frames)) for t in (hidden, best, peaks))
            return None, hidden, out_lengths, best, peaks
        size = (shape.tokens, head.weight.shape[0])
        log_probs = self._new(size, torch.float32) if self.shared is None else self.shared[: math.prod(size)].view(size)
        tile = self._tiles(shape, hidden.shape[1], hidden.shape[1])
        # The head reads the hidden sequence in the compute type.
        self._linear(y, head, log_probs, tile=tile.head)
        log_softmax(log_probs, best, peaks, tile=tile.log_softmax, pdl=self.pdl)
        log_probs, hidden, best, peaks = (
            t.unflatten(0, (shape.batch, frames)) for t in (log_probs, hidden, best, peaks)
        )
        return log_probs, hidden, out_lengths, best, peaks

    def _fork(self, device) -> torch.cuda.Stream:
        """The stream of the second branch, behind all that was launched so far."""
        self._side = self._side or torch.cuda.Stream(device, priority=-1)
        self._side.wait_stream(torch.cuda.current_stream(device))
        return self._side

    def _join(self, device) -> None:
        """Wait for the second branch."""
        torch.cuda.current_stream(device).wait_stream(self._side)

    def _tiles(self, shape: Shape, width: int, hidden: int) -> tiles.Tiles:
        chosen = tiles.tiles_for(shape.tokens, width, hidden, self.wide)
        return tiles.fitted(chosen, shared_memory(self.weights.head.weight.device), self.dtype.itemsize)

    def _new(self, shape, dtype=None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.weights.head.weight.device)

    def _linear(self, a, layer, out, **options) -> None:
        # Of some hundred tokens a product is shorter than the way of its weights from the memory.
        tokens = (a.raw if isinstance(a, Unnormed) else a).shape[-2]
        ahead = 256 if self.fetches and self.pdl and tokens <= MOST_ASKED else 0
        linear(a, layer.weight, layer.bias, out, **{"dot": self.dot, "ahead": ahead, "pdl": self.pdl, **options})

    def _subsample(self, features, lengths, shape: Shape, front: Subsampling) -> list[Tensor]:
        """The residual stream float32 (N, D) of each stack."""
        encoder = self.config.encoder
        groups, _, width = front.first.weight.shape
        tile = self._tiles(shape, width, width)
        time, bins = features.shape[1], encoder.input_dim // encoder.conv_subsample_in_ch
        x = features
        for i, (kernel, stride) in enumerate(encoder.subsampling):
            time, bins = (time - kernel) // stride + 1, (bins - kernel) // stride + 1
            out = self._new((groups, shape.batch, time, bins, width))
            if i == 0:
                first_convolution(
                    x, lengths, front.first.weight, front.first.bias, out, shape.lengths, kernel=kernel, stride=stride,
                    receptive_field=encoder.min_frames, rate=encoder.subsampling_rate, tile=tile.first_convolution,
                    cmvn=self.weights.cmvn,
                )  # fmt: skip
            else:
                layer = front.following[i - 1]
                next_convolution(
                    x, layer.weight, layer.bias, out, kernel=kernel, stride=stride, tile=tile.next_convolution,
                    dot=self.dot, pdl=self.pdl,
                )  # fmt: skip
            x = out
        out = self._new((groups, shape.tokens, width), torch.float32)
        self._linear(x.reshape(groups, shape.tokens, -1), front.out, out, tile=tile.subsampling_out)
        return list(out.unbind(0))

    def _heard(self, x: Tensor, shape: Shape) -> Callable[[int], Tensor]:
        """The embedding network from its residual stream on: what the router of each block hears, float32 (N, E)."""
        experts, layer, side = self.config.encoder.moe.num_experts, self.weights.heard, None
        if self.beside and x.is_cuda:
            # Ahead of the main stack's launches, which must wait for it anyway.
            side = self._fork(x.device)
        with torch.cuda.stream(side):
            _, embedding = self._stack(x, shape, self.weights.embed, None)  # float32 (N, D')

        @cache
        def all_blocks() -> Tensor:
            if side is not None:
                self._join(x.device)
            out = self._new((shape.tokens, layer.weight.shape[0]), torch.float32)
            tile = self._tiles(shape, embedding.shape[1], embedding.shape[1]).heard
            # Where two branches meet nothing starts early: a dependent launch follows one kernel.
            self._linear(embedding, layer, out, tile=tile, dot="tf32x3", pdl=self.pdl and side is None)
            return out

        return lambda i: all_blocks().narrow(1, i * experts, experts)

    def _stack(self, x: Tensor, shape: Shape, stack: Stack, heard: Callable | None) -> tuple[Tensor, Tensor]:
        """All blocks and the last norm: -> hidden in the compute type (N, D), hidden float32 (N, D)."""
        config, prior = stack.config, None
        products = self._in_clusters(config).for_products(self.limits, shape.tokens)
        if products is not None:
            self._blocks_in_pairs(products, x, shape, stack, heard)
        else:
            for i, block in enumerate(stack.blocks):
                self._block(x, shape, config, block, prior, partial(heard, i) if block.router else None)
                self._traced(block, x)
                prior = (*block.final_norm, config.norm_eps)
        y, hidden = self._new(x.shape), self._new(x.shape, torch.float32)
        norm(
            x, y, eps=config.norm_eps, tile=self._tiles(shape, x.shape[1], x.shape[1]).norm,
            prior=(*stack.blocks[-1].final_norm, config.norm_eps, x), affine=(*stack.after_norm, hidden), pdl=self.pdl,
        )  # fmt: skip
        return y, hidden

    def _traced(self, block: Block, x: Tensor) -> None:
        if self.trace is not None:
            self.trace("blocks", block, x)

    def _block(self, x, shape: Shape, config, block: Block, prior, heard) -> None:
        """One block, in place, without its final norm, which the next reader applies as its `prior`. heard() is asked
        for when the router needs it.
        """
        width, scale = x.shape[1], 0.5 if block.macaron_up else 1.0
        mask = (shape.lengths, shape.frames)
        kernels = self._in_clusters(config).for_blocks(self.limits, shape.tokens, shape.frames, shape.chunk)
        if kernels is not None:
            glu = clustered.attention_part(kernels, x, shape, config, block, prior, self._new, self.pdl)
            routed = self._routed(shape, width, heard()) if block.router else None
            clustered.convolution_part(kernels, x, glu, shape, config, block, routed, self.pdl)
            if routed is not None:
                self._experts(x, shape, config, block, scale, *routed[1:])
            return
        rows: Tensor | Unnormed = x
        if block.macaron_up:
            hidden = block.macaron_up.weight.shape[0]
            h = self._new((x.shape[0], hidden))
            self._up(x, shape, config, "up", block.macaron_up, h, prior, activation=config.activation_type)
            prior = None
            rows = self._add(h, block.macaron_down, x, self._tiles(shape, width, hidden).down, scale=0.5)
        tile = self._tiles(shape, width, width)
        qkv = self._new((x.shape[0], 3 * width))
        table = None if block.key_table is None else (block.key_table, shape.frames)
        self._up(rows, shape, config, "qkv", block.qkv, qkv, prior, table=table)
        context = self._context(qkv.view(shape.batch, shape.frames, -1), shape, config, block, tile).view(x.shape)
        rows = self._add(context, block.attention_out, x, tile.out)
        glu = self._new(x.shape)
        self._up(rows, shape, config, "gated", block.pointwise_1, glu, None, glu=mask)
        conv = self._depthwise(glu, shape, config, block, tile)
        router = self._in_clusters(config).for_router(self.limits, shape.tokens) if block.router else None
        rows = self._add(conv, block.pointwise_2, x, tile.out, mask=mask, joined=not block.router or router is not None)
        if block.router:
            routed = self._route(rows, shape, config, block, heard(), router if isinstance(rows, Unnormed) else None)
            self._experts(x, shape, config, block, scale, *routed)
            return
        hidden = block.up.weight.shape[0]
        h = self._new((x.shape[0], hidden))
        self._up(rows, shape, config, "up", block.up, h, None, activation=config.activation_type)
        self._add(h, block.down, x, self._tiles(shape, width, hidden).down, scale=scale, joined=False)

    def _blocks_in_pairs(self, products: Products, x, shape: Shape, stack: Stack, heard: Callable | None) -> None:
        """What `_block` does, for all blocks of the stack, with products by pairs of programs and, between the first
        block and the last, a residual stream of 24 bits.
        """
        both = {"tile": self._tiles(shape, x.shape[1], x.shape[1]).norm, "pdl": self.pdl}
        stream = to_stream(x, self.dtype, **both)
        for i, block in enumerate(stack.blocks):
            hear = partial(heard, i) if block.router else None
            stream, more = self._block_in_pairs(products, stream, shape, stack.config, block, hear)
            last = i + 1 == len(stack.blocks)
            if last or self.trace is not None:
                from_stream(stream, x, more=more, **both)
            self._traced(block, x)
            if not last:
                stream = norm_stream(stream, *block.final_norm, eps=stack.config.norm_eps, more=more, **both)

    def _block_in_pairs(self, products: Products, stream: Stream, shape: Shape, config, block: Block, heard):
        """The stream behind the block, without its final norm, and what is to be added to it; see `norm_stream`."""
        tokens, width = stream.raw.shape
        tile, scale, both = self._tiles(shape, width, width), 0.5, {"eps": config.norm_eps, "pdl": self.pdl}
        lengths = shape.lengths, shape.frames
        h, qkv = self._new((tokens, config.linear_units)), self._new((tokens, 3 * width))
        glu = self._new((tokens, width))
        activated = {"activation": config.activation_type, **both}
        products.up(stream, block.macaron_up, h, **activated)
        stream = products.add(h, block.macaron_down, stream, scale=scale, pdl=self.pdl)
        table = None if block.key_table is None else (block.key_table, shape.frames)
        products.up(stream, block.qkv, qkv, table=table, **both)
        context = self._context(qkv.view(shape.batch, shape.frames, -1), shape, config, block, tile).view(tokens, width)
        stream = products.add(context, block.attention_out, stream, scale=1.0, pdl=self.pdl)
        products.up(stream, block.pointwise_1, glu, glu=lengths, **both)
        conv = self._depthwise(glu, shape, config, block, tile)
        stream = products.add(conv, block.pointwise_2, stream, scale=1.0, mask=lengths, pdl=self.pdl)
        if block.router:
            routed = self._route(stream, shape, config, block, heard(), products)
            return stream, self._experts(stream, shape, config, block, scale, *routed)
        products.up(stream, block.up, h, **activated)
        return products.add(h, block.down, stream, scale=scale, normed=False, pdl=self.pdl), None

    def _context(self, qkv, shape: Shape, config, block: Block, tile: tiles.Tiles) -> Tensor:
        context = self._new((shape.batch, shape.frames, config.attention_dim))
        attention(
            qkv, shape.lengths, context, heads=config.attention_heads, key_bias=block.key_bias, chunk=shape.chunk,
            tile=tile.attention, dot=self.dot, pdl=self.pdl,
        )  # fmt: skip
        return context

    def _depthwise(self, glu, shape: Shape, config, block: Block, tile: tiles.Tiles) -> Tensor:
        conv = self._new(glu.shape)
        depthwise(
            glu, block.depthwise, block.depthwise_bias, conv, frames=shape.frames, activation=config.activation_type,
            left=config.cnn_module_kernel - 1 if config.causal else (config.cnn_module_kernel - 1) // 2,
            before=block.before_first, norm=block.depthwise_norm, tile=tile.depthwise, pdl=self.pdl,
        )  # fmt: skip
        return conv

    def _up(self, rows, shape: Shape, config, operation: str, layer, out, prior, **options) -> None:
        """out = epilogue(layer(norm(rows))); with `prior`, the stream first becomes its layer norm with that."""
        width = layer.weight.shape[1]
        tile = self._tiles(shape, width, out.shape[1])
        if isinstance(rows, Unnormed):
            options |= {"sums": self._sums(layer.weight), "eps": config.norm_eps}
        else:
            x, rows = rows, self._new(rows.shape)
            norm(x, rows, eps=config.norm_eps, tile=tile.norm, prior=(*prior, x) if prior else None, pdl=self.pdl)
        self._linear(rows, layer, out, tile=getattr(tile, operation), **options)

    def _add(self, a, layer, x, tile: Tile, scale=1.0, joined=True, **options) -> Tensor | Unnormed:
        """x += scale * layer(a) -> x, or, if the next product is to make its norm, what that takes of x."""
        leaves, (tokens, width), (fewest, most) = None, x.shape, self.joined
        if joined and fewest <= tokens <= most and copyable(a) and copyable(layer.weight) and width % 8 == 0:
            leaves = Unnormed.empty(x, self.dtype, tile.n)
        self._linear(a, layer, x, tile=tile, residual_scale=scale, leaves=leaves, **options)
        return x if leaves is None else leaves

    def _in_clusters(self, config) -> clustered.ClusteredStack:
        return self.clustered[0 if config is self.weights.main.config else 1]

    def _routed(self, shape: Shape, width: int, heard) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the router hears, and places for what it finds."""
        y, gate = self._new((shape.tokens, width), self.experts_dtype), self._new((shape.tokens,), torch.float32)
        return heard, y, self._new((shape.tokens,), torch.int32), gate

    def _route(
        self, x: Tensor | Unnormed | Stream, shape: Shape, config, block: Block, heard, products: Products | None = None
    ):
        """The experts' input, each token's expert and gate, and, where the sort wants them, counts of experts and of
        how many tokens each; by `products`, if given: then x is a `Stream` or `Unnormed`.
        """
        experts, hidden, width = block.up.weight.shape
        tile, counts = self._tiles(shape, width, hidden), None
        counted = routed(shape.tokens) if products else tile.router.m
        # Whoever watches may change the choices, and then the router's counts are no longer theirs.
        if tile.sort.parts > 1 and self.trace is None:
            counts = self._new((-(-shape.tokens // counted), experts), torch.int32)
        options = {"frames": shape.frames, "eps": config.norm_eps, "scale": block.router_scale, "counts": counts}
        heard, *found = self._routed(shape, width, heard)
        if products:
            products.route(x, block.router, heard, shape.lengths, *found, pdl=self.pdl, **options)
        else:
            weights = block.router.weight, block.router.bias
            route(x, *weights, heard, shape.lengths, *found, tile=tile.router, pdl=self.pdl, **options)
        return *found, None if counts is None else (counts, counted)

    def _experts(self, x: Tensor | Stream, shape: Shape, config, block: Block, scale, y, expert_idx, gate, counts=None):
        """x += the experts' part; of a `Stream` it is returned, by slot, and each token's slot: see `norm_stream`."""
        tokens = shape.tokens
        experts, hidden, width = block.up.weight.shape
        tile = self._tiles(shape, width, hidden)
        if self.trace is not None:
            self.trace("routes", block, expert_idx)
        gate = None if config.moe.keep_expert_output else gate
        streams = isinstance(x, Stream)
        kernels = None if streams else self._in_clusters(config).for_experts(self.limits, tokens)
        if kernels is not None:
            kernels(y, expert_idx, gate, block.up, block.down, x, scale=scale, pdl=self.pdl)
            return None
        up = {"activation": config.activation_type, "tile": tile.expert_up, "weight_scale": block.up.scale}
        down = {"residual_scale": scale, "gate": gate, "tile": tile.expert_down, "weight_scale": block.down.scale}
        both = {"dot": self.dot, "pdl": self.pdl}
        rows = tile.expert_up.m
        slot_token, tile_expert = slots(tokens, experts, rows, y.device)
        more = (self._new((slot_token.numel(), width)), torch.empty_like(expert_idx)) if streams else None
        sort_tokens(
            expert_idx, slot_token, tile_expert, experts=experts, rows=rows, tile=tile.sort, pdl=self.pdl,
            counts=counts, token_slot=more[1] if more else None,
        )  # fmt: skip
        h = self._new((slot_token.numel(), hidden), self.experts_dtype)
        expert_product(y, block.up.weight, block.up.bias, slot_token, tile_expert, h, **up, **both)
        to, places = more[0] if more else x, (slot_token, tile_expert)
        expert_product(h, block.down.weight, block.down.bias, *places, to, by_slot=streams, **down, **both)
        return more
