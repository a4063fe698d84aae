"""Which elements a dropout keeps, decided anew from a seed and a place wherever it is asked, so no mask is stored."""

import torch
import triton
import triton.language as tl


@triton.jit
def kept(seed_ptr, salt, place, drop):
    """float32: 1 / (1 - drop) where the element at `place` is kept, 0 where not.

    One round of the mixing function of MurmurHash3 (A. Appleby) over the place: a counter-based generator of eight
    operations, since Philox's eighty would take longer than the memory does.
    """
    seed = ((tl.load(seed_ptr) + salt) & 0xFFFFFFFF).to(tl.uint32) * 0x9E3779B1
    x = place.to(tl.uint32) * 0x85EBCA6B + (seed ^ (seed >> 15)) * 0xC2B2AE35
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    x = (x ^ (x >> 16)) >> 8
    return tl.where(x.to(tl.float32) >= drop * 16777216.0, 1.0 / (1.0 - drop), 0.0)


class Seed:
    """One number on the device that changes every step, and a salt for each place that draws from it."""

    def __init__(self, device: torch.device, seed: int):
        self.value = torch.full((1,), seed << 20, dtype=torch.int64, device=device)
        self.salts = 0

    def salt(self) -> int:
        self.salts += 1
        return self.salts

    def advance(self) -> None:
        """To the next step's numbers; part of a captured step."""
        self.value.add_(1 << 10)
