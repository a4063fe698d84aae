"""A forward that branches on values is run once for each way through it, and the results are chosen between by value.

A network has one path, so `if x.max() > 1: x = x / x.max()` becomes both results and a select. That is exact, and costs
the work of every path; `branches=True` or `False` says that one way is right for all data and keeps the network small.
"""

import warnings

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from .errors import TraceError, TrtError
from .tensor import SymTensor

MOST_PATHS = 8


class Paths:
    """Runs `forward()` along every path; `decide(condition)` answers each branch."""

    def __init__(self, tracer):
        self.tracer = tracer
        self.prefix, self.taken, self.waiting = [], [], []

    def decide(self, condition):
        at = len(self.taken)
        if at < len(self.prefix):
            answer = self.prefix[at]
        else:
            answer = False
            self.waiting.append([*(a for _, a in self.taken), True])
        self.taken.append((condition, answer))
        return answer

    def run(self, forward):
        found, self.waiting = [], [[]]
        while self.waiting:
            self.prefix, self.taken = self.waiting.pop(), []
            try:
                result = forward()
            except TrtError:
                raise
            except Exception:
                if not any(answer for _, answer in self.taken) and not self.waiting:
                    raise
                continue  # a check that fails: no result on this path
            found.append((self.taken, result))
            if len(found) > MOST_PATHS:
                raise TraceError(
                    f"the forward takes more than {MOST_PATHS} ways that depend on values (a loop until something "
                    "holds?), and a network has all of them in it; use torch.where, or pass branches=True or "
                    "branches=False to take every such branch that way"
                )
        if not found:
            raise TraceError("forward raises an exception on every path through it")
        if len(found) > 1:
            warnings.warn(
                f"the forward branches on values: {len(found)} paths are in the network, each with its own work; pass "
                "branches=True or branches=False if one way is right for all data",
                stacklevel=2,
            )
        return self.merged(found, 0)

    def merged(self, found, depth):
        if len(found) == 1:
            return found[0][1]
        sides = {answer: [f for f in found if f[0][depth][1] == answer] for answer in (True, False)}
        if not sides[True] or not sides[False]:
            return self.merged(found, depth + 1)
        condition = found[0][0][depth][0]
        results = [self.merged(sides[answer], depth + 1) for answer in (True, False)]
        (yes, spec), (no, other) = (tree_flatten(r) for r in results)
        if spec != other or any(
            isinstance(a, torch.Tensor) and (a.dim() != b.dim() or a.dtype != b.dtype)
            for a, b in zip(yes, no, strict=True)
        ):
            raise TraceError(
                f"{self.tracer.where()}the two ways of a branch on values return results of different kinds or sizes; "
                "pass branches=True or branches=False to take one"
            )
        chosen = [
            torch.where(condition, a, b) if isinstance(a, SymTensor) or isinstance(b, SymTensor) else a
            for a, b in zip(yes, no, strict=True)
        ]
        return tree_unflatten(chosen, spec)
