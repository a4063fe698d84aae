"""The experts of sorted tokens: a counting sort on the device, then one grouped matrix product a layer.

The sort gives every expert a run of slots padded to whole tiles, so a tile belongs to one expert. The number of tiles
is not known to the host: the grid is the most there can be, and tiles without an expert return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from m3asr.kernels.pieces import (
    Tile,
    activate,
    copyable,
    dot,
    multiprocessors,
    release,
    slices,
    storable,
    wait,
)


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


@triton.jit
def _experts_many_kernel(
    a_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    slot_token_ptr,
    tile_expert_ptr,
    gate_ptr,
    out_ptr,
    columns,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATHER: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    SCALED: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    wait(PDL)
    expert = tl.load(tile_expert_ptr + tl.program_id(1))
    if expert >= 0:
        slots = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        token = tl.load(slot_token_ptr + slots)
        used = (token >= 0)[:, None]
        col_in = (cols < columns)[:, None]
        rows = tl.where(token >= 0, token, 0) if GATHER else slots
        a_at = a_ptr + rows.to(tl.int64)[:, None] * WIDTH + k[None, :]
        w_at = w_ptr + expert.to(tl.int64) * columns * WIDTH + cols[:, None] * WIDTH + k[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            inside = (k + start < WIDTH)[None, :]
            a = tl.load(a_at + start, mask=used & inside, other=0.0)
            w = tl.load(w_at + start, mask=col_in & inside, other=0.0)
            acc = dot(a, tl.trans(w.to(a.dtype)), acc, DOT)
        if SCALED:
            acc *= tl.load(s_ptr + expert * columns + cols, mask=cols < columns, other=0.0)[None, :]
        acc += tl.load(b_ptr + expert * columns + cols, mask=cols < columns, other=0.0)[None, :]
        acc = activate(acc, ACTIVATION)
        if GATE:
            acc *= tl.load(gate_ptr + token, mask=token >= 0, other=0.0)[:, None]
        out_mask = used & (cols < columns)[None, :]
        out_at = out_ptr + (token if ADD else slots).to(tl.int64)[:, None] * columns + cols[None, :]
        if not GATHER:
            acc *= scale
        if ADD:
            acc += tl.load(out_at, mask=out_mask, other=0.0)
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _experts_persistent_kernel(
    a_ptr,
    a,
    w,
    out,
    b_ptr,
    slot_token_ptr,
    tile_expert_ptr,
    gate_ptr,
    out_ptr,
    tiles,
    columns,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLICES: tl.constexpr,
    GATHER: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    wait(PDL)
    # Few rows: the weights are the operand that the matrix unit wants 64 high.
    TURNED: tl.constexpr = BLOCK_M < 64
    SLICE: tl.constexpr = BLOCK_N // (SLICES if SLICES else 1)
    t = tl.arange(0, BLOCK_T)
    used_tiles = tl.sum((tl.load(tile_expert_ptr + t, mask=t < tiles, other=-1) >= 0).to(tl.int32), axis=0)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), used_tiles * tiles_n, tl.num_programs(0), flatten=True):
        row, col = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        expert = tl.load(tile_expert_ptr + tile // tiles_n)
        slots = row + tl.arange(0, BLOCK_M)
        token = tl.load(slot_token_ptr + slots)
        acc = tl.zeros((BLOCK_N, BLOCK_M) if TURNED else (BLOCK_M, BLOCK_N), tl.float32)
        if GATHER:
            a_at = a_ptr + tl.where(token >= 0, token, 0)[:, None] * WIDTH + tl.arange(0, BLOCK_K)[None, :]
        for start in range(0, WIDTH, BLOCK_K):
            weights = w.load([expert * columns + col, start])
            if GATHER and WIDTH % BLOCK_K == 0:
                rows_of_a = tl.load(a_at + start)
            elif GATHER:
                inside = start + tl.arange(0, BLOCK_K) < WIDTH
                rows_of_a = tl.load(a_at + start, mask=inside[None, :], other=0.0)
            else:
                rows_of_a = a.load([row, start])
            if TURNED:
                acc = dot(weights, tl.trans(rows_of_a), acc, DOT)
            else:
                acc = dot(rows_of_a, tl.trans(weights), acc, DOT)
        if TURNED:
            acc = tl.trans(acc)
        if GATE:
            gate = tl.load(gate_ptr + token, mask=token >= 0, other=0.0)
        parts = slices(acc, SLICES if SLICES else 1)
        for i in tl.static_range(SLICES if SLICES else 1):
            first = col + i * SLICE
            cols = first + tl.arange(0, SLICE)
            part = parts[i] + tl.load(b_ptr + expert * columns + cols, mask=cols < columns, other=0.0)[None, :]
            part = activate(part, ACTIVATION)
            if GATE:
                part *= gate[:, None]
            if not GATHER:
                part *= scale
            mask = (token >= 0)[:, None] & (cols < columns)[None, :]
            out_at = out_ptr + (token if ADD else slots).to(tl.int64)[:, None] * columns + cols[None, :]
            if SLICES and not ADD:
                out.store([row, first], part.to(out_ptr.dtype.element_ty))
            elif SLICES and out_ptr.dtype.element_ty == tl.float32:
                # The cache adds: one summand an element, so in no order, and the program waits for nothing.
                tl.atomic_add(out_at, part, mask=mask, sem="relaxed")
            else:
                if ADD:
                    part += tl.load(out_at, mask=mask, other=0.0)
                tl.store(out_at, part.to(out_ptr.dtype.element_ty), mask=mask)


def experts_many(
    a, weight, bias, slot_token, tile_expert, out, *, tile: Tile, activation="none", residual_scale=None, gate=None,
    weight_scale=None, by_slot=False, dot="ieee", pdl=False,
) -> None:  # fmt: skip
    """First layer: a (N, K) -> out (slots, C), rows by slot. With `residual_scale`, the second: a (slots, K), and
    out[token] += residual_scale * gate[token] * (weight[e] a[slot] + bias[e]), out out float32 (N, C), or, with
    `by_slot`, that summand alone, out (slots, C).

    weight (E, C, K) in the compute type, or float8 that counts times weight_scale float32 (E, C); bias float32 (E, C);
    slot_token, tile_expert from `sort_tokens` with rows = tile.m. Each token stands in one slot, so no two programs
    add to the same place.
    """
    experts, columns, width = weight.shape
    adds = residual_scale is not None and not by_slot
    assert slot_token.numel() == tile_expert.numel() * tile.m, "the tokens were sorted for another tile height"
    flat = weight.view(experts * columns, width)
    if tile.copied and copyable(a) and copyable(flat) and storable(out):
        most = triton.cdiv(columns, tile.n) * tile_expert.numel()
        _experts_persistent_kernel[(min(most, tile.copied * multiprocessors(a.device)),)](
            a,
            TensorDescriptor.from_tensor(a, [tile.m, tile.k]),
            TensorDescriptor.from_tensor(flat, [tile.n, tile.k]),
            TensorDescriptor.from_tensor(out, [tile.m, tile.n // max(1, tile.stored)]),
            bias,
            slot_token,
            tile_expert,
            gate if gate is not None else bias,
            out,
            tile_expert.numel(),
            columns,
            1.0 if residual_scale is None else residual_scale,
            WIDTH=width,
            BLOCK_T=triton.next_power_of_2(tile_expert.numel()),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            ACTIVATION=activation,
            SLICES=tile.stored,
            GATHER=residual_scale is None,
            ADD=adds,
            GATE=gate is not None,
            DOT=dot,
            PDL=pdl,
            **tile.options(pdl),
        )
        return
    _experts_many_kernel[(triton.cdiv(columns, tile.n), tile_expert.numel())](
        a,
        weight,
        weight_scale if weight_scale is not None else bias,
        bias,
        slot_token,
        tile_expert,
        gate if gate is not None else bias,
        out,
        columns,
        1.0 if residual_scale is None else residual_scale,
        WIDTH=width,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        ACTIVATION=activation,
        GATHER=residual_scale is None,
        ADD=adds,
        GATE=gate is not None,
        SCALED=weight_scale is not None,
        DOT=dot,
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
