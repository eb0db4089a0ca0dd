"""Stopped, refused, cut off, unauthorised: what the page makes of no answer."""

from __future__ import annotations

import threading

import pytest
from playwright.sync_api import expect
from starlette.responses import HTMLResponse

from tests.ui.visit import QUESTION, TOKEN, WHOLE, Visit, gate
from tests.ui_server import UiServer, error_record, events_of, refused, streamed


def test_stop_ends_the_answer_and_the_servers_work(visit: Visit, server: UiServer) -> None:
    left, [start, text, *rest] = threading.Event(), events_of(["Sinus "], WHOLE)
    with gate() as never:
        server.play = lambda _: streamed([start, text, never, *rest], left)
        turn = visit.ask()
        expect(turn.locator(".answer .text")).to_have_text("Sinus ")
        stop = visit.page.get_by_role("button", name="Stop")
        stop.press("Enter")
        assert left.wait(10)
    expect(turn.locator(".answer .note")).to_have_text("You stopped this answer.")
    expect(turn.locator(".commentary .note")).to_contain_text("not completed")
    expect(stop).to_be_hidden()
    expect(visit.page.get_by_label("Your question")).to_be_focused()
    server.play = lambda _: streamed(events_of(["Fine."], WHOLE))
    visit.answered("And now?")
    assert [m["content"] for m in server.bodies[1]["inputs"]["messages"]] == [QUESTION, "Sinus ", "And now?"]


@pytest.mark.parametrize(
    ("status", "headers", "message", "shown"),
    [
        (422, {}, "Parameter 'top_p' is 7.", ["Parameter 'top_p' is 7."]),
        (413, {}, "The image has too many bytes.", ["too many bytes"]),
        (429, {"Retry-After": "7"}, "The queue is full.", ["The queue is full.", "Try again in 7 s."]),
        (503, {"Retry-After": "30"}, "The model is loading.", ["The model is loading.", "Try again in 30 s."]),
        (503, {}, "", ["may still be loading", "Try again shortly."]),
        (429, {}, "", ["Too many questions", "Try again shortly."]),
        (500, {"X-Request-Id": "abc-123"}, "An internal error.", ["An internal error.", "Reference: abc-123"]),
        (502, {}, "", ["HTTP status 502"]),
    ],
)
def test_a_refusal_says_why_and_can_be_repeated(
    visit: Visit, status: int, headers: dict[str, str], message: str, shown: list[str]
) -> None:
    visit.failures_expected, server = True, visit.server
    server.play = lambda _: refused(status, message, headers)
    turn = visit.ask()
    for text in shown:
        expect(turn.get_by_role("alert")).to_contain_text(text)
    expect(turn.locator(".answer")).to_be_hidden()
    server.play = lambda _: streamed(events_of(["Sinus rhythm."], WHOLE))
    turn.get_by_role("button", name="Try again").click()
    expect(turn.locator(".answer .text")).to_have_text("Sinus rhythm.")
    expect(turn.locator(".error")).to_be_hidden()
    assert server.bodies[0] == server.bodies[1]


def test_a_proxys_html_is_no_message(visit: Visit, server: UiServer) -> None:
    visit.failures_expected = True
    server.play = lambda _: HTMLResponse("<h1>Bad gateway</h1>", 502)
    expect(visit.ask().locator(".error .message")).to_have_text(
        "The server answered with HTTP status 502 and no message."
    )


def test_an_error_within_the_stream_keeps_what_was_written(visit: Visit, server: UiServer) -> None:
    failure = error_record("The answer was not finished in time.") | {"status": 504}
    server.play = lambda _: streamed([*events_of(["Sinus "], WHOLE)[:2], ("error", failure)])
    turn = visit.ask()
    expect(turn.locator(".error .message")).to_have_text("The answer was not finished in time.")
    expect(turn.locator(".answer .text")).to_have_text("Sinus ")
    server.play = lambda _: streamed(events_of(["Fine."], WHOLE))
    visit.answered("And now?")
    assert server.bodies[1]["inputs"] == {"query": "And now?"}, "what failed is no part of the chat"
    expect(turn.get_by_role("button", name="Try again")).to_be_hidden()


