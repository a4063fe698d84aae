"""One layer of all experts for few tokens: each expert's weights are read once, whatever the routing.

A program takes one expert and BLOCK_N of its columns. It loads that slice of the weights once, finds the expert's
tokens in the list of all choices, and walks through them 16 at a time. Nothing is sorted and the host learns nothing.

Which experts have tokens, the second product's programs know before the first product ends. The first one's programs
release the next kernel only after their own wait, so whatever runs behind that release finds the router finished and
its results in the L2 cache. Loads that use this (`known`) go past the L1 cache, where a line may be older.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from m3asr.kernels.pieces import Tile, activate, copyable, dot, dot_parts, multiprocessors, release, wait


@triton.jit
def _experts_few_kernel(
    a_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    expert_ptr,
    gate_ptr,
    out_ptr,
    tokens,
    columns,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    SCALED: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    expert = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    k_in = (k < WIDTH)[None, :]
    col_in = cols < columns
    w_at = w_ptr + expert.to(tl.int64) * columns * WIDTH + cols[:, None] * WIDTH + k[None, :]
    # Asked for before the routing is known, also by experts that turn out to have no tokens.
    w = tl.load(w_at, mask=col_in[:, None] & k_in, other=0.0)  # (BLOCK_N, BLOCK_K)
    wait(PDL)
    t = tl.arange(0, BLOCK_T)
    mine = tl.load(expert_ptr + t, mask=t < tokens, other=-1) == expert
    rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1
    count = tl.sum(mine.to(tl.int32), axis=0)
    if count > 0:
        bias = tl.load(b_ptr + expert * columns + cols, mask=col_in, other=0.0)
        if SCALED:
            w_scale = tl.load(s_ptr + expert * columns + cols, mask=col_in, other=0.0)
        for first in range(0, count, BLOCK_M):
            slot = first + tl.arange(0, BLOCK_M)
            here = mine[None, :] & (rank[None, :] == slot[:, None])
            token = tl.sum(tl.where(here, t[None, :], 0), axis=1)
            used = slot < count
            a = tl.load(a_ptr + token[:, None] * WIDTH + k[None, :], mask=used[:, None] & k_in, other=0.0)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc = dot(a, tl.trans(w.to(a.dtype)), acc, DOT)  # (BLOCK_M, BLOCK_N)
            if SCALED:
                acc *= w_scale[None, :]
            acc += bias[None, :]
            acc = activate(acc, ACTIVATION)
            out_at = out_ptr + token[:, None] * columns + cols[None, :]
            out_mask = used[:, None] & col_in[None, :]
            if GATE:
                acc *= tl.load(gate_ptr + token, mask=used, other=0.0)[:, None]
            if RESIDUAL:
                acc = tl.load(out_at, mask=out_mask, other=0.0) + scale * acc
            tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _experts_copied_kernel(
    a_ptr,
    w,
    b_ptr,
    expert_ptr,
    gate_ptr,
    out_ptr,
    tokens,
    columns,
    early,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    # The product is transposed: weights, which fill the matrix unit's taller operand, stay in shared memory, where the
    # copy engine put them, and cost no registers.
    release(PDL)
    expert = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    col_in = cols < columns
    k = tl.arange(0, BLOCK_K)
    k_in = (k < WIDTH)[None, :]
    t = tl.arange(0, BLOCK_T)
    # The first programs ask for their weights before the routing is known. Later ones, which start when it is, ask for
    # those of experts that have tokens.
    late = expert * tl.num_programs(0) + tl.program_id(0) >= early
    asked = True
    if late:
        wait(PDL)
        asked = tl.sum((tl.load(expert_ptr + t, mask=t < tokens, other=-1) == expert).to(tl.int32), axis=0) > 0
    if asked:
        weights = w.load([expert * columns + col, 0])  # (BLOCK_N, BLOCK_K)
        wait(PDL)
        mine = tl.load(expert_ptr + t, mask=t < tokens, other=-1) == expert
        rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1
        count = tl.sum(mine.to(tl.int32), axis=0)
        bias = tl.load(b_ptr + expert * columns + cols, mask=col_in, other=0.0)
        for first in range(0, count, BLOCK_M):
            slot = first + tl.arange(0, BLOCK_M)
            here = mine[None, :] & (rank[None, :] == slot[:, None])
            token = tl.sum(tl.where(here, t[None, :], 0), axis=1)
            used = slot < count
            a = tl.load(a_ptr + token[:, None] * WIDTH + k[None, :], mask=used[:, None] & k_in, other=0.0)
            acc = dot(weights, tl.trans(a), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), DOT)
            acc = activate(acc + bias[:, None], ACTIVATION)
            out_at = out_ptr + token[None, :] * columns + cols[:, None]
            out_mask = used[None, :] & col_in[:, None]
            if GATE:
                acc *= tl.load(gate_ptr + token, mask=used, other=0.0)[None, :]
            if RESIDUAL:
                acc = tl.load(out_at, mask=out_mask, other=0.0) + scale * acc
            tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _experts_hit_kernel(
    a_ptr,
    w,
    s_ptr,
    b_ptr,
    expert_ptr,
    gate_ptr,
    out_ptr,
    tokens,
    columns,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    SCALED: tl.constexpr,
    COPIED: tl.constexpr,
    KNOWN: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    # The wait comes before the release: the second product's programs rely on it, see above.
    if not KNOWN:
        wait(PDL)
    release(PDL)
    t = tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    parts = tl.arange(0, PARTS)
    k = parts[None, :, None] * (BLOCK_K // PARTS) + tl.arange(0, BLOCK_K // PARTS)[None, None, :]
    k_in = k < WIDTH  # (1, PARTS, BLOCK_K / PARTS)
    chosen = tl.load(expert_ptr + t, mask=t < tokens, other=-1, cache_modifier=".cg")
    hit = tl.max((chosen[:, None] == e[None, :]).to(tl.int32), axis=0)
    place = tl.cumsum(hit, axis=0) - 1
    tiles = tl.cdiv(columns, BLOCK_N)
    for item in range(tl.program_id(0), tl.sum(hit, axis=0) * tiles, tl.num_programs(0)):
        expert = tl.sum(tl.where((hit > 0) & (place == item // tiles), e, 0), axis=0)
        col = item % tiles * BLOCK_N
        cols = col + tl.arange(0, BLOCK_N)
        col_in = cols < columns
        if COPIED:
            weights = w.load([expert * columns + col, 0])  # (BLOCK_N, BLOCK_K)
        else:
            w_at = w + expert.to(tl.int64) * columns * WIDTH + cols[:, None, None] * WIDTH + k
            weights = tl.load(w_at, mask=col_in[:, None, None] & k_in, other=0.0)  # (BLOCK_N, PARTS, BLOCK_K / PARTS)
        bias = tl.load(b_ptr + expert * columns + cols, mask=col_in, other=0.0)
        if SCALED:
            w_scale = tl.load(s_ptr + expert * columns + cols, mask=col_in, other=0.0)
        mine = chosen == expert
        rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1
        count = tl.sum(mine.to(tl.int32), axis=0)
        for first in range(0, count, BLOCK_M):
            slot = first + tl.arange(0, BLOCK_M)
            here = mine[None, :] & (rank[None, :] == slot[:, None])
            token = tl.sum(tl.where(here, t[None, :], 0), axis=1)
            used = slot < count
            out_at = out_ptr + token[:, None] * columns + cols[None, :]
            out_mask = used[:, None] & col_in[None, :]
            if RESIDUAL:
                before = tl.load(out_at, mask=out_mask, other=0.0, cache_modifier=".cg")
            if GATE:
                gate = tl.load(gate_ptr + token, mask=used, other=0.0, cache_modifier=".cg")
            if KNOWN:
                wait(PDL)
            a_at = a_ptr + token[:, None, None] * WIDTH + k
            a = tl.load(a_at, mask=used[:, None, None] & k_in, other=0.0)  # (BLOCK_M, PARTS, BLOCK_K / PARTS)
            if COPIED:
                # Transposed: weights, which fill the matrix unit's taller operand, stay where the copy engine put them.
                rows = tl.trans(tl.reshape(a, (BLOCK_M, BLOCK_K)))
                acc = tl.trans(dot(weights, rows, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), DOT))
            else:
                acc = dot_parts(a, weights.to(a.dtype), PARTS, DOT)  # (BLOCK_M, BLOCK_N)
            if SCALED:
                acc *= w_scale[None, :]
            acc = activate(acc + bias[None, :], ACTIVATION)
            if GATE:
                acc *= gate[:, None]
            if RESIDUAL:
                acc = before + scale * acc
            tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=out_mask)
    if KNOWN:
        wait(PDL)  # also without any work


def experts_few(
    a, weight, bias, expert_idx, out, *, tile: Tile, activation="none", residual_scale=None, gate=None,
    weight_scale=None, known=False, dot="ieee", pdl=False,
) -> None:  # fmt: skip
    """out[n] = epilogue(weight[e] a[n] + bias[e]) with e = expert_idx[n]; rows with e = -1 stay untouched.

    a (N, K), weight (E, C, K) in the compute type, bias float32 (E, C), expert_idx int32 (N,), out (N, C).
    activation, then times gate float32 (N,) if given; with `residual_scale`, out += residual_scale * that.
    weight_scale float32 (E, C): the weights are float8 and count times that.
    A tile with walkers reads the weights of experts that have tokens, and no others. known: the launch before this one
    was `experts_few` with walkers, and what wrote expert_idx, gate and out came before it. Then all but `a` is read
    ahead of that launch's end.
    Without walkers, `copied` programs a multiprocessor ask for their weights before they know whether they need them.
    """
    tokens, width = a.shape
    experts, columns, _ = weight.shape
    assert tile.k >= width, f"a tile of k {tile.k} does not hold the width {width}"
    tiles = triton.cdiv(columns, tile.n)
    flat = weight.view(experts * columns, width)
    copied = bool(tile.copied) and copyable(flat)
    arguments = {
        "a_ptr": a,
        "b_ptr": bias,
        "expert_ptr": expert_idx,
        "gate_ptr": bias if gate is None else gate,
        "out_ptr": out,
        "tokens": tokens,
        "columns": columns,
        "scale": 1.0 if residual_scale is None else residual_scale,
        "WIDTH": width,
        # At least a program's threads: of less the compiler makes every thread find each of the tokens it reads.
        "BLOCK_T": max(32 * tile.warps, triton.next_power_of_2(tokens)),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "ACTIVATION": activation,
        "RESIDUAL": residual_scale is not None,
        "GATE": gate is not None,
        "DOT": dot,
        "PDL": pdl,
        **tile.options(pdl),
    }
    slices = TensorDescriptor.from_tensor(flat, [tile.n, tile.k]) if copied else weight
    scaled = {"s_ptr": bias if weight_scale is None else weight_scale, "SCALED": weight_scale is not None}
    if tile.walkers:
        programs = min(tile.walkers * multiprocessors(a.device), tiles * min(experts, tokens))
        _experts_hit_kernel[(programs,)](
            w=slices, BLOCK_E=triton.next_power_of_2(experts), PARTS=1 if copied else tile.parts, COPIED=copied,
            KNOWN=known, **scaled, **arguments,
        )  # fmt: skip
    elif copied:
        early = tile.copied * multiprocessors(a.device)
        _experts_copied_kernel[(tiles, experts)](w=slices, early=early, **arguments)
    else:
        _experts_few_kernel[(tiles, experts)](w_ptr=slices, **scaled, **arguments)
