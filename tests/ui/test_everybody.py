"""In both languages, by keyboard, on a phone, in light and dark, within the policy."""

from __future__ import annotations

import time

import pytest
from playwright.sync_api import expect

from tests.ui.visit import QUESTION, WHOLE, Visit, Visiting, png
from tests.ui_server import UiServer, events_of, refused, streamed


def test_the_language_is_the_browsers_until_one_is_chosen(visiting: Visiting) -> None:
    visit = visiting(locale="tr-TR")
    page = visit.page
    expect(page.locator("html")).to_have_attribute("lang", "tr")
    expect(page).to_have_title("PULSE-7B · EKG görüntüleri hakkında sorular")
    expect(page.locator(".notice")).to_contain_text("Tıbbi cihaz değildir")
    page.get_by_role("button", name="English").click()
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page.get_by_role("button", name="English")).to_have_attribute("aria-pressed", "true")
    page.reload()
    expect(page.locator(".notice")).to_contain_text("Not a medical device")


def test_what_is_on_the_page_already_is_translated_too(visit: Visit) -> None:
    visit.choose(png(2200, 1700))
    turn = visit.answered()
    visit.page.get_by_role("button", name="Türkçe").click()
    expect(turn.locator(".facts summary")).to_contain_text("Tamamlandı")
    expect(turn.locator(".answer h3")).to_contain_text("Yanıt")
    expect(visit.page.locator("#image-note")).to_contain_text("2.200 × 1.700 piksel")
    expect(visit.page.locator("#question")).to_have_attribute("placeholder", "Devamında bir soru daha sorun")
    expect(turn.locator(".answer .text")).to_have_text("Sinus rhythm.")
    assert turn.locator(".answer .text").get_attribute("lang") == "en"
    assert turn.locator(".commentary .text").get_attribute("lang") == "tr"


def test_forbidden_storage_forbids_nothing_else(visiting: Visiting) -> None:
    forbidden = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no') } })"
    visit = visiting(init_script=forbidden)
    visit.page.get_by_role("button", name="Türkçe").click()
    expect(visit.page.locator("html")).to_have_attribute("lang", "tr")


# --- access


def test_the_statement_is_always_in_view(visit: Visit) -> None:
    notice = visit.page.locator(".notice")
    expect(notice).to_be_in_viewport(ratio=1)
    for _ in range(3):
        visit.answered()
    visit.page.evaluate("scrollTo(0, document.body.scrollHeight)")
    expect(notice).to_be_in_viewport(ratio=1)


def test_it_works_by_keyboard_alone(visit: Visit, server: UiServer) -> None:
    page, press = visit.page, visit.page.keyboard.press
    reached = []
    for _ in range(20):
        press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        if reached[-1] == "copy" or "code" in reached[-1]:
            break
    order = ["Skip to the question", "English", "Türkçe", "file", "image-url", "question", "ask", "Example questions"]
    assert [name for name in reached if name in order] == order
    page.locator("body").press("Home")
    page.get_by_role("link", name="Skip to the question").focus()
    press("Enter")
    press("Tab")
    page.get_by_label("Your question").focus()
    page.keyboard.type(QUESTION)
    press("Control+Enter")
    expect(page.locator(".facts")).to_be_visible()
    assert server.bodies[0]["inputs"] == {"query": QUESTION}
    page.get_by_label("Your question").focus()
    for _ in range(2):
        press("Tab")
    press("Enter")  # the examples open
    press("Tab")
    press("ArrowRight")
    expect(page.get_by_label("ST segment")).to_be_checked()
    press("Tab")
    press("Enter")
    expect(page.locator("#question")).to_have_value("Which leads show ST segment elevation or depression?")
    outline = page.locator("#question").evaluate("(field) => getComputedStyle(field).outlineStyle")
    assert outline == "solid"


