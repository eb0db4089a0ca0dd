"""The picture in the README: the sample ECG on the left, the five tiles that the model sees of it on the right.

python -m demo.tiles_figure docs/tiles.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo.ecg_image import read_recording, render
from pulse_ecg.anyres import Preprocessing, tile_image

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
GAP, CAPTION = 14, 34


def figure() -> Image.Image:
    """Draw it from the very tiles that the model gets, their normalisation undone."""
    ecg = render(read_recording())
    rules = Preprocessing(pinpoints=PINPOINTS)
    tiles = tile_image(ecg, rules)
    pixels_THWC = tiles.pixels_TCHW.transpose(0, 2, 3, 1) * np.array(rules.std) + np.array(rules.mean)
    overview, *crops = (Image.fromarray((tile * 255).round().clip(0, 255).astype(np.uint8)) for tile in pixels_THWC)
    height = 2 * rules.tile_size + GAP
    page = ecg.resize((ecg.width * height // ecg.height, height), Image.Resampling.LANCZOS)
    left, middle = page.width + 3 * GAP, page.width + 6 * GAP + rules.tile_size
    canvas = Image.new("RGB", (middle + 2 * rules.tile_size + 2 * GAP, height + CAPTION + GAP), "white")
    canvas.paste(page, (GAP, CAPTION))
    canvas.paste(overview, (left, CAPTION + (height - rules.tile_size) // 2))
    assert tiles.grid is not None
    for number, crop in enumerate(crops):
        row, column = divmod(number, tiles.grid[0])
        canvas.paste(crop, (middle + column * (rules.tile_size + GAP), CAPTION + row * (rules.tile_size + GAP)))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=20)
    captions = (
        (GAP, f"the image, {ecg.width} x {ecg.height}"),
        (left, "overview"),
        (middle, "2 x 2 tiles, 336 pixels a side"),
    )
    for x, text in captions:
        pen.text((x, 6), text, fill="black", font=font)
    return canvas


if __name__ == "__main__":
    drawn = figure()
    drawn.resize((1200, drawn.height * 1200 // drawn.width)).save(Path(sys.argv[1]), quality=70, optimize=True)
