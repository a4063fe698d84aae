"""How a row of the conformance table is written: a torch function or module, with inputs of named sizes.

The rows are those of the modules named after this one; all that a forward may call has one.
"""

import torch

ROWS = []


class Make:
    """An input: its sizes ("B" and "T" vary), its dtype, and how to fill it."""

    def __init__(self, *dims, dtype="float32", low=None, high=None, positive=False):
        self.dims, self.dtype, self.low, self.high, self.positive = dims, dtype, low, high, positive

    def values(self, sizes, generator):
        shape = [sizes.get(d, d) for d in self.dims]
        if self.dtype == "bool":
            return torch.rand(shape, generator=generator) > 0.4
        if self.low is not None and self.dtype.startswith("int"):
            return torch.randint(self.low, self.high, shape, generator=generator).to(getattr(torch, self.dtype))
        x = torch.randn(shape, generator=generator)
        if self.positive:
            x = x.abs() + 0.1
        if self.low is not None:
            x = torch.rand(shape, generator=generator) * (self.high - self.low) + self.low
        return x


def f(*dims):
    return Make(*dims)


def pos(*dims):
    return Make(*dims, positive=True)


def unit(*dims):
    return Make(*dims, low=-0.95, high=0.95)


def ints(low, high, *dims, dtype="int64"):
    return Make(*dims, dtype=dtype, low=low, high=high)


def bools(*dims):
    return Make(*dims, dtype="bool")


def row(name, function, *inputs):
    ROWS.append((name, function, inputs))


def module(name, make, *inputs):
    torch.manual_seed(7)
    built = make().eval()
    with torch.no_grad():
        for n, p in [*built.named_parameters(), *built.named_buffers()]:
            if p.dtype.is_floating_point:  # running statistics and affine weights other than 0 and 1
                p.copy_(torch.rand_like(p) * 0.8 + 0.3 if "var" in n else torch.randn_like(p) * 0.3)
    row(name, built, *inputs)


X = f("B", "T", 6)
IMAGE = f("B", 4, "T", 9)
POSITIVE = pos("B", "T", 6)
SEQUENCE = f("B", 4, "T")
