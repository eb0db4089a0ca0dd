"""A conversation in the ``llava_v1`` template, and its token ids with one slot for the image.

Source: ``conv_llava_v1`` and ``Conversation.get_prompt`` (SeparatorStyle.TWO) in LLaVA's ``conversation.py``;
``tokenizer_image_token`` in its ``mm_utils.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from pulse_ecg.errors import PromptTooLongError
from pulse_ecg.tokenizer import Tokenizer

IMAGE_TOKEN_INDEX = -200
"""Stands in the ids where the image's features go (LLaVA's ``constants.py``)."""

# Longer prompts are refused without counting their tokens, which takes about a second for each two million characters.
MAX_CHARACTERS = 1_000_000

# A fact of the model: the exact sentence it was trained with. Another one changes its answers.
LLAVA_V1_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


class _Mark(Enum):
    """What stands between texts of a prompt and is no text itself."""

    IMAGE = "<image>"
    EOS = "</s>"


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; the text stays out of ``repr`` and so out of logs."""

    role: Literal["user", "assistant"]
    text: str = field(repr=False)


@dataclass(frozen=True)
class Conversation:
    """Turns that begin and end with the user and alternate, under one system sentence."""

    turns: tuple[Turn, ...]
    system: str = field(default=LLAVA_V1_SYSTEM, repr=False)

    @property
    def question(self) -> str:
        """The text of the last turn: what is being asked."""
        return self.turns[-1].text


def prompt_ids(conversation: Conversation, *, with_image: bool, tokenizer: Tokenizer, context_length: int) -> list[int]:
    """Token ids of the prompt: BOS first, :data:`IMAGE_TOKEN_INDEX` once in the first user turn if ``with_image``.

    Each stretch of text is tokenised on its own, so the text after the image opens with a prefix of its own and the
    text after a ``</s>`` has none.  ``<image>`` or ``</s>`` inside a turn's text is plain text.

    Raises:
        PromptTooLongError: the text is so long that it is not even tokenised; it cannot fit by far.
    """
    parts = _parts(conversation, with_image=with_image)
    characters = sum(len(part) for part in parts if isinstance(part, str))
    if characters > max(MAX_CHARACTERS, context_length * tokenizer.longest_piece):
        raise PromptTooLongError(
            f"The prompt has {characters:,} characters, at the very least {characters // tokenizer.longest_piece:,} "
            f"tokens; prompt, image and answer share the model's {context_length:,} positions. Shorten the question."
        )
    ids = [tokenizer.bos_id]
    prefix = True
    for part in parts:
        if part is _Mark.IMAGE:
            ids.append(IMAGE_TOKEN_INDEX)
        elif part is _Mark.EOS:
            ids.append(tokenizer.eos_id)
        else:
            ids.extend(tokenizer.encode(part, prefix=prefix))
        prefix = part is not _Mark.EOS
    return ids


def _parts(conversation: Conversation, *, with_image: bool) -> list[str | Literal[_Mark.IMAGE, _Mark.EOS]]:
    """The prompt as stretches of text with the image slot and the ends of turns between them."""
    parts: list[str | Literal[_Mark.IMAGE, _Mark.EOS]] = []
    text = conversation.system + " "
    for index, turn in enumerate(conversation.turns):
        if turn.role == "user":
            text += "USER: "
            if with_image and index == 0:
                parts += [text, _Mark.IMAGE]
                text = "\n"
            text += turn.text + " "
        else:
            parts += [f"{text}ASSISTANT: {turn.text}", _Mark.EOS]
            text = ""
    return [*parts, text + "ASSISTANT:"]
