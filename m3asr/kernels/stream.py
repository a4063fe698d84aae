"""The residual stream of many tokens in 24 bits a number, where float32 would be read and written at the memory's rate.

`raw` is in the compute type, so that a product multiplies it as it stands; `low` has 8 bits more. In bfloat16 both are
the upper 24 bits of a float32, rounded to the nearest; in float16, which holds x / 16, `low` is the upper byte of
another float16: 2048 times what the first rounds away. kernels/clusters/stream.cu has the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, at_least_16, mean_of, normalise, release, wait


@dataclass(frozen=True)
class Stream:
    """A residual stream (N, D): `raw` bfloat16 or float16, `low` int8; and what a norm of it takes: of each part of a
    row's columns mean and sum of squares, float32 (parts, N, 2), if a norm is what comes next.
    """

    raw: torch.Tensor
    low: torch.Tensor
    parts: torch.Tensor | None = None


@triton.jit
def joined(raw, low):
    """Float32 of both."""
    if raw.dtype == tl.bfloat16:
        bits = (raw.to(tl.int16, bitcast=True).to(tl.int32) << 16) + (low.to(tl.int32) << 8)
        x = bits.to(tl.float32, bitcast=True)
    else:
        rest = (low.to(tl.int16) << 8).to(tl.float16, bitcast=True)
        x = (raw.to(tl.float32) + rest.to(tl.float32) * (1.0 / 2048)) * 16.0
    return x


@triton.jit
def split(x, TYPE: tl.constexpr):
    """raw, low of float32 x."""
    if TYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True) + 0x80
        raw = ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        low = (bits >> 8).to(tl.int8)
    else:
        raw = (x * 0.0625).to(tl.float16)
        rest = ((x * 0.0625 - raw.to(tl.float32)) * 2048.0).to(tl.float16)
        low = ((rest.to(tl.int16, bitcast=True) + 0x80) >> 8).to(tl.int8)
    return raw, low


@triton.jit
def _stream_kernel(
    x_ptr,
    raw_ptr,
    low_ptr,
    parts_ptr,
    more_ptr,
    slot_ptr,
    w_ptr,
    b_ptr,
    tokens,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPENS: tl.constexpr,
    CLOSES: tl.constexpr,
    MORE: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    d_in = d < WIDTH
    if not OPENS and not CLOSES:
        w, b = tl.load(w_ptr + d, mask=d_in, other=0.0), tl.load(b_ptr + d, mask=d_in, other=0.0)
    wait(PDL)
    at = rows.to(tl.int64)[:, None] * WIDTH + d[None, :]
    mask = (rows < tokens)[:, None] & d_in[None, :]
    if OPENS:
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
    else:
        raw, low = tl.load(raw_ptr + at, mask=mask, other=0.0), tl.load(low_ptr + at, mask=mask, other=0)
        x = joined(raw, low)
    if MORE:
        slot = tl.load(slot_ptr + rows, mask=rows < tokens, other=-1)
        more_at = more_ptr + slot.to(tl.int64)[:, None] * WIDTH + d[None, :]
        x += tl.load(more_at, mask=(slot >= 0)[:, None] & d_in[None, :], other=0.0).to(tl.float32)
    if CLOSES:
        tl.store(x_ptr + at, x, mask=mask)
    else:
        if not OPENS:
            x = normalise(x, d_in[None, :], WIDTH, eps) * w[None, :] + b[None, :]
        mean = mean_of(tl.sum(x, axis=1), WIDTH)
        away = tl.where(d_in[None, :], x - mean[:, None], 0.0)
        tl.store(parts_ptr + 2 * rows, mean, mask=rows < tokens)
        tl.store(parts_ptr + 2 * rows + 1, tl.sum(away * away, axis=1), mask=rows < tokens)
        raw, low = split(x, raw_ptr.dtype.element_ty)
        tl.store(raw_ptr + at, raw, mask=mask)
        tl.store(low_ptr + at, low, mask=mask)


def _launch(x, stream: Stream, tile: Tile, pdl: bool, more=None, norm=None, **which) -> None:
    tokens, width = stream.raw.shape
    rows, slot = more or (stream.raw, stream.raw)
    w, b, eps = norm or (stream.raw, stream.raw, 0.0)
    _stream_kernel[(triton.cdiv(tokens, tile.m),)](
        x,
        stream.raw,
        stream.low,
        stream.raw if stream.parts is None else stream.parts,
        rows,
        slot,
        w,
        b,
        tokens,
        eps,
        WIDTH=width,
        BLOCK_M=tile.m,
        BLOCK_D=at_least_16(width),
        MORE=more is not None,
        PDL=pdl,
        **which,
        **tile.options(pdl),
    )


def _parts(x) -> torch.Tensor:
    return torch.empty(1, x.shape[0], 2, device=x.device)


def to_stream(x, dtype: torch.dtype, *, tile: Tile, pdl=False) -> Stream:
    """x float32 (N, D) as a stream whose raw numbers are of type dtype."""
    stream = Stream(torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=torch.int8), _parts(x))
    _launch(x, stream, tile, pdl, OPENS=True, CLOSES=False)
    return stream


def norm_stream(stream: Stream, weight, bias, *, eps, tile: Tile, more=None, pdl=False) -> Stream:
    """The layer norm of a stream, in its place, weight and bias float32 (D,).

    more = (rows (slots, D) of a 16-bit type, token_slot int32 (N,)): the row of each token's slot, if it has one and
    not -1, is added first.
    """
    normed = replace(stream, parts=_parts(stream.raw))
    _launch(stream.raw, normed, tile, pdl, more, (weight, bias, eps), OPENS=False, CLOSES=False)
    return normed


def from_stream(stream: Stream, x, *, tile: Tile, more=None, pdl=False) -> None:
    """x float32 (N, D) = the stream and what `more` adds to it, see `norm_stream`."""
    _launch(x, stream, tile, pdl, more, OPENS=False, CLOSES=True)
