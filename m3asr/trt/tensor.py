"""The symbolic tensor: what a module's forward sees instead of data while its network is being built."""

import torch

from .errors import TraceError


class SymTensor(torch.Tensor):
    """A torch.Tensor without data. It is either a node of the network or a constant known while tracing.

    Attributes:
        fake: torch's own FakeTensor of the same call: dtype, symbolic sizes and strides come from it.
        pinned: True when an explicit `.float()` or `keep_float32` holds it in float32.
        viewed: other tensors look into it.
        base, replay: for a view, the tensor it looks into and how to look again after that tensor was written to.
    """

    @staticmethod
    def __new__(cls, tracer, fake, node=None, const=None, pinned=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, fake.shape, strides=fake.stride(), storage_offset=0, dtype=fake.dtype, device=fake.device
        )

    def __init__(self, tracer, fake, node=None, const=None, pinned=False):
        self.tracer, self.fake, self.pinned = tracer, fake, pinned
        self._node, self._const = node, const
        self.base, self.replay, self.version, self.seen = None, None, 0, 0
        self.viewed = False

    def refresh(self):
        """A view reads its base again when the base was written to since."""
        if self.base is not None:
            self.base.refresh()
            if self.base.version != self.seen:
                again = self.replay(self.base)
                self._node, self._const, self.seen = again._node, again._const, self.base.version
                self.version += 1

    @property
    def node(self):
        self.refresh()
        return self._node

    @property
    def const(self):
        self.refresh()
        return self._const

    def become(self, other):
        """Takes another's value in place: what an in-place operation leaves behind."""
        self.refresh()
        self._node, self._const = other.node, other.const
        self.version += 1

    def __repr__(self, **_):
        names = self.tracer.sizes.readable
        return (
            f"SymTensor({[names(s.node.expr) if isinstance(s, torch.SymInt) else s for s in self.shape]}, {self.dtype})"
        )

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tracer = _tracer_of(args, kwargs)
        if tracer is None or not tracer.active:
            raise TraceError(
                "a symbolic tensor outlived its trace (was it stored on the module by forward?); "
                "it has no data and cannot be computed with"
            )
        return tracer.function(function, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        tracer = _tracer_of(args, kwargs or {})
        if tracer is None or not tracer.active:
            raise TraceError("a symbolic tensor was used outside of its trace")
        return tracer.dispatch(function, args, kwargs or {})


def _tracer_of(args, kwargs):
    from torch.utils._pytree import tree_leaves

    return next((a.tracer for a in tree_leaves((args, kwargs)) if isinstance(a, SymTensor)), None)
