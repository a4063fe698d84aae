"""A linear layer with what follows it: activation, GLU, table, or the sum into the residual stream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from m3asr.kernels.pieces import (
    Tile,
    activate,
    ask,
    copied_product,
    copyable,
    dot,
    finished,
    gated,
    multiprocessors,
    release,
    slices,
    storable,
    wait,
)

# In place of a tile: the product is the device library's (cuBLAS), and what follows it a kernel of its own.
LIBRARY = Tile(0, 0)


@triton.jit
def _linear_kernel(
    a_ptr,
    w_ptr,
    b_ptr,
    table_ptr,
    lengths_ptr,
    out_ptr,
    tokens,
    frames,
    columns,
    scale,
    a_group,
    w_group,
    out_group,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    TABLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MASK: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    group = tl.program_id(2).to(tl.int64)
    a_ptr += group * a_group
    w_ptr += group * w_group
    b_ptr += group * columns
    out_ptr += group * out_group
    # Neighbouring programs share rows of a: the columns are few, and the weights stay in the cache anyway.
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = tl.load(b_ptr + cols, mask=cols < columns, other=0.0)
    k = tl.arange(0, BLOCK_K)
    row_in = (rows < tokens)[:, None]
    col_in = (cols < columns)[:, None]
    a_at = a_ptr + rows.to(tl.int64)[:, None] * WIDTH + k[None, :]
    w_at = w_ptr + cols[:, None] * WIDTH + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    wait(PDL)
    for start in range(0, WIDTH, BLOCK_K):
        if WIDTH % BLOCK_K == 0:
            a = tl.load(a_at + start, mask=row_in, other=0.0)
            w = tl.load(w_at + start, mask=col_in, other=0.0)
        else:
            inside = (k + start < WIDTH)[None, :]
            a = tl.load(a_at + start, mask=row_in & inside, other=0.0)
            w = tl.load(w_at + start, mask=col_in & inside, other=0.0)
        acc = dot(a, tl.trans(w), acc, DOT)
    finished(
        acc + bias[None, :], rows, tl.program_id(0) * BLOCK_N, tokens, frames, columns, table_ptr, lengths_ptr, out_ptr,
        scale, BLOCK_M, BLOCK_N, ACTIVATION, GLU, TABLE, RESIDUAL, MASK,
    )  # fmt: skip


@triton.jit
def _persistent_kernel(
    a,
    w,
    w_ptr,
    b_ptr,
    table_ptr,
    lengths_ptr,
    out_ptr,
    tokens,
    frames,
    columns,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    TABLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MASK: tl.constexpr,
    ASK: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    ask(w_ptr, columns * WIDTH * 2, ASK)
    wait(PDL)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    tiles = tl.cdiv(tokens, BLOCK_M) * tiles_n
    # One loop over all steps of all tiles: the copies of a tile's first steps begin before the last one is finished.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, col = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        acc = copied_product(a, w, row, col, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K, DOT)
        cols = col + tl.arange(0, BLOCK_N)
        acc += tl.load(b_ptr + cols, mask=cols < columns, other=0.0)[None, :]
        finished(
            acc, row + tl.arange(0, BLOCK_M), col, tokens, frames, columns, table_ptr, lengths_ptr, out_ptr, scale,
            BLOCK_M, BLOCK_N, ACTIVATION, GLU, TABLE, RESIDUAL, MASK,
        )  # fmt: skip


@triton.jit
def _stored_kernel(
    a,
    w,
    w_ptr,
    out,
    table,
    b_ptr,
    lengths_ptr,
    out_ptr,
    tokens,
    frames,
    columns,
    third,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    TABLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MASK: tl.constexpr,
    ADDS: tl.constexpr,
    ASK: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """`_persistent_kernel` with `finished` a slice of columns at a time, each stored, or added, by the copy engine."""
    release(PDL)
    ask(w_ptr, columns * WIDTH * 2, ASK)
    wait(PDL)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    tiles = tl.cdiv(tokens, BLOCK_M) * tiles_n
    SLICE: tl.constexpr = BLOCK_N // SLICES
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, col = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        acc = copied_product(a, w, row, col, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K, DOT)
        rows = row + tl.arange(0, BLOCK_M)
        if GLU or MASK:
            valid = (rows % frames) < tl.load(lengths_ptr + rows // frames, mask=rows < tokens, other=0)
        parts = slices(acc, SLICES)
        for i in tl.static_range(SLICES):
            first = col + i * SLICE
            cols = first + tl.arange(0, SLICE)
            part = parts[i] + tl.load(b_ptr + cols, mask=cols < columns, other=0.0)[None, :]
            if TABLE:
                # Two thirds of the tiles have nothing to add and pass by. Copies give zeros above the table and below,
                # so a tile over several utterances adds one copy for each, and all but one are zero in a row.
                if (first >= third) & (first < 2 * third):
                    for utterance in tl.range(0, (row % frames + BLOCK_M - 1) // frames + 1, num_stages=1):
                        position = row % frames - utterance * frames
                        part += table.load([position, first - third]).to(tl.float32)
            if GLU:
                part = gated(part, BLOCK_M, SLICE)
            part = activate(part, ACTIVATION)
            if GLU or MASK:
                part = tl.where(valid[:, None], part, 0.0)
            to = first // 2 if GLU else first
            if RESIDUAL and ADDS:
                out.atomic_add([row, to], scale * part)
            else:
                if RESIDUAL:
                    part = out.load([row, to]).to(tl.float32) + scale * part
                out.store([row, to], part.to(out_ptr.dtype.element_ty))


@triton.jit
def _finish_kernel(
    product_ptr,
    b_ptr,
    table_ptr,
    lengths_ptr,
    out_ptr,
    tokens,
    frames,
    columns,
    scale,
    out_group,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    TABLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MASK: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    group = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = tl.load(b_ptr + group * columns + cols, mask=cols < columns, other=0.0)
    wait(PDL)
    at = product_ptr + (group * tokens + rows)[:, None] * columns + cols[None, :]
    acc = tl.load(at, mask=(rows < tokens)[:, None] & (cols < columns)[None, :], other=0.0).to(tl.float32)
    finished(
        acc + bias[None, :], rows, tl.program_id(0) * BLOCK_N, tokens, frames, columns, table_ptr, lengths_ptr,
        out_ptr + group * out_group, scale, BLOCK_M, BLOCK_N, ACTIVATION, GLU, TABLE, RESIDUAL, MASK,
    )  # fmt: skip


def linear(
    a,
    weight,
    bias,
    out,
    *,
    tile: Tile,
    activation="none",
    table=None,
    glu=None,
    residual_scale=None,
    mask=None,
    dot="ieee",
    ahead=0,
    pdl=False,
) -> None:
    """out = epilogue(a weight^T + bias), or, with `residual_scale`, out += residual_scale * epilogue(...).

    a (N, K) and weight (C, K) in the compute type, bias float32 (C,), out (N, C) of any type; with a leading group
    dimension on all four, one independent product a group.
    activation: after the sum. table = (values (>= S, C/3), S): added to the middle third of the columns at position
    token % S. glu = (lengths int32 (B,), S): columns alternate value, gate; value times sigmoid of gate, zero past the
    length, so out is (N, C/2).
    mask = (lengths int32 (B,), S): the result counts as zero past the length.
    ahead: where programs stay, the weights are asked for, so many bytes at a time (0: not), before the wait for `a`.
    tile = LIBRARY rounds the product to the compute type once more, and ignores `dot`. A persistent tile is one
    only for operands that the copy engine takes (`pieces.copyable`).
    """
    if a.dim() == 3 and tile.copied:
        # Programs that stay fill the card with one group.
        for each in zip(a, weight, bias, out, strict=True):
            linear(*each, tile=tile, activation=activation, residual_scale=residual_scale, dot=dot, pdl=pdl)
        return
    groups = a.shape[0] if a.dim() == 3 else 1
    tokens, width = a.shape[-2:]
    columns = weight.shape[-2]
    lengths, frames = glu or mask or (bias, table[1] if table else tokens)
    epilogue = {
        "b_ptr": bias,
        "lengths_ptr": lengths,
        "out_ptr": out,
        "tokens": tokens,
        "frames": frames,
        "columns": columns,
        "scale": 1.0 if residual_scale is None else residual_scale,
        "ACTIVATION": activation,
        "GLU": glu is not None,
        "TABLE": table is not None,
        "RESIDUAL": residual_scale is not None,
        "MASK": mask is not None,
    }
    values = table[0] if table else bias
    if tile == LIBRARY:
        product = torch.matmul(a, weight.transpose(-2, -1))
        rows, width_of_tile = 8, 256
        _finish_kernel[(triton.cdiv(columns, width_of_tile), triton.cdiv(tokens, rows), groups)](
            product_ptr=product, table_ptr=values, out_group=out.shape[-1] * tokens, BLOCK_M=rows,
            BLOCK_N=width_of_tile, PDL=False, num_warps=4, **epilogue,
        )  # fmt: skip
        return
    options = {
        **epilogue,
        "WIDTH": width,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "DOT": dot,
        "PDL": pdl,
        **tile.options(pdl),
    }
    grid = (triton.cdiv(columns, tile.n), triton.cdiv(tokens, tile.m), groups)
    if tile.copied and copyable(a) and copyable(weight):
        programs = (min(grid[0] * grid[1], tile.copied * multiprocessors(a.device)),)
        options["a"] = TensorDescriptor.from_tensor(a, [tile.m, tile.k])
        options["w_ptr"], options["ASK"] = weight, ahead
        options["w"] = TensorDescriptor.from_tensor(weight, [tile.n, tile.k])
        sliced = tile.n // max(tile.stored, 1)
        positions = table[0][:frames] if table else weight
        aligned = not table or (columns // 3 % sliced == 0 and copyable(positions))  # a slice is of keys or not
        if tile.stored and storable(out) and aligned:
            stored = sliced // 2 if glu else sliced
            _stored_kernel[programs](
                out=TensorDescriptor.from_tensor(out, [tile.m, stored]),
                table=TensorDescriptor.from_tensor(positions, [tile.m, sliced]), third=columns // 3, SLICES=tile.stored,
                ADDS=a.is_cuda and out.dtype == torch.float32, **options,  # the interpreter's copies do not add
            )  # fmt: skip
        else:
            _persistent_kernel[programs](table_ptr=values, **options)
        return
    _linear_kernel[grid](
        a_ptr=a, w_ptr=weight, table_ptr=values, a_group=tokens * width, w_group=columns * width,
        out_group=out.shape[-1] * tokens, **options,
    )  # fmt: skip
