"""Raw input files for NVIDIA's command line tools, so that a plan can be timed without Python."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from m3asr.errors import ModelError, reason

_MOST = 10**9  # far more than a plan takes
TOOLS = {"tensorrt": "trtexec", "tensorrt_rtx": "tensorrt_rtx"}


def trtexec_inputs(
    batch: int, frames: int, width: int, folder: Path, *, plan="encoder.plan", package="tensorrt"
) -> str:
    """Writes feats.BxSxD.bin and lengths.BxSxD.bin into `folder`; -> the command that runs a plan on them.

    batch, frames, width: sizes B, S (frames before subsampling) and D of the features. The files have no header:
    float32 in C order, uniform in [0, 1), and int32 lengths, all S. package: "tensorrt" or "tensorrt_rtx".
    Raises ModelError for sizes below 1, for more than 4 GB, or an unwritable folder.
    """
    if min(batch, frames, width) < 1:
        raise ModelError(f"sizes are {batch} x {frames} x {width}: expected numbers from 1 on")
    if batch * frames * width > _MOST:
        raise ModelError(f"sizes are {batch} x {frames} x {width}: expected at most {_MOST:,} numbers, 4 GB")
    if package not in TOOLS:
        raise ModelError(f"there is no TensorRT package {package!r}: expected one of {', '.join(TOOLS)}")
    name = f"{batch}x{frames}x{width}"
    arrays = {
        "feats": np.random.default_rng(0).random((batch, frames, width), dtype=np.float32),
        "lengths": np.full(batch, frames, dtype=np.int32),
    }
    paths = {key: Path(folder) / f"{key}.{name}.bin" for key in arrays}
    try:
        for key, array in arrays.items():
            array.astype(array.dtype.newbyteorder("<")).tofile(paths[key])
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {reason(error)}") from None
    shapes = f"feats:{name},lengths:{batch}"
    loads = ",".join(f"{key}:{path}" for key, path in paths.items())
    options = f"--loadEngine={plan}", f"--shapes={shapes}", f"--loadInputs={loads}"
    return shlex.join([TOOLS[package], *options])
