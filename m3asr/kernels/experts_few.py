"""One layer of all experts for few tokens: the weights of experts that have tokens are read once, and no others.

Each program finds in the list of all choices which experts have tokens. All programs together walk over those experts
and slices of BLOCK_N of their columns: a program loads the slice of the weights once and goes through the expert's
tokens, BLOCK_M at a time. Nothing is sorted and the host learns nothing.

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
    known: the launch before this one was `experts_few`, and what wrote expert_idx, gate and out came before it. Then
    all but `a` is read ahead of that launch's end.
    """
    tokens, width = a.shape
    experts, columns, _ = weight.shape
    assert tile.k >= width, f"a tile of k {tile.k} does not hold the width {width}"
    assert tile.walkers > 0, "a tile without walkers runs nothing"
    flat = weight.view(experts * columns, width)
    copied = bool(tile.copied) and copyable(flat)
    most = triton.cdiv(columns, tile.n) * min(experts, tokens)
    _experts_few_kernel[(min(tile.walkers * multiprocessors(a.device), most),)](
        a,
        TensorDescriptor.from_tensor(flat, [tile.n, tile.k]) if copied else weight,
        bias if weight_scale is None else weight_scale,
        bias,
        expert_idx,
        bias if gate is None else gate,
        out,
        tokens,
        columns,
        1.0 if residual_scale is None else residual_scale,
        WIDTH=width,
        # At least a program's threads: of less the compiler makes every thread find each of the tokens it reads.
        BLOCK_T=max(32 * tile.warps, triton.next_power_of_2(tokens)),
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        PARTS=1 if copied else tile.parts,
        ACTIVATION=activation,
        RESIDUAL=residual_scale is not None,
        GATE=gate is not None,
        SCALED=weight_scale is not None,
        COPIED=copied,
        KNOWN=known,
        DOT=dot,
        PDL=pdl,
        **tile.options(pdl),
    )
