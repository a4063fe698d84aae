"""Train a compact 3M-ASR for a given number of minutes: `python3 -m training.train --help`.

The clock drives everything: learning rate, the change from dense to experts, the end. A run therefore always finishes
its schedule, however fast the device is.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from m3asr.config import ModelConfig
from m3asr.model import Model
from training import blocks, losses, moe
from training.arguments import arguments
from training.augment import Augment, AugmentConfig, read_rooms
from training.captured import Captured
from training.data import (
    Batch,
    Parts,
    Planner,
    Speech,
    Texts,
    Units,
    decode,
    read_manifest,
    split,
)
from training.evaluate import Evaluation
from training.front_end import FrontEnd
from training.kernels.random import Seed
from training.network import SIZES, read_folder, write_folder
from training.ngram import read_sentences
from training.optimizer import Optimizer
from training.ranks import Ranks


class Run:
    """One training run: everything that a checkpoint holds, and the clock."""

    def __init__(self, args):
        self.args, self.ranks = args, Ranks(args.device)
        self.device, rank = self.ranks.device, self.ranks.rank
        self.started = time.monotonic()
        self.before = 0.0  # seconds of the runs that this one resumes
        self.setup: float | None = None  # seconds until the first step was done, in which kernels are compiled
        self.now = 0.0  # progress, as all processes have agreed on it
        self.step, self.routed, self.clean, self.aligned = 0, False, not args.init, False
        torch.manual_seed(args.seed)
        args.out.mkdir(parents=True, exist_ok=True)
        saved = torch.load(args.out / "checkpoint.pt", map_location="cpu", weights_only=True) if args.resume else None

        lines, development = split(read_manifest(args.speech)[: args.limit], args.dev)
        held_out = {line["text"] for line in development}
        also = [line for line in (read_manifest(args.also) if args.also else []) if line["text"] not in held_out]
        mine = self.ranks.share(lines + also)
        flat, utterances = decode(mine + development, args.processes)
        self.training, self.development = utterances[: len(mine)], utterances[len(mine) :]
        self.say(f"decoded {sum(u.size for u in utterances) / 57.6e6:.2f} h, {len(utterances)} utterances")
        start = mean = istd = None
        if saved is not None:
            bpe, mean, istd = saved["bpe"], saved["mean"], saved["istd"]
        elif args.init:
            start, bpe, mean, istd = read_folder(args.init)
        else:
            bpe = Units.train([line["text"] for line in lines + also], args.vocab).model
        self.units = Units(bpe)
        self.texts = None
        if args.texts:
            spare = [line for _, line in read_sentences(args.texts) if line not in held_out]
            self.texts = Texts(spare, self.units, self.device, args.seed + rank)
            self.say(f"{len(self.texts.lengths)} lines of text")
        self.speech = Speech(flat, self.device, int(args.grow_hours * 57.6e6) if args.grow else 0)
        self.say(f"{self.speech.samples.numel() * 2 / 1e9:.1f} GB of samples")
        self.parts, self.held_out = Parts(args.grow, rank, self.ranks.size) if args.grow else None, held_out

        rooms = read_rooms(args.rooms, self.device) if args.rooms else None
        self.augment_config = AugmentConfig(
            tempo=args.tempo, smear=args.smear, masking=args.masking, echo=args.echo, expand=args.expand
        )
        self.make_augment = lambda seed: (
            None if args.no_augment else Augment(self.augment_config, self.device, seed, rooms)
        )
        if saved is not None:
            config = ModelConfig.from_dict(json.loads(saved["config"]))
        elif start is not None:
            config = start.config
        else:
            config = SIZES[args.size](len(self.units.symbols), args.dropout, args.streaming)
        self.front_end = FrontEnd(config.fbank, self.device)
        if mean is not None:
            self.front_end.mean, self.front_end.istd = mean.to(self.device), istd.to(self.device)
        else:
            planner = Planner(
                self.training, self.units, min(args.batch_seconds, 400.0), args.seed + 1, speeds=args.speeds
            )
            self.front_end.measure(planner.batches(False), 40, self.speech, self.make_augment(args.seed + 1))
            self.ranks.same([self.front_end.mean, self.front_end.istd])
            self.say("CMVN measured")

        # Flash attention, whose plans need nothing at capture time that a launched step has not made.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.model, self.average = Model(config), Model(config)
        moe.start_routers(self.model)
        if start is not None:
            self.model.load_state_dict(start.state_dict())
            self.routed = True
        self.average.load_state_dict(self.model.state_dict())
        for model in (self.model, self.average):
            model.to(self.device).to(memory_format=torch.channels_last)
        self.average.requires_grad_(False)
        self.routings = [moe.install(self.model), moe.install(self.average)]
        # 64 apart, for after a thousand steps a seed gives what the next one began with.
        self.dropout_seed = Seed(self.device, args.seed + 64 * rank)
        blocks.install(self.model, self.dropout_seed)  # not the average: what is evaluated is the model's own forward
        self.optimizer = Optimizer(self.model, args.weight_decay, args.optimizer == "muon")
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.before, self.routed = saved["step"], saved["elapsed"], saved["routed"]
            self.setup = saved["setup"]
            self.clean = saved["clean"]
        self.config = config
        self.weights = losses.LossWeights(
            sparsity=args.sparsity,
            importance=args.importance,
            embedding_ctc=args.embedding_ctc,
            text=args.text,
            consistency=args.consistency,
        )
        self.lag = torch.ones((), device=self.device)  # 1 - the decay of the averaged weights
        self.captured, self.captured_update = Captured(self.gradients, self.device), Captured(self.update, self.device)
        self.alike()
        self.views = 1  # args.views once there is augmentation

    def say(self, text: str) -> None:
        if self.ranks.first:
            print(f"[{self.elapsed():7.1f} s] {text}", flush=True)

    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.started

    def alike(self) -> None:
        """The first process's model, in all of them: they step alike, and this is where rounding may not add up."""
        self.ranks.same([x for model in (self.model, self.average) for x in model.state_dict().values()])

    def meet(self, over: bool, evaluate: bool) -> tuple[bool, bool]:
        """What the first process decides, by its clock and losses, for the step that all of them take next."""
        clean = self.clean and not self.aligned
        self.now, clean, over, evaluate = self.ranks.agree(self.progress(), clean, over, evaluate)
        self.clean = bool(clean)
        return bool(over) or self.now >= 1.0, bool(evaluate)

    def progress(self) -> float:
        """Part of the time for steps that has passed: 0 until the first is done; the end keeps 20 s (or a tenth) for
        the last evaluation and the export."""
        if self.setup is None:
            return 0.0
        total = self.args.minutes * 60
        left = total - min(20.0, 0.1 * total) - self.setup
        return min(1.0, (self.elapsed() - self.setup) / left) if left > 0 else 1.0

    def set_schedule(self) -> float:
        """Learning rate, averaging, and how the experts are used, for the time it is; -> learning rate."""
        args, progress = self.args, self.now
        fallen = args.final_lr + (1.0 - args.final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
        lr = args.lr * min(1.0, (self.step + 1) / args.warmup) * fallen
        if not self.routed and progress >= args.dense_fraction:
            if args.dense_fraction > 0:
                moe.copy_first_expert(self.model, self.optimizer)
                moe.copy_first_expert(self.average)
                self.say(f"step {self.step}: experts start as copies of the dense feed-forward")
            self.routed = True
            self.captured.clear()
        fade = args.blend_fraction if args.dense_fraction > 0 and not args.init else 0.0
        for routing in self.routings:
            routing.dense = not self.routed
            routing.blend.fill_(min(1.0, (progress - args.dense_fraction) / fade) if fade > 0 else 1.0)
        self.optimizer.lr.fill_(lr)
        self.lag.fill_(1.0 - min(args.ema, (1 + self.step) / (10 + self.step)))
        return lr

    def batches(self, pin: bool) -> Iterator[tuple[Batch, Augment | None]]:
        """Endless (batch, its augmentation). Alignment is found on clean speech first: augmented from the first step,
        CTC stays where every frame is blank (measured; README.md, Runs)."""
        args, seed = self.args, self.args.seed + self.step + 1000003 * self.ranks.rank
        sources = self.training, self.units
        if self.clean:
            planner = Planner(*sources, min(args.batch_seconds, 400.0), seed + 3, joined=0.0)
            for batch in planner.prefetched(16, pin):
                if not self.clean or self.now >= args.clean_fraction:
                    break
                yield batch, None
            self.clean = False
            self.say(f"step {self.step}: augmented from here on")
        augment = self.make_augment(seed + 2)
        if augment is not None and args.views > 1:
            self.views = args.views
            self.captured.clear()
        seconds = args.batch_seconds / self.views
        for batch in Planner(*sources, seconds, seed, args.joined, args.speeds).prefetched(16, pin):
            yield batch, augment

    def grow(self) -> None:
        """Take what was spoken since the last look; it is heard from the next epoch on."""
        if self.parts is None:
            return
        for flat, utterances in self.parts.new():
            first = self.speech.add(flat)
            if first is None:
                self.say(f"no room for more: {self.speech.size / 57.6e6:.1f} h, {len(self.training)} utterances")
                self.parts = None
                return
            self.training += [replace(u, offset=u.offset + first) for u in utterances if u.text not in self.held_out]

    def train_step(self, batch: Batch, augment: Augment | None) -> Sequence[Tensor]:
        """-> parts of the loss, entropies, gradient norm; nothing of it is waited for."""
        features, lengths = self.front_end(batch, self.speech, augment, self.views)
        text = self.texts.draw() if self.texts else ()
        tokens, token_lengths = batch.tokens.repeat(self.views, 1), batch.token_lengths.repeat(self.views)
        parts, entropies = self.captured(features, lengths, tokens, token_lengths, self.chunk(), *text)
        self.ranks.average(self.optimizer.gradients)
        (norm,) = self.captured_update()
        return parts, entropies, norm

    def chunk(self) -> Tensor:
        """Frames that attention takes at a time, () on the device: all of them, or in half of a streaming model's steps
        1 to 25 (specification 3.4)."""
        draw = int(torch.randint(50, ())) if self.config.encoder.use_dynamic_chunk else 50
        return torch.full((), 0 if draw >= 25 else draw + 1, device=self.device)  # waits for nothing, unlike a copy

    def gradients(self, features, lengths, tokens, token_lengths, chunk: Tensor, *text: Tensor):
        """Everything of a step between the features and the gradients of this process's batch."""
        self.dropout_seed.advance()
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            batch = features, lengths, tokens, token_lengths
            loss, parts, entropies = losses.batch_loss(
                self.model, self.routings[0], *batch, self.weights, text or None, chunk, self.views
            )
        loss.backward()
        return parts, entropies

    def update(self):
        """The rest of a step. -> the gradient's norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        # A batch with a broken gradient is left out, on the device.
        self.optimizer.step(torch.isfinite(norm))
        averages = list(self.average.parameters())
        behind = torch._foreach_sub([p.detach() for p in self.model.parameters()], averages)
        torch._foreach_mul_(behind, self.lag)
        torch._foreach_add_(averages, behind)
        return [norm.detach()]

    def save(self) -> None:
        """The checkpoint to resume from, and the averaged weights as a model folder."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed(),
            "setup": self.setup,
            "routed": self.routed,
            "clean": self.clean,
            "config": self.config.to_json(),
            "bpe": self.units.model,
            "mean": self.front_end.mean.cpu(),
            "istd": self.front_end.istd.cpu(),
        }
        torch.save(state, self.args.out / "checkpoint.part")
        os.replace(self.args.out / "checkpoint.part", self.args.out / "checkpoint.pt")
        self.export()

    def export(self) -> int:
        mean, istd = self.front_end.mean.cpu(), self.front_end.istd.cpu()
        folder, state = self.args.out / "model", self.average.state_dict()
        return write_folder(folder, self.config, state, self.units, mean, istd, bits=self.args.bits)


