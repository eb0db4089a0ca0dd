"""Any image source gives an upright RGB image on white, or an error of ours; no bomb grows, no other plug-in opens."""

from __future__ import annotations

import base64
import io
import logging
import mmap
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile, PngInfo

from pulse_ecg.errors import (
    ImageDecodeError,
    ImageError,
    ImageTooLargeError,
    ImageUrlRefusedError,
    OutOfMemoryError,
    PulseError,
)
from pulse_ecg.fetch import FetchPolicy
from pulse_ecg.image_file import decode_image
from pulse_ecg.images import DecodedImage, EncodedImage, UrlImage, image_bytes, image_source, load_image
from tests.servers import ImageHost, answer

POLICY = FetchPolicy(max_bytes=20_000_000, allow_private=True, deadline_s=5)
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")


def picture(mode: str = "RGB", size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Something that no rotation or flip leaves as it is."""
    width, height = size
    ramp = Image.linear_gradient("L").resize(size)
    flat = Image.new("L", size, 40)
    flat.paste(250, (0, 0, width // 2, height // 3))
    return Image.merge("RGB", (ramp, flat, ramp.transpose(Image.Transpose.ROTATE_180))).convert(mode)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def same(one: Image.Image, other: Image.Image) -> bool:
    return (one.mode, one.size, one.tobytes()) == (other.mode, other.size, other.tobytes())


def refusal(value: object, kind: type[PulseError], policy: FetchPolicy = POLICY) -> str:
    """The message of the error of this very class, safe to show, and quickly there."""
    start = time.monotonic()
    with pytest.raises(PulseError) as caught:
        load_image(image_source(value), policy)
    assert type(caught.value) is kind, caught.value
    assert time.monotonic() - start < 1.5
    message = str(caught.value)
    assert message.endswith((".", "base64,..."))
    assert not [word for word in ("secret", "Error(", "0x", "PIL", "BytesIO", "Traceback", "/tmp") if word in message]
    assert len(message) < 250
    return message


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(autouse=True)
def no_leak_into_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO)
    yield
    assert caplog.text == ""


# --- what was sent


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("https://a.example/x.png", UrlImage("https://a.example/x.png")),
        (" \n HTTP://a.example/x.png \t", UrlImage("HTTP://a.example/x.png")),
        ("data:image/png;base64,AAAA", EncodedImage("data:image/png;base64,AAAA")),
        ("DATA:,x", EncodedImage("DATA:,x")),
        (" iVBORw0KGgo= ", EncodedImage("iVBORw0KGgo=")),
        ("//8=", EncodedImage("//8=")),
    ],
)
def test_sources(value: str, expected: object) -> None:
    source = image_source(value)
    assert source == expected
    assert "a.example" not in repr(source)
    assert "AAAA" not in repr(source)


def test_a_pil_image_is_a_source() -> None:
    image = picture()
    source = image_source(image)
    assert isinstance(source, DecodedImage)
    assert source.image is image
    assert "0x" not in repr(source)


def test_the_bytes_of_a_file_are_a_source_under_the_same_cap() -> None:
    source = image_source(PNG)
    assert (source.kind, "PNG" in repr(source)) == ("raw", False)
    assert load_image(source, FetchPolicy()).tobytes() == decode_image(PNG).tobytes()
    with pytest.raises(ImageTooLargeError, match=r"more than 10 bytes"):
        load_image(source, FetchPolicy(max_bytes=10))
    assert "empty" in refusal(b"", ImageDecodeError)


@pytest.mark.parametrize(
    "url", ["ftp://h/x", "FILE:///etc/secret", "gopher://h", "javascript:alert(1)", "blob:x", "s3://b"]
)
def test_other_schemes(url: str) -> None:
    assert "http(s) URL" in refusal(url, ImageUrlRefusedError)


@pytest.mark.parametrize("value", ["", "  \n", None, 5, 1.5, True, [], {}, bytearray(b"secret"), object(), ("secret",)])
def test_no_image(value: object) -> None:
    assert "accepted" in refusal(value, ImageError)


# --- base64

PNG = saved(picture())
BASE64 = encoded(PNG)


@pytest.mark.parametrize(
    "value",
    [
        BASE64,
        BASE64.rstrip("="),
        BASE64 + "==",
        "\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
        " ".join(BASE64),
        BASE64.replace("+", "-").replace("/", "_"),
        f"data:image/png;base64,{BASE64}",
        f"DATA:IMAGE/PNG;charset=utf-8;name=a.png;BASE64,{BASE64}",
        f"data:application/octet-stream;base64,{BASE64}",
        f"data:;base64, {BASE64}",
        "data:image/jpeg;base64," + BASE64.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D") + "%0A",
    ],
)
def test_base64(value: str) -> None:
    assert "+" in BASE64
    assert "/" in BASE64
    source = image_source(value)
    assert isinstance(source, EncodedImage)
    assert image_bytes(source, POLICY) == PNG
    assert same(load_image(source, POLICY), picture())


@pytest.mark.parametrize(
    "value",
    [
        "secret!" * 1_500_000,
        "A" * 10_000_001,
        "A B " * 2_500_000,
        "%41" * 3_300_000,
        "data:image/png;base64," + "%41" * 3_300_000,
        "data:image/png;base64," + ";," * 5_000_000,
        "data:" + ";" * 10_000_000,
        "A=A=" * 2_500_000,
        "ş" * 10_000_000,
        "www.secret.example/a.png",
        "AAAA\u00a0",
        BASE64[:40] + "!!!!" + BASE64[40:],
        BASE64[:40] + "=" + BASE64[40:],
        f"data:image/png,{BASE64}",
        "A",
        "====",
        "data:image/png;base64,",
        "data:image/png,AAAA",
        "data:image/png;base64",
        "data:text/html;base64,AAAA",
        "data:application/pdf;base64,AAAA",
        "data:",
    ],
    ids=lambda value: repr(value[:24]),
)
def test_base64_rubbish_is_refused_quickly(value: str) -> None:
    start = time.process_time()
    refusal(value, ImageDecodeError)
    assert time.process_time() - start < 0.5


def test_base64_cap_is_exact_and_comes_before_decoding() -> None:
    policy = FetchPolicy(max_bytes=len(PNG))
    assert load_image(image_source(BASE64), policy).size == (48, 32)
    smaller = FetchPolicy(max_bytes=len(PNG) - 1)
    assert "bytes" in refusal(BASE64, ImageTooLargeError, smaller)
    refusal("A" * 30_000_000, ImageTooLargeError)
    refusal("data:image/png;base64," + " " * 50_000_000 + "A", ImageTooLargeError)
    refusal("=" + "A" * 30_000_000, ImageTooLargeError)  # would be no base64: the length is looked at first


def test_url() -> None:
    host = ImageHost({"/a.png": answer(PNG), "/page": answer(b"<html>secret</html>")})
    try:
        assert same(load_image(image_source(f" {host.url('/a.png')} "), POLICY), picture())
        assert "formats" in refusal(host.url("/page"), ImageDecodeError)
        refusal(host.url("/a.png"), ImageUrlRefusedError, FetchPolicy())
    finally:
        host.close()


# --- formats and modes


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_opaque_images_are_what_pillow_converts_them_to(kind: str, mode: str) -> None:
    try:
        data = saved(picture(mode), kind)
    except (OSError, ValueError):
        pytest.skip("the format has no such mode")
    with Image.open(io.BytesIO(data)) as reference:
        assert same(decode_image(data), reference.convert("RGB"))
        assert same(load_image(DecodedImage(reference), POLICY), reference.convert("RGB"))


VARIANTS = [
    ("JPEG", {"progressive": True}, "RGB"),
    ("JPEG", {"subsampling": 2}, "YCbCr"),
    ("WEBP", {"lossless": True}, "RGB"),
    *(
        ("TIFF", {"compression": name}, "RGB")
        for name in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "tiff_adobe_deflate")
    ),
    ("TIFF", {"compression": "group4"}, "1"),
    ("TIFF", {"big_tiff": True}, "RGB"),
    ("TIFF", {}, "LAB"),
    ("GIF", {"interlace": 1}, "P"),
]


@pytest.mark.parametrize(("kind", "options", "mode"), VARIANTS)
def test_variants(kind: str, options: dict[str, object], mode: str) -> None:
    data = saved(picture("RGB") if mode == "LAB" else picture(mode), kind, **options)
    with Image.open(io.BytesIO(data)) as reference:
        assert same(decode_image(data), reference.convert("RGB"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_first_frame(kind: str) -> None:
    first, others = picture(), [Image.new("RGB", (48, 32), colour) for colour in ("red", "blue")]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = saved(first, kind, save_all=True, append_images=others, **lossless)
    with Image.open(io.BytesIO(data)) as reference:
        assert getattr(reference, "n_frames", 1) == 3
        assert same(decode_image(data), reference.convert("RGB"))
        assert same(load_image(DecodedImage(reference), POLICY), reference.convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture(), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as reference:
        upright = ImageOps.exif_transpose(reference).convert("RGB")
    assert same(decode_image(data), upright)
    with Image.open(io.BytesIO(data)) as lazy:
        assert same(load_image(DecodedImage(lazy), POLICY), upright)
    with Image.open(io.BytesIO(data)) as loaded:
        loaded.load()
        assert same(load_image(DecodedImage(loaded), POLICY), upright)
    assert upright.size == ((32, 48) if orientation > 4 else (48, 32))
    tagged = picture()
    tagged.getexif()[0x0112] = orientation
    assert load_image(DecodedImage(tagged), POLICY).size == upright.size
    assert not decode_image(data).info


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation_of_a_transparent_image(kind: str, mode: str, orientation: int) -> None:
    image = picture(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_image(saved(image, kind))
    upright.getexif()[0x0112] = orientation
    assert same(decode_image(saved(image, kind, exif=exif)), ImageOps.exif_transpose(upright))


def test_orientation_behind_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    end = chunk(b"IEND", b"")
    assert decode_image(PNG.removesuffix(end) + chunk(b"eXIf", exif.tobytes()[6:]) + end).size == (32, 48)


@pytest.mark.parametrize("good", [True, False])
def test_orientation_in_a_text_of_a_png_as_imagemagick_writes_it(good: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    digits = exif.tobytes().hex() if good else "no digits"
    lines = [digits[start : start + 72] for start in range(0, len(digits), 72)]
    text = PngInfo()
    text.add_text("Raw profile type exif", "\n".join(["", "exif", f"{len(digits) // 2:8}", *lines, ""]), zip=True)
    data = saved(picture(), "PNG", pnginfo=text)
    with Image.open(io.BytesIO(data)) as opened:
        from_pil = load_image(DecodedImage(opened), POLICY)
    assert same(decode_image(data), from_pil)
    assert from_pil.size == ((32, 48) if good else (48, 32))


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x1a\x01\x05\0\x01\0\0\0\xf0\xff\0\0",
        b"rubbish",
        bytes(60_000),
    ],
    ids=lambda exif: repr(exif[:24]),
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_bad_exif_does_not_spoil_a_good_picture(kind: str, exif: bytes) -> None:
    data = saved(picture(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(saved(picture(), kind, **({"lossless": True} if kind == "WEBP" else {})))) as reference:
        assert same(decode_image(data), reference.convert("RGB"))


def transparent(mode: str) -> tuple[Image.Image, dict[str, object]]:
    """Left half opaque (10, 20, 30) or grey 20, right half transparent."""
    image = Image.new("RGBA", (8, 4), (10, 20, 30, 255))
    image.paste((200, 100, 50, 0), (4, 0, 8, 4))
    if mode == "P bytes":
        palette = Image.new("P", (8, 4), 0)
        palette.putpalette([10, 20, 30, 200, 100, 50])
        palette.paste(1, (4, 0, 8, 4))
        return palette, {"transparency": b"\xff\x00"}
    if mode == "P index":
        return transparent("P bytes")[0], {"transparency": 1}
    if mode == "RGB key":
        return image.convert("RGB"), {"transparency": (200, 100, 50)}
    if mode == "L key":
        grey = Image.new("L", (8, 4), 20)
        grey.paste(99, (4, 0, 8, 4))
        return grey, {"transparency": 99}
    if mode == "I;16 key":
        wide = Image.new("I;16", (8, 4), 20 * 257)
        wide.paste(Image.new("I;16", (4, 4), 1000), (4, 0))
        return wide, {"transparency": 1000}
    if mode == "LA":
        return Image.merge("LA", (Image.new("L", (8, 4), 20), image.getchannel("A"))), {}
    return image.convert(mode), {}


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *((mode, "PNG") for mode in ("RGBA", "LA", "P bytes", "P index", "RGB key", "L key", "I;16 key")),
        ("P index", "GIF"),
        ("RGBA", "WEBP"),
        ("RGBA", "TIFF"),
        ("LA", "TIFF"),
        *((mode, None) for mode in ("RGBA", "LA", "PA", "RGBa", "P bytes", "RGB key")),
    ],
)
def test_transparency_is_laid_on_white(mode: str, kind: str | None) -> None:
    image, options = transparent(mode)
    if kind is None:
        image.info.update(options)
        result = load_image(DecodedImage(image), POLICY)
    else:
        result = decode_image(saved(image, kind, **options, **({"lossless": True} if kind == "WEBP" else {})))
    left = (20, 20, 20) if mode.startswith(("L", "I")) else (10, 20, 30)
    assert result.getpixel((0, 0)) == left
    assert result.getpixel((7, 3)) == (255, 255, 255)


def test_half_transparency_and_opaque_alpha() -> None:
    half = decode_image(saved(Image.new("RGBA", (2, 2), (0, 0, 0, 128))))
    assert half.getpixel((0, 0)) == (127, 127, 127)
    assert same(decode_image(saved(picture("RGBA"))), picture())


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", None])
def test_16_bits_are_scaled(mode: str, kind: str | None) -> None:
    values = [0, 128, 129, 32_768, 65_279, 65_535]
    image = Image.new("I;16" if (mode, kind) == ("I", "PNG") else mode, (6, 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    result = load_image(DecodedImage(image), POLICY) if kind is None else decode_image(saved(image, kind))
    assert [result.getpixel((x, 0)) for x in range(6)] == [(v, v, v) for v in (0, 0, 1, 128, 254, 255)]


def test_a_dark_16_bit_image_stays_dark() -> None:
    assert decode_image(saved(Image.new("I;16", (2, 2), 200))).getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I", [0, 7, 255], [0, 7, 255]),
        ("I", [-100, 0, 100], [0, 128, 255]),
        ("I", [0, 1_000_000, 2_000_000], [0, 128, 255]),
        ("F", [0.0, 0.5, 1.0], [0, 128, 255]),
        ("F", [0.0, 7.0, 255.0], [0, 7, 255]),
        ("F", [-1e30, 0.0, 1e30], [0, 128, 255]),
        ("F", [9000.0, 9000.0, 9000.0], [0, 0, 0]),
    ],
)
def test_wide_greyscale(mode: str, values: list[float], expected: list[int]) -> None:
    image = Image.new(mode, (3, 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    assert list(decode_image(saved(image, "TIFF")).getchannel("R").tobytes()) == expected


def test_no_numbers() -> None:
    refusal(Image.new("F", (2, 2), float("nan")), ImageDecodeError)


def test_cmyk() -> None:
    data = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red, green, blue = decode_image(data).getpixel((4, 4))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_the_callers_image_is_not_changed(mode: str) -> None:
    image = Image.new(mode, (5, 5))
    if mode == "P":
        image.info["transparency"] = b"\x00"
    before = (
        image.mode,
        image.size,
        image.tobytes(),
        dict(image.info),
        image.getpalette("RGBA") if mode == "P" else None,
    )
    result = load_image(DecodedImage(image), POLICY)
    assert (result.mode, result.size) == ("RGB", (5, 5))
    assert result is not image
    result.paste("red", (0, 0, 5, 5))
    after = (
        image.mode,
        image.size,
        image.tobytes(),
        dict(image.info),
        image.getpalette("RGBA") if mode == "P" else None,
    )
    assert after == before


# --- hostile files


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *, colour: int = 2, rows: bytes = b"\0", extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def gif(width: int, height: int, frame: tuple[int, int]) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00;"


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def webp(width: int, height: int) -> bytes:
    vp8x = b"VP8X" + struct.pack("<II", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    vp8l = b"VP8L" + struct.pack("<IB", 12, 0x2F) + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(7)
    del vp8x
    return b"RIFF" + struct.pack("<I", 4 + len(vp8l)) + b"WEBP" + vp8l


def tiff(*entries: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    """A TIFF of (tag, type, count, value) entries, all in place, and ``data`` behind them."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + data


def tiff_of(width: int, height: int, *more: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    given_tags = {entry[0] for entry in more}
    base = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    base += [(273, 4, 1, 8), (278, 4, 1, height), (279, 4, 1, width * height)]
    return tiff(*(entry for entry in base if entry[0] not in given_tags), *more, data=data)


def jpeg(width: int, height: int) -> bytes:
    data = saved(Image.new("L", (16, 16)), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


RESET_PEAK = Path("/proc/self/clear_refs")
needs_peaks = pytest.mark.skipif(not os.access(RESET_PEAK, os.W_OK), reason="the peak of memory cannot be reset here")
SIZES = [(20_001, 1), (1, 20_001), (7_072, 7_072), (60_000, 60_000)]


@needs_peaks
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "build", [png, bmp, jpeg, webp, tiff_of, lambda w, h: gif(w, h, (1, 1)), lambda w, h: gif(1, 1, (w, h))]
)
def test_pixel_bombs_are_refused_from_the_header(build: object, size: tuple[int, int]) -> None:
    if build is webp and max(size) > 16_384:
        size = (16_384, 16_384)
    data = build(*size)  # type: ignore[operator]
    start = time.process_time()
    with memory_bounded(20_000_000), pytest.raises(ImageTooLargeError, match="pixels"):
        decode_image(data)
    assert time.process_time() - start < 0.2


def test_the_largest_sizes_pass() -> None:
    for size in ((20_000, 2_500), (1, 20_000)):
        assert decode_image(saved(Image.new("1", size))).size == size
    refusal(Image.new("1", (20_001, 1)), ImageTooLargeError)
    refusal(Image.new("1", (7_072, 7_072)), ImageTooLargeError)
    with Image.open(io.BytesIO(png(12_000, 7_000))) as lazy:
        refusal(lazy, ImageTooLargeError)


@contextmanager
def memory_bounded(most: int) -> Iterator[None]:
    """The block may take so many bytes more than are resident when it begins."""
    before = resident("VmRSS")
    RESET_PEAK.write_text("5", "ascii")  # the peak counts from here
    yield
    assert resident("VmHWM") - before < most


def resident(field: str) -> int:
    """Bytes, by a field of the kernel's."""
    [line] = [line for line in Path("/proc/self/status").read_text("ascii").splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


@needs_peaks
def test_the_bound_on_memory_can_be_broken() -> None:
    fresh = mmap.mmap(-1, 200_000_000)  # an allocator might give memory that is resident already
    with closing(fresh), pytest.raises(AssertionError), memory_bounded(20_000_000):
        fresh.write(bytes(200_000_000))


HUGE = 150_000_000
SHARED = [(40_000 + n, 1, 4_000_000, 8) for n in range(500)]
BOMBS: dict[str, Callable[[], bytes]] = {
    "iCCP": lambda: png(8, 8, extra=chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(HUGE), 9))),
    "zTXt": lambda: png(8, 8, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(HUGE), 9))),
    "iTXt": lambda: png(8, 8, extra=chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(HUGE), 9)) * 3),
    "shared tags": lambda: tiff_of(8, 8, *SHARED, data=bytes(4_000_000)),
    "tile": lambda: tiff_of(8, 8, (322, 4, 1, 16_000), (323, 4, 1, 16_000), (324, 4, 1, 8), data=bytes(99)),
    "bigtiff tags": lambda: b"II+\0\x08\0\0\0\x10" + bytes(7) + b"\xff" * 8 + bytes(18_000_000),
}


