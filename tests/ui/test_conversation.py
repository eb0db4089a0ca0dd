"""Questions, follow-ups and parameters: what the page sends."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from playwright.sync_api import expect

from tests.ui.visit import QUESTION, Visit, Visiting, png
from tests.ui_server import UiServer, answered_by

if TYPE_CHECKING:
    from handler import EndpointHandler


def test_a_follow_up_is_asked_as_a_chat_about_the_same_image(visit: Visit, server: UiServer) -> None:
    image = png()
    visit.choose(image)
    visit.answered("What is the rhythm?")
    expect(visit.page.get_by_label("Your question")).to_have_attribute("placeholder", "Ask a follow-up question")
    visit.answered("What speaks for it?")
    link = {"url": "data:image/png;base64," + base64.b64encode(image).decode()}
    content = [{"type": "text", "text": "What is the rhythm?"}, {"type": "image_url", "image_url": link}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Sinus rhythm."},
        {"role": "user", "content": "What speaks for it?"},
    ]
    assert server.bodies[1]["inputs"] == {"messages": messages}
    assert visit.page.locator(".turn").count() == 2
    visit.choose(png(50, 50))
    expect(visit.page.locator(".divider")).to_contain_text("New image")
    visit.answered("And here?")
    assert server.bodies[2]["inputs"]["query"] == "And here?"
    visit.page.get_by_role("button", name="New conversation").click()
    assert visit.page.locator(".turn").count() == 0
    visit.answered("And again?")
    assert server.bodies[3]["inputs"]["query"] == "And again?"


def test_a_chat_is_one_that_the_real_handler_answers(
    visit: Visit, server: UiServer, handler: EndpointHandler, sample_png: bytes
) -> None:
    server.play = answered_by(handler)
    visit.choose(sample_png)
    visit.page.get_by_text("Parameters").click()
    visit.page.get_by_label("Most tokens in the answer").fill("6")
    for question in (QUESTION, "What speaks for it?", "And against it?"):
        assert visit.answered(question).locator(".answer .text").text_content()
    assert len(server.bodies[2]["inputs"]["messages"]) == 5


def test_nothing_to_ask_is_not_sent(visit: Visit, server: UiServer) -> None:
    visit.page.get_by_role("button", name="Ask", exact=True).click()
    expect(visit.page.locator("#status")).to_have_text("Write a question, or choose an image.")
    expect(visit.page.get_by_label("Your question")).to_be_focused()
    assert server.bodies == []


def test_examples_fill_the_question_in_english(visiting: Visiting) -> None:
    visit = visiting(locale="tr-TR")
    visit.page.get_by_label("ST segmenti").check()
    visit.page.get_by_role("button", name="Resiprokal değişiklikler var mı?").click()
    expect(visit.page.locator("#question")).to_have_value("Are there reciprocal changes?")


def test_parameters_are_sent_as_given_and_checked_before(visit: Visit, server: UiServer) -> None:
    visit.page.get_by_text("Parameters").click()
    for label, value in (("Most tokens in the answer", "4096"), ("Temperature", "0.7"), ("Seed", "11")):
        visit.page.get_by_label(label).fill(value)
    visit.page.get_by_text("Parameters").click()
    visit.page.get_by_label("Your question").fill(QUESTION)
    visit.page.get_by_role("button", name="Ask", exact=True).click()
    expect(visit.page.get_by_label("Most tokens in the answer")).to_be_focused()
    assert server.bodies == []
    visit.page.get_by_label("Most tokens in the answer").fill("64")
    visit.answered()
    given = {"max_new_tokens": 64, "temperature": 0.7, "seed": 11}
    assert server.bodies[0]["parameters"] == {**given, "enable_turkish_commentary": True, "details": True}
    visit.page.get_by_label("Sampling").uncheck()
    visit.answered()
    assert server.bodies[1]["parameters"]["do_sample"] is False
    assert "temperature" not in server.bodies[1]["parameters"]