@pytest.mark.parametrize("locale", ["en-GB", "tr-TR"])
def test_a_phone_needs_no_sideways_scrolling(visiting: Visiting, server: UiServer, locale: str) -> None:
    visit = visiting(locale=locale, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page = visit.page
    final = {**WHOLE, "generated_text": "W" * 300, "comment_text": "Ğ" * 300}
    server.play = lambda _: streamed(events_of(["W" * 300], final))
    expect(page.locator(".camera")).to_be_visible()
    page.locator("#file").set_input_files({"name": "n" * 90 + ".png", "mimeType": "", "buffer": png(2200, 1700)})
    expect(page.locator("#preview")).to_be_visible()
    page.locator("#question").fill("Q" * 200)
    page.locator("#ask").click()
    expect(page.locator(".facts")).to_be_visible()
    for summary in page.locator("summary:visible").all():
        summary.click()
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    small = page.locator("button:visible, .button:visible, summary:visible, input:not(.hidden):visible").evaluate_all(
        "(all) => all.filter((e) => !e.closest('.pills, .check') && e.getBoundingClientRect().height < 24)"
        ".map((e) => e.outerHTML)"
    )
    assert small == []


def test_every_control_has_a_name_and_answers_are_announced(visit: Visit) -> None:
    visit.choose(png())
    visit.answered()
    for summary in visit.page.locator("summary:visible").all():
        if not summary.evaluate("(summary) => summary.parentElement.open"):
            summary.click()
    unnamed = visit.page.locator("input, textarea, button").evaluate_all(
        "(all) => all.filter((e) => !(e.textContent.trim() || e.ariaLabel || e.labels?.[0]?.textContent.trim()))"
        ".map((e) => e.outerHTML)"
    )
    assert unnamed == []
    assert visit.page.locator(".answer .text").get_attribute("aria-live") == "polite"
    ids = visit.page.locator("[aria-describedby], [aria-labelledby]").evaluate_all(
        "(all) => all.flatMap((e) => [e.getAttribute('aria-describedby'), e.getAttribute('aria-labelledby')])"
    )
    for reference in filter(None, ids):
        assert visit.page.locator(f"#{reference}").count() == 1
    assert visit.page.locator("h1").count() == 1


CONTRAST = """() => {
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = channels(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
  };
  const texts = [...document.body.querySelectorAll("*")].filter((e) =>
    e.checkVisibility() && !e.closest(":disabled, [aria-disabled=true], .hidden") &&
    [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  return texts.map((e) => {
    const [a, b] = [channels(getComputedStyle(e).color), ground(e)].map(light).sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.className || e.tagName, e.textContent.trim().slice(0, 40)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough(visiting: Visiting, server: UiServer, scheme: str) -> None:
    """WCAG AA: at least 4.5 to 1 for text."""
    visit = visiting(color_scheme=scheme)
    visit.failures_expected = True
    visit.choose(png())
    visit.answered()
    server.play = lambda _: refused(429, "Too many.", {"Retry-After": "3", "X-Request-Id": "r"})
    expect(visit.ask().locator(".error")).to_be_visible()
    server.play = lambda _: refused(401, "No.")
    expect(visit.ask().locator(".error")).to_be_visible()
    for summary in visit.page.locator("summary:visible").all():
        if not summary.evaluate("(summary) => summary.parentElement.open"):
            summary.click()
    measured = visit.page.evaluate(CONTRAST)
    assert len(measured) > 50
    assert [text for text in measured if text[0] < 4.5] == []


def test_a_violation_of_the_policy_would_be_seen(visiting: Visiting) -> None:
    """The checks that end every test do see what they look for."""
    visit = visiting()
    visit.page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'alert(1)'}))")
    visit.page.evaluate("fetch('https://example.org/').catch(() => null)")
    visit.page.evaluate("new Image().src = 'https://example.org/x.png'")

    def refused_directives() -> set[str]:
        refusals = "".join(text for text in visit.said if "Content Security Policy" in text)
        return {directive for directive in ("script-src", "connect-src", "img-src") if directive in refusals}

    until = time.monotonic() + 15
    while len(refused_directives()) < 3 and time.monotonic() < until:
        visit.page.wait_for_timeout(50)  # the browser tells of them in its own time
    assert refused_directives() == {"script-src", "connect-src", "img-src"}, visit.said
    visit.page.close()  # it says no more from here on
    visit.said.clear()
    visit.foreign.clear()
