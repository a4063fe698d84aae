"""The benchmark of streams: the same words as whole recordings where the window reaches far, and every number there."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import streams  # noqa: E402
from m3asr.audio import load_audio  # noqa: E402
from m3asr.decode import DecodeOptions  # noqa: E402
from m3asr.manifest import Utterance  # noqa: E402
from m3asr.stream import StreamOptions  # noqa: E402
from m3asr.transcribe import load  # noqa: E402

EXAMPLE = Path(__file__).parent.parent / "examples" / "goforward.flac"


@pytest.fixture(scope="module")
def transcriber():
    return load(None, "onnx", threads=1)


def test_a_stream_hears_what_the_recording_says(transcriber):
    options = StreamOptions("windows", 16, right=16, decode=DecodeOptions("rescoring"))
    text, latency = streams.heard(transcriber, load_audio(EXAMPLE), options)
    assert text == "go forward ten meters"
    assert latency == pytest.approx((16 + 16) * 0.04, abs=0.05)
    assert streams.heard(transcriber, np.zeros(0, np.float32), options)[0] == ""


def test_rows_name_their_cuts(transcriber, monkeypatch):
    monkeypatch.setattr(streams, "CUTS", {"windows": ((16, 8),)})
    utterances = [(Utterance("a", EXAMPLE, "go forward ten meters", "one"), load_audio(EXAMPLE))]
    whole, again, once = rows = streams.measure(transcriber, utterances)
    assert (whole["mode"], whole["latency"], whole["wer"]) == ("whole", None, 0.0)
    assert (again["reread"], again["decoder"], again["wer"]) == (True, "joint", 0.0)
    assert (once["reread"], once["decoder"]) == (False, "rescoring")
    for cut in (again, once):
        assert (cut["mode"], cut["cut"]) == ("windows", (16, 8)) and cut["latency"] < 1.1 and cut["words"] == 4
    assert streams.table(rows).row_count == 3
