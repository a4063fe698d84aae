"""The linear layer (kernels/linear.py) where operands, and results, come and go by the copy engine."""

from __future__ import annotations

import triton
import triton.language as tl

from m3asr.kernels.epilogue import asked, finished, left, parts_asked, parts_joined, scale_of
from m3asr.kernels.pieces import activate, ask, copied_product, dot, gated, release, slices, wait


@triton.jit
def copied_kernel(
    a,
    w,
    w_ptr,
    b_ptr,
    table_ptr,
    lengths_ptr,
    out_ptr,
    parts_ptr,
    sums_ptr,
    left_raw_ptr,
    left_parts_ptr,
    groups,
    tokens,
    frames,
    columns,
    scale,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAYS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    LEAVES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    TABLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MASK: tl.constexpr,
    ASK: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Operands by the copy engine. STAYS: programs make one tile after another; otherwise there is one for each, and
    where BLOCK_K is all of WIDTH its weights come before the wait.
    """
    release(PDL)
    ask(w_ptr, groups * columns * WIDTH * 2, ASK)
    if STAYS:
        wait(PDL)
        tiles = groups * tl.cdiv(tokens, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
        # One loop over all steps of all tiles: a tile's first copies begin before the one before it is finished.
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(
                tile, a, w, b_ptr, table_ptr, lengths_ptr, out_ptr, parts_ptr, sums_ptr, left_raw_ptr, left_parts_ptr,
                tokens, frames, columns, scale, eps, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, PART, LEAVES, ACTIVATION,
                GLU, TABLE, RESIDUAL, MASK, DOT, False, False,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), a, w, b_ptr, table_ptr, lengths_ptr, out_ptr, parts_ptr, sums_ptr, left_raw_ptr,
            left_parts_ptr, tokens, frames, columns, scale, eps, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, PART, LEAVES,
            ACTIVATION, GLU, TABLE, RESIDUAL, MASK, DOT, PDL, BLOCK_K >= WIDTH,
        )  # fmt: skip


@triton.jit
def _tile(
    tile, a, w, b_ptr, table_ptr, lengths_ptr, out_ptr, parts_ptr, sums_ptr, left_raw_ptr, left_parts_ptr, tokens,
    frames, columns, scale, eps, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, LEAVES: tl.constexpr, ACTIVATION: tl.constexpr,
    GLU: tl.constexpr, TABLE: tl.constexpr, RESIDUAL: tl.constexpr, MASK: tl.constexpr, DOT: tl.constexpr,
    WAITS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of `copied_kernel`. All that it takes besides the operands is asked for before the product."""
    tiles_n = tl.cdiv(columns, BLOCK_N)
    row, col = tile // tiles_n % tl.cdiv(tokens, BLOCK_M) * BLOCK_M, tile % tiles_n * BLOCK_N
    group = tile // (tl.cdiv(tokens, BLOCK_M) * tiles_n)
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    a_row, w_row = group * tokens + row, group * columns + col
    out_ptr += group.to(tl.int64) * tokens * columns  # where there are groups, all columns are stored
    bias = tl.load(b_ptr + group * columns + cols, mask=cols < columns, other=0.0)
    if PARTS:
        BLOCK_P: tl.constexpr = triton.next_power_of_2(PARTS)
        sums = tl.load(sums_ptr + cols, mask=cols < columns, other=0.0)
    if WHOLE:
        weights = w.load([w_row, 0])
    wait(WAITS)
    if PARTS:
        means, squares = parts_asked(parts_ptr, rows, tokens, PARTS, BLOCK_P)
    valid, added = asked(
        rows, col, tokens, frames, columns, table_ptr, lengths_ptr, out_ptr, BLOCK_N, GLU, TABLE, RESIDUAL, MASK
    )
    if WHOLE and BLOCK_M < 64:
        acc = tl.trans(dot(weights, tl.trans(a.load([a_row, 0])), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), DOT))
    elif WHOLE:
        acc = dot(a.load([a_row, 0]), tl.trans(weights), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), DOT)
    else:
        acc = copied_product(a, w, a_row, w_row, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K, DOT)
    if PARTS:
        mean, scaled = parts_joined(means, squares, eps, WIDTH, PART, BLOCK_P)
        acc = acc * (scaled / scale_of(a.dtype))[:, None] - (mean * scaled)[:, None] * sums[None, :]
    acc = finished(
        acc + bias[None, :], valid, added, rows, col, tokens, columns, out_ptr, scale, BLOCK_M, BLOCK_N, ACTIVATION,
        GLU, TABLE, RESIDUAL, MASK,
    )  # fmt: skip
    if LEAVES:
        left(acc, rows, cols, tokens, columns, left_raw_ptr, left_parts_ptr, col // BLOCK_N, BLOCK_N)


@triton.jit
def stored_kernel(
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
    """`copied_kernel` with `finished` a slice of columns at a time, each stored, or added, by the copy engine."""
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
