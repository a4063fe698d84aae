"""What the engine is compared with: the PyTorch model as it is, with a grouped product, in a graph, and compiled."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from m3asr import ops

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


def moe_grouped(x, expert_idx, w_1, b_1, w_2, b_2, activation):
    """`ops.moe` by two grouped matrix products: nothing depends on a value on the host."""
    chosen, order = torch.sort(expert_idx, stable=True)
    ends = (expert_idx.unsqueeze(0) <= torch.arange(w_1.shape[0], device=x.device).unsqueeze(1)).sum(
        1, dtype=torch.int32
    )
    hidden = grouped_mm(x[order], w_1.transpose(1, 2), offs=ends) + b_1[chosen]
    y = grouped_mm(ops.ACTIVATIONS[activation](hidden), w_2.transpose(1, 2), offs=ends) + b_2[chosen]
    return torch.empty_like(y).index_copy_(0, order, y)


@contextmanager
def grouped():
    """Inside, the PyTorch model runs its experts by `moe_grouped`."""
    loop, ops.moe = ops.moe, moe_grouped
    try:
        yield
    finally:
        ops.moe = loop


def half(model, dtype=torch.bfloat16):
    """A copy of the model in another type."""
    return copy.deepcopy(model).to(dtype)


def captured(run):
    """`run` as the replay of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    graph.outputs = outputs
    return graph
