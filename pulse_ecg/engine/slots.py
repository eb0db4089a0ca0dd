"""The key-value cache: one slot of the full context for each answer, allocated once, and attention over it.

transformers calls :func:`_attention` for every layer (its attention interface) and hands it the view that the runner
passed to the model; the view stores the new keys and values and attends to the slot.  So the model code is
transformers' own, and no cache class of its (they differ between versions) is involved.

Shapes: S slots, B rows of a decode step, N new positions, L positions attended to, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import prod
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pulse_ecg.device import upload

try:
    from pulse_ecg.engine import triton_kernels
except ImportError:  # where torch has no CUDA
    triton_kernels = None  # type: ignore[assignment]

ATTENTION = "pulse_slots"
"""The name of this attention in ``config._attn_implementation``."""

_UNUSED = 1  # a position that is there so that no length is the whole: to a compiler that would be a case of its own
_FINE, _COARSE = 64, 512  # lengths are rounded up to the one, and rows batched whose lengths share the other


class AttentionView(Protocol):
    """One forward pass's window on the slots."""

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store ``key`` and ``value`` ``(B, H, N, D)``, attend with ``query``; returns ``(B, N, H, D)``.

        ``module`` is transformers' attention module, whose ``layer_idx`` says which layer's slots are meant.
        """


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, *, scaling: float, **given: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface; ``given`` holds the ``view`` that the runner passed to the model."""
    return given["view"].attend(module, query, key, value, scaling), None


ALL_ATTENTION_FUNCTIONS[ATTENTION] = _attention


