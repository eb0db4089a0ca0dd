"""A caller who hangs up is worked for no longer: within one token, wherever the request stands."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from handler import EndpointHandler
from pulse_ecg.admission import Admission
from pulse_ecg.generation import Answer, Timings
from tests.our_server import PATIENCE, OurServer, our_server, request, until
from tests.servers import ImageHost, silent
from utils import Commentary

LONG: dict[str, Any] = {"max_new_tokens": 2000, "stop": [], "enable_turkish_commentary": False}
TYPE = "Content-Type: application/json"


class Paced:
    """The engine, each token of which the test lets through; ``cancels`` are those of the answers asked for."""

    def __init__(self, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = threading.Semaphore(0)
        self.let_through = 0
        self.cancels: list[Any] = []
        stream, push = handler._analyzer.stream, Answer.push

        def paced_stream(prepared: Any, **options: Any) -> Any:
            self.cancels.append(options["cancel"])
            return stream(prepared, **options)

        def paced_push(answer: Answer, token_id: int, timings: Timings) -> bool:
            assert self.tokens.acquire(timeout=PATIENCE)
            self.let_through += 1
            return push(answer, token_id, timings)

        monkeypatch.setattr(handler._analyzer, "stream", paced_stream)
        monkeypatch.setattr(Answer, "push", paced_push)


@pytest.fixture(scope="module")
def server(handler: EndpointHandler) -> Iterator[OurServer]:
    with our_server(handler) as running:
        yield running


@pytest.fixture
def paced(handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> Iterator[Paced]:
    pace = Paced(handler, monkeypatch)
    monkeypatch.setattr(handler, "_admission", Admission(1, 1))
    yield pace
    pace.tokens.release(10_000)


def native(inputs: object = "Rate?", *, stream: bool = False, **parameters: object) -> bytes:
    return request(
        "/", json.dumps({"inputs": inputs, "stream": stream, "parameters": LONG | parameters}).encode(), TYPE
    )


def chat(*, stream: bool = False) -> bytes:
    fields = {
        "messages": [{"role": "user", "content": "Rate?"}],
        "stream": stream,
        "max_tokens": 2000,
        "stop": "zzzzzz",
    }
    return request("/v1/chat/completions", json.dumps(fields).encode(), TYPE)


def hang_up(sock: socket.socket) -> None:
    sock.close()


def half_close(sock: socket.socket) -> None:
    """No server can tell it from hanging up: the other half may be as dead."""
    sock.shutdown(socket.SHUT_WR)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    sock.close()


@pytest.mark.parametrize("leave", [hang_up, half_close, reset])
@pytest.mark.parametrize(
    "data",
    [native(), native(stream=True), chat(), chat(stream=True), native(["Rate?"])],
    ids=["whole", "stream", "chat", "chat stream", "batch"],
)
def test_in_mid_answer(
    server: OurServer, handler: EndpointHandler, paced: Paced, data: bytes, leave: Callable[[socket.socket], None]
) -> None:
    with server.connect() as sock:
        sock.sendall(data)
        until(lambda: handler.admission.running == 1)
        paced.tokens.release(3)
        until(lambda: paced.let_through == 3)
        leave(sock)
        assert paced.cancels[0].wait(PATIENCE)
        paced.tokens.release()  # the token that is being computed; the next one is not
        until(lambda: handler.admission.running == 0)
        assert paced.let_through <= 4
    server.quiet()


@pytest.mark.parametrize("more", [b"\r\n", request("/health", b"", method="GET")], ids=["a line", "a request"])
def test_after_more_than_the_request_was_sent(
    server: OurServer, handler: EndpointHandler, paced: Paced, more: bytes
) -> None:
    """What comes after the request is for later; a hang-up behind it is seen all the same."""
    with server.connect() as sock:
        sock.sendall(native())
        until(lambda: handler.admission.running == 1)
        paced.tokens.release(2)
        until(lambda: paced.let_through == 2)
        sock.sendall(more)
        paced.tokens.release()
        until(lambda: paced.let_through == 3)  # it has arrived, and changes nothing
    assert paced.cancels[0].wait(PATIENCE)
    paced.tokens.release()
    server.quiet()
    assert paced.let_through <= 4


def test_while_queued(server: OurServer, handler: EndpointHandler, paced: Paced) -> None:
    with server.connect() as first:
        first.sendall(native())
        until(lambda: handler.admission.running == 1)
        for leave in (hang_up, reset):
            with server.connect() as second:
                second.sendall(native(stream=True))
                until(lambda: handler.admission.full)
                assert len(paced.cancels) == 1  # it waits
                leave(second)
                until(lambda: not handler.admission.full)
                until(lambda: server.service.workers.busy == 1)  # nor does its thread wait any longer
        assert handler.admission.running == 1
    assert paced.cancels[0].wait(PATIENCE)
    paced.tokens.release(2)  # the turn that ends its prompt also begins its answer
    server.quiet()
    assert len(paced.cancels) == 1  # the model was asked for the first alone


def test_while_its_image_is_fetched(
    server: OurServer, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "_admission", Admission(1, 0))
    policy = replace(handler._analyzer._policy, allow_private=True, deadline_s=2)
    monkeypatch.setattr(handler._analyzer, "_policy", policy)
    host = ImageHost({"/": silent})
    try:
        with server.connect() as sock:
            sock.sendall(native({"image": host.url()}))
            until(lambda: host.requests)
            assert handler.admission.full
        until(lambda: not handler.admission.full)
        answered = server.post("/", {"inputs": "Rate?", "parameters": LONG | {"max_new_tokens": 1}})
        assert answered.status_code == 200
        server.quiet()
    finally:
        host.close()


def test_during_the_commentary(server: OurServer, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    class Service:
        def comment_all(self, _texts: list[str], *, timeout_s: float, cancel: Any) -> list[Commentary]:
            asked.set()
            assert cancel.wait(PATIENCE)
            return [Commentary("failed")]

    monkeypatch.setattr(handler, "_commentary", Service())
    before = handler.monitor.snapshot()
    for stream in (False, True):
        asked.clear()
        with server.connect() as sock:
            sock.sendall(native(stream=stream, enable_turkish_commentary=True, max_new_tokens=1))
            assert asked.wait(PATIENCE)
            assert handler.admission.running == 0
        server.quiet()
    after = handler.monitor.snapshot()  # the service did not fail: nobody waited for it
    assert after["commentary"].get("failed", 0) == before["commentary"].get("failed", 0)
    assert after["commentary"]["off"] == before["commentary"].get("off", 0) + 2
    assert after["stages"].get("commentary") == before["stages"].get("commentary")


def test_what_is_cancelled_is_counted_as_that(server: OurServer, handler: EndpointHandler, paced: Paced) -> None:
    def cancelled() -> int:
        requests = handler.monitor.snapshot()["requests"]
        return sum(entry["count"] for entry in requests if entry["outcome"] == "cancelled")

    before = cancelled()
    with server.connect() as sock:
        sock.sendall(native(stream=True))
        until(lambda: handler.admission.running == 1)
    assert paced.cancels[0].wait(PATIENCE)
    paced.tokens.release()
    server.quiet()
    assert cancelled() == before + 1
