"""Linear layers for a CPU: weights laid out once as oneDNN's kernels want them.

torch's own float32 products go to MKL with the weight as it lies in memory.  For the few rows of a decode step that
reaches a third of the memory's bandwidth on AMD's processors, for a chunk of a prompt two thirds of what the cores can
do.  oneDNN, which torch ships too and its compiler uses in this way, reaches both with a weight in blocks.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_ROWS = 16  # the layout is chosen for a product of so many; measured, it serves one row and a thousand as well


class PackedLinear(nn.Module):
    """Takes the place of a linear layer, for inference; the weight exists in the packed layout alone."""

    def __init__(self, linear: nn.Linear) -> None:
        """Raises what torch raises where it has no such kernels."""
        super().__init__()
        self.bias = linear.bias
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.register_buffer("weight", packed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The product with ``x`` ``(..., in)``."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product


def pack_linear_layers(network: nn.Module) -> int:
    """Put :class:`PackedLinear` in the place of the network's float32 linear layers on a CPU; returns how many.

    Layers of another kind, dtype or device stay as they are, and so do all of them where torch lacks the kernels.
    """
    since, packed, left = time.perf_counter(), 0, _packable(network)
    try:
        while left:
            owner, name = left.pop()
            setattr(owner, name, PackedLinear(owner.get_submodule(name)))  # type: ignore[arg-type]
            packed += 1
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        logger.info("Linear layers are not packed (%s).", type(error).__name__)
    if packed:
        logger.info("Packed %d linear layers in %.1f s.", packed, time.perf_counter() - since)
    return packed


def _packable(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """Owners and names alone, so that each weight is freed once it is packed."""
    return [
        (owner, name)
        for owner in network.modules()
        for name, layer in owner.named_children()
        if type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
    ]
