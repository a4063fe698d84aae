"""Layer norm and top-1 routing, with float32's accuracy in every precision (specification 2.7).

For many tokens the product is three on tensor cores: y = a + b, w = c + d, a..d float16, so y w = a c + b c + a d but
for 2^-22 of it. Three tf32 products are as exact, but hold twice the registers and took 122 us for 16384 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, at_least_16, mean_of, normalise, release, wait


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
    counts_ptr,
    tokens,
    frames,
    heard_stride,
    eps,
    scale,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COUNTS: tl.constexpr,
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
    heard_at = heard_ptr + rows.to(tl.int64)[:, None] * heard_stride + e[None, :]
    heard = tl.load(heard_at, mask=row_in & e_in[None, :], other=0.0)
    length = tl.load(lengths_ptr + rows // frames, mask=rows < tokens, other=0)
    if BLOCK_M == 1:
        x = tl.load(x_ptr + at + d[None, :], mask=row_in & d_in[None, :], other=0.0)
        y = normalise(x, d_in[None, :], WIDTH, eps)  # (1, BLOCK_D)
        tl.store(y_ptr + at + d[None, :], y.to(y_ptr.dtype.element_ty), mask=row_in & d_in[None, :])
        logits = tl.sum(tl.trans(y) * w, axis=0)[None, :]
    else:
        # Few registers are worth more than one reading less: the rows are in the cache the second time.
        mean, squares = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        k = tl.arange(0, BLOCK_K)
        for start in range(0, WIDTH, BLOCK_K):
            k_in = k + start < WIDTH
            part = tl.load(x_ptr + at + start + k[None, :], mask=row_in & k_in[None, :], other=0.0)
            count = tl.minimum(WIDTH - start, BLOCK_K).to(tl.float32)
            part_mean = mean_of(tl.sum(part, axis=1), count)
            part = tl.where(k_in[None, :], part - part_mean[:, None], 0.0)
            # Means and squares of two sets joined (Chan et al. 1979): exact where x - mean(x) is.
            step = tl.where(start > 0, part_mean - mean, 0.0)
            mean = tl.where(start > 0, mean + step * (count / (start + count)), part_mean)
            squares += tl.sum(part * part, axis=1) + step * step * (start * count / (start + count))
        rstd = 1.0 / tl.sqrt(squares / WIDTH + eps)
        logits = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            k_in = k + start < WIDTH
            part = tl.load(x_ptr + at + start + k[None, :], mask=row_in & k_in[None, :], other=0.0)
            y = tl.where(k_in[None, :], (part - mean[:, None]) * rstd[:, None], 0.0)
            tl.store(y_ptr + at + start + k[None, :], y.to(y_ptr.dtype.element_ty), mask=row_in & k_in[None, :])
            w_at = w_ptr + (start + k)[:, None] * EXPERTS + e[None, :]
            w = tl.load(w_at, mask=k_in[:, None] & e_in[None, :], other=0.0)
            y_high, w_high = y.to(tl.float16), w.to(tl.float16)
            y_low, w_low = (y - y_high.to(tl.float32)).to(tl.float16), (w - w_high.to(tl.float32)).to(tl.float16)
            logits = tl.dot(y_low, w_high, logits)
            logits = tl.dot(y_high, w_low, logits)
            logits = tl.dot(y_high, w_high, logits)
    logits = logits * scale + bias[None, :] + heard
    logits = tl.where(e_in[None, :], logits, -float("inf"))
    top, expert = tl.max(logits, axis=1, return_indices=True, return_indices_tie_break_left=True)
    gate = 1.0 / tl.sum(tl.exp(logits - top[:, None]), axis=1)
    # Padding goes to no expert: it costs no weights, and no result depends on it.
    valid = (rows % frames) < length
    expert = tl.where(valid, expert, -1)
    tl.store(expert_ptr + rows, expert, mask=rows < tokens)
    if COUNTS:
        hits = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), axis=0)
        tl.store(counts_ptr + tl.program_id(0) * EXPERTS + e, hits, mask=e_in)
    tl.store(gate_ptr + rows, tl.where(valid, gate, 0.0), mask=rows < tokens)


def route(
    x, weight, bias, heard, lengths, y, expert_idx, gate, *, frames, eps, tile: Tile, scale=1.0, counts=None, pdl=False
) -> None:  # fmt: skip
    """y = normalise(x); the best expert of each token by scale * y weight + bias + heard, and its softmax probability.

    x float32 (N, D); weight float32 (D, E), bias float32 (E,): with the norm's own folded in, the largest weight near
    1, so that the halves of all that matter are normal float16 numbers; heard float32 (N, E),
    rows any distance apart: what the embedding network adds; lengths int32 (B,), N = B * frames.
    Writes y (N, D) in the compute type, expert_idx int32 (N,), -1 past the length, gate float32 (N,), 0 there, and, if
    given, counts int32 (N / tile.m rounded up, E): how many of so many tokens go to each expert.
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
        gate if counts is None else counts,
        tokens,
        frames,
        heard.stride(0),
        eps,
        scale,
        WIDTH=width,
        EXPERTS=weight.shape[1],
        BLOCK_E=at_least_16(weight.shape[1]),
        BLOCK_M=tile.m,
        BLOCK_D=at_least_16(width),
        BLOCK_K=tile.k,
        COUNTS=counts is not None,
        PDL=pdl,
        **tile.options(pdl),
    )
