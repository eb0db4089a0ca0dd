"""The Python client against a host that misbehaves on request: what it sends, returns, raises, repeats and forgets."""

from __future__ import annotations

import asyncio
import base64
import gc
import inspect
import io
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pulse_ecg.image_file import decode_image, rgb_from_pil
from tests import commentary_service as service
from tests.commentary_service import ChatServer, Exchange, chat_server

sys.path.insert(0, str(Path(__file__).parents[1] / "clients/python/src"))

import pulse_ecg_client as client
from pulse_ecg_client import AsyncPULSEEndpoint, PULSEEndpoint, PULSEError, _retry
from pulse_ecg_client._reply import EventDecoder

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
RECORD = {"generated_text": "Sinus rhythm.", "model": "PULSE-7B", "processing_method": "pipeline"}
ERROR_RECORD = {"generated_text": "", "error": "No.", "model": "PULSE-7B", "handler": "h", "success": False}
COMMENTED = {**RECORD, "comment_text": "Kalbiniz düzenli.", "commentary_status": "success"}
PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"


def reply(*records: dict[str, Any]) -> service.Behaviour:
    return service.raw(json.dumps(records or [RECORD]).encode())


def refusal(status: int, *headers: str, record: dict[str, Any] = ERROR_RECORD) -> service.Behaviour:
    return service.status(status, *headers, body=json.dumps([record]).encode())


def event(name: str, data: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


STREAM = [
    event("start", {"id": "r1", "model": "PULSE-7B"}),
    b": keep-alive\n\n",
    event("text", {"text": "Sinüs "}),
    event("text", {"text": "rhythm."}),
    event("later", {"unknown": True}),
    event("answer", RECORD),
    event("record", COMMENTED),
]


def streamed(*pieces: bytes, then: Callable[[Exchange], None] = lambda exchange: None) -> service.Behaviour:
    """A stream sent in these pieces; ``then`` comes before its proper end."""

    def behave(exchange: Exchange) -> None:
        head = b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nX-Request-Id: r-2\r\n"
        exchange.wfile.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for piece in pieces:
            exchange.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        then(exchange)
        exchange.wfile.write(b"0\r\n\r\n")

    return behave


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server(reply()) as server:
        yield server


@pytest.fixture
def endpoint(server: ChatServer) -> Iterator[PULSEEndpoint]:
    with PULSEEndpoint(server.url, TOKEN, timeout=20) as endpoint:
        yield endpoint


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float | None]]:
    """What the waits between attempts were made of; they themselves are skipped."""
    asked: list[tuple[int, float | None]] = []
    monkeypatch.setattr(_retry, "delay_s", lambda attempt, after: asked.append((attempt, after)) or 0.0)
    return asked


def bodies(server: ChatServer) -> list[dict[str, Any]]:
    return [body for _, body in server.requests]


# --- what is sent


def test_signatures_are_those_that_callers_know() -> None:
    known = {"max_new_tokens": 512, "temperature": 0.2, "enable_turkish_commentary": True}
    due = {
        "analyze_text": (["text"], {**known, "max_new_tokens": 256, "temperature": 0.7}),
        "analyze_image_url": (["image_url", "query"], known),
        "analyze_image_base64": (["image_path", "query"], known),
    }
    for name, (required, defaults) in due.items():
        _, *parameters = inspect.signature(getattr(PULSEEndpoint, name)).parameters.values()
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in positional if p.default is p.empty] == required
        assert {p.name: p.default for p in positional if p.default is not p.empty} == defaults
    for name, method in inspect.getmembers(PULSEEndpoint, inspect.isfunction):
        if not name.startswith("_") and name != "close":
            twin = inspect.signature(getattr(AsyncPULSEEndpoint, name))
            assert inspect.signature(method).parameters == twin.parameters, name


def test_a_question_is_sent_as_callers_know(endpoint: PULSEEndpoint, server: ChatServer) -> None:
    assert endpoint.analyze_text("Ne demek?") == RECORD
    [(headers, body)] = server.requests
    parameters = {"max_new_tokens": 256, "temperature": 0.7, "top_p": 0.95, "do_sample": True}
    assert body == {"inputs": "Ne demek?", "parameters": {**parameters, "enable_turkish_commentary": True}}
    assert (headers["content-type"], headers["accept"]) == ("application/json", "application/json")
    assert headers["authorization"] == f"Bearer {TOKEN}"


