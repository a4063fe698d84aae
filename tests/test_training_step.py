"""The step that training takes: its kernels and their gradients, the blocks against the model, captured steps."""

import copy
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from m3asr.model import Model  # noqa: E402
from training import blocks, losses, moe  # noqa: E402
from training.augment import Augment, AugmentConfig  # noqa: E402
from training.captured import Captured  # noqa: E402
from training.data import Texts  # noqa: E402
from training.kernels import activation, adain, ctc, depthwise, norm, subsampling  # noqa: E402
from training.kernels.random import Seed  # noqa: E402
from training.network import tiny  # noqa: E402
from training.optimizer import Optimizer  # noqa: E402


def check(device, kernel, reference, inputs, tolerance=1e-5):
    """Values and gradients of `kernel` on the device against `reference` on the CPU, for the same random cotangents."""
    ours = [x.detach().to(device).requires_grad_(x.requires_grad) for x in inputs]
    got, expected = kernel(*ours), reference(*inputs)
    got, expected = ([x] if torch.is_tensor(x) else list(x) for x in (got, expected))
    cotangents = [torch.randn_like(x) for x in expected]
    wanted = [i for i, x in enumerate(inputs) if x.requires_grad]
    total = sum((x * c.to(device)).sum() for x, c in zip(got, cotangents, strict=True))
    total_expected = sum((x * c).sum() for x, c in zip(expected, cotangents, strict=True))
    got += torch.autograd.grad(total, [ours[i] for i in wanted])
    expected += torch.autograd.grad(total_expected, [inputs[i] for i in wanted])
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert (a.cpu() - b).norm() <= tolerance * b.norm().clamp(min=1e-6)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
@pytest.mark.parametrize("size", [3, 2047, 4500])
def test_instance_norm_with_snake(device, dtype, tolerance, size):
    x, gain, offset = 3 + torch.randn(2, 5, size), torch.randn(2, 5), torch.randn(2, 5)
    x, gain, offset, alpha = (v.to(dtype) for v in (x, gain, offset, 0.2 + torch.rand(5)))
    got = adain.fused(*(v.to(device) for v in (x, gain, offset, alpha))).cpu().float()
    expected = adain.reference(*(v.float() for v in (x, gain, offset, alpha)))
    assert got.shape == expected.shape and (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_residual_norm(device, silu, added):
    layer, seed = nn.LayerNorm(40), Seed(device, 3)

    def kernel(x, w, b, y=None):
        return norm._ResidualNorm.apply(x, y, w, b, seed.value, 0.5, 0.0, 1, 1e-5, silu, torch.float32)

    def reference(x, w, b, y=None):
        s = x if y is None else x + 0.5 * y
        n = F.layer_norm(s, (40,), w, b, layer.eps)
        return s, F.silu(n) if silu else n

    check(device, kernel, reference, [leaf(3, 37, 40), leaf(40), leaf(40)] + [leaf(3, 37, 40)] * added)


def test_dropout_drops_its_share_and_its_gradient_the_same_elements(device):
    seed, layer = Seed(device, 1), nn.LayerNorm(64).to(device)
    y = torch.ones(40, 64, device=device, requires_grad=True)

    def drop():
        settings = (seed.value, 1.0, 0.25, seed.salt(), 1e-5, False, torch.float32)
        return norm._ResidualNorm.apply(torch.zeros_like(y), y, layer.weight, layer.bias, *settings)[0]

    first, second = drop(), drop()
    assert 0.2 < (first == 0).float().mean() < 0.3 and first.max().item() == pytest.approx(1 / 0.75)
    assert not torch.equal(first, second)  # another salt
    assert torch.equal(torch.autograd.grad(first.sum(), y)[0], first)
    x = torch.ones(40, 64, device=device, requires_grad=True)
    dropped = activation._Silu.apply(x, seed.value, 0.25, 3, None, 0)
    assert torch.equal(torch.autograd.grad(dropped.sum(), x)[0] == 0, dropped == 0)
    before = activation._Silu.apply(x, seed.value, 0.25, 3, None, 0)
    seed.advance()
    assert torch.equal(before, dropped)
    assert not torch.equal(activation._Silu.apply(x, seed.value, 0.25, 3, None, 0), before)


def test_activations(device):
    check(device, lambda x: activation._Silu.apply(x, None, 0.0, 0, None, 0), F.silu, [leaf(3, 700)])
    expert = torch.tensor([[0, 3, 1, 1, 2]])
    check(
        device,
        lambda x: activation._Silu.apply(x, None, 0.0, 0, expert.int().to(device), 4),
        lambda x: activation.silu_chosen(x, expert, 4),
        [leaf(1, 5, 4 * 24)],
    )
    frames = torch.tensor([[True, True, False], [True, False, False]])
    check(
        device,
        lambda x: activation._Glu.apply(x, frames.to(torch.int8).to(device)),
        lambda x: activation.masked_glu(x, frames),
        [leaf(2, 3, 2 * 40)],
    )


@pytest.mark.parametrize("frames", [1, 5, 37, 150])  # 150: three spans of the filter's gradient
@pytest.mark.parametrize("causal", [False, True])
def test_depthwise(device, frames, causal):
    def run(function, left):
        return lambda x, w, b, *edge: function(x, w, b, left, *(edge or (None,)))

    left, inputs = (14, [leaf(72)]) if causal else (7, [])
    kernel, reference = (run(f, left) for f in (depthwise._Depthwise.apply, depthwise.depthwise))
    check(device, kernel, reference, [leaf(2, frames, 72), leaf(72, 15), leaf(72), *inputs])


@pytest.mark.parametrize("channels", [24, 64])
def test_first_convolution(device, channels):
    features = torch.randn(2, 21, 80)
    check(
        device,
        lambda w, b: subsampling._FirstConvolution.apply(features.to(device), w, b, torch.float32),
        lambda w, b: subsampling.first_convolution(features, w, b, torch.float32),
        [leaf(channels, 1, 3, 3), leaf(channels)],
    )


def test_ctc(device):
    """Repeated labels, a row without labels, one that just fits, one that does not (it counts nothing), padding."""
    tokens = torch.randint(1, 11, (5, 9))
    tokens[0] = 3
    tokens[1, 3] = tokens[1, 2]
    lengths, token_lengths = torch.tensor([30, 22, 5, 13, 17]), torch.tensor([9, 7, 9, 0, 9])
    tokens[4] = 5  # 9 labels and 8 blanks between them: 17 frames, no other way
    given = [x.to(device) for x in (tokens, lengths.int(), token_lengths.int())]
    check(
        device,
        lambda x: ctc._Ctc.apply(torch.log_softmax(x, dim=-1), *given),
        lambda x: ctc.ctc(torch.log_softmax(x, dim=-1), tokens, lengths, token_lengths),
        [leaf(5, 30, 11)],
        tolerance=3e-5,
    )
    x = torch.randn(5, 30, 11, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(ctc._Ctc.apply(torch.log_softmax(x, dim=-1), *given).sum(), x)
    assert not gradient[2].any() and not gradient[1, 22:].any()


def pair(seed: Seed, streaming=False):
    torch.manual_seed(1)
    model = Model(tiny(50, 0.0, streaming))
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    trained = copy.deepcopy(model).to(seed.value.device)
    moe.install(model)
    routing = moe.install(trained)
    blocks.install(trained, seed)
    return model, trained, routing


@pytest.mark.parametrize("chunk", [None, 0, 1, 6, 25])
def test_blocks_equal_the_model(chunk):
    """On the CPU: the same forward and the same gradients, padding apart; None: no streaming model."""
    model, trained, _ = pair(Seed(torch.device("cpu"), 1), chunk is not None)
    features, lengths = torch.randn(3, 100, 80), torch.tensor([95, 77, 50], dtype=torch.int32)
    hidden, out_lengths = model.encode(features, lengths, chunk or 0)
    ours, _ = trained.encode(features, lengths, chunk or 0)
    valid = torch.arange(hidden.shape[1]) < out_lengths.unsqueeze(-1)
    torch.testing.assert_close(ours[valid], hidden[valid], rtol=1e-5, atol=1e-5)
    tokens = torch.randint(2, 40, (3, 9))
    expected, got = model.decode(hidden, out_lengths, tokens)[0], trained.decode(ours, out_lengths, tokens)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(got)
    (expected * cotangent).sum().backward()
    (got * cotangent).sum().backward()
    largest = max(p.grad.norm() for p in model.parameters() if p.grad is not None)
    for (name, p), q in zip(model.named_parameters(), trained.parameters(), strict=True):
        if p.grad is not None:
            assert (p.grad - q.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6 * largest, name


@pytest.mark.gpu
@pytest.mark.parametrize("streaming", [False, True])
def test_captured_steps_equal_launched_ones(streaming):
    """Three shapes in turn, dropout off: losses step by step as without graphs, and near the model's own on the CPU.

    A streaming model's chunk changes from step to step, and the graph follows; two views are compared in both.
    """
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device, runs = torch.device("cuda"), []
    for captured in (True, False):
        model, trained, routing = pair(Seed(device, 1), streaming)
        optimizer = Optimizer(trained, 0.01, True)
        optimizer.lr.fill_(2e-3)

        def update(features, lengths, *targets, trained=trained, routing=routing, optimizer=optimizer):
            optimizer.zero_grad()
            *inputs, chunk = features, lengths, *targets
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss, parts, _ = losses.batch_loss(trained, routing, *inputs, losses.LossWeights(), None, chunk, 2)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step(torch.isfinite(norm))
            return parts, norm.detach()

        step, seen = Captured(update, device) if captured else update, []
        for number in range(9):
            generator = torch.Generator().manual_seed(number % 3)
            frames = (100, 160, 260)[number % 3]
            features = torch.randn(4, frames, 80, generator=generator)
            lengths = torch.tensor([frames, frames - 3, frames // 2, frames], dtype=torch.int32)
            tokens, token_lengths = torch.randint(2, 40, (4, 12), generator=generator), torch.tensor([5, 12, 3, 8])
            if number == 0:
                inputs = (features, lengths, tokens, token_lengths)
                routing_there = moe.install(model)
                first = losses.batch_loss(model, routing_there, *inputs, losses.LossWeights(), None, 7, 2)[1]
            chunk = torch.full((), (7, 0, 3)[number % 4 % 3], device=device)
            seen.append(step(*(x.to(device) for x in (features, lengths, tokens, token_lengths)), chunk)[0].cpu())
        assert not captured or len(step.graphs) == 3
        runs.append(torch.stack(seen))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(runs[0][0], first, rtol=2e-2, atol=1e-3)
    assert (runs[0][6:, 0] < runs[0][:3, 0]).all()  # the same three batches, twice learnt


def test_two_views_are_drawn_together():
    """Nothing where they agree; else their divergence, with a gradient for the view that moves, and padding none."""
    torch.manual_seed(1)
    logits, valid = torch.randn(2, 3, 5, 7), torch.arange(5) < torch.tensor([[5], [3], [1]])
    same = torch.log_softmax(logits[:1].expand(2, -1, -1, -1), dim=-1)
    assert losses.consistency(same, valid) == 0
    logits.requires_grad_()
    p, q = torch.log_softmax(logits, dim=-1)
    total = losses.consistency(torch.stack((p, q)), valid)
    each = (q.exp() * (q - p) + p.exp() * (p - q)).sum(dim=-1)
    torch.testing.assert_close(total, each[valid].sum())
    (gradient,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient[0][valid], (p.exp() - q.exp())[valid])
    assert not gradient[:, ~valid].any()


def test_views_share_their_tempo_and_nothing_else():
    augment = Augment(AugmentConfig(tempo=0.4), torch.device("cpu"), 1)
    features = torch.arange(200.0).view(1, 200, 1).expand(6, -1, 80)
    warped = augment.warp_time(features, torch.full((6,), 200), views=2)
    assert torch.equal(warped[:3], warped[3:]) and not torch.equal(warped[0], warped[1])
    masked = augment.mask(torch.ones(6, 200, 80), torch.full((6,), 200))
    assert not torch.equal(masked[:3], masked[3:])


def test_blur_stays_within_an_utterance():
    augment = Augment(AugmentConfig(smear=0.5), torch.device("cpu"), 1)
    features = torch.randn(4, 50, 80).cumsum(dim=1)
    features[:, 30:] = torch.nan  # padding
    blurred = augment.blur(features, torch.full((4,), 30))[:, :30]
    assert blurred.isfinite().all()
    changed = (blurred != features[:, :30]).any(dim=(1, 2))
    assert changed.sum() == 2
    assert (blurred.diff(dim=1).square().mean(dim=(1, 2)) < features[:, :30].diff(dim=1).square().mean(dim=(1, 2)))[
        changed
    ].all()


def test_text_alone_teaches_the_decoder():
    """Lines nobody spoke: a loss of their own, gradients for the decoder and none for the encoder."""

    class Letters:
        @staticmethod
        def encode(text):
            return [ord(letter) - 95 for letter in text if letter != " "]

    texts = Texts(["a b", "much too long a line", "", "ccc"], Letters(), torch.device("cpu"), 1, rows=5, labels=4)
    tokens, lengths = texts.draw()
    assert tokens.shape == (5, 4) and set(lengths.tolist()) <= {2, 3} and len(texts.lengths) == 2
    model, trained, routing = pair(Seed(torch.device("cpu"), 1))
    features, frames = torch.randn(2, 60, 80), torch.tensor([60, 50], dtype=torch.int32)
    spoken = torch.tensor([[3, 4, 0], [5, 6, 7]]), torch.tensor([2, 3])
    weights = losses.LossWeights()
    without = losses.batch_loss(trained, routing, features, frames, *spoken, weights)[1]
    total, parts, _ = losses.batch_loss(trained, routing, features, frames, *spoken, weights, (tokens, lengths))
    text = losses.NAMES.index("text")
    assert without[text] == 0 and parts[text] > 0
    assert total.item() == pytest.approx(without[0].item() + weights.text * parts[text].item(), rel=1e-5)
    losses.unheard(trained, tokens, lengths, 0.1).backward()
    assert trained.decoder.decoders[0].self_attn.linear_q.weight.grad.any()
    assert all(p.grad is None for p in trained.encoder.parameters())
