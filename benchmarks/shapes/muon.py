"""Muon for processors without arithmetic in bfloat16, its work divided among the workers of a training run.

torch.optim.Muon orthogonalises in bfloat16, which is three quarters of a training step on such a processor. The method
is Keller Jordan's (kellerjordan.github.io/posts/muon); rates are matched to AdamW's as Moonlight does (arXiv
2502.16982).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_LIKE_ADAMW = 0.2
"""Root mean square of AdamW's updates."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """`matrices` [M, N, K] with their singular values near 1, by Newton-Schulz iterations in float32."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    first, third, fifth = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x if wide is matrices else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for matrices [N, K].

    Args:
        matrices: what is trained.
        rate: learning rate, as for AdamW.
        weight_decay: share of a weight that a step of rate 1 takes away.
        worker: this process's number among `num_workers`, each of which does its part of the matrices.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        rate: float,
        weight_decay: float,
        momentum: float = 0.95,
        worker: int = 0,
        num_workers: int = 1,
    ) -> None:
        super().__init__(list(matrices), {"lr": rate, "weight_decay": weight_decay, "momentum": momentum})
        self._worker, self._num_workers = worker, num_workers

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            directions = [self._direction(matrix, group["momentum"]) for matrix in matrices]
            updates = torch.zeros(sum(matrix.numel() for matrix in matrices))
            parts = [
                part.view_as(matrix)
                for part, matrix in zip(updates.split([matrix.numel() for matrix in matrices]), matrices, strict=True)
            ]
            shapes: dict[torch.Size, list[int]] = {}
            for place in range(self._worker, len(matrices), self._num_workers):
                shapes.setdefault(matrices[place].shape, []).append(place)
            for shape, places in shapes.items():
                found = orthogonalize(torch.stack([directions[place] for place in places]))
                for place, update in zip(places, _LIKE_ADAMW * max(shape) ** 0.5 * found, strict=True):
                    parts[place].copy_(update)
            if self._num_workers > 1:
                distributed.all_reduce(updates)
            for matrix, update in zip(matrices, parts, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _direction(self, matrix: Tensor, momentum: float) -> Tensor:
        state = self.state[matrix]
        average = state.setdefault("momentum_buffer", torch.zeros_like(matrix))
        average.lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(average, momentum)
