"""How right and how fast on recordings whose text is known: error rates, speed, and what differs between engines."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from m3asr import __version__
from m3asr.decode import DecodeOptions
from m3asr.errors import AudioError, M3asrError
from m3asr.folder import ModelFolder
from m3asr.manifest import Utterance
from m3asr.segment import SegmentOptions
from m3asr.transcribe import Recording, Transcriber
from m3asr.wer import Errors, confidence_interval, count_errors, marked, words


@dataclass(frozen=True)
class Result:
    """What came out for an utterance. seconds: of audio; took: seconds of work, shared with its batch."""

    utterance: Utterance
    hypothesis: str
    seconds: float
    took: float

    @property
    def word_errors(self) -> Errors:
        return count_errors(words(self.utterance.text), words(self.hypothesis))

    @property
    def char_errors(self) -> Errors:
        return count_errors("".join(words(self.utterance.text)), "".join(words(self.hypothesis)))


_RESULTS_START = '{"run": '  # what a file of results starts with; nothing is added to any other


class ResultsFile:
    """Results as they come, in a JSONL file; those of an earlier, interrupted call are picked up from it.

    Two kinds of line: {"run": ID, "settings": {...}} says what ran, {"run": ID, "manifest", "key", "hypothesis",
    "seconds", "took", "text"} what came out. A result counts again only for the same weights, engine, decoder and
    settings, known by the run's ID. A line cut off by a crash is left where it is and its utterance done again.
    Raises M3asrError for a file that cannot be used and for one that holds something else.
    """

    def __init__(self, path: Path):
        self.path = path
        self._found: dict[tuple[str, str, str], tuple[str, float, float]] = {}
        self._runs: set[str] = set()
        try:
            text = path.read_bytes().decode("utf-8", errors="replace") if path.exists() else ""
            if text and not text.startswith(_RESULTS_START):
                raise M3asrError(
                    f"{path} is there and holds no results of an earlier call: expected such a file or a new name"
                )
            for line in text.split("\n"):
                self._take(line)
            self._file: TextIO = open(path, "a", encoding="utf-8")
            if text and not text.endswith("\n"):
                self._file.write("\n")
        except OSError as error:
            raise M3asrError(f"{path} cannot be used for results: {error.strerror}") from None

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
            if "settings" in entry:
                self._runs.add(entry["run"])
            else:
                hypothesis, seconds, took = entry["hypothesis"], float(entry["seconds"]), float(entry["took"])
                if isinstance(hypothesis, str):
                    self._found[entry["run"], entry["manifest"], entry["key"]] = hypothesis, seconds, took
        except (ValueError, TypeError, KeyError, RecursionError):
            pass

    def begin(self, settings: dict) -> str:
        """The ID of a run with these settings."""
        run = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        if run not in self._runs:
            self._runs.add(run)
            self._write({"run": run, "settings": settings})
        return run

    def find(self, run: str, manifest: str, utterance: Utterance) -> Result | None:
        found = self._found.get((run, manifest, utterance.key))
        return None if found is None else Result(utterance, *found)

    def add(self, run: str, manifest: str, result: Result) -> None:
        kept = {"hypothesis": result.hypothesis, "seconds": result.seconds, "took": result.took}
        self._write(
            {"run": run, "manifest": manifest, "key": result.utterance.key, **kept, "text": result.utterance.text}
        )

    def _write(self, entry: dict) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def run_settings(transcriber: Transcriber, options: DecodeOptions, segmentation: SegmentOptions, digest: str) -> dict:
    """Everything that the texts depend on."""
    lm = transcriber.lm_of(options)
    if lm is not None and options.lm is None:
        lm = f"{Path(lm).name} of the model"
    settings = {
        "model": transcriber.folder.path.resolve().name,
        "weights": digest,
        "engine": transcriber.engine.name,
        "device": transcriber.engine.device,
        "version": __version__,
        "decode": {**asdict(options), "decoder": transcriber.decoder_of(options), "lm": lm},
        "segmentation": asdict(segmentation),
    }
    return settings | transcriber.chunks  # empty for whole utterances, whose older results are still found


def model_digest(folder: ModelFolder) -> str:
    """SHA-256 of the configuration, the weights and the model's own language model."""
    digest = hashlib.sha256(folder.config.to_json().encode())
    for path in (folder.path / "model.safetensors", folder.lm()):
        if path is not None:
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def transcribe_utterances(
    transcriber: Transcriber,
    utterances: Sequence[Utterance],
    options: DecodeOptions,
    segmentation: SegmentOptions,
    *,
    found: Callable[[Utterance], Result | None] = lambda utterance: None,
    failed: Callable[[Utterance, M3asrError], None],
    done: Callable[[Result], None] = lambda result: None,
    progress: Callable[[float], None] | None = None,
) -> list[Result]:
    """Results in the order of the utterances, without those that cannot be read, which `failed` is told.

    found: an earlier result of an utterance, to be taken instead; done: is told each new one; progress: seconds of
    audio finished since its last call.
    """
    results = {i: result for i, utterance in enumerate(utterances) if (result := found(utterance)) is not None}

    def recordings() -> Iterator[Recording]:
        for i, utterance in enumerate(utterances):
            if i not in results:
                try:
                    yield Recording(str(i), utterance.audio())
                except AudioError as error:
                    failed(utterance, error)

    before = time.perf_counter()
    new: dict[int, Result] = {}
    transcripts = transcriber.transcribe_each(
        recordings(),
        options,
        segmentation,
        failed=lambda name, error: failed(utterances[int(name)], error),
        progress=progress,
    )
    for transcript in transcripts:
        now = time.perf_counter()
        i = int(transcript.name)
        new[i] = Result(utterances[i], transcript.text, transcript.duration, now - before)
        before = now
        done(new[i])
    return [result for _, result in sorted((results | new).items())]


