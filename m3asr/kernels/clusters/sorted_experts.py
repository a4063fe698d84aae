"""Both products of a layer's experts for many tokens by pairs of programs, a pair some of an expert's columns: see
expert_products.cu.
"""

from __future__ import annotations

import ctypes
from functools import cached_property

import torch

from m3asr.kernels.clusters.machine import Kernels, PerWeight, on_card
from m3asr.kernels.clusters.products import PROGRAMS, ROWS, Layer, ProductSizes, addresses, fields

FILES = ("activation.cu", "stream.cu", "results.cu", "product.cu", "expert_products.cu")
DOWN_COLUMNS = 64  # of a program; of the first product as many as of any other


class _Sorted(ctypes.Structure):
    _fields_ = fields((ctypes.c_void_p, "tile_expert slot_token gates"), (ctypes.c_int, "tiles"))


class SortedExperts:
    """The launcher for one stack's sizes, whose `hidden` is the experts'."""

    def __init__(self, sizes: ProductSizes, device: torch.device, load=on_card):
        self.sizes, self._device, self._load = sizes, device, load
        # Not of self, which would then live until the garbage collector comes.
        self._matrix = PerWeight(lambda weight, kernels, rows: kernels.matrix(weight.flatten(0, 1), rows))

    @cached_property
    def kernels(self) -> Kernels:
        """Compiled, or found where they are kept, when they are first asked for."""
        return self._load(*self.sizes.source(FILES), self._device)

    def __call__(self, y, up, down, slot_token, tile_expert, gate, out, *, scale, pdl=False) -> None:
        """out[slot] = scale * gate[token] * down[e](act(up[e](y[slot]))) for all slots of tiles that have an expert e.

        y, out (slots, D) in the compute type, slots in tiles of ROWS; slot_token int32 (slots,) and tile_expert int32
        (tiles,) as `sort_tokens` leaves them; gate float32 (N,) or None; up, down with `weight` (E, ., .) in the compute
        type and `bias` float32 (E, .). All contiguous.
        """
        h = torch.empty(y.shape[0], self.sizes.hidden, dtype=y.dtype, device=y.device)
        tensors = {"tile_expert": tile_expert, "slot_token": slot_token, "gates": gate}
        task = _Sorted(tiles=tile_expert.numel(), **addresses(tensors))
        self._launch("experts_up", y, up, h, self.sizes.cut.columns, task, pdl)
        self._launch("experts_down", h, down, out, DOWN_COLUMNS, task, pdl, scale)

    def _launch(self, name: str, a, layer, out, its: int, task: _Sorted, pdl: bool, scale=1.0) -> None:
        experts, columns, inner = layer.weight.shape
        kernels, cut = self.kernels, self.sizes.cut
        dense = Layer(
            tokens=a.shape[0], frames=a.shape[0], columns=columns, scale=scale, **addresses({"bias": layer.bias})
        )
        kernels.launch(
            name, columns // its * experts, cut.threads, kernels.matrix(a, ROWS), self._matrix(layer.weight, kernels, its),
            kernels.matrix(out, ROWS), dense, task, shared=self.sizes.shared_bytes(inner, its, 128, cut.groups),
            cluster=PROGRAMS, pdl=pdl,
        )  # fmt: skip
