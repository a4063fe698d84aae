"""Packed speech -> batches on the device: decoding, text units, and which utterances go together.

A batch's waveform never exists on the host: the host plans (which utterance, from which sample on, at which speed) and
the device gathers the samples. Nothing here knows features or models.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import math
import mmap
import multiprocessing
import queue
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

RATE = 16000
BLANK, UNK = 0, 1
# Batches have few distinct lengths, so that memory is reused and plans (FFT, convolution) are made once for each.
LENGTHS = [int(s * RATE) for s in (1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7.5, 9, 11, 14, 18, 22)]
SILENCE, MAX_SECONDS = 0.6, 21.0
GAP = 32  # zeros between neighbours, more than a resampling filter reaches


@dataclass(frozen=True)
class Utterance:
    id: str
    text: str
    offset: int  # first sample in the flat array
    size: int  # samples
    repeat: int = 1  # how often it comes in an epoch of training


def read_manifest(folders: list[Path]) -> list[dict]:
    """The lines of every *.jsonl.gz whose shard lies in one of the folders, with the shard's path.

    Raises SystemExit if there is none, and for two shards or two utterances of one name: one would be lost.
    """
    shards: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.zip")):
            if shards.setdefault(path.name, path) != path:
                raise SystemExit(f"{path} has the name of {shards[path.name]}: expected another")
    lines: dict[str, dict] = {}
    for folder in folders:
        for manifest in sorted(folder.glob("*.jsonl.gz")):
            with gzip.open(manifest, "rt", encoding="utf-8") as file:
                for line in map(json.loads, file):
                    if line["shard"] in shards:
                        line["path"] = shards[line["shard"]]
                        if lines.setdefault(line["id"], line) != line:
                            raise SystemExit(f"{manifest}: {line['id']} stands for another utterance before")
    if not lines:
        raise SystemExit(f"no utterance found: {', '.join(map(str, folders))} need *.zip shards and a *.jsonl.gz")
    return [lines[key] for key in sorted(lines)]


def _decode_shard(task) -> list[tuple[int, int]]:
    import soundfile

    path, slots = task
    flat = np.frombuffer(_decode_shard.memory, dtype=np.int16)
    sizes = []
    with zipfile.ZipFile(path) as archive:
        for index, name, offset, room in slots:
            samples, rate = soundfile.read(io.BytesIO(archive.read(f"{name}.opus")), dtype="int16")
            if rate != RATE:
                raise ValueError(f"{path.name}:{name} has {rate} Hz, expected {RATE}")
            size = min(len(samples), room)
            flat[offset : offset + size] = samples[:size]
            sizes.append((index, size))
    return sizes


def decode(lines: list[dict], processes: int) -> tuple[np.ndarray, list[Utterance]]:
    """Ogg Opus -> one flat int16 array (shared between the processes, never copied) and where each utterance lies."""
    offsets, total = [], 0
    for line in lines:
        offsets.append(total)
        total += int(line["seconds"] * RATE) + 64 + GAP
    _decode_shard.memory = mmap.mmap(-1, 2 * total)  # anonymous and shared: the forked processes write into it
    tasks: dict[tuple, list] = {}
    for i, (line, offset) in enumerate(zip(lines, offsets, strict=True)):
        room = int(line["seconds"] * RATE) + 64
        tasks.setdefault((line["path"], i % 4), []).append((i, line["id"], offset, room))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        done = pool.map(_decode_shard, [(path, slots) for (path, _), slots in tasks.items()], chunksize=1)
    sizes = dict(pair for shard in done for pair in shard)
    utterances = [Utterance(x["id"], x["text"], offsets[i], sizes[i], x.get("repeat", 1)) for i, x in enumerate(lines)]
    return np.frombuffer(_decode_shard.memory, dtype=np.int16), utterances


def split(lines: list[dict], count: int) -> tuple[list[dict], list[dict]]:
    """(training, development): `count` lines by a fixed seed, and no development text in training."""
    picked = set(np.random.default_rng(20220408).permutation(len(lines))[:count].tolist())
    development = [line for i, line in enumerate(lines) if i in picked]
    texts = {line["text"] for line in development}
    return [line for i, line in enumerate(lines) if i not in picked and line["text"] not in texts], development


class Parts:
    """A folder that speak.py is filling: NUMBER.npy and then NUMBER.jsonl for each part. Of `ranks` processes this one
    takes every part whose number falls to its `rank`."""

    def __init__(self, folder: Path, rank: int = 0, ranks: int = 1):
        self.folder, self.rank, self.ranks, self.seen = folder, rank, ranks, set()

    def new(self):
        """(samples int16, [Utterance] with offsets into them) for each part that was not there before."""
        for manifest in sorted(self.folder.glob("*.jsonl")):
            if manifest not in self.seen and int(manifest.stem) % self.ranks == self.rank:
                self.seen.add(manifest)
                lines = map(json.loads, manifest.read_text(encoding="utf-8").splitlines())
                utterances = [Utterance(x["id"], x["text"], x["offset"], x["size"]) for x in lines]
                yield np.load(manifest.with_suffix(".npy")), utterances


class Units:
    """Text <-> tokens: <blank> 0, <unk> 1, byte pair pieces, <sos/eos> last (the 3M-ASR convention)."""

    def __init__(self, model: bytes):
        import sentencepiece

        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        symbols = [self.pieces.id_to_piece(i) for i in range(1, self.pieces.get_piece_size())]
        self.symbols = ["<blank>", "<unk>", *symbols, "<sos/eos>"]
        self.sos = len(self.symbols) - 1

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> Units:
        import sentencepiece

        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab_size - 2,  # the model's own <unk> is one of ours; <blank> and <sos/eos> are not its
            character_coverage=1.0,
            normalization_rule_name="identity",
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
        return cls(out.getvalue())

    def encode(self, text: str) -> list[int]:
        return [i + 1 for i in self.pieces.encode(text)]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.symbols[i] for i in tokens if i != self.sos).replace("▁", " ").strip()

    def lines(self) -> str:
        return "".join(f"{symbol} {i}\n" for i, symbol in enumerate(self.symbols))


class Texts:
    """Lines that nobody spoke, as tokens on the device, drawn there."""

    def __init__(self, lines: list[str], units: Units, device: torch.device, seed: int, rows=192, labels=48):
        encoded = [tokens for tokens in map(units.encode, lines) if 0 < len(tokens) <= labels]
        self.tokens = torch.zeros(len(encoded), labels, dtype=torch.int16)
        for row, tokens in zip(self.tokens, encoded, strict=True):
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int16)
        self.tokens = self.tokens.to(device)
        self.lengths = torch.tensor([len(tokens) for tokens in encoded], device=device)
        self.rows, self.generator = rows, torch.Generator(device).manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """tokens int64 (rows, labels), their lengths int64 (rows,)."""
        size, device = (self.rows,), self.lengths.device
        pick = torch.randint(len(self.lengths), size, generator=self.generator, device=device)
        return self.tokens[pick].long(), self.lengths[pick]


def sinc_table(taps: int, cut: float, phases: int = 512) -> Tensor:
    """Weights of a Hann-windowed sinc between two samples: (phases, taps); `cut` of the Nyquist frequency."""
    distance = torch.arange(phases, dtype=torch.float64).unsqueeze(1) / phases
    distance = distance - torch.arange(1 - taps // 2, taps // 2 + 1)
    weights = torch.sinc(cut * distance) * torch.cos(distance * (math.pi / (taps + 2))).square()
    return (weights / weights.sum(dim=1, keepdim=True)).float()  # no ripple on a constant


def between(flat: Tensor, place: Tensor, table: Tensor) -> Tensor:
    """The signal at places (float64, samples), whole or not -> float32; past its ends it goes on as it ends."""
    phases, taps = table.shape
    base = place.floor()
    phase = ((place - base) * phases).long().clamp(max=phases - 1)
    base, columns = base.long(), table.t().contiguous()
    value = torch.zeros(place.shape, device=flat.device)
    for tap in range(taps):
        index = (base + (tap + 1 - taps // 2)).clamp(0, flat.numel() - 1)
        value += columns[tap][phase] * flat[index]
    return value


def interpolate(rows: Tensor, step: Tensor, size: int, cut: float, taps: int) -> Tensor:
    """Rows (B, N) read every `step` (B, 1) samples -> (B, size), 0 past a row's end."""
    count = rows.shape[1]
    padded = torch.nn.functional.pad(rows, (taps, taps))
    place = torch.arange(size, device=rows.device) * step.double()
    inside = place < count
    first = torch.arange(len(rows), device=rows.device).unsqueeze(1) * padded.shape[1] + taps
    value = between(padded.flatten(), first + place.clamp(max=count), sinc_table(taps, cut).to(rows.device))
    return value * inside