def test_what_is_given_as_a_url_is_never_read_as_a_file(
    endpoint: PULSEEndpoint, server: ChatServer, tmp_path: Path
) -> None:
    """Whoever may name an image's URL must not see the files of the machine that asks."""
    (tmp_path / "ecg.png").write_bytes(PNG)
    for path in (str(tmp_path / "ecg.png"), "htps://example.org/ecg.jpg", "file:///etc/hostname"):
        with pytest.raises(client.ImageError, match="begins with http"):
            endpoint.analyze_image_url(path, "Rhythm?")
    assert not server.requests


def test_an_image_is_sent_as_callers_know(endpoint: PULSEEndpoint, server: ChatServer, tmp_path: Path) -> None:
    (tmp_path / "ecg.png").write_bytes(PNG)
    endpoint.analyze_image_url("https://example.org/ecg.jpg", "Rhythm?")
    endpoint.analyze_image_base64(str(tmp_path / "ecg.png"), "Rate?", 64, 0.5, False)
    defaults = {"top_p": 0.9, "repetition_penalty": 1.05, "deepseek_timeout": 30}
    by_url, by_path = bodies(server)
    assert by_url["inputs"] == {"query": "Rhythm?", "image": "https://example.org/ecg.jpg"}
    given_not = {"max_new_tokens": 512, "temperature": 0.2, "enable_turkish_commentary": True}
    assert by_url["parameters"] == {**defaults, **given_not}
    assert by_path["inputs"]["query"] == "Rate?"
    assert by_path["inputs"]["image"] == "data:image/png;base64," + base64.b64encode(PNG).decode()
    given = {"max_new_tokens": 64, "temperature": 0.5, "enable_turkish_commentary": False}
    assert by_path["parameters"] == {**defaults, **given}


def test_further_parameters_go_by_keyword(endpoint: PULSEEndpoint, server: ChatServer) -> None:
    endpoint.analyze_text("?", seed=7, stop=["\n"], details=True, top_p=0.5, top_k=None)
    endpoint.chat([{"role": "user", "content": "?"}], temperature=0)
    endpoint.chat([{"role": "user", "content": "?"}])
    more, chat, plain = bodies(server)
    assert more["parameters"].items() >= {"seed": 7, "stop": ["\n"], "details": True, "top_p": 0.5}.items()
    assert "top_k" not in more["parameters"]
    assert chat == {"inputs": {"messages": [{"role": "user", "content": "?"}]}, "parameters": {"temperature": 0}}
    assert plain == {"inputs": chat["inputs"]}
    for call in (endpoint.analyze_text, endpoint.stream):
        with pytest.raises(TypeError, match="max_tokens.*max_new_tokens"):
            call("?", max_tokens=3)
    assert len(server.requests) == 3


def test_a_batch_has_one_record_for_each_input(endpoint: PULSEEndpoint, server: ChatServer) -> None:
    server.script = [reply(RECORD, ERROR_RECORD), reply(RECORD)]
    inputs: list[client.Input] = ["?", {"query": "?", "image": PNG}]
    assert endpoint.analyze_batch(inputs, seed=1) == [RECORD, ERROR_RECORD]
    assert bodies(server)[0]["inputs"] == ["?", {"query": "?", "image": client.image_part(PNG)["image_url"]["url"]}]
    with pytest.raises(client.ReplyError, match="1 records instead of 2"):
        endpoint.analyze_batch(inputs)
    server.script = [reply(ERROR_RECORD)]  # the stock container refuses the whole batch
    with pytest.raises(client.RequestRefusedError, match=re.escape(ERROR_RECORD["error"])) as caught:
        endpoint.analyze_batch(inputs)
    assert (caught.value.status, caught.value.records) == (200, [ERROR_RECORD])
    with pytest.raises(TypeError, match="a list of inputs"):
        endpoint.analyze_batch("What is the rhythm?")
    assert len(server.requests) == 3


def test_images_of_every_kind_are_sent(tmp_path: Path) -> None:
    file = tmp_path / "ecg.jpg"
    Image.new("RGB", (20, 10), "red").save(file)
    for image in (file, str(file), file.read_bytes(), bytearray(file.read_bytes()), memoryview(file.read_bytes())):
        kind, _, data = client.image_part(image)["image_url"]["url"].partition(",")
        assert (kind, base64.b64decode(data)) == ("data:image/jpeg;base64", file.read_bytes())
    for text in ("https://example.org/a?b=c", "HTTP://example.org", "data:image/png;base64,AAAA"):
        assert client.image_part(text) == {"type": "image_url", "image_url": {"url": text}}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "I;16", "HSV"])
