"""Greedy word error rate while training, on several sets. The final numbers are made by the package itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from m3asr import ops
from m3asr.engines.torch_fbank import fbank, frame_count
from m3asr.model import Model
from training.augment import Augment, AugmentConfig
from training.data import Speech, plain_batches, read_audio

CHUNK = 16  # frames of 40 ms, for streaming models


def collapse(best: list[int]) -> list[int]:
    """A path of tokens a frame -> its tokens: repeats once, blanks (0) not at all."""
    return [token for i, token in enumerate(best) if token != 0 and (i == 0 or token != best[i - 1])]


def word_errors(reference: list[str], hypothesis: list[str]) -> int:
    """Edit distance in words."""
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, heard in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != heard))
    return row[-1]


@torch.inference_mode()
def greedy_wer(model: Model, batches: list, front_end: Callable, units, show: int = 0, chunk: int = 0) -> float:
    """Word error rate in per cent. front_end(batch) -> features (B, T, F) after CMVN, lengths int32 (B,)."""
    errors = words = 0
    model.eval()
    for batch in batches:
        features, lengths = front_end(batch)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=features.device.type == "cuda"):
            log_probs, _, out_lengths = model(features, lengths, chunk)
        best: Tensor = log_probs.argmax(dim=-1).masked_fill(~ops.frame_mask(out_lengths, log_probs.shape[1]), 0)
        for path, text in zip(best.tolist(), batch.texts, strict=True):
            hypothesis = units.decode(collapse(path))
            if show > 0:
                show -= 1
                print(f"    ref {text}\n    hyp {hypothesis}", flush=True)
            errors += word_errors(text.split(), hypothesis.split())
            words += len(text.split())
    return 100.0 * errors / max(words, 1)


class Evaluation:
    """Development sets of a run: as it is, through a fixed augmentation, and people if given."""

    def __init__(self, run):
        self.run = run
        seconds = min(400.0, run.args.batch_seconds)
        batches = plain_batches(run.development, run.units, seconds)
        self.sets = {"dev": (run.speech, batches, False)}
        if not run.args.no_augment:
            self.sets["dev_augmented"] = (run.speech, batches, True)
        if run.args.human:
            flat, people = read_audio(run.args.human)
            self.sets["human"] = (Speech(flat, run.device), plain_batches(people, run.units, seconds), False)

    def __call__(self, model: Model, show: int = 0) -> dict[str, float]:
        run, results = self.run, {}
        for name, (speech, batches, augmented) in self.sets.items():
            augment = Augment(AugmentConfig(), run.device, 7) if augmented else None

            def front_end(batch, speech=speech, augment=augment):
                # Masking features is a hardship of training only.
                batch = batch.to(run.device)
                if augment is None:
                    return run.front_end(batch, speech, None)
                waveform = augment(batch.render(speech), batch.lengths)
                features = fbank(waveform * 32768.0, run.front_end.filters, run.front_end.config)
                lengths = frame_count(batch.lengths, run.front_end.config).int()
                return (features - run.front_end.mean) * run.front_end.istd, lengths

            results[name] = round(greedy_wer(model, batches, front_end, run.units, show if not augmented else 0), 2)
            if run.config.encoder.use_dynamic_chunk and not augmented:
                results[f"{name}_chunks"] = round(greedy_wer(model, batches, front_end, run.units, chunk=CHUNK), 2)
        return results
