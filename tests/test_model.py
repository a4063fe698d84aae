"""The model against the original code's numbers and naive loops, and what it promises of batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import GOLDEN, GOLDEN_NAMES, relative_error
from random_model import VARIANTS, random_model

from m3asr import ops
from m3asr.checkpoint import read_checkpoint
from m3asr.config import EncoderConfig, ModelConfig
from m3asr.model import Model


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden(name):
    golden = np.load(GOLDEN / name / "golden.npz")
    checkpoint = read_checkpoint(GOLDEN / name)
    model = Model(checkpoint.config).eval()
    model.load_state_dict(checkpoint.state, strict=True)
    features = torch.from_numpy(golden["feats"] if "feats" in golden else golden["fbank"])
    with torch.no_grad():
        log_probs, hidden, lengths = model(features, torch.from_numpy(golden["feat_lens"]), compat=True)
        logits = model.encoder.out_linear(hidden)
    valid = golden["encoder_out_lens"]
    assert lengths.tolist() == valid.tolist()
    assert relative_error(hidden.numpy(), golden["encoder_hidden"], valid) < 1e-5
    if "ctc_log_probs" in golden:
        assert relative_error(log_probs.numpy(), golden["ctc_log_probs"], valid) < 1e-5
    else:
        assert relative_error(logits.numpy(), golden["encoder_out_nosm"], valid) < 1e-5


def test_golden_embedding_network():
    golden = np.load(GOLDEN / "3m-moe-80" / "golden.npz")
    checkpoint = read_checkpoint(GOLDEN / "3m-moe-80")
    model = Model(checkpoint.config).eval()
    model.load_state_dict(checkpoint.state)
    outputs = []
    model.encoder.embed.register_forward_hook(lambda module, args, hidden: outputs.append(module.out_linear(hidden)))
    with torch.no_grad():
        model(torch.from_numpy(golden["feats"]), torch.from_numpy(golden["feat_lens"]), compat=True)
    reference = golden["encoder_embed_out_nosm"]
    assert relative_error(outputs[0].detach().numpy(), reference, golden["encoder_out_lens"]) < 1e-5


def test_golden_chunks():
    golden = np.load(GOLDEN / "wenet-u2pp-80" / "golden.npz")
    checkpoint = read_checkpoint(GOLDEN / "wenet-u2pp-80")
    model = Model(checkpoint.config).eval()
    model.load_state_dict(checkpoint.state)
    size, left = golden["chunk"].tolist()
    features, lengths = torch.from_numpy(golden["fbank"]), torch.from_numpy(golden["feat_lens"])
    with torch.no_grad():
        hidden = model(features, lengths, size, left, compat=True)[1].numpy()
    assert relative_error(hidden, golden["chunk_hidden"], golden["encoder_out_lens"]) < 1e-5
    assert relative_error(hidden[:1], golden["stream_hidden"], golden["encoder_out_lens"][:1]) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_alone_equals_any_batch(variant):
    model = random_model(variant)
    shortest = model.config.encoder.min_frames
    lengths = torch.tensor([101, 78, 33, shortest, shortest - 1, 0], dtype=torch.int32)
    features = torch.randn(len(lengths), 101, model.config.encoder.input_dim)
    for i, length in enumerate(lengths):
        features[i, length:] = float("nan")  # padding is never read
    with torch.no_grad():
        log_probs, hidden, out_lengths = model(features, lengths)
        for i, length in enumerate(lengths[:4]):
            alone = model(features[i : i + 1, :length], lengths[i : i + 1])
            assert alone[2].tolist() == [alone[0].shape[1]] == [out_lengths[i]]
            for batched, single in zip((log_probs, hidden), alone, strict=False):
                assert relative_error(batched[i : i + 1].numpy(), single.numpy(), alone[2]) < 1e-5
    assert out_lengths[4:].tolist() == [0, 0]
    assert torch.isfinite(log_probs).all() and torch.isfinite(hidden).all()


@pytest.mark.parametrize("layer", ["conv2d", "conv2d6", "conv2d8"])
def test_lengths_against_masks(layer):
    """The two formulas are slices of a mask in the original codes; here they are arithmetic."""
    config = EncoderConfig(40, 32, 2, 1, 48, input_layer=layer)
    for frames in range(config.min_frames, 60):
        lengths = torch.arange(0, frames + 1)
        mask = lengths.unsqueeze(-1) > torch.arange(frames)
        modern, old = mask, mask
        for kernel, stride in config.subsampling:
            modern, old = modern[:, kernel - 1 :: stride], old[:, : -(kernel - 1) : stride]
        assert ops.subsampled_lengths(lengths, config.subsampling).tolist() == modern.sum(-1).tolist()
        assert ops.subsampled_lengths(lengths, config.subsampling, frames).tolist() == old.sum(-1).tolist()


@pytest.mark.parametrize("size,chunk,left", [(10, 3, -1), (10, 3, 0), (11, 4, 1), (5, 8, 2), (7, 0, -1), (1, 1, 0)])
def test_chunk_mask(size, chunk, left):
    mask = ops.chunk_mask(size, chunk, left)
    width = chunk if chunk > 0 else size
    for i in range(size):
        start = 0 if left < 0 or chunk <= 0 else max((i // width - left) * width, 0)
        expected = [start <= j < (i // width + 1) * width for j in range(size)]
        assert mask[i].tolist() == expected


def test_attention_over_rel_pos_keys_is_the_two_product_form():
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 3, 9, 8, dtype=torch.float64) for _ in range(3))
    p, u, w = torch.randn(1, 3, 9, 8, dtype=torch.float64), *torch.randn(2, 3, 8, dtype=torch.float64)
    mask = ops.frame_mask(torch.tensor([9, 4]), 9)[:, None, None]
    scores = (q + u[:, None]) @ k.transpose(-2, -1) + (q + w[:, None]) @ p.transpose(-2, -1)
    weights = (scores / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    # The softmax inside is float32 on purpose, hence not 1e-12.
    keys, key_bias = ops.rel_pos_keys(k, p, u, w)
    torch.testing.assert_close(ops.attention(q, keys, v, mask, key_bias), weights @ v, rtol=1e-5, atol=1e-6)


def test_attention_without_any_valid_key_is_zero():
    q = k = v = torch.randn(1, 1, 3, 4)
    assert (ops.attention(q, k, v, torch.zeros(1, 1, 1, 3, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize("routing", ["spread", "all-on-one", "some-empty"])
def test_moe_against_a_loop_over_tokens(routing):
    torch.manual_seed(2)
    x, w_1, b_1 = torch.randn(13, 6), torch.randn(5, 7, 6), torch.randn(5, 7)
    w_2, b_2 = torch.randn(5, 6, 7), torch.randn(5, 6)
    tokens = torch.arange(13)
    idx = {"spread": tokens % 5, "all-on-one": tokens * 0 + 3, "some-empty": tokens % 2 * 4}[routing]
    rows = [w_2[e] @ torch.relu(w_1[e] @ t + b_1[e]) + b_2[e] for t, e in zip(x, idx, strict=True)]
    torch.testing.assert_close(ops.moe(x, idx, w_1, b_1, w_2, b_2, "relu"), torch.stack(rows), rtol=1e-5, atol=1e-5)


def test_route_takes_the_first_of_equals():
    gate, idx = ops.route(torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0], [-1e9, -1e9, -1e9]]))
    assert idx.tolist() == [1, 0, 0]
    assert gate[1].item() == pytest.approx(1 / 3) and torch.isfinite(gate).all()


def test_config_survives_json():
    import json

    for variant in VARIANTS:
        config = random_model(variant).config
        assert ModelConfig.from_dict(json.loads(config.to_json())) == config
