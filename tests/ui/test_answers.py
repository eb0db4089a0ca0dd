"""Asked, streamed, commented: what the page makes of an answer."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.ui.visit import COMMENTED, QUESTION, WHOLE, Visit, Visiting, gate
from tests.ui_server import UiServer, answered_by, details, events_of, record, refused, streamed

if TYPE_CHECKING:
    from handler import EndpointHandler


def test_the_answer_of_the_real_handler_is_shown(
    visit: Visit, server: UiServer, handler: EndpointHandler, sample_png: bytes
) -> None:
    server.play = answered_by(handler)
    visit.choose(sample_png)
    visit.page.get_by_text("Parameters").click()
    visit.page.get_by_label("Sampling").uncheck()
    visit.page.get_by_label("Most tokens in the answer").fill("12")
    turn = visit.answered()
    image = base64.b64encode(sample_png).decode()
    parameters = {"max_new_tokens": 12, "do_sample": False, "enable_turkish_commentary": False}
    [expected] = handler({"inputs": {"query": QUESTION, "image": image}, "parameters": parameters})
    assert turn.locator(".answer .text").text_content() == expected["generated_text"] != ""
    assert turn.locator(".model").text_content() == expected["model"]
    assert server.bodies[0]["inputs"] == {"query": QUESTION, "image": f"data:image/png;base64,{image}"}
    expect(turn.locator(".facts summary")).to_contain_text("12 tokens")
    expect(turn.locator(".commentary")).to_contain_text("this server has no key")


def test_text_is_shown_while_it_is_made(visit: Visit, server: UiServer) -> None:
    start, *texts, answer, final = events_of(["Sinus ", "rhythm."], WHOLE)
    with gate() as read, gate() as wrote, gate() as commented:
        server.play = lambda _: streamed([start, read, texts[0], wrote, texts[1], answer, commented, final])
        turn, status = visit.ask(), visit.page.locator("#status")
        text = turn.locator(".answer .text")
        expect(status).to_have_text("The model is reading…")
        expect(turn.locator(".model")).to_have_text("PULSE-7B")
        read.set()
        expect(text).to_have_text("Sinus ")
        expect(text).to_have_attribute("aria-busy", "true")
        expect(status).to_have_text("The answer is being written…")
        wrote.set()
        expect(text).to_have_text("Sinus rhythm.")
        expect(text).to_have_attribute("aria-busy", "false")
        expect(turn.locator(".commentary .note")).to_have_text("Being written…")
        commented.set()
        expect(turn.locator(".commentary .text")).to_have_text(str(COMMENTED["comment_text"]))
    expect(status).to_have_text("Done.")


def test_figures_are_those_of_the_server_and_the_browsers_own(visit: Visit) -> None:
    turn = visit.answered()
    expect(turn.locator(".facts summary")).to_contain_text("Finished")
    turn.locator(".facts summary").click()
    rows = turn.locator(".facts tr").all_inner_texts()
    figures = dict(row.split("\t")[:2] for row in rows if "\t" in row)
    assert figures["Vision tower"] == "0.25"
    assert figures["Prompt tokens"] == "2934"
    assert figures["Seed"] == "7"
    assert 0 <= float(figures["Until the first text"]) <= float(figures["Until the end"]) < 15


def test_figures_are_written_as_the_language_writes_them(visiting: Visiting) -> None:
    page = visiting(locale="tr-TR").page
    page.locator("#question").fill(QUESTION)
    page.locator("#ask").click()
    turn = page.locator(".turn")
    expect(turn.locator(".facts")).to_be_visible()
    turn.locator(".facts summary").click()
    expect(turn.locator(".facts tr", has_text="Görüntü kodlayıcı")).to_contain_text("0,25")


def test_a_server_that_measures_more_is_shown_too(visit: Visit, server: UiServer) -> None:
    more = record("Sinus.", details=details(timings={"warp": 1.5}, finish_reason="length"))
    server.play = lambda _: streamed(events_of(["Sinus."], more))
    turn = visit.answered()
    turn.locator(".facts summary").click()
    expect(turn.locator(".facts table")).to_contain_text("warp")
    expect(turn.locator(".answer .note")).to_contain_text("cut off at its token limit")


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"commentary_status": "failed", "commentary_error": "The service was late."}, "The service was late."),
        ({"commentary_status": "api_key_missing"}, "this server has no key"),
        ({"commentary_status": "unavailable"}, "could not load"),
        ({"commentary_status": "no_text"}, "the answer was empty"),
        ({"commentary_status": "new-status"}, "new-status"),
    ],
)
def test_a_missing_commentary_says_why(visit: Visit, server: UiServer, fields: dict[str, str], shown: str) -> None:
    final = {**WHOLE, "comment_text": "", **fields}
    server.play = lambda _: streamed(events_of(["Sinus rhythm."], final))
    turn = visit.answered()
    expect(turn.locator(".commentary .note")).to_contain_text(shown)
    expect(turn.locator(".commentary .text")).to_have_text("")
    expect(turn.locator(".answer .text")).to_have_text("Sinus rhythm.")


def test_commentary_warnings_are_shown(visit: Visit, server: UiServer) -> None:
    warnings = [{"rule": "leads", "severity": "warning", "detail": "Lead aVF is missing."}]
    server.play = lambda _: streamed(events_of(["x"], {**WHOLE, "commentary_warnings": warnings}))
    expect(visit.answered().locator(".warnings li")).to_have_text(["Lead aVF is missing."])


def test_without_commentary_there_is_none(visit: Visit, server: UiServer) -> None:
    server.play = lambda _: streamed(events_of(["Sinus."], record("Sinus.", details=details())))
    visit.page.get_by_text("Parameters").click()
    visit.page.get_by_label("Turkish commentary").uncheck()
    expect(visit.answered().locator(".commentary")).to_be_hidden()
    assert server.bodies[0]["parameters"] == {"enable_turkish_commentary": False, "details": True}


def test_an_empty_answer_is_said_to_be_empty(visit: Visit, server: UiServer) -> None:
    server.play = lambda _: streamed(events_of([], record("", details=details(), commentary_status="no_text")))
    expect(visit.answered().locator(".answer .note")).to_have_text("The model gave an empty answer.")


def test_text_of_model_and_server_stays_text(visit: Visit, server: UiServer) -> None:
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b>"
    final = record(attack, details=details(engine=attack), **{**COMMENTED, "comment_text": attack})
    final |= {"commentary_model": attack, "commentary_warnings": [{"detail": attack}]}
    server.play = lambda _: streamed([("start", {"id": "1", "model": attack}), *events_of([attack], final)[1:]])
    turn = visit.answered(attack)
    for part in (".asked", ".answer .text", ".commentary .text", ".model", ".warnings li"):
        expect(turn.locator(part)).to_have_text(attack)
    visit.failures_expected = True
    server.play = lambda _: refused(422, attack)
    expect(visit.ask().locator(".error .message")).to_have_text(attack)
    assert visit.page.locator("#turns :is(img, script, b)").count() == 0
