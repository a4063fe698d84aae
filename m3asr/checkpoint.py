"""3M-ASR and WeNet training folders -> (config, weights under our names, units, CMVN).

The only file that knows foreign key names and yaml settings. Whatever the originals can write but this project does
not run is refused here by name, so that nothing downstream computes something else silently. Nothing is unpickled
but tensors.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from m3asr.config import ACTIVATIONS, SUBSAMPLINGS, DecoderConfig, EncoderConfig, FbankConfig, ModelConfig, MoEConfig
from m3asr.errors import ModelError
from m3asr.features import Cmvn
from m3asr.model import Model
from m3asr.tokenizer import Tokenizer

CONFIG_NAMES = ("train.yaml", "config.yaml")
UNITS_NAMES = ("units.txt", "lang_char.txt", "dict.txt", "words.txt")
CMVN_NAMES = ("global_cmvn", "global_cmvn.json", "cmvn.json", "cmvn.ark", "cmvn")
CHECKPOINT_NAMES = ("final.pt", "final.nnet", "model.pt", "avg.pt", "average.pt")
# Numbered checkpoints of 3M-ASR (model.epoch-E.step-S) and of WeNet (epoch_E.pt, step_S.pt, E.pt).
NUMBERED = re.compile(r"(?:model\.epoch-(\d+)\.step-(\d+)|(?:epoch_|step_)?(\d+)\.pt)")

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
# Tensors of training that inference never reads.
DROPPED = re.compile(
    r"(^|\.)(concat_linear[12]?|decoder_[12]|after_norm_(6|12)|criterion\w*)\."
    r"|\.pos_enc\.pe$|decoder\.(left_decoder\.|right_decoder\.)?embed\.1\.pe$"
)


@dataclass
class Checkpoint:
    """A training folder, read and checked. `notes` says what was chosen or overruled, one sentence each."""

    config: ModelConfig
    state: dict[str, Tensor]  # float32 under the names of `Model.state_dict()`
    tokenizer: Tokenizer
    cmvn: Cmvn | None
    source: list[Path]
    notes: list[str] = field(default_factory=list)


def read_checkpoint(
    folder: Path,
    *,
    config: Path | None = None,
    checkpoint: Path | None = None,
    units: Path | None = None,
    cmvn: Path | None = None,
    use_cmvn: bool = True,
    average: int = 0,
) -> Checkpoint:
    """Read a 3M-ASR or WeNet training folder; the options name files that are called otherwise.

    average: mean of the last N numbered checkpoints instead of one file. Raises ModelError, naming what was found and
    expected, for anything unreadable, unsupported, missing or left over.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder: expected a 3M-ASR or WeNet training folder")
    notes: list[str] = []
    config_path = config or _find(folder, CONFIG_NAMES, "training configuration", "--config")
    values = _read_yaml(config_path)
    units_path = units or _find(folder, UNITS_NAMES, "units (vocabulary) file", "--units")
    sources = _checkpoint_files(folder, checkpoint, average, notes)
    state = _average(sources) if average else _load_state(sources[0])

    family = _family(values, state, config_path)
    if family == "wenet":
        state = _rename_wenet(state)
    elif not any(key.startswith("encoder.") for key in state):
        # Encoder-only training, and embedding networks cut out by the original's strip tool.
        state = {f"encoder.{key}": value for key, value in state.items()}
    state = {_rename_out(key): value for key, value in state.items() if not DROPPED.search(key)}
    model_config = _model_config(family, values, state, config_path, notes)

    stats = None
    if family == "wenet" and "cmvn.mean" not in state and values.get("cmvn", values.get("cmvn_file")):
        cmvn = cmvn or _find(folder, CMVN_NAMES, "CMVN file", "--cmvn")
        stats = Cmvn.read(cmvn)
        state["cmvn.mean"], state["cmvn.istd"] = torch.tensor(stats.mean), torch.tensor(stats.istd)
    if family == "wenet":
        model_config = replace(model_config, cmvn="inside" if "cmvn.mean" in state else "none")
        stats = None
    elif use_cmvn:
        stats = Cmvn.read(cmvn or _find(folder, CMVN_NAMES, "CMVN file", "--cmvn, or say --no-cmvn"))
        if len(stats.mean) != model_config.encoder.input_dim:
            raise ModelError(
                f"the CMVN statistics have {len(stats.mean)} bins, the model reads {model_config.encoder.input_dim}"
            )
    else:
        model_config = replace(model_config, cmvn="none")

    model_config, tokenizer = _vocabulary(units_path, values, model_config, family)
    return Checkpoint(model_config, _checked(state, model_config), tokenizer, stats, sources, notes)


