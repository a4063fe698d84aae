"""A network becomes a plan: optimisation profiles, builder configuration, serialisation."""

import os

from .trace import trace


def build(
    module,
    inputs,
    ranges=None,
    *,
    precision="fp32",
    keep_float32=(),
    outputs=None,
    quantize=None,
    branches=None,
    package=None,
    workspace=None,
    compute_capabilities=(),
):
    """Traces `module` and builds it. Arguments up to `package` are those of `trace`.

    Args:
        workspace: bytes of scratch memory that the plan may use; None leaves TensorRT's default.
        compute_capabilities: tensorrt_rtx only, as ("SM89", "SM120"); empty builds a portable plan.

    Returns:
        The serialised plan as bytes; write it to a file, load it with `Engine`.

    Raises:
        TraceError, UncoveredOperation: see `trace`. BuildError: TensorRT refused the network.
    """
    network = trace(
        module,
        inputs,
        ranges,
        precision=precision,
        keep_float32=keep_float32,
        outputs=outputs,
        quantize=quantize,
        branches=branches,
        package=package,
    )
    return serialize(network, workspace=workspace, compute_capabilities=compute_capabilities)


def serialize(network, *, workspace=None, compute_capabilities=()):
    """Builds a traced Network into a plan (bytes)."""
    return bytes(_plan(network, workspace, compute_capabilities))


def write(network, path, *, workspace=None, compute_capabilities=()):
    """Builds a traced Network into a file, without a second copy of a large plan; -> its size in bytes."""
    plan = _plan(network, workspace, compute_capabilities)
    aside = f"{os.fspath(path)}.part"
    try:
        with open(aside, "wb") as file:
            file.write(plan)
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)
    return plan.nbytes


def _plan(network, workspace, compute_capabilities):
    package, builder = network.package, network.builder
    config = package.config(builder, workspace, compute_capabilities)
    dynamic = any(isinstance(d, str) for given in network.inputs.values() for d in given.dims)
    for ranges in network.profiles if dynamic else ():
        profile = builder.create_optimization_profile()
        for name, given in network.inputs.items():
            low, usual, high = (
                tuple(ranges[d][i] if isinstance(d, str) else int(d) for d in given.dims) for i in range(3)
            )
            profile.set_shape(name, low, usual, high)
        config.add_optimization_profile(profile)
    return package.build(builder, network.network, config)
