"""One model on several GPUs, a process each: every process has its own share of the speech and the same weights.

`torch.distributed.run` starts the processes; without it a run is the only one, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """This process's place among those of a run. device: "cuda" becomes this process's own GPU."""

    def __init__(self, device: str):
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.first = self.rank == 0
        self.device = torch.device(device)
        if self.size == 1:
            return
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        # What the hosts agree on goes past the GPUs, which nobody waits for.
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def share(self, items: Sequence) -> list:
        """This process's part of what all processes know."""
        return list(items[self.rank :: self.size])

    def agree(self, *values: float) -> list[float]:
        """The first process's values, in all of them. A meeting point: everybody waits for the first here."""
        if self.size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(agreed, 0)
        return agreed.tolist()

    def average(self, gradients: Tensor) -> None:
        """The mean over processes, in place."""
        if self.size > 1:
            dist.all_reduce(gradients)
            gradients.mul_(1.0 / self.size)

    def same(self, tensors: Sequence[Tensor]) -> None:
        """The first process's numbers in all of them, in place."""
        if self.size > 1:
            for tensor in tensors:
                whole = tensor.contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
