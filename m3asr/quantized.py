"""Weights with 8 bits each: a large matrix as int8 NAME and one float32 step a row, NAME.scale; the rest as float16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from m3asr.errors import ModelError

SCALE = ".scale"
_LEVELS = 127
# A step that does not reach the largest weight of a row is finer for all others; which is better, the row decides.
_CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# Smaller tensors save next to nothing, and in shorter rows the scales would be what is stored.
_MIN_SIZE = 16384
_MIN_ROW = 64


def halve(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Floating tensors as float16, others as they are. Raises ValueError with the names of those it cannot hold."""
    with np.errstate(over="ignore"):
        half = {
            name: value.astype(np.float16, order="C") if _is_floating(value) else value for name, value in state.items()
        }
    _need_finite(half, "not finite in float16")
    return half


def quantize(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Large matrices as int8 with NAME.scale float32 (of the leading dimensions), other floating tensors as float16.

    Integer tensors stay. Raises ValueError, with the names, for values that are not finite and for tensors that could
    not be told from quantized ones.
    """
    _need_finite(state, "not finite")
    tensors, rest = {}, {}
    for name, value in state.items():
        lead = _row_dims(name, value)
        if value.dtype == np.int8 or (lead and name + SCALE in state):
            raise ValueError(f"{name} cannot be stored: int8 tensors and {SCALE} beside a matrix mean 8-bit weights")
        if lead:
            tensors[name], tensors[name + SCALE] = _quantized(value.astype(np.float32, copy=False), lead)
        else:
            rest[name] = value
    return {**tensors, **halve(rest)}


def dequantize(tensors: Mapping[str, np.ndarray], source: str | Path = "the weights' file") -> dict[str, np.ndarray]:
    """What `quantize` or `halve` made, or plain tensors -> all by name, floating ones as float32.

    Raises ModelError, which says `source`, for int8 whose scale is missing or does not fit.
    """
    weights = {}
    for name, value in tensors.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in tensors:
            if tensors[name.removesuffix(SCALE)].dtype == np.int8:
                continue
        if value.dtype == np.int8:
            scale = tensors.get(name + SCALE)
            # What a row is, the scale's shape says.
            if scale is None or not _is_floating(scale) or not _leads(scale.shape, value.shape):
                found = "no scale" if scale is None else f"a scale of {scale.dtype} {scale.shape}"
                raise ModelError(
                    f"{source} is damaged ({name}, int8 {value.shape}, has {found}): convert the checkpoint again"
                )
            value = value * scale.astype(np.float32).reshape(scale.shape + (1,) * (value.ndim - scale.ndim))
        weights[name] = value.astype(np.float32, copy=False) if _is_floating(value) else value
    return weights


def _row_dims(name: str, value: np.ndarray) -> int:
    """How many leading dimensions number the rows of a matrix to quantize; 0 for a tensor that stays.

    (out, in) and experts (E, out, in): all but the last. A convolution's row is its output channel: (out, in, k...).
    """
    # A router's choice turns on small differences, and routers are a thousandth of the weights.
    if not _is_floating(value) or value.ndim < 2 or value.size < _MIN_SIZE or name.endswith("router_weights"):
        return 0
    lead = value.ndim - 1 if value.shape[-1] >= _MIN_ROW else 1  # a convolution's kernel is short
    return lead if value.size // int(np.prod(value.shape[:lead])) >= _MIN_ROW else 0


def _quantized(value: np.ndarray, lead: int) -> tuple[np.ndarray, np.ndarray]:
    """-> int8 like `value`, float32 steps (of the leading dimensions) with the least squared error of those tried."""
    rows = value.reshape(-1, int(np.prod(value.shape[lead:])))  # (R, C)
    largest = np.abs(rows).max(1, keepdims=True)  # (R, 1)
    least = np.full_like(largest, np.inf)
    scale, levels = np.zeros_like(largest), np.zeros(rows.shape, np.int8)
    for ratio in _CLIPPING:
        step = largest * np.float32(ratio / _LEVELS)
        # A row of zeros has no step, and needs none.
        tried = np.divide(rows, step, out=np.zeros_like(rows), where=step > 0)
        tried = np.clip(np.rint(tried), -_LEVELS, _LEVELS)
        error = np.square(rows - tried * step).sum(1, keepdims=True)
        better = error < least
        least = np.where(better, error, least)
        scale, levels = np.where(better, step, scale), np.where(better, tried.astype(np.int8), levels)
    return levels.reshape(value.shape), scale.reshape(value.shape[:lead])


def _need_finite(state: Mapping[str, np.ndarray], what: str) -> None:
    if broken := [name for name, value in state.items() if _is_floating(value) and not np.isfinite(value).all()]:
        raise ValueError(f"{what}: {', '.join(broken)}")


def _leads(lead: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return 0 < len(lead) < len(shape) and shape[: len(lead)] == lead


def _is_floating(value: np.ndarray) -> bool:
    return np.issubdtype(value.dtype, np.floating)
