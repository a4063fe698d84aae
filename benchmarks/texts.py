"""Whether the cuda engine reads recordings as eager PyTorch does: `python -m benchmarks.texts --manifest LIST`.

Greedy texts of a model folder, utterance by utterance, against the eager engine in float32 on the same features; and,
with features computed on the device, from the waveforms. Bit for bit: each utterance alone against the batch that it
came in, padded to the same bucket. Also how long packing, building, loading and the first text take. The last line of
the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from m3asr.audio import load_audio
from m3asr.decode import ctc_best_path, ctc_greedy_search
from m3asr.engines.cuda import CudaEngine, built
from m3asr.engines.cuda.waveforms import WaveformRecogniser
from m3asr.engines.eager import EagerEngine
from m3asr.features import pad_batch
from m3asr.folder import ModelFolder
from m3asr.manifest import read_manifest


def batches(features: list[np.ndarray], size: int):
    """Utterances of similar length together."""
    order = sorted(range(len(features)), key=lambda i: len(features[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def texts_of(folder: ModelFolder, engine, features: list[np.ndarray], size: int) -> list[str]:
    texts = [""] * len(features)
    for group in batches(features, size):
        log_probs, _, lengths = engine(*pad_batch([features[i] for i in group]))
        for i, result in zip(group, ctc_greedy_search(log_probs, lengths, folder.config.blank), strict=True):
            texts[i] = folder.tokenizer.decode(result.tokens)
    return texts


def texts_of_waveforms(folder: ModelFolder, engine, waveforms: list[np.ndarray], size: int) -> list[str]:
    cmvn = None if folder.cmvn is None else (folder.cmvn.mean, folder.cmvn.istd)
    recogniser, texts = WaveformRecogniser(engine, folder.config.fbank, cmvn), [""] * len(waveforms)
    groups = list(batches(waveforms, size))
    results = recogniser.best_paths([waveforms[i] for i in group] for group in groups)
    for group, (symbols, peaks, lengths) in zip(groups, results, strict=True):
        for i, result in zip(group, ctc_best_path(symbols, peaks, lengths, folder.config.blank), strict=True):
            texts[i] = folder.tokenizer.decode(result.tokens)
    return texts


def alone_and_together(engine, features: list[np.ndarray], size: int) -> dict:
    """How many utterances give other bits in another company of the same bucket, and how far from those alone."""
    group = next(iter(batches(features, size)))
    padded, lengths = pad_batch([features[i] for i in group])
    together, _, out_lengths = engine(padded, lengths)
    differing, worst = 0, 0.0
    for row, i in enumerate(group):
        company = np.zeros_like(padded)
        company[row, : lengths[row]] = features[i]
        only = np.zeros_like(lengths)
        only[row] = lengths[row]
        kept = out_lengths[row]
        differing += not np.array_equal(engine(company, only)[0][row, :kept], together[row, :kept])
        alone = engine(*pad_batch([features[i]]))[0][0, :kept]
        worst = max(worst, float(np.linalg.norm(alone - together[row, :kept]) / np.linalg.norm(alone)))
    return {"utterances": len(group), "other_bits_in_the_bucket": differing, "worst_between_buckets": worst}


def seconds_to_first_text(folder: ModelFolder, precision: str, features: np.ndarray) -> dict:
    """Build beside a copy of the folder, then load and read one utterance, as another process would."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "model"
        shutil.copytree(folder.path, copy, ignore=shutil.ignore_patterns("engines"))
        times, began = {}, time.perf_counter()
        built.build(ModelFolder.read(copy), precision)
        times["build"] = time.perf_counter() - began
        began = time.perf_counter()
        engine = built.load(ModelFolder.read(copy))
        times["load"] = time.perf_counter() - began
        engine(*pad_batch([features]))
        times["load and first result"] = time.perf_counter() - began
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--manifest", type=Path, required=True, help="JSONL, data.list or Kaldi folder")
    parser.add_argument("--model", type=Path, help="model folder (default: the shipped one)")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "fp16", "fp8"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--most", type=int, default=1000, help="utterances")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = ModelFolder.read(args.model)
    waveforms = [load_audio(utterance.audio()) for utterance in read_manifest(args.manifest)[: args.most]]
    features = [folder.features(waveform) for waveform in waveforms]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    began = time.perf_counter()
    expected = texts_of(folder, EagerEngine(folder, device="cuda"), features, args.batch)
    print(f"{len(features)} utterances, eager in {time.perf_counter() - began:.1f} s", flush=True)
    report = {"utterances": len(features), "precisions": {}}
    for precision in args.precisions:
        row = {"seconds": seconds_to_first_text(folder, precision, features[0])}
        engine = CudaEngine(folder, precision)
        got = {
            "features": texts_of(folder, engine, features, args.batch),
            "waveforms": texts_of_waveforms(folder, engine, waveforms, args.batch),
        }
        for source, texts in got.items():
            other = [i for i, (a, b) in enumerate(zip(texts, expected, strict=True)) if a != b]
            row[f"same text from {source}"] = 1 - len(other) / len(texts)
            for i in other[:5]:
                print(f"    {precision} {source} {i}: {texts[i]!r} for {expected[i]!r}")
        row["batch"] = alone_and_together(engine, features, args.batch)
        report["precisions"][precision] = row
        print(f"{precision}: {json.dumps(row)}", flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "texts.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