class Speech:
    """All samples on the device, with `room` for more; `render` cuts a batch out of them, at any speed."""

    def __init__(self, flat: np.ndarray, device: torch.device, room: int = 0):
        self.samples = torch.zeros(len(flat) + room, dtype=torch.int16, device=device)
        self.size = 0
        self.table = sinc_table(10, 0.97).to(device)
        self.add(flat)

    def add(self, flat: np.ndarray) -> int | None:
        """-> where it starts, None if there is no room for it."""
        first, end = self.size, self.size + len(flat)
        if end > len(self.samples):
            return None
        self.samples[first:end] = torch.from_numpy(flat).to(self.samples.device)
        self.size = end
        return first

    def render(self, starts: Tensor, sources: Tensor, sizes: Tensor, speeds: Tensor | None, samples: int) -> Tensor:
        """Pieces laid into rows: piece k of row b begins at starts[b, k] (ascending), is sizes[b, k] long there, and is
        played speeds[b, k] times as fast (pitch moves too, as on tape; None: as it is) -> float32 (B, samples), +-1."""
        time = torch.arange(samples, device=self.samples.device).expand(len(starts), -1).contiguous()  # (B, N)
        piece = (torch.searchsorted(starts, time, right=True) - 1).clamp(min=0)
        inside = time - starts.gather(1, piece)
        valid = (inside >= 0) & (inside < sizes.gather(1, piece))
        source = sources.gather(1, piece)
        if speeds is None:
            value = self.samples[torch.where(valid, source + inside, 0)].float()
        else:
            place = source + inside * speeds.gather(1, piece)  # float64
            value = between(self.samples, torch.where(valid, place, 0.0), self.table)
        return value.mul_(1 / 32768).masked_fill_(~valid, 0.0)


