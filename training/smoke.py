"""A few minutes on the device before a long run: do the parts agree with the host, how long does each take, what fits.

`python3 -m training.smoke --speech FOLDER...` takes the options of train.py and prints one line a measurement.
"""

from __future__ import annotations

import itertools
import json
import time

import torch

from m3asr.engines.torch_fbank import fbank, mel_filters
from training import losses
from training.arguments import arguments
from training.data import LENGTHS, Planner
from training.train import Run


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(device: torch.device, repeats: int, work) -> float:
    """Milliseconds a call, after one call to warm up."""
    work()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return 1000 * (time.perf_counter() - start) / repeats


def check_samples(run: Run) -> None:
    """Places are float64: the last utterance of a full set must still be found to the sample."""
    utterance = run.training[-1]
    one = torch.zeros(1, 1, dtype=torch.int64, device=run.device)
    where = one, one + utterance.offset, one + utterance.size
    row = run.speech.render(*where, None, utterance.size)[0]
    expected = run.speech.samples[utterance.offset : utterance.offset + utterance.size].float() / 32768
    played = run.speech.render(*where, one + 1.0000001, utterance.size)[0]
    print(
        f"samples: {run.speech.size} in all, last at {utterance.offset}, gather equal: {torch.equal(row, expected)}, "
        f"played as fast: {(played - expected).abs().max():.1e} of {expected.abs().max():.2f}"
    )


def check_fbank(run: Run, waveform: torch.Tensor) -> None:
    config = run.front_end.config
    ours = fbank(waveform[:4] * 32768, run.front_end.filters, config).cpu()
    host = fbank(waveform[:4].cpu() * 32768, mel_filters(config), config)
    print(f"fbank: largest difference to the host {(ours - host).abs().max():.2e}")


def main() -> None:
    args = arguments(__doc__)
    run = Run(args)
    device, cuda = run.device, args.device.startswith("cuda")
    print(torch.__version__, torch.cuda.get_device_name() if cuda else "cpu", f"start took {run.elapsed():.1f} s")
    check_samples(run)
    run.optimizer.lr.fill_(args.lr)
    augment = run.make_augment(3)
    planner = Planner(run.training, run.units, args.batch_seconds, 5, args.joined, args.speeds)
    start = time.perf_counter()
    batches = list(itertools.islice(planner.batches(cuda), 12))
    rows = sum(len(b.texts) for b in batches) / len(batches)
    print(
        f"planner: {1000 * (time.perf_counter() - start) / len(batches):.1f} ms a batch of {rows:.0f} rows on the host"
    )

    batch = batches[0].to(device)
    waveform = batch.render(run.speech)
    check_fbank(run, waveform)
    repeats = 5 if cuda else 1
    filters = run.front_end.filters
    features, lengths = run.front_end(batch, run.speech, augment)

    def forward():
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            targets = batch.tokens, batch.token_lengths
            return losses.batch_loss(run.model, run.routings[0], features, lengths, *targets, run.weights)[0]

    parts = {
        "render": lambda: batch.render(run.speech),
        "augment": lambda: augment and augment(waveform, batch.lengths),
        "fbank": lambda: fbank(waveform, filters, run.front_end.config),
        "front end": lambda: run.front_end(batch, run.speech, augment),
        "forward": forward,
        "forward+backward": lambda: forward().backward(),
    }
    for name, work in parts.items():
        print(f"{name}: {timed(device, repeats, work):.1f} ms for {batch.tokens.shape[0]} x {batch.samples / 16000} s")
    run.optimizer.zero_grad()

    for seconds in (args.batch_seconds / 2, args.batch_seconds, args.batch_seconds * 2):
        planner = Planner(run.training, run.units, seconds, 6, args.joined, args.speeds)
        stream = planner.prefetched(8, cuda)
        shapes: set[int] = set()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        run.captured.clear()
        for _ in range(4 * len(LENGTHS) if cuda else 1):  # a shape's first step makes plans, its second is captured
            first = next(stream)
            shapes.add(first.samples)
            run.train_step(first.to(device), augment)
        synchronize(device)
        start, audio, steps, losses_ = time.perf_counter(), 0.0, 20 if cuda else 2, []
        for _ in range(steps):
            step_batch = next(stream)
            shapes.add(step_batch.samples)
            audio += float(step_batch.host_lengths.sum()) / 16000
            losses_.append(run.train_step(step_batch.to(device), augment)[0])
            run.step += 1
        synchronize(device)
        spent = time.perf_counter() - start
        memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        numbers = {
            "batch_seconds": seconds,
            "step_ms": round(1000 * spent / steps, 1),
            "audio_per_second": round(audio / spent),
            "filled": round(audio / steps / seconds, 3),
            "memory_gib": round(memory, 1),
            "shapes": f"{len(shapes)} of {len(LENGTHS)}",
            "loss": [round(losses_[i][0].item(), 3) for i in (0, -1)],
        }
        print(json.dumps(numbers), flush=True)
    if cuda:
        for _ in range(2):
            run.train_step(batch, augment)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run.train_step(batch, augment)
            synchronize(device)
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70))


if __name__ == "__main__":
    main()
