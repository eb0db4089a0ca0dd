"""The language model once more, for decode steps on a GPU: the same code and weights, in fewer and faster kernels.

A step of transformers' code is some 1,600 kernels, most of which take longer to begin than to run.  Here each layer is
compiled, linear layers with the same input are one product, and a single row's products have a kernel of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pulse_ecg.engine.joint_linear import SAME_INPUT, JointLinear, JointProduct
from pulse_ecg.engine.slots import FirstSlotsView

try:
    from pulse_ecg.engine import triton_kernels
except ImportError:  # where torch has no CUDA
    triton_kernels = None  # type: ignore[assignment]

_Layers = tuple[tuple[str, tuple[str, ...]], ...]
_SAME_INPUT: _Layers = tuple(zip(("self_attn", "mlp"), SAME_INPUT, strict=True))
_ALONE: _Layers = (("self_attn", ("o_proj",)), ("mlp", ("down_proj",)))


def fast_decoder(model: nn.Module, *, backend: str | None = "inductor") -> nn.Module | None:
    """A copy of transformers' ``LlamaModel`` that shares the weights, for passes over a :class:`FirstSlotsView`.

    The weights of ``model`` are joined in memory; it works as before.  ``backend`` is ``torch.compile``'s, None not to
    compile.  Returns None if a linear layer is not a plain one: a quantised one, say.
    """
    layers = model.get_submodule("layers").children()
    if not all(_plain(layer.get_submodule(o), names) for layer in layers for o, names in _SAME_INPUT + _ALONE):
        return None
    for layer in model.get_submodule("layers").children():
        for owner, names in _SAME_INPUT:
            _join_weights([layer.get_submodule(f"{owner}.{name}") for name in names])
    kept = [*model.parameters(), *model.buffers(), model.config]
    decoder = copy.deepcopy(model, {id(shared): shared for shared in kept})
    for layer in decoder.get_submodule("layers").children():
        for owner, names in _SAME_INPUT + _ALONE:
            _join(layer.get_submodule(owner), names)
    numbered = enumerate(decoder.get_submodule("layers").children())
    decoder.layers = nn.ModuleList([_FastLayer(layer, number, backend) for number, layer in numbered])
    return decoder


def _plain(owner: nn.Module, names: Sequence[str]) -> bool:
    """Whether these are linear layers of one kind, and nothing has taken their place."""
    layers = [owner.get_submodule(name) for name in names]
    return all(type(layer) is nn.Linear for layer in layers) and len({layer.bias is None for layer in layers}) == 1


def _join_weights(layers: Sequence[nn.Module]) -> None:
    """Lay the weights of layers one after another in memory, and the biases; each layer still has its own."""
    for name in ("weight", "bias"):
        parts = [getattr(layer, name) for layer in layers]
        if parts[0] is None or _adjacent(parts):  # what was recorded on them stays right
            continue
        joint = torch.cat(parts)
        for layer, part in zip(layers, torch.split(joint, [len(part) for part in parts]), strict=True):
            setattr(layer, name, nn.Parameter(part, requires_grad=False))


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether these lie one after another in one piece of memory."""
    ends = [part.storage_offset() + part.numel() for part in parts]
    in_line = all(part.storage_offset() == end for part, end in zip(parts[1:], ends, strict=False))
    return in_line and len({part.untyped_storage().data_ptr() for part in parts}) == 1


def _join(owner: nn.Module, names: Sequence[str]) -> None:
    """Put :class:`_JointLinear` parts in the place of layers whose weights lie one after another."""
    layers = [cast(nn.Linear, owner.get_submodule(name)) for name in names]
    joint = _Joint(layers)
    for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
        setattr(owner, name, _JointLinear(joint, index, layer))


class _Joint(JointProduct):
    """Of weights that lie one after another."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__([len(layer.weight) for layer in layers])
        self.weight = _joined([layer.weight for layer in layers])
        self.bias = None if layers[0].bias is None else _joined([layer.bias for layer in layers])

    def product(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1] and triton_kernels is not None and triton_kernels.serve(x):
            return triton_kernels.matvec(x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The tensor whose neighbouring parts these are."""
    first = parts[0]
    return first.detach().as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride(), first.storage_offset())


class _JointLinear(JointLinear):
    """It has its own weight and bias as before."""

    def __init__(self, joint: _Joint, index: int, linear: nn.Linear) -> None:
        super().__init__(joint, index)
        self.weight, self.bias = linear.weight, linear.bias


class _FastLayer(nn.Module):
    """A decoder layer, compiled once for a single row and once for any number of rows, both for any length."""

    def __init__(self, layer: nn.Module, number: int, backend: str | None) -> None:
        super().__init__()
        self._number = number
        self._step = layer.forward
        if backend:
            self._step = torch.compile(layer.forward, fullgraph=True, backend=backend, options=_options(backend))

    def forward(self, hidden: Tensor, *, view: FirstSlotsView, **given: Any) -> Any:
        rows: list[Tensor | None] = [hidden, view.positions_B, view.last_B, view.slots_B, view.mask_B11L]
        rows += [given.get("position_ids"), *given.get("position_embeddings", ())]
        for tensor in rows:
            if tensor is not None and tensor.shape[0] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        torch._dynamo.maybe_mark_dynamic(view.mask_B11L, 3)
        return self._step(hidden, view=view.layer(self._number, fused=True), **given)


def _options(backend: str) -> dict[str, Any] | None:
    """Round what lies between two operations, as the eager kernels do, where the installed torch can."""
    if backend != "inductor" or "emulate_precision_casts" not in torch._inductor.list_options():
        return None
    return {"emulate_precision_casts": True}