@dataclass
class Batch:
    """Where the samples come from, and the targets. Tensors on the device, except the `host_` lengths."""

    starts: Tensor  # int64 (B, K)
    sources: Tensor  # int64 (B, K)
    sizes: Tensor  # int64 (B, K)
    speeds: Tensor | None  # float64 (B, K); None: all 1
    lengths: Tensor  # int64 (B,) samples
    tokens: Tensor  # int64 (B, L), padded with 0
    token_lengths: Tensor  # int64 (B,)
    host_lengths: Tensor
    samples: int  # padded length
    texts: list[str]

    def to(self, device: torch.device) -> Batch:
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in self.__dict__.items()
            if isinstance(value, Tensor) and name != "host_lengths"
        }
        return Batch(**{**self.__dict__, **moved})

    def render(self, speech: Speech) -> Tensor:
        return speech.render(self.starts, self.sources, self.sizes, self.speeds, self.samples)


def label_capacity(samples: int) -> int:
    """Tokens for which there is room in a training batch of this length: 9.5 a second and 6, which one utterance in a
    thousand exceeds."""
    return -(-int(9.5 * samples / RATE + 6) // 8) * 8


def collate(rows: list, samples: int, pin: bool, labels: int | None = None) -> Batch:
    """rows: (pieces [(start, source, size, speed)], length, tokens, text); labels: width of the tokens, if not the
    longest."""
    width = max(len(row[0]) for row in rows)
    pieces = np.zeros((4, len(rows), width), dtype=np.float64)  # whole numbers are exact far beyond any set's size
    pieces[0] = 1 << 40  # an absent piece never begins
    labels = labels or -(-max(len(row[2]) for row in rows) // 8) * 8
    tokens = np.zeros((len(rows), labels), dtype=np.int64)
    for b, row in enumerate(rows):
        pieces[:, b, : len(row[0])] = np.array(row[0]).T
        tokens[b, : len(row[2])] = row[2]
    lengths = torch.tensor([row[1] for row in rows])
    token_lengths = torch.tensor([len(row[2]) for row in rows])
    starts, sources, sizes = (torch.from_numpy(x.astype(np.int64)) for x in pieces[:3])
    speeds = torch.from_numpy(pieces[3].copy()) if (pieces[3][pieces[2] > 0] != 1.0).any() else None
    moved = [starts, sources, sizes, speeds, lengths, torch.from_numpy(tokens), token_lengths]
    if pin:
        moved = [x.pin_memory() if x is not None else None for x in moved]
    return Batch(*moved, lengths, samples, [row[3] for row in rows])


class Planner:
    """An endless stream of batches: utterances alone or joined by silence, sorted into lengths as they come."""

    def __init__(self, utterances, units: Units, batch_seconds: float, seed: int, joined=0.4, speeds=(1.0, 1.0)):
        self.utterances, self.joined, self.speeds = utterances, joined, speeds
        self.encode = functools.cache(units.encode)
        self.batch_samples = int(batch_seconds * RATE)
        self.random = np.random.default_rng(seed)

    def examples(self):
        """Endless (pieces, length, tokens, text), epoch after epoch; an utterance that was added comes in the next."""
        random, pending = self.random, []
        while True:
            order = [i for i, u in enumerate(list(self.utterances)) for _ in range(u.repeat)]
            for i in random.permutation(order).tolist():
                pending.append(self.utterances[i])
                if random.random() < self.joined and len(pending) < 8:
                    continue
                yield from self.join(pending)
                pending = []

    def join(self, utterances):
        pieces, tokens, texts, time = [], [], [], self.silence()
        for utterance in utterances:
            speed = self.random.uniform(*self.speeds)
            size = int(utterance.size / speed)
            if pieces and time + size > MAX_SECONDS * RATE:
                yield pieces, time, tokens, " ".join(texts)
                pieces, tokens, texts, time = [], [], [], self.silence()
            pieces.append((time, utterance.offset, size, speed))
            tokens = tokens + self.encode(utterance.text)
            texts.append(utterance.text)
            time += size + self.silence()
        yield pieces, min(time, LENGTHS[-1]), tokens, " ".join(texts)

    def silence(self) -> int:
        return int(self.random.random() ** 2 * SILENCE * RATE)

    def batches(self, pin: bool):
        waiting: dict[int, list] = {}
        for row in self.examples():
            samples = next((x for x in LENGTHS if x >= row[1] and label_capacity(x) >= len(row[2])), None)
            if samples is None:  # more tokens than the longest batch has room for: nothing a person could say
                continue
            rows = waiting.setdefault(samples, [])
            rows.append(row)
            if len(rows) >= max(1, self.batch_samples // samples):
                yield collate(rows, samples, pin, label_capacity(samples))
                waiting[samples] = []

    def prefetched(self, depth: int, pin: bool):
        """The same stream, planned by a thread ahead of its use."""
        ready: queue.Queue = queue.Queue(depth)

        def work():
            for batch in self.batches(pin):
                ready.put(batch)

        threading.Thread(target=work, daemon=True).start()
        while True:
            yield ready.get()


def plain_batches(utterances, units: Units, batch_seconds: float) -> list[Batch]:
    """Every utterance once, as it is, 0.1 s of silence around it: for evaluation."""
    edge, waiting, batches = RATE // 10, {}, []
    for utterance in sorted(utterances, key=lambda u: u.size):
        size = utterance.size
        samples = next((x for x in LENGTHS if x >= size + 2 * edge), -(-(size + 2 * edge) // RATE) * RATE)
        row = ([(edge, utterance.offset, size, 1.0)], size + 2 * edge, units.encode(utterance.text), utterance.text)
        waiting.setdefault(samples, []).append(row)
    for samples, rows in waiting.items():
        step = max(1, int(batch_seconds * RATE) // samples)
        batches += [collate(rows[i : i + step], samples, False) for i in range(0, len(rows), step)]
    return batches


def read_audio(folder: Path) -> tuple[np.ndarray, list[Utterance]]:
    """A folder with manifest.jsonl (id, text) and 16 kHz flac files, as `decode` gives it. For evaluation only."""
    import soundfile

    chunks, utterances, total = [], [], 0
    for line in map(json.loads, (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()):
        samples, rate = soundfile.read(folder / f"{line['id']}.flac", dtype="int16")
        if rate != RATE or samples.ndim != 1:
            raise SystemExit(f"{line['id']}.flac: expected 16 kHz mono, found {rate} Hz and shape {samples.shape}")
        utterances.append(Utterance(line["id"], line["text"], total, len(samples)))
        chunks += [samples, np.zeros(GAP, np.int16)]
        total += len(samples) + GAP
    return np.concatenate(chunks), utterances
