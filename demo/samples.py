"""Training and held-out samples: an image's tiles as the endpoint cuts them, the diagnosis, and what each patch shows.

A sample is a function of its split and index alone, so data are made on the fly, a run can be resumed, and no
held-out image is ever trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from demo.drawing import Drawing, draw_page, draw_style, without_flaws
from demo.signals import LEADS, Diagnosis, SyntheticEcg, draw_ecg
from pulse_ecg.anyres import Preprocessing, Size, cut_tiles, fitted_size, image_grid, select_resolution

Split = Literal["train", "held-out", "test"]
_STREAMS: dict[Split, int] = {"train": 1, "held-out": 2, "test": 3}

TILE, PATCH = 336, 28
SIDE = TILE // PATCH
PINPOINTS = tuple((TILE * w, TILE * h) for w, h in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
_PREPROCESSING = Preprocessing(TILE, pinpoints=PINPOINTS)

BEAT_KINDS = {"PVC": 2, "PAC": 3}


@dataclass(frozen=True)
class PatchTargets:
    """What a patch shows, for auxiliary losses: T tiles, S patches a side.

    ``lead`` is 0 for none, else 1 + the lead's index; ``beat`` 0 for none, 1 regular, 2 PVC, 3 PAC;
    ``timing`` holds, where there is a beat, its place in the patch and the logarithms of the RR before and after.
    """

    lead_TSS: NDArray[np.int64]
    beat_TSS: NDArray[np.int64]
    timing_TSS3: NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """An image as the model takes it, and the truth about it."""

    index: int
    tiles_THWC: NDArray[np.uint8] = field(repr=False)
    grid: Size
    ecg: SyntheticEcg = field(repr=False)
    patches: PatchTargets = field(repr=False)

    @property
    def diagnosis(self) -> Diagnosis:
        return self.ecg.diagnosis

    @property
    def patch_count(self) -> int:
        """Of all its tiles together: as many image tokens as it has in a prompt."""
        return int(self.patches.lead_TSS.size)


def image_at(split: Split, index: int) -> tuple[Image.Image, SyntheticEcg]:
    """The image of a sample, before tiling."""
    ecg, drawing = _drawn(split, index)
    return drawing.image, ecg


def diagnosis_at(split: Split, index: int) -> Diagnosis:
    """The truth about a sample."""
    return draw_ecg(_generator(split, index)).diagnosis


def sample_at(split: Split, index: int, *, plain: bool = False) -> Sample:
    """The sample of that index: same arguments, same pixels.  ``plain`` leaves out the page's flaws (a curriculum)."""
    ecg, drawing = _drawn(split, index, plain=plain)
    grid = image_grid(drawing.image.size, _PREPROCESSING)
    assert grid is not None
    return Sample(index, cut_tiles(drawing.image, _PREPROCESSING), grid, ecg, _patch_targets(ecg, drawing, grid))


def _drawn(split: Split, index: int, *, plain: bool = False) -> tuple[SyntheticEcg, Drawing]:
    rng = _generator(split, index)
    ecg = draw_ecg(rng)
    style = draw_style(rng)
    return ecg, draw_page(ecg.recording, without_flaws(style) if plain else style, rng)


def _generator(split: Split, index: int) -> np.random.Generator:
    return np.random.default_rng([_STREAMS[split], index])


def _patch_targets(ecg: SyntheticEcg, drawing: Drawing, grid: Size) -> PatchTargets:
    columns, rows = grid
    tiles = 1 + columns * rows
    votes = np.zeros((tiles, SIDE, SIDE, 13), np.int32)
    beat = np.zeros((tiles, SIDE, SIDE), np.int64)
    timing = np.zeros((tiles, SIDE, SIDE, 3), np.float32)
    gaps = np.log(np.diff(ecg.beats))
    before, after = np.concatenate([gaps[:1], gaps]), np.concatenate([gaps, gaps[-1:]])
    for trace in drawing.traces:
        lead = LEADS.index(trace.lead) + 1
        seen = (ecg.beats >= trace.start) & (ecg.beats < trace.stop - 0.02)
        at = ((ecg.beats[seen] - trace.start) / (trace.stop - trace.start) * len(trace.points)).astype(int)
        kinds = np.array([BEAT_KINDS.get(kind, 1) for kind in ecg.kinds])[seen]
        for view in _views(drawing.image.size, grid):
            tile, row, column, _ = (values[::3] for values in view.patches(trace.points))
            crossed = np.stack([tile, row, column, np.full_like(tile, lead)])[:, tile >= 0]
            np.add.at(votes, tuple(crossed), 1)
            tile, row, column, place = view.patches(trace.baseline[at])
            inside = tile >= 0
            spot = tile[inside], row[inside], column[inside]
            beat[spot] = kinds[inside]
            timing[spot] = np.stack([place, before[seen], after[seen]], 1)[inside]
    votes[..., 0] = 1
    return PatchTargets(votes.argmax(-1), beat, timing)


@dataclass(frozen=True)
class _View:
    """The overview, or the sheet of tiles: how pixels of the image map to it."""

    scale: tuple[float, float]
    offset: tuple[float, float]
    first_tile: int
    grid: Size

    def patches(self, points: NDArray[np.float64]) -> tuple[NDArray[np.int64], ...]:
        """Tile, row, column and place within the patch of each point; points outside have the tile -1."""
        x, y = (points * self.scale + self.offset).T
        columns, rows = self.grid
        inside = (x >= 0) & (x < columns * TILE) & (y >= 0) & (y < rows * TILE)
        tile = self.first_tile + (y // TILE).astype(int) * columns + (x // TILE).astype(int)
        row, column = (y % TILE // PATCH).astype(int), (x % TILE // PATCH).astype(int)
        return np.where(inside, tile, -1), row, column, x % PATCH / PATCH


def _views(image_size: Size, grid: Size) -> tuple[_View, _View]:
    width, height = image_size
    resolution = select_resolution(image_size, PINPOINTS)
    fitted = fitted_size(image_size, resolution)
    offset = ((resolution[0] - fitted[0]) // 2, (resolution[1] - fitted[1]) // 2)
    overview = _View((TILE / width, TILE / height), (0, 0), 0, (1, 1))
    return overview, _View((fitted[0] / width, fitted[1] / height), offset, 1, grid)


def rate_target(diagnosis: Diagnosis) -> float:
    """The rate on the scale that the auxiliary losses use: about -2 to 4.  A grade counts beats, so it is linear."""
    return (diagnosis.rate - 75) / _RATE_UNIT


def rate_of(target_B: Tensor) -> Tensor:
    """The rates in bpm that such targets stand for: ``(B,)``."""
    return 75 + _RATE_UNIT * target_B


_RATE_UNIT = 25.0  # bpm
