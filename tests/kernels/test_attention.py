from itertools import product

import pytest
import torch

from m3asr import ops
from m3asr.kernels.attention import attention
from m3asr.kernels.pieces import Tile

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def cases():
    """All of them on a GPU; the interpreter, which is slow, takes each value of each parameter."""
    for frames, head_width, chunk, dtype in product([1, 21, 40], [16, 24], [None, (4, 40), (5, 1), (16, 0)], TYPES):
        exact = dtype == torch.float32 and (frames, head_width) in ((21, 16), (40, 24))
        half = (frames, head_width) == (40, 24) and chunk in ((None,) if dtype == torch.float16 else (None, (5, 1)))
        short = (frames, head_width, chunk, dtype) == (1, 24, None, torch.float32)
        marks = () if exact or half or short else pytest.mark.gpu
        yield pytest.param(dtype, frames, head_width, chunk, marks=marks, id=f"{dtype}-{frames}-{head_width}-{chunk}")


@pytest.mark.parametrize("dtype, frames, head_width, chunk", list(cases()))
def test_attention(device, options, check, poisoned, tile, dtype, frames, head_width, chunk):
    heads, batch = 2, 3
    width = heads * head_width
    lengths = torch.tensor([frames, max(frames - 3, 1), 0], dtype=torch.int32, device=device)
    qkv = torch.randn(batch, frames, 3 * width, device=device).to(dtype)
    # What stands in keys and values past the length must not matter.
    for b, length in enumerate(lengths.tolist()):
        qkv[b, length:, width:] = float("nan")
    key_bias = torch.randn(heads, 64, device=device)
    out = poisoned(batch, frames, width, dtype=dtype)
    attention(
        qkv, lengths, out, heads=heads, tile=tile(16, 16), key_bias=key_bias, chunk=chunk, **options(dtype)
    )  # fmt: skip
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2).double() for t in qkv.nan_to_num(0.0).chunk(3, dim=-1))
    mask = ops.frame_mask(lengths, frames)[:, None, None, :]
    if chunk:
        mask = mask & ops.chunk_mask(frames, *chunk, device=device)
    scores = q @ k.transpose(-2, -1) + key_bias[:, None, :frames].double()
    weights = torch.softmax((scores / head_width**0.5).masked_fill(~mask, -1e30), -1).masked_fill(~mask, 0.0)
    reference = (weights @ v).transpose(1, 2).flatten(2)
    for b, length in enumerate(lengths.tolist()):
        assert torch.isfinite(out[b]).all()
        if length:
            check(out[b, :length], reference[b, :length], dtype)
    assert not out[2].any()


def test_the_folded_positions_are_the_checkpoints_scores(device, options, check, poisoned, tile):
    """Through the packing's identity: (q+u)(k+p) + (v-u)p is attention over `ops.rel_pos_keys`."""
    batch, frames, heads, head_width = 2, 13, 2, 16
    q, k, v = torch.randn(3, batch, heads, frames, head_width, device=device)
    p = torch.randn(1, heads, frames, head_width, device=device)
    u, w = torch.randn(2, heads, head_width, device=device)
    lengths = torch.tensor([13, 6], dtype=torch.int32, device=device)
    mask = ops.frame_mask(lengths, frames)[:, None, None, :]
    keys, key_bias = ops.rel_pos_keys(k, p, u, w)
    reference = ops.attention(q, keys, v, mask, key_bias).transpose(1, 2).flatten(2)
    qkv = torch.cat([t.transpose(1, 2).flatten(2) for t in (q + u[:, None], k + p, v)], dim=-1)
    key_bias = torch.einsum("hsk,hk->hs", p[0], w - u).contiguous()
    out = poisoned(batch, frames, heads * head_width)
    attention(qkv, lengths, out, heads=heads, tile=tile(16, 16), key_bias=key_bias, **options(torch.float32))
    for b, length in enumerate(lengths.tolist()):
        check(out[b, :length], reference[b, :length], factor=2.0)


@pytest.mark.parametrize("frames, columns, biased", [(1, 16, True), (40, 16, True), (40, 32, True), (40, 16, False)])
def test_attention_to_copied_operands(device, options, check, poisoned, frames, columns, biased):
    """What stands past a length must not matter: large numbers, those of the next utterance, nothing after the last."""
    heads, head_width, dtype = 2, 32, torch.float16
    lengths = torch.tensor([frames, max(frames - 3, 1), 0, max(frames - 9, 1)], dtype=torch.int32, device=device)
    qkv = torch.randn(4, frames, 3 * heads * head_width, device=device).to(dtype)
    for b, length in enumerate(lengths.tolist()):
        qkv[b, length:] = 6e4
    key_bias = torch.randn(heads, 64, device=device) if biased else None
    out = poisoned(4, frames, heads * head_width, dtype=dtype)
    tile = Tile(64 if device.type == "cuda" else 16, columns, warps=4, stages=2, copied=1)
    attention(qkv, lengths, out, heads=heads, tile=tile, key_bias=key_bias, **options(dtype))
    for b, length in enumerate(lengths.tolist()):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1).double() for t in qkv[b, :length].chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) + (key_bias[:, None, :length].double() if biased else 0.0)
        reference = (torch.softmax(scores / head_width**0.5, -1) @ v).transpose(0, 1).flatten(1)
        assert torch.isfinite(out[b]).all()
        if length:
            check(out[b, :length], reference, dtype)
    assert not out[2].any()
