"""From audio arrays in host memory to text: `python -m benchmarks.end_to_end --out DIR`.

Seconds of audio a second of work (RTFx) by batch size, and the time of one 8 s clip alone. On the cuda engine features
are computed on the GPU and the next batch is under way while the host decodes the last; on the CPU engines features,
encoder and greedy search follow each other. No speech detection: each clip is one utterance. The clips are cut from
recordings; a preset's random weights (cuda only) cost what trained ones cost, but their text means nothing.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from m3asr.audio import SAMPLE_RATE, load_audio
from m3asr.config import FbankConfig
from m3asr.decode import ctc_best_path, ctc_greedy_search
from m3asr.engines import available, load_engine
from m3asr.features import pad_batch
from m3asr.folder import ModelFolder

EXAMPLES = Path(__file__).parent.parent / "examples"
Texts = Callable[[Sequence[Sequence[np.ndarray]]], Iterator[list[str]]]


def clips(files: list[str], seconds: float, count: int) -> list[np.ndarray]:
    """`count` different clips of that length, from the recordings one after the other, round and round."""
    sound = np.concatenate([load_audio(file) for file in files])
    size = int(seconds * SAMPLE_RATE)
    sound = np.tile(sound, -(-size // len(sound)) + 1)
    starts = np.random.default_rng(0).integers(0, len(sound) - size, count)
    return [sound[start : start + size].copy() for start in starts]


def on_cpu(folder: ModelFolder, name: str, threads: int) -> Texts:
    engine = load_engine(folder, name, threads=threads)

    def texts(batches):
        for waveforms in batches:
            log_probs, _, lengths = engine(*pad_batch([folder.features(waveform) for waveform in waveforms]))
            results = ctc_greedy_search(log_probs, lengths, folder.config.blank)
            yield [folder.tokenizer.decode(result.tokens) for result in results]

    return texts


def on_gpu(model: str, precision: str, best_alone: bool) -> Texts:
    """`model` is a preset or a model folder, which needs no build here: its weights are packed at once. best_alone: no
    log-probabilities are written.
    """
    from benchmarks.models import PRESETS, preset, random_model, spread_routers
    from m3asr.engines.cuda import CudaEngine
    from m3asr.engines.cuda.waveforms import WaveformRecogniser

    if model in PRESETS:
        import torch

        built = random_model(preset(model), "cuda")
        with torch.inference_mode():
            spread_routers(built)
        engine, cmvn, blank = CudaEngine(built, precision), None, 0
        config, words = FbankConfig(num_mel_bins=engine.config.encoder.input_dim), lambda t: " ".join(map(str, t))
    else:
        folder = ModelFolder.read(model)
        engine, blank = CudaEngine(folder, precision), folder.config.blank
        cmvn = None if folder.cmvn is None else (folder.cmvn.mean, folder.cmvn.istd)
        config, words = folder.config.fbank, folder.tokenizer.decode
    engine.forward.best_alone = best_alone
    recogniser = WaveformRecogniser(engine, config, cmvn)

    def texts(batches):
        for symbols, peaks, lengths in recogniser.best_paths(batches):
            yield [words(result.tokens) for result in ctc_best_path(symbols, peaks, lengths, blank)]

    return texts


def measure(texts: Texts, sound: list[np.ndarray], batch: int, budget: float) -> dict:
    """Throughput over as many batches as fit the budget, at least two."""
    groups = [sound[i : i + batch] for i in range(0, len(sound) - batch + 1, batch)]
    list(texts(groups[:2]))  # graphs are captured, kernels compiled
    before = time.perf_counter()
    list(texts(groups[:2]))
    once = (time.perf_counter() - before) / 2
    count = int(max(2, min(400, budget / once)))
    before = time.perf_counter()
    for _ in texts(groups[i % len(groups)] for i in range(count)):
        pass
    seconds = time.perf_counter() - before
    audio = count * batch * len(sound[0]) / SAMPLE_RATE
    return {"batches": count, "seconds": seconds, "rtfx": audio / seconds, "ms_per_batch": 1e3 * seconds / count}


def latency(texts: Texts, sound: list[np.ndarray], repeats: int, budget: float) -> dict:
    """Milliseconds from one clip to its text, nothing else under way; fewer repeats, but 20, if the budget ends."""
    times, late = [], time.perf_counter() + budget
    for i in range(repeats + 3):
        if len(times) >= 23 and time.perf_counter() > late:
            break
        before = time.perf_counter()
        list(texts([[sound[i % len(sound)]]]))
        times.append(1e3 * (time.perf_counter() - before))
    times = sorted(times[3:])
    return {"median_ms": statistics.median(times), "p99_ms": times[int(0.99 * (len(times) - 1))], "repeats": len(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="model folder (default: the shipped one) or a preset, for cuda")
    parser.add_argument("--engines", nargs="+", default=["cuda", "onnx", "eager"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp16"], help="of cuda")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a clip")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--audio", nargs="+", help="recordings; default: the examples")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for each batch size")
    parser.add_argument("--repeats", type=int, default=500, help="of the single clip")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tiles", type=Path, help="tiles.json of benchmarks.kernels, over the package's")
    parser.add_argument("--log-probs", action="store_true", help="cuda: all log-probabilities are made, and not read")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sound = clips(args.audio or sorted(map(str, EXAMPLES.glob("*.flac"))), args.seconds, 2 * max(args.batches))
    here, rows = available(), []
    if args.tiles is not None:
        from m3asr.engines.cuda import tiles

        tiles.read_measured(args.tiles)
    for name in args.engines:
        if here[name][1]:
            rows.append({"engine": name, "refused": here[name][1]})
            print(f"{name}: not measured, {here[name][1]}")
            continue
        if name != "cuda" and args.model is not None and not Path(args.model).is_dir():
            rows.append({"engine": name, "refused": f"the preset {args.model} is for cuda only"})
            print(f"{name}: not measured, {rows[-1]['refused']}")
            continue
        for precision in args.precisions if name == "cuda" else ("fp32",):
            if name == "cuda":
                texts = on_gpu(args.model or str(ModelFolder.read().path), precision, not args.log_probs)
            else:
                texts = on_cpu(ModelFolder.read(args.model), name, args.threads)
            row = {"engine": name, "device": here[name][0], "precision": precision, "batches": {}}
            row["latency"] = latency(texts, sound, args.repeats, args.budget)
            line = f"one {args.seconds:g} s clip {row['latency']['median_ms']:.2f} ms; RTFx"
            for batch in args.batches:
                row["batches"][batch] = measure(texts, sound, batch, args.budget)
                line += f"  {batch}: {row['batches'][batch]['rtfx']:.0f}"
            row["first_text"] = next(texts([sound[:1]]))[0]
            rows.append(row)
            print(f"{name} {precision} on {here[name][0]}: {line}", flush=True)
            print(f"    first text: {row['first_text'][:100]}", flush=True)
    result = {"model": args.model or "shipped", "clip_seconds": args.seconds, "rows": rows}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "end_to_end.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
