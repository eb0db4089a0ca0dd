"""The page's modules without a browser: the same rules as the Python code, texts in both languages, safe files."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from pulse_ecg.anyres import Preprocessing, fitted_size, image_grid, merge_order, select_resolution
from pulse_ecg.params import _READERS, GenerationParams
from pulse_ecg.request import DEFAULT_QUESTION
from server.ui import SECURITY_HEADERS, ui_routes
from tests.browser import NODE, ROOT
from tests.ui_server import UiServer, refused, ui_server

UI = ROOT / "ui"
MODULES = sorted(UI.glob("*.js"))
HTML = (UI / "index.html").read_text("utf-8")
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
PULSE = Preprocessing(pinpoints=PINPOINTS)


def evaluated(module: str, expression: str, given: object = None) -> Any:
    """The value of a JavaScript expression over a module's exports, ``m``, and ``given``."""
    code = (
        f"import * as m from {json.dumps((UI / module).as_uri())}; import {{ readFileSync }} from 'node:fs';"
        f"const given = JSON.parse(readFileSync(0, 'utf8')); console.log(JSON.stringify(await ({expression})));"
    )
    command = [str(NODE), "--input-type=module", "-e", code]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


# --- tiles


def test_the_tiles_are_those_of_the_model() -> None:
    """The same grid, canvas and borders as the Python code's, for thousands of sizes."""
    draw = random.Random(7)
    sizes = [(draw.randint(1, 3000), draw.randint(1, 3000)) for _ in range(4000)]
    sizes += [(draw.randint(1, 20_000), draw.randint(1, 20_000)) for _ in range(1000)]
    sizes += [(k * w + a, k * h + b) for w, h in PINPOINTS for k in (1, 2, 3) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    sizes += [(1, 1), (3000, 1), (1, 3000), (20_000, 1), (336, 336), (2200, 1700), (1241, 704), (2000, 1000)]
    for size, layout in zip(sizes, evaluated("tiles.js", "given.map(m.tileLayout)", sizes), strict=True):
        resolution = select_resolution(size, PINPOINTS)
        fitted, grid = fitted_size(size, resolution), image_grid(size, PULSE)
        assert layout == {
            "resolution": [*resolution],
            "grid": [*(grid or ())],
            "fitted": [*fitted],
            "offset": [(resolution[0] - fitted[0]) // 2, (resolution[1] - fitted[1]) // 2],
            "imageTokens": len(merge_order("flat", grid=grid, side=24, image_size=size)),
        }, size


# --- the event stream


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_events_survive_every_cut_of_the_bytes(line_end: str) -> None:
    stream = [
        "event: text",
        'data: {"text": "ğ→🫀"}',
        "",
        ": keep-alive",
        "",
        "data:a",
        "data: b",
        "",
        "event: cut",
        "data",
    ]
    parse = """(async () => {
        const bytes = new TextEncoder().encode(given);
        const parsed = [];
        for (let cut = 0; cut <= bytes.length; cut++) {
          const [head, tail] = [bytes.slice(0, cut), bytes.slice(cut)];
          const body = new ReadableStream({ start(c) { c.enqueue(head); c.enqueue(tail); c.close(); } });
          const events = [];
          for await (const event of m.serverSentEvents(body)) events.push(event);
          parsed.push(JSON.stringify(events));
        }
        return [parsed.length, [...new Set(parsed)].map(JSON.parse)];
    })()"""
    # What follows the last empty line is an event that was cut off: it is none.
    cuts, distinct = evaluated("sse.js", parse, line_end.join(stream))
    assert cuts > 50
    assert distinct == [[{"type": "text", "data": '{"text": "ğ→🫀"}'}, {"type": "message", "data": "a\nb"}]]


def test_who_stops_listening_closes_the_stream() -> None:
    parse = """(async () => {
        let cancelled = false;
        const body = new ReadableStream({
          start(c) { c.enqueue(new TextEncoder().encode("data: 1\\n\\n")); },
          cancel() { cancelled = true; },
        });
        for await (const _ of m.serverSentEvents(body)) break;
        return cancelled;
    })()"""
    assert evaluated("sse.js", parse) is True


# --- texts


@pytest.fixture(scope="module")
def strings() -> dict[str, dict[str, str]]:
    return evaluated("strings.js", "m.STRINGS")


def test_both_languages_say_the_same_things(strings: dict[str, dict[str, str]]) -> None:
    assert list(strings["en"]) == list(strings["tr"])
    for key, english in strings["en"].items():
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", strings["tr"][key])), key
    same = {key for key, english in strings["en"].items() if english == strings["tr"][key]}
    assert same == {"question.placeholder", "facts.seed"}


def test_every_text_is_used_and_every_used_text_exists(strings: dict[str, dict[str, str]]) -> None:
    sources = HTML + "".join(file.read_text("utf-8") for file in MODULES if file.name != "strings.js")
    named = set(re.findall(r'data-i18n(?:-[a-z]+)*="([\w.]+)"', HTML))
    sections = "|".join({key.partition(".")[0] for key in strings["en"]})
    named |= set(re.findall(rf'"((?:{sections})\.[\w.]+)"', sources))
    assert named <= set(strings["en"])
    families = tuple(re.findall(r"`([a-z]+\.)\$\{", sources))  # `facts.${stage}`
    assert {"facts.", "commentary.", "error."} == set(families)
    unused = {key for key in strings["en"] if f'"{key}"' not in sources and not key.startswith(families)}
    assert not unused


def test_the_english_page_is_the_one_in_the_file(strings: dict[str, dict[str, str]]) -> None:
    """What shows before the script has run is what the script would say."""
    for key, text in re.findall(r'data-i18n="([\w.]+)"[^>]*>([^<]+)<', HTML):
        assert strings["en"][key].startswith(text.rstrip(".")), key


def test_examples_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8").split("\n## Example prompts\n", 1)[1].split("\n## ", 1)[0]
    examples = evaluated("examples.js", "m.EXAMPLES")
    english = [question for theme in examples.values() for question, _ in theme]
    assert english == re.findall(r"^- (.*)$", readme, re.MULTILINE)
    assert list(examples) == re.findall(r'name="theme" value="(\w+)"', HTML)


def test_defaults_and_limits_are_those_of_the_code(default_params: GenerationParams) -> None:
    [question] = re.findall(r'DEFAULT_QUESTION = "(.*)"', (UI / "api.js").read_text("utf-8"))
    assert question == DEFAULT_QUESTION
    assert f'placeholder="{DEFAULT_QUESTION}"' in HTML
    for name in ("max_new_tokens", "temperature"):
        [(low, high, shown)] = re.findall(rf'name="{name}" min="(\d+)" max="(\d+)".*placeholder="([\d.]+)"', HTML)
        assert json.loads(shown) == getattr(default_params, name)
        assert [_READERS[name](name, json.loads(bound)) for bound in (low, high)] == [json.loads(low), json.loads(high)]


def test_no_script_or_style_stands_in_the_page_and_model_text_never_becomes_html() -> None:
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", HTML)
    assert re.findall(r"<script[^>]*>(.*?)</script>", HTML, re.DOTALL) == [""]
    for file in MODULES:
        source = file.read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", source)
        assert len(source.splitlines()) <= 300, file.name


# --- the files' routes


@pytest.fixture(scope="module")
def server() -> Iterator[UiServer]:
    with ui_server(lambda _: refused(500, "not asked")) as server:
        yield server


@pytest.mark.parametrize("file", sorted(UI.iterdir()), ids=lambda file: file.name)
def test_every_file_is_served_with_its_type_and_the_security_headers(server: UiServer, file: Path) -> None:
    types = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    path = "/ui" if file.name == "index.html" else f"/ui/{file.name}"
    response = requests.get(server.url + path, timeout=5)
    assert response.content == file.read_bytes()
    assert response.headers["Content-Type"].partition(";")[0] == types[file.suffix]
    assert response.headers["Cache-Control"] == "no-cache"
    assert SECURITY_HEADERS.items() <= {**response.headers}.items() | {
        (name, response.headers[name]) for name in SECURITY_HEADERS
    }


def test_a_file_that_did_not_change_is_not_sent_again(server: UiServer) -> None:
    tag = requests.get(f"{server.url}/ui/page.js", timeout=5).headers["ETag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = requests.get(f"{server.url}/ui/page.js", headers={"If-None-Match": known}, timeout=5)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["Content-Security-Policy"] == SECURITY_HEADERS["Content-Security-Policy"]
    other = requests.get(f"{server.url}/ui/page.js", headers={"If-None-Match": '"other"'}, timeout=5)
    assert other.status_code == 200


@pytest.mark.parametrize("path", ["/ui/none.js", "/ui/..%2fhandler.py", "/ui/%2e%2e/handler.py", "/ui/ui/page.js"])
def test_nothing_else_is_served(server: UiServer, path: str) -> None:
    assert requests.get(server.url + path, timeout=5).status_code == 404


def test_the_page_has_one_address(server: UiServer) -> None:
    redirected = requests.get(f"{server.url}/ui/", timeout=5)
    assert redirected.url == f"{server.url}/ui"
    assert requests.post(f"{server.url}/ui", timeout=5).status_code == 405


def test_a_folder_without_a_page_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ui_routes(tmp_path)
