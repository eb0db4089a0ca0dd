"""`python serve.py` from its start to its end: loading, health, signals, exit statuses, log."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from handler import EndpointHandler
from pulse_ecg.call import DEFAULT_MODEL_NAME
from pulse_ecg.errors import ImageError
from server.ui import ui_routes
from tests.our_server import (
    PATIENCE,
    OurServer,
    ServerProcess,
    our_server,
    received,
    request,
    server_process,
    start,
    until,
)

PLAIN: dict[str, Any] = {"max_new_tokens": 4, "enable_turkish_commentary": False}
LONG: dict[str, Any] = {**PLAIN, "max_new_tokens": 120, "stop": [], "seed": 1}
TYPE = "Content-Type: application/json"


@pytest.fixture
def process(demo_checkpoint: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(tmp_path, "--model", str(demo_checkpoint)) as running:
        yield running


def post(server: ServerProcess, **changes: Any) -> requests.Response:
    return server.post("/", {"inputs": "Patient Jane Doe?", "parameters": LONG, **changes})


# --- the start


def test_a_life_from_loading_to_sigterm_without_content_in_the_log(process: ServerProcess) -> None:
    health = process.get("/health")  # torch alone takes longer to import
    assert (health.status_code, health.json()) == (503, {"status": "loading"})
    response = process.post("/?Jane", {"inputs": "Rate?"})
    assert (response.status_code, len(response.json()), "retry-after" in response.headers) == (503, 1, True)
    assert process.post("/v1/chat/completions", {}).json()["error"]["type"] == "server_error"
    assert process.get("/v1/models").status_code == 503
    assert process.get("/metrics").status_code == process.get("/openapi.json").status_code == 200
    assert process.get("/ready").json()["ready"] is False
    process.wait_for_health()
    assert process.get("/health").json() == {"status": "ok"}
    assert process.get("/ready").json() == {
        "ready": True,
        "running": 0,
        "waiting": 0,
        "max_concurrent_requests": 8,
        "max_queued_requests": 64,
    }
    metrics = process.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    assert "pulse_ready 1.0" in metrics.text
    assert 'pulse_http_responses_total{route="/health",status="503"}' in metrics.text
    assert "pulse_stage_seconds_bucket" in metrics.text
    text = post(process).json()[0]["generated_text"]
    process.get("/Jane?name=Jane")
    process.post("/?Jane=Jane", b"Jane")
    process.exchange(b"Jane\r\n\r\n")
    assert process.terminate() == 0
    assert "POST / 200" in process.log
    assert not any(content in process.log for content in ("Jane", text[:12]))


def test_a_model_that_cannot_be_loaded_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"secret")
    process = start(tmp_path / "log", "--model", str(tmp_path / "model"))
    assert process.wait(PATIENCE) == 1
    log = (tmp_path / "log").read_text("utf-8")
    assert "The model could not be loaded: " in log
    assert "config.json" in log
    assert "Traceback" not in log
    assert str(tmp_path) not in log


def test_a_model_that_does_not_answer_is_not_served(handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    from server import service

    monkeypatch.setattr("handler.EndpointHandler", lambda _path: handler)
    assert service.load_handler("") is handler
    with monkeypatch.context() as broken:
        broken.setattr(handler._analyzer, "stream", lambda *_, **__: 1 / 0)
        with pytest.raises(Exception, match="internal error"):
            service.load_handler("")


def test_a_panic_while_loading_ends_the_server(handler: EndpointHandler, caplog: pytest.LogCaptureFixture) -> None:
    """It would say for ever that the model is being loaded."""
    go = threading.Event()

    def load(_model: str) -> EndpointHandler:
        assert go.wait(PATIENCE)
        raise BaseException("/srv/secret")  # as a Rust library's panic: no Exception

    with our_server(handler, load=load) as server:
        assert server.post("/", {"inputs": "Rate?"}).json()[0]["model"] == DEFAULT_MODEL_NAME
        go.set()
        until(lambda: server.service.failed and server.server.should_exit, patience=10)
    assert "The model could not be loaded: BaseException at test_serve_process.py" in caplog.text
    assert "secret" not in caplog.text


def test_a_hub_id_is_not_answered_by_weights_beside_the_handler(
    handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler looks there first when it is given no folder."""
    from server import service

    asked: list[str] = []
    monkeypatch.setattr("handler.EndpointHandler", lambda path: asked.append(path) or handler)
    monkeypatch.setenv("PULSE_MODEL_ID", "somebody/else")
    service.load_handler("our/model")
    assert os.environ["PULSE_MODEL_ID"] == "our/model"
    [path] = asked
    assert Path(path).is_dir() and not any(Path(path).glob("*.safetensors"))


