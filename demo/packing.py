"""Several questions about one image in one sequence: the image's hundreds of tokens are computed once.

Each question stands right after the image, sees the image and itself, and no other question; its positions begin where
the image ends.  What it is answered is therefore what it would be answered alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from demo.questions import Question
from pulse_ecg.model import PulseModel
from pulse_ecg.prompt import IMAGE_TOKEN_INDEX, LLAVA_V1_SYSTEM, Conversation, Turn, prompt_ids
from pulse_ecg.tokenizer import Tokenizer

IGNORED = -100


@dataclass(frozen=True)
class Pack:
    """Token ids before the image, and after it those of all questions with their answers.

    ``labels`` and ``shares`` are for the latter: the true answers' tokens, and how likely each token should be there.
    """

    before: list[int]
    after: list[int]
    labels: list[int]
    shares: list[dict[int, float]]
    segments: list[int]
    positions: list[int]
    image_tokens: int = 0
    """How many tokens the whole image has; needed where only a part of them is given."""


class Told(NamedTuple):
    """At the A tokens of one image's answers."""

    losses_A: Tensor
    """Cross-entropy."""
    owner_A: Tensor
    """The number of the token's question, from 0."""
    right_A: Tensor
    """Whether the true token was the model's choice."""
    inner_AD: Tensor
    """What the last layer gets."""


def pack(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    system: str = LLAVA_V1_SYSTEM,
    image_tokens: int | None = None,
) -> Pack:
    """Prompts exactly as the endpoint builds them, each with its answer and the end of the turn.

    Args:
        image_tokens: how many the whole image has, 0 for prompts without an image; needed where a part is given.
    """
    before: list[int] = []
    after: list[int] = []
    labels: list[int] = []
    shares: list[dict[int, float]] = []
    segments: list[int] = []
    positions: list[int] = []
    for number, question in enumerate(questions, start=1):
        ids = prompt_ids(
            Conversation((Turn("user", question.text),), system),
            with_image=image_tokens != 0,
            tokenizer=tokenizer,
            context_length=4096,
        )
        slot = ids.index(IMAGE_TOKEN_INDEX) if image_tokens != 0 else -1
        before, asked = ids[: max(slot, 0)], ids[slot + 1 :]
        said, *others = (
            [*tokenizer.encode(text), tokenizer.eos_id] for text in (question.answer, *dict(question.close))
        )
        after += asked + said
        labels += [IGNORED] * len(asked) + said
        shares += [{}] * len(asked) + _shares(said, list(zip(others, dict(question.close).values(), strict=True)))
        segments += [number] * (len(asked) + len(said))
        positions += range(len(asked) + len(said))
    return Pack(before, after, labels, shares, segments, positions, image_tokens or 0)


def _shares(said: list[int], others: Sequence[tuple[list[int], float]]) -> list[dict[int, float]]:
    """How likely each next token is after the true answer's tokens so far, among it and the others by their weights."""
    shares = []
    for place, token in enumerate(said):
        weights = {token: 1.0}
        for other, weight in others:
            if other[:place] == said[:place]:
                weights[other[place]] = weights.get(other[place], 0.0) + weight
        total = sum(weights.values())
        shares.append({token: weight / total for token, weight in weights.items()})
    return shares


def answer_losses(
    network: PulseModel,
    features: Sequence[Tensor],
    packs: Sequence[Pack],
    places: Sequence[Tensor | None] | None = None,
) -> list[Told]:
    """What each image's answers cost, token by token.

    Args:
        features: of each image ``(tokens, D)``, its embeddings in the language model's space.
        places: where among all the image's tokens these stand, if they are a part of them; they keep their positions.
    """
    table = network.embed_tokens
    device = table.weight.device
    sequences, owners, positions = [], [], []
    for image, packed, place in zip(features, packs, places or [None] * len(packs), strict=True):
        before, after = (
            table(torch.tensor(ids, dtype=torch.long, device=device)).float() for ids in (packed.before, packed.after)
        )
        shared = len(before) + len(image)
        sequences.append(torch.cat([before, image.float(), after]))
        owners.append(torch.tensor([0] * shared + packed.segments, device=device))
        seen = torch.arange(len(image), device=device) if place is None else place
        end = len(before) + (len(image) if place is None else packed.image_tokens)
        own = torch.tensor(packed.positions, device=device) + end
        positions.append(torch.cat([torch.arange(len(before), device=device), seen + len(before), own]))
    owner_BL = pad_sequence(owners, batch_first=True, padding_value=-1)
    hidden = network.language_model.model(
        inputs_embeds=pad_sequence(sequences, batch_first=True),
        attention_mask=_mask(owner_BL),
        position_ids=pad_sequence(positions, batch_first=True),
        use_cache=False,
        output_hidden_states=True,
    )
    results = []
    for last_LD, inner_LD, sequence, packed in zip(
        hidden.last_hidden_state, hidden.hidden_states[-2], sequences, packs, strict=True
    ):
        labels, segments = (torch.tensor(part, device=device) for part in (packed.labels, packed.segments))
        told = (labels != IGNORED).nonzero()[:, 0]
        at = len(sequence) - len(labels) + told - 1
        logits = network.language_model.lm_head(last_LD[at]).float()
        losses = cross_entropy(logits, [packed.shares[place] for place in told.tolist()])
        results.append(Told(losses, segments[told] - 1, logits.argmax(-1) == labels[told], inner_LD[at]))
    return results


def cross_entropy(logits_AV: Tensor, shares: Sequence[dict[int, float]]) -> Tensor:
    """Of each answer token's distribution with its shares: ``(A,)``."""
    device = logits_AV.device
    tokens_AK = pad_sequence([torch.tensor(list(share), device=device) for share in shares], batch_first=True)
    shares_AK = pad_sequence([torch.tensor(list(share.values()), device=device) for share in shares], batch_first=True)
    return -(shares_AK * functional.log_softmax(logits_AV, -1).gather(1, tokens_AK)).sum(-1)


def _mask(owner_BL: Tensor) -> Tensor:
    """What each position may see: the shared part and its own question, up to itself; padding sees itself."""
    order = torch.arange(owner_BL.shape[1], device=owner_BL.device)
    same = owner_BL[:, :, None] == owner_BL[:, None, :]
    seen = (order[:, None] >= order) & (same | (owner_BL[:, None, :] == 0))
    return torch.zeros(seen.shape, device=owner_BL.device).masked_fill_(~seen, -1e4)[:, None]