class KeyValueSlots:
    """Keys and values of ``count`` answers, ``positions`` each; ``filled`` says how far each slot is written."""

    def __init__(
        self, config: LlamaConfig, *, count: int, positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Zeroed, since masked positions must be finite; on a CPU the memory is taken as it is first written."""
        self.count = count
        self.filled = [0] * count
        self.positions = rounded(positions)
        shape = (count, key_heads(config), self.positions + _UNUSED, head_width(config))
        self.keys_SHLD = [_zeros(shape, device, dtype) for _ in range(config.num_hidden_layers)]
        self.values_SHLD = [_zeros(shape, device, dtype) for _ in range(config.num_hidden_layers)]
        self._index = lru_cache(maxsize=256)(lambda chosen: upload(torch.tensor(chosen), device))

    def index(self, chosen: Sequence[int]) -> Tensor:
        """Slot numbers as a tensor on the device; kept, since to copy them there makes the host wait."""
        return self._index(tuple(chosen))

    @property
    def position_bytes(self) -> int:
        """Memory of one position of one slot, all layers."""
        keys = self.keys_SHLD[0]
        return 2 * len(self.keys_SHLD) * keys.shape[1] * keys.shape[3] * keys.itemsize

    def clear(self, slot: int) -> None:
        """Nothing is written in a slot any more.  Masked positions count for nothing, unless they hold NaN."""
        end = self.filled[slot] + 1  # a graph writes to the next position of slots that have no row
        for tensor_SHLD in (*self.keys_SHLD, *self.values_SHLD):
            tensor_SHLD[slot, :, :end] = 0
        self.filled[slot] = 0

    def read(self, slot: int, length: int) -> Tensor:
        """A copy of the first positions of a slot, ``(layers, 2, H, length, D)``; no other memory is taken."""
        keys = self.keys_SHLD[0]
        copy = keys.new_empty((len(self.keys_SHLD), 2, keys.shape[1], length, keys.shape[3]))
        for layer, pair in enumerate(zip(self.keys_SHLD, self.values_SHLD, strict=True)):
            for place, tensor_SHLD in enumerate(pair):
                copy[layer, place] = tensor_SHLD[slot, :, :length]
        return copy

    def write(self, slot: int, copy: Tensor) -> None:
        """Put what :meth:`read` gave into a slot."""
        for layer, (keys, values) in enumerate(copy):
            self.keys_SHLD[layer][slot, :, : copy.shape[3]] = keys
            self.values_SHLD[layer][slot, :, : copy.shape[3]] = values


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """On a CPU fresh pages of the system's, which are zero and take no memory until written; torch would write them."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    pages = mmap(-1, prod(shape) * dtype.itemsize, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def key_heads(config: LlamaConfig) -> int:
    """Heads of keys and values: fewer than those of queries where heads are grouped."""
    return config.num_key_value_heads or config.num_attention_heads


def head_width(config: LlamaConfig) -> int:
    """D; old configs leave it out."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def slot_bytes(config: LlamaConfig, positions: int, dtype: torch.dtype) -> int:
    """Memory of one slot."""
    width = key_heads(config) * head_width(config)
    return 2 * config.num_hidden_layers * width * (rounded(positions) + _UNUSED) * dtype.itemsize


def rounded(length: int, step: int = _COARSE) -> int:
    """Up to a multiple of ``step``."""
    return -(-length // step) * step


class Stored(Exception):  # noqa: N818 - nothing went wrong
    """All keys and values of a chunk are in the slot, and nobody reads what the last layer would make of them."""


class PrefillView:
    """A chunk of one prompt: its positions see all before them in the slot, and each other causally.

    A chunk that is not its prompt's ``last`` ends with :class:`Stored`.
    """

    def __init__(self, slots: KeyValueSlots, slot: int, *, start: int, count: int, last: bool = True) -> None:
        self._slots = slots
        self._slot = slot
        self._stored_with = None if last else len(slots.keys_SHLD) - 1
        self._start, self._end = start, start + count
        self._mask = self._causal_mask(slots.keys_SHLD[0])

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """See :class:`AttentionView`; B is 1."""
        slot, layer = self._slot, module.layer_idx
        keys, values = self._slots.keys_SHLD[layer], self._slots.values_SHLD[layer]
        keys[slot, :, self._start : self._end] = key[0]
        values[slot, :, self._start : self._end] = value[0]
        if layer == self._stored_with:
            raise Stored
        groups = query.shape[1] // key.shape[1]
        attended = functional.scaled_dot_product_attention(
            query,
            _for_each_head(keys[slot : slot + 1, :, : self._end], groups),
            _for_each_head(values[slot : slot + 1, :, : self._end], groups),
            attn_mask=self._mask,
            is_causal=self._mask is None and query.shape[2] > 1,
            scale=scaling,
        )
        return attended.transpose(1, 2)

    def _causal_mask(self, like: Tensor) -> Tensor | None:
        """None for a prompt's beginning, where torch's own causal attention fits."""
        count = self._end - self._start
        if self._start == 0 or count == 1:
            return None
        if like.is_cuda:  # no mask in memory: the fused kernels know this shape
            return causal_lower_right(count, self._end)
        mask = torch.full((count, self._end), float("-inf"), dtype=like.dtype)
        return mask.triu_(self._start + 1)


def _for_each_head(keys_BHLD: Tensor, groups: int) -> Tensor:
    """Grouped heads (fewer for keys than for queries) repeated; the same tensor without groups."""
    return keys_BHLD if groups == 1 else keys_BHLD.repeat_interleave(groups, dim=1)


@dataclass(frozen=True)
class _Batch:
    """Rows of a decode step that are attended to together: neighbouring slots, cut to one length."""

    rows: slice
    slots: slice
    length: int
    mask_B11L: Tensor


class DecodeView:
    """One new position in each of some slots, in ascending order: little is attended to in vain."""

    def __init__(self, slots: KeyValueSlots, chosen: Sequence[int]) -> None:
        """Of the ``chosen`` slots, each at its next position."""
        device, dtype = slots.keys_SHLD[0].device, slots.keys_SHLD[0].dtype
        rows = [(slot, slots.filled[slot]) for slot in chosen]
        self._slots = slots
        self.slots_B, self.positions_B = torch.tensor(rows, device=device).unbind(1)
        self._batches, first = list[_Batch](), 0
        # Neighbours have the same difference of slot and row.
        for _, found in groupby(enumerate(rows), lambda item: (item[1][0] - item[0], rounded(item[1][1] + 1))):
            members = [row for _, row in found]
            last = first + len(members)
            length = rounded(max(position for _, position in members) + 1, _FINE)
            mask = _length_mask(self.positions_B[first:last], length, dtype)
            chosen_slots = slice(members[0][0], members[-1][0] + 1)
            self._batches.append(_Batch(slice(first, last), chosen_slots, length, mask))
            first = last

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """See :class:`AttentionView`; N is 1."""
        keys, values = self._slots.keys_SHLD[module.layer_idx], self._slots.values_SHLD[module.layer_idx]
        _store(keys, key, self.slots_B, self.positions_B)
        _store(values, value, self.slots_B, self.positions_B)
        grouped = _grouped(query, key)
        attended = [
            _attend_to_slots(
                grouped[batch.rows],
                keys[batch.slots, :, : batch.length],
                values[batch.slots, :, : batch.length],
                mask=batch.mask_B11L,
                scaling=scaling,
            )
            for batch in self._batches
        ]
        joined = attended[0] if len(attended) == 1 else torch.cat(attended)
        return joined.reshape(len(query), 1, query.shape[1], query.shape[3])


class FirstSlotsView:
    """One new position in each of the first B slots, all cut to one length: the shapes are fixed, as graphs need it."""

    def __init__(self, slots: KeyValueSlots, positions_B: Tensor, length: int, *, last_B: Tensor | None = None) -> None:
        """``last_B``: the last positions that rows need to see, if not their own; nobody reads some rows' results."""
        self._slots = slots
        self.slots_B = torch.arange(len(positions_B), device=positions_B.device)
        self.positions_B = positions_B
        self.last_B = positions_B.clamp(max=length - 1) if last_B is None else last_B
        self.mask_B11L = _length_mask(positions_B, length, slots.keys_SHLD[0].dtype)

    def layer(self, number: int, *, fused: bool = False) -> LayerView:
        """The window on one layer alone; ``fused`` for attention in kernels of our own, where they know the shapes."""
        keys_SHLD, values_SHLD = self._slots.keys_SHLD[number], self._slots.values_SHLD[number]
        fused = fused and triton_kernels is not None and triton_kernels.serve(keys_SHLD)
        return LayerView(keys_SHLD, values_SHLD, self.slots_B, self.positions_B, self.last_B, self.mask_B11L, fused)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """See :class:`AttentionView`; N is 1."""
        return self.layer(module.layer_idx).attend(module, query, key, value, scaling)


@dataclass(frozen=True)
class LayerView:
    """What :class:`FirstSlotsView` is of one layer, in tensors alone: code that is compiled for one serves them all."""

    keys_SHLD: Tensor
    values_SHLD: Tensor
    slots_B: Tensor
    positions_B: Tensor
    last_B: Tensor
    mask_B11L: Tensor
    fused: bool

    def attend(self, _module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """See :class:`AttentionView`; N is 1."""
        count, length = query.shape[0], self.mask_B11L.shape[3]
        _store(self.keys_SHLD, key, self.slots_B, self.positions_B)
        _store(self.values_SHLD, value, self.slots_B, self.positions_B)
        if self.fused and triton_kernels.attends(query, key):
            attended = triton_kernels.attend(query, self.keys_SHLD, self.values_SHLD, self.last_B, scaling)
        else:
            keys, values = self.keys_SHLD[:count, :, :length], self.values_SHLD[:count, :, :length]
            attended = _attend_to_slots(_grouped(query, key), keys, values, mask=self.mask_B11L, scaling=scaling)
        return attended.reshape(count, 1, query.shape[1], query.shape[3])


def _store(slots_SHLD: Tensor, new_BH1D: Tensor, slots_B: Tensor, positions_B: Tensor) -> None:
    slots_SHLD[slots_B, :, positions_B] = new_BH1D[:, :, 0]


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """The heads that share keys as if they were new positions of one."""
    return query.view(query.shape[0], key.shape[1], -1, query.shape[3])


def _length_mask(positions_B: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """0 where a row may look, up to its own position, and minus infinity past it."""
    past = torch.arange(length, device=positions_B.device) > positions_B[:, None]
    mask = torch.zeros(past.shape, device=past.device, dtype=dtype).masked_fill_(past, float("-inf"))
    return mask[:, None, None]


def _attend_to_slots(query: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor, scaling: float) -> Tensor:
    """Attention of single positions; on a GPU as two matrix products, which read keys and values at full bandwidth.

    The fused kernels have one block of threads for each head and row here, too few to fill a GPU at small batches.
    """
    if not query.is_cuda:
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    weights = torch.matmul(query * scaling, keys.transpose(2, 3)) + mask
    return torch.matmul(weights.softmax(dim=-1, dtype=torch.float32).to(values.dtype), values)
