"""The engine as files beside the model: packed weights in `engines/cuda`, with a manifest that is checked at load.

weights.safetensors   what the kernels read, as `packing` made it, and the attention decoder's parameters in float32
manifest.json         precision, compute capability, versions, digests of the model, and the shape of the weights' tree

Kernels in Triton are compiled when a batch shape first comes, those in CUDA C++ by `build`; all are kept in Triton's
cache (TRITON_CACHE_DIR), by their source and by what compiled them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch
import triton
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from m3asr import __version__
from m3asr.engines.cuda import packing
from m3asr.engines.cuda.clustered import clustered
from m3asr.engines.cuda.engine import CudaEngine, device_of
from m3asr.engines.cuda.packing import Packed
from m3asr.errors import ModelError
from m3asr.folder import ModelFolder, engine_aside

FORMAT_VERSION = 1
_KINDS = {
    kind.__name__: kind for kind in (packing.Weights, packing.Stack, packing.Block, packing.Subsampling, packing.Linear)
}


def build(folder: ModelFolder, precision: str = "fp16", device: str = "cuda") -> Path:
    """Pack the folder's weights for this device; replaces an older engine only when the new one is whole.

    Raises ModelError for a model or a precision without kernels, and where there is no GPU.
    """
    packed = packing.pack(folder.config, _tensors(folder), precision, device_of(device))
    for stack in filter(None, clustered(packed.weights, packing.TYPES[precision], packing.EXPERTS_TYPES[precision])):
        stack.compile()
    tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in packed.decoder.items()}
    tree = _flat(packed.weights, "weights", tensors)
    manifest = {**_expected(folder, device), "precision": precision, "weights": tree}
    with engine_aside(folder, "cuda") as aside:
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, aside / "weights.safetensors")
        (aside / "weights.safetensors").chmod(0o644)
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return folder.path / "engines" / "cuda"


def load(folder: ModelFolder, device: str = "cuda", **options) -> CudaEngine:
    """The engine that `build` left in the folder; options are those of `CudaEngine`.

    Raises ModelError, with the command that builds it again, for an engine that is missing, damaged, or was built for
    another GPU, version or model; and where there is no GPU.
    """
    device_of(device)
    path = folder.path / "engines" / "cuda"
    rebuild = f"m3asr build {folder.path} --engine cuda"
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        precision, tree = manifest["precision"], manifest["weights"]
        rebuild += f" --precision {precision}"
    except FileNotFoundError:
        raise ModelError(f"{folder.path} has no cuda engine: run `{rebuild}`") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{path / 'manifest.json'} is damaged: run `{rebuild}`") from None
    for name, expected in _expected(folder, device).items():
        if manifest.get(name) != expected:
            found = manifest.get(name)
            raise ModelError(f"{path} was built for {_WORDS[name]} {found}, here is {expected}: run `{rebuild}`")
    try:
        tensors = load_file(path / "weights.safetensors", device=str(device_of(device)))
        # Kernels read 16 bytes at once.
        tensors = {name: t if t.data_ptr() % 16 == 0 else t.clone() for name, t in tensors.items()}
        decoder = {
            name.removeprefix("model."): tensors.pop(name) for name in list(tensors) if name.startswith("model.")
        }
        weights = _whole(tree, tensors)
        weights.main.config = folder.config.encoder
        if weights.embed is not None:
            weights.embed.config = folder.config.encoder.embed
        packed = Packed(folder.config, precision, weights, decoder)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} is damaged ({type(error).__name__}: {error}): run `{rebuild}`") from None
    return CudaEngine(packed, device=device, **options)


_WORDS = {
    "format_version": "an engine format",
    "m3asr": "m3asr",
    "torch": "torch",
    "triton": "triton",
    "compute_capability": "the compute capability",
    "config_sha256": "a model whose config.json has the digest",
    "model_digest": "a model whose weights have the digest",
}


def _expected(folder: ModelFolder, device: str) -> dict[str, str | int]:
    """What must be the same at build and at load."""
    return {
        "format_version": FORMAT_VERSION,
        "m3asr": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "compute_capability": _capability(device),
        "config_sha256": folder.config_digest(),
        "model_digest": weights_digest(folder.path / "model.safetensors"),
    }


def _capability(device: str) -> str:
    device = device_of(device)
    if device.type != "cuda":
        return "none: Triton's interpreter"
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def weights_digest(path: Path) -> str:
    """Tells models apart in milliseconds: of a large file its size, its first MB, and 64 KB at 64 places."""
    digest, size = hashlib.sha256(), path.stat().st_size
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        if size <= 1 << 24:
            digest.update(file.read())
            return digest.hexdigest()
        digest.update(file.read(1 << 20))
        for i in range(64):
            file.seek((size - (1 << 16)) * i // 63)
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


def _tensors(folder: ModelFolder) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in folder.weights().items()}


def _flat(value, name: str, tensors: dict[str, Tensor]):
    """`value` as JSON, its tensors put into `tensors` and named there. A stack's configuration is left out."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if is_dataclass(value):
        parts = {
            f.name: _flat(getattr(value, f.name), f"{name}.{f.name}", tensors)
            for f in fields(value)
            if f.name != "config"
        }
        return {"kind": type(value).__name__, "parts": parts}
    if isinstance(value, (list, tuple)):
        items = [_flat(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (int, float)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which is not stored")


def _whole(tree, tensors: dict[str, Tensor]):
    """The inverse of `_flat`."""
    if isinstance(tree, list):
        return [_whole(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "tuple" in tree:
        return tuple(_whole(item, tensors) for item in tree["tuple"])
    parts = {name: _whole(part, tensors) for name, part in tree["parts"].items()}
    if tree["kind"] == "Stack":
        parts["config"] = None
    return _KINDS[tree["kind"]](**parts)