def test_pillow_images_are_sent_upright(mode: str) -> None:
    upside = Image.new(mode, (20, 10))
    upside.getexif()[0x0112] = 6  # a camera that was turned
    _, _, data = client.image_part(upside)["image_url"]["url"].partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        assert (sent.format, sent.size) == ("PNG", (10, 20))


@pytest.mark.parametrize(
    ("mode", "values"),
    [("I", "<i4"), ("I;16", "<u2"), ("I;16B", ">u2"), ("F", "<f4")],
)
def test_deep_greys_arrive_as_they_are(mode: str, values: str) -> None:
    """Pillow's own conversion would clip them to white, and the model would be shown an empty page."""
    levels = np.linspace(0, 1, 200) if mode == "F" else np.linspace(0, 60_000, 200)
    deep = Image.frombytes(mode, (20, 10), levels.astype(values).tobytes())
    _, _, data = client.image_part(deep)["image_url"]["url"].partition(",")
    shown = np.asarray(decode_image(base64.b64decode(data)))
    assert np.array_equal(shown, np.asarray(rgb_from_pil(deep)))
    assert len(np.unique(shown)) > 100


def test_transparency_survives() -> None:
    clear = Image.new("PA", (20, 10))
    clear.putpalette([0, 0, 0])
    clear.putalpha(0)
    _, _, data = client.image_part(clear)["image_url"]["url"].partition(",")
    assert np.asarray(decode_image(base64.b64decode(data))).min() == 255