def summary(results: Sequence[Result]) -> dict:
    """Error rates, intervals and speed of a run on one list. Rates and intervals are fractions, not per cent."""
    by_word = [result.word_errors for result in results]
    total, chars = sum(by_word, Errors()), sum((result.char_errors for result in results), Errors())
    errors, lengths = [e.total for e in by_word], [e.reference for e in by_word]
    speakers = [result.utterance.speaker for result in results]
    known = len(speakers) > 0 and None not in speakers
    seconds, took = sum(result.seconds for result in results), sum(result.took for result in results)
    return {
        "utterances": len(results),
        "words": total.reference,
        "wer": total.rate,
        "wer_interval_by_utterance": confidence_interval(errors, lengths),
        "speakers": len(set(speakers)) if known else None,
        "wer_interval_by_speaker": confidence_interval(errors, lengths, speakers) if known else None,
        "substitutions": total.substitutions,
        "deletions": total.deletions,
        "insertions": total.insertions,
        "cer": chars.rate,
        "characters": chars.reference,
        "audio_seconds": round(seconds, 3),
        "work_seconds": round(took, 3),
        "rtfx": round(seconds / took, 2) if took > 0 else None,
    }


def worst(results: Sequence[Result], count: int) -> list[tuple[Result, Errors]]:
    """The utterances with the highest word error rate; of equal rates, more errors first."""
    scored = [(result, result.word_errors) for result in results]
    scored = [pair for pair in scored if pair[1].total]
    scored.sort(key=lambda pair: (-pair[1].total / max(pair[1].reference, 1), -pair[1].total))
    return scored[:count]


def differences(one: Sequence[Result], other: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Utterances to which two runs on one list gave different texts, to the letter."""
    texts = {result.utterance: result for result in other}
    pairs = [(result, texts[result.utterance]) for result in one if result.utterance in texts]
    return [(a, b) for a, b in pairs if a.hypothesis != b.hypothesis]


def shown(result: Result) -> tuple[str, str]:
    """Reference and hypothesis as they were compared, what differs in brackets."""
    return marked(words(result.utterance.text), words(result.hypothesis))


def environment(packages: Sequence[str]) -> dict:
    """Hardware and versions, to stand beside every figure."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages if _installed(name)},
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
