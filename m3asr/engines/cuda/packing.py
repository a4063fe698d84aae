"""Weights as the kernels read them, made once from a model's state_dict.

Folded: each norm's weight and bias into the linear layer behind it, batch norms into the depthwise convolution, the
positional terms of the attention into the query's bias, a table added to the keys and a bias a key (see
kernels/attention.py), the scale of the positional encoding into the subsampling's projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from m3asr import ops
from m3asr.config import EncoderConfig, ModelConfig
from m3asr.errors import ModelError

# What is computed with; "fp8" has the experts' weights in 8 bits besides, and then their inputs in float16: the card
# makes a pair of float8 numbers float16 in one instruction, and bfloat16 by way of that in three more.
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
EXPERTS_TYPES = {**TYPES, "fp8": torch.float16}
FLOAT8 = torch.float8_e4m3fn


@dataclass
class Linear:
    """weight (..., out, in) in the compute type, bias float32 (..., out); float8 weights count times scale float32
    (..., out).
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None


@dataclass
class Block:
    """One Conformer block. `up`, `down` hold all experts (E, ., .) if there is a `router`."""

    macaron_up: Linear | None
    macaron_down: Linear | None
    qkv: Linear  # (3D, D)
    key_table: Tensor | None  # (positions, D) in the compute type
    key_bias: Tensor | None  # float32 (H, positions)
    attention_out: Linear
    pointwise_1: Linear  # (2D, D), rows alternate value, gate
    depthwise: Tensor  # float32 (taps, D)
    depthwise_bias: Tensor  # float32 (D,)
    depthwise_norm: tuple[Tensor, Tensor, float] | None
    before_first: Tensor | None  # float32 (D,): what a causal convolution sees before the first frame
    pointwise_2: Linear
    router: Linear | None  # float32, weight (D, E), divided by router_scale
    router_scale: float  # a power of two: makes the router's largest weight one between 1 and 2
    up: Linear
    down: Linear
    final_norm: tuple[Tensor, Tensor]
    # What the tables are made of, kept to make them longer.
    linear_pos: Tensor | None  # float32 (D, D)
    position_biases: tuple[Tensor, Tensor] | None  # u, v float32 (H, K)


@dataclass
class Stack:
    """A Conformer stack without its subsampling."""

    config: EncoderConfig
    blocks: list[Block]
    after_norm: tuple[Tensor, Tensor]


@dataclass
class Subsampling:
    """The front ends of G stacks of one shape, side by side."""

    first: Linear  # float32, weight (G, taps, D)
    following: list[Linear]  # weight (G, D, kernel, kernel, D), ordered (out, time, bin, in)
    out: Linear  # weight (G, D, bins * D), ordered (out, bin, channel)


@dataclass
class Weights:
    """Everything that the engine reads."""

    main: Stack
    embed: Stack | None
    subsamplings: list[Subsampling]  # one for both stacks if their shapes agree, else (embed, main)
    heard: Linear | None  # float32 (blocks * E, D'): what all routers hear from the embedding network
    head: Linear  # (V, D)
    cmvn: tuple[Tensor, Tensor] | None


@dataclass
class Packed:
    """A model as the engine loads it. decoder: the attention decoder's parameters, float32, by their own names."""

    config: ModelConfig
    precision: str
    weights: Weights
    decoder: dict[str, Tensor]


def pack(config: ModelConfig, state: dict[str, Tensor], precision: str, device) -> Packed:
    """A state_dict, with names as `Model` has them, packed on a device.

    Raises ModelError for an unknown precision, for what no kernel covers, and for missing weights.
    """
    if precision not in TYPES:
        raise ModelError(f"the cuda engine has no precision {precision!r}; available: {', '.join(TYPES)}")
    check_supported(config)
    decoder = {}
    if config.decoder is not None:
        decoder = {name: value.float().to(device) for name, value in state.items() if name.startswith("decoder.")}
    try:
        return Packed(config, precision, Packer(config, state, precision, device).weights(), decoder)
    except KeyError as error:
        raise ModelError(f"the model's weights lack {error.args[0]}, which its config.json asks for") from None


