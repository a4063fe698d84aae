"""Sizes with names: torch's own SymInt, decided over the whole stated range, and lowered to TensorRT shape layers.

A dimension "T" is a torch.SymInt. Arithmetic on it stays symbolic. A comparison is answered only where it has one
answer for every size in range; anything else would freeze one branch into the network and is an error.
"""

import itertools

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy import functions as sf
from torch.utils._sympy.value_ranges import bound_sympy

from .errors import TraceError


class NamedSizes(ShapeEnv):
    """A ShapeEnv that never specialises: `ranges` maps a name to (smallest, usual, largest)."""

    def __init__(self, ranges):
        super().__init__()
        self.ranges = {}
        self.named = {}  # name -> torch.SymInt
        self.names = {}  # sympy symbol -> name
        self.internal = 0  # >0 while torch's own code asks, not the user's forward
        self.where = lambda: ""
        self._answers = {}  # expression -> (answer for the whole range or None, answers at sampled sizes)
        taken = set()
        for name, (low, usual, high) in ranges.items():
            if not 0 <= low <= usual <= high:
                raise TraceError(f"range of {name} is {(low, usual, high)}; it needs 0 <= smallest <= usual <= largest")
            self.ranges[name] = (low, usual, high)
            if low == high:
                self.named[name] = low
                continue
            # A hint answers torch's own questions (is this contiguous?), so 0 and 1 and equal hints would mislead it.
            hint = next((h for h in itertools.chain(range(max(usual, 2), high + 1)) if h not in taken), max(usual, 1))
            taken.add(hint)
            source = ConstantSource(name)
            symbol = self.create_symbol(
                hint,
                source=source,
                dynamic_dim=DimDynamic.DYNAMIC,
                constraint_dim=None,
                do_not_specialize_zero_one=True,
            )
            self.constrain_symbol_range(symbol, low, high)
            self.named[name] = self.create_symintnode(symbol, hint=hint, source=source)
            self.names[symbol] = name

    def readable(self, expr):
        """`expr` with the user's names instead of torch's symbols."""
        return str(expr.subs({s: sympy.Symbol(n) for s, n in self.names.items()})) if self.names else str(expr)

    def text(self, size):
        return self.readable(expression(size))

    def largest(self, size):
        """The largest value a size can take within the ranges."""
        if is_fixed(size):
            return int(size)
        return int(bound_sympy(expression(size), self.var_to_range).upper)

    def _samples(self, expr):
        """Size assignments, at least 2 each, over the corners and inside of the range."""
        symbols = sorted(expr.free_symbols & set(self.names), key=str)
        choices = []
        for symbol in symbols:
            low, usual, high = self.ranges[self.names[symbol]]
            low = min(max(low, 2), high)
            # Eight in a row show every remainder of a division by two, four or eight.
            inside = {*range(low, low + 8), usual, (low + high) // 2, high - 1, high}
            choices.append(sorted(v for v in inside if low <= v <= high))
        for values in itertools.islice(itertools.product(*choices), 1024):
            yield dict(zip(symbols, values, strict=True))

    def evaluate_expr(self, expr, hint=None, fx_node=None, size_oblivious=False, fallback_value=None, **_):
        if isinstance(expr, (bool, int)) or expr in (sympy.true, sympy.false) or expr.is_number:
            return sympy.sympify(expr)
        if expr not in self._answers:
            known = self._maybe_evaluate_static(expr)
            sampled = () if known is not None else {sympy.sympify(expr.xreplace(v)) for v in self._samples(expr)}
            self._answers[expr] = known, sampled
        known, sampled = self._answers[expr]
        if known is not None:
            return known
        # Torch asks "is this size 1?" before broadcasting. The general answer also serves size 1 at run time,
        # because a network built for "not 1" broadcasts there by itself. The user's own `if` has no such excuse.
        if len(sampled) == 1 and self.internal:
            return next(iter(sampled))
        if fallback_value is not None:
            return sympy.sympify(fallback_value)
        if self.internal and isinstance(expr, (sympy.Eq, sympy.Ne)):
            # Torch asks whether two sizes happen to agree to take a short cut; the general way is right for all.
            return sympy.sympify(isinstance(expr, sympy.Ne))
        text = self.readable(expr)
        if not isinstance(expr, (sympy.core.relational.Relational, sympy.logic.boolalg.BooleanFunction)):
            raise TraceError(
                f"{self.where()}the size {text} is needed as one fixed number (range(), int() or a Python loop), but "
                f"it varies over {self._stated(expr)}; use tensor operations instead, or give it a fixed size"
            )
        raise TraceError(
            f"{self.where()}whether {text} holds depends on the sizes ({self._stated(expr)}), and a network has one "
            "answer; narrow the range until it is always or never true, or drop the comparison"
        )

    def _stated(self, expr):
        names = [self.names[s] for s in sorted(expr.free_symbols & set(self.names), key=str)]
        return ", ".join(f"{n} = {self.ranges[n][0]}..{self.ranges[n][2]}" for n in names)


def expression(size):
    """The sympy expression of an int, SymInt or SymFloat."""
    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else sympy.sympify(size)


def is_fixed(size):
    return isinstance(size, (int, float)) or expression(size).is_number


def same(a, b):
    """True when two sizes are known to be equal for every assignment of names (never asks the environment)."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    difference = sympy.expand(expression(a) - expression(b))
    return difference == 0


def equal(a, b):
    """True when two sizes are equal for every assignment of names, as far as can be told by trying many."""
    return same(a, b) or bool(a == b)


def lower(expr, symbol, constant, binary, floor, to_float):
    """Writes a sympy expression as layers.

    Args:
        expr: integer or float expression over size symbols.
        symbol: symbol -> node; constant: number -> node; binary: (operation name, a, b) -> node;
        floor: node -> node; to_float: node -> node. Integer nodes are int64, others float32.
    """

    def fold(operation, args):
        first, *rest = [visit(a) for a in args]
        for other in rest:
            first = binary(operation, *alike(first, other))
        return first

    def alike(a, b):
        return (a, b) if a.dtype == b.dtype else (to_float(a), to_float(b))

    def visit(e):
        if e.is_Symbol:
            return symbol(e)
        if e.is_number:
            return constant(int(e) if e.is_integer else float(e))
        kind = e.func
        if kind is sympy.Add:
            return fold("SUM", e.args)
        if kind is sympy.Mul:
            return fold("PROD", e.args)
        if kind in (sympy.Max, sf.Max):
            return fold("MAX", e.args)
        if kind in (sympy.Min, sf.Min):
            return fold("MIN", e.args)
        if kind in (sf.FloorDiv, sf.CleanDiv):
            return fold("FLOOR_DIV", e.args)
        if kind is sf.CeilDiv or (kind is sf.CeilToInt and e.args[0].func is sf.IntTrueDiv):
            a, b = e.args if kind is sf.CeilDiv else e.args[0].args
            return visit(-sf.FloorDiv(-a, b))
        if kind in (sf.Mod, sf.PythonMod, sympy.Mod):
            a, b = e.args
            return visit(a - b * sf.FloorDiv(a, b))
        if kind is sf.ToFloat:
            return to_float(visit(e.args[0]))
        if kind in (sf.IntTrueDiv, sf.FloatTrueDiv):
            a, b = (to_float(visit(x)) for x in e.args)
            return binary("DIV", a, b)
        if kind in (sf.FloorToInt, sf.TruncToInt):
            if e.args[0].func is sf.IntTrueDiv:  # sizes are not negative, so truncation is the floor
                return visit(sf.FloorDiv(*e.args[0].args))
            return floor(visit(e.args[0]))
        if kind in (sf.PowByNatural, sympy.Pow) and e.args[1].is_Integer and e.args[1] > 0:
            return fold("PROD", [e.args[0]] * int(e.args[1]))
        if kind in (sf.FloatPow, sympy.Pow):
            a, b = (to_float(visit(x)) for x in e.args)
            return binary("POW", a, b)
        if kind.__name__ == "OpaqueUnaryFn_sqrt":
            return binary("POW", to_float(visit(e.args[0])), constant(0.5))
        raise TraceError(f"the size expression {e} has no shape layers ({kind.__name__})")

    return visit(expr)
