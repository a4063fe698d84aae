"""`train.yaml` and the shapes of a checkpoint's tensors -> ModelConfig.

What the shapes tell wins over what the yaml says, and a difference is noted. A setting that would make another network
than this project runs is refused by name. Keys are those after `checkpoint.py` renamed them.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from m3asr.config import ACTIVATIONS, SUBSAMPLINGS, DecoderConfig, EncoderConfig, FbankConfig, ModelConfig, MoEConfig
from m3asr.errors import ModelError

# Settings that change the network and that this project runs in one way only.
FIXED = {
    "normalize_before": True,
    "concat_after": False,
    "use_cnn_module": True,
    "positionwise_conv_kernel_size": 1,
    "query_bias": True,
    "key_bias": True,
    "value_bias": True,
    "conv_bias": True,
    "mlp_bias": True,
    "layer_norm_type": "layer_norm",
    "mlp_type": "position_wise_feed_forward",
    "n_kv_head": None,
    "head_dim": None,
    "conv_inner_factor": 2,
    "final_norm": True,
    "use_output_layer": True,
    "src_attention": True,
    "src_query_bias": True,
    "src_key_bias": True,
    "src_value_bias": True,
    "blank_idx": 0,
}
# Settings that change training only, or only how the same numbers are computed.
TRAINING_ONLY = {
    "dropout_rate",
    "positional_dropout_rate",
    "attention_dropout_rate",
    "self_attention_dropout_rate",
    "src_attention_dropout_rate",
    "use_dynamic_left_chunk",
    "gradient_checkpointing",
    "use_sdpa",
    "n_expert",
    "n_expert_per_token",
    "n_expert_activated",
    "embed_scale",
    "aux_scale",
    "tie_word_embedding",
    "output_dim_domain",
    "output_dim_acc",
}


def model_config(family: str, values: dict, state: dict[str, Tensor], path: Path, notes: list[str]) -> ModelConfig:
    """The network of a checkpoint, without its vocabulary's special ids.

    values: contents of train.yaml at `path`; notes: gets a sentence for each choice made. Raises ModelError.
    """
    model_conf = values.get("model_conf") or {}
    if family == "wenet":
        if values.get("encoder", "conformer") != "conformer":
            raise ModelError(f"{path.name}: encoder {values['encoder']} is not supported, only conformer")
        if values.get("model", "asr_model") != "asr_model":
            raise ModelError(f"{path.name}: model {values['model']} is not supported, only asr_model")
        if model_conf.get("apply_non_blank_embedding"):
            raise ModelError(f"{path.name}: model_conf.apply_non_blank_embedding is not supported")
        encoder_conf = values.get("encoder_conf") or {}
        decoder_conf = values.get("decoder_conf") or {}
    else:
        # Encoder-only protos take the encoder's settings directly.
        encoder_conf = model_conf.get("encoder_conf", model_conf) or {}
        decoder_conf = model_conf.get("decoder_conf") or {}
    dataset_conf = values.get("dataset_conf") or {}
    fbank_conf = dataset_conf.get("fbank_conf") or {}
    if dataset_conf.get("feats_type", "fbank") != "fbank":
        raise ModelError(f"{path.name}: feats_type {dataset_conf['feats_type']} is not supported, only fbank")
    rate = int((dataset_conf.get("resample_conf") or {}).get("resample_rate", 16000))
    if rate != 16000:
        raise ModelError(f"{path.name}: resample_rate {rate} is not supported, only 16000, as recordings are read")
    bins = fbank_conf.get("num_mel_bins", values.get("input_dim", 80))
    input_dim = values.get("input_dim", bins) if family == "wenet" else bins
    encoder = _encoder_config(family, encoder_conf, "encoder.", state, input_dim, path, notes)
    vocab_size = _shape(state, "encoder.out_linear.weight")[0]
    decoder = _decoder_config(family, decoder_conf, state, path, notes)
    fbank = FbankConfig(
        num_mel_bins=bins,
        frame_length=float(fbank_conf.get("frame_length", 25)),
        frame_shift=float(fbank_conf.get("frame_shift", 10)),
        window_type=str(fbank_conf.get("window_type", "povey")),
    )
    if fbank.num_mel_bins != encoder.input_dim:
        raise ModelError(
            f"{path.name}: input_dim {encoder.input_dim} is not dataset_conf.fbank_conf.num_mel_bins "
            f"{fbank.num_mel_bins}: expected the same"
        )
    reverse = float(model_conf.get("reverse_weight") or 0.0)
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        encoder=encoder,
        decoder=decoder,
        fbank=fbank,
        reverse_weight=reverse if decoder is not None and decoder.r_num_blocks else 0.0,
    )


def _shape(state: dict[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in state:
        raise ModelError(f"the checkpoint has no tensor {key}: it is not a complete model")
    return tuple(state[key].shape)


def _block_tensor(state: dict[str, Tensor], blocks: str, name: str) -> Tensor | None:
    """Tensor `name` of the first block that has it: one that lost a tensor is reported as such later on."""
    pattern = re.compile(re.escape(blocks) + r"\d+\." + re.escape(name))
    return next((value for key, value in state.items() if pattern.fullmatch(key)), None)


def _block_shape(state: dict[str, Tensor], blocks: str, name: str) -> tuple[int, ...]:
    tensor = _block_tensor(state, blocks, name)
    if tensor is None:
        raise ModelError(f"no block of the checkpoint has a tensor {blocks}N.{name}: it is not a complete model")
    return tuple(tensor.shape)


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """Number of blocks under `prefix`N. ; raises if the numbering has holes."""
    found = {int(match[1]) for key in state if (match := re.match(re.escape(prefix) + r"(\d+)\.", key))}
    if found != set(range(len(found))):
        raise ModelError(f"the checkpoint's blocks {prefix}* are numbered {sorted(found)}: some are missing")
    return len(found)


def _refuse(conf: dict, where: str, known: set[str]) -> None:
    for name, value in conf.items():
        if name in FIXED:
            if value is not None and value != FIXED[name]:
                raise ModelError(f"{where}.{name}: {value} is not supported, only {FIXED[name]}")
        elif name not in known and name not in TRAINING_ONLY:
            raise ModelError(
                f"{where}.{name}: {value} is an unknown setting: the network it makes cannot be reproduced"
            )


def _prefer(shape_value, conf: dict, name: str, where: str, notes: list[str]):
    """What the tensors' shapes say wins; a yaml that says otherwise is reported."""
    if conf.get(name) is not None and conf[name] != shape_value:
        notes.append(f"{where}.{name} says {conf[name]}, the tensors say {shape_value}: took {shape_value}")
    return shape_value


