import pytest
import torch

from m3asr import ops
from m3asr.kernels.epilogue import Unnormed
from m3asr.kernels.linear import LIBRARY, linear
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
@pytest.mark.parametrize("k", [16, 32, 64, 0], ids=["k16", "k32", "more than there is", "library"])
@pytest.mark.parametrize("kind", ["swish", "table", "glu", "residual", "masked residual", "groups"])
def test_linear(device, options, check, poisoned, tile, dtype, k, kind):
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
    linear(a, weight, bias, out, tile=tile(k=k) if k else LIBRARY, **arguments, **options(dtype))
    # The library's product is rounded before its epilogue.
    check(out, reference, dtype, factor=1.0 if k else 2.0)
    if k == 16 and kind in ("swish", "groups"):
        # Programs that stay, more tiles than programs; float32, which they do not cover, goes the usual way.
        for staying in (Tile(64, 16, 32, stages=2, copied=1), Tile(16, 64, 32, stages=2, copied=1)):
            out = poisoned(*reference.shape, dtype=dtype)
            ahead = 32 if options(dtype)["pdl"] else 0
            linear(a, weight, bias, out, tile=staying, ahead=ahead, **arguments, **options(dtype))
            check(out, reference, dtype)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "hardtanh", "selu"])
def test_activations(device, options, check, poisoned, tile, activation):
    a, weight = torch.randn(18, 48, device=device), torch.randn(54, 48, device=device) / 7
    bias, out = torch.randn(54, device=device), poisoned(18, 54)
    linear(a, weight, bias, out, tile=tile(), activation=activation, **options(torch.float32))
    check(out, ops.ACTIVATIONS[activation](a.double() @ weight.double().t() + bias))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [16, 64], ids=["steps", "whole"])
@pytest.mark.parametrize("rows, copied, columns", [(16, 9, 16), (64, 9, 32), (16, 1, 64), (64, 1, 16)])
def test_a_norm_between_two_products(device, options, check, poisoned, dtype, k, rows, copied, columns):
    """What one product leaves of the stream the next one multiplies normalised: parts that do not divide the width,
    tiles past the last row, one for each program and more; rows beside zero, large ones, of equal numbers, and padded.
    """
    frames, width, inner, eps = 21, 48, 40, 1e-5
    tokens, tile = 2 * frames, Tile(rows, columns, k, stages=2, copied=copied)
    lengths = torch.tensor([21, 3], dtype=torch.int32, device=device)
    a = torch.randn(tokens, inner, device=device).to(dtype)
    weight = (torch.randn(width, inner, device=device) / 7).to(dtype)
    bias = torch.randn(width, device=device)
    x = torch.randn(tokens, width, device=device)
    x[-1] = 3.7  # and nothing is added to it
    x[2] += 2.0
    x[3] *= 1e4
    product = (a.double() @ weight.double().t() + bias).unflatten(0, (2, frames))
    valid = ops.frame_mask(lengths, frames).unsqueeze(-1)
    expected = x.double() + 0.5 * product.masked_fill(~valid, 0.0).flatten(0, 1)
    left = Unnormed(x, poisoned(tokens, width, dtype=dtype), poisoned(-(-width // columns), tokens, 2), columns)
    arguments = {"residual_scale": 0.5, "mask": (lengths, frames)}
    linear(a, weight, bias, x, tile=tile, leaves=left, **arguments, **options(dtype))
    check(x, expected)
    up = (torch.randn(2 * width, width, device=device) / 7).to(dtype)
    up_bias, sums = torch.randn(2 * width, device=device), up.float().sum(1)
    normed = torch.nn.functional.layer_norm(expected, (width,), eps=eps)
    table = torch.randn(frames, 2 * width // 3, device=device).to(dtype)
    for kind in ("swish", "table", "glu"):
        more = {"activation": "swish"} if kind == "swish" else {}
        more |= {"table": (table, frames)} if kind == "table" else {}
        more |= {"glu": (lengths, frames)} if kind == "glu" else {}
        reference = epilogue(
            normed @ up.double().t() + up_bias, more.get("activation", "none"), more.get("table"), more.get("glu")
        )
        out = poisoned(*reference.shape, dtype=dtype)
        linear(left, up, up_bias, out, tile=tile, sums=sums, eps=eps, **more, **options(dtype))
        check(out, reference, dtype)
        if kind != "glu":
            check(out[-1], reference[-1], dtype)  # of equal numbers nothing is left but the bias
