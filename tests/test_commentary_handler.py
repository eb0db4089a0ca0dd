"""The real handler against a real service that misbehaves: the answer stays, the right status comes, in time."""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from commentary import service as service_module
from handler import EndpointHandler
from tests.commentary_service import (
    TURKISH,
    Behaviour,
    ChatServer,
    answer,
    body_drip,
    chat_server,
    cut_before_answer,
    cut_in_body,
    endless_body,
    error_body_drip,
    header_drip,
    raw,
    slow_first_byte,
    status,
)

KEY = "sk-secret-0123456789"
QUESTION = "Is Jane Doe's rhythm regular?"
GREEDY = {"max_new_tokens": 6, "do_sample": False}
SHORTEST_TIMEOUT_S = 10  # of those that `deepseek_timeout` accepts

FAULTS: dict[str, tuple[Behaviour, str]] = {
    "429": (status(429), "is busy (HTTP 429)"),
    "429, come back in a minute": (status(429, "Retry-After: 60"), "is busy (HTTP 429)"),
    "500": (status(500), "has a fault (HTTP 500)"),
    "401": (status(401, body=f"bad key {KEY}".encode()), "did not accept the key (HTTP 401)"),
    "cut before the answer": (cut_before_answer, "could not be reached"),
    "cut in the body": (cut_in_body, "could not be reached"),
    "invalid JSON": (raw(b"{"), "sent something that is no chat answer"),
    "empty choices": (answer(choices=[]), "sent something that is no chat answer"),
    "empty answer": (answer(""), "sent an empty answer"),
    "huge": (endless_body(), "sent more than an answer can hold"),
    "long": (answer("kalp " * 300_000), "departed from the English answer (length)"),
    "wrong language": (
        answer("The heart is beating in the normal way and nothing in this recording is a reason to worry."),
        "departed from the English answer (language)",
    ),
    "refusal": (answer("Üzgünüm, bu konuda yardımcı olamam."), "departed from the English answer (refusal)"),
    "addition": (
        answer(TURKISH + " Ayrıca ventriküler fibrilasyon var."), "departed from the English answer (addition)",
    ),
    "cut off": (answer(TURKISH, "length"), "departed from the English answer (cut_off)"),
}  # fmt: skip


@contextmanager
def handler_with(checkpoint: Path, **environment: str) -> Iterator[EndpointHandler]:
    foreign = ("PULSE_", "DEEPSEEK_", "deep_key")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    with mock.patch.dict(os.environ, {**environ, "PULSE_DEVICE": "cpu", **environment}, clear=True):
        handler = EndpointHandler(str(checkpoint))
        yield handler
        if handler._commentary is not None:
            handler._commentary.close()


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


@pytest.fixture(scope="module")
def commented(server: ChatServer, demo_checkpoint: Path) -> Iterator[EndpointHandler]:
    """A handler whose commentary service is the local one."""
    with (
        mock.patch.object(service_module, "FIRST_BACKOFF_S", 0.02),
        handler_with(demo_checkpoint, deep_key=KEY, DEEPSEEK_BASE_URL=server.url) as handler,
    ):
        yield handler


def ask(handler: EndpointHandler, server: ChatServer, *script: Behaviour, **parameters: object) -> dict[str, Any]:
    server.script = list(script)
    server.requests.clear()
    [record] = handler({"inputs": QUESTION, "parameters": GREEDY | parameters})
    return record


def english(handler: EndpointHandler) -> str:
    [record] = handler({"inputs": QUESTION, "parameters": GREEDY | {"enable_turkish_commentary": False}})
    text: str = record["generated_text"]
    return text


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=list(FAULTS))
def test_a_fault_of_the_service_leaves_the_answer_as_it_is(
    commented: EndpointHandler, server: ChatServer, fault: Behaviour, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    record = ask(commented, server, fault, details=True)
    assert (record["commentary_status"], record["comment_text"]) == ("failed", "")
    assert reason in record["commentary_error"]
    assert record["generated_text"] == english(commented)
    assert record["details"]["timings"]["commentary"] < SHORTEST_TIMEOUT_S
    for secret in (KEY, QUESTION, record["generated_text"]):
        assert secret not in caplog.text + record["commentary_error"]


def test_slowness_of_every_kind_ends_at_the_deadline(commented: EndpointHandler, server: ChatServer) -> None:
    server.script = [slow_first_byte(), header_drip, body_drip, error_body_drip]
    parameters = GREEDY | {"deepseek_timeout": SHORTEST_TIMEOUT_S, "details": True}
    records = commented({"inputs": [QUESTION] * len(server.script), "parameters": parameters})
    assert {record["commentary_status"] for record in records} == {"failed"}
    assert {record["commentary_error"] for record in records} == {"The commentary service did not answer in time."}
    assert {record["generated_text"] for record in records} == {english(commented)}
    for record in records:
        assert record["details"]["timings"]["commentary"] <= SHORTEST_TIMEOUT_S + 0.5


def test_passing_faults_cost_retries_alone(commented: EndpointHandler, server: ChatServer) -> None:
    record = ask(commented, server, status(429, "Retry-After: 1"), cut_in_body, answer())
    assert (record["commentary_status"], len(server.requests)) == ("success", 3)
    assert "commentary_error" not in record


def test_name_and_count_are_the_services_own_and_only_the_answer_leaves(
    commented: EndpointHandler, server: ChatServer, sample_png: bytes
) -> None:
    server.script = [answer()]
    server.requests.clear()
    image = base64.b64encode(sample_png).decode()
    before = commented.monitor.snapshot()
    [record] = commented({"inputs": {"query": QUESTION, "image": image}, "parameters": GREEDY})
    assert record["comment_text"] == TURKISH
    assert (record["commentary_model"], record["commentary_tokens"]) == ("local-turkish-1", 123)
    [(headers, body)] = server.requests
    assert body["model"] == "deepseek-flash"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert body["messages"][1]["content"].splitlines()[1:-1] == record["generated_text"].splitlines()
    for private in (QUESTION, "Jane", image[:40], KEY):
        assert private not in str(body)
    after = commented.monitor.snapshot()
    assert after["commentary"]["success"] == before["commentary"].get("success", 0) + 1
    assert after["tokens"]["commentary"] == before["tokens"].get("commentary", 0) + 123


def test_an_empty_answer_has_no_text_to_comment_on(commented: EndpointHandler, server: ChatServer) -> None:
    record = ask(commented, server, answer(), stop=english(commented)[0])
    assert (record["generated_text"], record["commentary_status"]) == ("", "no_text")
    assert server.requests == []


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "api_key_missing"),
        ({"deep_key": KEY, "SSL_CERT_FILE": "/not/there"}, "unavailable"),
        ({"deep_key": "sk-\u015f", "DEEPSEEK_BASE_URL": "http://127.0.0.1:9"}, "failed"),
        ({"DEEPSEEK_API_KEY": KEY, "DEEPSEEK_BASE_URL": "http://127.0.0.1:9"}, "failed"),
    ],
    ids=["no key", "no client", "no usable key", "no service"],
)
def test_a_set_up_that_cannot_work_says_so_and_answers(
    environment: dict[str, str], said: str, demo_checkpoint: Path, commented: EndpointHandler
) -> None:
    with handler_with(demo_checkpoint, **environment) as handler:
        [record] = handler({"inputs": QUESTION, "parameters": GREEDY})
    assert (record["commentary_status"], record["comment_text"]) == (said, "")
    assert record["generated_text"] == english(commented)
    assert KEY not in str(record)