def _encoder_config(family, conf, prefix, state, input_dim, path, notes) -> EncoderConfig:
    where = f"{path.name}: {prefix.rstrip('.')}"
    known = set(EncoderConfig.__dataclass_fields__) | {"output_size", "moe_conf", "embed_conf"}
    _refuse(conf, where, known)
    input_layer = conf.get("input_layer", "conv2d")
    if input_layer not in SUBSAMPLINGS:
        raise ModelError(f"{where}.input_layer: {input_layer} is not supported, only {', '.join(SUBSAMPLINGS)}")
    # WeNet's constructor defaults to absolute positions, 3M-ASR's to rel_pos.
    pos = conf.get("pos_enc_layer_type", "rel_pos")
    if pos not in ("rel_pos", "no_pos"):
        raise ModelError(f"{where}.pos_enc_layer_type: {pos} is not supported, only rel_pos and no_pos")
    blocks = f"{prefix}blocks."
    num_blocks = _prefer(_count(state, blocks), conf, "num_blocks", where, notes)
    attention = conf.get("selfattention_layer_type", "rel_selfattn")
    if attention not in ("rel_selfattn", "selfattn") or (pos == "rel_pos" and attention == "selfattn"):
        raise ModelError(f"{where}.selfattention_layer_type: {attention} with {pos} is not supported")
    if pos == "no_pos" and _block_tensor(state, blocks, "self_attn.linear_pos.weight") is None:
        attention = "selfattn"  # 3M-ASR and older WeNet take plain attention then, whatever the yaml says
    activation = conf.get("activation_type", "swish")
    if activation not in ACTIVATIONS:
        raise ModelError(f"{where}.activation_type: {activation} is not supported, only {', '.join(ACTIVATIONS)}")
    if _block_tensor(state, blocks, "feed_forward_macaron.router_weights") is not None:
        raise ModelError(f"{where}: experts in the macaron feed-forward are not supported, only in the second one")

    width = _shape(state, f"{prefix}after_norm.weight")[0]
    width_name = "output_size" if family == "wenet" else "attention_dim"
    _prefer(width, conf, width_name, where, notes)
    heads = conf.get("attention_heads", 4)
    if attention == "rel_selfattn":
        heads = _prefer(_block_shape(state, blocks, "self_attn.pos_bias_u")[0], conf, "attention_heads", where, notes)
    if heads < 1 or width % heads:
        raise ModelError(f"{where}.attention_heads: {heads} does not divide the width {width}")
    macaron = _block_tensor(state, blocks, "feed_forward_macaron.w_1.weight") is not None
    batch_norm = _block_tensor(state, blocks, "conv_module.norm.running_mean") is not None
    norm = "batch_norm" if batch_norm else "layer_norm"
    kernel = _block_shape(state, blocks, "conv_module.depthwise_conv.weight")[2]
    causal = conf.get("causal") or False
    if not causal and kernel % 2 == 0:
        raise ModelError(f"{where}.cnn_module_kernel: {kernel} must be odd unless the convolution is causal")
    moe = _moe_config(conf.get("moe_conf") or {}, blocks, state, where, notes)
    if moe is None:
        units = _block_shape(state, blocks, "feed_forward.w_1.weight")[0]
        linear_units = _prefer(units, conf, "linear_units", where, notes)
    else:
        # The dense feed-forward of an expert block has a width of its own; the yaml's linear_units plays no part.
        macaron_w_1 = _block_tensor(state, blocks, "feed_forward_macaron.w_1.weight")
        linear_units = moe.hidden_units if macaron_w_1 is None else macaron_w_1.shape[0]
    embed = None
    if moe is not None:
        embed = _encoder_config(family, conf.get("embed_conf") or {}, f"{prefix}embed.", state, input_dim, path, notes)
        if embed.input_layer != input_layer:
            raise ModelError(f"{where}: the embedding network's input_layer {embed.input_layer} is not {input_layer}")
    return EncoderConfig(
        input_dim=input_dim,
        attention_dim=width,
        attention_heads=heads,
        num_blocks=num_blocks,
        linear_units=linear_units,
        input_layer=input_layer,
        conv_subsample_in_ch=_shape(state, f"{prefix}subsampling.conv.0.weight")[1],
        pos_enc_layer_type=pos,
        selfattention_layer_type=attention,
        activation_type=activation,
        macaron_style=_prefer(macaron, conf, "macaron_style", where, notes),
        cnn_module_kernel=_prefer(kernel, conf, "cnn_module_kernel", where, notes),
        cnn_module_norm=_prefer(norm, conf, "cnn_module_norm", where, notes),
        causal=causal,
        static_chunk_size=conf.get("static_chunk_size") or 0,
        use_dynamic_chunk=conf.get("use_dynamic_chunk") or False,
        norm_eps=float(conf.get("norm_eps", 1e-5)) if family == "wenet" else 1e-12,
        cnn_norm_eps=float(conf.get("norm_eps", 1e-5)) if family == "wenet" else 1e-5,
        moe=moe,
        embed=embed,
    )


