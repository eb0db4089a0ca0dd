"""Clients that are hostile, broken or slow: each gets a proper end within bounds, and the next one is served."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import select
import socket
import time
from collections.abc import Iterator
from unittest.mock import Mock

import h11
import pytest
import requests

from handler import EndpointHandler
from server import exchange, sse
from server.body import MAX_BODY_BYTES, SMALL_BODY_BYTES
from server.protocol import MAX_PIPELINED_BYTES, MEAN_CHUNK_BYTES, READ_BYTES, SPARE_CHUNKS, BoundedProtocol
from tests.our_server import JSON, PATIENCE, OurServer, our_server, received, request, until

PARAMETERS = {"max_new_tokens": 4, "do_sample": False, "enable_turkish_commentary": False}
BODY = json.dumps({"inputs": "Rate?", "parameters": PARAMETERS}).encode()
TYPE = "Content-Type: application/json"


@pytest.fixture(scope="module")
def server(handler: EndpointHandler) -> Iterator[OurServer]:
    with our_server(handler, body_timeout=1.0) as running:
        yield running


@pytest.fixture(autouse=True)
def still_serving(server: OurServer) -> Iterator[None]:
    """Whatever was done to it, nothing is left behind and the next caller is answered."""
    yield
    server.quiet()
    assert server.post("/", BODY).status_code == 200
    until(lambda: server.service.bodies._left == type(server.service.bodies)()._left)


def status(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


# --- bodies


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/health", "/nowhere"])
def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(server: OurServer, path: str) -> None:
    reply = server.exchange(
        f"POST {path} HTTP/1.1\r\nHost: x\r\n{TYPE}\r\nContent-Length: 99999999999\r\n\r\n".encode()
    )
    expected = {"/health": 405, "/nowhere": 404}.get(path, 413)
    assert status(reply) == expected
    assert b"connection: close" in reply.lower()


def test_who_still_sends_when_the_refusal_comes_can_read_it(server: OurServer) -> None:
    """A server that closed at once would reset the connection, and the client would see that alone."""
    with server.connect() as sock:
        sock.sendall(request("/", b"", TYPE).replace(b"Content-Length: 0", b"Content-Length: 99000000"))
        assert select.select([sock], [], [], PATIENCE)[0]  # the refusal is there, and is not read yet
        for _ in range(5):
            sock.sendall(b" " * 1_000_000)
            time.sleep(0.02)
        assert status(received(sock, quiet=1)) == 413


def test_who_sends_too_much_all_the_same_can_read_the_refusal(server: OurServer) -> None:
    response = server.post("/", b" " * (MAX_BODY_BYTES + 2_000_000))
    assert response.status_code == 413
    assert "32,000,000" in response.json()[0]["error"]


def test_the_largest_body_is_accepted(server: OurServer) -> None:
    data = BODY.ljust(MAX_BODY_BYTES)
    assert server.post("/", data).status_code == 200
    assert server.post("/", iter([data[:5], data[5:]])).status_code == 200  # chunked
    assert server.post("/", iter([data, b" "])).status_code == 413


def test_an_endless_body_is_cut_off(server: OurServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_LINGER_BYTES", 1_000_000)
    chunk = b"%x\r\n" % 1_000_000 + b" " * 1_000_000 + b"\r\n"
    with server.connect() as sock:
        sock.sendall(f"POST / HTTP/1.1\r\nHost: x\r\n{TYPE}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 1000:
                sock.sendall(chunk)
                sent += 1
    assert 32 <= sent < 100


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_a_dripping_body_is_timed_out(server: OurServer, path: str) -> None:
    with server.connect() as sock:
        sock.sendall(request(path, b"", TYPE).replace(b"Content-Length: 0", b"Content-Length: 500"))
        started = time.monotonic()
        sock.settimeout(0.05)
        reply = b""
        while not reply and time.monotonic() - started < 10:
            sock.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                reply = sock.recv(65536)
    assert status(reply) == 408
    assert 1.0 <= time.monotonic() - started < 5


def test_a_body_that_nobody_reads_is_not_read_for_ever(server: OurServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "LINGER_S", 0.2)
    with server.connect() as sock:
        sock.sendall(request("/health", b"", method="GET").replace(b"Content-Length: 0", b"Content-Length: 500"))
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 10:
                sock.sendall(b" ")
                time.sleep(0.02)
    assert time.monotonic() - started < 5


def test_who_leaves_in_mid_body_leaves_nothing(server: OurServer) -> None:
    for _ in range(20):
        with server.connect() as sock:
            sock.sendall(request("/", BODY, TYPE)[:-5])


def test_a_body_may_come_in_single_bytes(server: OurServer) -> None:
    with server.connect() as sock:
        for byte in request("/", BODY, TYPE, "Connection: close"):
            sock.sendall(bytes([byte]))
        assert status(received(sock, quiet=PATIENCE)) == 200


# --- bodies in chunks


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parts of a request were made of each piece that came: what the loop has to do at once."""
    made, next_event, data_received = list[int](), h11.Connection.next_event, BoundedProtocol.data_received

    def count(conn: h11.Connection) -> object:
        made[-1] += 1
        return next_event(conn)

    def receive(protocol: BoundedProtocol, data: bytes) -> None:
        made.append(0)
        data_received(protocol, data)

    monkeypatch.setattr(h11.Connection, "next_event", count)
    monkeypatch.setattr(BoundedProtocol, "data_received", receive)
    return made