def test_a_setting_that_cannot_be_used_ends_the_process_before_the_port_is_open(tmp_path: Path) -> None:
    process = start(tmp_path / "log", PULSE_MAX_QUEUED_REQUESTS="many")
    assert process.wait(PATIENCE) == 2
    log = (tmp_path / "log").read_text("utf-8")
    assert "PULSE_MAX_QUEUED_REQUESTS is 'many'" in log
    assert "running on" not in log
    assert "Traceback" not in log


def test_a_port_that_is_taken_ends_the_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(tmp_path / "log", "--port", str(taken.getsockname()[1]))
        assert process.wait(PATIENCE) not in (0, None)
        log = (tmp_path / "log").read_text("utf-8")
        assert f"cannot listen on host 127.0.0.1, port {taken.getsockname()[1]}" in log
    assert "address already in use" in log


# --- the end


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_ends_it_at_once(process: ServerProcess, sig: int) -> None:
    process.process.send_signal(sig)
    assert process.process.wait(10) == 0


def test_no_accepted_request_is_lost(process: ServerProcess) -> None:
    process.wait_for_health()
    reference = post(process).json()

    def stream(_: int) -> str:
        with process.connect() as sock:
            body = json.dumps({"inputs": "Patient Jane Doe?", "stream": True, "parameters": LONG}).encode()
            sock.sendall(request("/", body, TYPE))
            return received(sock, quiet=PATIENCE).decode()

    with ThreadPoolExecutor(16) as threads, process.connect() as idle, process.connect() as late:
        whole = [threads.submit(post, process) for _ in range(12)]
        streams = [threads.submit(stream, number) for number in range(4)]

        def present() -> int:
            state = process.get("/ready").json()
            return int(state["running"] + state["waiting"])

        until(lambda: present() == 16)
        idle.sendall(request("/health", b"", method="GET"))
        assert b"200 OK" in idle.recv(65536)
        process.process.send_signal(signal.SIGTERM)
        until(lambda: "Shutting down:" in process.log)
        late.sendall(request("/", b'{"inputs": "Rate?"}', TYPE))
        assert b"503 Service Unavailable" in late.recv(65536)
        health = process.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        answers = [future.result(PATIENCE) for future in whole]
        assert {answer.status_code for answer in answers} == {200}
        assert all(answer.json() == reference for answer in answers)
        for told in [future.result(PATIENCE) for future in streams]:
            last = told.split("event: record\r\n" if "record\r\n" in told else "event: record\n")[-1]
            assert json.dumps(reference[0]["generated_text"], ensure_ascii=False)[1:-1] in last
    assert process.process.wait(PATIENCE) == 0


def test_what_is_not_answered_in_time_is_told_so(handler: EndpointHandler) -> None:
    slow = {"inputs": "Rate?", "parameters": {**LONG, "max_new_tokens": 2048}}
    with our_server(handler, drain_timeout=1.0) as server, ThreadPoolExecutor(12) as threads:
        answers = [threads.submit(server.post, "/", {**slow, "stream": number % 2 == 0}) for number in range(12)]
        until(lambda: handler.admission.running == 8)
        server.drain()
        told = [answer.result(PATIENCE) for answer in answers]
    given_up = "The server was stopped before the answer was finished."
    assert {answer.status_code for answer in told} <= {200, 503}
    assert sum(given_up in answer.text for answer in told) >= 4
    assert all(answer.text.count("event: error") == 1 for answer in told if answer.status_code == 200)
    assert handler.admission.running == handler.admission.waiting == 0