def _moe_config(conf: dict, blocks: str, state, where: str, notes: list[str]) -> MoEConfig | None:
    if _block_tensor(state, blocks, "feed_forward.router_weights") is None:
        return None
    experts, hidden, _ = _block_shape(state, blocks, "feed_forward.experts.w_1.weight")
    per_rank = conf.get("num_experts")
    if per_rank and experts % per_rank:
        notes.append(f"{where}.moe_conf.num_experts says {per_rank} a rank, the tensors hold {experts} in total")
    elif per_rank and per_rank != experts:
        notes.append(f"{experts} experts: {per_rank} on each of {experts // per_rank} training ranks")
    bias = _block_tensor(state, blocks, "feed_forward.router_bias") is not None
    return MoEConfig(
        num_experts=experts,
        hidden_units=_prefer(hidden, conf, "hidden_units", f"{where}.moe_conf", notes),
        router_with_bias=_prefer(bias, conf, "router_with_bias", f"{where}.moe_conf", notes),
        keep_expert_output=conf.get("keep_expert_output") or False,
    )


def _decoder_config(family, conf, state, path, notes) -> DecoderConfig | None:
    if not any(key.startswith("decoder.") for key in state):
        return None
    where = f"{path.name}: decoder_conf"
    _refuse(conf, where, set(DecoderConfig.__dataclass_fields__) | {"input_layer"})
    if conf.get("input_layer", "embed") != "embed":
        raise ModelError(f"{where}.input_layer: {conf['input_layer']} is not supported, only embed")
    bidirectional = any(key.startswith("decoder.left_decoder.") for key in state)
    left = "decoder.left_decoder." if bidirectional else "decoder."
    activation = conf.get("activation_type", "relu")
    if activation not in ACTIVATIONS:
        raise ModelError(f"{where}.activation_type: {activation} is not supported, only {', '.join(ACTIVATIONS)}")
    units = _block_shape(state, f"{left}decoders.", "feed_forward.w_1.weight")[0]
    heads, width = conf.get("attention_heads", 4), _shape(state, "encoder.after_norm.weight")[0]
    if heads < 1 or width % heads:
        raise ModelError(f"{where}.attention_heads: {heads} does not divide the width {width}")
    return DecoderConfig(
        attention_heads=heads,
        linear_units=_prefer(units, conf, "linear_units", where, notes),
        num_blocks=_prefer(_count(state, f"{left}decoders."), conf, "num_blocks", where, notes),
        r_num_blocks=_count(state, "decoder.right_decoder.decoders.") if bidirectional else 0,
        activation_type=activation,
        norm_eps=float(conf.get("norm_eps", 1e-5)) if family == "wenet" else 1e-12,
    )
