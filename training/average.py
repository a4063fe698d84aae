"""The mean of several models' weights, of one run's last evaluations say: `python3 -m training.average OUT FOLDER...`

What single checkpoints learnt of the voices they heard last averages out. Weights are stored as `train` stores them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from training.network import read_folder, write_folder


@dataclass(frozen=True)
class StoredUnits:
    """The units of a model folder as they stand there."""

    model: bytes
    text: str

    def lines(self) -> str:
        return self.text


def average(out: Path, folders: list[Path], bits: int = 8, level_compression: float | None = None) -> int:
    """-> bytes of the weights. level_compression: of the mean's features, None as the models have it.

    Raises ValueError for models that differ in more than their weights.
    """
    model, bpe, mean, istd = read_folder(folders[0])
    total = {name: value.double() for name, value in model.state_dict().items()}
    for folder in folders[1:]:
        other, *rest = read_folder(folder)
        if other.config != model.config or rest[0] != bpe or not torch.equal(rest[1], mean):
            raise ValueError(f"{folder} is not of the same run as {folders[0]}: configuration, units or CMVN differ")
        for name, value in other.state_dict().items():
            total[name] += value
    state = {name: (value / len(folders)).to(model.state_dict()[name].dtype) for name, value in total.items()}
    config = model.config
    if level_compression is not None:
        config = replace(config, fbank=replace(config.fbank, level_compression=level_compression))
    units = StoredUnits(bpe, (folders[0] / "units.txt").read_text(encoding="utf-8"))
    return write_folder(out, config, state, units, mean, istd, bits=bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--bits", type=int, choices=(8, 16), default=8, help="a weight in the model folder")
    parser.add_argument("--level-compression", type=float, help="of the features; left out: as the models have it")
    args = parser.parse_args()
    size = average(args.out, args.folders, args.bits, args.level_compression)
    print(f"{args.out}: the mean of {len(args.folders)} models, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
