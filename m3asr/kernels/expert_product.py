"""A product of sorted tokens with their experts' weights: one grouped matrix product a layer.

A tile of slots is one expert's (kernels/sort.py). The grid is the most there can be, and tiles without an expert return
at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from m3asr.kernels.pieces import Tile, activate, copyable, dot, multiprocessors, release, slices, storable, wait


@triton.jit
def _expert_product_kernel(
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
def _expert_product_persistent_kernel(
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


def expert_product(
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
        _expert_product_persistent_kernel[(min(most, tile.copied * multiprocessors(a.device)),)](
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
    _expert_product_kernel[(triton.cdiv(columns, tile.n), tile_expert.numel())](
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
