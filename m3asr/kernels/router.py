"""Layer norm and top-1 routing, always in float32 (specification 2.7)."""

from __future__ import annotations

import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, at_least_16, dot, normalise, release, wait


@triton.jit
def _router_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    heard_ptr,
    lengths_ptr,
    y_ptr,
    expert_ptr,
    gate_ptr,
    tokens,
    frames,
    heard_stride,
    eps,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    row_in = (rows < tokens)[:, None]
    e_in = e < EXPERTS
    bias = tl.load(b_ptr + e, mask=e_in, other=0.0)
    d = tl.arange(0, BLOCK_D)
    d_in = d < WIDTH
    at = rows.to(tl.int64)[:, None] * WIDTH
    if BLOCK_M == 1:
        # A token a program: the whole matrix is loaded before the wait, the product is a sum.
        w = tl.load(w_ptr + d[:, None] * EXPERTS + e[None, :], mask=d_in[:, None] & e_in[None, :], other=0.0)
    wait(PDL)
    x = tl.load(x_ptr + at + d[None, :], mask=row_in & d_in[None, :], other=0.0)
    if BLOCK_M == 1:
        y = normalise(x, d_in[None, :], WIDTH, eps)  # (1, BLOCK_D)
        tl.store(y_ptr + at + d[None, :], y.to(y_ptr.dtype.element_ty), mask=row_in & d_in[None, :])
        logits = tl.sum(tl.trans(y) * w, axis=0)[None, :]
    else:
        mean = tl.sum(x, axis=1) / WIDTH
        x = tl.where(d_in[None, :], x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
        logits = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        k = tl.arange(0, BLOCK_K)
        for start in range(0, WIDTH, BLOCK_K):
            k_in = k + start < WIDTH
            part = tl.load(x_ptr + at + start + k[None, :], mask=row_in & k_in[None, :], other=0.0)
            y = tl.where(k_in[None, :], (part - mean[:, None]) * rstd[:, None], 0.0)
            tl.store(y_ptr + at + start + k[None, :], y.to(y_ptr.dtype.element_ty), mask=row_in & k_in[None, :])
            w_at = w_ptr + (start + k)[:, None] * EXPERTS + e[None, :]
            w = tl.load(w_at, mask=k_in[:, None] & e_in[None, :], other=0.0)
            logits = dot(y, w, logits, DOT)
    heard_at = heard_ptr + rows.to(tl.int64)[:, None] * heard_stride + e[None, :]
    logits += bias[None, :] + tl.load(heard_at, mask=row_in & e_in[None, :], other=0.0)
    logits = tl.where(e_in[None, :], logits, -float("inf"))
    top, expert = tl.max(logits, axis=1, return_indices=True, return_indices_tie_break_left=True)
    gate = 1.0 / tl.sum(tl.exp(logits - top[:, None]), axis=1)
    # Padding goes to no expert: it costs no weights, and no result depends on it.
    valid = (rows % frames) < tl.load(lengths_ptr + rows // frames, mask=rows < tokens, other=0)
    tl.store(expert_ptr + rows, tl.where(valid, expert, -1), mask=rows < tokens)
    tl.store(gate_ptr + rows, tl.where(valid, gate, 0.0), mask=rows < tokens)


def route(x, weight, bias, heard, lengths, y, expert_idx, gate, *, frames, eps, tile: Tile, dot="ieee", pdl=False):
    """y = normalise(x); the best expert of each token by y weight + bias + heard, and its softmax probability.

    x float32 (N, D); weight float32 (D, E), bias float32 (E,): with the norm's own folded in; heard float32 (N, E),
    rows any distance apart: what the embedding network adds; lengths int32 (B,), N = B * frames.
    Writes y (N, D) in the compute type, expert_idx int32 (N,), -1 past the length, gate float32 (N,), 0 there.
    """
    tokens, width = x.shape
    _router_kernel[(triton.cdiv(tokens, tile.m),)](
        x,
        weight,
        bias,
        heard,
        lengths,
        y,
        expert_idx,
        gate,
        tokens,
        frames,
        heard.stride(0),
        eps,
        WIDTH=width,
        EXPERTS=weight.shape[1],
        BLOCK_E=at_least_16(weight.shape[1]),
        BLOCK_M=tile.m,
        BLOCK_D=at_least_16(width),
        BLOCK_K=tile.k,
        DOT=dot,
        PDL=pdl,
        **tile.options(pdl),
    )
