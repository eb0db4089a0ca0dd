"""Choosing the next token from its logits, as transformers' ``generate`` does for the official code."""

from __future__ import annotations

from typing import cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pulse_ecg.params import GenerationParams


class Sampler:
    """Chooses one answer's tokens; keeps what was chosen, for the repetition penalty, and the random state.

    The penalty counts generated tokens alone: the official code generates from embeddings, so the prompt's tokens
    are never seen by it.  What it does see first is a BOS that ``generate`` starts from for want of ids: that counts.
    Order as in transformers: penalty, temperature, top-k, top-p.
    """

    def __init__(
        self, params: GenerationParams, *, bos_id: int, limit: int, vocabulary: int, seed: int, device: torch.device
    ) -> None:
        """``limit`` is the most tokens to choose, ``vocabulary`` the number of logits; ``seed`` decides the draws."""
        self._greedy = params.greedy
        self._generator = torch.Generator(device).manual_seed(seed)
        self._seen = torch.full((1, limit + 1), bos_id, dtype=torch.long, device=device)
        self._count = 1
        self._processors = LogitsProcessorList()
        if params.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        if not self._greedy:
            self._processors.append(TemperatureLogitsWarper(params.temperature))
            if 0 < params.top_k < vocabulary:
                self._processors.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(params.top_p))

    def choose(self, logits_V: Tensor) -> Tensor:
        """The next token as a tensor of one element on the logits' device.

        Args:
            logits_V: of the last position, any float dtype.
        """
        seen = cast(LongTensor, self._seen[:, : self._count])
        scores = self._processors(seen, cast(FloatTensor, logits_V[None].float()))
        if self._greedy:
            token = scores.argmax(dim=-1)
        else:
            token = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator)[0]
        self._seen[0, self._count] = token[0]
        self._count += 1
        return token
