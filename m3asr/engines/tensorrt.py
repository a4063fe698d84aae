"""The model as TensorRT plans: traced through its own forward by `m3asr.trt`, built, interpreted or run.

Plans: `encoder.plan` takes feats (B, T, F) and lengths (B,) and gives log_probs, hidden, out_lengths; `decoder.plan`
and `reverse_decoder.plan` take hidden, hidden_lengths, tokens and give log_probs. The router computes in float32
whatever the precision. A plan is built and interpreted without a GPU; `TensorrtEngine` needs one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from m3asr import __version__, trt
from m3asr.engines import no_utterances, padded
from m3asr.engines.tensorrt_experts import EXPERTS, experts_as
from m3asr.errors import ModelError
from m3asr.folder import ModelFolder
from m3asr.model import Model, TransformerDecoder

FORMAT_VERSION = 1
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
# Sizes of one optimisation profile: smallest, usual, largest. B utterances of T frames; N hypotheses of L tokens.
PROFILES = ({"B": (1, 1, 4), "T": (7, 512, 2048)}, {"B": (1, 8, 16), "T": (7, 1024, 6100)})
DECODER_PROFILES = ({"N": (1, 10, 32), "L": (1, 20, 400), "S": (1, 150, 1524)},)


class _Encoder(nn.Module):
    def __init__(self, model: Model, prior: Tensor | None, chunk_size: int, left_chunks: int, compat: bool):
        super().__init__()
        self.model, self.chunk_size, self.left_chunks, self.compat = model, chunk_size, left_chunks, compat
        self.bonus = None if prior is None else -prior.log()

    def forward(self, feats, lengths):
        log_probs, hidden, out_lengths = self.model(feats, lengths, self.chunk_size, self.left_chunks, self.compat)
        if self.bonus is not None:
            log_probs = log_probs + self.bonus
        return log_probs, hidden, out_lengths


class _Decoder(nn.Module):
    def __init__(self, decoder: TransformerDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, hidden, hidden_lengths, tokens):
        return self.decoder(hidden, hidden_lengths, tokens)


def read_prior(path: str | Path, vocab_size: int) -> Tensor:
    """Unit probabilities float32 (V,) from a text file of V + 1 numbers, whose first is left out (specification 4.4).

    Zeros become the smallest other value; the sum is made 1. Raises ModelError for another count or negative numbers.
    """
    try:
        values = np.loadtxt(path, dtype=np.float64).reshape(-1)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not a readable prior ({error}): expected {vocab_size + 1} numbers") from None
    if len(values) != vocab_size + 1:
        raise ModelError(f"{path} has {len(values)} numbers: expected {vocab_size + 1}, of which the first is ignored")
    values = values[1:]
    if not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise ModelError(f"{path}: a prior needs finite numbers from 0 on, some of them larger")
    values = np.where(values == 0, values[values > 0].min(), values)
    return torch.from_numpy(values / values.sum()).float()


def trace_encoder(
    model: Model,
    *,
    precision: str = "fp32",
    profiles=PROFILES,
    prior: Tensor | None = None,
    chunk_size: int = 0,
    left_chunks: int = -1,
    compat: bool = False,
    calibration: Iterable | None = None,
    experts: str = "layers",
    package=None,
) -> trt.Network:
    """The encoder and its CTC head as a network: feats, lengths -> log_probs, hidden, out_lengths.

    precision "int8" and "fp8" need `calibration`, an iterable of (features (B, T, F), lengths (B,)); what is not
    quantised is float16 then. experts "layers": all experts on all tokens in plain layers; "plugin": the Triton plugin
    of `tensorrt_experts`, which must be imported wherever the plan runs. With `prior` (V,) log_probs has -ln(prior)
    added. Raises trt.TraceError.
    """
    encoder = model.config.encoder
    smallest = encoder.min_frames
    profiles = [{**p, "T": (max(p["T"][0], smallest), *p["T"][1:])} for p in profiles]
    module = _Encoder(model, prior, chunk_size, left_chunks, compat).eval()
    inputs = {"feats": trt.Input("float32", ("B", "T", encoder.input_dim)), "lengths": trt.Input("int32", ("B",))}
    options = {"ranges": profiles, "outputs": ["log_probs", "hidden", "out_lengths"], "package": package}
    if experts not in EXPERTS:
        raise ModelError(f"unknown form of the experts {experts!r}: expected one of {', '.join(EXPERTS)}")
    if precision not in ("int8", "fp8"):
        with experts_as(experts):
            return trt.trace(module, inputs, precision=precision, **options)
    if calibration is None:
        raise ModelError(f"precision {precision} needs recordings to find its scales on: give a calibration list")
    with experts_as(experts):
        reference = trt.trace(module, inputs, precision="fp32", **options)
    batches = ({"feats": torch.as_tensor(f), "lengths": torch.as_tensor(n)} for f, n in calibration)
    # The subsampling convolutions see raw features, whose range a single scale serves badly.
    scales = trt.calibrate(reference, batches, precision, exclude=["*subsampling*"])
    del reference
    with experts_as(experts):
        return trt.trace(module, inputs, precision="fp16", quantize=scales, **options)


def trace_decoder(
    decoder: TransformerDecoder, width: int, *, precision="fp32", profiles=DECODER_PROFILES, package=None
):
    """One attention decoder: hidden (1, S, D), hidden_lengths (1,), tokens (N, L) -> log_probs (N, L, V)."""
    inputs = {
        "hidden": trt.Input("float32", (1, "S", width)),
        "hidden_lengths": trt.Input("int32", (1,)),
        "tokens": trt.Input("int64", ("N", "L")),
    }
    low = {"int8": "fp16", "fp8": "fp16"}.get(precision, precision)
    module = _Decoder(decoder).eval()
    return trt.trace(module, inputs, list(profiles), precision=low, outputs=["log_probs"], package=package)


def networks(model: Model, *, precision: str = "fp32", package=None, **options):
    """Every network of a model, one after the other: (plan name, network). Options are those of `trace_encoder`."""
    if precision not in PRECISIONS:
        raise ModelError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    yield "encoder", trace_encoder(model, precision=precision, package=package, **options)
    width = model.config.encoder.attention_dim
    for name, decoder in (("decoder", model.left_decoder), ("reverse_decoder", model.right_decoder)):
        if decoder is not None:
            yield name, trace_decoder(decoder, width, precision=precision, package=package)


def build(
    load: Callable[[], Model], config_digest: str, target: Path, *, precision="fp32", package=None, **options
) -> dict[str, int]:
    """Writes the plans and manifest.json into `target`; -> bytes of each plan.

    load: makes the model. It is called here so that the model's memory is given back before TensorRT builds. Options
    are those of `trace_encoder`. Raises ModelError.
    """
    target.mkdir(parents=True, exist_ok=True)
    options["profiles"] = list(options.get("profiles") or PROFILES)
    package = trt.Package(package)
    try:
        traced = dict(networks(load(), precision=precision, package=package, **options))
        plans = {name: trt.write(traced.pop(name), target / f"{name}.plan") for name in list(traced)}
    except trt.TrtError as error:
        raise ModelError(f"TensorRT: {error}") from error
    manifest = {
        "format_version": FORMAT_VERSION,
        "m3asr": __version__,
        "builder": str(package),
        "precision": precision,
        "profiles": options["profiles"],
        "prior": options.get("prior") is not None,
        "chunk_size": options.get("chunk_size", 0),
        "left_chunks": options.get("left_chunks", -1),
        "compat": bool(options.get("compat", False)),
        "experts": options.get("experts", "layers"),
        "config_sha256": config_digest,
        "plans": plans,
    }
    (target / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return plans


class _Plans:
    """What the interpreted and the real engine share: checks, and numpy in and out."""

    def __call__(self, features, lengths, *, compat=False, chunk_size=0, left_chunks=-1):
        self.check_options(compat=compat, chunk_size=chunk_size, left_chunks=left_chunks)
        encoder = self.config.encoder
        features, lengths = padded(features, lengths, encoder.input_dim, encoder.min_frames)
        if not len(lengths):
            return no_utterances(self.config)
        out = self._run("encoder", feats=torch.from_numpy(features), lengths=torch.from_numpy(lengths))
        return tuple(out[n].float().cpu().numpy() for n in ("log_probs", "hidden")) + (
            out["out_lengths"].cpu().numpy(),
        )

    def check_options(self, *, compat=False, chunk_size=0, left_chunks=-1):
        """Raises ModelError for other options than those that the networks were traced with."""
        asked = {"compat": compat, "chunk_size": chunk_size, "left_chunks": left_chunks}
        if asked != self.built_for:
            raise ModelError(
                f"the {self.name} engine was built for {self.built_for}, asked for {asked}: build it again"
            )

    def decode(self, hidden, lengths, tokens, *, reversed_tokens=None):
        if self.config.decoder is None:
            raise ModelError("the model has no attention decoder: rescoring is not possible, use greedy or beam")
        arrays = {
            "hidden": torch.from_numpy(np.ascontiguousarray(hidden, dtype=np.float32)),
            "hidden_lengths": torch.from_numpy(np.ascontiguousarray(lengths, dtype=np.int32)),
        }
        results = []
        for name, given in (("decoder", tokens), ("reverse_decoder", reversed_tokens)):
            if given is None or not self._has(name):
                results.append(None)
                continue
            given = torch.from_numpy(np.ascontiguousarray(given, dtype=np.int64))
            results.append(self._run(name, **arrays, tokens=given)["log_probs"].float().cpu().numpy())
        return tuple(results)


class InterpretedEngine(_Plans):
    """The networks as they would be handed to TensorRT, evaluated in torch on the CPU. For checking, not for speed."""

    name = "tensorrt-interpreted"
    device = "cpu"

    def __init__(self, model: Model, *, precision: str = "fp32", **options):
        self.config, self.model, self.precision = model.config, model, precision
        self.built_for = {
            "compat": options.get("compat", False),
            "chunk_size": options.get("chunk_size", 0),
            "left_chunks": options.get("left_chunks", -1),
        }
        self.adds_prior = options.get("prior") is not None
        try:
            self.networks = dict(networks(model, precision=precision, **options))
        except trt.TrtError as error:
            raise ModelError(f"TensorRT: {error}") from error

    def _has(self, name):
        return name in self.networks

    def _run(self, name, **inputs):
        return self.networks[name].interpret(inputs)


class TensorrtEngine(_Plans):
    """Runs the plans of a model folder. NOT EXECUTED by this project: it needs a GPU that TensorRT accepts."""

    name = "tensorrt"

    def __init__(self, folder: ModelFolder, *, threads: int = 0):
        self.config = folder.config
        self.path = folder.path / "engines" / "tensorrt"
        rebuild = f"run `m3asr build {folder.path} --engine tensorrt`"
        try:
            manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
            version, plans, digest = manifest["format_version"], manifest["plans"], manifest["config_sha256"]
            self.built_for = {k: manifest[k] for k in ("compat", "chunk_size", "left_chunks")}
            self.precision, self.adds_prior = manifest["precision"], manifest["prior"]
            package = manifest["builder"].split()[0]
        except FileNotFoundError:
            raise ModelError(f"{folder.path} has no tensorrt engine: {rebuild}") from None
        except (OSError, ValueError, KeyError, TypeError):
            raise ModelError(f"{self.path / 'manifest.json'} is damaged: {rebuild}") from None
        if version != FORMAT_VERSION or digest != folder.config_digest():
            raise ModelError(f"{self.path} was built from another model or version: {rebuild}")
        try:
            self.engines = {name: trt.Engine(self.path / f"{name}.plan", package) for name in plans}
        except (trt.TrtError, OSError) as error:
            raise ModelError(f"TensorRT: {error}") from error
        self.device = torch.cuda.get_device_name()

    def _has(self, name):
        return name in self.engines

    def _run(self, name, **inputs):
        try:
            return self.engines[name](**inputs)
        except trt.TrtError as error:
            raise ModelError(f"TensorRT: {error}") from error
