"""Rows by slot: the copy engine brings tiles of rows that lie one behind the other."""

from __future__ import annotations

import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, at_least_16, release, wait


@triton.jit
def _gather_kernel(
    a_ptr,
    slot_token_ptr,
    tile_expert_ptr,
    out_ptr,
    rows,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    slots = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    d_in = (d < WIDTH)[None, :]
    wait(PDL)
    if tl.load(tile_expert_ptr + tl.program_id(0) * BLOCK_M // rows) >= 0:
        token = tl.load(slot_token_ptr + slots)
        at = a_ptr + token.to(tl.int64)[:, None] * WIDTH + d[None, :]
        row = tl.load(at, mask=(token >= 0)[:, None] & d_in, other=0.0)
        tl.store(out_ptr + slots.to(tl.int64)[:, None] * WIDTH + d[None, :], row, mask=d_in)


def gather(a, slot_token, tile_expert, out, *, tile: Tile, pdl=False) -> None:
    """out (slots, D): row a[token] of the token of each slot, a (N, D) of the same type; zeros in the slots without one of
    tiles that have an expert. tile.m divides the slots of a tile. slot_token, tile_expert: of `sort_tokens`.
    """
    slots, width = out.shape
    _gather_kernel[(slots // tile.m,)](
        a,
        slot_token,
        tile_expert,
        out,
        slots // tile_expert.numel(),
        WIDTH=width,
        BLOCK_M=tile.m,
        BLOCK_D=at_least_16(width),
        PDL=pdl,
        **tile.options(pdl),
    )
