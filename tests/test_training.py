"""The training recipe's own mathematics: features, resampling, experts, losses. No training happens here."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from m3asr import ops  # noqa: E402
from m3asr.config import FbankConfig  # noqa: E402
from m3asr.engines.torch_fbank import fbank, frame_count, frame_size, mel_filters  # noqa: E402
from m3asr.model import Model  # noqa: E402
from training import losses, moe  # noqa: E402
from training.augment import ROOM, Augment, AugmentConfig, fast_size  # noqa: E402
from training.average import StoredUnits, average  # noqa: E402
from training.data import Parts, Planner, Speech, Utterance, interpolate  # noqa: E402
from training.evaluate import collapse, word_errors  # noqa: E402
from training.kernels.ctc import ctc  # noqa: E402
from training.network import compact, read_folder, tiny, write_folder  # noqa: E402
from training.optimizer import Optimizer, orthogonalized  # noqa: E402

CPU = torch.device("cpu")


def signal(seconds: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16000)) / 16000
    tone = sum(np.sin(2 * math.pi * f * time + f) for f in (130.0, 900.0, 2600.0, 7100.0))
    return (0.1 * tone * np.sin(3 * time) + 0.02 * random.standard_normal(len(time))).astype(np.float32)


@pytest.mark.parametrize(
    "config",
    [
        FbankConfig(),
        FbankConfig(num_mel_bins=40),
        FbankConfig(window_type="hamming", frame_length=32.0, frame_shift=12.0),
        FbankConfig(window_type="blackman", low_freq=64.0, high_freq=-400.0),
        FbankConfig(window_type="rectangular", sample_rate=8000, num_mel_bins=40),
    ],
    ids=lambda c: f"{c.num_mel_bins}-{c.window_type}",
)
@pytest.mark.parametrize("samples", [400, 559, 560, 16001])
def test_fbank_equals_kaldi(config, samples):
    knf = pytest.importorskip("kaldi_native_fbank")
    samples += frame_size(config) - 400
    waveform = signal(2.0)[:samples] * 32768
    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.samp_freq = config.sample_rate
    options.frame_opts.frame_length_ms = config.frame_length
    options.frame_opts.frame_shift_ms = config.frame_shift
    options.frame_opts.window_type = config.window_type
    options.mel_opts.num_bins = config.num_mel_bins
    options.mel_opts.low_freq, options.mel_opts.high_freq = config.low_freq, config.high_freq
    options.energy_floor = 0.0
    kaldi = knf.OnlineFbank(options)
    kaldi.accept_waveform(config.sample_rate, waveform.tolist())
    kaldi.input_finished()
    expected = np.stack([kaldi.get_frame(i) for i in range(kaldi.num_frames_ready)])
    features = fbank(torch.from_numpy(waveform).unsqueeze(0), mel_filters(config), config)[0].numpy()
    assert features.shape == expected.shape == (frame_count(samples, config), config.num_mel_bins)
    np.testing.assert_allclose(features, expected, atol=1e-3)


def test_warped_filters_move_the_bands():
    config = FbankConfig()
    peak = {w: mel_filters(config, w).argmax(dim=0)[30].item() for w in (0.9, 1.0, 1.1)}
    assert peak[0.9] > peak[1.0] > peak[1.1]


@pytest.mark.parametrize(("speed", "taps", "cut"), [(0.85, 10, 0.97), (1.15, 10, 0.97), (1.5, 24, 0.63)])
def test_interpolation_keeps_a_tone_and_shifts_it(speed, taps, cut):
    time = torch.arange(32000, dtype=torch.float64) / 16000
    rows = torch.sin(2 * math.pi * 1000 * time).float().expand(2, -1)
    step = torch.tensor([[speed], [1.0]])
    out = interpolate(rows, step, int(32000 / speed), cut, taps).double()
    expected = torch.sin(2 * math.pi * 1000 * step * torch.arange(out.shape[1], dtype=torch.float64) / 16000)
    inner = slice(100, min(out.shape[1], 32000) - 100)
    error = (out - expected)[:, inner].square().mean().sqrt() / expected[:, inner].square().mean().sqrt()
    assert error < 0.02


def test_interpolation_is_silent_past_the_end():
    out = interpolate(torch.ones(1, 100), torch.tensor([[2.0]]), 80, 0.97, 10)
    assert out[0, 5:45].sub(1).abs().max() < 0.01 and not out[0, 50:].any()


@pytest.mark.parametrize("speeds", [None, torch.ones(2, 2, dtype=torch.float64)])
def test_render_lays_pieces_where_they_belong(speeds):
    flat = np.zeros(2400, dtype=np.int16)
    flat[200:2200] = (1000 * np.sin(np.arange(2000) / 8)).astype(np.int16)  # what a filter of 10 samples can follow
    speech = Speech(flat, CPU)
    starts = torch.tensor([[10, 300], [0, 1 << 40]])
    sources = torch.tensor([[500, 505], [507, 0]])
    sizes = torch.tensor([[100, 50], [20, 0]])
    rows = speech.render(starts, sources, sizes, speeds, 400) * 32768
    expected = np.zeros((2, 400), dtype=np.int32)
    expected[0, 10:110], expected[0, 300:350], expected[1, :20] = flat[500:600], flat[505:555], flat[507:527]
    np.testing.assert_allclose(rows, expected, atol=0 if speeds is None else 5)
    assert not rows.numpy()[expected == 0][:5].any()


def test_speech_grows_by_parts(tmp_path):
    speech, parts = Speech(np.zeros(100, np.int16), CPU, room=50), Parts(tmp_path)
    assert list(parts.new()) == []
    np.save(tmp_path / "00000.npy", np.arange(40, dtype=np.int16))
    (tmp_path / "00000.jsonl").write_text('{"id": "k1", "text": "one", "offset": 4, "size": 30}\n')
    ((flat, utterances),) = parts.new()
    first = speech.add(flat)
    assert first == 100 and utterances == [Utterance("k1", "one", 4, 30)] and not list(parts.new())
    assert torch.equal(speech.samples[100:140], torch.arange(40, dtype=torch.int16))
    assert speech.add(flat) is None  # no room for it: nothing is overwritten
    assert torch.equal(speech.samples[100:140], torch.arange(40, dtype=torch.int16))


def test_planner_joins_without_losing_text():
    class Words:
        def encode(self, text):
            return [int(x) + 2 for x in text.split()]

    utterances = [Utterance(str(i), str(i), 1000 * i, 900, 3 if i == 7 else 1) for i in range(50)]
    planner = Planner(utterances, Words(), batch_seconds=12.0, seed=3, joined=0.5)
    seen, stream = [], planner.batches(False)
    for _ in range(40):
        batch = next(stream)
        assert (batch.lengths <= batch.samples).all() and len(batch.texts) * batch.samples <= 12 * 16000
        for b, text in enumerate(batch.texts):
            tokens = batch.tokens[b, : batch.token_lengths[b]].tolist()
            assert tokens == [int(x) + 2 for x in text.split()]
            present = batch.starts[b] < (1 << 40)
            assert (batch.sources[b][present] == 1000 * (torch.tensor(tokens) - 2)).all()
            ends = batch.starts[b][present] + batch.sizes[b][present]
            assert (ends <= batch.lengths[b]).all() and (ends[:-1] <= batch.starts[b][present][1:]).all()
            seen += tokens
    assert len(set(seen)) == 50
    # What comes three times an epoch, in what is left of whole epochs after sorting by length.
    assert seen.count(7 + 2) > 2 * len(seen) / 52


@pytest.mark.parametrize("seconds", [1.5, 3.17])
def test_augmentation_is_finite_and_stays_inside(seconds):
    config = AugmentConfig(
        expand=1.0, reverberation=1.0, noise=1.0, babble=1.0, channel=1.0, telephone=1.0, modulated_noise=1.0, clip=0.5
    )
    rooms = torch.zeros(2, ROOM)
    rooms[:, 0] = 1.0
    samples = int(seconds * 16000)
    waveform = torch.from_numpy(signal(seconds)).repeat(4, 1)
    lengths = torch.tensor([samples, samples - 5000, 700, 400])
    waveform *= torch.arange(samples) < lengths.unsqueeze(-1)
    waveform[3] = 0.0  # silence must not become NaN
    out = Augment(config, CPU, 0, rooms)(waveform, lengths)
    assert out.isfinite().all() and out.abs().max() <= 1.01
    assert all(out[b, n:].abs().max() == 0 for b, n in enumerate(lengths[1:], 1) for n in [lengths[b]])
    assert (out[:3] - waveform[:3]).abs().max() > 0.01


def test_weak_sounds_become_weaker_or_less_weak():
    rows, samples = 64, 32000
    tone = torch.sin(2 * math.pi * 700 / 16000 * torch.arange(samples))
    weak = torch.where(torch.arange(samples) < samples // 2, 1.0, 0.1)  # 20 dB
    waveform = (tone * weak).expand(rows, -1)
    out = Augment(AugmentConfig(), CPU, 0).expand(waveform, waveform, torch.full((rows,), samples))
    loud, soft = (out[:, a : a + 12000].square().mean(dim=1) for a in (2000, 18000))
    below = 10 * torch.log10(loud / soft) / 20
    for half in below.view(2, -1):  # by bands, and by the whole
        assert 0.58 < half.min() < 0.9 and 1.8 < half.max() < 2.85
    torch.testing.assert_close(out.square().mean(dim=1), waveform.square().mean(dim=1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("frames", [1, 2, 37, 400])
def test_warped_time_keeps_ends_order_and_padding(frames):
    lengths = torch.tensor([frames, max(1, frames // 2), 1])
    time = torch.arange(frames, dtype=torch.float32)
    features = time.expand(3, -1).unsqueeze(-1).repeat(1, 1, 4).contiguous()
    same = Augment(AugmentConfig(), CPU, 0).warp_time(features, lengths)
    assert torch.equal(same, features)
    out = Augment(AugmentConfig(tempo=0.6), CPU, 0).warp_time(features, lengths)
    torch.testing.assert_close(out[..., 0], out[..., 3])
    for row, length in zip(out[..., 0], lengths.tolist(), strict=True):
        assert (
            (row[:length].diff() >= 0).all() and row[0] == 0 and row[length - 1] == pytest.approx(length - 1, abs=1e-3)
        )
        assert torch.equal(row[length + 1 :], time[length + 1 :])
    if frames == 400:
        assert (out[0, :, 0] - time).abs().max() > 3
        steps = out[0, :, 0].diff()
        assert steps.max() < 1.9 and steps.min() > 0.5


def test_fast_size():
    for size in (1, 24000, 352001):
        n = fast_size(size, multiple=2)
        assert n >= size and n % 8 == 0 and n < size * 1.2 + 8


@pytest.mark.parametrize("keep", [False, True])
def test_trained_experts_equal_the_reference(keep):
    torch.manual_seed(0)
    config = tiny(20, 0.0, False)
    encoder = replace(config.encoder, moe=replace(config.encoder.moe, keep_expert_output=keep))
    reference = Model(replace(config, encoder=encoder)).eval()
    moe.start_routers(reference)
    trained = Model(reference.config).eval()
    trained.load_state_dict(reference.state_dict())
    routing = moe.install(trained)
    features, lengths = torch.randn(3, 61, 80), torch.tensor([61, 40, 23], dtype=torch.int32)
    torch.testing.assert_close(trained(features, lengths)[0], reference(features, lengths)[0], rtol=1e-5, atol=1e-5)
    assert len(routing.probs) == 2 and len({int(i) for p in routing.probs for i in p.argmax(-1).flatten()}) > 1

    x, embedding = torch.randn(2, 9, 64), torch.randn(2, 9, 32)
    gradients = []
    for model in (reference, trained):
        layer = model.encoder.blocks[0].feed_forward
        layer(x, embedding).square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 12, 40), (2, 40, 12), (1, 16, 16)])
def test_orthogonalized_keeps_directions_and_levels_their_sizes(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1, shape[-1])
    y = orthogonalized(x)
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.3 and values.max() < 1.3 and y.shape == x.shape
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inside = u.transpose(-2, -1) @ y @ v.transpose(-2, -1)  # diagonal: the singular vectors are x's own
    assert (inside - torch.diag_embed(torch.diagonal(inside, dim1=-2, dim2=-1))).abs().max() < 1e-3


@pytest.mark.parametrize("muon", [False, True])
def test_optimizer_learns_skips_broken_gradients_and_resumes(muon):
    torch.manual_seed(0)
    model = Model(tiny(20, 0.0, False))
    moe.start_routers(model)
    moe.install(model)
    features, lengths = torch.randn(2, 41, 80), torch.tensor([41, 30], dtype=torch.int32)

    def fill():
        loss = -model(features, lengths)[0][..., 5].mean()
        loss.backward()
        return loss.item()

    optimizer, yes = Optimizer(model, 0.01, muon), torch.tensor(True)
    optimizer.lr.fill_(3e-3)
    seen = []
    for _ in range(12):
        optimizer.zero_grad()
        seen.append(fill())
        optimizer.step(yes)
    assert seen[-1] < 0.7 * seen[0]
    saved, other = optimizer.state_dict(), Optimizer(model, 0.01, muon)
    other.load_state_dict(saved)
    expert = moe.expert_parameters(model)[0]
    ours, theirs = optimizer.moments(expert), other.moments(expert)
    assert len(ours) == (1 if muon else 2) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    fill()
    for p in model.parameters():
        p.grad.fill_(float("nan"))
    optimizer.step(torch.tensor(False))
    assert all(p.isfinite().all() for p in model.parameters())


def test_router_stays_float32_under_autocast():
    model = Model(tiny(20, 0.0, False)).eval()
    moe.start_routers(model)
    routing = moe.install(model)
    layer = model.encoder.blocks[0].feed_forward
    x, embedding = torch.randn(2, 9, 64), torch.randn(2, 9, 32)
    expected = torch.softmax(layer.router_logits(x, embedding), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, embedding)
    assert torch.equal(routing.probs[0], expected)


def test_dense_start_goes_on_as_copies():
    torch.manual_seed(0)
    model = Model(tiny(20, 0.0, False)).eval()
    moe.start_routers(model)
    routing = moe.install(model)
    features, lengths = torch.randn(2, 41, 80), torch.tensor([41, 30], dtype=torch.int32)
    routing.dense = True
    before = model(features, lengths)[0]
    moe.copy_first_expert(model)
    routing.dense = False
    routing.blend.fill_(0.0)  # gates have not faded in yet: nothing may change
    torch.testing.assert_close(model(features, lengths)[0], before, rtol=1e-5, atol=1e-5)
    routing.blend.fill_(1.0)
    assert (model(features, lengths)[0] - before).abs().max() > 1e-3


def test_router_losses_at_their_extremes():
    valid = torch.ones(1, 8, dtype=torch.bool)
    even, one_each = torch.full((1, 8, 4), 0.25), torch.eye(4).repeat(2, 1).unsqueeze(0)
    collapsed = torch.eye(4)[:1].expand(8, 4).unsqueeze(0)
    assert losses.sparsity(even, valid) == pytest.approx(2.0) and losses.sparsity(one_each, valid) == pytest.approx(1)
    assert losses.importance(one_each, valid) == pytest.approx(1) and losses.importance(collapsed, valid) == 4
    assert moe.load_entropy(one_each, valid) == pytest.approx(1) and abs(moe.load_entropy(collapsed, valid)) < 1e-6
    half = valid.clone()
    half[:, 1:] = False  # padding does not count
    assert losses.importance(one_each, half) == pytest.approx(4)


def test_decoder_tokens_and_smoothed_loss():
    tokens = torch.tensor([[3, 4, 0], [5, 6, 7]])
    inputs, targets, valid = losses.decoder_tokens(tokens, torch.tensor([2, 3]), sos=9)
    assert inputs.tolist() == [[9, 3, 4, 0], [9, 5, 6, 7]] and targets.tolist() == [[3, 4, 9, 0], [5, 6, 7, 9]]
    assert valid.tolist() == [[True, True, True, False], [True] * 4]
    log_probs = torch.log_softmax(torch.randn(2, 4, 10), dim=-1)
    expected = torch.nn.functional.cross_entropy(
        log_probs[valid], targets[valid], label_smoothing=0.1, reduction="mean"
    )
    torch.testing.assert_close(losses.attention(log_probs, targets, valid, 0.1), expected)


def test_greedy_and_word_errors():
    assert collapse([0, 5, 5, 0, 5, 6, 0]) == [5, 5, 6] and collapse([]) == []
    assert word_errors("a b c".split(), "a x c d".split()) == 2 and word_errors([], ["a"]) == 1


def test_folder_round_trip(tmp_path):
    class Symbols:
        model = b"bpe"

        def lines(self):
            return "<blank> 0\n"

    config = tiny(20, 0.1, False)
    model = Model(config)
    mean = torch.randn(80)
    write_folder(tmp_path / "m", config, model.state_dict(), Symbols(), mean, torch.ones(80))
    read, bpe, read_mean, _ = read_folder(tmp_path / "m")
    assert bpe == b"bpe" and read.config == config
    torch.testing.assert_close(read_mean, mean)
    for name, value in read.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name].half().float())
    broken = {name: torch.full_like(value, 1e6) for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        write_folder(tmp_path / "m", config, broken, Symbols(), mean, torch.ones(80))
    assert read_folder(tmp_path / "m")[0].config == config  # the older folder is still whole
    write_folder(tmp_path / "eight", config, model.state_dict(), Symbols(), mean, torch.ones(80), bits=8)
    for name, value in read_folder(tmp_path / "eight")[0].state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0.01, atol=0.01)
    with pytest.raises(ValueError, match="not finite"):
        write_folder(tmp_path / "eight", config, broken, Symbols(), mean, torch.ones(80), bits=8)


def test_compact_model_fits_the_package():
    with torch.device("meta"):
        size = sum(p.numel() for p in Model(compact(384, 0.1, False)).parameters())
    assert 2 * size < 38.5e6


def test_ctc_ignores_padding():
    log_probs = torch.log_softmax(torch.randn(1, 12, 8), dim=-1)
    tokens = torch.tensor([[2, 3, 0]])
    alone = ctc(log_probs[:, :9], tokens[:, :2], torch.tensor([9]), torch.tensor([2]))
    padded = ctc(log_probs, tokens, torch.tensor([9]), torch.tensor([2]))
    torch.testing.assert_close(alone, padded)
    assert ops.subsampled_lengths(torch.tensor([41]), ((3, 2), (3, 2))).item() == 9


def test_average_of_checkpoints(tmp_path):
    """The mean of the weights, and models of other runs refused."""
    units = StoredUnits(b"bpe", "<blank> 0\n")
    mean, states = torch.randn(80), []
    for seed in range(3):
        torch.manual_seed(seed)
        model = Model(tiny(30, 0.1, False))
        states.append(model.state_dict())
        write_folder(tmp_path / f"{seed}", model.config, states[-1], units, mean, torch.ones(80))
    average(tmp_path / "mean", [tmp_path / "0", tmp_path / "1", tmp_path / "2"], bits=16)
    for name, value in read_folder(tmp_path / "mean")[0].state_dict().items():
        torch.testing.assert_close(value, sum(s[name] for s in states) / 3, rtol=2e-3, atol=1e-3)
    assert (tmp_path / "mean" / "units.txt").read_text() == (tmp_path / "0" / "units.txt").read_text()
    average(tmp_path / "level", [tmp_path / "0"], level_compression=0.35)
    assert read_folder(tmp_path / "level")[0].config.fbank.level_compression == 0.35
    write_folder(tmp_path / "1", model.config, states[1], units, mean + 1, torch.ones(80))
    with pytest.raises(ValueError, match="not of the same run"):
        average(tmp_path / "mean", [tmp_path / "0", tmp_path / "1"])