@pytest.mark.parametrize("kind", ["empty", "file", "bytes", "uri", "base64", "object", "lines"])
def test_an_image_that_cannot_be_sent_is_refused_here(
    kind: str, endpoint: PULSEEndpoint, server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(client.MAX_IMAGE_BYTES + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("the file was read"))
    images: dict[str, Any] = {
        "empty": b"",
        "file": tmp_path / "huge",
        "bytes": bytes(client.MAX_IMAGE_BYTES + 1),
        "uri": "data:image/png;base64," + "A" * (client.MAX_IMAGE_BYTES * 4 // 3 + 8),
        "base64": "/9j/" + "A" * 5000,
        "object": object(),
        "lines": "/9j/\nAAAA",
    }
    with pytest.raises(client.ImageError) as caught:
        endpoint.analyze_image_base64(images[kind], "?")
    assert isinstance(caught.value, ValueError)
    assert "AAAA" not in str(caught.value)
    assert len(str(caught.value)) < 200
    with pytest.raises(FileNotFoundError):
        endpoint.analyze_image_base64("no-such-file.jpg", "?")
    assert server.requests == []


def test_the_largest_image_is_sent() -> None:
    url = client.image_part(bytes(client.MAX_IMAGE_BYTES))["image_url"]["url"]
    assert len(url.partition(",")[2]) == 4 * -(-client.MAX_IMAGE_BYTES // 3)


# --- what comes back


def test_an_error_record_with_status_200_is_returned(endpoint: PULSEEndpoint, server: ChatServer) -> None:
    server.script = [reply(ERROR_RECORD)]
    assert endpoint.analyze_text("?") == ERROR_RECORD


STATUSES = {
    400: client.RequestRefusedError,
    401: client.AuthenticationError,
    403: client.AuthenticationError,
    404: client.RequestRefusedError,
    413: client.RequestRefusedError,
    422: client.RequestRefusedError,
    429: client.BusyError,
    500: client.ServerError,
    502: client.UnavailableError,
    503: client.UnavailableError,
    504: client.ServerError,
}


@pytest.mark.parametrize("status", STATUSES)
def test_another_status_raises_with_status_and_text(status: int, server: ChatServer, endpoint: PULSEEndpoint) -> None:
    server.script = [refusal(status, "X-Request-Id: r-1", "Retry-After: 3600")]
    with pytest.raises(STATUSES[status]) as caught:
        endpoint.analyze_text("?")
    error = caught.value
    assert type(error) is STATUSES[status]
    assert (error.status, error.records, error.request_id) == (status, [ERROR_RECORD], "r-1")
    assert json.loads(error.text) == [ERROR_RECORD]
    assert str(error) == f"HTTP {status}: No."


def test_the_stock_containers_refusal_is_told_in_its_words(server: ChatServer, endpoint: PULSEEndpoint) -> None:
    server.script = [service.status(400, body=b'{"error": "Body needs to provide a inputs key."}')]
    with pytest.raises(client.RequestRefusedError, match=r"^HTTP 400: Body needs to provide a inputs key\.$") as caught:
        endpoint.analyze_text("?")
    assert caught.value.records == []


def test_a_page_in_place_of_json_is_told_in_short(server: ChatServer, endpoint: PULSEEndpoint) -> None:
    server.script = [service.status(404, body=b"<html>\n" + b"x" * 9999)]
    with pytest.raises(client.RequestRefusedError) as caught:
        endpoint.analyze_text("?")
    assert len(str(caught.value)) < 600
    assert len(caught.value.text) > 9999


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b"[]", b'["text"]', b'{"error": "x"}', b"[{}, {}]", b"\xff"])
def test_a_reply_of_another_kind_is_an_error(body: bytes, server: ChatServer, endpoint: PULSEEndpoint) -> None:
    server.script = [service.raw(body)]
    with pytest.raises(client.ReplyError) as caught:
        endpoint.analyze_text("?")
    assert caught.value.status == 200
    assert caught.value.text == body.decode("utf-8", "replace")


# --- again, or not


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_sleeping_endpoint_is_woken(
    status: int,
    server: ChatServer,
    endpoint: PULSEEndpoint,
    delays: list[tuple[int, float | None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.script = [refusal(status), refusal(status, "Retry-After: 7"), refusal(status, "Retry-After: soon"), reply()]
    with caplog.at_level(logging.INFO, "pulse_ecg_client"):
        assert endpoint.analyze_text("?") == RECORD
    assert delays == [(1, None), (2, 7.0), (3, None)]
    told = [record.getMessage() for record in caplog.records if record.name == "pulse_ecg_client"]
    assert len(told) == 3
    assert all(line.startswith(f"HTTP {status}: No. Trying again in ") for line in told)
    assert len({json.dumps(body) for body in bodies(server)}) == 1


@pytest.mark.parametrize("status", sorted(set(STATUSES) - {429, 502, 503}))
def test_other_statuses_are_final(
    status: int, server: ChatServer, endpoint: PULSEEndpoint, delays: list[tuple[int, float | None]]
) -> None:
    server.script = [refusal(status, "Retry-After: 0"), reply()]
    with pytest.raises(client.StatusError):
        endpoint.analyze_text("?")
    assert (len(server.requests), delays) == (1, [])


@pytest.mark.parametrize("behaviour", [service.cut_before_answer, service.cut_in_body])
def test_a_reply_that_breaks_off_is_final(
    behaviour: service.Behaviour, server: ChatServer, endpoint: PULSEEndpoint, delays: list[tuple[int, float | None]]
) -> None:
    server.script = [behaviour, reply()]
    with pytest.raises(client.EndpointConnectionError, match="broke off"):
        endpoint.analyze_text("?")
    assert (len(server.requests), delays) == (1, [])


def test_a_host_that_is_not_there_is_tried_a_few_times(delays: list[tuple[int, float | None]]) -> None:
    with chat_server() as gone:
        url = gone.url
    with PULSEEndpoint(url, TOKEN) as endpoint, pytest.raises(client.EndpointConnectionError, match="No connection"):
        endpoint.analyze_text("?")
    assert [attempt for attempt, _ in delays] == [1, 2, 3, 4]


@pytest.mark.parametrize("asleep", [3, 4])
def test_a_waking_host_that_is_gone_for_a_moment_is_asked_on(
    asleep: int, delays: list[tuple[int, float | None]]
) -> None:
    outcomes = iter([503] * asleep + ["gone"] * 3 + [503, "gone", 200])

    def behave(request: httpx2.Request) -> httpx2.Response:
        outcome = next(outcomes)
        if isinstance(outcome, int):
            return httpx2.Response(outcome, json=[RECORD if outcome == 200 else ERROR_RECORD])
        raise httpx2.ConnectError(outcome)

    with PULSEEndpoint("https://example.org", TOKEN, transport=httpx2.MockTransport(behave)) as endpoint:
        assert endpoint.analyze_text("?") == RECORD
    assert len(delays) == asleep + 5


def test_a_host_that_goes_while_it_wakes_is_given_up(delays: list[tuple[int, float | None]]) -> None:
    def behave(request: httpx2.Request) -> httpx2.Response:
        if len(delays) < 5:
            return httpx2.Response(503, json=[ERROR_RECORD])
        raise httpx2.ConnectError("gone")

    with (
        PULSEEndpoint("https://example.org", TOKEN, transport=httpx2.MockTransport(behave)) as endpoint,
        pytest.raises(client.EndpointConnectionError),
    ):
        endpoint.analyze_text("?")
    assert len(delays) == 9


def test_no_wait_begins_that_the_deadline_would_cut_short(server: ChatServer) -> None:
    server.script = [refusal(503, "Retry-After: 20")]
    started = time.monotonic()
    with PULSEEndpoint(server.url, TOKEN, timeout=19) as endpoint, pytest.raises(client.UnavailableError):
        endpoint.analyze_text("?")
    assert time.monotonic() - started < 5
    assert len(server.requests) == 1


@given(attempt=st.integers(1, 10_000), after=st.one_of(st.none(), st.floats(0.001, 1e6)))
def test_waits_grow_to_a_bound_and_honour_the_server(attempt: int, after: float | None) -> None:
    delay = _retry.delay_s(attempt, after)
    if after is not None:
        assert after <= delay <= 1.25 * after
    else:
        longest = min(15.0, 0.5 * 2 ** min(attempt - 1, 50))
        assert longest / 2 <= delay <= longest


def test_retry_after_is_read_in_both_forms() -> None:
    def read(value: str) -> float | None:
        return _retry.retry_after_s(httpx2.Headers({"Retry-After": value}))

    soon = datetime.now(UTC) + timedelta(seconds=100)
    assert 90 < (read(format_datetime(soon, usegmt=True)) or 0) <= 100
    assert (read("120"), read(" 0 "), read("Fri, 31 Dec 1999 23:59:59 GMT")) == (120.0, 0.0, 0.0)
    for unread in ("", "-1", "soon", "1.5", f"Fri, 31 Dec {10**20} 23:59:59 GMT"):
        assert read(unread) is None
    assert _retry.retry_after_s({}) is None


SLOW = [service.slow_first_byte(), service.header_drip, service.body_drip, service.error_body_drip]


@pytest.mark.parametrize("behaviour", SLOW)
def test_the_deadline_holds_whatever_the_host_does(behaviour: service.Behaviour, server: ChatServer) -> None:
    server.script = [behaviour]
    with PULSEEndpoint(server.url, TOKEN) as endpoint:
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="within 0.5 seconds") as caught:
            endpoint.analyze_text("?", timeout=0.5)
        assert time.monotonic() - started < 3
    assert isinstance(caught.value, client.DeadlineError)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_timeout_is_a_positive_number(timeout: float, endpoint: PULSEEndpoint, server: ChatServer) -> None:
    with pytest.raises(ValueError, match="timeout"):
        PULSEEndpoint(server.url, timeout=timeout)
    with pytest.raises(ValueError, match="timeout"):
        endpoint.analyze_text("?", timeout=timeout)


# --- secrets, and hosts that nobody named


def test_the_token_is_shown_nowhere(server: ChatServer, caplog: pytest.LogCaptureFixture) -> None:
    """Not by a host that answers with the request's headers either."""
    server.script = [
        lambda exchange: exchange.send(503, json.dumps(exchange.request_headers).encode()),
        lambda exchange: exchange.send(400, json.dumps(exchange.request_headers).encode()),
        lambda exchange: exchange.send(200, json.dumps(exchange.request_headers).encode()),
        service.cut_before_answer,
    ]
    shown = []
    with caplog.at_level(logging.DEBUG), PULSEEndpoint(f"{server.url}?key=secret", TOKEN + "\n") as endpoint:
        shown += [repr(endpoint), str(vars(endpoint))]
        for _ in range(3):
            with pytest.raises(PULSEError) as caught:
                endpoint.analyze_text("?")
            shown += [str(caught.value), repr(caught.value), caught.value.text, repr(caught.value.__cause__)]
    ours = [record.getMessage() for record in caplog.records if record.name == "pulse_ecg_client"]
    assert TOKEN not in "".join(shown + [record.getMessage() for record in caplog.records])
    assert "secret" not in "".join(shown + ours)
    assert "***" in "".join(shown)
    assert [headers["authorization"] for headers, _ in server.requests] == [f"Bearer {TOKEN}"] * 4


@pytest.mark.parametrize("token", ["hf_a\nb", "hf_a b", "hf_ä", "hf_\x00"])
def test_a_token_that_cannot_be_one_is_refused_unseen(token: str) -> None:
    with pytest.raises(ValueError, match="token") as caught:
        PULSEEndpoint("https://example.org", token)
    assert "hf_" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "example.org", "ftp://example.org", "https://", "https://u:pw1@example.org", "//x"]
)
def test_a_url_that_cannot_be_one_is_refused_unseen(url: str) -> None:
    with pytest.raises(ValueError, match="URL") as caught:
        PULSEEndpoint(url, TOKEN)
    assert "pw1" not in str(caught.value)


@pytest.mark.parametrize("token", [None, "", " \n"])
def test_without_a_token_none_is_sent(token: str | None, server: ChatServer) -> None:
    with PULSEEndpoint(server.url, token) as endpoint:
        endpoint.analyze_text("?")
    assert "authorization" not in server.requests[0][0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int, endpoint: PULSEEndpoint, server: ChatServer) -> None:
    with chat_server(reply()) as other:
        server.script = [service.status(status, f"Location: {other.url}/page?key=secret", body=b"")]
        with pytest.raises(client.StatusError, match=f"HTTP {status}.*redirects to http://127") as caught:
            endpoint.analyze_text("?")
        assert "secret" not in str(caught.value)
        assert other.connections == 0


@pytest.mark.parametrize("location", ["http://[x", "http://h:port/", "//", "\u00e9://"])
def test_a_redirect_to_nowhere_is_a_status_error_too(
    location: str, endpoint: PULSEEndpoint, server: ChatServer
) -> None:
    server.script = [service.status(302, f"Location: {location}", body=b"")]
    with pytest.raises(client.StatusError, match="HTTP 302.*redirects to "):
        endpoint.analyze_text("?")


def errors_of(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for child in kind.__subclasses__():
        yield from errors_of(child)


@pytest.mark.parametrize("kind", sorted(set(errors_of(httpx2.RequestError)), key=lambda kind: kind.__name__))
def test_every_error_of_the_http_library_becomes_ours(
    kind: type[Exception], delays: list[tuple[int, float | None]]
) -> None:
    def fail(request: httpx2.Request) -> httpx2.Response:
        raise kind("reason")

    with (
        PULSEEndpoint("https://example.org", TOKEN, transport=httpx2.MockTransport(fail)) as endpoint,
        pytest.raises(client.EndpointConnectionError, match=f"{kind.__name__}: reason") as caught,
    ):
        endpoint.analyze_text("?")
    assert isinstance(caught.value.__cause__, kind)


# --- streams


def shown(events: Iterator[client.StreamEvent]) -> list[Any]:
    """Each event's type, with what it holds."""
    return [(event.type, *[value for name, value in vars(event).items() if name != "type"]) for event in events]


EXPECTED = [
    ("start", "r1", "PULSE-7B"),
    ("text", "Sinüs "),
    ("text", "rhythm."),
    ("answer", RECORD),
    ("record", COMMENTED),
]


def test_a_stream_comes_event_by_event(endpoint: PULSEEndpoint, server: ChatServer) -> None:
    """Each event is seen before the next one is sent."""
    seen = threading.Event()

    def behave(exchange: Exchange) -> None:
        def more(exchange: Exchange) -> None:
            assert seen.wait(10)
            rest = b"".join(STREAM[3:])
            exchange.wfile.write(b"%x\r\n%s\r\n" % (len(rest), rest))

        streamed(*STREAM[:3], then=more)(exchange)

    server.script = [behave]
    events = endpoint.stream({"query": "?", "image": PNG}, seed=1)
    received = shown(next(events) for _ in range(2))
    assert received == EXPECTED[:2]
    seen.set()
    assert received + shown(events) == EXPECTED
    [(headers, body)] = server.requests
    assert (body["stream"], body["parameters"], headers["accept"]) == (True, {"seed": 1}, "application/json")


def test_a_stream_may_be_cut_into_pieces_anywhere(endpoint: PULSEEndpoint, server: ChatServer) -> None:
    body = b"".join(STREAM)
    server.script = [streamed(*[body[at : at + 1] for at in range(len(body))])]
    assert shown(endpoint.stream("?")) == EXPECTED


@given(data=st.data(), line_end=st.sampled_from(["\n", "\r\n", "\r"]), texts=st.lists(st.text(), max_size=5))
def test_the_cuts_between_pieces_do_not_matter(data: st.DataObject, line_end: str, texts: list[str]) -> None:
    events = [("text", json.dumps({"text": text}, ensure_ascii=False)) for text in texts]
    lines = [": comment", ""]
    for name, value in events:
        lines += [f"event: {name}", f"data:{value}", "id: 1", ""]
    body = ("".join(line + line_end for line in lines) + data.draw(st.sampled_from(["", "data: half"]))).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=20)))
    pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    for cut in (pieces, [body[at : at + 1] for at in range(len(body))]):
        decoder = EventDecoder()
        assert [(event.event, event.data) for piece in cut for event in decoder.feed(piece)] == events


