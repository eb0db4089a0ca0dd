"""A visit to the page: what the tests of every part of it share."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from playwright.sync_api import ConsoleMessage, Locator, Page, Request, expect

from tests.ui_server import UiServer, details, record

QUESTION = "What is the rhythm?"
TOKEN = "token-typed-by-a-person"
COMMENTED = {
    "comment_text": "Kalbiniz düzenli atıyor.",
    "commentary_model": "deepseek-flash",
    "commentary_tokens": 12,
    "commentary_status": "success",
}
WHOLE = record("Sinus rhythm.", details=details(), **COMMENTED)


Visiting = Callable[..., "Visit"]


@dataclass
class Visit:
    """A page with what happened on it; ``failures_expected`` lets it log HTTP errors, as browsers do."""

    page: Page
    server: UiServer
    failures_expected: bool = False
    said: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def hear(self, message: ConsoleMessage) -> None:
        if not (self.failures_expected and message.text.startswith("Failed to load resource")):
            self.said.append(message.text)

    def watch(self, request: Request) -> None:
        if not request.url.startswith((f"{self.server.url}/", f"blob:{self.server.url}/", "data:")):
            self.foreign.append(request.url)

    def ask(self, question: str = QUESTION) -> Locator:
        """Ask, and return the new turn."""
        turns = self.page.locator(".turn")
        before = turns.count()
        self.page.get_by_label("Your question").fill(question)
        self.page.get_by_role("button", name="Ask", exact=True).click()
        expect(turns).to_have_count(before + 1)
        return turns.last

    def answered(self, question: str = QUESTION) -> Locator:
        """Ask, and wait for the end of the answer."""
        turn = self.ask(question)
        expect(turn.locator(".facts")).to_be_visible()
        return turn

    def choose(self, content: bytes, name: str = "ecg.png") -> None:
        self.page.locator("#file").set_input_files({"name": name, "mimeType": "", "buffer": content})


@contextmanager
def gate() -> Iterator[threading.Event]:
    """Something to wait for; it opens in any case, so that no server's thread stays behind."""
    event = threading.Event()
    try:
        yield event
    finally:
        event.set()


def png(width: int = 40, height: int = 30, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (250, 220, 220)).save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()
