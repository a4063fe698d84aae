"""Greedy word error rate of a model folder, in torch on the host: `python3 -m training.score MODEL --human DIR`.

A quick look between runs. The numbers of the model card are made by the package itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from training.data import Speech, Units, decode, plain_batches, read_audio
from training.evaluate import greedy_wer
from training.network import read_folder
from training.train import FrontEnd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--human", type=Path, help="folder with manifest.jsonl and flac files")
    parser.add_argument("--synthetic", type=Path, help="zip of opus files, with a .jsonl of the same name beside it")
    parser.add_argument("--show", type=int, default=0, help="print so many references and hypotheses of each set")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()

    device = torch.device("cpu")
    model, bpe, mean, istd = read_folder(args.model)
    units, front_end = Units(bpe), FrontEnd(model.config.fbank, device)
    front_end.mean, front_end.istd = mean, istd
    sets = {}
    if args.human:
        sets["human"] = read_audio(args.human)
    if args.synthetic:
        lines = [json.loads(x) for x in args.synthetic.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
        sets["synthetic"] = decode([{**line, "path": args.synthetic} for line in lines], args.processes)
    for name, (flat, utterances) in sets.items():
        speech = Speech(flat, device)
        batches = plain_batches(utterances, units, 60.0)
        wer = greedy_wer(model, batches, lambda b, s=speech: front_end(b, s, None), units, args.show)
        print(
            f"{name}: {wer:.2f} % of {sum(len(u.text.split()) for u in utterances)} words, {len(utterances)} utterances"
        )


if __name__ == "__main__":
    main()
