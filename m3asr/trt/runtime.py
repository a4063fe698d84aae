"""Runs a plan: profile choice by shape, `execute_async_v3`, CUDA graphs.

NOT EXECUTED by this project's tests: it needs a GPU that the installed TensorRT package accepts.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .errors import BuildError, TrtError
from .package import Package
from .plugin_v3 import register_all


@dataclass
class _Captured:
    graph: object
    inputs: dict
    outputs: dict


@dataclass
class _Profile:
    """One execution context, bound to one optimisation profile, and the graphs captured in it."""

    context: object
    ranges: dict  # input name -> (smallest, usual, largest) shape
    graphs: OrderedDict = field(default_factory=OrderedDict)

    def fits(self, shapes):
        return all(
            len(shape) == len(low) and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))
            for shape, (low, _, high) in ((shapes[n], r) for n, r in self.ranges.items())
        )

    def distance(self, shapes):
        """How far the shapes are from what the profile was tuned for, in factors of size."""
        total = 1.0
        for name, (_, usual, _) in self.ranges.items():
            for s, u in zip(shapes[name], usual, strict=True):
                total *= max(s, u, 1) / max(min(s, u), 1)
        return total


class Engine:
    """A loaded plan: engine(feats=..., lengths=...) -> {name: CUDA tensor}.

    Args:
        plan: bytes, or the path of a file with them.
        package: "tensorrt", "tensorrt_rtx" or None; a plan runs in the package that built it.
        cuda_graph: replay a CUDA graph for shapes seen before. At most `max_graphs` are kept, so memory is bounded.

    Raises:
        BuildError: the plan is damaged, or was built for another GPU or another version. TrtError: no GPU, or inputs
        that no profile holds.
    """

    def __init__(self, plan, package=None, *, cuda_graph=True, max_graphs=16):
        if not torch.cuda.is_available():
            raise TrtError("a TensorRT plan needs a CUDA GPU; none is visible to torch")
        plan = plan if isinstance(plan, (bytes, bytearray, memoryview)) else Path(plan).read_bytes()
        self.package = Package(package)
        self.trt = self.package.module
        self.cuda_graph, self.max_graphs = cuda_graph, max_graphs
        register_all(self.package)
        self.runtime = self.package.runtime()
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise BuildError(
                f"{self.package} cannot load this plan on {torch.cuda.get_device_name()}: "
                f"{self.package.logger.text()}; build it again with this version on this machine"
            )
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        is_input = {n: self.engine.get_tensor_mode(n) == self.trt.TensorIOMode.INPUT for n in names}
        self.inputs = [n for n in names if is_input[n]]
        self.outputs = [n for n in names if not is_input[n]]
        self.dtypes = {n: self.package.torch_dtype(self.engine.get_tensor_dtype(n)) for n in names}
        self.stream = torch.cuda.Stream()
        self.profiles = [self._profile(i) for i in range(self.engine.num_optimization_profiles)]

    def _profile(self, index):
        context = self.engine.create_execution_context()
        if context is None:
            raise BuildError(f"{self.package} made no execution context: {self.package.logger.text()}")
        if not context.set_optimization_profile_async(index, self.stream.cuda_stream):
            raise BuildError(f"{self.package} refused profile {index}: {self.package.logger.text()}")
        self.stream.synchronize()
        ranges = {n: tuple(map(tuple, self.engine.get_tensor_profile_shape(n, index))) for n in self.inputs}
        return _Profile(context, ranges)

    def choose(self, shapes):
        """The profile that holds these input shapes and was tuned for the nearest ones."""
        fitting = [p for p in self.profiles if p.fits(shapes)]
        if not fitting:
            ranges = "; ".join(
                ", ".join(f"{n} {low}..{high}" for n, (low, _, high) in p.ranges.items()) for p in self.profiles
            )
            raise TrtError(f"no profile of the plan holds inputs of {shapes}; it was built for {ranges}")
        return min(fitting, key=lambda p: p.distance(shapes))

    def __call__(self, **inputs):
        missing = set(self.inputs) ^ set(inputs)
        if missing:
            raise TrtError(f"the plan takes {', '.join(self.inputs)}; missing or unknown: {', '.join(sorted(missing))}")
        tensors = {n: inputs[n].to("cuda", self.dtypes[n]).contiguous() for n in self.inputs}
        shapes = {n: tuple(t.shape) for n, t in tensors.items()}
        profile = self.choose(shapes)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self._replayed(profile, tensors, shapes) if self.cuda_graph else self._run(profile, tensors)
        torch.cuda.current_stream().wait_stream(self.stream)
        for tensor in (*tensors.values(), *outputs.values()):
            tensor.record_stream(torch.cuda.current_stream())
            tensor.record_stream(self.stream)
        return outputs

    def _bind(self, profile, tensors):
        context = profile.context
        for name, tensor in tensors.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise TrtError(f"input {name!r} of {tuple(tensor.shape)} was refused: {self.package.logger.text()}")
            context.set_tensor_address(name, tensor.data_ptr())
        outputs = {
            n: torch.empty(tuple(context.get_tensor_shape(n)), dtype=self.dtypes[n], device="cuda")
            for n in self.outputs
        }
        for name, tensor in outputs.items():
            context.set_tensor_address(name, tensor.data_ptr())
        return outputs

    def _execute(self, profile):
        if not profile.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise TrtError(f"{self.package} failed to run the plan: {self.package.logger.text()}")

    def _run(self, profile, tensors):
        outputs = self._bind(profile, tensors)
        self._execute(profile)
        return outputs

    def _replayed(self, profile, tensors, shapes):
        key = tuple(shapes.values())
        found = profile.graphs.get(key)
        if found is None:
            found = profile.graphs[key] = self._capture(profile, tensors)
            if len(profile.graphs) > self.max_graphs:
                profile.graphs.popitem(last=False)
        profile.graphs.move_to_end(key)
        for name, tensor in tensors.items():
            found.inputs[name].copy_(tensor)
        found.graph.replay()
        return {n: t.clone() for n, t in found.outputs.items()}

    def _capture(self, profile, tensors):
        inputs = {n: t.clone() for n, t in tensors.items()}
        outputs = self._bind(profile, inputs)
        self._execute(profile)  # once outside of the capture: shapes and lazy allocations settle
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._execute(profile)
        return _Captured(graph, inputs, outputs)
