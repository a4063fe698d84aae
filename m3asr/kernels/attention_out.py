"""Self-attention, its output projection and the sum into the residual stream in one kernel, for few tokens.

A program owns some columns of the projection and some rows, and computes the attention of its rows for all heads,
which every other column's program does too: with few tokens that costs less than another launch. Heads are a batch
of products, so that different warps have different heads, and the projection's sum over heads comes last.
`attention` says how the scores are made.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, at_least_16, dot_batch, prefetch, release, wait


@triton.jit
def _attention_out_kernel(
    qkv_ptr,
    key_bias_ptr,
    lengths_ptr,
    w_ptr,
    b_ptr,
    x_ptr,
    frames,
    key_bias_stride,
    chunk_size,
    left_chunks,
    scale,
    ahead_ptr,
    ahead_bytes,
    HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    CHUNKED: tl.constexpr,
    DOT: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    prefetch(ahead_ptr, ahead_bytes, AHEAD)
    WIDTH: tl.constexpr = HEADS * HEAD_WIDTH
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    batch = tl.program_id(2)
    head, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    of_head = head[None, :, None] * HEAD_WIDTH + d[None, None, :]
    inside = (head < HEADS)[None, :, None] & (d < HEAD_WIDTH)[None, None, :]
    w_at = w_ptr + cols[:, None, None] * WIDTH + of_head
    w = tl.load(w_at, mask=(cols < WIDTH)[:, None, None] & inside, other=0.0)  # (BLOCK_N, BLOCK_H, BLOCK_D)
    bias = tl.load(b_ptr + cols, mask=cols < WIDTH, other=0.0)
    wait(PDL)
    length = tl.load(lengths_ptr + batch)
    base = qkv_ptr + (batch * frames).to(tl.int64) * (3 * WIDTH)
    q_at = base + rows[:, None, None] * (3 * WIDTH) + of_head
    q = tl.load(q_at, mask=(rows < frames)[:, None, None] & inside, other=0.0)
    q = tl.permute(q, (1, 0, 2))  # (BLOCK_H, BLOCK_M, BLOCK_D)
    begin = 0
    end = tl.where(first < length, length, 0)
    if CHUNKED:
        chunk = rows // chunk_size
        row_begin = tl.maximum(chunk - left_chunks, 0) * chunk_size
        row_end = (chunk + 1) * chunk_size
        begin = tl.maximum(first // chunk_size - left_chunks, 0) * chunk_size // BLOCK_K * BLOCK_K
        end = tl.minimum(end, ((first + BLOCK_M - 1) // chunk_size + 1) * chunk_size)
    top = tl.full((BLOCK_H, BLOCK_M), -1e30, tl.float32)
    total = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        at = base + keys[:, None, None] * (3 * WIDTH) + of_head
        key_mask = (keys < length)[:, None, None] & inside
        k = tl.load(at + WIDTH, mask=key_mask, other=0.0)
        v = tl.load(at + 2 * WIDTH, mask=key_mask, other=0.0)
        scores = dot_batch(q, tl.permute(k, (1, 2, 0)), DOT)  # (BLOCK_H, BLOCK_M, BLOCK_K)
        if KEY_BIAS:
            bias_at = key_bias_ptr + head[:, None] * key_bias_stride + keys[None, :]
            bias_mask = (head < HEADS)[:, None] & (keys < length)[None, :]
            scores += tl.load(bias_at, mask=bias_mask, other=0.0)[:, None, :]
        visible = (keys < length)[None, :]
        if CHUNKED:
            visible = visible & (keys[None, :] >= row_begin[:, None]) & (keys[None, :] < row_end[:, None])
        scores = tl.where(visible[None, :, :], scores * scale, -1e30)
        new_top = tl.maximum(top, tl.max(scores, axis=2))
        weights = tl.where(visible[None, :, :], tl.exp2(scores - new_top[:, :, None]), 0.0)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, axis=2)
        acc = acc * rescale[:, :, None] + dot_batch(weights.to(v.dtype), tl.permute(v, (1, 0, 2)), DOT)
        top = new_top
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, :, None]
    out = tl.sum(dot_batch(acc.to(w.dtype), tl.permute(w, (1, 2, 0)), DOT), axis=0) + bias[None, :]
    x_at = x_ptr + (batch * frames + rows).to(tl.int64)[:, None] * WIDTH + cols[None, :]
    mask = (rows < frames)[:, None] & (cols < WIDTH)[None, :]
    tl.store(x_at, tl.load(x_at, mask=mask, other=0.0) + out, mask=mask)


def attention_out(
    qkv, lengths, weight, bias, x, *, heads, tile: Tile, key_bias=None, chunk=None, dot="ieee", ahead=None, pdl=False
) -> None:
    """x += attention(qkv) weight^T + bias; qkv (B, S, 3D), lengths, key_bias and chunk as in `attention`.

    weight (D, D) in qkv's type, bias float32 (D,), x float32 (B * S, D). tile: m queries, n columns, k keys a step.
    """
    batch, frames, _ = qkv.shape
    width = x.shape[1]
    head_width = width // heads
    size, left = chunk if chunk else (1, 0)
    _attention_out_kernel[(triton.cdiv(width, tile.n), triton.cdiv(frames, tile.m), batch)](
        qkv,
        key_bias if key_bias is not None else lengths,
        lengths,
        weight,
        bias,
        x,
        frames,
        key_bias.stride(0) if key_bias is not None else 0,
        size,
        left,
        math.log2(math.e) / math.sqrt(head_width),
        ahead if ahead is not None else x,
        ahead.numel() * ahead.element_size() if ahead is not None else 0,
        HEADS=heads,
        HEAD_WIDTH=head_width,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_D=at_least_16(head_width),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        KEY_BIAS=key_bias is not None,
        CHUNKED=chunk is not None,
        DOT=dot,
        AHEAD=ahead is not None,
        PDL=pdl,
        **tile.options(pdl),
    )
