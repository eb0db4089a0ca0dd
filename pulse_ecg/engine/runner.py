"""The model's forward passes: a chunk of one prompt, or one token of each of several answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pulse_ecg.checkpoint import LoadedModel
from pulse_ecg.engine.graphs import DecodeGraphs, cuda_graphs
from pulse_ecg.engine.slots import ATTENTION, AttentionView, DecodeView, KeyValueSlots, PrefillView, Stored

CHUNK = 512
"""Positions of a prompt in one forward pass: enough to fill a GPU, short enough for others to wait for."""


class ModelRunner:
    """Runs the language model over the slots.  ``tokens_S`` holds the token that each slot is to read next."""

    def __init__(self, model: LoadedModel, slots: KeyValueSlots) -> None:
        """The language model attends to slots from now on, and to nothing else."""
        self.tokens_S = torch.zeros(slots.count, dtype=torch.long, device=model.device)
        self._model = model
        self._slots = slots
        self._graphs: DecodeGraphs | None = None
        # What transformers passes on to the attention as it is, instead of computing a mask of its own.
        self._no_mask = torch.empty((1, 1, 1, 1), device=model.device)
        model.network.language_model.config._attn_implementation = ATTENTION

    def capture(self) -> None:
        """Record decode steps as CUDA graphs; without a GPU, or if that fails, steps run eagerly."""
        if self._model.device.type == "cuda":
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
        view = DecodeView.of_rows(self._slots, slots)
        return self._decode(self.tokens_S[view.slots_B], view)

    def feed(self, slots: Sequence[int], tokens_B: Tensor) -> None:
        """Set the tokens that the slots read next."""
        self.tokens_S[self._slots.index(slots)] = tokens_B

    def _decode(self, tokens_B: Tensor, view: DecodeView) -> Tensor:
        embeddings_B1D = self._model.network.embed_tokens(tokens_B)[:, None]
        return self._logits(self._forward(embeddings_B1D, view.positions_B[:, None], view)[:, 0])

    def _forward(self, embeddings: Tensor, positions: Tensor, view: AttentionView) -> Tensor:
        output = self._model.network.language_model.model(
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
