"""The model's forward passes: a chunk of one prompt, or one token of each of several answers."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sysconfig
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
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
_LARGE_CHUNK, _MANY_MULTIPROCESSORS = 1024, 100
"""On GPUs as large as an A100.  Over 512 positions an H100 takes as long: the host launches the kernels no faster."""

_NOT_COMPILED = "Decode steps are not compiled: %s."
_TRIED_POSITIONS, _TRIED_TURNS = 1000, 3
_FIRST, _TURN, _ROW = 1, 409, 97  # tried positions: the first, and from turn to turn and row to row
_CAUSES = 4


class ModelRunner:
    """Runs the language model over the slots.  ``tokens_S`` holds the token that each slot is to read next."""

    def __init__(self, model: LoadedModel, slots: KeyValueSlots) -> None:
        """The language model attends to slots from now on, and to nothing else."""
        self.tokens_S = torch.zeros(slots.count, dtype=torch.long, device=model.device)
        self.compiled = False
        self.chunk = _chunk(model.device)
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
            self._graphs = cuda_graphs(fast, self._slots) if fast else None
            self.compiled = self._graphs is not None
            if self._graphs is None:
                gc.collect()  # graphs that were half made must not die while others are in use
                self._graphs = cuda_graphs(self._decode, self._slots)

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
        """The step through :func:`fast_decoder`, if it is seen to do what the plain one does."""
        started = time.perf_counter()
        if missing := _missing_for_triton():
            logger.warning(_NOT_COMPILED, f"there is no {missing}")
            return None
        try:
            from torch._inductor import config as compiler  # noqa: PLC0415 - imports much, for this alone

            with warnings.catch_warnings(), compiler.patch(compile_threads=1):  # no processes for a dozen kernels
                warnings.simplefilter("ignore")  # the compiler's, about itself
                decoder = fast_decoder(self._decoder)
                if decoder is None:
                    logger.info(_NOT_COMPILED, "linear layers are not plain ones")
                    return None
                self._free_cached_memory()  # what the weights' former places took
                step = partial(self._decode, decoder=decoder)
                error = max(self._difference(step, rows) for rows in {1, self._slots.count})
        except Exception as failure:  # noqa: BLE001 - compilers fail in many ways, and the plain step is at hand
            self._free_cached_memory()
            logger.warning(_NOT_COMPILED, _reason(failure))
            return None
        if error > _tolerance(self._model.dtype):
            logger.warning(_NOT_COMPILED, f"compiled, the logits differ by a share of {error:.2g}")
            return None
        logger.info("Decode steps compiled in %.1f s; logits agree to %.1g.", time.perf_counter() - started, error)
        return step

    def _difference(self, step: DecodeStep, rows: int) -> float:
        """How far its logits are from the plain step's, as a share of these, where it is worst; empties the slots."""
        slots, device = self._slots, self._model.device
        reach = min(_TRIED_POSITIONS, slots.positions)
        found: list[list[Tensor]] = []
        try:
            for fast in (False, True):
                self._fill(rows, reach)
                found.append([])
                for turn in range(_TRIED_TURNS):
                    places = [(_FIRST + _TURN * turn + _ROW * row) % reach for row in range(rows)]
                    tokens_B = torch.arange(rows, device=device) + turn + 3
                    slots.filled[:rows] = places
                    if fast:
                        positions_B = torch.tensor(places, device=device)
                        logits_BV = step(tokens_B, FirstSlotsView(slots, positions_B, rounded(max(places) + 1)))
                    else:
                        logits_BV = self._decode(tokens_B, DecodeView(slots, range(rows)))
                    found[-1].append(logits_BV.double())
        finally:
            _empty(slots, rows)
        plain_TBV, fast_TBV = (torch.stack(logits) for logits in found)
        errors_TB = (fast_TBV - plain_TBV).norm(dim=-1) / plain_TBV.norm(dim=-1)
        return float(errors_TB.nan_to_num(nan=float("inf")).max())

    def _fill(self, rows: int, reach: int) -> None:
        """The same random keys and values each time, in the first positions of the first slots."""
        generator = torch.Generator(self._model.device).manual_seed(0)
        for tensor_SHLD in (*self._slots.keys_SHLD, *self._slots.values_SHLD):
            tensor_SHLD[:rows, :, :reach].normal_(generator=generator)

    def _free_cached_memory(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()


def _chunk(device: torch.device) -> int:
    """Positions of a prompt in one forward pass."""
    if device.type != "cuda" or torch.cuda.get_device_properties(device).multi_processor_count < _MANY_MULTIPROCESSORS:
        return CHUNK
    return _LARGE_CHUNK


def _tolerance(dtype: torch.dtype) -> float:
    """What rounding may do to logits, as a share of them: measured, 0.0025 in float16."""
    return min(32 * torch.finfo(dtype).eps, 0.06)


def _reason(failure: BaseException) -> str:
    """The types of an error and of what it comes from: messages may hold paths."""
    names = [type(failure).__name__]
    while (cause := failure.__cause__ or getattr(failure, "inner_exception", None)) and len(names) < _CAUSES:
        failure = cause
        names.append(type(failure).__name__)
    return " from ".join(names)


def _missing_for_triton() -> str | None:
    """What it needs to make the code that launches its kernels; without it torch fails late, and at length."""
    given = os.environ.get("CC")
    if not any(map(shutil.which, [given] if given else ["gcc", "clang"])):
        return "C compiler (gcc or clang)"
    if not Path(sysconfig.get_paths("posix_prefix")["include"], "Python.h").is_file():
        return "Python.h (of python3-dev)"
    return None


def _empty(slots: KeyValueSlots, rows: int) -> None:
    """Nothing is left in the first slots."""
    for slot in range(rows):
        slots.filled[slot] = slots.positions - 1
        slots.clear(slot)
