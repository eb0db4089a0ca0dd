"""The tower on a part of the patches, as in masked autoencoders (He et al. 2022): half of an ECG's page is blank paper.

The training spends most of its time on the patches that a trace crosses, and on as many others as fill up a fixed
number for each tile.  The tower and the language model see a share of the images whole, as the endpoint does.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demo.network import CONSTANTS
from demo.samples import PATCH, SIDE, Sample
from pulse_ecg.model import PulseModel

PATCHES = SIDE * SIDE
"""Of a tile."""
_OVERVIEW_SHARE = 0.3


def choose(sample: Sample, rng: np.random.Generator, keep: int, *, beats_first: bool = False) -> NDArray[np.int64]:
    """``(tiles, keep)`` indices into the sample's patches; most overviews are left out, as the tiles show more.

    ``beats_first`` prefers patches with a beat, for targets that exist there alone; which patches were chosen then says
    something about the rhythm.
    """
    lead, beat = (part.reshape(-1, PATCHES) for part in (sample.patches.lead_TSS, sample.patches.beat_TSS))
    worth = (lead > 0) + 1.0 * (beats_first & (beat > 0)) + rng.uniform(0, 0.9, lead.shape)
    best = np.sort(np.argsort(-worth, axis=1)[:, :keep], axis=1) + PATCHES * np.arange(len(lead))[:, None]
    return best[0 if rng.random() < _OVERVIEW_SHARE else 1 :]


def patch_pixels(sample: Sample, chosen_TK: NDArray[np.int64]) -> NDArray[np.uint8]:
    """``(T, K, 3 x PATCH x PATCH)``, in the order of the tower's patch embedding."""
    patches = sample.tiles_THWC.reshape(-1, SIDE, PATCH, SIDE, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
    return patches[np.unravel_index(chosen_TK, patches.shape[:3])].reshape(*chosen_TK.shape, -1)


def encode(network: PulseModel, pixels_TKX: Tensor, place_TK: Tensor) -> Tensor:
    """What the tower makes of these patches, ``(T, K, V)``; with all of a tile's patches, what it always makes.

    Args:
        pixels_TKX: as from :func:`patch_pixels`.
        place_TK: each patch's place within its tile.
    """
    body = network.tower_body
    embeddings = body.get_submodule("embeddings")
    weight = embeddings.get_parameter("patch_embedding.weight")
    positions = embeddings.get_parameter("position_embedding.weight")
    pixels = pixels_TKX.float().reshape(*pixels_TKX.shape[:2], 3, -1)
    scale, shift = (constant.to(weight.device).view(3, 1) for constant in CONSTANTS)
    embedded = pixels.mul_(scale).sub_(shift).flatten(2) @ weight.flatten(1).T
    embedded = embedded + positions[1 + place_TK]
    start = (embeddings.get_parameter("class_embedding") + positions[0]).expand(len(embedded), 1, -1)
    hidden = body.get_submodule("pre_layrnorm")(torch.cat([start, embedded], 1))
    encoded: Tensor = body.get_submodule("encoder")(inputs_embeds=hidden).last_hidden_state
    return encoded[:, 1:]
