"""A linear layer with what follows it: activation, GLU, table, or the sum into the residual stream."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from m3asr.kernels.epilogue import Unnormed, asked, finished
from m3asr.kernels.linear_copied import copied_kernel, stored_kernel
from m3asr.kernels.pieces import Tile, at_least_16, copyable, dot, multiprocessors, release, storable, wait

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
    col = tl.program_id(0) * BLOCK_N
    row_in = (rows < tokens)[:, None]
    col_in = (cols < columns)[:, None]
    a_at = a_ptr + rows.to(tl.int64)[:, None] * WIDTH + k[None, :]
    w_at = w_ptr + cols[:, None] * WIDTH + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    wait(PDL)
    valid, added = asked(
        rows, col, tokens, frames, columns, table_ptr, lengths_ptr, out_ptr, BLOCK_N, GLU, TABLE, RESIDUAL, MASK
    )
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
        acc + bias[None, :], valid, added, rows, col, tokens, columns, out_ptr, scale, BLOCK_M, BLOCK_N, ACTIVATION,
        GLU, TABLE, RESIDUAL, MASK,
    )  # fmt: skip


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
    col, out_ptr = tl.program_id(0) * BLOCK_N, out_ptr + group * out_group
    valid, added = asked(
        rows, col, tokens, frames, columns, table_ptr, lengths_ptr, out_ptr, BLOCK_N, GLU, TABLE, RESIDUAL, MASK
    )
    finished(
        acc + bias[None, :], valid, added, rows, col, tokens, columns, out_ptr, scale, BLOCK_M, BLOCK_N, ACTIVATION,
        GLU, TABLE, RESIDUAL, MASK,
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
    sums=None,
    eps=0.0,
    leaves: Unnormed | None = None,
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
    Where the copy engine takes the operands, a may be `Unnormed`, whose norm with eps is then multiplied; sums float32
    (C,): of weight's rows. And `out` += ... may leave what the next norm takes in `leaves`, whose parts have tile.n
    columns.
    ahead: the weights are asked for, so many bytes at a time (0: not), before the wait for `a`.
    tile = LIBRARY rounds the product to the compute type once more, and ignores `dot`. A tile is `copied` only with
    operands that the copy engine takes (`pieces.copyable`).
    """
    parts, part, count = bias, 1, 0
    if isinstance(a, Unnormed):
        a, parts, part, count = a.raw, a.parts, a.columns, a.parts.shape[0]
    if a.dim() == 3 and tile.stored:
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
    joins = count or leaves is not None
    rows_of_a, rows_of_w = a.reshape(-1, width), weight.reshape(-1, width)
    if (tile.copied or joins) and copyable(rows_of_a) and copyable(rows_of_w):
        k = options["BLOCK_K"] = min(tile.k, at_least_16(width))
        tiles, most = math.prod(grid), max(1, tile.copied) * multiprocessors(a.device)
        stays = tiles > most and k < width
        programs = most if stays else tiles
        options["a"] = TensorDescriptor.from_tensor(rows_of_a, [tile.m, k])
        options["w_ptr"], options["ASK"] = weight, ahead if k < width else 0
        options["w"] = TensorDescriptor.from_tensor(rows_of_w, [tile.n, k])
        sliced = tile.n // max(tile.stored, 1)
        positions = table[0][:frames] if table else weight
        aligned = not table or (columns // 3 % sliced == 0 and copyable(positions))  # a slice is of keys or not
        if tile.stored and storable(out) and aligned and not joins:
            stored = sliced // 2 if glu else sliced
            stored_kernel[(programs,)](
                out=TensorDescriptor.from_tensor(out, [tile.m, stored]),
                table=TensorDescriptor.from_tensor(positions, [tile.m, sliced]), third=columns // 3, SLICES=tile.stored,
                ADDS=a.is_cuda and out.dtype == torch.float32, **options,  # the interpreter's copies do not add
            )  # fmt: skip
            return
        assert leaves is None or leaves.columns == tile.n, "a tile's columns are not those of a part"
        copied_kernel[(programs,)](
            table_ptr=values, parts_ptr=parts, sums_ptr=bias if sums is None else sums,
            left_raw_ptr=a if leaves is None else leaves.raw, left_parts_ptr=bias if leaves is None else leaves.parts,
            eps=eps, groups=groups, STAYS=stays, PARTS=count, PART=part, LEAVES=leaves is not None, **options,
        )  # fmt: skip
        return
    assert not joins, "norms are made only of what the copy engine takes"
    _linear_kernel[grid](
        a_ptr=a, w_ptr=weight, table_ptr=values, a_group=tokens * width, w_group=columns * width,
        out_group=out.shape[-1] * tokens, **options,
    )  # fmt: skip
