"""The client against a real service that misbehaves: the right status each time, and never past the deadline."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from commentary import service as service_module
from pulse_ecg.config import Settings
from tests.commentary_service import (
    TURKISH,
    Behaviour,
    ChatServer,
    Exchange,
    answer,
    body_drip,
    chat_server,
    completion,
    cut_before_answer,
    cut_in_body,
    endless_body,
    error_body_drip,
    header_drip,
    raw,
    retry_date,
    slow_first_byte,
    status,
)
from utils import Commentary, DeepSeekClient

ROOT = Path(__file__).parents[1]
KEY = "sk-secret-0123456789"
ENGLISH = "Normal sinus rhythm."
REFUSAL = "Üzgünüm, bu konuda yardımcı olamam."
WRONG_LANGUAGE = "The heart is beating in the normal way and there is nothing to worry about in this recording."


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "FIRST_BACKOFF_S", 0.05)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


def client_of(server: ChatServer, *, key: str | None = KEY, model: str = "deepseek-flash") -> DeepSeekClient:
    return DeepSeekClient(Settings(commentary_key=key, commentary_base_url=server.url, commentary_model=model))


def ask(server: ChatServer, *script: Behaviour, timeout_s: float = 5.0, text: str = ENGLISH) -> Commentary:
    if script:
        server.script = list(script)
    client = client_of(server)
    try:
        return client.comment(text, timeout_s=timeout_s)
    finally:
        client.close()


def test_success_carries_the_services_own_name_and_count(server: ChatServer) -> None:
    outcome = ask(server)
    assert outcome.record_fields() == {
        "comment_text": TURKISH,
        "commentary_model": "local-turkish-1",
        "commentary_tokens": 123,
        "commentary_status": "success",
    }


def busy_until_a_date(exchange: Exchange) -> None:
    status(429, f"Retry-After: {retry_date(1)}")(exchange)


RECOVERS: dict[str, Behaviour] = {
    "429": status(429),
    "429 at once": status(429, "Retry-After: 0"),
    "429 with a date": busy_until_a_date,
    "408": status(408),
    "409": status(409),
    "500": status(500),
    "503": status(503, body=b"<html>busy</html>"),
    "cut before the answer": cut_before_answer,
    "cut in the body": cut_in_body,
}


@pytest.mark.parametrize("fault", RECOVERS.values(), ids=list(RECOVERS))
def test_passing_faults_are_retried(server: ChatServer, fault: Behaviour) -> None:
    outcome = ask(server, fault, fault, answer())
    assert (outcome.status, len(server.requests)) == ("success", 3)


PERSISTENT: dict[str, tuple[Behaviour, int, str]] = {
    "429": (status(429), 4, "The commentary service is busy (HTTP 429)."),
    "500": (status(500), 4, "The commentary service has a fault (HTTP 500)."),
    "400": (status(400), 1, "The commentary service did not accept the request (HTTP 400)."),
    "401": (status(401), 1, "The commentary service did not accept the key (HTTP 401)."),
    "402": (status(402), 1, "The commentary service has no balance left for the key (HTTP 402)."),
    "404": (status(404), 1, "The commentary service does not know the model or the address (HTTP 404)."),
    "redirect": (status(307, "Location: http://127.0.0.1:9/"), 1, "The commentary service did not answer (HTTP 307)."),
    "cut": (cut_in_body, 4, "The commentary service could not be reached."),
    "invalid JSON": (raw(b"{"), 1, "The commentary service sent something that is no chat answer."),
    "deep JSON": (raw(b"[" * 500_000), 1, "The commentary service sent something that is no chat answer."),
    "no JSON": (raw(b"<html>"), 1, "The commentary service sent something that is no chat answer."),
    "a list": (raw(b"[1]"), 1, "The commentary service sent something that is no chat answer."),
    "empty choices": (answer(choices=[]), 1, "The commentary service sent something that is no chat answer."),
    "no message": (answer(choices=[{}]), 1, "The commentary service sent something that is no chat answer."),
    "null content": (answer(None), 1, "The commentary service sent an empty answer."),
    "thoughts alone": (answer("<think>hm"), 1, "The commentary service sent an empty answer."),
    "filtered": (answer("x", "content_filter"), 1, "The commentary service declined to answer."),
    "huge": (endless_body(), 1, "The commentary service sent more than an answer can hold."),
    "huge error": (endless_body(500), 1, "The commentary service sent more than an answer can hold."),
    "compressed": (
        endless_body(200, "Content-Encoding: gzip"), 1, "The commentary service sent more than an answer can hold.",
    ),
    "refusal": (answer(REFUSAL), 2, "The commentary departed from the English answer ("),
    "wrong language": (answer(WRONG_LANGUAGE), 2, "The commentary departed from the English answer ("),
    "cut off": (answer(TURKISH, "length"), 2, "The commentary departed from the English answer (cut_off)."),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "requests", "reason"), PERSISTENT.values(), ids=list(PERSISTENT))
def test_lasting_faults_fail_with_a_safe_reason(
    server: ChatServer, fault: Behaviour, requests: int, reason: str
) -> None:
    outcome = ask(server, fault, timeout_s=10.0)
    assert (outcome.status, outcome.text, len(server.requests)) == ("failed", "", requests)
    assert outcome.error.startswith(reason)
    assert outcome.record_fields()["commentary_error"] == outcome.error


SLOW: dict[str, Behaviour] = {
    "first byte": slow_first_byte(),
    "headers": header_drip,
    "body": body_drip,
    "error body": error_body_drip,
}


@pytest.mark.parametrize("fault", SLOW.values(), ids=list(SLOW))
def test_slowness_ends_at_the_deadline(server: ChatServer, fault: Behaviour) -> None:
    server.script = [fault]
    client = client_of(server)
    started = time.monotonic()
    outcome = client.comment(ENGLISH, timeout_s=1.0)
    assert 0.9 < time.monotonic() - started < 4
    assert (outcome.status, outcome.error) == ("failed", "The commentary service did not answer in time.")
    assert connections_to(server) == 0
    server.script = [answer()]
    assert client.comment(ENGLISH, timeout_s=5.0).status == "success"
    assert [thread.name for thread in threading.enumerate()].count("commentary") == 1
    client.close()
    assert "commentary" not in [thread.name for thread in threading.enumerate()]
    assert connections_to(server) == 0


def connections_to(server: ChatServer) -> int:
    """Client ends of this process's connections to the server."""
    port = server.server_address[1]
    return sum(
        bool(entry.raddr) and entry.raddr.port == port and entry.status == psutil.CONN_ESTABLISHED
        for entry in psutil.Process().net_connections("tcp")
    )