def _find(folder: Path, names: tuple[str, ...], what: str, option: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"{folder} has no {what} (looked for {', '.join(names)}): name it with {option}")


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds a {type(values).__name__}, expected the settings of a training run")
    return values


# --- tensors ---------------------------------------------------------------------------------------------------------


def _numbered(folder: Path) -> list[Path]:
    found = []
    for path in folder.iterdir():
        if path.is_file() and (match := NUMBERED.fullmatch(path.name)):
            found.append((tuple(int(group or 0) for group in match.groups()), path))
    return [path for _, path in sorted(found)]


def _checkpoint_files(folder: Path, checkpoint: Path | None, average: int, notes: list[str]) -> list[Path]:
    if average:
        if checkpoint is not None:
            raise ModelError("--average chooses the checkpoints itself: leave --checkpoint out")
        numbered = _numbered(folder)
        if len(numbered) < average:
            raise ModelError(f"{folder} has {len(numbered)} numbered checkpoints, --average asks for {average}")
        notes.append(f"average of {', '.join(path.name for path in numbered[-average:])}")
        return numbered[-average:]
    if checkpoint is not None:
        return [Path(checkpoint)]
    named = [folder / name for name in CHECKPOINT_NAMES if (folder / name).is_file()]
    candidates = named or _numbered(folder)[::-1]
    if not candidates:
        raise ModelError(
            f"{folder} has no checkpoint (looked for {', '.join(CHECKPOINT_NAMES)} and numbered ones): "
            "name it with --checkpoint"
        )
    if len(candidates) > 1:
        notes.append(f"several checkpoints found, took {candidates[0].name}")
    return candidates[:1]


