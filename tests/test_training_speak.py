"""Speech made for training: phonemes, voices, the manner of speaking, the batched network and its parts."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training import kokoro, phonemes, speak  # noqa: E402
from training.data import Parts  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("heard", "british", "expected"),
    [
        ("həlˈo^ʊ", False, "həlˈO"),
        ("həlˈə^ʊ", True, "həlˈQ"),
        ("t^ʃˈe^ə", True, "ʧˈɛː"),
        ("wˈɔːɾɚ", False, "wˈɔTəɹ"),
        ("d^ʒˈe^ɪn", False, "ʤˈAn"),
        ("bˈʌʔn̩", False, "bˈʌtn"),
    ],
)
def test_symbols(heard, british, expected):
    assert phonemes.symbols_of(heard, british) == expected


def test_reductions_and_punctuation_change_only_what_they_say():
    rng = random.Random(1)
    seen = {phonemes.reduced("lˈæst tˈIm ænd ɡˈOɪŋ", rng) for _ in range(200)}
    assert {"lˈæst tˈIm ænd ɡˈOɪŋ", "lˈæs tˈIm ən ɡˈOɪŋ"} <= seen
    texts = [phonemes.punctuated("what is it and why do you ask", rng) for _ in range(100)]
    letters = {"".join(c for c in text if c.isalpha() or c == " ").replace("  ", " ").strip() for text in texts}
    assert letters == {"what is it and why do you ask"} and any("," in text for text in texts)


@pytest.fixture
def voices(tmp_path):
    random_ = np.random.default_rng(0)
    rows = {name: random_.standard_normal((256, 256)).astype(np.float16) for name in ("af_a", "am_b", "bf_c", "zf_d")}
    np.savez(tmp_path / "voices.npz", **rows)
    return speak.Voices(tmp_path / "voices.npz")


def test_each_utterance_has_another_voice(voices):
    rng = np.random.default_rng(3)
    styles = np.stack([voices.draw(rng, british=bool(i % 2), symbols=i) for i in (1, 40, 300) * 10])
    assert styles.shape == (30, 256) and np.isfinite(styles).all()
    assert len(np.unique(styles.round(4), axis=0)) == 30


def test_manner_keeps_what_it_must():
    torch.manual_seed(0)
    manner = speak.Manner.draw(np.random.default_rng(0), 64, CPU)
    inside = torch.arange(30) < torch.randint(3, 31, (64, 1))
    predicted, pauses = torch.rand(64, 30) * 6, torch.arange(30).expand(64, -1) % 7 == 0
    frames = speak.whole_frames(predicted, inside, pauses, manner)
    assert frames.dtype == torch.int64 and (frames[inside] >= 1).all() and not frames[~inside].any()
    steady = replace(manner, local=torch.zeros(64, 1), drift=torch.zeros(64, 1), pause=torch.full((64, 1), 3.0))
    expected = predicted / manner.speed * manner.tract * (1 + 2 * pauses)
    frames = speak.whole_frames(predicted, inside, pauses, steady)
    assert ((frames - expected.clamp(min=1)).abs() <= 1)[inside].all()  # rounded up or down
    pitch = torch.where(torch.rand(64, 200) < 0.7, 80 + 100 * torch.rand(64, 200), torch.zeros(()))
    whisper = (torch.arange(64) % 2).unsqueeze(1).float()
    moved = speak.melody(pitch, replace(manner, whisper=whisper))
    assert torch.equal(moved > kokoro.VOICED, (pitch > kokoro.VOICED) & (whisper == 0)) and moved.max() <= 520
    assert not torch.allclose(moved[::2], pitch[::2])
    still = {name: torch.zeros(64, 1) for name in ("pitch", "wander", "rough", "whisper")}
    still |= {name: torch.ones(64, 1) for name in ("range", "tract")}
    plain, creaking = (speak.melody(pitch, replace(manner, creak=torch.full((64, 1), c), **still)) for c in (0.0, 0.25))
    torch.testing.assert_close(plain, pitch)
    torch.testing.assert_close(creaking[:, :120], pitch[:, :120])
    torch.testing.assert_close(creaking[:, 180:], (pitch[:, 180:] / 2))


def test_spread_gives_each_token_its_frames():
    x = torch.arange(6.0).view(2, 3, 1)
    out = kokoro.spread(x, torch.tensor([[2, 1, 3], [4, 2, 0]]), 6)
    assert out[..., 0].tolist() == [[0, 0, 1, 2, 2, 2], [3, 3, 3, 3, 4, 4]]


def test_padding_never_reaches_a_text():
    torch.manual_seed(0)
    encoder, recurrent = kokoro.Bert(size=96, inner=64, repeats=2).eval(), kokoro.Recurrent(96).eval()
    tokens, lengths = torch.randint(1, 100, (3, 17)), torch.tensor([17, 5, 11])
    inside = torch.arange(17) < lengths.unsqueeze(1)
    with torch.no_grad():
        together = recurrent(encoder(tokens, inside), lengths)
        for row, size in enumerate(lengths.tolist()):
            alone = encoder(tokens[row : row + 1, :size], torch.ones(1, size, dtype=torch.bool))
            alone = recurrent(alone, torch.tensor([size]))
            torch.testing.assert_close(together[row, :size], alone[0], rtol=1e-4, atol=1e-5)
            assert not together[row, size:].any()


def test_finish_cuts_silence_and_leaves_out_what_is_broken(voices):
    speaker = speak.Speaker(None, voices, [1], CPU, 0, 1000)
    wave = torch.zeros(4, 24000)
    wave[0, 9000:15000] = torch.sin(torch.arange(6000) * 0.05)
    wave[1, 100] = float("nan")
    wave[3, 9000:15000] = 0.001  # next to nothing
    manner = speak.Manner.draw(np.random.default_rng(0), 4, CPU)
    rows = speaker.finish(wave, manner)
    assert [row is None for row in rows] == [False, True, True, True]
    spoken = 6000 / 1.5 / manner.tract[0].item()
    assert rows[0].dtype == np.int16 and 0.1 * 16000 < len(rows[0]) - spoken < 0.52 * 16000
    assert 15000 < np.abs(rows[0]).max() < 17000


def test_parts_are_read_as_they_were_written(tmp_path):
    spoken = [(2, np.full(50, 7, np.int16)), (0, np.full(30, 9, np.int16))]
    lines = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
    assert speak.write_part(tmp_path, "00000", lines, spoken, 100) > 0
    ((flat, utterances),) = Parts(tmp_path).new()
    assert [(u.id, u.text) for u in utterances] == [("k0000102", "three"), ("k0000100", "one")]
    for utterance, (_, samples) in zip(utterances, spoken, strict=True):
        np.testing.assert_array_equal(flat[utterance.offset : utterance.offset + utterance.size], samples)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".npy"]
    assert all(json.loads(line) for line in (tmp_path / "00000.jsonl").read_text().splitlines())
