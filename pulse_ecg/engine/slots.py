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
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pulse_ecg.device import upload

ATTENTION = "pulse_slots"
"""The name of this attention in ``config._attn_implementation``."""

_FINE, _COARSE = 64, 512  # lengths are rounded up to the one, and rows batched whose lengths share the other


class AttentionView(Protocol):
    """One forward pass's window on the slots."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store ``key`` and ``value`` ``(B, H, N, D)``, attend with ``query``; returns ``(B, N, H, D)``."""


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, *, scaling: float, **given: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface; ``given`` holds the ``view`` that the runner passed to the model."""
    return given["view"].attend(module.layer_idx, query, key, value, scaling), None


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
        shape = (count, key_heads(config), self.positions, head_width(config))
        self.keys_SHLD = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self._index = lru_cache(maxsize=256)(lambda chosen: upload(torch.tensor(chosen), device))
        self.values_SHLD = [torch.zeros_like(keys) for keys in self.keys_SHLD]

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


def key_heads(config: LlamaConfig) -> int:
    """Heads of keys and values: fewer than those of queries where heads are grouped."""
    return config.num_key_value_heads or config.num_attention_heads


def head_width(config: LlamaConfig) -> int:
    """D; old configs leave it out."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def slot_bytes(config: LlamaConfig, positions: int, dtype: torch.dtype) -> int:
    """Memory of one slot."""
    width = key_heads(config) * head_width(config)
    return 2 * config.num_hidden_layers * width * rounded(positions) * dtype.itemsize


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

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """See :class:`AttentionView`; B is 1."""
        slot, keys, values = self._slot, self._slots.keys_SHLD[layer], self._slots.values_SHLD[layer]
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
    """One new position in each of several slots, each at a length of its own."""

    def __init__(self, slots: KeyValueSlots, slots_B: Tensor, positions_B: Tensor, batches: Sequence[_Batch]) -> None:
        """Use :meth:`of_rows` or :meth:`of_all`."""
        self._slots = slots
        self.slots_B = slots_B
        self.positions_B = positions_B
        self._batches = batches

    @classmethod
    def of_rows(cls, slots: KeyValueSlots, chosen: Sequence[int]) -> DecodeView:
        """Of some slots in ascending order, each at its next position: little is attended to in vain."""
        device, dtype = slots.keys_SHLD[0].device, slots.keys_SHLD[0].dtype
        rows = [(slot, slots.filled[slot]) for slot in chosen]
        slots_B, positions_B = torch.tensor(rows, device=device).unbind(1)
        batches, first = list[_Batch](), 0
        # Neighbours have the same difference of slot and row.
        for _, found in groupby(enumerate(rows), lambda item: (item[1][0] - item[0], rounded(item[1][1] + 1))):
            members = [row for _, row in found]
            last = first + len(members)
            length = rounded(max(position for _, position in members) + 1, _FINE)
            mask = _length_mask(positions_B[first:last], length, dtype)
            batches.append(_Batch(slice(first, last), slice(members[0][0], members[-1][0] + 1), length, mask))
            first = last
        return cls(slots, slots_B, positions_B, batches)

    @classmethod
    def of_all(cls, slots: KeyValueSlots, positions_B: Tensor, length: int) -> DecodeView:
        """Of the first B slots at one length: every shape is fixed, as a CUDA graph needs it."""
        count = len(positions_B)
        mask = _length_mask(positions_B, length, slots.keys_SHLD[0].dtype)
        slots_B = torch.arange(count, device=positions_B.device)
        return cls(slots, slots_B, positions_B, [_Batch(slice(0, count), slice(0, count), length, mask)])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """See :class:`AttentionView`; N is 1."""
        keys, values = self._slots.keys_SHLD[layer], self._slots.values_SHLD[layer]
        keys[self.slots_B, :, self.positions_B] = key[:, :, 0]
        values[self.slots_B, :, self.positions_B] = value[:, :, 0]
        grouped = query.view(len(query), key.shape[1], -1, query.shape[3])  # heads of a group as if new positions
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