def chunked(path: str = "/", *headers: str) -> bytes:
    """The head of a request whose body comes in chunks."""
    head = [f"POST {path} HTTP/1.1", "Host: x", TYPE, *headers, "Transfer-Encoding: chunked", "", ""]
    return "\r\n".join(head).encode()


def chunks(body: bytes, size: int) -> bytes:
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize(("path", "token"), [("/", False), ("/nowhere", False), ("/", True)])
def test_an_endless_body_in_crumbs_is_cut_off_and_never_keeps_the_loop_for_long(
    request: pytest.FixtureRequest, events: list[int], path: str, token: bool, size: int
) -> None:
    """Whether it is read, or is read past after the answer, which needs no token."""
    server: OurServer = request.getfixturevalue("guarded" if token else "server")
    crumbs = chunks(b"a" * size * 1000, size).removesuffix(b"0\r\n\r\n")
    with server.connect() as sock, contextlib.suppress(ConnectionError):
        sock.sendall(chunked(path))
        for _ in range(1000):
            sock.sendall(crumbs)
        raise AssertionError("it was all taken in")
    server.quiet()
    assert max(events) < READ_BYTES / 6 + 10
    assert sum(events) < 2 * SPARE_CHUNKS


def test_who_sends_one_crumb_too_many_is_told(server: OurServer) -> None:
    crumbs = SPARE_CHUNKS * MEAN_CHUNK_BYTES // (MEAN_CHUNK_BYTES - 1)
    body = BODY.ljust(crumbs)
    assert status(server.exchange(chunked("/", "Connection: close") + chunks(body, 1))) == 200
    more = chunks(body + b"  ", 1).removesuffix(b"0\r\n\r\n")
    assert status(server.exchange(chunked() + more)) == 400


def test_a_body_in_chunks_of_a_hundred_bytes_may_be_large(server: OurServer) -> None:
    body = BODY.ljust(3 * 100 * SPARE_CHUNKS)
    with server.connect() as sock:
        sock.sendall(chunked("/", "Connection: close") + chunks(body, 100))
        assert status(received(sock, quiet=PATIENCE)) == 200


@pytest.mark.parametrize("at_once", [True, False])
def test_a_malformed_chunk_after_the_answer_ends_the_connection_in_silence(
    server: OurServer, caplog: pytest.LogCaptureFixture, at_once: bool
) -> None:
    with server.connect() as sock:
        sock.sendall(chunked("/nowhere") + b"zz\r\n" * at_once)
        if not at_once:
            assert select.select([sock], [], [], PATIENCE)[0]
            sock.sendall(b"zz\r\n")
        started = time.monotonic()
        reply = received(sock, quiet=PATIENCE)
    assert (status(reply), reply.count(b"HTTP/1.1")) == (400 if at_once else 404, 1)
    assert time.monotonic() - started < exchange.LINGER_S / 2
    server.quiet()
    assert [record.message for record in caplog.records if record.levelno > logging.WARNING] == []


