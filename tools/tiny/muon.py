"""Muon: momentum whose step is made orthogonal, for the weight matrices of a network.

Paper   Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (Keller Jordan's note); the quintic
        Newton-Schulz coefficients are the ones published there.
Rule    b = momentum * b + g;   u = orthogonal(g + momentum * b)
        p = (1 - 0.01 lr) * p - lr * sqrt(max(1, rows / columns)) * u
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
DECAY = 0.01


def orthogonal(gradient: Tensor, steps: int = 5) -> Tensor:
    """Near the closest matrix with orthonormal rows or columns: all singular values come to about 1.  [R, C] -> [R, C]."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = gradient / (gradient.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:  # the products below are of the shorter side
        x = x.T
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """For two-dimensional parameters only; give embeddings, norms and biases to another optimizer."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                trace = state["momentum"].mul_(momentum).add_(parameter.grad)
                update = orthogonal(parameter.grad.add(trace, alpha=momentum))
                scale = max(1.0, parameter.size(0) / parameter.size(1)) ** 0.5
                parameter.mul_(1 - lr * DECAY).add_(update, alpha=-lr * scale)
        return loss
