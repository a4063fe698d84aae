"""What a run of the encoder loses against eager PyTorch in float32: at the outputs, block by block, in the routing."""

from __future__ import annotations

from functools import partial

import torch

from m3asr import ops
from m3asr.engines.cuda import CudaEngine
from m3asr.engines.cuda.forward import Shape


class Reference:
    """Eager results for one input: outputs, block outputs, and each router's choice."""

    def __init__(self, model, features, lengths):
        self.blocks, self.routes = [], []
        features = features.to(next(model.parameters()).dtype)
        hooks = [
            block.register_forward_hook(lambda _m, _i, out: self.blocks.append(out))
            for stack in filter(None, (getattr(model.encoder, "embed", None), model.encoder))
            for block in stack.blocks
        ]
        route = ops.route

        def recorded(logits):
            gate, expert_idx = route(logits)
            self.routes.append(expert_idx)
            return gate, expert_idx

        ops.route = recorded
        try:
            self.log_probs, self.hidden, self.lengths = model(features, lengths)
        finally:
            ops.route = route
            for hook in hooks:
                hook.remove()

    @property
    def experts_hit(self) -> list[int]:
        return [int(r.unique().numel()) for r in self.routes]


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def deviations(hidden, log_probs, routes, reference: Reference) -> dict:
    """What a run lost against the reference; `hidden_error_unflipped` is over tokens whose experts all agree."""
    flipped = torch.stack([r != e for r, e in zip(routes, reference.routes, strict=True)])  # (blocks, N)
    same = ~flipped.any(0)
    ours, theirs = (h.flatten(0, 1)[same] for h in (hidden, reference.hidden))
    return {
        "hidden_error": relative(hidden, reference.hidden),
        "hidden_error_unflipped": relative(ours, theirs) if len(ours) else None,
        "log_probs_error": relative(log_probs, reference.log_probs),
        "argmax_agreement": float((log_probs.argmax(-1) == reference.log_probs.argmax(-1)).float().mean()),
        "router_flips": int(flipped.sum()),
        "routed": flipped.numel(),
    }


def check(engine: CudaEngine, reference: Reference, features, lengths) -> dict:
    """Errors of one run, and of the graph against the same kernels launched one by one.

    `hidden_error_told` is the error of a run that is told the reference's experts. It shows whether the kernels are
    right: one near-tie decided otherwise, which exact arithmetic in another order may do, moves a whole utterance.
    """
    log_probs, hidden, out_lengths = engine(features, lengths)
    batch, size = reference.hidden.shape[:2]
    blocks, routes = [], []
    told = None

    def trace(kind, block, value):
        if kind == "routes" and told is not None:
            mine = value.view(graph.features.shape[0], -1)[:batch, :size]
            mine.copy_(torch.where(mine >= 0, next(told).view(mine.shape).int(), mine))
        elif kind == "routes":
            routes.append(value.clone())
        elif told is None:
            weight, bias = block.final_norm
            eps = engine.config.encoder.norm_eps
            blocks.append(torch.nn.functional.layer_norm(value, value.shape[-1:], weight, bias, eps))

    graph = engine.graph_for(*features.shape[:2])
    engine.forward.trace = trace
    try:
        again = [output.clone() for output in engine.forward(graph.features, graph.lengths)[:2]]
        told = iter(reference.routes)
        hidden_told = engine.forward(graph.features, graph.lengths)[1]
    finally:
        engine.forward.trace = None
    same_shape = [b.view(graph.features.shape[0], -1, b.shape[-1])[:batch, :size] for b in blocks]
    routes = [r.view(graph.features.shape[0], -1)[:batch, :size].flatten() for r in routes]
    return {
        **deviations(hidden, log_probs, routes, reference),
        "hidden_error_told": relative(hidden_told[:batch, :size], reference.hidden),
        "worst_block_error": max(map(relative, same_shape, reference.blocks)),
        "block_errors": [float(f"{relative(a, b):.1e}") for a, b in zip(same_shape, reference.blocks, strict=True)],
        "own_block_errors": own_block_errors(engine, reference, graph.features.shape[1]),
        "lengths_right": bool((out_lengths == reference.lengths).all()),
        "replay_equals_launches": bool(torch.equal(again[0][:batch, :size], log_probs)),
    }


def own_block_errors(engine: CudaEngine, reference: Reference, frames: int) -> list[float]:
    """Each block's error when it is given the reference's input, experts left to choose; the worst shows what one
    layer loses, without what the layers before it lost.
    """
    forward, config = engine.forward, engine.config.encoder
    batch, size, _ = reference.hidden.shape
    shape = Shape(batch, size, reference.lengths, None)
    outputs, errors = iter(reference.blocks), []
    before = None
    for stack in filter(None, (forward.weights.embed, forward.weights.main)):
        heard = None
        if stack is forward.weights.main and forward.weights.heard is not None:
            embedding = torch.nn.functional.layer_norm(
                before.float(), before.shape[-1:], *forward.weights.embed.after_norm, config.embed.norm_eps
            ).flatten(0, 1)
            heard = embedding @ forward.weights.heard.weight.t()
        before = None
        for i, block in enumerate(stack.blocks):
            expected = next(outputs)
            if before is not None:
                experts = stack.config.moe.num_experts if block.router else 0
                mine = partial(heard.narrow, 1, i * experts, experts) if block.router else None
                x = before.float().flatten(0, 1).clone()
                forward._block(x, shape, stack.config, block, None, mine)
                x = torch.nn.functional.layer_norm(x, x.shape[-1:], *block.final_norm, stack.config.norm_eps)
                errors.append(float(f"{relative(x, expected.flatten(0, 1)):.1e}"))
            before = expected
    return errors