def test_retry_after_is_honoured_within_the_deadline(server: ChatServer) -> None:
    started = time.monotonic()
    assert ask(server, status(429, "Retry-After: 1"), answer()).status == "success"
    assert time.monotonic() - started >= 1.0
    started = time.monotonic()
    outcome = ask(server, status(429, "Retry-After: 60"), answer(), timeout_s=3.0)
    assert (outcome.status, time.monotonic() - started < 2.5) == ("failed", True)


def test_a_service_that_is_not_there() -> None:
    settings = Settings(commentary_key=KEY, commentary_base_url="http://127.0.0.1:9/v1")
    client = DeepSeekClient(settings)
    outcome = client.comment(ENGLISH, timeout_s=5.0)
    client.close()
    assert (outcome.status, outcome.error) == ("failed", "The commentary service could not be reached.")
    assert outcome.model == "deepseek-flash"


def test_statuses_that_ask_nobody(server: ChatServer) -> None:
    assert client_of(server, key=None).comment(ENGLISH, timeout_s=1).status == "api_key_missing"
    assert client_of(server).comment(" \n", timeout_s=1).status == "no_text"
    assert client_of(server, key="sk-ş secret").comment(ENGLISH, timeout_s=1).status == "failed"
    assert Commentary.unavailable("m").record_fields() == {
        "comment_text": "", "commentary_model": "m", "commentary_tokens": 0, "commentary_status": "unavailable",
    }  # fmt: skip
    assert server.requests == []


def test_a_critical_finding_is_asked_once_more(server: ChatServer) -> None:
    outcome = ask(server, answer(REFUSAL, usage={"total_tokens": 7}), answer())
    assert (outcome.status, outcome.text, outcome.tokens, outcome.tokens_spent) == ("success", TURKISH, 123, 130)
    first, second = (body["messages"] for _, body in server.requests)
    assert first != second


def test_no_time_to_ask_again(server: ChatServer) -> None:
    outcome = ask(server, answer(REFUSAL), slow_first_byte(), timeout_s=1.0)
    assert outcome.status == "failed" and "no time was left" in outcome.error
    assert outcome.record_fields()["commentary_warnings"]


def test_one_connection_serves_many_calls(server: ChatServer) -> None:
    client = client_of(server)
    assert {client.comment(ENGLISH, timeout_s=5).status for _ in range(5)} == {"success"}
    assert server.connections == 1
    client.close()


def test_a_batch_is_asked_side_by_side_and_in_order(server: ChatServer) -> None:
    def behave(exchange: Exchange) -> None:
        time.sleep(0.4)
        answer()(exchange)

    server.script = [behave]
    client = client_of(server)
    started = time.monotonic()
    outcomes = client.comment_all([ENGLISH, "", *[ENGLISH] * 6], timeout_s=10)
    assert [outcome.status for outcome in outcomes] == ["success", "no_text", *["success"] * 6]
    assert time.monotonic() - started < 1.6
    client.close()


def test_many_threads_share_a_client(server: ChatServer) -> None:
    client = client_of(server)
    outcomes: list[Commentary] = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(client.comment(ENGLISH, timeout_s=10))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.status for outcome in outcomes] == ["success"] * 16
    client.close()


