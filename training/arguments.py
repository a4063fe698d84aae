"""What a training run can be told: the options of `training.train`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from training import losses
from training.network import SIZES


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--speech", type=Path, nargs="+", required=True, help="folders with *.zip and *.jsonl.gz")
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="more of them, of which none is kept for dev")
    parser.add_argument("--texts", type=Path, help="lines nobody spoke, for the decoder alone: text, or JSON with text")
    parser.add_argument(
        "--out", type=Path, required=True, help="log.jsonl, checkpoint.pt and model/ go here, model-STEP at evaluations"
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="of the whole run, start and end included")
    parser.add_argument("--size", choices=SIZES, default="compact")
    parser.add_argument("--bits", type=int, choices=(8, 16), default=16, help="a weight in the model folder")
    parser.add_argument("--streaming", action="store_true", help="causal convolution, random attention chunks")
    parser.add_argument(
        "--views", type=int, choices=(1, 2), default=1, help="2: each utterance twice in a batch, augmented differently"
    )
    parser.add_argument("--vocab", type=int, default=384, help="units, the three special ones included")
    parser.add_argument("--batch-seconds", type=float, default=1800.0, help="padded audio a step")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="muon: for the matrices")
    parser.add_argument("--lr", type=float, default=4.8e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=600, help="steps")
    parser.add_argument("--final-lr", type=float, default=0.0, help="where the rate ends, of its peak")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--clip", type=float, default=2.0, help="largest gradient norm")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights, a step")
    parser.add_argument(
        "--clean-fraction", type=float, default=0.12, help="of the time at most: speech as it is, alone"
    )
    parser.add_argument("--clean-until", type=float, default=2.5, help="CTC loss a token that ends it")
    parser.add_argument("--dense-fraction", type=float, default=0.1, help="of the time before experts are routed to")
    parser.add_argument("--blend-fraction", type=float, default=0.1, help="of the time in which gates fade in")
    parser.add_argument("--sparsity", type=float, default=losses.LossWeights.sparsity)
    parser.add_argument("--importance", type=float, default=losses.LossWeights.importance)
    parser.add_argument("--embedding-ctc", type=float, default=losses.LossWeights.embedding_ctc)
    parser.add_argument("--text", type=float, default=losses.LossWeights.text, help="weight of --texts")
    parser.add_argument("--consistency", type=float, default=losses.LossWeights.consistency, help="of two views")
    parser.add_argument(
        "--grow", type=Path, help="folder that training.speak is filling: its parts are taken as they come"
    )
    parser.add_argument("--grow-hours", type=float, default=200.0, help="memory kept for them")
    parser.add_argument(
        "--speeds", type=float, nargs=2, default=(0.86, 1.14), help="slowest and fastest, pitch and all"
    )
    parser.add_argument("--joined", type=float, default=0.4, help="chance that an utterance is joined to the next")
    parser.add_argument("--tempo", type=float, default=0.0, help="passing changes of tempo, natural log")
    parser.add_argument("--smear", type=float, default=0.0, help="rows whose frames run into each other")
    parser.add_argument("--expand", type=float, default=0.0, help="rows whose weak sounds are weaker, or less weak")
    parser.add_argument("--echo", type=float, default=0.3, help="reverberated rows with echoes of 50 to 330 ms")
    parser.add_argument("--masking", type=float, default=1.0, help="SpecAugment: how many times as long in time")
    parser.add_argument(
        "--rooms", type=Path, help="folder of impulse responses, 16 kHz wav: measured, or of training.rooms"
    )
    parser.add_argument("--no-augment", action="store_true", help="speech as it is, for trying things out")
    parser.add_argument("--dev", type=int, default=300, help="utterances kept out of training")
    parser.add_argument("--human", type=Path, help="folder with manifest.jsonl and flac files: only evaluated")
    parser.add_argument("--limit", type=int, help="use only so many utterances")
    parser.add_argument("--eval-seconds", type=float, default=150.0, help="between evaluations and checkpoints")
    parser.add_argument("--log-steps", type=int, default=50)
    parser.add_argument("--init", type=Path, help="model folder to start from, as trained experts")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="for decoding")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()
