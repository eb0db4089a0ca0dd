"""The image: how it comes in, what is said of it, and where the model's tiles lie on it."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image
from playwright.sync_api import Locator, expect

from pulse_ecg.anyres import fitted_size, select_resolution
from pulse_ecg.request import DEFAULT_QUESTION
from tests.ui.test_modules import PINPOINTS
from tests.ui.visit import QUESTION, WHOLE, Visit, gate, png
from tests.ui_server import UiServer, events_of, streamed


@pytest.mark.parametrize("way", ["drop", "paste", "choose"])
def test_an_image_can_be_dropped_pasted_and_chosen(visit: Visit, server: UiServer, way: str, sample_png: bytes) -> None:
    encoded = base64.b64encode(sample_png).decode()
    if way == "choose":
        visit.choose(sample_png)
    else:
        visit.page.evaluate(
            """([way, encoded]) => {
                const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
                const data = new DataTransfer();
                data.items.add(new File([bytes], "ecg.png", { type: "image/png" }));
                const options = { bubbles: true, cancelable: true };
                document.body.dispatchEvent(way === "drop"
                  ? new DragEvent("drop", { ...options, dataTransfer: data })
                  : new ClipboardEvent("paste", { ...options, clipboardData: data }));
            }""",
            [way, encoded],
        )
    expect(visit.page.get_by_role("img", name="The chosen ECG image")).to_be_visible()
    expect(visit.page.locator("#image-note")).to_have_text("ecg.png · 500 × 400 pixels · 0.01 MB")
    visit.answered("")
    image = f"data:image/png;base64,{encoded}"
    assert server.bodies[0]["inputs"] == {"query": DEFAULT_QUESTION, "image": image}


def test_a_transparent_image_is_shown_on_white_as_the_model_gets_it(visit: Visit) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (400, 300), (0, 0, 0, 0)).save(file, "PNG")
    visit.choose(file.getvalue())
    shown = visit.page.get_by_role("img", name="The chosen ECG image")
    expect(shown).to_be_visible()
    with Image.open(io.BytesIO(shown.screenshot())) as picture:
        width, height = picture.size
        assert picture.convert("RGB").getpixel((width // 4, height // 2)) == (255, 255, 255)


def test_an_images_address_is_left_to_the_server(visit: Visit, server: UiServer) -> None:
    address = visit.page.get_by_label("Or the image's address")
    address.fill("ftp://example.org/ecg.png")
    address.blur()
    expect(visit.page.locator("#image-note")).to_contain_text("must begin with http")
    not_sent(visit)
    expect(address).to_be_focused()
    address.fill(" https://example.org/ecg.png ")
    address.blur()
    expect(visit.page.locator("#image-note")).to_contain_text("The server fetches the image.")
    visit.answered()
    assert server.bodies[0]["inputs"] == {"query": QUESTION, "image": "https://example.org/ecg.png"}
    address.fill("example.org/another.png")
    not_sent(visit)
    assert len(server.bodies) == 1, "the field shows another address than the image that would be sent"
    address.fill("https://example.org/ecg.png")
    visit.page.get_by_role("button", name="Remove").click()
    visit.answered()
    assert server.bodies[1]["inputs"] == {"query": QUESTION}


def test_a_tiff_is_sent_without_a_preview(visit: Visit, server: UiServer) -> None:
    tiff = png(format="TIFF")
    visit.choose(tiff, "scan.tif")
    expect(visit.page.locator("#image-note")).to_contain_text("cannot show a preview of this TIFF file")
    expect(visit.page.locator("#preview")).to_be_hidden()
    visit.answered()
    assert server.bodies[0]["inputs"]["image"] == "data:image/tiff;base64," + base64.b64encode(tiff).decode()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WebP"])
def test_every_listed_format_is_recognised_by_its_bytes(visit: Visit, kind: str) -> None:
    visit.choose(png(format=kind), "no-suffix")
    expect(visit.page.locator("#preview")).to_be_visible()
    expect(visit.page.locator("#image-note")).to_contain_text("40 × 30 pixels")


def test_what_is_no_image_is_refused_and_the_chosen_one_stays(visit: Visit) -> None:
    visit.choose(png())
    expect(visit.page.locator("#preview")).to_be_visible()
    visit.choose(b"%PDF-1.7 and so on", "ecg.png")
    expect(visit.page.locator("#image-note")).to_contain_text("none of the accepted image files")
    expect(visit.page.locator("#preview")).to_be_visible()


def test_a_large_file_is_refused_before_it_is_sent(visit: Visit, server: UiServer) -> None:
    visit.page.evaluate(
        """(head) => {
            const data = new DataTransfer();
            data.items.add(new File([Uint8Array.from(head), new Uint8Array(20_000_000)], "large.png"));
            document.body.dispatchEvent(new DragEvent("drop", { bubbles: true, dataTransfer: data }));
        }""",
        [*png()],
    )
    expect(visit.page.locator("#image-note")).to_contain_text("This file has 20 MB; the server accepts 20 MB.")
    not_sent(visit)
    assert not server.bodies
    visit.page.get_by_role("button", name="Remove").click()
    visit.answered()


def not_sent(visit: Visit) -> None:
    """Ask, and be told that the image does not let the question go."""
    visit.page.get_by_label("Your question").fill(QUESTION)
    visit.page.get_by_role("button", name="Ask", exact=True).click()
    expect(visit.page.locator("#status")).to_contain_text("see the note at the image")


@pytest.mark.parametrize(("into", "shown"), [("#question", False), ("body", True)])
def test_a_picture_of_copied_text_replaces_no_image(visit: Visit, into: str, shown: bool) -> None:
    """Spreadsheets put one beside the text that is to be pasted into the question."""
    visit.page.evaluate(
        """([into, bytes]) => {
            const data = new DataTransfer();
            data.setData("text/plain", "82 bpm");
            data.items.add(new File([Uint8Array.from(bytes)], "image.png", { type: "image/png" }));
            const event = new ClipboardEvent("paste", { bubbles: true, cancelable: true, clipboardData: data });
            document.querySelector(into).dispatchEvent(event);
        }""",
        [into, [*png()]],
    )
    visit.page.wait_for_timeout(200)
    expect(visit.page.locator("#preview")).to_be_visible(visible=shown)


def test_an_image_that_is_still_being_read_comes_too_late_for_a_question(visit: Visit, server: UiServer) -> None:
    """A file on a slow drive: its first bytes arrive when the question about another image is on its way."""
    visit.choose(png())
    expect(visit.page.locator("#preview")).to_be_visible()
    visit.page.evaluate(
        """(bytes) => {
            const slow = new File([Uint8Array.from(bytes)], "slow.png", { type: "image/png" });
            const head = slow.slice(0, 12);
            const arrived = new Promise((resolve) => { window.arrive = resolve; });
            head.arrayBuffer = () => arrived.then(() => Blob.prototype.arrayBuffer.call(head));
            slow.slice = () => head;
            const data = new DataTransfer();
            const event = new DragEvent("drop", { bubbles: true, dataTransfer: data });
            Object.defineProperty(event, "dataTransfer", {
                value: { types: ["Files"], files: [slow], getData: () => "" },
            });
            document.body.dispatchEvent(event);
        }""",
        [*png(60, 30)],
    )
    with gate() as answered:
        events = events_of(["Sinus rhythm."], WHOLE)
        server.play = lambda _: streamed([events[0], answered, *events[1:]])
        turn = visit.ask()
        visit.page.evaluate("arrive()")
        expect(visit.page.locator("#image-note")).to_contain_text("Wait for the answer")
        answered.set()
        expect(turn.locator(".facts")).to_be_visible()
    expect(visit.page.locator("#remove")).to_be_visible()
    assert visit.page.evaluate("document.getElementById('picture').naturalWidth") == 40


def test_an_upright_image_is_what_is_tiled(visit: Visit) -> None:
    """EXIF orientation 6: stored lying, shown standing, as the server reads it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    visit.choose(png(800, 300, format="JPEG", exif=exif.tobytes()))
    expect(visit.page.locator("#image-note")).to_contain_text("300 × 800 pixels")
    expect(visit.page.locator("#tiles-caption")).to_contain_text("1 × 3 tiles")


