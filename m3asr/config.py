"""What a model is made of: frozen dataclasses, stored as `config.json` in a model folder.

Field names are those of the checkpoints' `train.yaml` wherever one exists, so that a reader of a 3M-ASR or WeNet
recipe recognises them. Reading the yaml itself is the business of `checkpoint.py`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from m3asr.errors import ModelError

# Raised whenever a stored model folder would be read differently; older and newer folders are refused by number.
FORMAT_VERSION = 1

# (kernel, stride) of each convolution in time and frequency; rate and right context follow from them.
SUBSAMPLINGS = {
    "conv2d": ((3, 2), (3, 2)),
    "conv2d6": ((3, 2), (5, 3)),
    "conv2d8": ((3, 2), (3, 2), (3, 2)),
}
ACTIVATIONS = ("swish", "relu", "gelu", "tanh", "hardtanh", "selu")


LEVEL = 25.0  # natural log of what a loud frame's mel energies add up to: speech at half of full scale
_KINDS = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str": (str, "text"),
    "bool": (bool, "true or false"),
}
# Whole numbers that may be less than 1, and their least. What no bins or frames are, the filterbank says.
_LEAST = {"num_mel_bins": 0, "r_num_blocks": 0, "static_chunk_size": -1, "blank": 0, "sos": -1, "eos": -1}
_MOST = 2**20  # no model is as wide, and what is much wider fits neither a memory nor a machine word
_MOST_BLOCKS = 1000  # each is some twenty modules to make, whatever its width
_FRACTIONS = ("level_compression", "ctc_weight", "reverse_weight", "dropout_rate", "norm_eps", "cnn_norm_eps")
_CHOICES = {
    "family": ("3m", "wenet"),
    "cmvn": ("before", "inside", "none"),
    "input_layer": tuple(SUBSAMPLINGS),
    "pos_enc_layer_type": ("rel_pos", "no_pos"),
    "selfattention_layer_type": ("rel_selfattn", "selfattn"),
    "cnn_module_norm": ("layer_norm", "batch_norm"),
    "activation_type": ACTIVATIONS,
}


def _check(config) -> None:
    """Raises TypeError for a value of another kind than its field's, ValueError for one outside its range: what is read
    from files is anything."""
    for f in fields(config):
        value, (kind, words) = getattr(config, f.name), _KINDS.get(f.type, (object, ""))
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (Integral, Real)):
            raise TypeError(f"{f.name} is {value!r}, expected {words}")
        if kind is Real and not math.isfinite(value):
            raise TypeError(f"{f.name} is {value}, expected a finite number")
        least, most = _LEAST.get(f.name, 1), _MOST_BLOCKS if f.name.endswith("num_blocks") else _MOST
        if kind is Integral and not least <= value <= most:
            raise ValueError(f"{f.name} is {value}, expected {least} to {most}")
        if f.name in _FRACTIONS and not 0 <= value <= 1:
            raise ValueError(f"{f.name} is {value}, expected 0 to 1")
        if f.name in _CHOICES and value not in _CHOICES[f.name]:
            raise ValueError(f"{f.name} is {value!r}, expected one of {', '.join(_CHOICES[f.name])}")


def _check_heads(heads: int, width: int) -> None:
    if width % heads:
        raise ValueError(f"attention_heads is {heads}, expected a divisor of the width {width}")


@dataclass(frozen=True)
class FbankConfig:
    """Kaldi filterbank parameters (specification 1.1). Lengths in milliseconds, frequencies in Hz."""

    num_mel_bins: int = 80
    frame_length: float = 25.0
    frame_shift: float = 10.0
    low_freq: float = 20.0
    high_freq: float = 0.0  # 0 means the Nyquist frequency
    sample_rate: int = 16000
    window_type: str = "povey"
    level_compression: float = 0.0  # the share of each frame's level that is taken out: features.compress_levels

    __post_init__ = _check


@dataclass(frozen=True)
class MoEConfig:
    """Top-1 mixture of experts in place of the second feed-forward (specification 2.7)."""

    num_experts: int  # in total, not per rank as `train.yaml` counts them
    hidden_units: int
    router_with_bias: bool = False
    keep_expert_output: bool = False  # True: the expert's output is not scaled by its router probability

    __post_init__ = _check


@dataclass(frozen=True)
class EncoderConfig:
    """One Conformer stack: the main encoder, or the embedding network inside it."""

    input_dim: int
    attention_dim: int
    attention_heads: int
    num_blocks: int
    linear_units: int  # hidden width of the dense feed-forwards
    input_layer: str = "conv2d"
    conv_subsample_in_ch: int = 1
    pos_enc_layer_type: str = "rel_pos"
    selfattention_layer_type: str = "rel_selfattn"
    activation_type: str = "swish"
    macaron_style: bool = True
    cnn_module_kernel: int = 15
    cnn_module_norm: str = "layer_norm"
    causal: bool = False
    static_chunk_size: int = 0
    use_dynamic_chunk: bool = False
    norm_eps: float = 1e-12
    cnn_norm_eps: float = 1e-5
    dropout_rate: float = 0.0  # training only
    moe: MoEConfig | None = None
    embed: EncoderConfig | None = None  # the embedding network that the routers listen to

    def __post_init__(self):
        _check(self)
        if self.input_dim // self.conv_subsample_in_ch < self.min_frames:  # in frequency as in time
            raise ValueError(f"input_dim is {self.input_dim}, too few bins for {self.input_layer}")
        _check_heads(self.attention_heads, self.attention_dim)
        if self.moe is not None and self.embed is None:
            raise ValueError("embed is missing: expected the embedding network that the routers of moe listen to")

    @property
    def subsampling(self) -> tuple[tuple[int, int], ...]:
        return SUBSAMPLINGS[self.input_layer]

    @property
    def subsampling_rate(self) -> int:
        """Input frames per output frame."""
        rate = 1
        for _, stride in self.subsampling:
            rate *= stride
        return rate

    @property
    def can_stream(self) -> bool:
        """Whether chunks with caches give what the whole utterance gives: causal, and trained on chunks."""
        chunks = self.use_dynamic_chunk or self.static_chunk_size > 0
        return chunks and self.causal and (self.embed is None or self.embed.causal)

    @property
    def min_frames(self) -> int:
        """The fewest input frames that give one output frame: its receptive field."""
        frames = 1
        for kernel, stride in reversed(self.subsampling):
            frames = (frames - 1) * stride + kernel
        return frames


@dataclass(frozen=True)
class DecoderConfig:
    """Attention decoder (specification 3.1); `r_num_blocks` > 0 makes it bidirectional."""

    attention_heads: int
    linear_units: int
    num_blocks: int
    r_num_blocks: int = 0
    activation_type: str = "relu"
    norm_eps: float = 1e-12
    dropout_rate: float = 0.0

    __post_init__ = _check


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build the network and to run audio through it."""

    family: str  # "3m" or "wenet": decides the original-compatible length formula
    vocab_size: int
    encoder: EncoderConfig
    decoder: DecoderConfig | None = None
    fbank: FbankConfig = field(default_factory=FbankConfig)
    cmvn: str = "before"  # "before": features are normalised ahead of the model; "inside": by it; "none"
    blank: int = 0
    sos: int = -1
    eos: int = -1
    ctc_weight: float = 0.5  # of the CTC score in attention rescoring
    reverse_weight: float = 0.0  # of the right-to-left decoder in attention rescoring
    compat: bool = False  # True: lengths and padding exactly as the original code (specification 2.2, 2.6)

    def __post_init__(self):
        _check(self)
        if self.decoder is not None:
            _check_heads(self.decoder.attention_heads, self.encoder.attention_dim)

    @property
    def frame_seconds(self) -> float:
        """From one frame of the encoder to the next."""
        return self.fbank.frame_shift / 1000 * self.encoder.subsampling_rate

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from `config.json`'s contents. Raises ModelError naming what does not fit."""
        if not isinstance(values, dict):
            raise ModelError(f"config.json holds a {type(values).__name__}, expected an object")
        values = dict(values)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ModelError(
                f"the model folder has format version {version!r}, this m3asr reads version {FORMAT_VERSION}: "
                "convert the checkpoint again with `m3asr convert`"
            )
        return _build(cls, values, "config.json")

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ModelError(
                f"{path.parent} is not a model folder: it has no config.json (see `m3asr convert`)"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} is not valid JSON ({error}): convert the checkpoint again") from None


_NESTED = {
    ("EncoderConfig", "moe"): MoEConfig,
    ("EncoderConfig", "embed"): EncoderConfig,
    ("ModelConfig", "encoder"): EncoderConfig,
    ("ModelConfig", "decoder"): DecoderConfig,
    ("ModelConfig", "fbank"): FbankConfig,
}


def _build(cls, values: dict[str, Any], where: str):
    """Build dataclass `cls` from plain JSON values, nested dataclasses included."""
    if not isinstance(values, dict):
        raise ModelError(f"{where} holds a {type(values).__name__}, expected an object")
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(values.keys() - known.keys()):
        raise ModelError(f"{where} has unknown fields {', '.join(unknown)}: it was written by another m3asr version")
    kwargs = {}
    for name, value in values.items():
        nested = _NESTED.get((cls.__name__, name))
        if nested is not None and not (value is None and known[name].default is None):
            value = _build(nested, value, f"{where}:{name}")
        kwargs[name] = value
    try:
        return cls(**kwargs)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where} does not fit: {error}") from None