def test_a_malformed_chunk_of_a_request_whose_answer_has_no_body(
    server: OurServer, caplog: pytest.LogCaptureFixture
) -> None:
    with server.connect() as sock:
        sock.sendall(chunked("/").replace(b"POST", b"HEAD", 1) + b"zz\r\n")
        reply = received(sock, quiet=PATIENCE)
    assert (status(reply), reply.count(b"HTTP/1.1")) == (400, 1)
    server.quiet()
    assert [record.message for record in caplog.records if record.levelno > logging.WARNING] == []


def test_compressed_bodies_are_refused(server: OurServer) -> None:
    response = server.post("/", gzip.compress(BODY), headers={**JSON, "Content-Encoding": "gzip"})
    assert (response.status_code, "Content-Encoding" in response.text) == (400, True)


def test_a_client_that_waits_for_100_continue(server: OurServer) -> None:
    with server.connect() as sock:
        sock.sendall(
            request("/", b"", TYPE, "Expect: 100-continue", "Connection: close").replace(b"h: 0", b"h: %d" % len(BODY))
        )
        assert sock.recv(1024).startswith(b"HTTP/1.1 100")
        sock.sendall(BODY)
        assert status(received(sock, quiet=PATIENCE)) == 200


def test_who_waits_for_100_continue_in_vain_is_not_waited_for(server: OurServer) -> None:
    """It has been told that its body is not wanted, and sends none: the connection ends with the answer."""
    started = time.monotonic()
    with server.connect() as sock:
        sock.sendall(request("/", b"", TYPE, "Expect: 100-continue").replace(b"h: 0", b"h: 99000000"))
        assert status(received(sock, quiet=PATIENCE)) == 413
    assert time.monotonic() - started < exchange.LINGER_S / 2


def test_a_question_is_read_however_many_large_bodies_are_on_their_way(
    server: OurServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.service.bodies, "_left", 0)
    assert server.post("/", BODY).status_code == 200
    large = json.dumps({"inputs": "x" * SMALL_BODY_BYTES}).encode()
    assert server.post("/", large).status_code == 429
    monkeypatch.undo()


# --- heads and connections


def test_the_absolute_form_of_a_target_is_understood(server: OurServer) -> None:
    reply = server.exchange(request("http://anywhere.example/health", b"", "Connection: close", method="GET"))
    assert status(reply) == 200


@pytest.mark.parametrize("target", ["http://[", "http://name:secret@%E2%84%80/predict"])
def test_a_target_that_is_no_url_is_not_found(target: str, server: OurServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    reply = server.exchange(request(target, b"", "Connection: close", method="GET"))
    assert status(reply) == 404
    assert b"x-request-id" in reply.lower()
    assert "secret" not in caplog.text and "Traceback" not in caplog.text


def test_more_requests_at_once_than_can_be_kept_end_the_connection(server: OurServer) -> None:
    """One is answered at a time; what a client sends meanwhile is kept, within bounds."""
    long = json.dumps({"inputs": "Rate?", "parameters": PARAMETERS | {"max_new_tokens": 2000, "stop": []}}).encode()
    with server.connect() as sock, contextlib.suppress(ConnectionError):
        sock.sendall(request("/", long, TYPE))
        sent = 0
        while sent < 100 * MAX_PIPELINED_BYTES:
            sock.sendall(b"GET /health HTTP/1.1\r\n" * 1000)
            sent += 22_000
            time.sleep(0.001)
        raise AssertionError("it was all taken in")


def test_a_slow_head_ends_the_connection(handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedProtocol, "head_timeout_s", 0.3)
    with our_server(handler) as server:
        for before in (b"", b"G", b"GET /health HTTP/1.1\r\n", request("/", BODY, TYPE) + b"POST"):
            with server.connect() as sock:
                sock.sendall(before)
                started = time.monotonic()
                with contextlib.suppress(ConnectionError):
                    while time.monotonic() - started < 10:
                        sock.sendall(b"x" if before else b"")
                        time.sleep(0.02)
                        if not before and received(sock, quiet=5) == b"":
                            break
                assert time.monotonic() - started < 5
        assert not server.server.server_state.connections
        with server.connect() as sock:  # between two requests another limit holds
            for _ in range(3):
                sock.sendall(request("/health", b"", method="GET"))
                assert b'"ok"' in received(sock, quiet=0.5)


def test_pipelined_requests_are_answered_in_order(server: OurServer) -> None:
    bodies = [
        json.dumps({"inputs": text, "parameters": PARAMETERS | {"return_full_text": True}}).encode() for text in "abc"
    ]
    data = b"".join(request("/", body, TYPE) for body in bodies) + request(
        "/health", b"", "Connection: close", method="GET"
    )
    with server.connect() as sock:
        sock.sendall(data)
        reply = received(sock, quiet=PATIENCE)
    assert reply.count(b"HTTP/1.1 200 OK") == 4
    places = [reply.index(f'"generated_text":"{text}\\n'.encode()) for text in "abc"] + [
        reply.index(b'{"status":"ok"}')
    ]
    assert places == sorted(places)


GARBAGE = [
    b"\r\n\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # TLS
    b"GET /health\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",  # no Host
    b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET  /health HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1_0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nX-Request-Id: a\rX-Evil: 1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nX-Request-Id: a\x00b\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\n: empty\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
    b"GET /" + b"y" * 1_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(100_000)) + b"\r\n",
]


