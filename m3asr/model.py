"""The Conformer mixture-of-experts recogniser in plain torch: the one definition that every engine is compared with.

3M-ASR (You et al. 2022, arXiv 2204.03178) on the Conformer block (Gulati et al. 2020, arXiv 2005.08100) as WeNet
writes it. Parameter names are those of the 3M-ASR checkpoints; `checkpoint.py` renames WeNet's. The model knows
features and lengths, nothing of audio or text.

Shape letters: B batch, T frames, S subsampled frames, D model width, H heads, K head width, F hidden width, E experts,
N hypotheses, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from m3asr import ops
from m3asr.config import DecoderConfig, EncoderConfig, ModelConfig, MoEConfig


class Subsampling(nn.Module):
    """Strided convolutions over time and frequency, then a projection (specification 2.1)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        channels, width = config.conv_subsample_in_ch, config.attention_dim
        self.in_channels = channels
        bins = config.input_dim // channels
        layers = []
        for kernel, stride in config.subsampling:
            layers += [nn.Conv2d(channels, width, kernel, stride), nn.ReLU()]
            channels, bins = width, (bins - kernel) // stride + 1
        self.conv = nn.Sequential(*layers)
        self.out = nn.Sequential(nn.Linear(width * bins, width))

    def forward(self, features: Tensor) -> Tensor:
        x = features.unflatten(-1, (self.in_channels, -1)).transpose(1, 2)  # (B, channels, T, bins)
        x = self.conv(x)  # (B, D, S, bins')
        return self.out(x.transpose(1, 2).flatten(2))  # (B, S, D)


class FeedForward(nn.Module):
    """w_2 act(w_1 x)."""

    def __init__(self, width: int, hidden: int, activation: str, dropout: float):
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)
        self.activation = ops.ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(self.activation(self.w_1(x))))


