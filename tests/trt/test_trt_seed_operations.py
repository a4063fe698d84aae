"""The operations that needed C++ plugins in the original TensorRT project, as plain layers from ordinary torch."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx")

import torch
import torch.nn.functional as F
from torch import nn

import m3asr.trt as trt

RANGES = {"B": (1, 2, 6), "T": (2, 20, 600)}
LENGTHS = trt.Input("int32", ("B",))


def frames(lengths, size):
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)


def softmax_topk(logits, lengths):
    """Top-1 of a softmax; padded rows are routed too, so no row is left unwritten and no index is garbage."""
    value, index = torch.max(torch.softmax(logits.float(), -1), -1)
    inside = frames(lengths, logits.shape[1])
    return value * inside, torch.where(inside, index, 0).to(torch.int32)


def att_masked_softmax(scores, lengths):
    inside = frames(lengths, scores.shape[-1])[:, None, None, :]
    weights = torch.softmax((scores * 0.125).masked_fill(~inside, -1e30), -1)
    return weights.masked_fill(~inside, 0.0)


def mask_conv2d_sample(lengths):
    return torch.div(lengths - 2 - 1, 2, rounding_mode="trunc") + 1


def masked_fill(x, lengths):
    return x.masked_fill(~frames(lengths, x.shape[-1]).unsqueeze(1), 0.5)


def rel_positional_encoding(x, table):
    return x * 16.0, table[:, : x.shape[1]]


def att_stream_softmax(scores, lengths):
    """Keys from `dropped` on, up to the utterance's length plus the cache."""
    key = torch.arange(scores.shape[-1])
    inside = (key >= 2) & (key < (lengths + 3).unsqueeze(-1))
    inside = inside[:, None, None, :]
    return torch.softmax(scores.masked_fill(~inside, -1e30), -1).masked_fill(~inside, 0.0)


def cat_split_cache(cache, x):
    both = torch.cat((cache, x), 1)
    return both, both[:, -cache.shape[1] :]


def cmvn(x, lengths, mean, istd):
    return torch.where(frames(lengths, x.shape[1]).unsqueeze(-1), (x - mean) * istd, 0.0)


def prior_prob(logits, bonus):
    return torch.log(torch.softmax(logits, -1) + 1e-20) + bonus


def experts_all_masked(x, index, w_1, b_1, w_2, b_2):
    """Every expert on every token, all but the chosen masked: no plugin, and nothing depends on the counts."""
    h = F.silu(torch.einsum("nd,edf->enf", x, w_1) + b_1.unsqueeze(1))
    y = torch.einsum("enf,efd->end", h, w_2) + b_2.unsqueeze(1)
    chosen = index.unsqueeze(0) == torch.arange(w_1.shape[0]).unsqueeze(1)
    return torch.where(chosen.unsqueeze(-1), y, 0.0).sum(0)


def f(*dims):
    return trt.Input("float32", dims)


OPERATIONS = {
    "fmoe_expert": (
        experts_all_masked,
        [f("T", 8), trt.Input("int32", ("T",)), f(5, 8, 12), f(5, 12), f(5, 12, 8), f(5, 8)],
    ),
    "softmax_topk": (softmax_topk, [f("B", "T", 12), LENGTHS]),  # 12 experts: no power of two
    "att_masked_softmax": (att_masked_softmax, [f("B", 2, "T", "T"), LENGTHS]),
    "mask_conv2d_sample": (mask_conv2d_sample, [LENGTHS]),
    "masked_fill": (masked_fill, [f("B", 4, "T"), LENGTHS]),
    "layer_norm": (nn.LayerNorm(6, eps=1e-3), [f("B", "T", 6)]),
    "glu": (lambda x: F.glu(x, 1), [f("B", 6, "T")]),
    "glu, last axis": (lambda x: F.glu(x, -1), [f("B", "T", 6)]),
    "rel_positional_encoding": (rel_positional_encoding, [f("B", "T", 8), f(1, 5000, 8)]),
    "att_stream_softmax": (att_stream_softmax, [f("B", 2, 4, "T"), LENGTHS]),
    "cat_split_cache": (cat_split_cache, [f("B", 7, 4), f("B", "T", 4)]),
    "cmvn": (cmvn, [f("B", "T", 6), LENGTHS, f(6), f(6)]),
    "prior_prob": (prior_prob, [f("B", "T", 9), f(9)]),
    "celu": (lambda x: F.celu(x, 0.7), [f("B", "T", 6)]),
}


def values(given, sizes):
    shape = [sizes.get(d, d) for d in given.dims]
    if given.dtype == "int32":
        return torch.randint(0, sizes["T"] + 1 if given is LENGTHS else 5, shape, dtype=torch.int32)
    return torch.randn(shape)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    function, given = OPERATIONS[name]
    network = trt.trace(function, {f"x{i}": g for i, g in enumerate(given)}, RANGES)
    for sizes in ({"B": 1, "T": 2}, {"B": 3, "T": 37}, {"B": 2, "T": 300}):  # past 128, 256 and odd
        inputs = [values(g, sizes) for g in given]
        with torch.no_grad():
            want = function(*inputs)
        want = [want] if isinstance(want, torch.Tensor) else want
        for got, w in zip(network.interpret(inputs).values(), want, strict=True):
            torch.testing.assert_close(got, w, rtol=1e-4, atol=1e-5)
    assert len(trt.serialize(network)) > 1000


def test_dump_tensor():
    """Looking into a network needs no layer in it: the interpreter hands out every intermediate by name."""
    network = trt.trace(nn.Sequential(nn.Linear(6, 4), nn.GELU()).eval(), {"x": f("B", 6)}, RANGES)
    seen = {}
    network.interpret([torch.randn(2, 6)], layers=seen)
    assert seen["0/linear/matrix_multiply"].shape == seen["1/gelu/activation"].shape == (2, 4)


def test_rows_that_made_nan():
    """A constant row in a norm (its eps is used), a row of very low scores, a row without any valid key."""
    norm = trt.trace(nn.LayerNorm(6, eps=1e-12), {"x": f("B", 6)}, RANGES)
    assert norm.interpret([torch.full((2, 6), 3.0)])["output0"].abs().max() == 0
    for precision in ("fp32", "fp16"):
        given = {f"x{i}": g for i, g in enumerate(OPERATIONS["att_masked_softmax"][1])}
        network = trt.trace(att_masked_softmax, given, RANGES, precision=precision)
        scores = torch.randn(2, 2, 300, 300) - 6e4
        got = network.interpret([scores, torch.tensor([300, 0], dtype=torch.int32)])["output0"]
        assert got.isfinite().all() and (got[1] == 0).all()
        torch.testing.assert_close(got[0].sum(-1), torch.ones(2, 300), rtol=1e-2, atol=1e-2)