def _load_state(path: Path) -> dict[str, Tensor]:
    """A bare state_dict; anything that would run code while being read is refused."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{path} is not a plain state_dict and was not loaded, because unpickling it could run code ({first}): "
            "save `model.state_dict()` alone"
        ) from None
    except Exception as error:  # torch raises many types for truncated and foreign files
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{path} is not a readable PyTorch checkpoint (truncated or another format: {first})"
        ) from None
    if not isinstance(state, dict) or not state:
        raise ModelError(f"{path} holds a {type(state).__name__}, expected a non-empty state_dict of tensors")
    other = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ModelError(
            f"{path} is not a bare state_dict: {', '.join(other[:5])} hold no tensor; save `model.state_dict()` alone"
        )
    return state


def _average(paths: list[Path]) -> dict[str, Tensor]:
    """Mean of floating tensors; counters are taken from the last file."""
    mean: dict[str, Tensor] = {}
    for path in paths:
        state = _load_state(path)
        if mean and state.keys() != mean.keys():
            raise ModelError(
                f"{path} has other tensors than {paths[0].name}: only checkpoints of one run can be averaged"
            )
        for key, value in state.items():
            if not value.is_floating_point():
                mean[key] = value
            elif key in mean:
                mean[key] = mean[key] + value.double() / len(paths)
            else:
                mean[key] = value.double() / len(paths)
    return mean


def _family(values: dict, state: dict[str, Tensor], path: Path) -> str:
    if any(key.startswith(("encoder.encoders.", "ctc.ctc_lo.")) for key in state):
        return "wenet"
    if any(key.startswith(("encoder.blocks.", "blocks.")) for key in state):
        return "3m"
    kind = values.get("nnet_proto") or values.get("encoder") or "of no known kind"
    raise ModelError(
        f"neither a 3M-ASR checkpoint (encoder.blocks.*) nor a WeNet Conformer (encoder.encoders.*): {path.name} says "
        f"{kind}, the first tensors are {', '.join(list(state)[:3])}"
    )


def _rename_wenet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        key = key.replace("encoder.global_cmvn.", "cmvn.").replace("ctc.ctc_lo.", "encoder.out_linear.")
        if key.startswith("encoder.encoders."):
            key = "encoder.blocks." + key.removeprefix("encoder.encoders.")
        elif key.startswith("encoder.embed.pos_enc."):
            key = "encoder.pos_enc." + key.removeprefix("encoder.embed.pos_enc.")
        elif key.startswith("encoder.embed."):
            key = "encoder.subsampling." + key.removeprefix("encoder.embed.")
        renamed[key] = value
    return renamed


def _rename_out(key: str) -> str:
    """conv2d6 and conv2d8 call their projection `out` (3M-ASR) or `linear` (WeNet), conv2d calls it `out.0`."""
    return re.sub(r"subsampling\.(?:out|linear)\.(weight|bias)$", r"subsampling.out.0.\1", key)


def _checked(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Exactly the model's tensors, as float32. Raises ModelError with both differences."""
    with torch.device("meta"):
        expected = Model(config).state_dict()
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(expected.keys() - state.keys() - counters)
    extra = sorted(state.keys() - expected.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    problems = [f"missing: {_some(missing)}"] * bool(missing) + [f"unexpected: {_some(extra)}"] * bool(extra)
    problems += [f"other shapes: {_some(shapes)}"] * bool(shapes)
    if problems:
        raise ModelError("the checkpoint does not fit its configuration; " + "; ".join(problems))
    result = {}
    for key, wanted in expected.items():
        value = state.get(key, torch.zeros((), dtype=torch.int64))
        if wanted.is_floating_point():
            value = value.float().contiguous()
            if not torch.isfinite(value).all():
                raise ModelError(f"the checkpoint's tensor {key} holds NaN or infinite values")
        result[key] = value
    return result


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# --- settings --------------------------------------------------------------------------------------------------------


def _model_config(family, values, state, path, notes) -> ModelConfig:
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
    bins = fbank_conf.get("num_mel_bins", values.get("input_dim", 80))
    input_dim = values.get("input_dim", bins) if family == "wenet" else bins
    encoder = _encoder_config(family, encoder_conf, "encoder.", state, input_dim, path, notes)
    vocab_size = _shape(state, "encoder.out_linear.weight")[0]
    decoder = _decoder_config(family, decoder_conf, state, path, notes)
    fbank = FbankConfig(
        num_mel_bins=bins,
        frame_length=float(fbank_conf.get("frame_length", 25)),
        frame_shift=float(fbank_conf.get("frame_shift", 10)),
        sample_rate=int((dataset_conf.get("resample_conf") or {}).get("resample_rate", 16000)),
        window_type=str(fbank_conf.get("window_type", "povey")),
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
    attention = "rel_selfattn" if f"{prefix}blocks.0.self_attn.linear_pos.weight" in state else "selfattn"
    declared = conf.get("selfattention_layer_type", "rel_selfattn")
    if declared not in ("rel_selfattn", "selfattn") or (pos == "rel_pos" and attention == "selfattn"):
        raise ModelError(f"{where}: selfattention_layer_type {declared} with {pos} is not supported")
    activation = conf.get("activation_type", "swish")
    if activation not in ACTIVATIONS:
        raise ModelError(f"{where}.activation_type: {activation} is not supported, only {', '.join(ACTIVATIONS)}")
    if any(key.startswith(f"{prefix}blocks.0.feed_forward_macaron.router") for key in state):
        raise ModelError(f"{where}: experts in the macaron feed-forward are not supported, only in the second one")

    width = _shape(state, f"{prefix}after_norm.weight")[0]
    width_name = "output_size" if family == "wenet" else "attention_dim"
    _prefer(width, conf, width_name, where, notes)
    heads = conf.get("attention_heads", 4)
    if attention == "rel_selfattn":
        heads = _prefer(
            _shape(state, f"{prefix}blocks.0.self_attn.pos_bias_u")[0], conf, "attention_heads", where, notes
        )
    macaron = f"{prefix}blocks.0.feed_forward_macaron.w_1.weight" in state
    norm = "batch_norm" if f"{prefix}blocks.0.conv_module.norm.running_mean" in state else "layer_norm"
    kernel = _shape(state, f"{prefix}blocks.0.conv_module.depthwise_conv.weight")[2]
    causal = bool(conf.get("causal", False))
    if not causal and kernel % 2 == 0:
        raise ModelError(f"{where}.cnn_module_kernel: {kernel} must be odd unless the convolution is causal")
    moe = _moe_config(conf.get("moe_conf") or {}, prefix, state, where, notes)
    dense = "feed_forward_macaron" if moe is not None else "feed_forward"
    linear_units = moe.hidden_units if moe is not None else 0
    if moe is None or macaron:
        linear_units = _shape(state, f"{prefix}blocks.0.{dense}.w_1.weight")[0]
    if moe is None:
        _prefer(linear_units, conf, "linear_units", where, notes)
    embed = None
    if moe is not None:
        embed = _encoder_config(family, conf.get("embed_conf") or {}, f"{prefix}embed.", state, input_dim, path, notes)
        if embed.input_layer != input_layer:
            raise ModelError(f"{where}: the embedding network's input_layer {embed.input_layer} is not {input_layer}")
    return EncoderConfig(
        input_dim=input_dim,
        attention_dim=width,
        attention_heads=heads,
        num_blocks=_prefer(_count(state, f"{prefix}blocks."), conf, "num_blocks", where, notes),
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
        static_chunk_size=int(conf.get("static_chunk_size", 0)),
        use_dynamic_chunk=bool(conf.get("use_dynamic_chunk", False)),
        norm_eps=float(conf.get("norm_eps", 1e-5)) if family == "wenet" else 1e-12,
        cnn_norm_eps=float(conf.get("norm_eps", 1e-5)) if family == "wenet" and norm == "layer_norm" else 1e-5,
        moe=moe,
        embed=embed,
    )


def _moe_config(conf: dict, prefix: str, state, where: str, notes: list[str]) -> MoEConfig | None:
    first = f"{prefix}blocks.0.feed_forward."
    if f"{first}router_weights" not in state:
        return None
    experts, hidden, _ = _shape(state, f"{first}experts.w_1.weight")
    per_rank = conf.get("num_experts")
    if per_rank and experts % per_rank:
        notes.append(f"{where}.moe_conf.num_experts says {per_rank} a rank, the tensors hold {experts} in total")
    elif per_rank and per_rank != experts:
        notes.append(f"{experts} experts: {per_rank} on each of {experts // per_rank} training ranks")
    return MoEConfig(
        num_experts=experts,
        hidden_units=_prefer(hidden, conf, "hidden_units", f"{where}.moe_conf", notes),
        router_with_bias=_prefer(f"{first}router_bias" in state, conf, "router_with_bias", f"{where}.moe_conf", notes),
        keep_expert_output=bool(conf.get("keep_expert_output", False)),
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
    units = _shape(state, f"{left}decoders.0.feed_forward.w_1.weight")[0]
    return DecoderConfig(
        attention_heads=int(conf.get("attention_heads", 4)),
        linear_units=_prefer(units, conf, "linear_units", where, notes),
        num_blocks=_prefer(_count(state, f"{left}decoders."), conf, "num_blocks", where, notes),
        r_num_blocks=_count(state, "decoder.right_decoder.decoders.") if bidirectional else 0,
        activation_type=activation,
        norm_eps=float(conf.get("norm_eps", 1e-5)) if family == "wenet" else 1e-12,
    )


def _vocabulary(path: Path, values: dict, config: ModelConfig, family: str) -> tuple[ModelConfig, Tokenizer]:
    """Units and special tokens: 3M-ASR uses the last id for sos and eos, WeNet its yaml's special_tokens if any."""
    last = config.vocab_size - 1
    special = {}
    if family == "wenet":
        special = (values.get("tokenizer_conf") or {}).get("special_tokens") or {}
    config = replace(config, sos=int(special.get("<sos>", last)), eos=int(special.get("<eos>", last)))
    tokenizer = Tokenizer.read(path)
    if len(tokenizer.symbols) != config.vocab_size:
        raise ModelError(
            f"{path} has {len(tokenizer.symbols)} units, the model puts out {config.vocab_size}: "
            "this is not the vocabulary it was trained with"
        )
    return config, tokenizer