class ExpertLinear(nn.Module):
    """The weights of one linear layer for all experts: weight (E, out, in), bias (E, out)."""

    def __init__(self, experts: int, width_in: int, width_out: int):
        super().__init__()
        bound = 1.0 / math.sqrt(width_in)
        self.weight = nn.Parameter(torch.empty(experts, width_out, width_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(experts, width_out).uniform_(-bound, bound))


class Experts(nn.Module):
    """E feed-forwards; each token goes through one."""

    def __init__(self, config: MoEConfig, width: int, activation: str):
        super().__init__()
        self.w_1 = ExpertLinear(config.num_experts, width, config.hidden_units)
        self.w_2 = ExpertLinear(config.num_experts, config.hidden_units, width)
        self.activation = activation

    def forward(self, x: Tensor, expert_idx: Tensor) -> Tensor:
        return ops.moe(x, expert_idx, self.w_1.weight, self.w_1.bias, self.w_2.weight, self.w_2.bias, self.activation)


class MoEFeedForward(nn.Module):
    """Top-1 mixture of experts; the router listens to the embedding network and to the block (specification 2.7)."""

    def __init__(self, config: MoEConfig, width: int, embedding_width: int, activation: str):
        super().__init__()
        self.experts = Experts(config, width, activation)
        self.router_weights = nn.Parameter(torch.zeros(embedding_width + width, config.num_experts))
        self.router_bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_with_bias else None
        self.keep_expert_output = config.keep_expert_output

    def router_logits(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, S, D), (B, S, D') -> float32 (B, S, E). Always float32: half precision would flip near-ties."""
        logits = torch.matmul(torch.cat((embedding, x), dim=-1).float(), self.router_weights.float())
        return logits if self.router_bias is None else logits + self.router_bias.float()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        gate, expert_idx = ops.route(self.router_logits(x, embedding).flatten(0, 1))  # (B*S,)
        y = self.experts(x.flatten(0, 1), expert_idx)  # (B*S, D)
        if not self.keep_expert_output:
            y = y * gate.unsqueeze(-1).to(y.dtype)
        return y.unflatten(0, (x.shape[0], x.shape[1]))


@dataclass
class Cache:
    """What a block remembers of the frames before a chunk. Its forward leaves here what is to be remembered next.

    attention (B, H, t, 2K+1): key with position, value and key bias of each earlier frame; after the forward those
    of the chunk alone (B, H, S, 2K+1), which the caller appends. conv (B, D, kernel-1): the last inputs of
    pointwise_conv1, zeros at the start of a stream; replaced.
    """

    attention: Tensor
    conv: Tensor

    def extend(self, k: Tensor, v: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """k, v (B, H, S, K), key_bias (B, H, 1, S) or None -> the same over t + S frames."""
        bias = torch.zeros_like(k[..., :1]) if key_bias is None else key_bias.transpose(-2, -1)
        earlier, self.attention = self.attention, torch.cat((k, v, bias), dim=-1)
        width = k.shape[-1]
        k, v, bias = torch.cat((earlier, self.attention), dim=2).split((width, width, 1), dim=-1)
        return k, v, bias.transpose(-2, -1)


class Attention(nn.Module):
    """Multi-head attention: self (with or without positional terms) and cross."""

    def __init__(self, width: int, heads: int, rel_pos: bool = False):
        super().__init__()
        self.heads = heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.rel_pos = rel_pos
        if rel_pos:
            self.linear_pos = nn.Linear(width, width, bias=False)
            self.pos_bias_u = nn.Parameter(torch.zeros(heads, width // heads))
            self.pos_bias_v = nn.Parameter(torch.zeros(heads, width // heads))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, S, D) -> (B, H, S, K)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor, pos=None, cache: Cache | None = None) -> Tensor:
        q = self.split(self.linear_q(x))
        k, v, key_bias = self.split(self.linear_k(memory)), self.split(self.linear_v(memory)), None
        if self.rel_pos:
            p = self.split(self.linear_pos(pos))  # (1 or B, H, S, K)
            k, key_bias = ops.rel_pos_keys(k, p, self.pos_bias_u, self.pos_bias_v)
        if cache is not None:
            k, v, key_bias = cache.extend(k, v, key_bias)
        context = ops.attention(q, k, v, mask, key_bias)
        return self.linear_out(context.transpose(1, 2).flatten(2))


class ConvModule(nn.Module):
    """Pointwise, GLU, depthwise, norm, activation, pointwise (specification 2.6)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width, kernel = config.attention_dim, config.cnn_module_kernel
        self.left_padding = kernel - 1 if config.causal else 0
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1)
        padding = 0 if config.causal else (kernel - 1) // 2
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=padding, groups=width)
        self.use_layer_norm = config.cnn_module_norm == "layer_norm"
        norm = nn.LayerNorm if self.use_layer_norm else nn.BatchNorm1d
        self.norm = norm(width, eps=config.cnn_norm_eps)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1)
        self.activation = ops.ACTIVATIONS[config.activation_type]

    def forward(self, x: Tensor, frames: Tensor, glu_frames: Tensor, cache: Cache | None = None) -> Tensor:
        x = x.transpose(1, 2).masked_fill(~frames.unsqueeze(1), 0.0)  # (B, D, S)
        if self.left_padding:
            if cache is None:
                x = nn.functional.pad(x, (self.left_padding, 0))
            else:
                x = torch.cat((cache.conv, x), dim=2)
                cache.conv = x[..., -self.left_padding :]
            # Causal: nothing after a frame reaches it, so padding needs no second masking.
            x = nn.functional.glu(self.pointwise_conv1(x), dim=1)
        else:
            # Padding is GLU(bias) by now and would reach the last frames through the depthwise convolution.
            x = nn.functional.glu(self.pointwise_conv1(x), dim=1).masked_fill(~glu_frames.unsqueeze(1), 0.0)
        x = self.depthwise_conv(x)
        if self.use_layer_norm:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        else:
            x = self.norm(x)
        x = self.pointwise_conv2(self.activation(x))
        return x.transpose(1, 2).masked_fill(~frames.unsqueeze(-1), 0.0)  # (B, S, D)


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward (dense or experts), norm."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width, activation, dropout = config.attention_dim, config.activation_type, config.dropout_rate

        def norm():
            return nn.LayerNorm(width, eps=config.norm_eps)

        self.self_attn = Attention(width, config.attention_heads, config.selfattention_layer_type == "rel_selfattn")
        self.conv_module = ConvModule(config)
        if config.moe is None:
            self.feed_forward = FeedForward(width, config.linear_units, activation, dropout)
        else:
            self.feed_forward = MoEFeedForward(config.moe, width, config.embed.attention_dim, activation)
        self.norm_ff, self.norm_mha, self.norm_conv, self.norm_final = norm(), norm(), norm(), norm()
        self.macaron = config.macaron_style
        if self.macaron:
            self.feed_forward_macaron = FeedForward(width, config.linear_units, activation, dropout)
            self.norm_ff_macaron = norm()
        self.ff_scale = 0.5 if self.macaron else 1.0
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, pos, attention_mask, frames, glu_frames, embedding=None, cache=None) -> Tensor:
        if self.macaron:
            x = x + self.ff_scale * self.dropout(self.feed_forward_macaron(self.norm_ff_macaron(x)))
        y = self.norm_mha(x)
        x = x + self.dropout(self.self_attn(y, y, attention_mask, pos, cache))
        x = x + self.dropout(self.conv_module(self.norm_conv(x), frames, glu_frames, cache))
        y = self.norm_ff(x)
        y = self.feed_forward(y) if embedding is None else self.feed_forward(y, embedding)
        x = x + self.ff_scale * self.dropout(y)
        return self.norm_final(x)


class GlobalCmvn(nn.Module):
    """(x - mean) * istd per bin, for the families that normalise inside the model."""

    def __init__(self, bins: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(bins))
        self.register_buffer("istd", torch.ones(bins))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.istd


class Encoder(nn.Module):
    """A Conformer stack. With `config.embed` it holds the embedding network, whose output every router hears."""

    def __init__(self, config: EncoderConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.subsampling = Subsampling(config)
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.num_blocks))
        self.after_norm = nn.LayerNorm(config.attention_dim, eps=config.norm_eps)
        self.out_linear = nn.Linear(config.attention_dim, vocab_size)
        self.dropout = nn.Dropout(config.dropout_rate)
        if config.embed is not None:
            self.embed = Encoder(config.embed, vocab_size)

    def forward(self, features, attention_mask, frames, glu_frames, caches=None, offsets=None) -> Tensor:
        """features (B, T, F), attention_mask bool (B, 1, 1 or S, t + S) -> hidden (B, S, D).

        frames bool (B, S): the frames of the utterance. glu_frames bool (B, S): the frames that are kept after the
        GLU: the same for batch-invariant results, all of them as the original code has it (specification 2.6).
        For a chunk of a stream: caches, a list of one `Cache` a block for this stack and, behind it, one for the
        embedding network; offsets int (B,), the position of the chunk's first frame.
        """
        own, embeds = ([None] * len(self.blocks), None) if caches is None else (caches[0], caches[1:])
        embedding = None
        if self.config.embed is not None:
            # Detached as in 3M-ASR: the embedding network learns from its own loss alone.
            embedding = self.embed(features, attention_mask, frames, glu_frames, embeds, offsets).detach()
        x, pos = self.subsampling(features), None
        if self.config.pos_enc_layer_type == "rel_pos":
            x = x * math.sqrt(x.shape[-1])
            start = 0 if offsets is None else offsets.unsqueeze(-1)
            pos = ops.positional_encoding(x.shape[1], self.config.attention_dim, start, device=x.device).to(x.dtype)
            pos = pos.unsqueeze(0) if offsets is None else pos  # (1 or B, S, D)
        elif self.config.selfattention_layer_type == "rel_selfattn":
            pos = torch.zeros_like(x[:1])
        x = self.dropout(x)
        for block, cache in zip(self.blocks, own, strict=True):
            x = block(x, pos, attention_mask, frames, glu_frames, embedding, cache)
        return self.after_norm(x)


class DecoderBlock(nn.Module):
    """Causal self-attention, attention over the encoder's output, feed-forward."""

    def __init__(self, config: DecoderConfig, width: int):
        super().__init__()
        self.self_attn = Attention(width, config.attention_heads)
        self.src_attn = Attention(width, config.attention_heads)
        self.feed_forward = FeedForward(width, config.linear_units, config.activation_type, config.dropout_rate)
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.norm3 = nn.LayerNorm(width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor, causal: Tensor, hidden: Tensor, frames: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y, y, causal))
        x = x + self.dropout(self.src_attn(self.norm2(x), hidden, frames))
        return x + self.dropout(self.feed_forward(self.norm3(x)))


class TransformerDecoder(nn.Module):
    """Predicts each next token from the ones before it and the encoder's output (specification 3.1)."""

    def __init__(self, config: DecoderConfig, num_blocks: int, width: int, vocab_size: int):
        super().__init__()
        self.embed = nn.Sequential(nn.Embedding(vocab_size, width))
        self.decoders = nn.ModuleList(DecoderBlock(config, width) for _ in range(num_blocks))
        self.after_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.output_layer = nn.Linear(width, vocab_size)

    def forward(self, hidden: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """hidden (N or 1, S, D), lengths int (N or 1,), tokens int64 (N, L) from sos on -> log_probs (N, L, V).

        Tokens after a hypothesis's end change nothing before them, so no token lengths are needed.
        """
        size, width = tokens.shape[1], hidden.shape[-1]
        pos = ops.positional_encoding(size, width, device=hidden.device).to(hidden.dtype)
        x = self.embed(tokens) * math.sqrt(width) + pos  # (N, L, D)
        position = torch.arange(size, device=hidden.device)
        causal = position <= position.unsqueeze(-1)  # (L, L)
        frames = ops.frame_mask(lengths, hidden.shape[1]).unsqueeze(1).unsqueeze(1)  # (N or 1, 1, 1, S)
        for block in self.decoders:
            x = block(x, causal, hidden, frames)
        return torch.log_softmax(self.output_layer(self.after_norm(x)).float(), dim=-1)


class BiTransformerDecoder(nn.Module):
    """A left-to-right and a right-to-left decoder."""

    def __init__(self, config: DecoderConfig, width: int, vocab_size: int):
        super().__init__()
        self.left_decoder = TransformerDecoder(config, config.num_blocks, width, vocab_size)
        self.right_decoder = TransformerDecoder(config, config.r_num_blocks, width, vocab_size)


class Model(nn.Module):
    """Features -> CTC log-probabilities and the hidden sequence that the attention decoder reads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width = config.encoder.attention_dim
        self.encoder = Encoder(config.encoder, config.vocab_size)
        self.cmvn = GlobalCmvn(config.encoder.input_dim) if config.cmvn == "inside" else None
        if config.decoder is None:
            self.decoder = None
        elif config.decoder.r_num_blocks:
            self.decoder = BiTransformerDecoder(config.decoder, width, config.vocab_size)
        else:
            self.decoder = TransformerDecoder(config.decoder, config.decoder.num_blocks, width, config.vocab_size)

    def forward(self, features: Tensor, lengths: Tensor, chunk_size=0, left_chunks=-1, compat=None):
        """features float32 (B, T, F), lengths int32 (B,) -> log_probs float32 (B, S, V), hidden (B, S, D), int32 (B,).

        T must be at least `config.encoder.min_frames`. What stands in `features` past an utterance's length does not
        matter. `chunk_size`, `left_chunks`: ints or 0-d tensors for models trained on chunks (see `ops.chunk_mask`).
        `compat`, a bool or a 0-d bool tensor, replaces `config.compat`.
        """
        hidden, out_lengths = self.encode(features, lengths, chunk_size, left_chunks, compat)
        return self.log_probs(hidden), hidden, out_lengths

    def encode(self, features: Tensor, lengths: Tensor, chunk_size=0, left_chunks=-1, compat=None):
        """Everything up to the CTC head: -> hidden (B, S, D), out_lengths int32 (B,)."""
        config = self.config.encoder
        compat = self.config.compat if compat is None else compat
        features, size, out_lengths = self._prepared(features, lengths)
        if compat is not False and self.config.family == "3m":
            original = ops.subsampled_lengths(lengths, config.subsampling, features.shape[1])
            out_lengths = torch.where(torch.as_tensor(compat, device=lengths.device), original, out_lengths)
        frames = ops.frame_mask(out_lengths, size)  # (B, S)
        glu_frames = frames if compat is False else frames | compat
        attention_mask = frames.unsqueeze(1).unsqueeze(1)  # (B, 1, 1, S)
        if config.use_dynamic_chunk:
            attention_mask = attention_mask & ops.chunk_mask(size, chunk_size, left_chunks, features.device)
        elif config.static_chunk_size > 0:
            chunk = ops.chunk_mask(size, config.static_chunk_size, left_chunks, features.device)
            attention_mask = attention_mask & chunk
        return self.encoder(features, attention_mask, frames, glu_frames), out_lengths

    def stream(self, features: Tensor, lengths: Tensor, offsets: Tensor, cached: Tensor, *caches: Tensor):
        """The next chunk of each of B streams -> log_probs, hidden, out_lengths as in `forward`, then new caches.

        features (B, T, F), lengths (B,) of the chunk, right context of the subsampling included; only a stream's last
        chunk may be shorter than T. offsets int64 (B,): frames of the stream before this chunk, (S); cached int64
        (B,): how many of them the cache holds, at its end. caches: attention (blocks, B, H, t, 2K+1) and conv
        (blocks, B, D, kernel-1) of the main stack, then of the embedding network (see `Cache`); the new ones come in
        the same order, attention for the chunk alone (blocks, B, H, S, 2K+1). Equal to `forward` with chunks of S
        frames, provided that the cache holds the frames which `ops.chunk_mask` shows (specification 3.4). Needs
        `config.encoder.can_stream`.
        """
        features, size, out_lengths = self._prepared(features, lengths)
        frames = ops.frame_mask(out_lengths, size)  # (B, S)
        earlier = caches[0].shape[3]
        from_end = torch.arange(earlier, 0, -1, device=features.device)  # (t,)
        attention_mask = torch.cat((from_end <= cached.unsqueeze(-1), frames), dim=1)  # (B, t + S)
        stacks = [
            [Cache(*tensors) for tensors in zip(attention, conv, strict=True)]
            for attention, conv in zip(caches[::2], caches[1::2], strict=True)
        ]
        hidden = self.encoder(features, attention_mask.unsqueeze(1).unsqueeze(1), frames, frames, stacks, offsets)
        new = [
            torch.stack(tensors)
            for blocks in stacks
            for tensors in ([cache.attention for cache in blocks], [cache.conv for cache in blocks])
        ]
        return self.log_probs(hidden), hidden, out_lengths, *new

    def _prepared(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, int, Tensor]:
        """Features without what stands past their length, normalised; S; lengths after the subsampling."""
        features = features.masked_fill(~ops.frame_mask(lengths, features.shape[1]).unsqueeze(-1), 0.0)
        if self.cmvn is not None:
            features = self.cmvn(features)
        size = features.shape[1]
        for kernel, stride in self.config.encoder.subsampling:
            size = (size - kernel) // stride + 1
        return features, size, ops.subsampled_lengths(lengths, self.config.encoder.subsampling)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """CTC head: (B, S, D) -> float32 (B, S, V)."""
        return torch.log_softmax(self.encoder.out_linear(hidden).float(), dim=-1)

    def decode(self, hidden, lengths, tokens, reversed_tokens=None) -> tuple[Tensor, Tensor | None]:
        """Attention decoder: log_probs (N, L, V) of each next token, left to right, and right to left if asked for.

        The second is None without `reversed_tokens` or without a right-to-left decoder.
        """
        left, right = self.left_decoder, self.right_decoder
        backward = None if right is None or reversed_tokens is None else right(hidden, lengths, reversed_tokens)
        return left(hidden, lengths, tokens), backward

    @property
    def left_decoder(self) -> TransformerDecoder | None:
        return self.decoder.left_decoder if isinstance(self.decoder, BiTransformerDecoder) else self.decoder

    @property
    def right_decoder(self) -> TransformerDecoder | None:
        return self.decoder.right_decoder if isinstance(self.decoder, BiTransformerDecoder) else None
