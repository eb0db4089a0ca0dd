"""From the bytes of an image file, or a PIL image, to upright RGB pixels.

The first bytes choose one of six plug-ins, which is opened directly.  ``PIL.Image.open`` is not used: it imports
further plug-ins (and warns through a process-wide filter) when it does not recognise the bytes.  So nothing here can
reach Ghostscript (EPS), nor MPO, ICO or PSD parsers.  ICC profiles are ignored, as ``Image.convert`` does.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from threading import Lock
from typing import NamedTuple

from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pulse_ecg.errors import ImageDecodeError, ImageTooLargeError, OutOfMemoryError, PulseError

MAX_PIXELS = 50_000_000
MAX_SIDE = 20_000
FORMATS = "JPEG, PNG, GIF, BMP, WebP and TIFF"
_PIL_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP", "TIFF")

# A progressive JPEG may go over the whole picture again for a hundred bytes: hours of work in 20 MB.  Encoders write
# about ten scans; a pixel and scan takes about 1 ns.
_MAX_SCANNED_PIXELS = 2_000_000_000
_MAX_MARKERS = 10_000
# ITU T.81 section B.1.1.2: in coded data FF is escaped (FF00), and FFD0 to FFD7 only restart the decoder.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_START_OF_SCAN, _END_OF_IMAGE, _EXIF_OR_XMP, _WITHOUT_LENGTH = 0xDA, 0xD9, 0xE1, (0x01, 0xD8)
# Of 64 kB; Pillow appends each to a copy of those before.  Writers leave it at one.
_MAX_JPEG_EXIF_BLOCKS = 100

# Pillow walks the parts of a file (segments, chunks, sub-blocks, strips) in Python and reads each on its own; 20 MB
# hold millions.  A PNG in chunks of 1 kB takes 60,000 reads, a TIFF in strips of a row 20,000.
_MAX_READS = 100_000
# It decodes a run-length encoded BMP in Python too, with two reads a run: about a microsecond each.
_MAX_RUN_LENGTH_PIXELS = 4_000_000
_RUN_LENGTH = (1, 2)
# One, says the PNG specification; each may unpack to a megabyte.
_MAX_PNG_PROFILES = 10
# Of the pixels that a TIFF's strips or tiles hold, times the image's: as many as it has planes, or a few more.
_MAX_PLANES = 8

# Pillow's lazy files cannot be decoded by two threads at once, and a batch may hold the same one twice.
_DECODING_CALLERS_IMAGE = Lock()

_MAX_TAGS = 1000
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}

_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF 2.32 section 4.6.4: how to undo each orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes) -> Image.Image:
    """The file's first frame or page in RGB, EXIF orientation applied, real transparency laid on white.

    Opaque images of 8 bits are what ``Image.convert("RGB")`` gives, pixel for pixel; deeper greyscale is scaled, where
    ``convert`` clips it to white (:func:`_eight_bits`).  An EXIF block that cannot be read is ignored.

    Raises:
        ImageTooLargeError: more than 50 megapixels or 20,000 pixels a side, said by the header.
        ImageDecodeError: not a complete image of a listed format.
    """
    with _pillow_errors_mapped():
        image = _opened(data)
        image.load()
        exif = data if isinstance(image, TiffImageFile) else _exif_block(image)
        return _rgb(image, _orientation(exif))


def rgb_from_pil(original: Image.Image) -> Image.Image:
    """The same for an image that came as an object, which may still be a file that Pillow opened but did not decode."""
    with _pillow_errors_mapped():
        if isinstance(original, ImageFile) and original.format not in _PIL_FORMATS:
            raise _unlisted()  # loading an EPS would start Ghostscript
        _check_size(original.size)
        with _DECODING_CALLERS_IMAGE:
            original.load()
        image = original.copy()  # converting a palette image with transparency would change its palette
        return _rgb(image, _orientation(image.info["exif"]) if "exif" in image.info else _tagged_orientation(original))


# --- opening


class _Measured(BytesIO):
    """A file that may be read so many times and no more, see ``_MAX_READS``."""

    reads_left = _MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ImageDecodeError("The image file has too many parts.")
        return super().read(size)


class _NoExif(ImageFile):
    """Keeps Pillow's EXIF reader away: it would run on opening (JPEG) and loading (TIFF), it warns through the
    process-wide filter about bad blocks, and entries that all claim the same bytes make it copy them over and over."""

    def getexif(self) -> Image.Exif:
        return Image.Exif()


class _Jpeg(_NoExif, JpegImageFile):
    """The first picture of the file; the class itself never hands over to MPO."""


class _Tiff(_NoExif, TiffImageFile):
    pass


_PLUGINS: tuple[tuple[re.Pattern[bytes], type[ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), _Jpeg),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    (re.compile(rb"GIF8[79]a"), GifImageFile),
    (re.compile(rb"BM"), BmpImageFile),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebPImageFile),
    (re.compile(rb"II[*+]\0|MM\0\*"), _Tiff),  # Pillow takes a big-endian BigTIFF for a classic one
)


def _opened(data: bytes) -> ImageFile:
    """The file's header, read by the one plug-in that its first bytes name, and what it announces within the caps."""
    plugin = next((plugin for pattern, plugin in _PLUGINS if pattern.match(data)), None)
    if plugin is None:
        raise _unlisted()
    if plugin is _Tiff:
        directory = _directory(data)
        if directory.claimed_bytes > len(data):
            raise ImageDecodeError("The TIFF image claims more data than it has.")
        if directory.most_values > _MAX_READS:  # strips or tiles, of each of which Pillow makes an object
            raise ImageDecodeError("The TIFF image has too many parts.")
    if plugin is PngImageFile and data.count(b"iCCP") > _MAX_PNG_PROFILES:
        raise ImageDecodeError("The PNG image has too many colour profiles.")
    scans = _scans(data) if plugin is _Jpeg else 1
    file = _Measured(data)
    image = plugin(file)
    _check_size(image.size)
    if image.width * image.height * scans > _MAX_SCANNED_PIXELS:
        raise ImageTooLargeError("The JPEG image has too many scans for its size.")
    if isinstance(image, TiffImageFile):  # a tile may be larger than the image, and is decoded whole
        _check_size((image.tag_v2.get(0x0142, 1), image.tag_v2.get(0x0143, 1)))
        if _covered_pixels(image) > _MAX_PLANES * image.width * image.height:
            raise ImageDecodeError("The TIFF image has more strips or tiles than its size needs.")
    if isinstance(image, BmpImageFile) and image.info.get("compression") in _RUN_LENGTH:
        if (pixels := image.width * image.height) > _MAX_RUN_LENGTH_PIXELS:
            raise ImageTooLargeError(
                f"A run-length encoded BMP image may have {_MAX_RUN_LENGTH_PIXELS // 10**6} megapixels; "
                "save it as PNG instead."
            )
        file.reads_left += pixels // 2  # two for each run, and runs of four pixels; encoders copy what has no runs
    return image


