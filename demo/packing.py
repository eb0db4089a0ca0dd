"""Several questions about one image in one sequence: the image's hundreds of tokens are computed once.

Each question stands right after the image, sees the image and itself, and no other question; its positions begin where
the image ends.  What it is answered is therefore what it would be answered alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

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
    image_tokens: int
    """How many tokens the whole image has, 0 for prompts without one."""


@dataclass(frozen=True)
class Sequences:
    """The packs of B images as tensors: N text tokens, L positions a sequence, A tokens of Q answers.

    ``source_BL`` says what stands at each position: a number below N is a text token, N + p the p-th feature of all
    images' features together, and N + P, past them all, is padding.
    """

    text_N: Tensor
    source_BL: Tensor
    owner_BL: Tensor
    """Of each position: 0 for what all questions of the image see, else the question's number, -1 for padding."""
    position_BL: Tensor
    told_A: Tensor
    """Where in ``(B x L)`` the model says an answer's token: the position before it."""
    label_A: Tensor
    question_A: Tensor
    """The answer's number among all Q, image after image."""
    token_AK: Tensor
    share_AK: Tensor
    """How likely each of the K tokens beside it should be there; 0 for padding."""

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class Told(NamedTuple):
    """At the A tokens of all answers."""

    losses_A: Tensor
    """Cross-entropy."""
    right_A: Tensor
    """Whether the true token was the model's choice."""
    inner_AD: Tensor
    """What the last layer gets."""


def pack(
    questions: Sequence[Question], tokenizer: Tokenizer, *, image_tokens: int, system: str = LLAVA_V1_SYSTEM
) -> Pack:
    """Prompts exactly as the endpoint builds them, each with its answer and the end of the turn.

    Args:
        image_tokens: how many the whole image has, 0 for prompts without an image.
    """
    before: list[int] = []
    after: list[int] = []
    labels: list[int] = []
    shares: list[dict[int, float]] = []
    segments: list[int] = []
    positions: list[int] = []
    for number, question in enumerate(questions, start=1):
        ids = _prompt(question.text, system, image_tokens > 0, tokenizer)
        slot = ids.index(IMAGE_TOKEN_INDEX) if image_tokens else -1
        before, asked = ids[: max(slot, 0)], ids[slot + 1 :]
        said, likely = _answer(question.answer, question.close, tokenizer)
        after += asked + said
        labels += [IGNORED] * len(asked) + said
        shares += [{}] * len(asked) + likely
        segments += [number] * (len(asked) + len(said))
        positions += range(len(asked) + len(said))
    return Pack(before, after, labels, shares, segments, positions, image_tokens)


@lru_cache(maxsize=10_000)
def _prompt(text: str, system: str, with_image: bool, tokenizer: Tokenizer) -> list[int]:
    turns = Conversation((Turn("user", text),), system)
    return prompt_ids(turns, with_image=with_image, tokenizer=tokenizer, context_length=4096)


@lru_cache(maxsize=10_000)
def _answer(
    text: str, close: tuple[tuple[str, float], ...], tokenizer: Tokenizer
) -> tuple[list[int], list[dict[int, float]]]:
    """The answer's tokens, and how likely each should be after those before it, among it and the answers close to it
    by their weights."""
    others = dict(close)
    said, *near = ([*tokenizer.encode(one), tokenizer.eos_id] for one in (text, *others))
    shares = []
    for place, token in enumerate(said):
        weights = {token: 1.0}
        for other, weight in zip(near, others.values(), strict=True):
            if other[:place] == said[:place]:
                weights[other[place]] = weights.get(other[place], 0.0) + weight
        total = sum(weights.values())
        shares.append({token: weight / total for token, weight in weights.items()})
    return said, shares


