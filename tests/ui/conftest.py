"""The page opened in a real browser, on a server that says what a test wants it to.

Every visit ends with a check that the page stayed within its policy: no violation, no error on the console, no request
to anybody but its own server.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.browser import NoBrowserError, chromium, launched
from tests.ui.visit import WHOLE, Visit, Visiting
from tests.ui_server import UiServer, events_of, refused, streamed, ui_server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        found = chromium()
    except NoBrowserError as error:
        pytest.skip(str(error))
    expect.set_options(timeout=15_000)  # for machines that are busy with something else
    with launched(found) as browser:
        yield browser


@pytest.fixture(scope="module")
def one_server() -> Iterator[UiServer]:
    with ui_server(lambda _: refused(500, "not yet told what to say")) as server:
        yield server


@pytest.fixture
def server(one_server: UiServer) -> UiServer:
    one_server.play = lambda _: streamed(events_of(["Sinus ", "rhythm."], WHOLE))
    one_server.token = ""
    one_server.bodies.clear()
    one_server.tokens.clear()
    return one_server


@pytest.fixture
def visiting(browser: Browser, server: UiServer) -> Iterator[Visiting]:
    """Opens the page in a browser context of its own, and checks at the end that it behaved."""
    visits: list[Visit] = []

    def visit(*, init_script: str = "", **options: Any) -> Visit:
        context = browser.new_context(**{"locale": "en-GB", **options})
        context.set_default_timeout(15_000)
        page = context.new_page()
        visits.append(Visit(page, server))
        page.on("console", visits[-1].hear)
        page.on("pageerror", lambda error: visits[-1].said.append(str(error)))
        page.on("request", visits[-1].watch)
        page.on("dialog", lambda dialog: visits[-1].said.append(f"a dialog: {dialog.message}"))
        if init_script:
            page.add_init_script(init_script)
        page.goto(f"{server.url}/ui")
        return visits[-1]

    yield visit
    for made in visits:
        made.page.context.close()
        assert (made.said, made.foreign) == ([], [])


@pytest.fixture
def visit(visiting: Visiting) -> Visit:
    return visiting()