class Packer:
    """Reads a state_dict, with names as `Model` has them, into `Weights`."""

    def __init__(self, config: ModelConfig, state: dict[str, Tensor], precision: str, device: str):
        self.config, self.state, self.device = config, state, device
        self.dtype = TYPES[precision]
        self.small_experts = precision == "fp8"

    def weights(self) -> Weights:
        config = self.config.encoder
        names = ["encoder."] if config.embed is None else ["encoder.embed.", "encoder."]
        configs = [config] if config.embed is None else [config.embed, config]
        parts = [self._subsampling(name, c) for name, c in zip(names, configs, strict=True)]
        if len(parts) == 2 and _same_front(*configs):
            parts = [_side_by_side(*parts)]
        cmvn = None
        if self.config.cmvn == "inside":
            cmvn = (self._get("cmvn.mean"), self._get("cmvn.istd"))
        return Weights(
            main=self._stack("encoder.", config),
            embed=None if config.embed is None else self._stack("encoder.embed.", config.embed),
            subsamplings=parts,
            heard=self._heard(config) if config.moe else None,
            head=self._linear("encoder.out_linear"),
            cmvn=cmvn,
        )

    def _get(self, name: str) -> Tensor:
        return self.state[name].to(device=self.device, dtype=torch.float32)

    def _packed(self, weight: Tensor, bias: Tensor, dtype=None) -> Linear:
        packed = weight.to(dtype or self.dtype)
        if packed.dtype == torch.float16 and packed.isinf().any():
            raise ModelError(
                f"found weights of up to {float(weight.abs().max()):.3g}, the norm in front of them included; "
                "fp16 ends at 65504: use bf16"
            )
        return Linear(packed.contiguous(), bias.float().contiguous())

    def _linear(self, name: str) -> Linear:
        return self._packed(self._get(name + ".weight"), self._get(name + ".bias"))

    def _norm(self, name: str) -> tuple[Tensor, Tensor]:
        return self._get(name + ".weight"), self._get(name + ".bias")

    def _behind_norm(self, weight: Tensor, bias: Tensor, norm: str) -> tuple[Tensor, Tensor]:
        """weight (..., C, D) and bias (..., C) that read the normalised input before the norm's own affine step."""
        norm_w, norm_b = self._norm(norm)
        return weight * norm_w, bias + weight @ norm_b

    def _stack(self, prefix: str, config: EncoderConfig) -> Stack:
        blocks = [self._block(f"{prefix}blocks.{i}.", config) for i in range(config.num_blocks)]
        return Stack(config, blocks, self._norm(prefix + "after_norm"))

    def _block(self, prefix: str, config: EncoderConfig) -> Block:
        get = self._get
        macaron_up = macaron_down = None
        if config.macaron_style:
            name = prefix + "feed_forward_macaron."
            folded = self._behind_norm(get(name + "w_1.weight"), get(name + "w_1.bias"), prefix + "norm_ff_macaron")
            macaron_up, macaron_down = self._packed(*folded), self._linear(name + "w_2")
        qkv, linear_pos, biases = self._attention(prefix, config)
        conv = prefix + "conv_module."
        bias_1 = get(conv + "pointwise_conv1.bias")
        pointwise_1 = self._behind_norm(get(conv + "pointwise_conv1.weight").squeeze(-1), bias_1, prefix + "norm_conv")
        depthwise, depthwise_bias, depthwise_norm = self._depthwise(conv, config)
        before_first = None
        if config.causal:
            # The zeros in front go through the pointwise layer, not through the norm: its bias is what remains.
            before_first = torch.nn.functional.glu(bias_1, dim=0)
        router, scale, up, down = self._feed_forward(prefix, config)
        return Block(
            macaron_up=macaron_up,
            macaron_down=macaron_down,
            qkv=qkv,
            key_table=None,
            key_bias=None,
            attention_out=self._linear(prefix + "self_attn.linear_out"),
            pointwise_1=self._packed(*map(_alternating, pointwise_1)),
            depthwise=depthwise,
            depthwise_bias=depthwise_bias,
            depthwise_norm=depthwise_norm,
            before_first=before_first,
            pointwise_2=self._packed(
                get(conv + "pointwise_conv2.weight").squeeze(-1), get(conv + "pointwise_conv2.bias")
            ),
            router=router,
            router_scale=scale,
            up=up,
            down=down,
            final_norm=self._norm(prefix + "norm_final"),
            linear_pos=linear_pos,
            position_biases=biases,
        )

    def _attention(self, prefix: str, config: EncoderConfig) -> tuple[Linear, Tensor | None, tuple | None]:
        name = prefix + "self_attn."
        parts = [
            self._behind_norm(
                self._get(f"{name}linear_{part}.weight"), self._get(f"{name}linear_{part}.bias"), prefix + "norm_mha"
            )
            for part in "qkv"
        ]
        weight, bias = torch.cat([w for w, _ in parts]), torch.cat([b for _, b in parts])
        if config.selfattention_layer_type != "rel_selfattn":
            return self._packed(weight, bias), None, None
        u, v = self._get(name + "pos_bias_u"), self._get(name + "pos_bias_v")
        bias[: u.numel()] += u.flatten()
        if config.pos_enc_layer_type != "rel_pos":
            return self._packed(weight, bias), None, None  # positions are zeros: nothing is left of v
        return self._packed(weight, bias), self._get(name + "linear_pos.weight"), (u, v)

    def _depthwise(self, name: str, config: EncoderConfig):
        weight = self._get(name + "depthwise_conv.weight").squeeze(1).t()  # (taps, D)
        bias = self._get(name + "depthwise_conv.bias")
        norm_w, norm_b = self._norm(name + "norm")
        if config.cnn_module_norm == "layer_norm":
            return weight.contiguous(), bias.contiguous(), (norm_w, norm_b, config.cnn_norm_eps)
        factor = norm_w / torch.sqrt(self._get(name + "norm.running_var") + config.cnn_norm_eps)
        bias = (bias - self._get(name + "norm.running_mean")) * factor + norm_b
        return (weight * factor).contiguous(), bias.contiguous(), None

    def _feed_forward(self, prefix: str, config: EncoderConfig):
        """Router or None, its scale, up, down."""
        name, router, scale = prefix + "feed_forward.", None, 1.0
        if config.moe is not None:
            norm_w, norm_b = self._norm(prefix + "norm_ff")
            weight = self._get(name + "router_weights")[-config.attention_dim :]  # (D, E)
            bias = norm_b @ weight
            if config.moe.router_with_bias:
                bias = bias + self._get(name + "router_bias")
            weight = weight * norm_w.unsqueeze(-1)
            scale = 2.0 ** math.floor(math.log2(max(float(weight.abs().max()), 1e-30)))
            router = self._packed(weight / scale, bias, torch.float32)
            name += "experts."
        up = self._behind_norm(self._get(name + "w_1.weight"), self._get(name + "w_1.bias"), prefix + "norm_ff")
        down = self._get(name + "w_2.weight"), self._get(name + "w_2.bias")
        packed = _float8 if self.small_experts and router else self._packed
        return router, scale, packed(*up), packed(*down)

    def _heard(self, config: EncoderConfig) -> Linear:
        width = config.embed.attention_dim
        names = [f"encoder.blocks.{i}.feed_forward.router_weights" for i in range(config.num_blocks)]
        weight = torch.cat([self._get(name)[:width].t() for name in names])  # (blocks * E, D')
        return self._packed(weight, torch.zeros(weight.shape[0], device=self.device), torch.float32)

    def _subsampling(self, prefix: str, config: EncoderConfig) -> Subsampling:
        name = prefix + "subsampling."
        width = config.attention_dim
        weight = self._get(name + "conv.0.weight").flatten(1).t()  # (taps, D)
        first = self._packed(weight.unsqueeze(0), self._get(name + "conv.0.bias").unsqueeze(0), torch.float32)
        following = []
        for layer in range(1, len(config.subsampling)):
            weight = self._get(f"{name}conv.{2 * layer}.weight").permute(0, 2, 3, 1)
            bias = self._get(f"{name}conv.{2 * layer}.bias")
            following.append(self._packed(weight.unsqueeze(0), bias.unsqueeze(0)))
        scale = math.sqrt(width) if config.pos_enc_layer_type == "rel_pos" else 1.0
        weight = self._get(name + "out.0.weight").unflatten(1, (width, -1)).transpose(1, 2).flatten(1) * scale
        bias = self._get(name + "out.0.bias") * scale
        return Subsampling(first, following, self._packed(weight.unsqueeze(0), bias.unsqueeze(0)))


