"""Layer norm of the residual stream, alone: for many tokens, and behind the last block."""

from __future__ import annotations

import triton
import triton.language as tl

from m3asr.kernels.pieces import Tile, at_least_16, normalise, release, wait


@triton.jit
def _norm_kernel(
    x_ptr,
    prior_w_ptr,
    prior_b_ptr,
    w_ptr,
    b_ptr,
    prior_out_ptr,
    out_ptr,
    float_out_ptr,
    tokens,
    eps,
    prior_eps,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    d_in = d < WIDTH
    if PRIOR:
        prior_w, prior_b = (
            tl.load(prior_w_ptr + d, mask=d_in, other=0.0),
            tl.load(prior_b_ptr + d, mask=d_in, other=0.0),
        )
    if AFFINE:
        w, b = tl.load(w_ptr + d, mask=d_in, other=0.0), tl.load(b_ptr + d, mask=d_in, other=0.0)
    wait(PDL)
    at = rows.to(tl.int64)[:, None] * WIDTH + d[None, :]
    mask = (rows < tokens)[:, None] & d_in[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if PRIOR:
        x = normalise(x, d_in[None, :], WIDTH, prior_eps)
        x = x * prior_w[None, :] + prior_b[None, :]
        tl.store(prior_out_ptr + at, x, mask=mask)
    y = normalise(x, d_in[None, :], WIDTH, eps)
    if AFFINE:
        y = y * w[None, :] + b[None, :]
        tl.store(float_out_ptr + at, y, mask=mask)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


def norm(x, out, *, eps, tile: Tile, prior=None, affine=None, pdl=False) -> None:
    """out = (x - mean) / sqrt(var + eps) over the last dimension; x float32 (N, D), out (N, D) of any type.

    prior = (weight, bias, eps, x_out): x is first replaced by its layer norm, also stored in x_out (may be x).
    affine = (weight, bias, float_out): out is multiplied and shifted, and written to float_out (N, D) float32 as well.
    """
    tokens, width = x.shape
    prior_w, prior_b, prior_eps, prior_out = prior if prior else (x, x, 0.0, x)
    w, b, float_out = affine if affine else (x, x, x)
    _norm_kernel[(triton.cdiv(tokens, tile.m),)](
        x,
        prior_w,
        prior_b,
        w,
        b,
        prior_out,
        out,
        float_out,
        tokens,
        eps,
        prior_eps,
        WIDTH=width,
        BLOCK_M=tile.m,
        BLOCK_D=at_least_16(width),
        PRIOR=prior is not None,
        AFFINE=affine is not None,
        PDL=pdl,
        **tile.options(pdl),
    )
