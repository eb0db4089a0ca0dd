"""The pictures of the page in docs/, made from the synthetic demo ECG.

.venv/bin/python scripts/screenshot_ui.py

The answer in them is written below and labelled as an example: no model said it.
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

PICTURES: dict[str, dict[str, Any]] = {
    "ui.png": {"viewport": {"width": 1280, "height": 860}, "device_scale_factor": 1.5, "locale": "en-GB"},
    "ui-phone.png": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "locale": "tr-TR",
        "is_mobile": True,
        "has_touch": True,
        "color_scheme": "dark",
    },
}


def photographed(browser: Browser, url: str, ecg: bytes, options: dict[str, Any]) -> Image.Image:
    """The window after one question about ``ecg``; on a phone, scrolled to the answer."""
    page = browser.new_context(**options).new_page()
    page.goto(f"{url}/ui")
    page.locator("#file").set_input_files({"name": "ecg.png", "mimeType": "image/png", "buffer": ecg})
    page.locator("#preview").wait_for()
    page.locator("#question").fill(QUESTION)
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
    file = io.BytesIO()
    render(read_recording()).save(file, "PNG")
    commentary = {"comment_text": COMMENTARY, "commentary_model": "hand", "commentary_status": "success"}
    final = record(ANSWER, details=details(generated_tokens=71), commentary_tokens=0, **commentary)
    events = events_of(re.findall(r"\S+\s*", ANSWER), final)
    events[0] = ("start", {"id": "example", "model": LABEL})
    with ui_server(lambda _: streamed(events)) as server, launched(chromium()) as browser:
        for name, options in PICTURES.items():
            picture = photographed(browser, server.url, file.getvalue(), options)
            picture.convert("RGB").quantize(192, dither=Image.Dither.NONE).save(folder / name, optimize=True)
            print(f"{folder / name}: {picture.width} x {picture.height}, {(folder / name).stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
