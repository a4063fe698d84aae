"""Between the engine and its kernels, for `benchmarks.leave_out`: launches pass, are left out, or do nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl

from m3asr.engines.cuda import CudaEngine
from m3asr.engines.cuda import forward as launches
from m3asr.kernels.clusters import Clusters
from m3asr.kernels.clusters.experts import Experts
from m3asr.kernels.clusters.products import Products
from m3asr.kernels.pieces import Tile, release, wait

NAMES = (
    "attention", "depthwise", "expert_product", "first_convolution", "linear", "log_softmax", "next_convolution",
    "norm", "route", "sort_tokens",
)  # fmt: skip
METHODS = {
    **{name: (Clusters, name) for name in ("attention_gated", "convolution", "convolution_router")},
    **{name: (Clusters, name) for name in ("feed_forward", "feed_forward_qkv")},
    "experts": (Experts, "__call__"),
    "route": (Products, "route"),
}
# Where the launches that choose experts have their choices.
ROUTERS = {"router": 6, "cluster: route": 5, "cluster: convolution router": 11}
ROUTED = (*ROUTERS, "sort", "experts 1", "experts 2", "cluster: experts")


@triton.jit
def empty_kernel(out_ptr, PDL: tl.constexpr):
    release(PDL)
    wait(PDL)
    tl.store(out_ptr + tl.program_id(0), 1)


class Launches:
    """Stands between `Forward` and its kernels: calls of each kind pass, are left out, or become something else."""

    def __init__(self):
        self.original = {name: getattr(launches, name) for name in NAMES}
        self.methods = {name: getattr(*where) for name, where in METHODS.items()}
        self.kinds: dict[str, int] = {}
        self.choices, self.sorted, self.counted, self.lengths = [], [], [], None
        self.recording = False
        self.scratch = torch.zeros(1024, device="cuda", dtype=torch.int32)
        self.reset()

    def reset(self):
        self.passes = lambda kind: True
        self.becomes_empty = self.one_layer = False
        self.plain: tuple[str, ...] = ()
        self.layer, self.changed = {}, None

    def __enter__(self):
        for name in NAMES:
            setattr(launches, name, self._stands_for(name, self.original[name]))
        for name, method in self.methods.items():
            setattr(*METHODS[name], self._stands_for_method(name, method))
        return self

    def __exit__(self, *_):
        for name, function in self.original.items():
            setattr(launches, name, function)
        for name, method in self.methods.items():
            setattr(*METHODS[name], method)

    def _stands_for_method(self, name, method):
        def call(kernels, *args, **options):
            self._stands_for("cluster: " + name, partial(method, kernels))(*args, **options)

        return call

    def _stands_for(self, name, original):
        def call(*args, **options):
            kind = self._kind(name, args, options)
            if name == "first_convolution":  # the first launch of a run
                self.layer, self.kinds = dict.fromkeys(ROUTED, 0), {}
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
            if kind in ROUTED:
                args = self._steady(name, kind, list(args), options)
            if kind in self.plain:
                options["pdl"] = False
            if self.passes(kind):
                original(*args, **options)
            elif kind == "first convolution":
                torch.add(self.lengths, 0, out=args[5])  # a kernel: a dependent launch may follow
            elif self.becomes_empty or kind == "heard":  # where two branches meet there must be a launch
                pdl = options.get("pdl", False)
                empty_kernel[(128,)](self.scratch, PDL=pdl, **Tile(1, 1, warps=4).options(pdl))
            if self.recording:
                self._record(kind, args, options)

        return call

    def _kind(self, name, args, options) -> str:
        if name == "linear":
            weight = args[1]
            if weight.dim() == 3:
                return "subsampling's projection"
            if weight.dtype == torch.float32:
                return "heard"
            if options.get("residual_scale") is not None:
                square = weight.shape[0] == weight.shape[1]
                return "pointwise 2" if options.get("mask") else "attention out" if square else "down"
            if options.get("activation", "none") != "none":
                return "up"
            return "qkv" if options.get("table") else "gated" if options.get("glu") else "head"
        if name.startswith("cluster"):
            return name.replace("_", " ")
        if name == "expert_product":
            return "experts 2" if options.get("residual_scale") is not None else "experts 1"
        plain = {"route": "router", "sort_tokens": "sort", "log_softmax": "log-softmax"}
        return plain.get(name, name.replace("_", " "))

    def _steady(self, name, kind, args, options):
        """The arguments, with those that say where to read taken from the true run."""
        layer = 0 if self.one_layer else self.layer[kind]
        self.layer[kind] += 1
        if self.recording or not self.choices:
            return args
        choices, by_expert = self.changed or (self.choices, self.sorted)
        if kind == "cluster: experts":
            args[1] = choices[layer]
        elif name == "expert_product":
            args[3:5] = by_expert[layer]
        elif name == "sort_tokens":
            args[0] = self.choices[layer]
            if options.get("counts"):
                options["counts"] = self.counted[layer]
        return args

    def _record(self, kind, args, options):
        if kind == "first convolution":
            self.lengths = args[5]
        elif kind in ROUTERS:
            self.choices.append(args[ROUTERS[kind]])
        elif kind == "sort":
            self.sorted.append((args[1], args[2]))
            self.counted.append(options.get("counts"))
            self.sort = {name: options[name] for name in ("experts", "rows")}

    def change(self, other) -> None:
        """Experts' choices, and what sorts tokens by them, become other(choices)."""
        choices, by_expert = [other(c).int() for c in self.choices], []
        for idx, places in zip(choices, self.sorted, strict=False):
            by_expert.append(tuple(torch.full_like(p, -1) for p in places))
            self.original["sort_tokens"](idx, *by_expert[-1], tile=Tile(1, 1024), pdl=False, **self.sort)
        self.changed = choices, by_expert


def record(engine: CudaEngine, watch: Launches, graph) -> None:
    """One true run; what decides where kernels read is kept."""
    watch.reset()
    watch.choices, watch.sorted, watch.counted, watch.recording = [], [], [], True
    engine.forward(graph.features, graph.lengths)
    torch.cuda.synchronize()
    watch.recording = False
    watch.choices = [c.clone() for c in watch.choices]
    watch.sorted = [(a.clone(), b.clone()) for a, b in watch.sorted]
    watch.counted = [c and (c[0].clone(), c[1]) for c in watch.counted]
    watch.lengths = watch.lengths.clone()


def shared_weights(engine: CudaEngine, dense: bool, experts: bool):
    """All layers read the first one's weights, so that they lie in the L2 cache; -> what undoes it."""
    weights, kept = engine.forward.weights, []
    for stack in (weights.main, weights.embed):
        first, names = stack.blocks[0], []
        if dense:
            names += ["macaron_up", "macaron_down", "qkv", "attention_out", "pointwise_1", "pointwise_2"]
            names += [] if first.router else ["up", "down"]
        if experts and first.router:
            names += ["up", "down"]
        kept.append((stack, stack.blocks))
        stack.blocks = [replace(block, **{name: getattr(first, name) for name in names}) for block in stack.blocks]

    def undo():
        for stack, blocks in kept:
            stack.blocks = blocks

    return undo
