"""Makes speech on the device, a thousand times as fast as it is spoken, by voices that nobody has:

    python3 -m training.phonemes --texts LINES... --vocab VOCAB --out lines.jsonl.gz     # on a host with espeak-ng
    python3 -m training.kokoro_weights kokoro-v1.0.int8.onnx VOICES KOKORO
    python3 -m training.speak --lines lines.jsonl.gz --kokoro KOKORO --out PARTS --minutes 8

Each utterance has its own voice: a blend of up to three, drawn further from the average, whose melody may be another
blend's; its own length of the vocal tract, pitch, range of pitch, and a tempo that wanders. PARTS gets NAME.npy
(int16, 16 kHz, one utterance after the other) and then NAME.jsonl (`id`, `text`, `offset`, `size`), each under its
final name only when it is whole: train.py --grow reads them while they come.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from m3asr.ops import frame_mask
from training.data import GAP, interpolate
from training.data import RATE as TARGET
from training.kokoro import FRAME, RATE, STYLE, VOICED, Kokoro, spread

GROUP = 3072  # utterances among which those of equal length are looked for, and which a part holds


class Voices:
    """Styles by name, (256, 256): a row for each number of symbols; left half timbre, right half melody."""

    def __init__(self, path: Path):
        with np.load(path) as file:
            names = sorted(file.files)
            self.rows = np.stack([file[name] for name in names]).astype(np.float32)  # (voices, 256, 256)
        self.average = self.rows.mean(axis=0)
        self.groups = {
            "american": [i for i, name in enumerate(names) if name[0] == "a"],
            "british": [i for i, name in enumerate(names) if name[0] == "b"],
            "foreign": [i for i, name in enumerate(names) if name[0] not in "ab"],
        }

    def blend(self, rng: np.random.Generator, british: bool, symbols: int) -> np.ndarray:
        own = (0.15, 0.6, 0.25) if british else (0.65, 0.12, 0.23)
        count = rng.choice((1, 2, 3), p=(0.3, 0.4, 0.3))
        chosen = [rng.choice(self.groups[g]) for g in rng.choice(list(self.groups), size=count, p=own)]
        row = int(np.clip(symbols - 1 + rng.integers(-12, 13), 4, self.rows.shape[1] - 1))
        style = np.tensordot(rng.dirichlet(np.ones(count)), self.rows[chosen, row], 1)
        # The blend of several is closer to the average than anybody is.
        return self.average[row] + rng.uniform(0.95, 1.15 + 0.1 * count) * (style - self.average[row])

    def draw(self, rng: np.random.Generator, british: bool, symbols: int) -> np.ndarray:
        style = self.blend(rng, british, symbols)
        if rng.random() < 0.5:
            style[STYLE:] = self.blend(rng, british, symbols)[STYLE:]
        return style


@dataclass(frozen=True)
class Manner:
    """How the utterances of a batch are spoken, float32 (B, 1) each."""

    speed: Tensor
    tract: Tensor  # 1.1: formants 10 % higher
    pitch: Tensor  # factor, natural logarithm
    range: Tensor  # of the pitch's logarithm around its mean
    wander: Tensor  # of the pitch, natural logarithm
    rough: Tensor  # from one frame's pitch to the next, natural logarithm
    creak: Tensor  # part at the end whose pitch is halved
    whisper: Tensor  # 1: without any pitch
    local: Tensor  # of single durations, natural logarithm
    drift: Tensor  # of the tempo over some symbols, natural logarithm
    loudness: Tensor  # range
    pause: Tensor  # 2: pauses twice as long

    @staticmethod
    def draw(rng: np.random.Generator, count: int, device: torch.device) -> Manner:
        semitone = math.log(2) / 12

        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values.astype(np.float32)).unsqueeze(-1).to(device)

        return Manner(
            column(np.exp(rng.uniform(math.log(0.6), math.log(1.35), count))),
            column(np.exp(np.clip(rng.normal(0, 0.06, count), -0.15, 0.15))),
            column(np.clip(rng.normal(0, 2.5, count), -6, 6) * semitone),
            column(rng.uniform(0.5, 1.6, count)),
            column(rng.uniform(0, 1.2, count) * semitone),
            column(np.clip(rng.uniform(-0.02, 0.03, count), 0, None)),
            column(np.clip(rng.uniform(-1.6, 0.4, count), 0, None)),
            column(rng.random(count) < 0.02),
            column(rng.uniform(0, 0.22, count)),
            column(rng.uniform(0, 0.3, count)),
            column(rng.uniform(0.7, 1.3, count)),
            column(np.exp(np.clip(rng.uniform(-1.6, 1.4, count), 0, None))),
        )

    def pick(self, rows: list[int]) -> Manner:
        index = torch.tensor(rows, device=self.speed.device)
        return Manner(*(value[index] for value in self.__dict__.values()))


def smooth(rows: int, size: int, step: int, device: torch.device) -> Tensor:
    """Uniform noise of +-1 with a new value every `step`, straight lines between: (rows, size)."""
    knots = torch.rand(rows, 1, size // step + 2, device=device) * 2 - 1
    return torch.nn.functional.interpolate(knots, size=size, mode="linear", align_corners=True)[:, 0]


def whole_frames(frames: Tensor, inside: Tensor, pauses: Tensor, manner: Manner) -> Tensor:
    """Predicted frames (B, L) -> int64, at least 1 inside, rounded at random so that no tempo is lost."""
    frames = torch.where(pauses, frames * manner.pause, frames)
    change = manner.local * torch.randn_like(frames) + manner.drift * smooth(*frames.shape, 9, frames.device)
    frames = frames / manner.speed * manner.tract * change.exp()
    return (torch.floor(frames + torch.rand_like(frames)).clamp(min=1) * inside).long()


def melody(pitch: Tensor, manner: Manner) -> Tensor:
    """Pitch in Hz (B, T), at most VOICED where there is none -> moved, widened, wandering, rough, creaking, gone."""
    voiced = pitch > VOICED
    log = pitch.clamp(min=VOICED).log()
    count = voiced.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (log * voiced).sum(dim=1, keepdim=True) / count
    log = mean + (log - mean) * manner.range + manner.pitch + manner.wander * smooth(*pitch.shape, 30, pitch.device)
    log = log + manner.rough * torch.randn_like(log)
    # Where the sentence's end begins is counted in voiced frames: closing silence has none.
    spoken = voiced.cumsum(dim=1) / count
    log = log - math.log(2) * (spoken > 1 - manner.creak)
    moved = (log.exp() / manner.tract).clamp(40.0, 520.0)
    return torch.where(voiced, moved, pitch) * (1 - manner.whisper)


class Speaker:
    def __init__(
        self, kokoro: Kokoro, voices: Voices, pauses: list[int], device: torch.device, seed: int, batch_frames: int
    ):
        self.kokoro, self.voices, self.device, self.batch_frames = kokoro, voices, device, batch_frames
        self.pauses = torch.tensor(pauses, device=device)
        self.rng = np.random.default_rng(seed)

    @torch.inference_mode()
    def __call__(self, lines: list[dict]):
        """Lines (`tokens`, `british`) -> (index, int16 samples or None for what came out broken), in any order."""
        manner = Manner.draw(self.rng, len(lines), self.device)
        prepared = self.prepare(lines, manner)
        order = sorted(range(len(lines)), key=lambda i: prepared[i][2].sum())
        while order:
            longest = int(prepared[order[-1]][2].sum())
            take = max(1, self.batch_frames // longest)
            batch, order = order[-take:], order[:-take]
            samples = self.speak([prepared[i] for i in batch], manner.pick(batch))
            yield from zip(batch, samples, strict=True)

    def prepare(self, lines: list[dict], manner: Manner) -> list[tuple]:
        """-> (for the predictor (L, 640), for the decoder (L, 512), frames (L,) on the host, style (256,)) a line."""
        out: list = [None] * len(lines)
        order = sorted(range(len(lines)), key=lambda i: len(lines[i]["tokens"]))
        for start in range(0, len(order), 128):
            batch = order[start : start + 128]
            rows = [torch.tensor([0, *lines[i]["tokens"], 0]) for i in batch]
            lengths = torch.tensor([len(row) for row in rows])
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
            styles = [self.voices.draw(self.rng, lines[i]["british"], len(lines[i]["tokens"])) for i in batch]
            style = torch.from_numpy(np.stack(styles)).float().to(self.device)
            x, text, frames = self.kokoro.read_text(tokens, lengths, style)
            inside = frame_mask(lengths.to(self.device), tokens.shape[1])
            pauses = torch.isin(tokens, self.pauses)
            frames = whole_frames(frames, inside, pauses, manner.pick(batch)).cpu()
            for row, (i, size) in enumerate(zip(batch, lengths.tolist(), strict=True)):
                out[i] = x[row, :size], text[row, :size], frames[row, :size], style[row]
        return out

    def speak(self, rows: list[tuple], manner: Manner) -> list[np.ndarray | None]:
        """What `prepare` made of some lines -> int16 samples, None for what came out broken."""
        pad = torch.nn.utils.rnn.pad_sequence
        x, text = (pad([row[k] for row in rows], batch_first=True) for k in (0, 1))
        frames = pad([row[2] for row in rows], batch_first=True)
        spoken = frames.sum(dim=1)
        total = -(-int(spoken.max()) // 8) * 8  # few different lengths, so that memory is reused
        last = torch.tensor([len(row[2]) - 1 for row in rows])
        frames[torch.arange(len(rows)), last] += total - spoken  # the closing silence fills the row
        frames, style = frames.to(self.device), torch.stack([row[3] for row in rows])
        pitch, loudness = self.kokoro.predictor.curves(spread(x, frames, total), style[:, STYLE:])
        middle = loudness.mean(dim=1, keepdim=True)
        loudness = middle + (loudness - middle) * manner.loudness
        text = spread(text, frames, total).transpose(1, 2)
        wave = self.kokoro.decoder(text, melody(pitch, manner), loudness, style[:, :STYLE])
        ends = (spoken * FRAME).to(self.device).unsqueeze(-1)  # the silence that was added is left out
        wave = wave.masked_fill(torch.arange(wave.shape[1], device=self.device) >= ends, 0.0)
        return self.finish(wave, manner)

    def finish(self, wave: Tensor, manner: Manner) -> list[np.ndarray | None]:
        """24 kHz -> int16 at 16 kHz, played at the tract's speed; 0.06 to 0.25 s of silence around, peak 0.5."""
        step = manner.tract * (RATE / TARGET)
        wave = interpolate(wave, step, int(wave.shape[1] / float(step.min())) + 1, cut=0.63, taps=24)
        peak = wave.abs().amax(dim=1, keepdim=True)
        loud = wave.abs() > 0.015 * peak
        place = torch.arange(wave.shape[1], device=wave.device)
        first = torch.where(loud, place, wave.shape[1]).amin(dim=1)
        final = torch.where(loud, place, -1).amax(dim=1)
        margin = torch.from_numpy(self.rng.uniform(0.06, 0.25, (2, len(wave))) * TARGET).long().to(wave.device)
        begin = (first - margin[0]).clamp(min=0).cpu().tolist()
        end = (final + margin[1]).clamp(max=wave.shape[1]).cpu().tolist()
        good = (wave.isfinite().all(dim=1) & (peak[:, 0] > 0.02) & (final > first)).cpu().tolist()
        samples = (
            (wave * (16384 / peak.clamp(min=1e-6))).round().clamp(-32768, 32767).nan_to_num().short().cpu().numpy()
        )
        return [row[b:e] if ok else None for row, b, e, ok in zip(samples, begin, end, good, strict=True)]


