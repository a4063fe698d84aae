"""What a stream hears of recordings, by how far it lags: `python -m benchmarks.streams LIST`.

Each recording is played into a `Stream` of its own in packets of a tenth of a second, as `m3asr stream` does it, with
its rules for the ends of lines; the final texts, joined, are compared with the reference. Windows are measured twice:
with each line read again as a whole when it ends, which is the default, and without. Beside them whole recordings, and
every time the default decoder. Latency: seconds from a sound to its (first) text at the latest, computing apart. RTF:
seconds of work for a second of audio. The engine is onnx on one thread. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

THREADS = 1
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = str(THREADS)  # before numpy is imported

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.peers import read_list  # noqa: E402
from m3asr.audio import SAMPLE_RATE  # noqa: E402
from m3asr.decode import DecodeOptions  # noqa: E402
from m3asr.errors import M3asrError  # noqa: E402
from m3asr.evaluate import Result, environment, model_digest, summary  # noqa: E402
from m3asr.stream import Stream, StreamOptions  # noqa: E402
from m3asr.transcribe import Transcriber, load  # noqa: E402

PACKET = SAMPLE_RATE // 10
# Mode, encoder frames of 40 ms that are read at a time, and that are waited for behind them.
CUTS = {"windows": ((16, 16), (16, 8), (8, 8), (8, 4)), "chunks": ((16, 0), (8, 0))}


def heard(transcriber: Transcriber, waveform: np.ndarray, options: StreamOptions) -> tuple[str, float]:
    """The final texts of a stream, and its latency in seconds."""
    stream, texts = Stream(transcriber, options), []
    for start in range(0, len(waveform), PACKET):
        texts += [update.text for update in stream.accept(waveform[start : start + PACKET]) if update.final]
    texts += [update.text for update in stream.finish() if update.final]
    return " ".join(text for text in texts if text), stream.latency


def measure(transcriber: Transcriber, utterances: Sequence) -> list[dict]:
    """A row for whole recordings, then one or two for each cut that the model allows."""
    mode = "chunks" if transcriber.folder.config.encoder.can_stream else "windows"
    rows = []
    for cut, reread in ((None, False), *product(CUTS[mode], (True, False))):
        options = cut and StreamOptions(mode, cut[0], right=cut[1], reread=reread)
        results, latency = [], None
        for utterance, waveform in track(utterances, f"{mode} {cut}" if cut else "whole", transient=True):
            before = time.perf_counter()
            if options is None:
                text = transcriber.transcribe(waveform).text
            else:
                text, latency = heard(transcriber, waveform, options)
            results.append(Result(utterance, text, len(waveform) / SAMPLE_RATE, time.perf_counter() - before))
        row = summary(results)
        rtf = round(row["work_seconds"] / row["audio_seconds"], 4)
        decoder = transcriber.decoder_of(DecodeOptions(), live=bool(cut) and not reread)
        about = {"mode": mode if cut else "whole", "cut": cut, "reread": reread, "decoder": decoder}
        rows.append({**about, "latency": latency, "rtf": rtf, **row})
    return rows


def table(rows: Sequence[dict]) -> Table:
    shown = Table("mode", "frames read", "waited for", "again", "decoder", "latency s", "WER %", "95 %", "RTF")
    for row in rows:
        low, high = row["wer_interval_by_utterance"] or (float("nan"), float("nan"))
        shown.add_row(
            row["mode"],
            *([str(x) for x in row["cut"]] if row["cut"] else ["", ""]),
            "yes" if row["reread"] else "",
            row["decoder"],
            "" if row["latency"] is None else f"{row['latency']:.2f}",
            f"{100 * row['wer']:.2f}",
            f"{100 * low:.1f}-{100 * high:.1f}",
            f"{row['rtf']:.3f}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, help="JSONL with texts, or a Kaldi folder: as for m3asr evaluate")
    parser.add_argument("--model", help="model folder; default: the shipped one")
    args = parser.parse_args()
    try:
        transcriber = load(args.model, "onnx", threads=THREADS)
        rows = measure(transcriber, read_list(args.list, 1))
    except M3asrError as error:
        raise SystemExit(f"error: {error}") from None
    Console(width=120, highlight=False).print(table(rows))
    about = {"weights": model_digest(transcriber.folder)[:16], "threads": THREADS}
    packages = ("m3asr", "numpy", "onnxruntime")
    print(json.dumps({**about, "rows": rows, **environment(packages)}))


if __name__ == "__main__":
    main()
