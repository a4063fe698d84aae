"""AdamW, and Muon for the matrices: momentum whose singular values are all made (about) one before it is subtracted.

Muon: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the scale of Liu et al. 2025 (arXiv 2502.16982),
0.2 sqrt(max(rows, columns)), which makes an update as large as AdamW's usually are, so that both share a learning rate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from m3asr.model import Model

MOMENTUM, ITERATIONS = 0.95, 5


def orthogonalized(x: Tensor) -> Tensor:
    """(N, rows, columns) -> the same with singular values near 1 (0.7 to 1.2), by Newton-Schulz of fifth order."""
    wide = x.shape[-2] > x.shape[-1]
    x = x.transpose(-2, -1) if wide else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(-2, -1)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(-2, -1) if wide else x


def is_matrix(name: str, parameter: Tensor, vocab_size: int) -> bool:
    """Weights that map one hidden space to another: not norms, biases, depthwise filters, routers, token tables."""
    if parameter.ndim < 2 or vocab_size in parameter.shape:
        return False
    return not any(part in name for part in ("router", "bias", "depthwise")) and min(parameter.shape[:2]) > 1


class Optimizer:
    """One step for all parameters of a model. `muon` False: AdamW for everything."""

    def __init__(self, model: Model, weight_decay: float, muon: bool):
        named = list(model.named_parameters())
        self.weight_decay = weight_decay
        device = named[0][1].device
        self.lr = torch.zeros((), device=device)  # on the device: a captured step reads it anew
        matrices = [p for n, p in named if muon and is_matrix(n, p, model.config.vocab_size)]
        taken = {id(p) for p in matrices}
        rest = [(n, p) for n, p in named if id(p) not in taken]
        decayed = [p for n, p in rest if p.ndim >= 2 and not n.endswith("bias")]
        plain = [p for n, p in rest if p.ndim < 2 or n.endswith("bias")]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=self.lr,
            betas=(0.9, 0.98),
            fused=True,
            capturable=device.type == "cuda",
        )
        # All gradients lie in one array, which processes add up at once; each begins at a multiple of 256 bytes.
        places, total = [], 0
        for _, p in named:
            places.append(total)
            total += -(-p.numel() // 64) * 64
        self.gradients = torch.zeros(total, device=device)
        for (_, p), place in zip(named, places, strict=True):
            p.grad = self.gradients.as_strided(p.shape, p.stride(), place)
        # Matrices of one shape are orthogonalised together: one product instead of dozens of small ones.
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in matrices:
            shape = (p.shape[1], p.shape[2]) if self.stacked(p) else (p.shape[0], math.prod(p.shape[1:]))
            self.groups.setdefault(shape, []).append(p)
        self.momentum = {
            shape: torch.zeros(sum(self.count(p) for p in group), *shape, device=group[0].device)
            for shape, group in self.groups.items()
        }

    @staticmethod
    def stacked(p: Tensor) -> bool:
        """(E, out, in): one matrix an expert. Pointwise convolutions are (out, in, 1)."""
        return p.ndim == 3 and p.shape[-1] > 1

    def count(self, p: Tensor) -> int:
        return p.shape[0] if self.stacked(p) else 1

    @torch.no_grad()
    def step(self, finite: Tensor) -> None:
        """With `self.lr`. finite: bool (), on the device; False leaves the gradient out, unasked by the host."""
        self.adamw.found_inf = (~finite).float()
        self.adamw.step()
        for shape, group in self.groups.items():
            gradient = torch.cat([p.grad.reshape(-1, *shape) for p in group]).float()
            gradient = torch.where(finite, gradient, 0.0)
            momentum = self.momentum[shape]
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalized(gradient.lerp_(momentum, MOMENTUM)).float()  # Nesterov's
            update *= self.lr * (-0.2 * math.sqrt(max(shape)))
            updates = update.split([self.count(p) for p in group])
            torch._foreach_mul_(group, 1.0 - self.lr * self.weight_decay)
            torch._foreach_add_(group, [u.reshape(p.shape) for u, p in zip(updates, group, strict=True)])

    def zero_grad(self) -> None:
        """In place: a captured step always finds its gradients where they were."""
        self.gradients.zero_()

    def moments(self, parameter: nn.Parameter) -> list[Tensor]:
        """What is remembered of a parameter's gradients, in the parameter's shape, to be changed in place."""
        state = self.adamw.state.get(parameter, {})
        found = [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]
        for shape, group in self.groups.items():
            first = 0
            for p in group:
                if p is parameter:
                    found.append(self.momentum[shape][first : first + self.count(p)].view(parameter.shape))
                first += self.count(p)
        return found

    def state_dict(self) -> dict:
        return {"adamw": self.adamw.state_dict(), "momentum": list(self.momentum.values())}

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        for group in self.adamw.param_groups:
            group["lr"] = self.lr
        for ours, saved in zip(self.momentum.values(), state["momentum"], strict=True):
            ours.copy_(saved)
