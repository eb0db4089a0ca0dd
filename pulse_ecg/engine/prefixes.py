"""Keys and values of prompts up to and with the image, so that a second question on it need not compute them again."""

from __future__ import annotations

from torch import Tensor

from pulse_ecg.engine.lru import Lru
from pulse_ecg.engine.slots import KeyValueSlots
from pulse_ecg.generation import EncodedPrompt
from pulse_ecg.prompt import IMAGE_TOKEN_INDEX

_MAX_PREFIXES = 32

PrefixKey = tuple[str, tuple[int, ...]]


def prefix_length(prompt: EncodedPrompt) -> int:
    """Positions up to and with the image; 0 without one.  A prompt is always cut into chunks here.

    So an answer is computed from the same numbers, to the last bit, whether its prefix was remembered or not.
    """
    return prompt.ids.index(IMAGE_TOKEN_INDEX) + prompt.image_tokens if prompt.image else 0


def prefix_key(prompt: EncodedPrompt) -> PrefixKey | None:
    """What decides the prefix: the image's content and the token ids before it."""
    if prompt.image is None:
        return None
    return prompt.image.key, tuple(prompt.ids[: prompt.ids.index(IMAGE_TOKEN_INDEX)])


def after_image(prompt: EncodedPrompt) -> list[int]:
    """The token ids that follow the prefix."""
    return prompt.ids[prompt.ids.index(IMAGE_TOKEN_INDEX) + 1 :] if prompt.image else prompt.ids


class PrefixCache:
    """The latest prefixes, copied out of slots and into them; bounded in bytes."""

    def __init__(self, slots: KeyValueSlots, max_bytes: int) -> None:
        self._slots = slots
        self._copies = Lru[PrefixKey, Tensor](max_bytes=max_bytes, max_entries=_MAX_PREFIXES)

    def restore(self, prompt: EncodedPrompt, slot: int) -> bool:
        """Write the prompt's prefix into ``slot``, if it is remembered."""
        key = prefix_key(prompt)
        copy = self._copies.get(key) if key else None
        if copy is None:
            return False
        self._slots.write(slot, copy)
        return True

    def keep(self, prompt: EncodedPrompt, slot: int) -> None:
        """Remember the prefix that ``slot`` holds now."""
        key, length = prefix_key(prompt), prefix_length(prompt)
        size = length * self._slots.position_bytes
        if key and self._copies.make_room(size):  # before the copy is made
            self._copies.put(key, self._slots.read(slot, length), size=size)

    def clear(self) -> None:
        """Give all the memory back."""
        self._copies.clear()
