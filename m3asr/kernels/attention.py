"""Self-attention over whole utterances, flash style, with lengths, a bias a key and chunks.

With p the projected position of a key and u, v the checkpoint's two biases, the score of the checkpoints is
(q + u) k + (q + v) p = (q + u)(k + p) + (v - u) p. So u is added to the bias of the query projection, p to the keys
where they are made, and what remains is a number for each head and position that no input changes (specification 2.5
leaves u k in the bias; this form moves it into the product).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from m3asr.kernels.pieces import Tile, at_least_16, copyable, dot, release, storable, wait


@triton.jit
def _attention_kernel(
    qkv_ptr,
    key_bias_ptr,
    lengths_ptr,
    out_ptr,
    frames,
    key_bias_stride,
    chunk_size,
    left_chunks,
    scale,
    HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    CHUNKED: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    WIDTH: tl.constexpr = HEADS * HEAD_WIDTH
    batch = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    wait(PDL)
    length = tl.load(lengths_ptr + batch)
    first = tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    base = qkv_ptr + (batch * frames).to(tl.int64) * (3 * WIDTH) + head * HEAD_WIDTH
    row_mask = (rows < frames)[:, None] & (d < HEAD_WIDTH)[None, :]
    q = tl.load(base + rows[:, None] * (3 * WIDTH) + d[None, :], mask=row_mask, other=0.0)
    # Queries past the length see nothing: they are padding, and nobody reads them.
    begin = 0
    end = tl.where(first < length, length, 0)
    if CHUNKED:
        chunk = rows // chunk_size
        row_begin = tl.maximum(chunk - left_chunks, 0) * chunk_size
        row_end = (chunk + 1) * chunk_size
        begin = tl.maximum(first // chunk_size - left_chunks, 0) * chunk_size // BLOCK_N * BLOCK_N
        end = tl.minimum(end, ((first + BLOCK_M - 1) // chunk_size + 1) * chunk_size)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        key_mask = (keys < length)[:, None] & (d < HEAD_WIDTH)[None, :]
        at = keys[:, None] * (3 * WIDTH) + d[None, :]
        k = tl.load(base + WIDTH + at, mask=key_mask, other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), DOT)  # (BLOCK_M, BLOCK_N)
        if KEY_BIAS:
            scores += tl.load(key_bias_ptr + head * key_bias_stride + keys, mask=keys < length, other=0.0)[None, :]
        visible = (keys < length)[None, :]
        if CHUNKED:
            visible = visible & (keys[None, :] >= row_begin[:, None]) & (keys[None, :] < row_end[:, None])
        scores = tl.where(visible, scores * scale, -1e30)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.where(visible, tl.exp2(scores - new_top[:, None]), 0.0)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, axis=1)
        v = tl.load(base + 2 * WIDTH + at, mask=key_mask, other=0.0)
        acc = dot(weights.to(v.dtype), v, acc * rescale[:, None], DOT)
        top = new_top
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_at = out_ptr + (batch * frames + rows).to(tl.int64)[:, None] * WIDTH + head * HEAD_WIDTH + d[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=row_mask)


@triton.jit
def _copied_kernel(
    queries,
    keys_and_values,
    biases,
    lengths_ptr,
    out_ptr,
    frames,
    scale,
    HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """`_attention_kernel` without chunks, half as many instructions: the copy engine computes the addresses, and keys
    past the length differ from others in their bias alone.
    """
    release(PDL)
    WIDTH: tl.constexpr = HEADS * HEAD_WIDTH
    batch = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    first = tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    row, col = batch * frames, head * HEAD_WIDTH
    wait(PDL)
    length = tl.load(lengths_ptr + batch)  # first: a copy is waited for where it stands
    q = queries.load([row + first, col])
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_WIDTH), tl.float32)
    # Each block holds a key that counts, so a query's top is a score; queries past the length see nothing.
    for start in range(0, tl.where(first < length, length, 0), BLOCK_N):
        bias = tl.zeros((BLOCK_N,), tl.float32)
        if KEY_BIAS:
            bias = scale * tl.reshape(biases.load([head, start]), (BLOCK_N,))
        if start + BLOCK_N > length:
            bias = tl.where(start + tl.arange(0, BLOCK_N) < length, bias, -1e30)
        k = keys_and_values.load([row + start, WIDTH + col])
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), DOT)  # (BLOCK_M, BLOCK_N)
        scores = scores * scale + bias[None, :]
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, axis=1)
        v = keys_and_values.load([row + start, 2 * WIDTH + col])
        acc = dot(weights.to(v.dtype), v, acc * rescale[:, None], DOT)
        top = new_top
    acc *= (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
    out_at = out_ptr + (row + rows).to(tl.int64)[:, None] * WIDTH + col + tl.arange(0, HEAD_WIDTH)[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(rows < frames)[:, None])


def attention(qkv, lengths, out, *, heads, tile: Tile, key_bias=None, chunk=None, dot="ieee", pdl=False) -> None:
    """softmax((q k^T + key_bias) / sqrt(K)) v within each utterance.

    qkv (B, S, 3D): queries, keys and values side by side, D = heads * K; lengths int32 (B,): keys that count;
    out (B, S, D), zeros for queries in a row block past the length. key_bias float32 (H, >= S).
    chunk = (size, left): query i sees keys from chunk i // size - left (left >= 0) to the end of its own.
    A tile whose operands are copied is one only without chunks, for heads as wide as a power of two; then rows of qkv
    past a length must be finite.
    """
    batch, frames, width = out.shape
    head_width = width // heads
    size, left = chunk if chunk else (1, 0)
    grid = (triton.cdiv(frames, tile.m), batch * heads)
    flat = qkv.view(batch * frames, 3 * width)
    biases = flat if key_bias is None else key_bias
    if tile.copied and not chunk and copyable(flat) and storable(biases) and head_width == at_least_16(head_width):
        _copied_kernel[grid](
            TensorDescriptor.from_tensor(flat, [tile.m, head_width]),
            TensorDescriptor.from_tensor(flat, [tile.n, head_width]),
            TensorDescriptor.from_tensor(biases, [1, tile.n]),
            lengths,
            out,
            frames,
            math.log2(math.e) / math.sqrt(head_width),
            HEADS=heads,
            HEAD_WIDTH=head_width,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            KEY_BIAS=key_bias is not None,
            DOT=dot,
            PDL=pdl,
            **tile.options(pdl),
        )
        return
    _attention_kernel[grid](
        qkv,
        key_bias if key_bias is not None else lengths,
        lengths,
        out,
        frames,
        key_bias.stride(0) if key_bias is not None else 0,
        size,
        left,
        math.log2(math.e) / math.sqrt(head_width),
        HEADS=heads,
        HEAD_WIDTH=head_width,
        BLOCK_D=at_least_16(head_width),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        KEY_BIAS=key_bias is not None,
        CHUNKED=chunk is not None,
        DOT=dot,
        PDL=pdl,
        **tile.options(pdl),
    )
