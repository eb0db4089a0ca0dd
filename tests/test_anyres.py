"""Tiling and merging against the rules told again, one patch at a time, and against the figures of the real model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from pulse_ecg.anyres import (
    NEWLINE,
    AspectRatio,
    MergeType,
    Preprocessing,
    Size,
    fitted_size,
    image_grid,
    merge_order,
    select_resolution,
    tile_image,
)
from pulse_ecg.errors import ImageError

TILE = 336
PINPOINTS: tuple[Size, ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
PULSE = Preprocessing(pinpoints=PINPOINTS)
SIDE = 24  # CLIP ViT-L/14-336
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))
SMALL = Preprocessing(tile_size=8, pinpoints=((8, 16), (16, 8), (16, 16), (24, 8), (8, 24)))


def drawn(size: Size, seed: int = 0) -> Image.Image:
    """Noise: no two rows, columns or tiles are alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


# --- which grid


@pytest.mark.parametrize(
    ("image_size", "resolution", "tokens"),
    [
        ((2200, 1700), (672, 672), 2880),
        ((1241, 704), (672, 672), 2880),
        ((2000, 1000), (672, 336), 1728),
        ((3000, 1000), (1008, 336), 2304),
        ((1000, 3000), (336, 1008), 2304),
        ((1000, 2000), (336, 672), 1728),
        ((672, 672), (672, 672), 2880),
        ((672, 336), (672, 336), 1728),
    ],
)
def test_figures_of_the_real_model(image_size: Size, resolution: Size, tokens: int) -> None:
    assert select_resolution(image_size, PINPOINTS) == resolution
    grid = image_grid(image_size, PULSE)
    assert grid == (resolution[0] // TILE, resolution[1] // TILE)
    assert len(merge_order("flat", grid=grid, side=SIDE, image_size=image_size)) == tokens


def test_the_first_pinpoint_wins_a_tie() -> None:
    for pinpoints in (PINPOINTS, PINPOINTS[::-1]):
        assert select_resolution((336, 336), pinpoints) == next(p for p in pinpoints if math.prod(p) == 672 * 336)


def test_what_is_kept_counts_before_what_is_wasted() -> None:
    assert select_resolution((100, 100), ((90, 90), (400, 400), (200, 200), (100, 100))) == (100, 100)
    assert select_resolution((300, 300), ((90, 90), (400, 400), (200, 200), (100, 100))) == (400, 400)


@pytest.mark.parametrize("image_size", [(3000, 1), (1, 3000)])
def test_an_image_that_no_pinpoint_keeps_gets_the_smallest_as_in_the_official_code(image_size: Size) -> None:
    assert select_resolution(image_size, PINPOINTS) == (336, 672)
    assert tile_image(Image.new("RGB", image_size, "white"), PULSE).pixels_TCHW.shape == (3, 3, 336, 336)


@given(SIZES, st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6))
def test_the_choice_is_the_best_of_all(image_size: Size, grids: Sequence[Size]) -> None:
    """Most pixels kept, then fewest wasted, then first: as a sort has it."""
    pinpoints = [(columns * TILE, rows * TILE) for columns, rows in grids]
    width, height = image_size

    def rank(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[0] / width, pinpoint[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return -kept, pinpoint[0] * pinpoint[1] - kept

    assert select_resolution(image_size, pinpoints) == min(pinpoints, key=rank)


@given(SIZES, st.sampled_from(PINPOINTS))
def test_the_fitted_image_fills_one_edge_and_keeps_its_aspect(image_size: Size, resolution: Size) -> None:
    width, height = fitted_size(image_size, resolution)
    assert 1 <= width <= resolution[0]
    assert 1 <= height <= resolution[1]
    assert width == resolution[0] or height == resolution[1]
    scale = min(resolution[0] / image_size[0], resolution[1] / image_size[1])
    assert -1e-6 < width - image_size[0] * scale < 1 + 1e-6
    assert -1e-6 < height - image_size[1] * scale < 1 + 1e-6


# --- the order of patches


def retold(merge_type: MergeType, grid: Size, side: int, image_size: Size) -> list[int]:
    """The rule of LLaVA's merge types, one patch at a time."""
    columns, rows = grid
    overview = list(range(side * side))
    if merge_type == "flat":
        return overview + [(1 + tile) * side * side + patch for tile in range(columns * rows) for patch in overview]
    seen_rows, seen_columns = range(rows * side), range(columns * side)
    if merge_type == "spatial_unpad":
        width, height = len(seen_columns), len(seen_rows)
        if image_size[0] / image_size[1] > width / height:  # wider than the sheet: black above and below
            border = (height - int(image_size[1] * (width / image_size[0]))) // 2
            seen_rows = range(border, height - border)
        else:
            border = (width - int(image_size[0] * (height / image_size[1]))) // 2
            seen_columns = range(border, width - border)
    order = overview
    for y in seen_rows:
        for x in seen_columns:
            tile = 1 + (y // side) * columns + x // side
            order.append(tile * side * side + (y % side) * side + x % side)
        if merge_type == "spatial_unpad":
            order.append(NEWLINE)
    return order


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
@given(grid=GRIDS, side=st.integers(1, 7), image_size=SIZES)
def test_the_order_is_the_retold_one(merge_type: MergeType, grid: Size, side: int, image_size: Size) -> None:
    order = merge_order(merge_type, grid=grid, side=side, image_size=image_size)
    assert order.tolist() == retold(merge_type, grid, side, image_size)


@pytest.mark.parametrize("merge_type", ["flat", "spatial"])
@given(grid=GRIDS, side=st.integers(1, 7), image_size=SIZES)
def test_flat_and_spatial_use_every_patch_once(merge_type: MergeType, grid: Size, side: int, image_size: Size) -> None:
    order = merge_order(merge_type, grid=grid, side=side, image_size=image_size)
    assert sorted(order.tolist()) == list(range((1 + grid[0] * grid[1]) * side * side))


@given(grid=GRIDS, side=st.integers(1, 7), image_size=SIZES)
def test_unpadding_drops_only_border_and_ends_each_row_with_a_newline(grid: Size, side: int, image_size: Size) -> None:
    order = merge_order("spatial_unpad", grid=grid, side=side, image_size=image_size)
    patches = order[order != NEWLINE]
    assert len(set(patches.tolist())) == len(patches)
    assert order[: side * side].tolist() == list(range(side * side))
    rest = order[side * side :]
    kept_rows = int((rest == NEWLINE).sum())
    if kept_rows:
        lines = rest.reshape(kept_rows, -1)
        assert (lines[:, -1] == NEWLINE).all()
        assert (lines[:, :-1] != NEWLINE).all()
        assert kept_rows == grid[1] * side or lines.shape[1] - 1 == grid[0] * side
    aspect_of_sheet = grid[0] / grid[1]
    if image_size[0] / image_size[1] == aspect_of_sheet:
        assert kept_rows == grid[1] * side
        assert len(patches) == (1 + grid[0] * grid[1]) * side * side


def test_known_lengths() -> None:
    """LLaVA-1.6's documented example: 672 x 672 for a 1000 x 500 picture keeps half of the rows."""
    unpadded = merge_order("spatial_unpad", grid=(2, 2), side=24, image_size=(1000, 500))
    assert len(unpadded) == 576 + 24 * (48 + 1)
    assert len(merge_order("spatial", grid=(2, 2), side=24, image_size=(1000, 500))) == 2880


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_an_image_that_was_not_tiled_is_its_patches_alone(merge_type: MergeType) -> None:
    order = merge_order(merge_type, grid=None, side=SIDE, image_size=(100, 50))
    assert order.tolist() == list(range(576))


def test_a_sheet_read_row_by_row_shows_the_picture() -> None:
    """Patches of a picture cut into tiles, put back in ``spatial`` order, are the picture again."""
    side, columns, rows = 4, 3, 2
    picture = np.arange(rows * side * columns * side).reshape(rows * side, columns * side)
    tiles = [
        picture[y : y + side, x : x + side] for y in range(0, rows * side, side) for x in range(0, columns * side, side)
    ]
    patches = np.concatenate([np.full(side * side, -7), *(tile.reshape(-1) for tile in tiles)])
    order = merge_order("spatial", grid=(columns, rows), side=side, image_size=(1, 1))
    assert np.array_equal(patches[order[side * side :]].reshape(picture.shape), picture)


# --- pixels


def normalised(tile: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """CLIP's rescale and normalisation in float32, as its image processor does it on the pixels themselves."""
    scaled = (np.asarray(tile) * preprocessing.rescale_factor).astype(np.float32)
    mean, std = (np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    return ((scaled - mean) / std).transpose(2, 0, 1)


@given(size=st.tuples(st.integers(1, 60), st.integers(1, 60)), seed=st.integers(0, 5))
def test_each_tile_is_the_crop_itself(size: Size, seed: int) -> None:
    image, edge = drawn(size, seed), SMALL.tile_size
    tiles = tile_image(image, SMALL)
    width, height = select_resolution(size, SMALL.pinpoints)
    canvas = Image.new("RGB", (width, height), (0, 0, 0))
    fitted = image.resize(fitted_size(size, (width, height)), Image.Resampling.BICUBIC)
    canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    expected = [image.resize((edge, edge), Image.Resampling.BICUBIC)]
    expected += [canvas.crop((x, y, x + edge, y + edge)) for y in range(0, height, edge) for x in range(0, width, edge)]
    assert (tiles.grid, tiles.image_size) == ((width // edge, height // edge), size)
    assert tiles.pixels_TCHW.dtype == np.float32
    assert np.array_equal(tiles.pixels_TCHW, np.stack([normalised(tile, SMALL) for tile in expected]))


def test_the_real_size_too() -> None:
    image = drawn((700, 200))
    tiles = tile_image(image, PULSE)
    assert tiles.grid == (3, 1)
    canvas = Image.new("RGB", (1008, 336))
    canvas.paste(image.resize((1008, 288)), (0, 24))
    for index in range(3):
        crop = canvas.crop((index * 336, 0, index * 336 + 336, 336))
        assert np.array_equal(tiles.pixels_TCHW[1 + index], normalised(crop, PULSE))
    assert np.array_equal(tiles.pixels_TCHW[0], normalised(image.resize((336, 336)), PULSE))


def test_the_border_is_black_and_the_picture_is_in_the_middle() -> None:
    white = tile_image(Image.new("RGB", (672, 168), "white"), PULSE)
    assert white.grid == (2, 1)
    black_row, white_row = (
        normalised(Image.new("RGB", (336, 1), colour), PULSE)[:, 0] for colour in ("black", "white")
    )
    rows = white.pixels_TCHW[1].transpose(1, 0, 2)
    assert all(np.array_equal(row, black_row) for row in (*rows[:84], *rows[252:]))
    assert all(np.array_equal(row, white_row) for row in rows[84:252])


def test_normalisation_is_plain_arithmetic() -> None:
    """Every value of every channel, against numbers computed one by one in double precision."""
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None], 3, axis=2))
    pixels = tile_image(ramp, Preprocessing(tile_size=16, aspect_ratio="square")).pixels_TCHW[0]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for channel in range(3):
        exact = [(value / 255 - mean[channel]) / std[channel] for value in range(256)]
        assert np.abs(pixels[channel].reshape(-1) - exact).max() < 1e-6


def test_a_checkpoint_may_have_its_own_constants() -> None:
    own = Preprocessing(tile_size=4, aspect_ratio="square", mean=(0, 0, 0), std=(1, 1, 0.5), rescale_factor=1 / 100)
    pixels = tile_image(Image.new("RGB", (4, 4), (100, 50, 25)), own).pixels_TCHW
    assert pixels[0, :, 0, 0].tolist() == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("size", [(30, 10), (10, 30), (8, 8), (9, 8), (31, 17), (17, 31)])
def test_pad_lays_the_image_on_a_square_of_the_mean_colour(size: Size) -> None:
    image, pad = drawn(size), Preprocessing(tile_size=8, aspect_ratio="pad")
    edge = max(size)
    square = Image.new("RGB", (edge, edge), (122, 116, 104))
    square.paste(image, ((edge - size[0]) // 2, (edge - size[1]) // 2))
    tiles = tile_image(image, pad)
    assert tiles.grid is None
    assert np.array_equal(tiles.pixels_TCHW, normalised(square.resize((8, 8), Image.Resampling.BICUBIC), pad)[None])


@pytest.mark.parametrize("size", [(30, 10), (10, 30), (8, 8), (9, 8), (31, 17), (17, 31)])
def test_square_resizes_the_short_edge_and_crops_the_middle(size: Size) -> None:
    image, square = drawn(size), Preprocessing(tile_size=8, aspect_ratio="square")
    long = int(8 * max(size) / min(size))
    resized = image.resize((8, long) if size[0] <= size[1] else (long, 8), Image.Resampling.BICUBIC)
    before = (long - 8) // 2
    crop = resized.crop((0, before, 8, before + 8) if size[0] <= size[1] else (before, 0, before + 8, 8))
    tiles = tile_image(image, square)
    assert tiles.grid is None
    assert np.array_equal(tiles.pixels_TCHW, normalised(crop, square)[None])


@pytest.mark.parametrize("aspect_ratio", ["anyres", "pad", "square"])
@given(size=st.tuples(st.integers(1, 200), st.integers(1, 200)))
@hypothesis_settings(max_examples=30)
def test_any_size_gives_whole_tiles(aspect_ratio: AspectRatio, size: Size) -> None:
    preprocessing = Preprocessing(tile_size=8, aspect_ratio=aspect_ratio, pinpoints=SMALL.pinpoints)
    tiles = tile_image(Image.new("RGB", size), preprocessing)
    count = 1 if tiles.grid is None else 1 + tiles.grid[0] * tiles.grid[1]
    assert tiles.pixels_TCHW.shape == (count, 3, 8, 8)
    assert np.isfinite(tiles.pixels_TCHW).all()


def test_the_image_itself_is_not_changed() -> None:
    image = drawn((50, 20))
    before = image.tobytes()
    for aspect_ratio in ("anyres", "pad", "square"):
        tile_image(image, Preprocessing(tile_size=8, aspect_ratio=aspect_ratio, pinpoints=SMALL.pinpoints))
    assert image.tobytes() == before


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_an_image_too_thin_for_a_single_tile_is_refused_before_it_is_scaled(aspect_ratio: str) -> None:
    """20,000 x 1 pixels would become 6.7 million x 336, or 20,000 x 20,000."""
    with pytest.raises(ImageError, match="too thin"):
        tile_image(Image.new("RGB", (20_000, 1)), Preprocessing(aspect_ratio=aspect_ratio))
