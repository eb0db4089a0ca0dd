"""The description is true: schemathesis finds no answer that it does not allow, and what streams tell is in it too."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from handler import EndpointHandler
from pulse_ecg.errors import ParameterError
from pulse_ecg.params import _READERS, GenerationParams
from pulse_ecg.request import EMPTY_IN_MESSAGES
from server.app import build_app
from server.chat_request import READ
from server.openapi import document
from server.schemas import PARAMETERS, SCHEMAS
from server.service import Service
from server.settings import ServerSettings
from tests.our_server import JSON, OurServer, our_server

EXAMPLES = 15
MOST_NEW_TOKENS = 2
# What is valid by the schema can still be no image, or no conversation.  413 is for a list that is too long.
CONFIGURATION = """\
[checks]
positive_data_acceptance.enabled = false
negative_data_rejection.expected-statuses = [400, 401, 404, 405, 413, 422, 429]
"""


@pytest.fixture
def server(handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> Iterator[OurServer]:
    """It fetches no images, and its answers are short whatever is asked for."""
    stream = handler._analyzer.stream

    def short(prepared: Any, **options: Any) -> Any:
        params = replace(prepared.request.params, max_new_tokens=MOST_NEW_TOKENS)
        return stream(replace(prepared, request=replace(prepared.request, params=params)), **options)

    monkeypatch.setattr(handler._analyzer, "stream", short)
    policy = replace(handler._analyzer._policy, allowed_hosts=frozenset({"images.invalid"}))
    monkeypatch.setattr(handler._analyzer, "_policy", policy)
    with our_server(handler, api_token="sesame-7") as running:
        yield running


def test_schemathesis_finds_nothing(server: OurServer, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
    command += ["--header", "Authorization: Bearer sesame-7", "--exclude-path", "/predict", "--continue-on-failure"]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES), "--seed", "7", "--no-color"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    found = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    assert found is not None
    assert int(found[1]) == int(found[2]) > 500


# --- streams


def validator(schema: Any) -> Any:
    return jsonschema_rs.Draft202012Validator({**schema, "components": {"schemas": SCHEMAS}})


def content_schema(event: str, name: str) -> Any:
    """The schema of the JSON in an event's data."""
    [found] = [
        option["properties"]["data"]["contentSchema"]
        for option in SCHEMAS[event]["anyOf"]
        if "contentSchema" in option["properties"]["data"]
        and option["properties"].get("event", {"const": ""})["const"] == name
    ]
    return found


@pytest.mark.parametrize("parameters", [{"details": True}, {"max_new_tokens": 5}], ids=str)
def test_events_are_as_described(
    server: OurServer, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch, parameters: Any
) -> None:
    authorized = {**JSON, "Authorization": "Bearer sesame-7"}
    seen = set()
    for fail in (False, True):
        if fail:
            monkeypatch.setattr(handler._analyzer, "stream", lambda *_, **__: 1 / 0)
        body = {"inputs": "Rate?", "stream": True, "parameters": parameters}
        text = server.post("/", body, headers=authorized).text
        for name, data in re.findall(r"^event: (.*)\ndata: (.*)\n\n", text, re.MULTILINE):
            validator(content_schema("NativeEvent", name)).validate(json.loads(data))
            seen.add(name)
        chat = {"messages": [{"role": "user", "content": "Rate?"}], "stream": True, "turkish_commentary": True}
        chat["stream_options"] = {"include_usage": True}
        text = server.post("/v1/chat/completions", chat, headers=authorized).text
        for data in re.findall(r"^data: (\{.*)\n\n", text, re.MULTILINE):
            validator(content_schema("ChatEvent", "")).validate(json.loads(data))
    assert seen == {"start", "text", "answer", "record", "error"}


# --- what it says


def test_parameters_and_their_ranges_are_the_codes(default_params: GenerationParams) -> None:
    assert list(PARAMETERS) == list(_READERS) == [field.name for field in fields(GenerationParams)]
    for name, schema in PARAMETERS.items():
        bounded = next((option for option in schema.get("anyOf", [schema]) if "minimum" in option), {})
        for bound, beyond in (("minimum", -1), ("maximum", 1)):
            if bound in bounded:
                assert _READERS[name](name, bounded[bound]) == bounded[bound]
                step = 1 if bounded["type"] == "integer" else 0.001
                with pytest.raises(ParameterError):
                    _READERS[name](name, bounded[bound] + beyond * step)
        if "default" in schema:
            assert getattr(default_params, name) == schema["default"]


def test_every_field_that_is_read_is_described() -> None:
    assert set(SCHEMAS["ChatCompletionRequest"]["properties"]) >= READ


def test_an_answer_may_be_sent_back_as_it_came() -> None:
    message = SCHEMAS["Message"]["properties"]
    for request in ("Chat", "ChatCompletionRequest"):
        items = SCHEMAS[request]["properties"]["messages"]["items"]
        assert items == {"$ref": "#/components/schemas/Message"}
    assert set(message) > EMPTY_IN_MESSAGES
    for nothing in (None, "", [], {}):
        assert all(jsonschema_rs.is_valid(message[name], nothing) for name in EMPTY_IN_MESSAGES)
    assert not any(jsonschema_rs.is_valid(message[name], "x") for name in EMPTY_IN_MESSAGES)


def test_every_route_is_described(handler: EndpointHandler) -> None:
    service = Service(ServerSettings(), handler._settings)
    app = build_app(service, failed=lambda: None)
    routes = {(route.path.replace(":path", ""), method) for route in app.routes for method in route.methods - {"HEAD"}}  # type: ignore[attr-defined]
    described = {(path, method.upper()) for path, item in document(token=False)["paths"].items() for method in item}
    assert described == routes


def test_every_reference_leads_somewhere_and_every_schema_is_used() -> None:
    text = json.dumps(document(token=True))
    named = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert named == set(SCHEMAS)
    for schema in SCHEMAS.values():
        validator(schema)
