"""In which type each operation of a strongly typed network computes."""

import fnmatch
from dataclasses import dataclass

import torch

from .errors import TraceError

LOW = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """Matrix products and convolutions compute in `name`; so does the elementwise work on their results.

    Norms, softmax, reductions, exponentials and logarithms compute in float32 and hand back the type they were given.
    What the forward casts by an explicit `.float()` stays float32 until it meets a low-precision tensor, and so does
    everything inside modules whose path matches one of `keep_float32` (shell patterns, as "encoder.*.router").
    """

    name: str = "fp32"
    keep_float32: tuple = ()

    def __post_init__(self):
        if self.name not in LOW:
            raise TraceError(f"unknown precision {self.name!r}; there are {', '.join(LOW)}")

    @property
    def low(self):
        return LOW[self.name]

    def keeps(self, path):
        return any(fnmatch.fnmatch(path, p) or fnmatch.fnmatch(path, p + ".*") for p in self.keep_float32)
