"""The model's forward passes: a chunk of one prompt, or one token of each of several answers."""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pulse_ecg.checkpoint import LoadedModel
from pulse_ecg.engine.fast_decoder import fast_decoder
from pulse_ecg.engine.graphs import DecodeGraphs, DecodeStep, cuda_graphs
from pulse_ecg.engine.slots import (
    ATTENTION,
    AttentionView,
    DecodeView,
    FirstSlotsView,
    KeyValueSlots,
    PrefillView,
    Stored,
    rounded,
)

logger = logging.getLogger(__name__)

CHUNK = 512
"""Positions of a prompt in one forward pass: enough to fill the cores, short enough for others to wait for."""
CUDA_CHUNK = 1024
"""On an H100 a pass over 512 takes as long: the host launches its kernels no faster."""

_TRIED_POSITION = 700


class ModelRunner:
    """Runs the language model over the slots.  ``tokens_S`` holds the token that each slot is to read next."""

    def __init__(self, model: LoadedModel, slots: KeyValueSlots) -> None:
        """The language model attends to slots from now on, and to nothing else."""
        self.tokens_S = torch.zeros(slots.count, dtype=torch.long, device=model.device)
        self.compiled = False
        self.chunk = CUDA_CHUNK if model.device.type == "cuda" else CHUNK
        self._model = model
        self._decoder = model.network.language_model.model
        self._slots = slots
        self._graphs: DecodeGraphs | None = None
        # What transformers passes on to the attention as it is, instead of computing a mask of its own.
        self._no_mask = torch.empty((1, 1, 1, 1), device=model.device)
        model.network.language_model.config._attn_implementation = ATTENTION

    def capture(self) -> None:
        """Record decode steps as CUDA graphs; without a GPU, or if that fails, steps run eagerly."""
        if self._model.device.type == "cuda":
            fast = self._fast_step()
            self.compiled = fast is not None
            self._graphs = cuda_graphs(fast or self._decode, self._slots)

    def embed(self, ids: Sequence[int], image_embeddings: Tensor | None) -> Tensor:
        """The embeddings of token ids, the image's in its slot, ``(1, L, D)``."""
        return self._model.network.embed(ids, image_embeddings)

    def prefill(self, embeddings_1ND: Tensor, slot: int, start: int, *, last: bool) -> Tensor | None:
        """Fill positions of a slot from ``start``.

        Returns:
            The logits ``(1, V)`` after the prompt's ``last`` chunk; after others None, and less is computed.
        """
        count = embeddings_1ND.shape[1]
        positions = torch.arange(start, start + count, device=embeddings_1ND.device)[None]
        view = PrefillView(self._slots, slot, start=start, count=count, last=last)
        try:
            return self._logits(self._forward(embeddings_1ND, positions, view)[:, -1])
        except Stored:
            return None

    def decode(self, slots: Sequence[int]) -> Tensor:
        """Read the next token of each slot, in ascending order; returns the logits ``(B, V)`` after it."""
        if self._graphs is not None:
            return self._graphs.replay(self.tokens_S, slots)
        view = DecodeView(self._slots, slots)
        return self._decode(self.tokens_S[view.slots_B], view)

    def feed(self, slots: Sequence[int], tokens_B: Tensor) -> None:
        """Set the tokens that the slots read next."""
        self.tokens_S[self._slots.index(slots)] = tokens_B

    def _decode(self, tokens_B: Tensor, view: DecodeView | FirstSlotsView, decoder: Any = None) -> Tensor:
        embeddings_B1D = self._model.network.embed_tokens(tokens_B)[:, None]
        return self._logits(self._forward(embeddings_B1D, view.positions_B[:, None], view, decoder)[:, 0])

    def _forward(self, embeddings: Tensor, positions: Tensor, view: AttentionView, decoder: Any = None) -> Tensor:
        output = (decoder or self._decoder)(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=self._no_mask,
            use_cache=False,
            view=view,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.network.language_model.lm_head(hidden)
        return logits

    # --- a faster decode step

    def _fast_step(self) -> DecodeStep | None:
        """The step through :func:`fast_decoder`, once it is seen to do what the plain one does; else None."""
        started = time.perf_counter()
        if not _has_c_compiler():
            logger.warning("Decode steps are not compiled, and slower: there is no C compiler (gcc or clang).")
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, about itself
                decoder = fast_decoder(self._decoder)
                if decoder is None:
                    return None
                step = partial(self._decode, decoder=decoder)
                error = max(self._difference(step, rows) for rows in {1, self._slots.count})
        except Exception as failure:  # noqa: BLE001 - compilers fail in many ways, and the plain step is at hand
            logger.warning("Decode steps are not compiled (%s), and slower.", type(failure).__name__)
            return None
        limit = 32 * torch.finfo(self._model.dtype).eps
        if not error < limit:
            logger.warning("Compiled decode steps differ by %.2g of the logits, and are not used.", error)
            return None
        logger.info("Decode steps compiled in %.1f s; they agree to %.1g.", time.perf_counter() - started, error)
        return step

    def _difference(self, step: DecodeStep, rows: int) -> float:
        """How far its logits after some tokens are from the plain step's, as a share of these; empties the slots."""
        slots, device = self._slots, self._model.device
        places = [0, 1, 2, min(_TRIED_POSITION, slots.positions - 1)]
        logits: list[Tensor] = []
        for fast in (False, True):
            _empty(slots, rows)
            for place in places:
                tokens_B = torch.arange(rows, device=device) + place + 3
                slots.filled[:rows] = [place] * rows
                if fast:
                    positions_B = torch.full((rows,), place, device=device)
                    last_BV = step(tokens_B, FirstSlotsView(slots, positions_B, rounded(place + 1)))
                else:
                    last_BV = self._decode(tokens_B, DecodeView(slots, range(rows)))
            logits.append(last_BV.double())
        _empty(slots, rows)
        plain, fast_ones = logits
        return float((fast_ones - plain).norm() / plain.norm())


def _has_c_compiler() -> bool:
    """Triton makes what launches its kernels with one; without it torch fails late, and at length."""
    return any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang")))


def _empty(slots: KeyValueSlots, rows: int) -> None:
    """Nothing is left in the first slots."""
    for slot in range(rows):
        slots.filled[slot] = slots.positions - 1
        slots.clear(slot)