def test_an_error_in_the_stream_raises_with_its_status(endpoint: PULSEEndpoint, server: ChatServer) -> None:
    server.script = [streamed(*STREAM[:3], event("error", {**ERROR_RECORD, "status": 504}))]
    events = endpoint.stream("?")
    assert shown(next(events) for _ in range(2)) == EXPECTED[:2]
    with pytest.raises(client.ServerError, match="HTTP 504: No.") as caught:
        next(events)
    assert (caught.value.status, caught.value.records) == (504, [ERROR_RECORD])
    assert caught.value.request_id == "r-2"


@pytest.mark.parametrize("status", [400, 422])
def test_a_stream_that_is_refused_raises(status: int, endpoint: PULSEEndpoint, server: ChatServer) -> None:
    server.script = [refusal(status)]
    with pytest.raises(client.RequestRefusedError):
        next(endpoint.stream("?"))
    assert len(server.requests) == 1


def test_a_stream_waits_for_a_sleeping_endpoint_but_never_begins_twice(
    endpoint: PULSEEndpoint, server: ChatServer, delays: list[tuple[int, float | None]]
) -> None:
    server.script = [refusal(503), streamed(*STREAM[:3], then=Exchange.cut), reply()]
    events = endpoint.stream("?")
    assert shown(next(events) for _ in range(2)) == EXPECTED[:2]
    with pytest.raises(client.EndpointConnectionError, match="broke off"):
        next(events)
    assert len(server.requests) == 2