def _covered_pixels(image: ImageFile) -> int:
    """Pixels that all the strips or tiles together write."""
    boxes = (tile.extents or (0, 0, *image.size) for tile in image.tile)
    return sum((right - left) * (lower - upper) for left, upper, right, lower in boxes)


def _scans(data: bytes) -> int:
    """Scans of a JPEG's first picture: its segments are walked, so that neither a thumbnail in one of them nor a film
    behind the picture counts."""
    scans, exif_blocks, at = 0, 0, 2
    for _ in range(_MAX_MARKERS):
        found = _MARKER.search(data, at)
        if found is None or (marker := data[found.end() - 1]) == _END_OF_IMAGE:
            return scans
        scans += marker == _START_OF_SCAN
        at = found.end()
        exif_blocks += marker == _EXIF_OR_XMP and data.startswith(b"Exif\0\0", at + 2)
        if exif_blocks > _MAX_JPEG_EXIF_BLOCKS:
            break
        if marker not in _WITHOUT_LENGTH:
            at += int.from_bytes(data[at : at + 2], "big")
    raise ImageDecodeError("The JPEG image has too many segments.")


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageDecodeError("The image has no pixels.")
    if max(size) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageTooLargeError(
            f"The image has {width} x {height} pixels; accepted are at most {MAX_PIXELS // 10**6} megapixels "
            f"and {MAX_SIDE:,} pixels a side."
        )


def _unlisted() -> ImageDecodeError:
    return ImageDecodeError(f"The image is of none of the accepted formats: {FORMATS}.")


def _exif_block(image: Image.Image) -> object:
    """The EXIF block of a file that is no TIFF; in a PNG it may be text, as ImageMagick writes it."""
    text = image.info.get("Raw profile type exif")
    if "exif" in image.info or not isinstance(text, str):
        return image.info.get("exif")
    with suppress(ValueError):
        return bytes.fromhex("".join(text.split("\n")[3:]))  # after a blank line, the name and the length
    return None