def main() -> None:
    args = arguments(__doc__)
    run = Run(args)
    stop = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.append(True))
    run.grow()  # what is there already is heard from the first step on
    first = run.ranks.first
    evaluation = Evaluation(run) if first else None
    parameters = sum(p.numel() for p in run.model.parameters())
    run.say(f"{parameters / 1e6:.2f} million parameters; {len(run.training)} training, {len(run.development)} dev")
    if run.ranks.size > 1:
        run.say(f"{run.ranks.size} processes: each has its share of the speech and batches of its own")
    log = (args.out / "log.jsonl").open("a", encoding="utf-8") if first else None
    if first:
        values = {**vars(args), "ranks": run.ranks.size, "weights": asdict(run.weights)}
        values["augment"] = asdict(run.augment_config)
        (args.out / "run.json").write_text(json.dumps(values, default=str, indent=1))

    def write(**values) -> None:
        if log is not None:
            log.write(json.dumps({"step": run.step, "elapsed": round(run.elapsed(), 1), **values}) + "\n")
            log.flush()

    def evaluate_and_keep() -> None:
        wer = evaluation(run.average)
        run.model.train()
        run.save()
        # The last is the best for the voices that it learnt from, and need not be for others.
        shutil.copytree(args.out / "model", args.out / f"model-{run.step}", dirs_exist_ok=True)
        write(wer=wer)
        run.say(f"step {run.step} WER {wer}")

    cuda = run.device.type == "cuda"
    run.model.train()
    seconds, window, mark, next_eval = 0.0, [], time.monotonic(), run.elapsed() + args.eval_seconds
    for batch, augment in run.batches(cuda):
        over, evaluate = run.meet(bool(stop), run.elapsed() >= next_eval)
        if over:
            break
        if evaluate:
            run.alike()
            if first:
                evaluate_and_keep()
            next_eval = run.elapsed() + args.eval_seconds
            seconds, window, mark = 0.0, [], time.monotonic()
        lr = run.set_schedule()
        window.append(run.train_step(batch.to(run.device), augment))
        run.step += 1
        if run.setup is None:
            run.setup = run.elapsed()
            run.say("first step done: the schedule's clock starts")
        seconds += float(batch.host_lengths.sum()) / 16000
        if run.step % args.log_steps == 0:
            parts = torch.stack([w[0] for w in window]).mean(dim=0).tolist()  # waits for the device
            entropy = [round(x, 3) for x in window[-1][1].tolist()]
            norms = torch.stack([w[2] for w in window])
            spent, finite = time.monotonic() - mark, norms.isfinite()
            values = {name: round(value, 4) for name, value in zip(losses.NAMES, parts, strict=True)}
            values |= {
                "lr": lr,
                "grad_norm": round(norms[finite].mean().item(), 3) if finite.any() else None,
                "skipped": int((~finite).sum()),
                "load_entropy": entropy,
                "blend": round(run.routings[0].blend.item(), 3) if run.routed else None,
                "step_ms": round(1000 * spent / len(window), 1),
                "audio_per_second": round(run.ranks.size * seconds / spent),  # the others' shares are like this one
                "hours": round(run.ranks.size * run.speech.size / 57.6e6, 1),
                "gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if cuda else None,
            }
            write(**values)
            run.aligned = values["ctc"] <= args.clean_until
            shown = " ".join(f"{name} {values[name]:.3f}" for name in losses.NAMES)
            run.say(
                f"step {run.step} {shown} lr {lr:.2e} {values['step_ms']} ms {values['audio_per_second']} x real time"
            )
            run.grow()
            seconds, window, mark = 0.0, [], time.monotonic()
    run.set_schedule()
    run.ranks.leave()
    if not first:
        return
    wer = evaluation(run.average, show=5)
    run.save()
    write(wer=wer, final=True)
    run.say(f"step {run.step} final WER {wer}")
    size = run.export()
    if run.routed:
        # The model that users get: weights as they are stored, the package's own forward, nothing of this folder in it.
        shipped = read_folder(args.out / "model")[0].to(run.device)
        wer = evaluation(shipped)
        write(wer=wer, exported=True)
        run.say(f"exported model: {size / 1e6:.1f} MB, WER {wer}")


if __name__ == "__main__":
    main()
