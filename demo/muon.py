"""The optimiser of the training's matrices, in float32.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) takes the momentum's orthogonal part as the
update.  ``torch.optim.Muon`` does it in bfloat16 always, which CPUs without such arithmetic emulate: there, it took ten
times as long as this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalised(matrices_BMN: Tensor) -> Tensor:
    """About the closest semi-orthogonal matrices, ``(B, M, N)``, by Newton-Schulz: singular values 0.7 to 1.2."""
    a, b, c = _COEFFICIENTS
    tall = matrices_BMN.shape[1] > matrices_BMN.shape[2]
    x = matrices_BMN.mT if tall else matrices_BMN
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled to the size of AdamW's updates (Liu et al. 2025, arXiv:2502.16982)."""

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient; those of one shape together, as each alone keeps no core busy."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike.setdefault(tuple(matrix.shape), []).append(matrix)
            for shape, matrices in alike.items():
                updates = orthogonalised(
                    torch.stack([self._nesterov(matrix, group["momentum"]) for matrix in matrices])
                )
                scale = 0.2 * math.sqrt(max(shape))
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    def _nesterov(self, matrix: Tensor, momentum: float) -> Tensor:
        gradient = matrix.grad
        assert gradient is not None
        mean: Tensor = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
        return gradient.lerp(mean.lerp_(gradient, 1 - momentum), momentum)
