"""Plugins compiled into the plan (full TensorRT 10.9+): PTX of one Triton kernel, no Python at run time.

The compilation runs anywhere and is tested; handing it to `tensorrt.plugin` needs full TensorRT, which has not been
run here: that half follows NVIDIA's documentation of `tensorrt.plugin.aot_impl`.
"""

import inspect
import re

from .errors import PluginError
from .plugin import OneKernel

POINTERS = {
    "FLOAT": "*fp32",
    "HALF": "*fp16",
    "BF16": "*bf16",
    "INT32": "*i32",
    "INT64": "*i64",
    "INT8": "*i8",
    "BOOL": "*i1",
}


_DECLARED = {}


def compile_kernel(description, dtypes, attributes, capability):
    """-> (name, PTX, threads a block, shared bytes) of a plugin whose launch is a `OneKernel`.

    Args:
        dtypes: TensorRT type names ("FLOAT", "HALF", ...) of inputs, then outputs.
        capability: the GPU's, as 89 or 90.

    Raises PluginError when the launch is not one kernel, or the kernel needs what TensorRT does not pass.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    one = description.launch
    if not isinstance(one, OneKernel):
        raise PluginError(f"plugin {description.name!r} can go into a plan only if its kernel is a trt.OneKernel")
    parameters = list(inspect.signature(one.function.fn).parameters)
    constants = {**one.constants, **attributes}
    given = [p for p in parameters if p not in constants]
    inputs, outputs = len(description.inputs), len(description.dtypes)
    scalars = len(given) - inputs - outputs
    if scalars < 0:
        raise PluginError(
            f"plugin {description.name!r}: the kernel takes {given}, fewer than {inputs} inputs and {outputs} outputs"
        )
    kinds = [POINTERS[t] for t in dtypes]
    kinds = [*kinds[:inputs], *["i32"] * scalars, *kinds[inputs:]]
    signature = {**dict(zip(given, kinds, strict=True)), **{p: "constexpr" for p in parameters if p in constants}}
    constexprs = {p: constants[p] for p in parameters if p in constants}
    source = triton.compiler.ASTSource(fn=one.function, signature=signature, constexprs=constexprs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": one.num_warps})
    metadata = compiled.metadata
    if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "profile_scratch_size", 0):
        raise PluginError(f"plugin {description.name!r}: the kernel wants scratch memory, which TensorRT does not give")
    ptx = without_hidden_parameters(compiled.asm["ptx"], metadata.name, len(given))
    return metadata.name, ptx, metadata.num_warps * 32, metadata.shared


def without_hidden_parameters(ptx, name, count):
    """Triton ends a kernel's parameters with scratch pointers that TensorRT does not pass; unused, they are removed."""
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)", ptx, re.S)
    parameters = [p.strip() for p in entry.group(1).split(",")]
    for extra in range(count, len(parameters)):
        if re.search(rf"\[{re.escape(name)}_param_{extra}\]", ptx):
            raise PluginError(f"kernel {name!r} reads its hidden parameter {extra}, which TensorRT does not pass")
    kept = ",\n\t".join(parameters[:count])
    return ptx[: entry.start(1)] + "\n\t" + kept + "\n" + ptx[entry.end(1) :]


def declare(package, description, attributes, capability):
    """Registers the plugin with `tensorrt.plugin` and its compiled kernel; -> its operator, for `network.add_plugin`.

    NOT EXECUTED HERE: needs full TensorRT.
    """
    import tensorrt.plugin as trtp

    # Attributes are not serialised with a compiled kernel: they are constants of it, and so part of its name.
    suffix = "".join(f"_{k}_{v}" for k, v in attributes.items())
    name = re.sub(r"\W", "_", description.name + suffix)
    identity = f"m3asr_trt::{name}"
    if identity in _DECLARED:
        return _DECLARED[identity]
    parameters = [
        inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=trtp.TensorDesc)
        for n in description.inputs
    ]

    def outputs_of(*inputs):
        shapes = [tuple(t.shape_expr[i] for i in range(t.ndim)) for t in inputs]
        results = []
        for shape, source in zip(description.output_shapes(shapes, attributes), description.dtypes, strict=True):
            out = (inputs[source] if isinstance(source, int) else inputs[0]).like()
            out.shape_expr = trtp.ShapeExprs(len(shape))
            for i, size in enumerate(shape):
                out.shape_expr[i] = size
            if isinstance(source, str):
                import torch

                out.dtype = package.dtype(getattr(torch, source))
            results.append(out)
        return tuple(results)

    def implementation(*arguments):
        inputs, outputs = arguments[: len(description.inputs)], arguments[len(description.inputs)]
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        types = [t.dtype.name for t in (*inputs, *outputs)]
        kernel, ptx, threads, shared = compile_kernel(description, types, attributes, capability)
        shapes = [tuple(t.shape_expr[i] for i in range(t.ndim)) for t in inputs]
        launch = trtp.KernelLaunchParams()
        grid = description.launch.grid(*shapes)
        for axis, size in zip(
            ("grid_x", "grid_y", "grid_z"), grid if isinstance(grid, tuple) else (grid,), strict=False
        ):
            setattr(launch, axis, size)
        launch.block_x, launch.shared_mem = threads, shared
        scalars = description.launch.scalars(*shapes)
        extra = trtp.SymIntExprs(len(scalars))
        for i, value in enumerate(scalars):
            extra[i] = trtp.SymInt32(value)
        return kernel, ptx, launch, extra

    tensors = inspect.Signature(parameters, return_annotation=tuple[(trtp.TensorDesc,) * len(description.dtypes)])
    outputs_of.__signature__ = tensors
    outputs_of.__annotations__ = {p.name: trtp.TensorDesc for p in parameters} | {"return": tensors.return_annotation}
    tail = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("outputs", "tactic")]
    implementation.__signature__ = inspect.Signature([*parameters, *tail])
    trtp.register(identity)(outputs_of)
    trtp.aot_impl(identity)(implementation)
    _DECLARED[identity] = getattr(trtp.op.m3asr_trt, name)
    return _DECLARED[identity]
