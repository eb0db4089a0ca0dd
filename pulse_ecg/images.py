"""Any image that a caller may send, and how its bytes or pixels are come by.

Two measurable stages: :func:`image_bytes` (fetch or base64) and :func:`pulse_ecg.image_file.decode_image`.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass, field
from typing import ClassVar

from PIL import Image

from pulse_ecg.cancellation import Cancellation
from pulse_ecg.errors import (
    ImageDecodeError,
    ImageError,
    ImageTooLargeError,
    ImageUrlRefusedError,
    excerpt,
)
from pulse_ecg.fetch import FetchPolicy, fetch_image_bytes
from pulse_ecg.image_file import decode_image, rgb_from_pil

_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_PERCENT_CODES = {"%2B": "+", "%2F": "/", "%3D": "=", "%20": "", "%09": "", "%0D": "", "%0A": ""}
_ACCEPTED = "accepted: an http(s) URL, a data:image/...;base64,... URI, or the bare base64 of a file"


@dataclass(frozen=True)
class UrlImage:
    """An image to be fetched.  Like its siblings it shows nothing of its content in ``repr``."""

    url: str = field(repr=False)
    kind: ClassVar[str] = "url"


@dataclass(frozen=True)
class EncodedImage:
    """A data URI or bare base64."""

    data: str = field(repr=False)

    @property
    def kind(self) -> str:
        """``data_uri`` or ``base64``."""
        return "data_uri" if self.data[:5].lower() == "data:" else "base64"


@dataclass(frozen=True)
class DecodedImage:
    """A PIL image; it is never changed."""

    image: Image.Image = field(repr=False)
    kind: ClassVar[str] = "pil"


@dataclass(frozen=True)
class RawImage:
    """The bytes of an image file, as the body of an HTTP request holds them."""

    data: bytes = field(repr=False)
    kind: ClassVar[str] = "raw"


ImageSource = UrlImage | EncodedImage | RawImage | DecodedImage


def image_source(value: object, name: str = "'image'") -> ImageSource:
    """What kind of image a caller sent; nothing is fetched or decoded yet.  ``name`` is what messages call it.

    Raises:
        ImageUrlRefusedError: a URL of another scheme.
        ImageError: empty, or of a type that is no image.
    """
    if isinstance(value, Image.Image):
        return DecodedImage(value)
    if isinstance(value, bytes):  # no JSON body can hold them: the host put them there
        return RawImage(value)
    if not isinstance(value, str):
        raise ImageError(f"{name} is {excerpt(value)}; {_ACCEPTED}.")
    text = value.strip()
    if not text:
        raise ImageError(f"{name} is empty; {_ACCEPTED}.")
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,31}(?=:)", text)  # base64 has no colon
    if scheme is None or scheme[0].lower() == "data":
        return EncodedImage(text)
    if scheme[0].lower() not in ("http", "https"):
        raise ImageUrlRefusedError(f"{name} is a URL of the scheme {excerpt(scheme[0])}; {_ACCEPTED}.")
    return UrlImage(text)


def load_image(source: ImageSource, policy: FetchPolicy) -> Image.Image:
    """The image in RGB, upright, on white, all pixels decoded; always a new object.

    Raises:
        ImageError: one of its subclasses, as :func:`image_bytes` and :func:`decode_image` say.
    """
    if isinstance(source, DecodedImage):
        return rgb_from_pil(source.image)
    return decode_image(image_bytes(source, policy))


def image_bytes(
    source: UrlImage | EncodedImage | RawImage, policy: FetchPolicy, cancel: Cancellation | None = None
) -> bytes:
    """The image file, fetched or taken out of its base64; not empty, at most ``policy.max_bytes``.

    Raises:
        ImageFetchError: the URL gave none (see :func:`pulse_ecg.fetch.fetch_image_bytes`).
        ImageTooLargeError: too many bytes.
        ImageDecodeError: no base64, or a data URI that is no image.
        RequestCancelledError: ``cancel`` was set before an image was fetched.
    """
    if isinstance(source, UrlImage):
        return fetch_image_bytes(source.url, policy, cancel)
    if isinstance(source, RawImage):
        return _within_cap(source.data, policy.max_bytes)
    return _from_base64(source.data, policy.max_bytes)


def _too_large(cap: int) -> ImageTooLargeError:
    return ImageTooLargeError(f"'image' has more than {cap:,} bytes, the most that is accepted.")


def _within_cap(data: bytes, cap: int) -> bytes:
    if len(data) > cap:
        raise _too_large(cap)
    if not data:
        raise ImageDecodeError(f"'image' is empty; {_ACCEPTED}.")
    return data


# --- base64


def _from_base64(text: str, cap: int) -> bytes:
    """Decode a data URI (RFC 2397) or bare base64 (RFC 4648, either alphabet), whatever its white space and padding."""
    if len(text) > 2 * cap + 1024:
        raise _too_large(cap)
    if text[:5].lower() == "data:":
        text = _payload(text)
    try:
        compact = text.encode("ascii").translate(_URL_SAFE, b" \t\r\n\f\v").rstrip(b"=")
        if len(compact) * 3 // 4 > cap:
            raise _too_large(cap)
        data = binascii.a2b_base64(compact + b"=" * (-len(compact) % 4), strict_mode=True)
    except ValueError:
        raise ImageDecodeError(f"'image' is neither a URL nor valid base64; {_ACCEPTED}.") from None
    return _within_cap(data, cap)


def _payload(uri: str) -> str:
    """The base64 of a data URI; of its characters only + / = and white space can be percent-encoded."""
    header, comma, payload = uri[5:].partition(",")
    media_type, *parameters = (part.strip().lower() for part in header[:1024].split(";"))
    if not comma or "base64" not in parameters:
        raise ImageDecodeError("'image' is a data URI without ';base64,'; accepted: data:image/...;base64,...")
    if not (media_type.startswith("image/") or media_type in ("", "application/octet-stream")):
        raise ImageDecodeError(f"'image' is a data URI of the type {excerpt(media_type)}; accepted: image types.")
    if "%" in payload:  # rare, and a pass over megabytes for each code
        for code, character in _PERCENT_CODES.items():
            payload = payload.replace(code, character).replace(code.lower(), character)
    return payload