@pytest.mark.parametrize("data", GARBAGE, ids=lambda data: repr(data[:40]))
def test_what_is_no_http_is_refused(server: OurServer, data: bytes) -> None:
    reply, started = b"", time.monotonic()
    with server.connect() as sock, contextlib.suppress(OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        reply = received(sock, quiet=PATIENCE)
    assert time.monotonic() - started < PATIENCE, "the connection was left open"
    assert reply == b"" or status(reply) == 400
    assert b"evil" not in reply.lower()


def test_a_length_that_is_stated_in_two_ways_is_refused(server: OurServer) -> None:
    """A proxy that believes the other one would see a second request in the body."""
    smuggled = request("/metrics", b"", method="GET")
    head = ["POST / HTTP/1.1", "Host: x", TYPE, f"Content-Length: {5 + len(smuggled)}", "Transfer-Encoding: chunked"]
    reply = server.exchange("\r\n".join([*head, "", "0", "", ""]).encode() + smuggled)
    assert (status(reply), reply.count(b"HTTP/1.1")) == (400, 1)


@pytest.mark.parametrize("value", ["a\r\n X-Evil: 1", "a, b", "\t", '"', "\xe9", "../..", "%0d%0aX-Evil:1"])
def test_a_request_id_carries_no_header_of_its_own(server: OurServer, value: str) -> None:
    data = f"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: {value}\r\n\r\n"
    reply = server.exchange(data.encode("latin-1"))
    assert status(reply) in (200, 400)
    assert b"evil" not in reply.lower()
    assert reply.lower().count(b"x-request-id") <= 1


def test_websockets_are_answered_as_plain_requests(server: OurServer) -> None:
    headers = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
    assert status(server.exchange(request("/predict", b"", *headers, method="GET"))) == 405


def test_a_client_that_does_not_read_is_cut_off_and_holds_no_thread(
    handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedProtocol, "unread_timeout_s", 0.3)
    monkeypatch.setattr(sse, "KEEP_ALIVE", b":" + b"x" * 1_000_000 + b"\n\n")
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.001)
    data = json.dumps(
        {"inputs": "Rate?", "stream": True, "parameters": PARAMETERS | {"max_new_tokens": 2000, "stop": []}}
    )
    with our_server(handler) as server, server.connect() as sock:
        sock.sendall(request("/", data.encode(), TYPE))
        until(lambda: server.server.server_state.connections)
        until(lambda: not server.server.server_state.connections)
        server.quiet()
        assert handler.admission.running == 0


@pytest.mark.parametrize("closing", [False, True])
def test_what_a_closing_connection_still_sends_has_to_be_read_in_time(closing: bool) -> None:
    timer, resumed = Mock(), Mock()
    protocol = BoundedProtocol.__new__(BoundedProtocol)
    protocol.transport, protocol.flow = Mock(is_closing=lambda: closing), Mock(resume_writing=resumed)
    protocol._unread_timer = timer
    protocol.resume_writing()
    assert timer.cancel.called is not closing
    assert resumed.called


