"""Layer norm and a linear layer in one kernel, for few tokens.

out = epilogue(normalise(x) W^T + b). The norm's own weight and bias are folded into W and b when they are packed. A
program owns BLOCK_M rows, whole, and BLOCK_N columns; the weights it needs are one load, issued before it waits for
the kernel that writes x. Each program repeats the norm of its rows, which costs less than another launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, at_least_16, dot_parts, finished, normalise_parts, release, wait


@triton.jit
def _norm_linear_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    table_ptr,
    lengths_ptr,
    prior_w_ptr,
    prior_b_ptr,
    out_ptr,
    prior_out_ptr,
    tokens,
    frames,
    columns,
    eps,
    prior_eps,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    TABLE: tl.constexpr,
    PRIOR: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    parts = tl.arange(0, PARTS)
    d = parts[None, :, None] * (BLOCK_D // PARTS) + tl.arange(0, BLOCK_D // PARTS)[None, None, :]
    inside = d < WIDTH  # (1, PARTS, BLOCK_D / PARTS)
    w_at = w_ptr + cols[:, None, None] * WIDTH + d
    w = tl.load(w_at, mask=(cols < columns)[:, None, None] & inside, other=0.0)  # (BLOCK_N, PARTS, BLOCK_D / PARTS)
    bias = tl.load(b_ptr + cols, mask=cols < columns, other=0.0)
    wait(PDL)
    x_at = rows[:, None, None] * WIDTH + d
    x_mask = (rows < tokens)[:, None, None] & inside
    x = tl.load(x_ptr + x_at, mask=x_mask, other=0.0)  # (BLOCK_M, PARTS, BLOCK_D / PARTS)
    if PRIOR:
        # Loaded for every row, from the cache, in the shape of x: else the compiler moves x to the weights' threads.
        d_of_all = tl.broadcast_to(d, (BLOCK_M, PARTS, BLOCK_D // PARTS))
        prior_w = tl.load(prior_w_ptr + d_of_all, mask=x_mask, other=0.0)
        prior_b = tl.load(prior_b_ptr + d_of_all, mask=x_mask, other=0.0)
        x = normalise_parts(x, inside, WIDTH, prior_eps) * prior_w + prior_b
        # One program of each row block stores what the residual stream is from here on.
        if tl.program_id(0) == 0:
            tl.store(prior_out_ptr + x_at, x, mask=x_mask)
    y = normalise_parts(x, inside, WIDTH, eps).to(w.dtype)
    acc = dot_parts(y, w, PARTS, DOT) + bias[None, :]  # (BLOCK_M, BLOCK_N)
    finished(
        acc, rows, tl.program_id(0) * BLOCK_N, tokens, frames, columns, table_ptr, lengths_ptr, out_ptr, 1.0, BLOCK_M,
        BLOCK_N, ACTIVATION, GLU, TABLE, False, False,
    )  # fmt: skip


def norm_linear(
    x,
    weight,
    bias,
    out,
    *,
    eps,
    tile: Tile,
    activation="none",
    table=None,
    glu=None,
    prior=None,
    dot="ieee",
    pdl=False,
) -> None:
    """out = epilogue(normalise(x) weight^T + bias).

    x float32 (N, D); weight (C, D) in the compute type, bias float32 (C,); out (N, C), or (N, C/2) with `glu`.
    activation: after the sum. table = (values (>= S, C/3), S): added to the middle third of the columns at position
    token % S. glu = (lengths int32 (B,), S): columns alternate value, gate; value times sigmoid of gate, zero past the
    length.
    prior = (weight, bias, eps, x_out): x is first replaced by its layer norm, which is also stored in x_out (not x).
    """
    tokens, width = x.shape
    columns = weight.shape[0]
    frames = table[1] if table else glu[1] if glu else tokens
    prior_w, prior_b, prior_eps, prior_out = prior if prior else (bias, bias, 0.0, x)
    grid = (triton.cdiv(columns, tile.n), triton.cdiv(tokens, tile.m))
    _norm_linear_kernel[grid](
        x,
        weight,
        bias,
        table[0] if table else bias,
        glu[0] if glu else bias,
        prior_w,
        prior_b,
        out,
        prior_out,
        tokens,
        frames,
        columns,
        eps,
        prior_eps,
        WIDTH=width,
        BLOCK_D=at_least_16(width),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        PARTS=tile.parts,
        ACTIVATION=activation,
        GLU=glu is not None,
        TABLE=table is not None,
        PRIOR=prior is not None,
        DOT=dot,
        PDL=pdl,
        **tile.options(pdl),
    )