def _float8(weight: Tensor, bias: Tensor) -> Linear:
    """Each row of weights scaled to the type's largest number, and rounded."""
    scale = weight.abs().amax(-1).clamp(min=1e-30) / torch.finfo(FLOAT8).max
    return Linear((weight / scale.unsqueeze(-1)).to(FLOAT8).contiguous(), bias.contiguous(), scale.contiguous())


def lengthen_tables(stack: Stack, positions: int, dtype: torch.dtype) -> None:
    """Give every block of the stack positional tables of at least `positions` rows."""
    for block in stack.blocks:
        if block.linear_pos is None or (block.key_table is not None and block.key_table.shape[0] >= positions):
            continue
        u, v = block.position_biases
        pe = ops.positional_encoding(positions, block.linear_pos.shape[1], device=block.linear_pos.device)
        p = pe @ block.linear_pos.t()  # (positions, D)
        block.key_table = p.to(dtype)
        block.key_bias = torch.einsum("phk,hk->hp", p.unflatten(-1, u.shape), v - u).contiguous()


def check_supported(config: ModelConfig) -> None:
    """Raises ModelError naming the first thing that no kernel computes, of what a configuration may say at all."""
    if config.compat:
        raise ModelError("the cuda engine has no compat mode (original lengths and padding): use the eager engine")
    encoder = config.encoder
    for stack in (encoder, encoder.embed):
        if stack is None:
            continue
        if stack.embed is not None and stack is not encoder:
            raise ModelError("the cuda engine runs one embedding network, the model nests two")
        if not stack.causal and stack.cnn_module_kernel % 2 == 0:
            raise ModelError(f"a convolution over {stack.cnn_module_kernel} frames is not causal and has no middle")
        if stack.input_dim % stack.conv_subsample_in_ch:
            raise ModelError(f"{stack.conv_subsample_in_ch} channels do not divide {stack.input_dim} features")
    if encoder.embed is not None and encoder.embed.subsampling != encoder.subsampling:
        raise ModelError(
            f"the embedding network subsamples by {encoder.embed.input_layer}, the encoder by {encoder.input_layer}"
        )


def _alternating(halves: Tensor) -> Tensor:
    """(2D, ...): the first half's rows and the second's, one by one in turn."""
    return torch.stack(halves.chunk(2), dim=1).flatten(0, 1)


def _same_front(a: EncoderConfig, b: EncoderConfig) -> bool:
    return (a.attention_dim, a.conv_subsample_in_ch, a.input_dim) == (
        b.attention_dim,
        b.conv_subsample_in_ch,
        b.input_dim,
    )


def _side_by_side(a: Subsampling, b: Subsampling) -> Subsampling:
    def join(one: Linear, two: Linear) -> Linear:
        return Linear(torch.cat((one.weight, two.weight)), torch.cat((one.bias, two.bias)))

    following = [join(one, two) for one, two in zip(a.following, b.following, strict=True)]
    return Subsampling(join(a.first, b.first), following, join(a.out, b.out))
