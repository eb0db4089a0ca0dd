"""What the README says of our own server: its examples run against it, its tables are the code's."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from scripts.send_test_requests import drawn_sample
from server.app import build_app
from server.openapi import document
from server.service import Service
from server.settings import OPTIONS, ServerSettings
from server.ui import ui_routes
from tests.endpoint_server import demo_handler
from tests.our_server import OurServer, our_server
from tests.test_readme import OUR_SERVER, blocks

ADDRESS = "http://127.0.0.1:8080"
CURLS = [block for block in blocks("bash", OUR_SERVER) if block.startswith("curl ")]


def tables() -> list[list[list[str]]]:
    """The cells of the section's tables, without their heads."""
    found = re.findall(r"^\|.*?\n\|[-|]+\n((?:\|.*\n)+)", OUR_SERVER, re.MULTILINE)
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines()] for body in found]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OurServer]:
    with demo_handler(tmp_path_factory.mktemp("checkpoint")) as handler, our_server(handler) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run; it holds the sample as ecg.jpg."""
    folder = tmp_path_factory.mktemp("examples")
    assert drawn_sample(folder).name == "ecg.jpg"
    return folder


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("block", CURLS, ids=lambda block: str(CURLS.index(block)))
def test_curl_examples_get_answers(block: str, server: OurServer, folder: Path) -> None:
    command = block.replace(ADDRESS, server.url).replace("curl ", "curl -sS --fail ")
    run = subprocess.run(["bash", "-ec", command], cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    if '"stream": true' in block:
        names = re.findall(r"^event: (\w+)$", run.stdout, re.MULTILINE)
        assert names[:2] + names[-2:] == ["start", "text", "answer", "record"]
    else:
        [record] = json.loads(run.stdout)
        assert record["generated_text"]


def test_python_examples_run(
    server: OurServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {"__name__": "readme"}
    for block in blocks("python", OUR_SERVER):
        exec(compile(block.replace(ADDRESS, server.url), "README.md", "exec"), namespace)
    namespace["client"].close()
    whole, status, streamed = capsys.readouterr().out.splitlines()
    assert whole
    assert status == "api_key_missing"
    assert streamed


def test_the_command_that_starts_it_has_flags_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    [start] = [block for block in blocks("bash", OUR_SERVER) if block.startswith(".venv/bin/python serve.py ")]
    settings = ServerSettings.read(shlex.split(start)[2:], {})
    assert (settings.host, settings.port) == ("127.0.0.1", 8080), "whoever opens it to others does so knowingly"
    makefile = (Path(__file__).parents[1] / "Makefile").read_text("utf-8")
    assert re.search(r"^serve: .*\n(\t.*\n)*\t.*serve\.py --model", makefile, re.MULTILINE)
    assert f"{ServerSettings().host}:{ServerSettings().port}" in makefile


def test_routes_are_those_of_the_code(server: OurServer) -> None:
    app = build_app(Service(ServerSettings(), server.service.limits), ui=ui_routes(), failed=lambda: None)
    paths = {route.path.replace("{name:path}", "NAME") for route in app.routes}  # type: ignore[attr-defined]
    paths = {path for path in paths if not path.startswith("/ui/")}
    named = set(re.findall(r"`(?:GET|POST) (/[^`]*)`", OUR_SERVER))
    assert named == paths


def test_statuses_are_those_of_the_description() -> None:
    rows = {int(status) for status, _ in tables()[1]}
    described = {
        int(status)
        for path in ("/", "/v1/chat/completions")
        for status in document(token=True)["paths"][path]["post"]["responses"]
    }
    assert rows == described | {405}  # of a route that the description does not have
    assert all(HTTPStatus(status) for status in rows)


def test_flags_and_variables_are_those_of_the_code() -> None:
    rows = tables()[2]
    assert [(flag.strip("`"), name.strip("`")) for flag, name, *_ in rows] == [
        (option.flag or "none", option.variable) for option in OPTIONS
    ]
    for option, (_, _, default, _) in zip(OPTIONS, rows, strict=True):
        if default.startswith("`"):
            assert option.parse("", default.strip("`")) == getattr(ServerSettings(), option.name)
        elif default == "none":
            assert not getattr(ServerSettings(), option.name)