def test_without_a_thread_for_now_the_next_commentary_is_as_good_as_any(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(server)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        assert client.comment(ENGLISH, timeout_s=5).status == "failed"
    assert client.comment(ENGLISH, timeout_s=5).status == "success"
    client.close()


def test_thinking_is_switched_off_for_deepseek_alone_and_dropped_when_refused(server: ChatServer) -> None:
    refused = status(422, body=b'{"error": "Unexpected keys in the request: {\'thinking\'}"}')
    server.script = [refused, answer()]
    client = client_of(server)
    assert [client.comment(ENGLISH, timeout_s=5).status for _ in range(2)] == ["success", "success"]
    sent = [body.get("thinking") for _, body in server.requests]
    assert sent == [{"type": "disabled"}, None, None]
    client.close()
    other = client_of(server, model="qwen3")
    assert other.comment(ENGLISH, timeout_s=5).status == "success"
    assert "thinking" not in server.requests[-1][1]
    other.close()


def test_a_refusal_that_repeats_the_whole_request_switches_nothing_off(server: ChatServer) -> None:
    client = client_of(server)
    assert client.comment(ENGLISH, timeout_s=5).status == "success"
    echo = status(400, body=json.dumps({"error": "bad", "input": server.requests[0][1]}).encode())
    server.script = [echo, echo, answer()]
    assert client.comment(ENGLISH, timeout_s=5).status == "failed"
    assert client.comment(ENGLISH, timeout_s=5).status == "success"
    client.close()
    first, _, _, last = (body for _, body in server.requests)
    assert last == first


def test_only_the_answer_leaves_and_no_content_is_logged(
    server: ChatServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-another-service")
    caplog.set_level(logging.DEBUG)
    client = client_of(server)
    assert client.comment(ENGLISH, timeout_s=5).status == "success"
    server.script = [status(401, body=f'{{"error": "bad key {KEY}"}}'.encode())]
    failed = client.comment(ENGLISH, timeout_s=5)
    client.close()
    headers, body = server.requests[0]
    assert set(headers) <= {
        "host", "accept", "accept-encoding", "authorization", "connection", "content-length", "content-type",
        "user-agent", "x-stainless-raw-response",
    }  # fmt: skip
    assert set(body) == {"model", "messages", "temperature", "max_tokens", "thinking"}
    logged = "\n".join(f"{record.getMessage()} {record.exc_text or ''}" for record in caplog.records)
    for secret in (KEY, "sinus", "sinüs", "atımlarınız"):
        assert secret not in logged
    assert KEY not in repr(client) + repr(failed) + failed.error


def test_counts_and_names_that_no_encoder_takes_are_left_out(server: ChatServer) -> None:
    odd = answer("\ud800\x00" + TURKISH, model="a\nb", usage={"total_tokens": "12"})
    outcome = ask(server, lambda exchange: exchange.send(200, completion()), text="Normal \ud800 sinus rhythm.")
    assert outcome.status == "success"
    outcome = ask(server, odd)
    assert (outcome.model, outcome.tokens) == ("deepseek-flash", 0)
    outcome.text.encode()


def run_elsewhere(code: str, folder: Path, **environment: str) -> str:
    """The output of a fresh interpreter in another folder, which must print no error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.strip()


def test_utils_imports_no_torch_and_needs_only_its_folder_on_the_path(tmp_path: Path) -> None:
    code = """
import sys, utils
print(utils.DeepSeekClient().comment("x", timeout_s=1).status, "torch" in sys.modules)
"""
    said = run_elsewhere(code, tmp_path, PYTHONPATH=str(ROOT), deep_key="", DEEPSEEK_API_KEY="")
    assert said == "api_key_missing False"


@pytest.mark.parametrize(
    "environment",
    [{"HTTPS_PROXY": "bogus://proxy"}, {"ALL_PROXY": "socks5://127.0.0.1:1"}, {"SSL_CERT_FILE": "/not/there"}],
    ids=lambda environment: next(iter(environment)),
)
def test_a_client_that_cannot_be_set_up_is_unavailable_rather_than_the_end_of_the_start(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ImportError) as caught:
        DeepSeekClient(Settings(commentary_key=KEY, commentary_base_url="https://service.invalid/v1"))
    assert str(caught.value.name).startswith("openai (")
    assert KEY not in repr(caught.value)


@pytest.mark.parametrize("fault", ["ImportError('not installed')", "TypeError('of another version')"])
def test_without_the_openai_package_the_monitor_still_loads(fault: str, tmp_path: Path) -> None:
    (tmp_path / "openai.py").write_text(f"raise {fault}\n")
    code = """
import utils
utils.PerformanceMonitor()
try:
    utils.DeepSeekClient()
except ImportError:
    print(utils.Commentary.unavailable().status)
"""
    assert run_elsewhere(code, tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}") == "unavailable"
