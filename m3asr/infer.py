"""Arrays in, arrays out: an engine on stored features, for comparison with other implementations."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from m3asr.errors import ModelError
from m3asr.files import whole_file
from m3asr.folder import ModelFolder


def read_features(path: Path, folder: ModelFolder) -> tuple[np.ndarray, np.ndarray]:
    """FEATS.npz -> what the folder's model reads: features float32 (B, T, F), lengths int32 (B,).

    The file holds `feat_lens` and `feats` (after CMVN) or `fbank` (raw); of both, the one that the model needs no
    conversion for is taken. Raises ModelError for anything else.
    """
    arrays = _load(path)
    if "feat_lens" not in arrays or not arrays.keys() & {"feats", "fbank"}:
        raise ModelError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; expected feat_lens and feats or fbank"
        )
    raw = folder.config.cmvn != "before"
    names = ("fbank", "feats") if raw else ("feats", "fbank")
    name = next(name for name in names if name in arrays)
    features, lengths = arrays[name], arrays["feat_lens"]
    bins = folder.config.encoder.input_dim
    if not np.issubdtype(features.dtype, np.floating) or features.ndim != 3 or features.shape[2] != bins:
        raise ModelError(
            f"{path}: {name} is {features.dtype} {features.shape}, expected float32 (batch, frames, {bins})"
        )
    features = features.astype(np.float32)
    if name == "fbank":
        features = folder.normalised(features)
    elif folder.config.cmvn == "inside":
        # The model normalises what it gets, so that is undone first.
        weights = folder.weights()
        features = features / weights["cmvn.istd"] + weights["cmvn.mean"]
    return features, lengths


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ModelError(f"{path} is a single array; expected an .npz with feat_lens and feats or fbank")
        with file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a readable .npz of plain arrays: {' '.join(str(error).split())}") from None


def write_outputs(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz aside and rename it, so that it is whole or not there."""
    with whole_file(path) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)
