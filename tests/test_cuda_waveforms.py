"""Waveforms to the best path on the cuda engine: the features of the CPU, the path of the log-probabilities."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from interpreter_tiles import few_programs  # noqa: E402, F401
from random_model import random_model  # noqa: E402

from m3asr.config import FbankConfig  # noqa: E402
from m3asr.engines.cuda import CudaEngine  # noqa: E402
from m3asr.engines.cuda.waveforms import WaveformRecogniser  # noqa: E402
from m3asr.errors import ModelError  # noqa: E402
from m3asr.features import Cmvn, compress_levels, fbank, pad_batch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOLDEN = Path(__file__).parent / "data" / "golden"
CONFIG = FbankConfig(num_mel_bins=40)
# What stands past a waveform's end is whatever the memory held, and the interpreter's numpy says what it thinks of it.
memory = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(scope="module")
def engine():
    """Of one block: sound and path are at its two ends, and the interpreter is slow."""
    return CudaEngine(random_model("dense", blocks=1), "fp32", DEVICE)


@pytest.fixture(scope="module")
def cmvn():
    random = np.random.default_rng(1)
    return Cmvn(random.uniform(8, 12, 40), random.uniform(0.2, 0.4, 40))


def sound(*samples):
    random = np.random.default_rng(0)
    return [random.normal(0, 0.05, n).astype(np.float32) for n in samples]


@memory
def test_best_paths_are_those_of_the_cpu_features(engine, cmvn):
    """Mixed lengths, one too short for a frame, one for an encoder frame; batches come back in order."""
    recogniser = WaveformRecogniser(engine, CONFIG, (cmvn.mean, cmvn.istd))
    batches = [sound(5200, 4000, 300, 900), sound(4400)]
    results = list(recogniser.best_paths(batches))
    assert len(results) == 2
    for waveforms, result in zip(batches, results, strict=True):
        features, lengths = pad_batch([cmvn.apply(fbank(waveform, CONFIG)) for waveform in waveforms])
        log_probs, _, out_lengths = engine(features, lengths)
        assert result.lengths.tolist() == out_lengths.tolist()
        for b, length in enumerate(out_lengths):
            best = log_probs[b, :length].argmax(-1)
            assert result.symbols[b, :length].tolist() == best.tolist()
            np.testing.assert_allclose(result.peaks[b, :length], log_probs[b, :length].max(-1), atol=2e-3)
    assert results[0].lengths.tolist()[2:] == [0, 0]


@memory
@pytest.mark.parametrize("extra", [0, 160, 639, 640])
def test_waveforms_at_the_edge_of_a_bucket(engine, extra):
    """From the least that gives 16 frames; an empty batch, an empty waveform; two recognisers on one engine."""
    least = 400 + 160 * (engine.config.encoder.min_frames + 15 * 4 - 1)
    waveforms = [*sound(least + extra), np.zeros(0, np.float32)]
    normed = WaveformRecogniser(engine, CONFIG, (np.full(40, 2.0, np.float32), np.full(40, 0.5, np.float32)))
    plain = WaveformRecogniser(engine, CONFIG)
    for recogniser, shift, scale in ((plain, 0.0, 1.0), (normed, 2.0, 0.5)):
        empty, result = recogniser.best_paths([[], waveforms])
        assert empty.symbols.shape[0] == empty.lengths.shape[0] == 0
        features, lengths = pad_batch([(fbank(waveform, CONFIG) - shift) * scale for waveform in waveforms])
        symbols, peaks, out_lengths = engine.best_path(features, lengths)
        assert result.lengths.tolist() == out_lengths.tolist() == [16 + extra // 640, 0]
        assert result.symbols.shape == symbols.shape
        kept = out_lengths[0]
        assert result.symbols[0, :kept].tolist() == symbols[0, :kept].tolist()
        np.testing.assert_allclose(result.peaks[0, :kept], peaks[0, :kept], atol=2e-3)


@pytest.mark.parametrize("share", [0.0, 0.35])
def test_features_on_the_device_are_kaldis(engine, share):
    recogniser = WaveformRecogniser(engine, replace(CONFIG, level_compression=share))
    waveforms = sound(16000, 7000)
    padded = torch.zeros(2, 16000)
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = torch.from_numpy(waveform)
    features, lengths = recogniser.features(padded.to(DEVICE), torch.tensor([16000, 7000], device=DEVICE))
    for b, waveform in enumerate(waveforms):
        expected = compress_levels(fbank(waveform, CONFIG), share)
        assert lengths[b] == len(expected)
        np.testing.assert_allclose(features[b, : len(expected)].cpu(), expected, atol=1e-3)


def test_best_path_equals_log_probs(engine):
    features = np.random.default_rng(2).standard_normal((2, 40, 40), np.float32)
    lengths = np.array([40, 22], np.int32)
    log_probs, _, out_lengths = engine(features, lengths)
    symbols, peaks, path_lengths = engine.best_path(features, lengths)
    assert path_lengths.tolist() == out_lengths.tolist()
    assert np.array_equal(symbols, log_probs.argmax(-1)) and np.allclose(peaks, log_probs.max(-1), atol=1e-6)
    assert engine.best_path(features[:0], lengths[:0])[0].shape[0] == 0


def test_what_does_not_fit_is_refused(engine):
    with pytest.raises(ModelError, match="80 bins"):
        WaveformRecogniser(engine, FbankConfig())
    with pytest.raises(ModelError, match="window_type"):
        WaveformRecogniser(engine, FbankConfig(num_mel_bins=40, window_type="kaiser"))


def test_a_transcriber_decodes_the_best_path_alone(tmp_path, monkeypatch):
    """Greedy results are those of the log-probabilities, which are not asked for."""
    from m3asr.checkpoint import read_checkpoint
    from m3asr.convert import write_model_folder
    from m3asr.decode import DecodeOptions
    from m3asr.folder import ModelFolder
    from m3asr.transcribe import Transcriber

    write_model_folder(read_checkpoint(GOLDEN / "3m-dense-80"), tmp_path / "model", onnx=False)
    folder = ModelFolder.read(tmp_path / "model")
    transcriber = Transcriber(folder, CudaEngine(folder, "fp32", DEVICE))
    features = [np.random.default_rng(n).standard_normal((n, 80), np.float32) for n in (40, 23, 0)]
    through_log_probs = transcriber.decode(*transcriber.engine(*pad_batch(features)), DecodeOptions("greedy"))
    monkeypatch.setattr(CudaEngine, "__call__", None)
    results = transcriber.recognise(features, DecodeOptions("greedy"))
    assert [r.tokens for r in results] == [r.tokens for r in through_log_probs]
    np.testing.assert_allclose([r.score for r in results], [r.score for r in through_log_probs], atol=1e-5)
