"""Both layers of all experts in one kernel, for few tokens.

A program owns one expert and one share of its hidden units: it walks through them a few at a time, up and at once down
again, and what its share contributes to the expert's tokens is a summand of its own, in memory of its own. The next
block's first kernel adds the summands, always in the same order, where it reads the residual stream anyway
(`norm_linear`, `norm`). So the hidden sequence is never written, and a layer of experts costs one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, activate, at_least_16, dot, fetch_rows, release, wait


@triton.jit
def _experts_whole_kernel(
    a_ptr,
    up_ptr,
    up_scale_ptr,
    up_bias_ptr,
    down_ptr,
    down_scale_ptr,
    down_bias_ptr,
    expert_ptr,
    gate_ptr,
    out_ptr,
    tokens,
    scale,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    SCALED: tl.constexpr,
    EARLY: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    expert, share = tl.program_id(1), tl.program_id(0)
    first = share * SHARE
    d = tl.arange(0, BLOCK_D)
    d_in = d < WIDTH
    unit = tl.arange(0, BLOCK_H)
    up_ptr += expert.to(tl.int64) * HIDDEN * WIDTH
    down_ptr += expert.to(tl.int64) * HIDDEN * WIDTH
    if EARLY:
        fetch_rows(up_ptr + first * WIDTH, SHARE, WIDTH, WIDTH)
        fetch_rows(down_ptr + first, WIDTH, SHARE, HIDDEN)
    wait(PDL)
    t = tl.arange(0, BLOCK_T)
    mine = tl.load(expert_ptr + t, mask=t < tokens, other=-1) == expert
    rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1
    count = tl.sum(mine.to(tl.int32), axis=0)
    for begin in range(0, count, BLOCK_M):
        slot = begin + tl.arange(0, BLOCK_M)
        here = mine[None, :] & (rank[None, :] == slot[:, None])
        token = tl.sum(tl.where(here, t[None, :], 0), axis=1)
        used = slot < count
        mask = used[:, None] & d_in[None, :]
        a = tl.load(a_ptr + token[:, None] * WIDTH + d[None, :], mask=mask, other=0.0)  # (BLOCK_M, BLOCK_D)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for step in tl.range(0, SHARE, BLOCK_H, num_stages=STAGES):
            units = first + step + unit
            unit_in = (step + unit < SHARE) & (units < HIDDEN)
            up = tl.load(up_ptr + units[:, None] * WIDTH + d[None, :], mask=unit_in[:, None] & d_in[None, :], other=0.0)
            down = tl.load(
                down_ptr + d[:, None] * HIDDEN + units[None, :], mask=d_in[:, None] & unit_in[None, :], other=0.0
            )
            h = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
            h = dot(a, tl.trans(up.to(a.dtype)), h, DOT)
            if SCALED:
                h *= tl.load(up_scale_ptr + expert * HIDDEN + units, mask=unit_in, other=0.0)[None, :]
            h += tl.load(up_bias_ptr + expert * HIDDEN + units, mask=unit_in, other=0.0)[None, :]
            h = tl.where(unit_in[None, :], activate(h, ACTIVATION), 0.0).to(a.dtype)
            acc = dot(h, tl.trans(down.to(a.dtype)), acc, DOT)
        if SCALED:
            acc *= tl.load(down_scale_ptr + expert * WIDTH + d, mask=d_in, other=0.0)[None, :]
        if share == 0:
            acc += tl.load(down_bias_ptr + expert * WIDTH + d, mask=d_in, other=0.0)[None, :]
        if GATE:
            acc *= tl.load(gate_ptr + token, mask=used, other=0.0)[:, None]
        out_at = out_ptr + (share * tokens + token).to(tl.int64)[:, None] * WIDTH + d[None, :]
        tl.store(out_at, acc * scale, mask=mask)


def experts_whole(
    a, up, up_bias, down, down_bias, expert_idx, out, *, scale, tile: Tile, activation="none", gate=None, early=False,
    up_scale=None, down_scale=None, dot="ieee", pdl=False,
) -> None:  # fmt: skip
    """sum over r of out[r, n] = scale * gate[n] * (down[e] act(up[e] a[n] + up_bias[e]) + down_bias[e]), with
    e = expert_idx[n]; rows with e = -1 are not written.

    a (N, D); up (E, H, D), down (E, D, H) in a's type, or float8 that counts times up_scale, down_scale float32
    (E, H), (E, D); up_bias, down_bias float32; expert_idx int32 (N,); gate float32 (N,) or None;
    out float32 (R, N, D): R programs share an expert, each by R-ths of the hidden units. tile: m tokens at a time, n
    hidden units a step. early: before the wait, ask for all weights to be brought into the L2 cache.
    """
    shares, tokens, width = out.shape
    experts, hidden, _ = up.shape
    _experts_whole_kernel[(shares, experts)](
        a,
        up,
        up_scale if up_scale is not None else up_bias,
        up_bias,
        down,
        down_scale if down_scale is not None else down_bias,
        down_bias,
        expert_idx,
        gate if gate is not None else up_bias,
        out,
        tokens,
        scale,
        WIDTH=width,
        HIDDEN=hidden,
        SHARE=triton.cdiv(hidden, shares),
        BLOCK_D=at_least_16(width),
        BLOCK_T=max(16, triton.next_power_of_2(tokens)),
        BLOCK_M=tile.m,
        BLOCK_H=tile.n,
        STAGES=tile.stages,
        ACTIVATION=activation,
        GATE=gate is not None,
        SCALED=up_scale is not None,
        # Equal shares only: the last one must not ask for what lies behind the weights.
        EARLY=early and hidden % shares == 0,
        DOT=dot,
        PDL=pdl,
        **tile.options(pdl),
    )