def test_a_stream_that_breaks_off_is_no_answer(visit: Visit, server: UiServer) -> None:
    server.play = lambda _: streamed(events_of(["Sinus "], WHOLE)[:2])
    expect(visit.ask().locator(".error .message")).to_contain_text("connection broke")


@pytest.mark.parametrize("end", ["stop", "break"])
def test_a_whole_answer_stays_whole_when_its_commentary_is_lost(visit: Visit, server: UiServer, end: str) -> None:
    *before, record = events_of(["Sinus rhythm."], WHOLE)
    with gate() as never:
        server.play = lambda _: streamed([*before, never, record] if end == "stop" else before)
        turn = visit.ask()
        if end == "stop":
            expect(visit.page.locator("#status")).to_contain_text("The answer is complete.")
            visit.page.get_by_role("button", name="Stop").click()
            expect(turn.locator(".answer .note")).to_be_hidden()
        else:
            expect(turn.locator(".error .message")).to_have_text(
                "The answer is complete; the connection broke before what follows it."
            )
        expect(turn.locator(".commentary .note")).to_contain_text("ended before it was written")
    server.play = lambda _: streamed(events_of(["Fine."], WHOLE))
    if end == "break":
        turn.get_by_role("button", name="Try again").click()
        expect(turn.locator(".answer .text")).to_have_text("Fine.")
        expect(turn.locator(".facts")).to_be_visible()
    visit.answered("And now?")
    said = "Fine." if end == "break" else "Sinus rhythm."
    assert [m["content"] for m in server.bodies[-1]["inputs"]["messages"]] == [QUESTION, said, "And now?"]


def test_a_server_that_is_gone_and_a_device_that_is_offline(visit: Visit) -> None:
    visit.failures_expected = True
    visit.page.route(f"{visit.server.url}/", lambda route: route.abort("connectionrefused"))
    expect(visit.ask().locator(".error .message")).to_have_text("The server could not be reached.")
    visit.page.context.set_offline(True)
    expect(visit.page.locator("#status")).to_contain_text("offline")
    visit.page.get_by_role("button", name="Try again").click()
    expect(visit.page.locator(".error .message")).to_contain_text("This device is offline.")
    visit.page.context.set_offline(False)
    visit.page.unroute_all()
    visit.page.get_by_role("button", name="Try again").click()
    expect(visit.page.locator(".answer .text")).to_have_text("Sinus rhythm.")


def test_a_token_is_asked_for_used_and_kept_nowhere(visit: Visit, server: UiServer) -> None:
    visit.failures_expected = True
    server.token = TOKEN
    turn, token = visit.ask(), visit.page.get_by_label("Access token")
    expect(turn.locator(".error .message")).to_have_text("The server asks for an access token.")
    expect(token).to_be_focused()
    token.fill("“curly”")  # no header can carry it
    token.press("Enter")
    expect(visit.page.locator("#status")).to_have_text("The server did not accept this access token.")
    token.fill("wrong")
    token.press("Enter")
    expect(turn.locator(".error .message")).to_have_text("The server did not accept this access token.")
    token.fill(TOKEN)
    visit.page.get_by_role("button", name="Use it and ask again").click()
    expect(turn.locator(".answer .text")).to_have_text("Sinus rhythm.")
    expect(token).to_be_hidden()
    assert server.tokens == ["", "Bearer wrong", f"Bearer {TOKEN}"]
    visit.page.get_by_text("This request as code").click()
    for language in ("cURL", "Python", "JavaScript"):
        visit.page.get_by_label(language).check()
        expect(visit.page.locator("#snippet")).to_contain_text("YOUR_TOKEN")
    stored = visit.page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert TOKEN not in stored + visit.page.content()
    visit.page.reload()
    expect(visit.ask().locator(".error")).to_be_visible()
    assert server.tokens[-1] == ""
