"""Greedy CTC decoding and word error rate while training. The final numbers are made by the package itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from m3asr import ops
from m3asr.model import Model


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