def test_a_second_signal_stops_at_once(handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a request is at work that would take as long as the first signal waits for it."""
    go, at_work = threading.Event(), threading.Event()

    def slow(request: Any, **how: Any) -> Any:
        at_work.set()
        assert go.wait(PATIENCE)
        raise ImageError("It was let go.")

    monkeypatch.setattr(handler._analyzer, "prepare", slow)
    try:
        with our_server(handler, drain_timeout=PATIENCE) as server, server.connect() as sock:
            sock.sendall(request("/", json.dumps({"inputs": "?"}).encode(), TYPE))
            assert at_work.wait(PATIENCE)
            for _ in range(2):
                server.server.handle_exit(signal.SIGTERM, None)
                until(lambda: server.service.phase == "draining")
            until(lambda: not server.server.server_state.connections, patience=10)
            assert not go.is_set()
            go.set()
    finally:
        go.set()


def test_draining_and_loading_are_told_apart(handler: EndpointHandler) -> None:
    loaded = threading.Event()

    def load(_model: str) -> EndpointHandler:
        assert loaded.wait(PATIENCE)
        return handler

    with our_server(handler, load=load) as server:
        assert server.get("/health").json() == {"status": "loading"}
        loaded.set()
        until(lambda: server.service.phase == "ok")
        assert server.get("/health").json() == {"status": "ok"}
        server.quiet()
        with server.connect() as sock:
            sock.sendall(request("/", b"{", TYPE)[:-1])  # its body is still to come: accepted
            until(lambda: server.service._exchanges == 1)
            server.drain()
            until(lambda: server.service.phase == "draining")
            response = server.get("/ready")
            assert (response.status_code, response.json()["ready"]) == (503, False)
            sock.sendall(b"{")
            assert b"400 Bad Request" in received(sock, quiet=PATIENCE)


def test_requests_are_accepted_until_a_proxy_has_taken_notice(handler: EndpointHandler) -> None:
    asked = {"inputs": "Rate?", "parameters": PLAIN}
    with our_server(handler, drain_delay=2.0) as server, server.connect() as sock:
        sock.sendall(request("/", b"{", TYPE)[:-1])  # its body is still to come: it keeps the server from ending
        until(lambda: server.service._exchanges == 1)
        assert "connection" not in server.post("/", asked).headers
        server.drain()
        until(lambda: server.service.phase == "draining")
        assert server.get("/health").status_code == server.get("/ready").status_code == 503
        accepted = server.post("/", asked)
        assert (accepted.status_code, accepted.headers["connection"]) == (200, "close")
        until(lambda: server.service._refusing)
        assert server.post("/", asked).status_code == 503
        sock.sendall(b"{")
        assert b"400 Bad Request" in received(sock, quiet=PATIENCE)


# --- files


def test_the_page_is_served_where_it_is_wanted(handler: EndpointHandler) -> None:
    with our_server(handler, ui=ui_routes(), api_token="sesame-7") as server:
        for path in ("/ui", "/ui/"):
            page = requests.get(server.url + path, timeout=PATIENCE)
            assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
            assert "script-src 'self'" in page.headers["content-security-policy"]
        scripts = re.findall(r'<script[^>]* src="([^"]+)"', page.text)
        assert scripts
        for script in scripts:
            found = requests.get(f"{server.url}/{script}", timeout=PATIENCE)
            assert (found.status_code, found.headers["content-type"]) == (200, "text/javascript; charset=utf-8")
        for path in ("/ui/secret.env", "/ui/nothing.js", "/ui/../serve.py", "/ui/%2e%2e/serve.py", "/ui//page.js"):
            assert requests.get(server.url + path, timeout=PATIENCE).status_code in (401, 404)
    with our_server(handler, ui=ui_routes()) as server:
        assert server.get("/").url == f"{server.url}/ui"
        assert server.post("/", {"inputs": "?", "parameters": {**LONG, "max_new_tokens": 2}}).status_code == 200
    with our_server(handler) as server:
        assert (server.get("/ui").status_code, server.get("/").status_code) == (404, 405)


def test_a_server_on_another_handler_meets_nobody(handler: EndpointHandler) -> None:
    with our_server(handler) as first, our_server(handler) as second:
        assert isinstance(first, OurServer)
        assert first.get("/nowhere").status_code == 404
        assert 'route="other"' not in second.get("/metrics").text