def test_too_many_connections_are_not_kept(server: OurServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.protocol.MAX_CONNECTIONS", 3)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(server.connect()) for _ in range(10)]
        until(lambda: sum(bool(_closed(sock)) for sock in socks) >= 7)


def _closed(sock: socket.socket) -> bool:
    sock.settimeout(0.01)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


# --- tokens, origins, logs


@pytest.fixture(scope="module")
def guarded(handler: EndpointHandler) -> Iterator[OurServer]:
    with our_server(handler, api_token="sesame-7", cors_origins=("https://ecg.example.org",)) as running:
        yield running


PATHS = [
    ("POST", "/"),
    ("POST", "/predict"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/ready"),
]
PATHS += [("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/nowhere"), ("GET", "//health"), ("GET", "/Health")]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_without_the_token_nothing_is_answered(guarded: OurServer, method: str, path: str) -> None:
    for given in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer sesame",
        "Bearer sesame-77",
        "Basic sesame-7",
        "sesame-7",
        "Bearer \xe9",
    ):
        headers = {"Authorization": given.encode("latin-1")} if given is not None else {}
        response = requests.request(method, guarded.url + path, headers=headers, data=BODY, timeout=PATIENCE)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        answer = response.json()
        shape = answer[0] if path in ("/", "/predict") else answer
        assert "token" in json.dumps(shape["error"])
        assert path not in ("/", "/predict") or shape["model"] == guarded.service.model_name
    headers = {"Authorization": "bearer  sesame-7", **JSON}
    assert requests.request(method, guarded.url + path, headers=headers, data=BODY, timeout=PATIENCE).status_code != 401


def test_health_needs_no_token(guarded: OurServer) -> None:
    assert guarded.get("/health").status_code == 200


def test_the_token_is_in_no_log(guarded: OurServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "urllib3")  # the client's side
    caplog.set_level(logging.DEBUG)
    guarded.post("/", BODY, headers={**JSON, "Authorization": "Bearer sesame-7"})
    guarded.post("/", BODY, headers={**JSON, "Authorization": "Bearer sesame-8"})
    guarded.quiet()
    assert "POST / 200" in caplog.text
    assert "POST / 401" in caplog.text
    assert "sesame" not in caplog.text + repr(guarded.service.settings)


def test_other_origins_get_nothing_unless_they_are_named(server: OurServer, guarded: OurServer) -> None:
    def preflight(server: OurServer, origin: str) -> requests.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        headers["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
        return requests.options(server.url, headers=headers, timeout=PATIENCE)

    named = preflight(guarded, "https://ecg.example.org")
    assert (named.status_code, named.headers["access-control-allow-origin"]) == (200, "https://ecg.example.org")
    assert "x-stainless-os" in named.headers["access-control-allow-headers"]
    for refused in (preflight(guarded, "https://evil.example"), preflight(server, "https://ecg.example.org")):
        assert refused.status_code in (400, 405)
        assert "access-control-allow-origin" not in refused.headers
    unauthorized = guarded.post("/", BODY, headers={"Origin": "https://ecg.example.org"})
    assert unauthorized.status_code == 401
    assert unauthorized.headers["access-control-allow-origin"] == "https://ecg.example.org"
    assert "X-Request-Id" in unauthorized.headers["access-control-expose-headers"]


def test_logs_hold_no_content(server: OurServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "urllib3")  # the client's side
    caplog.set_level(logging.DEBUG)
    answers = [
        server.post("/?seed=471147114711", json.dumps({"inputs": "Patient Jane Doe?"}).encode()).text,
        server.post("/Jane?q=Jane", b"Jane").text,
        server.post(
            "/v1/chat/completions?Jane",
            json.dumps({"messages": [{"role": "user", "content": "Jane"}], "max_tokens": 5}).encode(),
        ).text,
        server.post("/v1/models/Jane", b"").text,
        server.post(
            "/",
            b'{"Jane": "Jane"}',
            headers={**JSON, "X-Jane": "Jane", "User-Agent": "Jane", "X-Request-Id": "Jane Doe"},
        ).text,
        requests.request("JANE", server.url + "/", timeout=PATIENCE).text,
        server.exchange(b"Jane Jane Jane\r\n\r\n"),
    ]
    server.quiet()
    generated = json.loads(str(answers[0]))[0]["generated_text"]
    assert "POST / 200" in caplog.text
    for content in ("Jane", "jane", "JANE", "471147114711", generated[:20]):
        assert content not in caplog.text
    metrics = server.get("/metrics").text
    assert 'route="other"' in metrics
    assert "ane" not in metrics.replace("lane", "")
