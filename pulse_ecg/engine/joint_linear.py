"""Linear layers with the same input, computed as one product: fewer and larger kernels for a decode step's few rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What transformers calls those of its attention and of its MLP."""


class JointProduct(ABC):
    """The product with all of the layers' weights; it is kept until its last part is taken.  For one thread."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """``sizes``: the layers' widths, in the order of their weights."""
        self.sizes = list(sizes)
        self.x: Tensor | None = None
        self.parts: Sequence[Tensor] = ()

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., sum of sizes)``."""

    def part(self, index: int, x: Tensor) -> Tensor:
        """What layer ``index`` makes of ``x``."""
        if self.x is not x:
            self.x, self.parts = None, ()  # what a pass that failed has left makes room first
            self.x, self.parts = x, torch.split(self.product(x), self.sizes, dim=-1)
        part = self.parts[index]
        if index == len(self.sizes) - 1:
            self.x, self.parts = None, ()
        return part


class JointLinear(nn.Module):
    """Takes the place of layer ``index``, for inference."""

    def __init__(self, joint: JointProduct, index: int) -> None:
        super().__init__()
        self._joint, self._index = joint, index

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of ``x``."""
        return self._joint.part(self._index, x)
