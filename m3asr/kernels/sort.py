"""A counting sort of tokens by their expert, on the device.

It gives every expert a run of slots padded to whole tiles, so a tile belongs to one expert (kernels/expert_product.py).
The number of tiles is not known to the host: there is room for the most there can be, and those without an expert say
so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, release, wait


@triton.jit
def _place(
    expert_ptr, slot_token_ptr, token_slot_ptr, expert, begin, end, done, BLOCK_T: tl.constexpr, BACK: tl.constexpr
):  # fmt: skip
    """The expert's tokens from `begin` to `end` into slots from `done` on -> the slot behind the last."""
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        chosen = tl.load(expert_ptr + t, mask=t < end, other=-1)
        here = chosen == expert
        rank = tl.cumsum(here.to(tl.int32), axis=0) - 1
        tl.store(slot_token_ptr + done + rank, t, mask=here)
        if BACK:
            # The first expert's programs say of whom nobody has.
            tl.store(
                token_slot_ptr + t, tl.where(here, done + rank, -1), mask=here | ((chosen + expert == -1) & (t < end))
            )
        done += tl.sum(here.to(tl.int32), axis=0)
    return done


@triton.jit
def _close(
    slot_token_ptr, tile_expert_ptr, expert, used, before, mine, tiles, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """No token in the slots from `used` to the end of the expert's `mine` tiles, which stand behind `before`; whose
    tiles these are; and, by the last expert, that those behind are nobody's.
    """
    unused = used + tl.arange(0, BLOCK_M)
    tl.store(slot_token_ptr + unused, tl.full((BLOCK_M,), -1, tl.int32), mask=unused < (before + mine) * BLOCK_M)
    own = tl.arange(0, BLOCK_T)
    for start in range(0, mine, BLOCK_T):
        tl.store(tile_expert_ptr + before + start + own, expert + tl.zeros_like(own), mask=start + own < mine)
    if expert == EXPERTS - 1:
        for start in range(before + mine, tiles, BLOCK_T):
            tl.store(tile_expert_ptr + start + own, tl.full((BLOCK_T,), -1, tl.int32), mask=start + own < tiles)


@triton.jit
def _sort_kernel(
    expert_ptr,
    slot_token_ptr,
    token_slot_ptr,
    tile_expert_ptr,
    tokens,
    tiles,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BACK: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    expert = tl.program_id(0)
    wait(PDL)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        chosen = tl.load(expert_ptr + t, mask=t < tokens, other=-1)
        # Rows without an expert are counted in the last bin, which no expert has.
        counts += tl.histogram(tl.where(chosen < 0, BINS - 1, chosen), BINS)
    blocks = tl.where(bins < EXPERTS, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    before = tl.sum(tl.where(bins < expert, blocks, 0), axis=0)
    count = tl.sum(tl.where(bins == expert, counts, 0), axis=0)
    mine = (count + BLOCK_M - 1) // BLOCK_M
    done = before * BLOCK_M
    done = _place(expert_ptr, slot_token_ptr, token_slot_ptr, expert, 0, tokens, done, BLOCK_T, BACK)
    _close(slot_token_ptr, tile_expert_ptr, expert, done, before, mine, tiles, EXPERTS, BLOCK_M, BLOCK_T)


@triton.jit
def _counted_sort_kernel(
    expert_ptr,
    counts_ptr,
    slot_token_ptr,
    token_slot_ptr,
    tile_expert_ptr,
    tokens,
    tiles,
    counted,
    count_rows,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BACK: tl.constexpr,
    PDL: tl.constexpr,
):
    """`_sort_kernel` with a share of the tokens a program; counts (counted, EXPERTS), of count_rows tokens each."""
    release(PDL)
    expert, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    share = tl.cdiv(counted, parts)
    first = part * share
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    earlier = tl.zeros((BINS,), tl.int32)
    wait(PDL)
    for start in range(0, counted, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = (c < counted)[:, None] & (bins < EXPERTS)[None, :]
        found = tl.load(counts_ptr + c[:, None] * EXPERTS + bins[None, :], mask=mask, other=0)
        counts += tl.sum(found, axis=0)
        earlier += tl.sum(tl.where((c < first)[:, None], found, 0), axis=0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    before = tl.sum(tl.where(bins < expert, blocks, 0), axis=0)
    count = tl.sum(tl.where(bins == expert, counts, 0), axis=0)
    mine = (count + BLOCK_M - 1) // BLOCK_M
    done = before * BLOCK_M + tl.sum(tl.where(bins == expert, earlier, 0), axis=0)
    end = tl.minimum((first + share) * count_rows, tokens)
    _place(expert_ptr, slot_token_ptr, token_slot_ptr, expert, first * count_rows, end, done, BLOCK_T, BACK)
    if part == 0:
        used = before * BLOCK_M + count
        _close(slot_token_ptr, tile_expert_ptr, expert, used, before, mine, tiles, EXPERTS, BLOCK_M, BLOCK_T)


def most_tiles(tokens: int, experts: int, rows: int) -> int:
    """How many tiles of `rows` slots the worst routing needs: each expert may leave one tile part empty."""
    return min(tokens, triton.cdiv(tokens, rows) + experts)


def sort_tokens(
    expert_idx, slot_token, tile_expert, *, experts, rows, tile: Tile, counts=None, token_slot=None, pdl=False
) -> None:  # fmt: skip
    """expert_idx int32 (N,) -> slot_token int32 (tiles * rows,), tile_expert int32 (tiles,); -1 where there is none.

    Tokens of one expert keep their order. tiles = `most_tiles(N, experts, rows)`; slots of tiles without an expert
    are not written. token_slot int32 (N,), if given, gets each token's slot, -1 without an expert.
    counts = (what `router.route` counted, of so many tokens each): then tile.parts programs share an expert's work.
    """
    if counts is not None:
        _counted_sort_kernel[(experts, tile.parts)](
            expert_idx,
            counts[0],
            slot_token,
            expert_idx if token_slot is None else token_slot,
            tile_expert,
            expert_idx.numel(),
            tile_expert.numel(),
            counts[0].shape[0],
            counts[1],
            EXPERTS=experts,
            BINS=triton.next_power_of_2(experts),
            BLOCK_M=rows,
            BLOCK_T=tile.n,
            BLOCK_C=256,
            BACK=token_slot is not None,
            PDL=pdl,
            **tile.options(pdl),
        )
        return
    _sort_kernel[(experts,)](
        expert_idx,
        slot_token,
        expert_idx if token_slot is None else token_slot,
        tile_expert,
        expert_idx.numel(),
        tile_expert.numel(),
        EXPERTS=experts,
        BINS=triton.next_power_of_2(experts + 1),
        BLOCK_M=rows,
        BLOCK_T=tile.n,
        BACK=token_slot is not None,
        PDL=pdl,
        **tile.options(pdl),
    )


def slots(tokens: int, experts: int, rows: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty slot_token and tile_expert for `sort_tokens`."""
    tiles = most_tiles(tokens, experts, rows)
    return (
        torch.empty(tiles * rows, dtype=torch.int32, device=device),
        torch.empty(tiles, dtype=torch.int32, device=device),
    )
