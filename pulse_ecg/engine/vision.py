"""Images to embeddings: the tiles of several images through the tower together, and the latest images remembered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from threading import Lock
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pulse_ecg.checkpoint import LoadedModel
from pulse_ecg.device import upload
from pulse_ecg.engine.lru import Lru
from pulse_ecg.generation import ImagePrompt

TILES_PER_PASS = 16  # about as long as one chunk of a prompt
_REMEMBERED_IMAGES = 32
_REMEMBERED_BYTES = 256 * 2**20  # of PULSE-7B's 2,880 image tokens, 11 images in float16
_RECALLED_BYTES = 256 * 2**20  # and as much again may be held by prompts, though it be forgotten here meanwhile


class ImageEncoder:
    """The vision tower and the projector behind it.  :meth:`recall` may be called from any thread."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._remembered = Lru[str, ImagePrompt](max_bytes=_REMEMBERED_BYTES, max_entries=_REMEMBERED_IMAGES)
        self._recalled = WeakValueDictionary[str, ImagePrompt]()
        self._lock = Lock()

    def recall(self, key: str) -> ImagePrompt | None:
        """An image that was encoded lately, with its embeddings and without its tiles.

        None also when the others that were recalled, as far as anybody still holds them, leave no room for it.
        """
        with self._lock:
            known, recalled = self._remembered.get(key), self._recalled.get(key)
            if recalled is None and known is not None:
                held = sum(map(_size, self._recalled.values()))
                if held + _size(known) <= _RECALLED_BYTES:
                    recalled = self._recalled[key] = replace(known)  # an object that its holders alone keep alive
            return recalled

    def clear(self) -> None:
        """Give back the memory of all that is remembered."""
        with self._lock:
            self._remembered.clear()

    def encode(self, images: Sequence[ImagePrompt]) -> list[Tensor]:
        """The embeddings ``(tokens, D)`` of each image; those not remembered go through the tower in one pass."""
        embeddings: dict[str, Tensor] = {}
        new: dict[str, ImagePrompt] = {}
        for image in images:
            known = image if image.embeddings is not None else self._known(image.key)
            if known is not None and known.embeddings is not None:
                embeddings[image.key] = known.embeddings
            else:
                new[image.key] = image
        embeddings |= self._encode_new(list(new.values()))
        return [embeddings[image.key] for image in images]

    def _known(self, key: str) -> ImagePrompt | None:
        with self._lock:
            return self._remembered.get(key)

    def _encode_new(self, images: Sequence[ImagePrompt]) -> dict[str, Tensor]:
        tiles = [torch.from_numpy(image.tiles.pixels_TCHW) for image in images if image.tiles is not None]
        if not tiles:
            return {}
        pixels_TCHW = upload(torch.cat(tiles), self._model.device)
        features_TPD, counts = self._model.network.encode_tiles(pixels_TCHW), [len(part) for part in tiles]
        features: Sequence[Tensor] = torch.split(features_TPD, counts)
        return {image.key: self._merged(image, part) for image, part in zip(images, features, strict=True)}

    def _merged(self, image: ImagePrompt, features_TPD: Tensor) -> Tensor:
        order = upload(torch.from_numpy(image.order), features_TPD.device)
        embeddings = self._model.network.merge(features_TPD, order)
        remembered = replace(image, tiles=None, embeddings=embeddings)
        with self._lock:
            self._remembered.put(image.key, remembered, size=embeddings.nbytes)
        return embeddings


def _size(image: ImagePrompt) -> int:
    return image.embeddings.nbytes if image.embeddings is not None else 0


def first_pass(images: Sequence[ImagePrompt]) -> list[ImagePrompt]:
    """As many of the images as go through the tower in one pass, at least one."""
    taken, tiles = list[ImagePrompt](), 0
    for image in images:
        tiles += len(image.tiles.pixels_TCHW) if image.tiles else 0
        if taken and tiles > TILES_PER_PASS:
            break
        taken.append(image)
    return taken