@pytest.mark.parametrize("count", range(len(STREAM)))
def test_a_stream_without_its_last_event_is_an_error(count: int, endpoint: PULSEEndpoint, server: ChatServer) -> None:
    server.script = [streamed(*STREAM[:count])]
    with pytest.raises(client.ReplyError, match="ended before"):
        list(endpoint.stream("?"))


@pytest.mark.parametrize(
    "broken", [b"event: text\ndata: {\n\n", event("text", {}), event("start", []), event("error", 1)]
)
def test_a_malformed_event_is_an_error(broken: bytes, endpoint: PULSEEndpoint, server: ChatServer) -> None:
    server.script = [streamed(broken)]
    with pytest.raises(client.ReplyError, match="malformed"):
        list(endpoint.stream("?"))


def test_the_deadline_holds_within_a_stream(endpoint: PULSEEndpoint, server: ChatServer) -> None:
    server.script = [streamed(*STREAM[:3], then=lambda exchange: exchange.server.closing.wait(10))]
    with pytest.raises(client.DeadlineError):
        list(endpoint.stream("?", timeout=0.5))


def test_leaving_a_stream_ends_the_request(endpoint: PULSEEndpoint, server: ChatServer) -> None:
    left = threading.Event()

    def then(exchange: Exchange) -> None:
        with suppress(ConnectionError):
            exchange.rfile.read(1)  # ends once the client has gone
        left.set()

    server.script = [streamed(*STREAM[:3], then=then)]
    for received in endpoint.stream("?"):
        if isinstance(received, client.TextEvent):  # the last one that is sent
            break
    assert left.wait(10)


