"""A real 12-lead ECG, printed as the images that PULSE was trained on look.

The recording is the anonymous one that pydicom ships (12 leads, 10 s, 1000 Hz).  The page follows ecg-image-kit, the
generator of those training images: red millimetre paper, black trace, 25 mm/s, 10 mm/mV, US letter in landscape.

    python -m demo.ecg_image build/ecg.png
    python -m demo.ecg_image build/ecg.jpg --layout 6x2
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.data import get_testdata_file

Points = list[tuple[float, float]]
Layout = tuple[tuple[str, ...], ...]
"""The leads of each row, left to right.  The leads of a row share the recording's ten seconds in equal parts."""

LAYOUTS: dict[str, Layout] = {
    "3x4": (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"), ("II",)),
    "6x2": (("I", "V1"), ("II", "V2"), ("III", "V3"), ("aVR", "V4"), ("aVL", "V5"), ("aVF", "V6")),
}

_MILLIVOLTS = {"uV": 1e-3, "mV": 1.0, "V": 1e3}
_PAPER, _MINOR, _MAJOR, _INK = (255, 250, 249), (249, 211, 208), (233, 150, 146), (16, 16, 16)
_SUPERSAMPLE = 3


@dataclass(frozen=True)
class Recording:
    """The leads of an ECG in millivolts, all of one length."""

    leads: Mapping[str, NDArray[np.float64]]
    sampling_rate: float

    @property
    def seconds(self) -> float:
        return len(next(iter(self.leads.values()))) / self.sampling_rate


@dataclass(frozen=True)
class Page:
    """The page's geometry in millimetres.  The defaults give 2200 x 1700 px, with grid lines on whole pixels."""

    width: float = 275.0
    height: float = 212.5
    px_per_mm: int = 8
    mm_per_s: float = 25.0
    mm_per_mv: float = 10.0
    trace_left: float = 15.0
    rows_top: float = 20.0
    rows_bottom: float = 200.0
    pulse_left: float = 5.0
    pulse_width: float = 5.0

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return round(self.width * self.px_per_mm), round(self.height * self.px_per_mm)

    def baselines(self, rows: int) -> list[float]:
        """Each row's 0 mV, from the page's top: two thirds down the row, as R waves need more room than S waves."""
        pitch = (self.rows_bottom - self.rows_top) / rows
        return [self.rows_top + pitch * (row + 2 / 3) for row in range(rows)]


def read_recording(path: str | Path | None = None) -> Recording:
    """Read the rhythm recording of a DICOM 12-lead ECG; without ``path``, of the one that pydicom ships.

    Raises:
        FileNotFoundError: this installation of pydicom came without its sample files.
    """
    source = path or get_testdata_file("waveform_ecg.dcm", download=False)
    if source is None:
        raise FileNotFoundError("pydicom's sample file waveform_ecg.dcm is not installed.")
    dataset = pydicom.dcmread(str(source))
    rhythm = dataset.WaveformSequence[0]
    samples = dataset.waveform_array(0)  # the channels' sensitivities are applied: values are in the channels' units
    leads = {}
    for index, channel in enumerate(rhythm.ChannelDefinitionSequence):
        name = channel.ChannelSourceSequence[0].CodeMeaning.split()[1]  # "Lead I (Einthoven)" -> "I"
        unit = channel.ChannelSensitivityUnitsSequence[0].CodeValue
        leads[name] = np.asarray(samples[:, index], dtype=np.float64) * _MILLIVOLTS[unit]
    return Recording(leads, float(rhythm.SamplingFrequency))


def render(recording: Recording, *, layout: Layout = LAYOUTS["3x4"], page: Page | None = None) -> Image.Image:
    """Print ``recording`` on one page: same arguments, same pixels.  No patient data is drawn.

    Raises:
        ValueError: the recording lacks a lead of the layout.
    """
    page = page or Page()
    missing = {lead for row in layout for lead in row} - set(recording.leads)
    if missing:
        raise ValueError(f"The recording lacks lead {', '.join(sorted(missing))}.")
    image = _grid(page)
    traces: list[Points] = []
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=4 * page.px_per_mm)
    for row, baseline in zip(layout, page.baselines(len(layout)), strict=True):
        traces.append(_calibration_pulse(page, baseline))
        for column, lead in enumerate(row):
            x = page.trace_left + column * recording.seconds * page.mm_per_s / len(row)
            traces.append(_lead(recording, lead, page, baseline, part=(column, len(row))))
            if column:
                traces.append([(x, baseline - 3.5), (x, baseline + 3.5)])
            _write(pen, page, font, lead, at=(x + 1.0, baseline - 9.0))
    _write(
        pen, page, font, f"{page.mm_per_s:g} mm/s  {page.mm_per_mv:g} mm/mV", at=(page.trace_left, page.height - 8.0)
    )
    image.paste(_INK, mask=_ink(traces, page))
    return image


def _grid(page: Page) -> Image.Image:
    """Millimetre paper: a thin line each millimetre, a bold one each fifth, both axes from the top left corner."""
    width, height = page.size
    pixels = np.full((height, width, 3), _PAPER, dtype=np.uint8)
    thin = max(1, page.px_per_mm // 8)
    for step, thickness, colour in ((1, thin, _MINOR), (5, 2 * thin, _MAJOR)):
        on_column, on_row = (np.arange(size) % (step * page.px_per_mm) < thickness for size in (width, height))
        pixels[:, on_column] = colour
        pixels[on_row] = colour
    return Image.fromarray(pixels)


def _calibration_pulse(page: Page, baseline: float) -> Points:
    """1 mV for the pulse's width, with 2 mm of baseline on both sides."""
    left, right, top = page.pulse_left, page.pulse_left + page.pulse_width, baseline - page.mm_per_mv
    return [(left - 2, baseline), (left, baseline), (left, top), (right, top), (right, baseline), (right + 2, baseline)]


def _lead(recording: Recording, lead: str, page: Page, baseline: float, *, part: tuple[int, int]) -> Points:
    """The trace of ``lead`` over the column ``part[0]`` of ``part[1]``; its median lies on the baseline."""
    samples = recording.leads[lead]
    column, columns = part
    start, stop = (len(samples) * edge // columns for edge in (column, column + 1))
    x = page.trace_left + np.arange(start, stop) / recording.sampling_rate * page.mm_per_s
    y = baseline - (samples[start:stop] - np.median(samples)) * page.mm_per_mv
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _ink(traces: Sequence[Points], page: Page) -> Image.Image:
    """The coverage of the pen (0 to 255), anti-aliased: drawn larger, then averaged down."""
    width, height = page.size
    scale = page.px_per_mm * _SUPERSAMPLE
    mask = Image.new("L", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))
    pen = ImageDraw.Draw(mask)
    for trace in traces:
        pen.line([(x * scale, y * scale) for x, y in trace], fill=255, width=round(0.32 * scale), joint="curve")
    return mask.reduce(_SUPERSAMPLE)


def _write(
    pen: ImageDraw.ImageDraw,
    page: Page,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text: str,
    *,
    at: tuple[float, float],
) -> None:
    x, y = at
    pen.text((x * page.px_per_mm, y * page.px_per_mm), text, fill=_INK, font=font, anchor="ls")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print the sample 12-lead ECG to an image file.")
    parser.add_argument("output", type=Path, help="the suffix decides the format: .png, .jpg")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="3x4")
    args = parser.parse_args(argv)
    image = render(read_recording(), layout=LAYOUTS[args.layout])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    image.save(args.output)
    print(f"{args.output}: {image.width} x {image.height} px")


if __name__ == "__main__":
    main()
