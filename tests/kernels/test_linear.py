import pytest
import torch
import torch.nn.functional as F

from m3asr import ops
from m3asr.kernels.linear import LIBRARY, linear
from m3asr.kernels.norm_linear import norm_linear
from m3asr.kernels.pieces import Tile

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def epilogue(y, activation, table, glu):
    if glu:
        lengths, frames = glu
        y = (y[:, ::2] * torch.sigmoid(y[:, 1::2])).unflatten(0, (-1, frames))
        return y.masked_fill(~ops.frame_mask(lengths, frames).unsqueeze(-1), 0.0).flatten(0, 1)
    if table:
        values, frames = table
        third = y.shape[1] // 3
        position = torch.arange(y.shape[0], device=y.device) % frames
        y[:, third : 2 * third] += values.double()[position]
    return y if activation == "none" else ops.ACTIVATIONS[activation](y)


def added_to(reference, kind, lengths, frames, arguments):
    """A residual stream, and what becomes of it when half the product is added, masked if the kind says so."""
    stream = torch.randn(reference.shape, device=reference.device)
    arguments["residual_scale"] = 0.5
    if kind.startswith("masked"):
        arguments["mask"] = (lengths, frames)
        reference = reference.masked_fill(~ops.frame_mask(lengths, frames).flatten().unsqueeze(-1), 0.0)
    return stream, stream.double() + 0.5 * reference


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", ["swish", "relu", "gelu", "tanh", "hardtanh", "selu", "table", "glu", "prior"])
@pytest.mark.parametrize("parts", [1, 4])
def test_norm_linear(device, options, check, poisoned, tile, dtype, kind, parts):
    frames, width, columns = 7, 48, 51 if kind != "glu" else 40
    x = torch.randn(3 * frames, width, device=device) * 3 + 1
    out_columns = columns // 2 if kind == "glu" else columns
    weight = (torch.randn(columns, width, device=device) / 7).to(dtype)
    bias = torch.randn(columns, device=device)
    glu = (torch.tensor([7, 0, 4], dtype=torch.int32, device=device), frames) if kind == "glu" else None
    table = (torch.randn(20, columns // 3, device=device).to(dtype), frames) if kind == "table" else None
    activation = kind if kind in ops.ACTIVATIONS else "none"
    prior, reference = None, x.double()
    if kind == "prior":
        w, b = torch.randn(2, width, device=device)
        prior = (w, b, 1e-5, poisoned(*x.shape))
        reference = F.layer_norm(reference, (width,), w.double(), b.double(), 1e-5)
    expected_stream = reference
    reference = F.layer_norm(reference, (width,), eps=1e-12)
    reference = epilogue(reference @ weight.double().t() + bias, activation, table, glu)
    out = poisoned(len(x), out_columns, dtype=dtype)
    before = x.clone()
    norm_linear(
        x, weight, bias, out, eps=1e-12, tile=tile(parts=parts), activation=activation, table=table, glu=glu,
        prior=prior, **options(dtype),
    )  # fmt: skip
    check(out, reference, dtype)
    assert torch.equal(x, before)
    if prior:
        check(prior[3], expected_stream)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "k, parts", [(16, 1), (32, 1), (64, 1), (64, 4), (0, 1)], ids=["k16", "k32", "whole", "parts", "library"]
)
@pytest.mark.parametrize("kind", ["swish", "table", "glu", "residual", "masked residual", "groups"])
def test_linear(device, options, check, poisoned, tile, dtype, k, parts, kind):
    frames, width, columns = 9, 48, 54
    a = torch.randn(2 * frames, width, device=device).to(dtype)
    weight = (torch.randn(columns, width, device=device) / 7).to(dtype)
    bias = torch.randn(columns, device=device)
    lengths = torch.tensor([9, 3], dtype=torch.int32, device=device)
    arguments = {}
    if kind == "groups":
        a, weight = (torch.stack((t, t.flip(0))) for t in (a, weight))
        bias = torch.stack((bias, -bias))
        reference = a.double() @ weight.double().transpose(1, 2) + bias.unsqueeze(1)
    else:
        y = a.double() @ weight.double().t() + bias
        arguments["table"] = (
            (torch.randn(9, columns // 3, device=device).to(dtype), frames) if kind == "table" else None
        )
        arguments["glu"] = (lengths, frames) if kind == "glu" else None
        arguments["activation"] = "swish" if kind == "swish" else "none"
        reference = epilogue(y, arguments["activation"], arguments["table"], arguments["glu"])
    out = poisoned(*reference.shape, dtype=dtype)
    if "residual" in kind:
        out, reference = added_to(reference, kind, lengths, frames, arguments)
    linear(a, weight, bias, out, tile=tile(k=k, parts=parts) if k else LIBRARY, **arguments, **options(dtype))
    # The library's product is rounded before its epilogue.
    check(out, reference, dtype, factor=1.0 if k else 2.0)
    if k == 16 and kind in ("swish", "groups"):
        # Programs that stay, more tiles than programs; float32, which they do not cover, goes the usual way.
        for staying in (Tile(64, 16, 32, stages=2, copied=1), Tile(16, 64, 32, stages=2, copied=1)):
            out = poisoned(*reference.shape, dtype=dtype)
            ahead = 32 if options(dtype)["pdl"] else 0
            linear(a, weight, bias, out, tile=staying, ahead=ahead, **arguments, **options(dtype))
            check(out, reference, dtype)


@pytest.mark.parametrize("kind", ["swish", "table", "glu", "residual", "masked residual"])
@pytest.mark.parametrize("rows, stored", [(64, 1), (64, 2), (64, 4), (16, 2)])
def test_results_stored_by_copies(device, options, check, poisoned, kind, rows, stored):
    """More tiles than programs, tiles over several utterances and past the last, slices past the last column."""
    dtype, frames, width = torch.float16, 9, 48
    columns = 96 if kind == "table" else 80
    a = torch.randn(11 * frames, width, device=device).to(dtype)
    weight = (torch.randn(columns, width, device=device) / 7).to(dtype)
    bias = torch.randn(columns, device=device)
    lengths = torch.tensor([9, 3, 0, 1, 8, 9, 9, 5, 2, 9, 6], dtype=torch.int32, device=device)
    table = (torch.randn(20, columns // 3, device=device).to(dtype), frames) if kind == "table" else None
    glu = (lengths, frames) if kind == "glu" else None
    arguments = {"table": table, "glu": glu, "activation": "swish" if kind == "swish" else "none"}
    reference = epilogue(a.double() @ weight.double().t() + bias, arguments["activation"], table, glu)
    out = poisoned(*reference.shape, dtype=dtype)
    if "residual" in kind:
        out, reference = added_to(reference, kind, lengths, frames, arguments)
    tile, ahead = Tile(rows, 32 * stored, 32, stages=2, copied=1, stored=stored), 16 if options(dtype)["pdl"] else 0
    linear(a, weight, bias, out, tile=tile, ahead=ahead, **arguments, **options(dtype))
    check(out, reference, dtype)
