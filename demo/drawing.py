"""Synthetic ECGs printed as PULSE's training images are: layouts, papers, texts, and the flaws of scans and photos.

Everything is drawn through one affine map from the page's millimetres to pixels, so a rotated or cropped page costs
nothing more and the place of every trace stays known (the training's auxiliary targets need it).
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from demo.ecg_image import Layout, Recording

Affine = NDArray[np.float64]
"""``(2, 3)``: from millimetres on the page to pixels of the image."""

_STANDARD = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"))
_TWELVE = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
LAYOUTS: dict[str, Layout] = {
    "3x4 with II": (*_STANDARD, ("II",)),
    "3x4 with V1 and II": (*_STANDARD, ("V1",), ("II",)),
    "6x2": (("I", "V1"), ("II", "V2"), ("III", "V3"), ("aVR", "V4"), ("aVL", "V5"), ("aVF", "V6")),
    "6x2 with II": (
        *(("I", "V1"), ("II", "V2"), ("III", "V3"), ("aVR", "V4"), ("aVL", "V5"), ("aVF", "V6")),
        ("II",),
    ),
    "12x1": tuple((lead,) for lead in _TWELVE),
}
_SHARES = {"3x4 with II": 0.62, "3x4 with V1 and II": 0.10, "6x2": 0.12, "6x2 with II": 0.08, "12x1": 0.08}
# Width and height in mm; a row of the drawing names the page for a layout.
_LETTER, _WIDE, _STRIP = (275.0, 212.5), (275.0, 135.0), (275.0, 90.0)

# Paper, minor lines, major lines, ink.
_COLOURS = (
    ((255, 250, 249), (249, 211, 208), (233, 150, 146), (16, 16, 16)),
    ((255, 245, 243), (250, 200, 196), (240, 140, 134), (0, 0, 0)),
    ((255, 255, 255), (246, 222, 222), (236, 178, 178), (20, 20, 40)),
    ((253, 240, 232), (243, 205, 188), (224, 148, 122), (30, 25, 25)),
    ((248, 250, 255), (212, 222, 244), (150, 172, 222), (10, 10, 30)),
    ((247, 253, 247), (208, 232, 208), (146, 196, 148), (12, 24, 12)),
    ((252, 252, 252), (228, 228, 228), (188, 188, 188), (0, 0, 0)),
)
_SPEEDS = ("25 mm/s  10 mm/mV", "25mm/s 10mm/mV", "25 mm/sec   10 mm/mV", "Speed: 25 mm/s  Gain: 10 mm/mV")


@dataclass(frozen=True)
class Style:
    """How one page looks."""

    layout: str
    page: tuple[float, float]
    px_per_mm: float
    colours: tuple[tuple[int, int, int], ...]
    pen_mm: float = 0.32
    rotation: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    crop: tuple[float, float] = (1.0, 1.0)
    speed: str = _SPEEDS[0]
    header: str = ""
    labels: bool = True
    pulse: bool = True
    separators: bool = True
    grey: bool = False
    noise: float = 0.0
    brightness: float = 1.0
    blur: float = 0.0
    jpeg: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the image in pixels."""
        return tuple(round(edge * part * self.px_per_mm) for edge, part in zip(self.page, self.crop, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Trace:
    """One lead on the page, in pixels of the image: its samples, its baseline below them, and its time axis."""

    lead: str
    start: float
    stop: float
    points: NDArray[np.float64] = field(repr=False)
    baseline: NDArray[np.float64] = field(repr=False)


@dataclass(frozen=True)
class Drawing:
    """An image and where its traces are."""

    image: Image.Image
    traces: tuple[Trace, ...]
    style: Style


def draw_style(rng: np.random.Generator) -> Style:
    """A random page: same generator state, same page."""
    layout = str(rng.choice(list(_SHARES), p=list(_SHARES.values())))
    page = _LETTER
    if layout.startswith("3x4") and rng.random() < 0.28:
        page = _WIDE if rng.random() < 0.6 or len(LAYOUTS[layout]) > 4 else _STRIP
    flawed = rng.random() < 0.5
    tilted = rng.random() < 0.4
    return Style(
        layout=layout,
        page=page,
        px_per_mm=float(rng.choice((2.6, 3.2, 4.0, 4.8, 6.0), p=(0.25, 0.35, 0.28, 0.08, 0.04))),
        colours=_COLOURS[int(rng.choice(len(_COLOURS), p=(0.34, 0.18, 0.14, 0.12, 0.08, 0.06, 0.08)))],
        pen_mm=rng.uniform(0.26, 0.5),
        rotation=math.radians(rng.normal(0, 1.2)) if tilted else 0.0,
        shift=(rng.uniform(-4, 4), rng.uniform(-4, 4)) if rng.random() < 0.6 else (0.0, 0.0),
        crop=(rng.uniform(0.97, 1.03), rng.uniform(0.96, 1.03)) if rng.random() < 0.5 else (1.0, 1.0),
        speed=_SPEEDS[rng.integers(len(_SPEEDS))] if rng.random() < 0.9 else "",
        header=_header(rng) if rng.random() < 0.4 else "",
        labels=bool(rng.random() < 0.95),
        pulse=bool(rng.random() < 0.75),
        separators=bool(rng.random() < 0.6),
        grey=bool(rng.random() < 0.1),
        noise=rng.uniform(2, 9) if flawed and rng.random() < 0.6 else 0.0,
        brightness=rng.uniform(0.82, 1.05) if flawed else 1.0,
        blur=rng.uniform(0.3, 0.8) if flawed and rng.random() < 0.3 else 0.0,
        jpeg=int(rng.integers(35, 95)) if rng.random() < 0.5 else None,
    )


def without_flaws(style: Style) -> Style:
    """The same page, printed straight, whole and clean."""
    return replace(
        style, px_per_mm=3.2, rotation=0.0, shift=(0.0, 0.0), crop=(1.0, 1.0), grey=False,
        noise=0.0, brightness=1.0, blur=0.0, jpeg=None,
    )  # fmt: skip


def _header(rng: np.random.Generator) -> str:
    """A line such as devices print, without anything that answers a question."""
    day, month, year = rng.integers(10, 28), rng.integers(1, 13), rng.integers(2010, 2026)
    clock = f"{rng.integers(0, 24):02d}:{rng.integers(0, 60):02d}"
    return f"{day:02d}.{month:02d}.{year} {clock}   ID {rng.integers(1000, 99999)}"


def draw_page(recording: Recording, style: Style, rng: np.random.Generator) -> Drawing:
    """Print a recording; ``rng`` gives the noise alone."""
    affine = _affine(style)
    image = Image.new("RGB", style.size, style.colours[0])
    pen = ImageDraw.Draw(image)
    _grid(pen, style, affine)
    traces = _traces(recording, style, affine)
    width = max(1, round(style.pen_mm * style.px_per_mm))
    for trace in traces:
        pen.line(trace.points.astype(np.float32).ravel().tolist(), fill=style.colours[3], width=width)
    _texts(pen, style, affine, traces, width)
    return Drawing(_flawed(image, style, rng), traces, style)


def _affine(style: Style) -> Affine:
    """The page turned about its middle, shifted and scaled into the image."""
    cos, sin, scale = math.cos(style.rotation), math.sin(style.rotation), style.px_per_mm
    middle = np.array(style.page) / 2
    turn = np.array([[cos, -sin], [sin, cos]])
    image_middle = middle * style.crop
    offset = image_middle + np.array(style.shift) - turn @ middle
    return np.column_stack([turn, offset]) * scale


def _to_pixels(affine: Affine, points: NDArray[np.float64]) -> NDArray[np.float64]:
    return points @ affine[:, :2].T + affine[:, 2]


def _grid(pen: ImageDraw.ImageDraw, style: Style, affine: Affine) -> None:
    """Millimetre paper beyond the page's edges, as a crop may show them."""
    (width, height), margin = style.page, 15
    for step, colour, thickness in (
        (1, style.colours[1], 1),
        (5, style.colours[2], max(1, round(style.px_per_mm / 4))),
    ):
        if step * style.px_per_mm < 2.5:
            continue
        xs, ys = (np.arange(-margin, edge + margin, step, dtype=np.float64) for edge in (width, height))
        ends = [np.stack([xs, np.full_like(xs, y)], 1) for y in (-margin, height + margin)]
        sides = [np.stack([np.full_like(ys, x), ys], 1) for x in (-margin, width + margin)]
        for start, stop in (ends, sides):
            lines = np.concatenate([_to_pixels(affine, start), _to_pixels(affine, stop)], axis=1)
            for line in lines.tolist():
                pen.line(line, fill=colour, width=thickness)


def _traces(recording: Recording, style: Style, affine: Affine) -> tuple[Trace, ...]:
    layout = LAYOUTS[style.layout]
    left, rate = 14.0, recording.sampling_rate
    top, bottom = (20.0, style.page[1] - 12.0) if style.page[1] > 150 else (8.0, style.page[1] - 4.0)
    pitch = (bottom - top) / len(layout)
    traces = []
    for index, row in enumerate(layout):
        zero = top + pitch * (index + (0.62 if len(layout) < 8 else 0.55))
        for column, lead in enumerate(row):
            samples = recording.leads[lead]
            first, last = (len(samples) * edge // len(row) for edge in (column, column + 1))
            x = left + np.arange(first, last) / rate * 25.0
            y = zero - (samples[first:last] - np.median(samples)) * 10.0
            points = _to_pixels(affine, np.stack([x, y], 1))
            baseline = _to_pixels(affine, np.stack([x, np.full_like(x, zero)], 1))
            traces.append(Trace(lead, first / rate, last / rate, points, baseline))
    return tuple(traces)


def _texts(pen: ImageDraw.ImageDraw, style: Style, affine: Affine, traces: tuple[Trace, ...], width: int) -> None:
    """Lead names, separators, calibration pulses and the lines at the page's top and bottom."""
    ink, px = style.colours[3], style.px_per_mm
    font = ImageFont.load_default(size=max(8, 3.6 * px))
    for trace in traces:
        at = trace.baseline[0]
        if style.labels:
            pen.text((at[0] + px, at[1] - 7 * px), trace.lead, fill=ink, font=font, anchor="ls")
        if style.separators and trace.start > 0:
            pen.line((at[0], at[1] - 3 * px, at[0], at[1] + 3 * px), fill=ink, width=width)
        if style.pulse and trace.start == 0:
            shape = np.array([(-9.0, 0.0), (-8, 0), (-8, -10), (-3, -10), (-3, 0), (-1, 0)]) * px
            pen.line((shape @ _rotation(style).T + at).ravel().tolist(), fill=ink, width=width)
    for text, y in ((style.speed, style.page[1] - 5.0), (style.header, 9.0)):
        if text and (y > 20 or style.page[1] > 150):
            x, y_px = _to_pixels(affine, np.array([[14.0, y]]))[0]
            pen.text((x, y_px), text, fill=ink, font=font, anchor="ls")


def _rotation(style: Style) -> NDArray[np.float64]:
    cos, sin = math.cos(style.rotation), math.sin(style.rotation)
    return np.array([[cos, -sin], [sin, cos]])


def _flawed(image: Image.Image, style: Style, rng: np.random.Generator) -> Image.Image:
    """What scanners, phones and files do to a print."""
    if style.grey:
        image = image.convert("L").convert("RGB")
    if style.blur:
        image = image.filter(ImageFilter.GaussianBlur(style.blur))
    if style.brightness != 1.0 or style.noise:
        shading = style.brightness + (np.linspace(-0.05, 0.05, image.width) * (style.brightness != 1.0))
        pixels = np.asarray(image, np.float32) * shading[None, :, None].astype(np.float32)
        if style.noise:
            pixels += _grain(image.size, style.noise, rng)[..., None]
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if style.jpeg:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=style.jpeg)
        image = Image.open(file).convert("RGB")
    return image


def _grain(size: tuple[int, int], strength: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Grain of a scanner; repeated over the image, as drawing a million normal values would take most of the time."""
    tile = strength * rng.standard_normal((193, 211), dtype=np.float32)
    rows, columns = -(-size[1] // 193), -(-size[0] // 211)
    return np.tile(tile, (rows, columns))[: size[1], : size[0]]