@pytest.mark.parametrize("size", [(2200, 1700), (3000, 1000), (400, 1300)])
def test_the_overlay_lies_where_the_model_cuts(visit: Visit, size: tuple[int, int]) -> None:
    visit.choose(png(*size))
    expect(visit.page.locator("#preview")).to_be_visible()
    columns, rows = resolution = select_resolution(size, PINPOINTS)
    fitted = fitted_size(size, resolution)
    stage = box(visit.page.locator("#stage"))
    scale = stage["width"] / columns
    assert stage["height"] == pytest.approx(rows * scale, abs=1)
    picture = box(visit.page.locator("#picture"))
    corner = [(whole - part) // 2 for whole, part in zip(resolution, fitted, strict=True)]
    expected = [stage["x"] + corner[0] * scale, stage["y"] + corner[1] * scale, fitted[0] * scale, fitted[1] * scale]
    assert [picture[key] for key in ("x", "y", "width", "height")] == pytest.approx(expected, abs=1)
    tiles = visit.page.locator("#tiles > span")
    assert tiles.count() == columns * rows // 336**2
    for index, tile in enumerate(tiles.all()):
        row, column = divmod(index, columns // 336)
        place = box(tile)
        expected = [stage["x"] + column * 336 * scale, stage["y"] + row * 336 * scale, 336 * scale, 336 * scale]
        assert [place[key] for key in ("x", "y", "width", "height")] == pytest.approx(expected, abs=1)
    overview = box(visit.page.locator("#overview"))
    assert overview["width"] == pytest.approx(overview["height"], abs=1)
    background = visit.page.locator("#stage").evaluate("(stage) => getComputedStyle(stage).backgroundColor")
    assert background == "rgb(0, 0, 0)"
    visit.page.get_by_label("Show what the model sees").uncheck()
    plain = box(visit.page.locator("#picture"))
    assert plain["width"] / plain["height"] == pytest.approx(size[0] / size[1], rel=0.02)
    expect(visit.page.locator("#tiles")).to_be_hidden()


def box(locator: Locator) -> dict[str, float]:
    found = locator.bounding_box()
    assert found
    return {**found}


def test_the_image_stays_while_its_answer_is_made(visit: Visit, server: UiServer) -> None:
    visit.choose(png())
    expect(visit.page.locator("#preview")).to_be_visible()
    with gate() as answered:
        events = events_of(["Sinus rhythm."], WHOLE)
        server.play = lambda _: streamed([events[0], answered, *events[1:]])
        turn = visit.ask()
        expect(visit.page.get_by_role("button", name="Remove")).to_be_disabled()
        visit.page.evaluate(
            """() => {
                const data = new DataTransfer();
                data.items.add(new File(["x"], "other.png"));
                document.body.dispatchEvent(new DragEvent("drop", { bubbles: true, dataTransfer: data }));
            }"""
        )
        expect(visit.page.locator("#image-note")).to_contain_text("Wait for the answer")
        answered.set()
        expect(turn.locator(".facts")).to_be_visible()
    expect(visit.page.get_by_role("button", name="Remove")).to_be_enabled()