def join(packs: Sequence[Pack], places: Sequence[NDArray[np.int64]]) -> Sequences:
    """The packs of a batch side by side.

    Args:
        places: for each image where, among all its tokens, those stand whose features there will be; they keep their
            positions.  The features of an image whose pack has no image tokens are passed over.
    """
    texts = sum(len(packed.before) + len(packed.after) for packed in packs)
    features = sum(map(len, places))
    width = max(
        len(p.before) + len(at) * (p.image_tokens > 0) + len(p.after) for p, at in zip(packs, places, strict=True)
    )
    source = np.full((len(packs), width), texts + features)
    owner, position = np.full_like(source, -1), np.zeros_like(source)
    text: list[int] = []
    told: list[int] = []
    labels: list[int] = []
    numbers: list[int] = []
    shares: list[dict[int, float]] = []
    feature = texts
    for row, (packed, kept) in enumerate(zip(packs, places, strict=True)):
        shown = kept if packed.image_tokens else kept[:0]
        start, image_end = len(packed.before), len(packed.before) + len(shown)
        end = image_end + len(packed.after)
        of_text = np.arange(len(text), len(text) + start + len(packed.after))
        source[row, :end] = np.concatenate([of_text[:start], np.arange(feature, feature + len(shown)), of_text[start:]])
        owner[row, :end] = np.concatenate([np.zeros(image_end, int), packed.segments])
        own = np.array(packed.positions) + start + packed.image_tokens
        position[row, :end] = np.concatenate([np.arange(start), shown + start, own])
        text += packed.before + packed.after
        feature += len(kept)
        first = numbers[-1] + 1 if numbers else 0
        for place, label in enumerate(packed.labels):
            if label != IGNORED:
                told.append(row * width + image_end + place - 1)
                labels.append(label)
                numbers.append(first + packed.segments[place] - 1)
                shares.append(packed.shares[place])
    token, share = padded(shares)
    return Sequences(
        torch.tensor(text),
        torch.from_numpy(source),
        torch.from_numpy(owner),
        torch.from_numpy(position),
        torch.tensor(told),
        torch.tensor(labels),
        torch.tensor(numbers),
        token,
        share,
    )


def padded(shares: Sequence[dict[int, float]]) -> tuple[Tensor, Tensor]:
    """Tokens and their shares, each ``(A, K)``."""
    most = max(map(len, shares))
    tokens = [[*share, *[0] * (most - len(share))] for share in shares]
    values = [[*share.values(), *[0.0] * (most - len(share))] for share in shares]
    return torch.tensor(tokens), torch.tensor(values)


def answer_losses(network: PulseModel, features_PD: Tensor, asked: Sequences) -> Told:
    """What the answers cost, token by token.

    Args:
        features_PD: all images' embeddings in the language model's space, one image after another.
    """
    words = network.embed_tokens(asked.text_N)
    everything = torch.cat([words, features_PD, words.new_zeros(1, words.shape[1])])
    hidden = network.language_model.model(
        inputs_embeds=everything[asked.source_BL],
        attention_mask=_mask(asked.owner_BL),
        position_ids=asked.position_BL,
        use_cache=False,
        output_hidden_states=True,
    )
    logits_AV = network.language_model.lm_head(hidden.last_hidden_state.flatten(0, 1)[asked.told_A])
    losses = cross_entropy(logits_AV, asked.token_AK, asked.share_AK)
    inner = hidden.hidden_states[-2].flatten(0, 1)[asked.told_A]
    return Told(losses, logits_AV.argmax(-1) == asked.label_A, inner)


def cross_entropy(logits_AV: Tensor, tokens_AK: Tensor, shares_AK: Tensor) -> Tensor:
    """Of each answer token's distribution with its shares: ``(A,)``."""
    return -(shares_AK * functional.log_softmax(logits_AV, -1).gather(1, tokens_AK)).sum(-1)


def _mask(owner_BL: Tensor) -> Tensor:
    """What each position may see: the shared part and its own question, up to itself; padding sees itself."""
    order = torch.arange(owner_BL.shape[1], device=owner_BL.device)
    same = owner_BL[:, :, None] == owner_BL[:, None, :]
    seen = (order[:, None] >= order) & (same | (owner_BL[:, None, :] == 0))
    return torch.zeros(seen.shape, device=owner_BL.device).masked_fill_(~seen, -1e4)[:, None]
