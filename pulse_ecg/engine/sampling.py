"""Choosing the next tokens of several answers at once, each as transformers' ``generate`` would choose it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pulse_ecg.device import upload
from pulse_ecg.params import GenerationParams

_TIES = 32  # tokens that may tie with the last of the top k


@dataclass(frozen=True)
class _Rows:
    """The sampling parameters of a step's rows as tensors ``(B, 1)``; None where no row asks for it.

    ``tail`` is 1 - top_p; ``width`` is how many of the likeliest tokens are looked at, 0 for all of them.
    """

    slots_B: Tensor
    penalty: Tensor | None
    greedy_B: Tensor | None
    temperature: Tensor
    top_k: Tensor
    tail: Tensor
    width: int


class BatchSampler:
    """Chooses tokens for the answers in a number of slots; everything but the draws' seeds stays on the device.

    Order as in transformers: penalty, temperature, top-k, top-p, and one draw as ``torch.multinomial`` makes it, from
    a generator of the answer's own.  The penalty counts generated tokens alone: the official code generates from
    embeddings, so the prompt's tokens are never seen by it.  What it does see first is a BOS that ``generate``
    starts from for want of ids: that counts.
    """

    def __init__(self, slots: int, *, vocabulary: int, bos_id: int, device: torch.device) -> None:
        """``vocabulary`` is how many of the logits are tokens' own, from the first on: no other id is chosen."""
        self._seen_SV = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        self._true = torch.ones((), dtype=torch.bool, device=device)  # Python's own would be copied, and waited for
        self._params: list[GenerationParams | None] = [None] * slots
        self._generators = [torch.Generator(device) for _ in range(slots)]
        self._vocabulary = vocabulary
        self._bos_id = bos_id
        self._device = device
        self._rows_of: tuple[tuple[int, ...], _Rows] | None = None

    def begin(self, slot: int, params: GenerationParams, seed: int | None) -> None:
        """A new answer in a slot."""
        self._params[slot] = params
        self._generators[slot].manual_seed(seed or 0)
        self._seen_SV[slot] = False
        self._seen_SV[slot, self._bos_id].fill_(True)
        self._rows_of = None

    def choose(self, logits_BV: Tensor, slots: Sequence[int]) -> Tensor:
        """The next token of each row, ``(B,)`` on the logits' device; row ``i`` is the answer in ``slots[i]``."""
        rows = self._rows(tuple(slots))
        scores = logits_BV[:, : self._vocabulary].float()
        if rows.penalty is not None:
            penalised = torch.where(scores < 0, scores * rows.penalty, scores / rows.penalty)
            scores = torch.where(self._seen_SV[rows.slots_B], penalised, scores)
        tokens = scores.argmax(dim=-1)
        if rows.greedy_B is not None:
            tokens = torch.where(rows.greedy_B, tokens, self._draw(scores, rows, slots))
        if rows.penalty is not None:
            self._seen_SV.index_put_((rows.slots_B, tokens), self._true)
        return tokens

    def _draw(self, scores_BV: Tensor, rows: _Rows, slots: Sequence[int]) -> Tensor:
        noise_BV = torch.ones_like(scores_BV)
        for row, slot in enumerate(slots):
            params = self._params[slot]
            if params is not None and not params.greedy:
                noise_BV[row].exponential_(generator=self._generators[slot])
        scores_BV = scores_BV / rows.temperature
        if not rows.width:
            return (scores_BV.softmax(dim=-1) / noise_BV).argmax(dim=-1)
        scores_BK, tokens_BK = _candidates(scores_BV, rows)
        drawn_B1 = (scores_BK.softmax(dim=-1) / noise_BV.gather(-1, tokens_BK)).argmax(dim=-1, keepdim=True)
        return tokens_BK.gather(-1, drawn_B1)[:, 0]

    def _rows(self, slots: tuple[int, ...]) -> _Rows:
        """The parameters as tensors; kept until the rows change."""
        if self._rows_of is None or self._rows_of[0] != slots:
            given = [params for slot in slots if (params := self._params[slot]) is not None]
            self._rows_of = slots, self._stacked(slots, given)
        return self._rows_of[1]

    def _stacked(self, slots: tuple[int, ...], given: Sequence[GenerationParams]) -> _Rows:
        def column(values: list[float] | list[int] | list[bool]) -> Tensor:
            return upload(torch.tensor(values), self._device)[:, None]

        drawn = [params for params in given if not params.greedy]
        top_ks = [params.top_k if 0 < params.top_k < self._vocabulary else self._vocabulary for params in drawn]
        width = 0
        if any(k < self._vocabulary or params.top_p < 1 for k, params in zip(top_ks, drawn, strict=True)):
            width = min(max(top_ks) + _TIES, self._vocabulary)
        penalties = [params.repetition_penalty for params in given]
        return _Rows(
            slots_B=upload(torch.tensor(slots), self._device),
            penalty=column(penalties) if any(penalty != 1 for penalty in penalties) else None,
            greedy_B=column([p.greedy for p in given])[:, 0] if drawn else None,
            temperature=column([1.0 if p.greedy else p.temperature for p in given]),
            top_k=column([min(p.top_k, width) if p.top_k > 0 and width else max(width, 1) for p in given]),
            tail=column([1 - p.top_p for p in given]),
            width=width,
        )


def _candidates(scores_BV: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Scores and ids of the likeliest tokens, ascending; minus infinity for what top-k and top-p leave out.

    Source: ``TopKLogitsWarper`` and ``TopPLogitsWarper`` of transformers.
    """
    scores_BK, tokens_BK = (found.flip(-1) for found in scores_BV.topk(rows.width, dim=-1))
    kth_B1 = scores_BK.gather(-1, rows.width - rows.top_k)
    scores_BK = scores_BK.masked_fill(scores_BK < kth_B1, float("-inf"))
    removed = scores_BK.softmax(dim=-1).cumsum(dim=-1) <= rows.tail
    removed[:, -1] = False
    return scores_BK.masked_fill(removed & (rows.tail > 0), float("-inf")), tokens_BK