def _orientation(exif: object) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where the block is missing or bad: the picture itself may be good."""
    if not isinstance(exif, bytes):
        return 1
    try:
        return _directory(exif.removeprefix(b"Exif\0\0")).shorts.get(_ORIENTATION, 1)
    except (ValueError, struct.error):
        return 1


def _tagged_orientation(image: Image.Image) -> int:
    """The orientation that was set on a PIL image itself, and not read from a file."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  a good picture with bad metadata stays one, whatever Pillow trips over
        return 1


class _Directory(NamedTuple):
    """The first directory of a TIFF file."""

    shorts: dict[int, int]
    """SHORT values by tag."""
    claimed_bytes: int
    """Of all entries: a small file whose entries all point at the same megabytes would fill the memory."""
    most_values: int
    """Of an entry whose values are no bytes or characters."""


def _directory(blob: bytes) -> _Directory:
    """Read it (TIFF 6.0 section 2, which EXIF uses).

    Raises:
        ValueError, struct.error: no such directory.
    """
    order = {b"II": "<", b"MM": ">"}.get(blob[:2])
    if order is None:
        raise ValueError("no TIFF header")
    big = struct.unpack_from(order + "H", blob, 2)[0] == 43
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), blob, 8 if big else 4)
    if start > len(blob):
        raise ValueError("directory outside")
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), blob, start)
    if count > _MAX_TAGS:
        raise ValueError("too many tags")
    entry = struct.Struct(order + ("HHQ8s" if big else "HHI4s"))
    shorts: dict[int, int] = {}
    claimed = most = 0
    for i in range(count):
        tag, kind, length, value = entry.unpack_from(blob, start + (8 if big else 2) + i * entry.size)
        size = _TYPE_SIZES.get(kind, 0)
        claimed += length * size
        most = max(most, length if size > 1 else 0)
        if kind == 3:
            shorts.setdefault(tag, struct.unpack_from(order + "H", value)[0])
    return _Directory(shorts, claimed, most)


# --- pixels


def _rgb(image: Image.Image, orientation: int) -> Image.Image:
    """Upright RGB, without the file's other data."""
    image = image.convert("LA") if image.mode == "La" else _eight_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        # Not the file's size: of a rotated TIFF, Pillow gives the one that it would have if it were upright.
        result = Image.new("RGB", rgba.size, "white")
        result.paste(rgba, (0, 0), rgba)
    else:
        result = image.convert("RGB")
    if orientation in _UPRIGHT:
        result = result.transpose(_UPRIGHT[orientation])
    result.info = {}
    return result


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of more than 8 bits scaled to L (or LA, for a PNG's transparent grey); other images as they are.

    Integers of 32 bits and floats have no agreed white.  The first range that holds all their values is taken: 0 to
    255, then 0 to 65,535 for integers; 0 to 1, then 0 to 255 for floats; failing these, from minimum to maximum.
    """
    ranges = {"I": ((0, 255), (0, 65_535)), "F": ((0, 1), (0, 255))}.get(image.mode, ((0, 65_535),))
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    wide = image if image.mode == "F" else image.convert("I")
    low, high = (float(value) for value in wide.getextrema() if not isinstance(value, tuple))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("values that are no numbers")
    black, white = next((range_ for range_ in ranges if range_[0] <= low and high <= range_[1]), (low, high))
    scale = 255 / (white - black or 1)
    grey = wide.convert("F").point(lambda value: value * scale + (0.5 - black * scale)).convert("L")
    key = image.info.get("transparency")
    if isinstance(key, int) and wide.mode == "I":
        grey.putalpha(wide.point([255 * (value != key) for value in range(65_536)], "L"))
    grey.info.pop("transparency", None)
    return grey


@contextmanager
def _pillow_errors_mapped() -> Iterator[None]:
    """The one place where Pillow's errors become ours.

    Every exception is meant: the plug-ins parse hostile bytes and raise whatever they trip over (OSError, SyntaxError,
    ValueError, struct.error, IndexError, TypeError and more), none of it fit to show.
    """
    try:
        yield
    except PulseError:
        raise
    except Image.DecompressionBombError:
        raise ImageTooLargeError("The image has too many pixels.") from None
    except MemoryError:
        raise OutOfMemoryError("There is no memory left to decode this image now; try again.") from None
    except Exception:  # noqa: BLE001
        raise ImageDecodeError(
            f"The image is damaged, incomplete, or not really of a format that is accepted: {FORMATS}."
        ) from None
