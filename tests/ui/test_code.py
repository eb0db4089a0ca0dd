"""The request as code: the snippets run, and send what the page sends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect
from starlette.responses import JSONResponse

from pulse_ecg.request import DEFAULT_QUESTION
from tests.browser import NODE
from tests.ui.visit import TOKEN, WHOLE, Visit, Visiting, png
from tests.ui_server import UiServer

SHELLS: dict[str, tuple[str, list[str]]] = {
    "cURL": ("request.sh", ["bash", "-e"]),
    "Python": ("request.py", [sys.executable]),
    "JavaScript": ("request.mjs", [str(NODE)]),
}


def open_code(visit: Visit) -> None:
    """Unfold the code, and wait for it: browsers tell the page of the unfolding a moment later."""
    visit.page.get_by_text("This request as code").click()
    expect(visit.page.locator("#snippet")).not_to_be_empty()


@pytest.mark.parametrize("image", ["file", "address", "none"])
@pytest.mark.parametrize("chat", [False, True], ids=["question", "chat"])
def test_snippets_send_what_the_page_sends(
    visit: Visit, server: UiServer, tmp_path: Path, image: str, chat: bool
) -> None:
    visit.failures_expected = True
    name = "it's an ECG.png"
    if image == "file":
        (tmp_path / name).write_bytes(png())
        visit.choose(png(), name)
        expect(visit.page.locator("#preview")).to_be_visible()
    elif image == "address":
        visit.page.get_by_label("Or the image's address").fill("https://example.org/a.png?b='c'&d=$e")
        visit.page.get_by_label("Or the image's address").blur()
    if chat:
        visit.answered("Rhythm?")
    server.token = TOKEN
    turn = visit.ask('It\'s "100 %" sure?\n$HOME `x` \\n ü €')
    visit.page.get_by_label("Access token").fill(TOKEN)
    visit.page.get_by_label("Access token").press("Enter")
    expect(turn.locator(".facts")).to_be_visible()
    sent = {key: value for key, value in server.bodies[-1].items() if key != "stream"}
    open_code(visit)
    server.play = lambda _: JSONResponse([WHOLE])
    for language, (file, command) in SHELLS.items():
        visit.page.get_by_label(language).check()
        code = visit.page.locator("#snippet").inner_text()
        assert TOKEN not in code
        (tmp_path / file).write_text(code.replace("YOUR_TOKEN", TOKEN), "utf-8")
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONUTF8": "1"}
        done = subprocess.run([*command, file], cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, (language, done.stderr.decode())
        assert "Sinus rhythm." in done.stdout.decode()
        assert server.bodies.pop() == sent, language
        assert server.tokens[-1] == f"Bearer {TOKEN}"


def test_before_a_question_the_code_is_an_example(visit: Visit) -> None:
    open_code(visit)
    snippet = visit.page.locator("#snippet")
    expect(snippet).to_contain_text(DEFAULT_QUESTION)
    expect(snippet).to_contain_text("base64 < 'ecg.jpg'")
    expect(snippet).not_to_contain_text("TOKEN")
    visit.page.get_by_label("Your question").fill("Which leads?")
    expect(snippet).to_contain_text("Which leads?")


def test_code_is_copied_or_selected(visiting: Visiting) -> None:
    visit = visiting(permissions=["clipboard-read", "clipboard-write"])
    open_code(visit)
    visit.page.get_by_role("button", name="Copy").click()
    expect(visit.page.locator("#code-note")).to_have_text("Copied.")
    snippet = visit.page.locator("#snippet").text_content()
    assert visit.page.evaluate("navigator.clipboard.readText()") == snippet
    visit = visiting(init_script="delete Navigator.prototype.clipboard")
    open_code(visit)
    visit.page.get_by_role("button", name="Copy").click()
    expect(visit.page.locator("#code-note")).to_contain_text("the text is selected")
    assert (
        visit.page.evaluate("getSelection().toString()").strip() == visit.page.locator("#snippet").inner_text().strip()
    )