def test_a_host_that_cannot_stream_is_asked_for_the_whole(
    endpoint: PULSEEndpoint, server: ChatServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for the unknown key, once for the answer; and from then on without the key."""
    unknown = {**ERROR_RECORD, "error": "The body has the unknown key 'stream'."}
    server.script = [reply(unknown), reply(COMMENTED), reply(RECORD)]
    whole = [("start", "", "PULSE-7B"), ("text", "Sinus rhythm."), ("answer", RECORD)]
    with caplog.at_level(logging.INFO, "pulse_ecg_client"):
        assert shown(endpoint.stream("?")) == [*whole, ("record", COMMENTED)]
    assert "does not stream" in caplog.text
    assert shown(endpoint.stream("?")) == [*whole, ("record", RECORD)]
    assert ["stream" in body for body in bodies(server)] == [True, False, False]


def test_a_host_that_ignores_the_wish_to_stream_is_asked_once(endpoint: PULSEEndpoint, server: ChatServer) -> None:
    assert shown(endpoint.stream("?"))[-1] == ("record", RECORD)
    assert len(server.requests) == 1


def test_an_error_record_in_place_of_a_stream_raises(endpoint: PULSEEndpoint, server: ChatServer) -> None:
    server.script = [reply(ERROR_RECORD)]
    for _ in range(2):
        with pytest.raises(client.RequestRefusedError, match=r"^No\.$") as caught:
            list(endpoint.stream("?"))
        assert (caught.value.status, caught.value.records) == (200, [ERROR_RECORD])


# --- life and death of an endpoint


def client_threads() -> int:
    return sum(thread.name == "pulse-ecg-client" for thread in threading.enumerate())


def test_closing_leaves_nothing_behind(server: ChatServer) -> None:
    before = client_threads()
    with PULSEEndpoint(server.url, TOKEN) as endpoint:
        assert client_threads() == before  # nothing before the first call
        endpoint.analyze_text("?")
        assert client_threads() == before + 1
    assert client_threads() == before
    endpoint.close()
    for call in (endpoint.analyze_text, lambda text: next(endpoint.stream(text))):
        with pytest.raises(RuntimeError, match="closed"):
            call("?")


def test_closing_ends_the_calls_that_still_wait(server: ChatServer) -> None:
    waiting = threading.Event()
    server.script = [lambda exchange: waiting.set() or exchange.server.closing.wait(10)]
    endpoint, ends = PULSEEndpoint(server.url, TOKEN), list[BaseException]()

    def call() -> None:
        try:
            endpoint.analyze_text("?")
        except BaseException as error:
            ends.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert waiting.wait(10)
    endpoint.close()
    thread.join(5)
    assert [(type(error), str(error)) for error in ends] == [(RuntimeError, "This endpoint is closed.")]


def test_an_endpoint_that_nobody_closes_ends_with_its_last_reference(server: ChatServer) -> None:
    before = client_threads()
    endpoint = PULSEEndpoint(server.url, TOKEN)
    endpoint.analyze_text("?")
    next(endpoint.stream("?"))
    del endpoint
    gc.collect()
    assert client_threads() == before


def test_without_a_thread_for_now_the_next_call_is_as_good_as_any(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = [reply({"generated_text": "a"})]
    with PULSEEndpoint(server.url, TOKEN) as endpoint:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
            with pytest.raises(RuntimeError, match="can't start new thread"):
                endpoint.analyze_text("?")
        assert endpoint.analyze_text("?") == {"generated_text": "a"}


def test_threads_share_an_endpoint(endpoint: PULSEEndpoint, server: ChatServer) -> None:
    """Five calls wait for each other in the host: they must be under way at once."""
    together = threading.Barrier(5)

    def behave(exchange: Exchange) -> None:
        together.wait(10)
        reply({"generated_text": exchange.body["inputs"]})(exchange)

    server.script = [behave]
    answers: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: endpoint.analyze_text(str(n))})) for n in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: {"generated_text": str(n)} for n in range(5)}


def test_an_endpoint_in_use_is_not_taken_over_a_fork(endpoint: PULSEEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint.analyze_text("?")
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="forked"):
        endpoint.analyze_text("?")


def test_the_asynchronous_endpoint_asks_side_by_side_and_can_be_cancelled(server: ChatServer) -> None:
    waiting, left = threading.Event(), threading.Event()

    def behave(exchange: Exchange) -> None:
        if exchange.body["inputs"] != "wait":
            return reply()(exchange)
        waiting.set()
        with suppress(ConnectionError):
            exchange.rfile.read(1)
        left.set()
        return None

    server.script = [behave]

    async def scenario() -> None:
        async with AsyncPULSEEndpoint(server.url, TOKEN) as endpoint:
            task = asyncio.create_task(endpoint.analyze_text("wait"))
            assert await asyncio.to_thread(waiting.wait, 10)
            assert await endpoint.analyze_text("?") == RECORD
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(left.wait, 10)
            server.script = [streamed(*STREAM)]
            events = [event async for event in endpoint.stream("?")]
            assert shown(iter(events)) == EXPECTED

    asyncio.run(scenario())
