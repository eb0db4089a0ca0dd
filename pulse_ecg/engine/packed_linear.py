"""Linear layers for a CPU: weights laid out once as oneDNN's kernels want them.

torch's own float32 products go to MKL with the weight as it lies in memory.  For the few rows of a decode step that
reaches a third of the memory's bandwidth on AMD's processors, for a chunk of a prompt two thirds of what the cores can
do.  oneDNN, which torch ships too and its compiler uses in this way, reaches both with a weight in blocks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pulse_ecg.engine.joint_linear import SAME_INPUT, JointLinear, JointProduct

logger = logging.getLogger(__name__)

_ROWS = 16  # the layout is chosen for a product of so many; measured, it serves one row and a thousand as well


class PackedLinear(nn.Module):
    """Takes the place of a linear layer, for inference; the weight exists in the packed layout alone."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Raises what torch raises where it has no such kernels."""
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The product with ``x`` ``(..., in)``."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product


class _PackedJoint(JointProduct):
    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__([layer.out_features for layer in layers])
        weights: list[Tensor] = [layer.weight for layer in layers]
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self.linear = PackedLinear(torch.cat(weights), torch.cat(biases) if biases else None)

    def product(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x))


class _PackedPart(JointLinear):
    def __init__(self, joint: _PackedJoint, index: int) -> None:
        super().__init__(joint, index)
        self.linear = joint.linear  # so that the network's buffers count it, once


def pack_linear_layers(network: nn.Module) -> int:
    """Pack the weights of the network's float32 linear layers on a CPU; returns how many layers.

    Those with the same input become one :class:`PackedLinear`.  Layers of another kind, dtype or device stay as they
    are, and so do all of them where torch lacks the kernels.
    """
    since, packed, left = time.perf_counter(), 0, list(_packable(network))
    try:
        while left:
            owner, names = left.pop()
            layers = [cast(nn.Linear, owner.get_submodule(name)) for name in names]
            places: list[nn.Module]
            if len(layers) == 1:
                places = [PackedLinear(layers[0].weight, layers[0].bias)]
            else:
                joint = _PackedJoint(layers)
                places = [_PackedPart(joint, index) for index in range(len(layers))]
            for name, place in zip(names, places, strict=True):
                setattr(owner, name, place)
            packed += len(names)
            del layers  # each weight is freed once it is packed
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        logger.info("Linear layers are not packed (%s).", type(error).__name__)
    if packed:
        logger.info("Packed %d linear layers in %.1f s.", packed, time.perf_counter() - since)
    return packed


def _packable(network: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Owners and the names of layers that go together: the layers themselves would keep their weights alive."""
    for owner in network.modules():
        layers = {name: layer for name, layer in owner.named_children() if _plain(layer)}
        for names in SAME_INPUT:
            if all(name in layers for name in names) and len({layers[name].bias is None for name in names}) == 1:
                yield owner, names
                layers = {name: layer for name, layer in layers.items() if name not in names}
        for name in layers:
            yield owner, (name,)


def _plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
