"""Lists of recordings with their texts, as people keep them: JSONL, WeNet's data.list, Kaldi's wav.scp and text.

Paths in a list are taken from where the list lies and, if nothing is there, from the working directory.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from m3asr.errors import AudioError, M3asrError, reason

_IDS = ("id", "key", "utt", "utt_id")
_AUDIO = ("audio", "audio_filepath", "wav", "path", "audio_path", "file")
_TEXT = ("text", "txt", "transcript", "sentence")
_SPEAKER = ("speaker", "spk", "speaker_id", "voice")
_SUFFIXES = (".flac", ".wav", ".opus", ".ogg", ".mp3", ".m4a")  # of recordings that a list names by id alone


@dataclass(frozen=True)
class Utterance:
    """A recording with the text that it should give. `shard`: a zip that holds it as `path`."""

    key: str
    path: Path
    text: str
    speaker: str | None = None
    shard: Path | None = None

    def audio(self) -> str | bytes:
        """What `audio.load_audio` reads. Raises AudioError if the zip does not hold it."""
        if self.shard is None:
            return str(self.path)
        return _member(self.shard, self.path.name)


def read_manifest(path: str | Path) -> list[Utterance]:
    """Read a list of any kind: a JSONL file, WeNet's data.list, a Kaldi folder (or its wav.scp).

    A JSONL line has a text ("text", "txt", "transcript") and says where the audio is: "audio", "audio_filepath",
    "wav" or "path"; or "shard", a zip beside the list with members named by "id"; or only "id", the name of a file
    beside the list. "speaker" (or "spk", "voice") is used for the confidence interval.
    Raises M3asrError naming the first line that does not fit. Whether the audio is there is not looked at.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "wav.scp").is_file():
            return _read_kaldi(path)
        if (path / "manifest.jsonl").is_file():
            return _read_jsonl(path / "manifest.jsonl")
        raise M3asrError(f"{path} holds neither wav.scp nor manifest.jsonl; expected a list of recordings with texts")
    if path.name == "wav.scp":
        return _read_kaldi(path.parent)
    return _read_jsonl(path)


def read_wav_scp(path: str | Path) -> list[tuple[str, str]]:
    """Kaldi's `key path` lines -> (key, path). Raises M3asrError for commands (`sox ... |`), which are never run."""
    pairs = []
    for number, key, rest in _table(Path(path)):
        if rest.endswith("|"):
            raise M3asrError(f"{path}, line {number}: found a command; expected a path, so run it and keep the result")
        if not rest:
            raise M3asrError(f"{path}, line {number}: found only {key!r}; expected 'key path'")
        pairs.append((key, str(_located(rest, Path(path).parent))))
    return pairs


def _read_kaldi(folder: Path) -> list[Utterance]:
    if (folder / "segments").is_file():
        raise M3asrError(f"{folder} has segments, which cut its recordings; expected one recording an utterance")
    texts = {key: text for _, key, text in _table(folder / "text")}
    speakers = {}
    if (folder / "utt2spk").is_file():
        speakers = {key: speaker for _, key, speaker in _table(folder / "utt2spk")}
    paths = dict(read_wav_scp(folder / "wav.scp"))
    if unknown := [key for key in paths if key not in texts]:
        raise M3asrError(f"{folder}: {len(unknown)} recordings have no line in text, the first is {unknown[0]}")
    # A text without a recording is an utterance whose file is missing, and is counted as such.
    return [
        Utterance(key, Path(paths.get(key, folder / f"{key} (not in wav.scp)")), text, speakers.get(key))
        for key, text in texts.items()
    ]


def _read_jsonl(path: Path) -> list[Utterance]:
    utterances, seen = [], {}
    for number, line in _lines(path):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            shards = " (WeNet's list of shards? expected its raw data.list)" if line.endswith((".tar", ".gz")) else ""
            raise M3asrError(f"{path}, line {number}: found {line[:60]!r}; expected a JSON object{shards}") from None
        if not isinstance(entry, dict):
            raise M3asrError(f"{path}, line {number}: found a {type(entry).__name__}; expected a JSON object")
        key, audio, text, speaker = (_first(entry, names) for names in (_IDS, _AUDIO, _TEXT, _SPEAKER))
        if text is None or (key is None and audio is None):
            raise M3asrError(
                f"{path}, line {number}: found the keys {', '.join(entry) or '(none)'}; "
                "expected text, and audio or id (see the manual of `m3asr evaluate`)"
            )
        shard = None
        if audio is not None:
            place = _located(audio, path.parent)
        elif isinstance(entry.get("shard"), str):
            shard, place = _located(entry["shard"], path.parent), Path(key)
        else:
            candidates = [path.parent / f"{key}{suffix}" for suffix in _SUFFIXES]
            place = next((file for file in candidates if os.path.isfile(file)), candidates[0])
        utterance = Utterance(key or audio, place, text, speaker, shard)
        before = seen.setdefault(utterance.key, utterance)
        if (before.path, before.shard) != (place, shard):
            raise M3asrError(f"{path}, line {number}: found {utterance.key!r} again, for another recording")
        utterances.append(utterance)
    return utterances


def _first(entry: dict, names: tuple[str, ...]) -> str | None:
    for name in names:
        value = entry.get(name)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    return None


def _located(name: str, folder: Path) -> Path:
    beside = folder / name
    # os.path, unlike Path, takes a name that is too long for one that is not there, as one that is not is reported.
    return beside if os.path.exists(beside) or not os.path.exists(name) else Path(name)


def _table(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, first field, the rest) of Kaldi's tables. Raises M3asrError where a key comes twice."""
    seen = set()
    for number, line in _lines(path):
        key, *rest = re.split(r"[ \t]+", line, maxsplit=1)
        if key in seen:
            raise M3asrError(f"{path}, line {number}: found {key!r} again; expected each key once")
        seen.add(key)
        yield number, key, "".join(rest)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise M3asrError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise M3asrError(f"{path} is not UTF-8 text; expected a list of recordings") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


@lru_cache(maxsize=4)
def _opened_zip(path: Path) -> tuple[zipfile.ZipFile, dict[str, list[str]]]:
    """The archive, and its members by their names without folder and suffix."""
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise AudioError(f"{path}: no such file") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise AudioError(f"{path} is not a readable zip: {reason(error)}") from None
    members: dict[str, list[str]] = {}
    for name in archive.namelist():
        if not name.endswith("/"):
            members.setdefault(Path(name).stem, []).append(name)
    return archive, members


def _member(path: Path, key: str) -> bytes:
    archive, members = _opened_zip(path)
    found = members.get(key, [])
    if len(found) != 1:
        raise AudioError(f"{path} has {len(found) or 'no'} member{'s' * (len(found) > 1)} {key}.*; expected one")
    try:
        return archive.read(found[0])
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
        raise AudioError(f"{path}: {found[0]} cannot be read: {error}") from None
