"""3M-ASR and WeNet training folders -> (config, weights under our names, units, CMVN).

The only file that knows foreign key names; `recipe.py` knows their yaml settings. Whatever the originals can write but
this project does not run is refused by name, so that nothing downstream computes something else silently. Nothing is
unpickled but tensors.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from m3asr.config import ModelConfig
from m3asr.errors import ModelError
from m3asr.features import Cmvn, OnlineFbank
from m3asr.model import Model
from m3asr.recipe import model_config
from m3asr.tokenizer import Tokenizer

CONFIG_NAMES = ("train.yaml", "config.yaml")
UNITS_NAMES = ("units.txt", "lang_char.txt", "dict.txt", "words.txt")
CMVN_NAMES = ("global_cmvn", "global_cmvn.json", "cmvn.json", "cmvn.ark", "cmvn")
CHECKPOINT_NAMES = ("final.pt", "final.nnet", "model.pt", "avg.pt", "average.pt")
# Numbered checkpoints of 3M-ASR (model.epoch-E.step-S) and of WeNet (epoch_E.pt, step_S.pt, E.pt).
NUMBERED = re.compile(r"(?:model\.epoch-(\d+)\.step-(\d+)|(?:epoch_|step_)?(\d+)\.pt)")

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
    try:
        network = model_config(family, values, state, config_path, notes)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ModelError(f"{config_path}: a setting has an unexpected value ({error})") from None
    OnlineFbank(network.fbank)  # refuses a front end that no recording could go through

    stats = None
    if not use_cmvn and "cmvn.mean" in state:
        raise ModelError("--no-cmvn: this checkpoint normalises its input itself, by tensors of its own")
    if family == "wenet" and use_cmvn and "cmvn.mean" not in state and values.get("cmvn", values.get("cmvn_file")):
        cmvn = cmvn or _find(folder, CMVN_NAMES, "CMVN file", "--cmvn")
        stats = Cmvn.read(cmvn)
        state["cmvn.mean"], state["cmvn.istd"] = torch.tensor(stats.mean), torch.tensor(stats.istd)
    if family == "wenet":
        network = replace(network, cmvn="inside" if "cmvn.mean" in state else "none")
        stats = None
    elif use_cmvn:
        stats = Cmvn.read(cmvn or _find(folder, CMVN_NAMES, "CMVN file", "--cmvn, or say --no-cmvn"))
        if len(stats.mean) != network.encoder.input_dim:
            raise ModelError(
                f"the CMVN statistics have {len(stats.mean)} bins, the model reads {network.encoder.input_dim}"
            )
    else:
        network = replace(network, cmvn="none")

    network, tokenizer = _vocabulary(units_path, values, network, family)
    return Checkpoint(network, _checked(state, network), tokenizer, stats, sources, notes)


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
    other = [str(key) for key, value in state.items() if not (isinstance(key, str) and _is_plain(value))]
    if other:
        raise ModelError(
            f"{path} is not a bare state_dict: {', '.join(other[:5])} hold no tensor of plain numbers; save "
            "`model.state_dict()` alone"
        )
    return state


def _is_plain(value) -> bool:
    """Whether it is a tensor whose numbers can be read as float32: there, real, and each in its place."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_complex()


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


def _vocabulary(path: Path, values: dict, config: ModelConfig, family: str) -> tuple[ModelConfig, Tokenizer]:
    """Units and special tokens: 3M-ASR uses the last id for sos and eos, WeNet its yaml's special_tokens if any."""
    last = config.vocab_size - 1
    sos = eos = last
    if family == "wenet":
        try:
            special = (values.get("tokenizer_conf") or {}).get("special_tokens") or {}
            sos, eos = (special.get(name, last) for name in ("<sos>", "<eos>"))
            known = all(type(token) is int and 0 <= token <= last for token in (sos, eos))
        except AttributeError:
            known = False
        if not known:
            raise ModelError(
                f"the configuration's tokenizer_conf is {values['tokenizer_conf']}: expected special_tokens with ids "
                f"from 0 to {last}"
            )
    config = replace(config, sos=sos, eos=eos)
    tokenizer = Tokenizer.read(path)
    if len(tokenizer.symbols) != config.vocab_size:
        raise ModelError(
            f"{path} has {len(tokenizer.symbols)} units, the model puts out {config.vocab_size}: "
            "this is not the vocabulary it was trained with"
        )
    return config, tokenizer
