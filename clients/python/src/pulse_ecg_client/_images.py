"""An image of any kind as the string that a request carries."""

from __future__ import annotations

import base64
import io
import sys
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pulse_ecg_client._errors import ImageError
from pulse_ecg_client._types import Image

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

MAX_IMAGE_BYTES = 20_000_000

_SIGNATURES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"RIFF": "image/webp",
    b"II*\x00": "image/tiff",
    b"MM\x00*": "image/tiff",
}
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
_TIFF_MODES = frozenset({"I", "F", "I;16B"})  # deeper than PNG holds: the endpoint says what is white
_SAME_IN_PNG = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}
_ACCEPTED = "accepted: a path, the bytes of an image file, an http(s) URL, a data URI or a Pillow image"
_LONGEST_PATH = 4096


def image_source(image: Image) -> str:
    """A URL as it is; anything else as a data URI.

    Raises:
        ImageError: empty, more than :data:`MAX_IMAGE_BYTES`, or no kind of image.
        OSError: the file cannot be read.
    """
    if isinstance(image, str) and image[:8].lower().startswith(("http://", "https://")):
        return image
    if isinstance(image, str) and image[:5].lower() == "data:":
        _check_size(len(image.partition(",")[2]) * 3 // 4)
        return image
    return _data_uri(_file_bytes(image))


def check_url(image_url: str) -> None:
    """Refuse what is no URL before it is taken for a path: who may name a URL need not see this machine's files.

    Raises:
        ImageError: it is none.
    """
    if not image_url.lower().startswith(("http://", "https://", "data:")):
        raise ImageError("An image's URL begins with http://, https:// or data:; analyze_image_base64 takes files.")


def image_part(image: Image) -> dict[str, Any]:
    """The part of a chat message that shows an image; errors as :func:`image_source`."""
    return {"type": "image_url", "image_url": {"url": image_source(image)}}


def _file_bytes(image: object) -> bytes:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, str) and (len(image) > _LONGEST_PATH or "\n" in image):
        raise ImageError(f"The image is a string of {len(image):,} characters; {_ACCEPTED}.")
    if isinstance(image, (str, PathLike)):
        path = Path(image)
        _check_size(path.stat().st_size)
        return path.read_bytes()
    pillow = sys.modules.get("PIL.Image")  # an image object cannot be there without its module
    if pillow is not None and isinstance(image, pillow.Image):
        return _encoded(cast("PILImage", image))
    raise ImageError(f"The image is of the type {type(image).__name__}; {_ACCEPTED}.")


def _encoded(image: PILImage) -> bytes:
    from PIL import ImageOps  # noqa: PLC0415 - optional; loaded where the caller has it

    upright = ImageOps.exif_transpose(image)
    file = io.BytesIO()
    if upright.mode in _TIFF_MODES:
        upright.save(file, "TIFF", compression="tiff_adobe_deflate")
        return file.getvalue()
    if upright.mode not in _PNG_MODES:
        upright = upright.convert(_SAME_IN_PNG.get(upright.mode, "RGB"))
    upright.save(file, "PNG")
    return file.getvalue()


def _data_uri(data: bytes) -> str:
    _check_size(len(data))
    kinds = [kind for signature, kind in _SIGNATURES.items() if data.startswith(signature)]
    return f"data:{kinds[0] if kinds else 'application/octet-stream'};base64,{base64.b64encode(data).decode()}"


def _check_size(size: int) -> None:
    if size == 0:
        raise ImageError("The image is empty.")
    if size > MAX_IMAGE_BYTES:
        raise ImageError(f"The image has {size:,} bytes; at most {MAX_IMAGE_BYTES:,} are accepted.")