@needs_peaks
@pytest.mark.parametrize("name", BOMBS)
def test_memory_bombs(name: str) -> None:
    data = BOMBS[name]()
    start = time.process_time()
    with memory_bounded(60_000_000), pytest.raises(ImageError):
        decode_image(data)
    assert time.process_time() - start < 0.5


@needs_peaks
def test_exif_that_claims_the_same_bytes_many_times() -> None:
    tags = tiff(*SHARED[:400], (0x0112, 3, 1, 6), data=bytes(4_000_000))
    data = png(48, 32, rows=(b"\0" + bytes(144)) * 32, extra=chunk(b"eXIf", tags))
    with memory_bounded(60_000_000):
        assert decode_image(data).size == (32, 48)


def run_length_bmp(width: int, height: int, runs: bytes) -> bytes:
    head = struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54 + 1024, 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + head + b"".join(bytes((n, n, n, 0)) for n in range(256)) + runs


MANY = 20_000_000  # bytes, the most that a request may bring
PARTS: dict[str, Callable[[], bytes]] = {
    "segments": lambda: b"\xff\xd8" + b"\xff\xe4\0\2" * (MANY // 4),
    "chunks": lambda: png(8, 8, extra=chunk(b"prVt", b"") * (MANY // 12)),
    "data chunks": lambda: png(2000, 2000).replace(b"IEND", b"IDAT")[:-4] + chunk(b"IDAT", b"") * (MANY // 12),
    "profiles": lambda: png(8, 8, extra=chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(1_000_000), 9)) * (MANY // 1100)),
    "sub-blocks": lambda: b"GIF89a" + bytes(7) + b"!\xfe" + b"\1x" * (MANY // 2),
    "extensions": lambda: b"GIF89a" + bytes(7) + b"!\xfe\0" * (MANY // 3),
    "bytes between": lambda: b"GIF89a" + bytes(7) + b"?" * MANY,
    "strips": lambda: tiff_of(4000, 4000, (278, 4, 1, 3999), (273, 4, 90_000, 8), (279, 4, 1, 8), data=bytes(MANY)),
    "many strips": lambda: tiff_of(
        4000, 4000, (278, 4, 1, 1), (273, 4, MANY // 4, 8), (279, 4, 1, 8), data=bytes(MANY)
    ),
    "short runs": lambda: run_length_bmp(2000, 2000, b"\1x" * (MANY // 2)),
    "no runs": lambda: run_length_bmp(2000, 2000, b"\0\2\0\0" * (MANY // 4)),
    "short rows": lambda: run_length_bmp(20_000, 2500, b"\1x\0\0" * 2500),
}


@needs_peaks
@pytest.mark.parametrize("name", PARTS)
def test_a_file_of_very_many_parts_takes_seconds_at_most(name: str) -> None:
    """Pillow walks them in Python, where nothing cancels it and nothing else can run."""
    data = PARTS[name]()
    start = time.process_time()
    with memory_bounded(150_000_000), pytest.raises(ImageError):
        decode_image(data)
    assert time.process_time() - start < 10


def test_exif_in_very_many_blocks() -> None:
    plain = saved(picture(), "JPEG")
    block = b"\xff\xe1\x07\xd2Exif\0\0" + bytes(1994)
    assert decode_image(plain[:2] + 50 * block + plain[2:]).size == picture().size
    start = time.process_time()
    with pytest.raises(ImageDecodeError, match="too many segments"):
        decode_image(plain[:2] + 9_000 * block + plain[2:])
    assert time.process_time() - start < 0.5


def test_files_of_many_parts_that_they_need_are_read() -> None:
    rows = [bytes((x * y) % 251 for x in range(200) for _ in range(4)) for y in range(300)]
    runs = b"".join(b"".join(bytes((4, pixel)) for pixel in row[::4]) + b"\0\0" for row in reversed(rows))
    assert decode_image(run_length_bmp(800, 300, runs + b"\0\1")).convert("L").tobytes() == b"".join(rows)
    strips = saved(picture("RGB", (30, 9000)), "TIFF", tiffinfo={278: 1})
    assert same(decode_image(strips), picture("RGB", (30, 9000)))
    comments = chunk(b"tEXt", b"k\0v") * 1000
    assert decode_image(png(48, 32, rows=(b"\0" + bytes(144)) * 32, extra=comments)).size == (48, 32)


def test_scan_bomb() -> None:
    data = saved(Image.new("L", (5000, 5000), 128), "JPEG", progressive=True)
    assert decode_image(data).size == (5000, 5000)
    last = data[data.rindex(b"\xff\xda") : -2]
    start = time.process_time()
    with pytest.raises(ImageTooLargeError, match="scans"):
        decode_image(data[:-2] + last * 1000 + b"\xff\xd9")
    assert time.process_time() - start < 0.5


DISGUISED = {
    "html": b"<!DOCTYPE html><html><body>secret</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "svg with xml": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg>&e;</svg>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(secret) print quit\n",
    "binary eps": b"\xc5\xd0\xd3\xc6" + bytes(40),
    "pdf": b"%PDF-1.7\n%secret",
    "psd": b"8BPS\0\1" + bytes(40),
    "ppm": b"P6 1 1 255\n\0\0\0",
    "heic": b"\0\0\0\x18ftypheic" + bytes(40),
    "empty": b"",
    "zeros": bytes(1000),
    "text": b"secret",
    "riff": b"RIFF\x24\0\0\0WAVEfmt ",
    "leading byte": b" " + PNG,
    "big-endian BigTIFF": b"MM\0+\0\x08\0\0" + bytes(100),
    **{
        kind: saved(picture(), kind)
        for kind in ("ICO", "PCX", "TGA", "SGI", "DDS", "ICNS", "JPEG2000", "AVIF", "EPS", "PDF")
        if kind in Image.SAVE or kind != "AVIF"  # which older Pillows cannot write
    },
}


@pytest.mark.parametrize("name", DISGUISED)
def test_other_formats(name: str) -> None:
    with pytest.raises(ImageDecodeError, match="JPEG, PNG, GIF, BMP, WebP and TIFF") as caught:
        decode_image(DISGUISED[name])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_and_mislabelled_files(kind: str) -> None:
    data = saved(picture(size=(300, 200)), kind)
    for length in (0, 1, 4, 8, 16, 30, len(data) // 3, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(ImageDecodeError):
            decode_image(data[:length])
    for other in FORMATS:  # the magic number of one format on the body of another
        if other != kind:
            with pytest.raises(ImageDecodeError):
                decode_image(saved(picture(), other)[:4] + data[4:])


@pytest.mark.parametrize(("width", "height"), [(0, 0), (0, 5), (5, 0)])
def test_no_pixels(width: int, height: int) -> None:
    for data in (png(width, height), bmp(width, height), tiff_of(width, height)):
        with pytest.raises(ImageDecodeError):
            decode_image(data)
    refusal(Image.new("RGB", (width, height)), ImageDecodeError)


def test_a_pil_image_of_another_format_is_not_decoded() -> None:
    with Image.open(io.BytesIO(DISGUISED["EPS"])) as lazy:
        assert "formats" in refusal(lazy, ImageDecodeError)
    with Image.open(io.BytesIO(saved(picture(size=(300, 200)), "JPEG")[:2000])) as truncated:
        refusal(truncated, ImageDecodeError)


PROBE = """
import sys, base64, warnings
from pulse_ecg.image_file import decode_image
from pulse_ecg.errors import ImageDecodeError
for line in sys.stdin.read().split():
    try:
        decode_image(base64.b64decode(line))
    except ImageDecodeError:
        pass
print(*(name for name in sys.modules if name.startswith("PIL.") and "ImagePlugin" in name), "torch" in sys.modules)
"""


def test_no_other_plug_in_is_imported() -> None:
    """In a process of its own, after every listed and many other formats."""
    samples = [*DISGUISED.values(), *(saved(picture(), kind) for kind in (*FORMATS, "MPO"))]
    lines = "\n".join(encoded(data) for data in samples)
    probe = [sys.executable, "-W", "error", "-c", PROBE]
    run = subprocess.run(probe, input=lines, capture_output=True, text=True, check=True)
    *plug_ins, torch = run.stdout.split()
    allowed = {f"PIL.{name}ImagePlugin" for name in ("Bmp", "Gif", "Jpeg", "Png", "Tiff", "WebP")}
    assert set(plug_ins) == allowed
    assert torch == "False"


RAISED = [
    *(OSError, EOFError, SyntaxError, ValueError, OverflowError, IndexError, KeyError, TypeError, ZeroDivisionError),
    *(RuntimeError, RecursionError, AttributeError, AssertionError, NotImplementedError, UserWarning),
    *(struct.error, zlib.error),
]


@pytest.mark.parametrize("kind", RAISED)
def test_whatever_pillow_raises_becomes_ours(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise kind("secret at 0x7f")

    monkeypatch.setattr(PngImageFile, "_open", fail)
    refusal(BASE64, ImageDecodeError)


def test_too_little_memory_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(PngImageFile, "load", fail)
        refusal(BASE64, OutOfMemoryError)


def test_pillows_own_bomb_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise Image.DecompressionBombError("secret")

    monkeypatch.setattr(PngImageFile, "load", fail)
    refusal(BASE64, ImageTooLargeError)


# --- arbitrary input

STARTS = [saved(picture(size=(9, 7)), kind) for kind in FORMATS] + [
    tiff_of(3, 3, data=bytes(99)),
    gif(2, 2, (2, 2)),
    bmp(2, 2),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A small good file with a few bytes changed, cut out or put in."""
    data = bytearray(draw(st.sampled_from(STARTS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


@settings(deadline=None, max_examples=400)
@given(st.one_of(st.binary(max_size=200), damaged()))
def test_any_bytes_give_an_image_or_our_error(data: bytes) -> None:
    try:
        image = decode_image(data)
    except ImageError:
        return
    assert image.mode == "RGB"
    assert min(image.size) > 0


@settings(deadline=None)
@given(
    st.one_of(
        st.text(max_size=80), st.from_regex(r"(data:[a-z/;]{0,20}base64,)?[A-Za-z0-9+/=_ -]{0,60}", fullmatch=True)
    )
)
def test_any_text_gives_an_image_or_our_error(text: str) -> None:
    try:
        source = image_source(text)
        image = load_image(source, FetchPolicy(allowed_hosts=frozenset(), deadline_s=1))
    except ImageError as error:
        assert len(str(error)) < 250
        return
    assert image.mode == "RGB"


def test_only_the_pictures_own_scans_count() -> None:
    """Phones append a film to a picture (motion photos); its bytes hold any marker, as may a thumbnail's."""
    file = io.BytesIO()
    noise = Image.effect_noise((1200, 900), 90).convert("RGB")
    noise.save(file, "JPEG", quality=90)
    picture = file.getvalue()
    film = b"\xff\xda" * 100_000
    thumbnail = b"\xff\xe7" + (20_002).to_bytes(2, "big") + b"\xff\xda" * 10_000
    expected = decode_image(picture)
    assert decode_image(picture + film).tobytes() == expected.tobytes()
    assert decode_image(picture[:2] + thumbnail + picture[2:]).tobytes() == expected.tobytes()


def test_a_jpeg_of_markers_alone_is_refused_at_once() -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    picture = file.getvalue()
    started = time.perf_counter()
    with pytest.raises(ImageDecodeError):
        decode_image(picture[:2] + b"\xff\x01" * 9_000_000 + picture[2:])
    assert time.perf_counter() - started < 2
