"""Muon (Keller Jordan, 2024) in float32, batched over matrices of one shape.

`torch.optim.Muon` orthogonalises in bfloat16 one matrix at a time, which on a processor without bfloat16 matrix
instructions took 2.6 times as long as this and a third of a training step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push the singular values of float matrices [K, M, N] to about 1 by Newton-Schulz iterations.

    Example:
        >>> s = torch.linalg.svdvals(orthogonalised(torch.randn(1, 16, 32)))
        >>> bool(s.min() > 0.5 and s.max() < 1.5)
        True
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, scaled so that its updates are as large as AdamW's (arXiv 2502.16982).

    Args:
        params: matrices only.
        lr: as for AdamW.
        momentum: Nesterov's.
        weight_decay: decoupled.
    """

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                nesterov = []
                for parameter in parameters:
                    state = self.state[parameter]
                    momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                    assert parameter.grad is not None
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    nesterov.append(parameter.grad.lerp(momentum, group["momentum"]))
                size = 0.2 * math.sqrt(max(shape)) * group["lr"]
                for parameter, update in zip(parameters, orthogonalised(torch.stack(nesterov)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)
