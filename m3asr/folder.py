"""A model folder: what `m3asr convert` writes and everything else reads.

config.json         the network and its front end (see config.py)
model.safetensors   weights: float32, float16, or 8 bits each (see quantized.py)
units.txt           one "symbol id" a line
lm.npz              a language model of words for the searches, if there is one
cmvn.json           mean and istd a bin; absent if the model normalises its input itself or not at all
README.md           the model card
engines/NAME/       what was built from the model for one engine
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m3asr.config import ModelConfig
from m3asr.errors import ModelError, reason
from m3asr.features import Cmvn, compress_levels, fbank
from m3asr.quantized import dequantize
from m3asr.tokenizer import Tokenizer

BUILTIN = Path(__file__).parent / "models"
DEFAULT_MODEL = "3m-en"


@dataclass(frozen=True)
class ModelFolder:
    """A model folder that was found complete. Weights are read when asked for."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    cmvn: Cmvn | None

    @classmethod
    def read(cls, path: str | Path | None = None) -> ModelFolder:
        """Read and check a folder; None means the model that is shipped with the package.

        Raises ModelError when a file is missing, damaged or of another version.
        """
        path = Path(path) if path is not None else BUILTIN / DEFAULT_MODEL
        if not path.is_dir():
            raise ModelError(f"{path} is not a model folder: expected the output of `m3asr convert`")
        config = ModelConfig.read(path / "config.json")
        tokenizer = Tokenizer.read(path / "units.txt", blank=config.blank, sos=config.sos, eos=config.eos)
        if len(tokenizer) != config.vocab_size:
            raise ModelError(f"{path}: units.txt has {len(tokenizer)} units, config.json says {config.vocab_size}")
        cmvn = None
        if config.cmvn == "before":
            try:
                cmvn = Cmvn.from_dict(json.loads((path / "cmvn.json").read_text(encoding="utf-8")))
            except (OSError, ValueError):
                raise ModelError(f"{path} has no readable cmvn.json, which its config asks for") from None
        if not (path / "model.safetensors").is_file():
            raise ModelError(f"{path} has no model.safetensors: convert the checkpoint again")
        return cls(path, config, tokenizer, cmvn)

    def features(self, waveform: np.ndarray) -> np.ndarray:
        """Waveform (N,) at 16 kHz -> features float32 (T, F) as the model reads them."""
        return self.normalised(fbank(waveform, self.config.fbank))

    def normalised(self, features: np.ndarray) -> np.ndarray:
        """Filterbank features float32 (..., F) as the model reads them: after its level compression, if it has one, and
        its CMVN, if that is not the model's part."""
        features = compress_levels(features, self.config.fbank.level_compression)
        return features if self.cmvn is None else self.cmvn.apply(features)

    def weights(self) -> dict[str, np.ndarray]:
        """All tensors by name, floating ones as float32. Raises ModelError for a damaged file."""
        return read_weights(self.path / "model.safetensors")

    def lm(self) -> Path | None:
        """The model's own language model, of words, if it has one."""
        path = self.path / "lm.npz"
        return path if path.is_file() else None

    def config_digest(self) -> str:
        """Identifies the network's shape; built graphs carry it, so that they are not used with another one."""
        return hashlib.sha256(self.config.to_json().encode()).hexdigest()


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a model.safetensors by name, floating ones as float32. Raises ModelError for a damaged file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged or truncated ({error}): convert the checkpoint again") from None
    return dequantize(tensors, path)


@contextmanager
def written_aside(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends well, and is removed when it does not.

    Raises ModelError if `target` is there already, unless `overwrite` and it is a model folder (or empty).
    """
    target = Path(target)
    if target.exists():
        replaceable = target.is_dir() and (not any(target.iterdir()) or (target / "config.json").is_file())
        if not (replaceable and (overwrite or not any(target.iterdir()))):
            hint = "pass --force to replace it" if replaceable else "choose another name"
            raise ModelError(f"{target} is there already: {hint}")
    with _folder_aside(target) as aside:
        yield aside


@contextmanager
def engine_aside(folder: ModelFolder, name: str) -> Iterator[Path]:
    """A new folder that becomes `engines/NAME` when the block ends well; an older engine stays until then."""
    with _folder_aside(folder.path / "engines" / name) as aside:
        yield aside


@contextmanager
def _folder_aside(target: Path) -> Iterator[Path]:
    """As `written_aside`, whatever is there. Raises ModelError where the system refuses."""
    new = not target.parent.exists()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield aside
            aside.chmod(0o755)
            if target.exists():
                shutil.rmtree(target)
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if new:
                with suppress(OSError):  # it holds what was made
                    target.parent.rmdir()
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {reason(error)}") from None


def write_model_files(
    folder: Path, config: ModelConfig, state: dict[str, np.ndarray], tokenizer: Tokenizer, cmvn: Cmvn | None, card: str
) -> None:
    """Write a model folder's files into an existing folder."""
    from safetensors.numpy import save_file

    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    (folder / "units.txt").write_text(tokenizer.to_text(), encoding="utf-8")
    if cmvn is not None:
        (folder / "cmvn.json").write_text(json.dumps(cmvn.to_dict()) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    save_file(state, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # the library makes it private
