"""The pictures of the page in docs/.

.venv/bin/python scripts/screenshot_ui.py

On the wide one our server's demo model reports a drawn ECG.  The answer on the phone's, which shows a commentary, is
written below and labelled as an example: no model said it.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.__main__ import CHECKPOINT, REPORT, our_server, samples  # noqa: E402
from demo.ecg_image import read_recording, render  # noqa: E402
from tests.browser import chromium, launched  # noqa: E402
from tests.ui_server import details, events_of, record, streamed, ui_server  # noqa: E402

LABEL = "an example, not a model's answer"
QUESTION = "What is the rhythm of this ECG, and is it regular?"
ANSWER = """The rhythm is regular. Each QRS complex is preceded by a P wave that is upright in leads I and II, which \
is consistent with sinus rhythm.

The PR interval is within the normal range and the QRS complexes are narrow. There is no ST segment elevation in the \
limb leads."""
COMMENTARY = """Kalbiniz düzenli atıyor. Her QRS kompleksinden önce, I ve II derivasyonlarında yukarı bakan bir P \
dalgası var; bu, sinüs ritmiyle uyumludur.

PR aralığı normal sınırlarda, QRS kompleksleri dar. Ekstremite derivasyonlarında ST yükselmesi yok.

Bu bir tanı değildir; sonucu hekiminizle değerlendirin."""

WIDE: dict[str, Any] = {"viewport": {"width": 1280, "height": 860}, "device_scale_factor": 1.5, "locale": "en-GB"}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "locale": "tr-TR",
    "is_mobile": True,
    "has_touch": True,
    "color_scheme": "dark",
}


def photographed(browser: Browser, url: str, ecg: bytes, question: str, options: dict[str, Any]) -> Image.Image:
    """The window after one question about ``ecg``; on a phone, scrolled to the answer."""
    page = browser.new_context(**options).new_page()
    page.goto(f"{url}/ui")
    page.locator("#file").set_input_files({"name": "ecg.png", "mimeType": "image/png", "buffer": ecg})
    page.locator("#preview").wait_for()
    page.locator("#question").fill(question)
    page.locator("#ask").click()
    page.locator(".facts").wait_for()
    if options.get("is_mobile"):
        page.locator("#conversation").evaluate(
            "(answer) => scrollTo(0, answer.getBoundingClientRect().top + scrollY - 75)"
        )
    else:
        page.evaluate("scrollTo(0, 0)")
    picture = Image.open(io.BytesIO(page.screenshot(animations="disabled")))
    page.context.close()
    return picture


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description="Photograph the page with the demo ECG and an example answer.")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs")
    folder: Path = parser.parse_args(argv).folder
    with launched(chromium()) as browser:
        with our_server(CHECKPOINT) as address:
            drawn, *_ = samples()
            _save(photographed(browser, address, drawn.read_bytes(), REPORT, WIDE), folder / "ui.png")
        with ui_server(lambda _: streamed(_example())) as server:
            _save(photographed(browser, server.url, _real(), QUESTION, PHONE), folder / "ui-phone.png")


def _real() -> bytes:
    file = io.BytesIO()
    render(read_recording()).save(file, "PNG")
    return file.getvalue()


def _example() -> Any:
    commentary = {"comment_text": COMMENTARY, "commentary_model": "hand", "commentary_status": "success"}
    final = record(ANSWER, details=details(generated_tokens=71), commentary_tokens=0, **commentary)
    events = events_of(re.findall(r"\S+\s*", ANSWER), final)
    events[0] = ("start", {"id": "example", "model": LABEL})
    return events


def _save(picture: Image.Image, file: Path) -> None:
    picture.convert("RGB").quantize(192, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {picture.width} x {picture.height}, {file.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