def write_part(folder: Path, name: str, lines: list[dict], spoken: list[tuple[int, np.ndarray]], first: int) -> float:
    """One part; -> its hours."""
    gap, offset, chunks, entries = np.zeros(GAP, np.int16), 0, [], []
    for index, samples in spoken:
        entry = {"id": f"k{first + index:07d}", "text": lines[index]["text"], "offset": offset, "size": len(samples)}
        entries.append(entry)
        chunks += [samples, gap]
        offset += len(samples) + len(gap)
    flat = np.concatenate(chunks)
    with (folder / f"{name}.part").open("wb") as file:
        np.save(file, flat)
    os.replace(folder / f"{name}.part", folder / f"{name}.npy")
    (folder / f"{name}.part").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    os.replace(folder / f"{name}.part", folder / f"{name}.jsonl")
    return len(flat) / TARGET / 3600


def read_lines(path: Path, vocab: dict[str, int]) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    for line in lines:
        line["tokens"] = [vocab[s] for s in line["symbols"]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=Path, required=True, help="what phonemes.py wrote")
    parser.add_argument("--kokoro", type=Path, required=True, help="what kokoro_weights.py wrote, and vocab.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("K", "N"), help="the Kth of N shares")
    parser.add_argument("--minutes", type=float, default=1e9, help="no new part is begun after these")
    parser.add_argument("--seed", type=int, default=0, help="other voices for the same lines; apart by N at least")
    parser.add_argument("--batch-frames", type=int, default=24000, help="of 25 ms")
    parser.add_argument("--group", type=int, default=GROUP, help="utterances a part")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    started, device = time.monotonic(), torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    vocab = json.loads((args.kokoro / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    lines = read_lines(args.lines, vocab)
    pauses = [vocab[s] for s in ",;:—…" if s in vocab]
    seed = args.seed + args.part[0]
    torch.manual_seed(seed)
    kokoro = Kokoro.read(args.kokoro, device, device.type == "cuda")
    speaker = Speaker(kokoro, Voices(args.kokoro / "voices.npz"), pauses, device, seed, args.batch_frames)
    hours, broken, begun = 0.0, 0, time.monotonic()
    for first in track(range(args.part[0] * args.group, len(lines), args.part[1] * args.group), "parts"):
        if time.monotonic() - started > 60 * args.minutes:
            break
        group = lines[first : first + args.group]
        spoken = [(i, samples) for i, samples in speaker(group) if samples is not None]
        broken += len(group) - len(spoken)
        hours += write_part(args.out, f"{first // args.group:05d}", group, spoken, first)
        speed = 3600 * hours / (time.monotonic() - begun)
        print(
            f"{time.monotonic() - started:.0f} s: {hours:.1f} h, {speed:.0f} x real time, {broken} broken", flush=True
        )


if __name__ == "__main__":
    main()
