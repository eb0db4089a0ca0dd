"""From an RGB image of any size to the square tiles that the vision tower sees.  Pure geometry first, pixels last.

Sizes are ``(width, height)`` in pixels; a grid is ``(columns, rows)`` of tiles.  Source: LLaVA's ``mm_utils.py``
(``select_best_resolution``, ``resize_and_pad_image``, ``process_anyres_image``, ``expand2square``),
``llava_arch.py`` (``unpad_image`` and the merge types) and transformers' ``CLIPImageProcessor``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pulse_ecg.errors import ImageError

Size = tuple[int, int]
AspectRatio = Literal["anyres", "pad", "square"]
MergeType = Literal["flat", "spatial", "spatial_unpad"]

_MAX_SCALED_PIXELS = 50_000_000
_MAX_PADDED_PIXELS = 200_000_000  # 0.8 GB while an image is padded to a square, as "pad" does before it scales

NEWLINE = -1
"""In a merge order: the learnt ``image_newline`` embedding instead of a patch."""


@dataclass(frozen=True)
class Preprocessing:
    """How a checkpoint wants its images; defaults are the public constants of CLIP ViT-L/14-336."""

    tile_size: int = 336
    aspect_ratio: AspectRatio = "anyres"
    pinpoints: tuple[Size, ...] = ()
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class ImageTiles:
    """An image cut for the tower.

    ``pixels_TCHW`` is float32, normalised; tile 0 is the overview, the others run row by row.  ``grid`` is None when
    the image is a single tile that was not tiled.
    """

    pixels_TCHW: NDArray[np.float32]
    grid: Size | None
    image_size: Size


def select_resolution(image_size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint that keeps most of the image's pixels; then the one that wastes least; the first wins a tie.

    An image so thin that no pinpoint keeps any of it (3000 x 1) gets the smallest one, as in the official code.
    """
    width, height = image_size
    best = pinpoints[0]
    most_kept, least_wasted = 0, math.inf
    for columns, rows in pinpoints:
        scale = min(columns / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = columns * rows - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (columns, rows), kept, wasted
    return best


def fitted_size(image_size: Size, resolution: Size) -> Size:
    """The size of the image scaled to fit ``resolution`` with its aspect kept, rounded up."""
    width, height = image_size
    columns, rows = resolution
    scale_w, scale_h = columns / width, rows / height
    if scale_w < scale_h:
        return columns, min(math.ceil(height * scale_w), rows)
    return min(math.ceil(width * scale_h), columns), rows


def merge_order(
    merge_type: MergeType, *, grid: Size | None, side: int, image_size: Size, keep_cls: bool = False
) -> NDArray[np.int64]:
    """The order in which patch features enter the prompt.

    Args:
        grid: of tiles without the overview; None for an image that was not tiled.
        side: patches along an edge of a tile.
        image_size: of the original image.
        keep_cls: whether each tile has a class feature before its patches (``flat`` alone).

    Returns:
        Indices into the ``tiles x side**2`` patch features, tile after tile; :data:`NEWLINE` stands for the learnt
        newline.  Its length is the number of image tokens.
    """
    columns, rows = grid or (0, 0)
    if grid is None or merge_type == "flat":
        return np.arange((1 + columns * rows) * (side * side + keep_cls))
    overview = np.arange(side * side)
    patches = np.arange(side * side, (1 + columns * rows) * side * side)
    # Tiles side by side make one large sheet of patches, read row by row.
    sheet = patches.reshape(rows, columns, side, side).transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    if merge_type == "spatial_unpad":
        sheet = sheet[_unpadded(sheet.shape, image_size)]
        sheet = np.pad(sheet, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([overview, sheet.reshape(-1)])


def _unpadded(sheet_shape: tuple[int, ...], image_size: Size) -> tuple[slice, slice]:
    """The rows and columns of the sheet that hold image, not the black border."""
    height, width = sheet_shape
    image_width, image_height = image_size
    if image_width / image_height > width / height:
        border = (height - int(image_height * (width / image_width))) // 2
        return slice(border, height - border), slice(None)
    border = (width - int(image_width * (height / image_height))) // 2
    return slice(None), slice(border, width - border)


def image_grid(image_size: Size, preprocessing: Preprocessing) -> Size | None:
    """Columns and rows of tiles for an image of this size; None when the checkpoint does not tile."""
    if preprocessing.aspect_ratio != "anyres":
        return None
    columns, rows = select_resolution(image_size, preprocessing.pinpoints)
    return columns // preprocessing.tile_size, rows // preprocessing.tile_size


def tile_image(image: Image.Image, preprocessing: Preprocessing) -> ImageTiles:
    """Cut an RGB image into normalised tiles.

    Raises:
        ImageError: the image is too thin; only checkpoints that do not tile have such a limit.
    """
    grid = image_grid(image.size, preprocessing)
    return ImageTiles(_normalised(cut_tiles(image, preprocessing), preprocessing), grid, image.size)


def cut_tiles(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The tiles' pixels before they are normalised, ``(T, H, W, 3)``: the overview first, then row by row.

    Raises:
        ImageError: as for :func:`tile_image`.
    """
    grid = image_grid(image.size, preprocessing)
    tile = preprocessing.tile_size
    if grid is None:
        return np.asarray(_single_tile(image, preprocessing))[None]
    columns, rows = grid
    canvas = _centred_on_black(image, select_resolution(image.size, preprocessing.pinpoints))
    cut = np.asarray(canvas)[: rows * tile, : columns * tile].reshape(rows, tile, columns, tile, 3)
    crops = cut.swapaxes(1, 2).reshape(rows * columns, tile, tile, 3)
    overview = np.asarray(image.resize((tile, tile)))
    return np.concatenate([overview[None], crops])


def _centred_on_black(image: Image.Image, resolution: Size) -> Image.Image:
    # `resize` without a filter is PIL's default for RGB, bicubic, as in the official code.
    fitted = image.resize(fitted_size(image.size, resolution))
    canvas = Image.new("RGB", resolution)
    canvas.paste(fitted, ((resolution[0] - fitted.width) // 2, (resolution[1] - fitted.height) // 2))
    return canvas


def _too_thin(image: Image.Image) -> ImageError:
    return ImageError(f"The image is {image.width} x {image.height} pixels: too thin for the model to see.")


def _single_tile(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """One tile: padded to a square on CLIP's mean colour (``pad``), then short edge resized and centre cropped."""
    tile = preprocessing.tile_size
    if preprocessing.aspect_ratio == "pad" and image.width != image.height:
        edge = max(image.size)
        if edge * edge > _MAX_PADDED_PIXELS:
            raise _too_thin(image)
        square = Image.new("RGB", (edge, edge), tuple(int(channel * 255) for channel in preprocessing.mean))
        square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
        image = square
    short, long = sorted(image.size)
    scaled = int(tile * long / short)
    if tile * scaled > _MAX_SCALED_PIXELS:
        raise _too_thin(image)
    resized = image.resize(
        (tile, scaled) if image.width <= image.height else (scaled, tile), Image.Resampling(preprocessing.resample)
    )
    left, top = (resized.width - tile) // 2, (resized.height - tile) // 2
    return resized.crop((left, top, left + tile, top + tile))


def _normalised(tiles_THWC: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """CLIP's rescale and normalisation by table: a pixel has 256 values, so each is computed once and exactly."""
    values = (np.arange(256) * preprocessing.rescale_factor).astype(np.float32)
    mean_C, std_C = (np.array(constants, np.float32) for constants in (preprocessing.mean, preprocessing.std))
    table_CV = (values - mean_C[:, None]) / std_C[:, None]
    tiles, height, width, channels = tiles_THWC.shape
    pixels_TCHW = np.empty((tiles, channels, height, width), np.float32)
    for channel in range(channels):
        np.take(table_CV[channel], tiles_THWC[..., channel], out=pixels_TCHW[:, channel], mode="clip")
    return pixels_TCHW
