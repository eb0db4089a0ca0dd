"""`POST /` and `/predict` of our own server: the contract's bodies and statuses, and the stream that equals them."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from PIL import Image

from handler import EndpointHandler
from pulse_ecg.admission import Admission
from server import sse
from server.body import SMALL_BODY_BYTES
from tests.commentary_service import TURKISH, answer, chat_server
from tests.our_server import JSON, PATIENCE, OurServer, our_server, until

PLAIN = {"max_new_tokens": 8, "do_sample": False, "enable_turkish_commentary": False}
ERROR_FIELDS = ["generated_text", "error", "model", "handler", "success"]


@pytest.fixture(scope="module")
def server(handler: EndpointHandler) -> Iterator[OurServer]:
    with our_server(handler) as running:
        yield running


def body(inputs: object = "Rate?", **parameters: object) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": PLAIN | parameters}


def events(response: requests.Response) -> list[tuple[str, Any]]:
    """The stream's events; comments are none."""
    found = []
    for block in response.content.decode("utf-8").removesuffix("\n\n").split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        if lines:
            name, data = lines
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def streamed(server: OurServer, data: dict[str, Any], **options: Any) -> list[tuple[str, Any]]:
    response = server.post("/", {**data, "stream": True}, **options)
    assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    return events(response)


# --- records


@pytest.mark.parametrize("path", ["/", "/predict"])
def test_the_records_are_the_handlers(
    server: OurServer, handler: EndpointHandler, path: str, sample_png: bytes
) -> None:
    for data in (
        body(),
        body({"query": "Rate?", "image": base64.b64encode(sample_png).decode()}),
        body(["Rate?", {"messages": [{"role": "user", "content": "Axis?"}]}]),
        body("Rate?", return_full_text=True, enable_turkish_commentary=True),
    ):
        response = server.post(path, data)
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
        assert response.json() == handler(data)


def test_parameters_may_stand_in_the_url_where_the_body_has_none(server: OurServer) -> None:
    query = "?max_new_tokens=3&do_sample=false&enable_turkish_commentary=False&details=true"
    [record] = server.post("/" + query, {"inputs": "Rate?"}).json()
    assert (record["details"]["generated_tokens"], "comment_text" in record) == (3, False)
    assert server.post("/" + query, {"inputs": "Rate?", "parameters": None}).json()[0]["details"]
    assert "details" not in server.post("/" + query, body()).json()[0]


@pytest.mark.parametrize("charset", ["", "; charset=utf-8", ";charset=UTF-8"])
def test_a_content_type_may_name_its_charset(server: OurServer, charset: str) -> None:
    headers = {"Content-Type": "Application/JSON" + charset}
    assert server.post("/", body("Atriyal fibrilasyon ğüşıöç?"), headers=headers).status_code == 200


def test_an_image_body_is_decoded_by_our_own_path(server: OurServer, handler: EndpointHandler) -> None:
    """The trace is in the transparency alone: what drops it, or lays it on black, sees an empty picture."""
    image = Image.new("RGBA", (500, 400), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 180, 500, 200))
    file = io.BytesIO()
    image.save(file, "PNG")
    raw = file.getvalue()
    query = "/?" + "&".join(f"{name}={str(value).lower()}" for name, value in PLAIN.items())
    response = server.post(query, raw, headers={"Content-Type": "image/png"})
    assert (response.status_code, response.json()) == (200, handler(body({"image": base64.b64encode(raw).decode()})))
    flattened = io.BytesIO()
    image.convert("RGB").save(flattened, "PNG")
    other = server.post(query, flattened.getvalue(), headers={"Content-Type": "image/png"})
    assert other.json() != response.json()
    assert events(server.post(query + "&stream=true", raw, headers={"Content-Type": "image/x-png; a=b"}))[-1] == (
        "record",
        response.json()[0],
    )


def test_every_response_names_the_request_and_is_kept_by_no_cache(server: OurServer) -> None:
    for method, path in (("POST", "/"), ("GET", "/health"), ("GET", "/nowhere"), ("DELETE", "/")):
        response = requests.request(
            method, server.url + path, timeout=PATIENCE, headers={"X-Request-Id": "trace-1.2_A"}
        )
        assert response.headers["x-request-id"] == "trace-1.2_A"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "server" not in response.headers


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "é", "{}", "a;b"])
def test_a_request_id_that_is_no_plain_word_is_replaced(server: OurServer, given: str) -> None:
    response = server.get("/health", headers={"X-Request-Id": given.encode("latin-1")})
    assert re.fullmatch("[0-9a-f]{16}", response.headers["x-request-id"])


# --- statuses

MALFORMED = [b"", b"  \n", b"{", b"nope", b"[]", b"5", b'"Rate?"', b"{}", b'{"inputs": []}', b'{"inputs": null}']
MALFORMED += [b'{"inputs": NaN}', b'{"inputs": Infinity}', b'{"inputs": "\xff"}', b'\x00{"inputs": "Rate?"}']
MALFORMED += [b'{"inputs": "\\ud800"}', b'{"inputs": "Rate?", "unknown": 1}', b'{"inputs": "Rate?"} {}']
MALFORMED += [b"[" * 100_000, b'{"inputs":' * 5_000, b'{"inputs": ' + b"1" * 5_000 + b"}", b"[" + b"{}," * 300_000]
MALFORMED += [json.dumps({"inputs": "Rate?"}).encode("utf-16"), b'{"inputs": "Rate?", "stream": 1}']
MALFORMED += [b'{"inputs": "Rate?", "messages": [{"role": "user", "content": "Rate?"}], "inputs": "Rhythm?"}']
MALFORMED += [b'{"inputs": {"image": "x", "query": "Rate?", "image": "y"}}']
MALFORMED += [b"[" + b",".join([b"7" * 150] * 190_000) + b"]"]
MALFORMED += [b"{" + b",".join(b'"%d":5' % n for n in range(150_000)) + b',"x":5,"x":5}']
MALFORMED += [b'{"inputs": ["a", "b"], "stream": true}', b'{"inputs": [], "stream": true}', b'{"stream": true}']


@pytest.mark.parametrize("data", MALFORMED, ids=lambda data: repr(data[:30]))
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_malformed_bodies_are_400_in_the_routes_own_shape(server: OurServer, path: str, data: bytes) -> None:
    response = server.post(path, data)
    assert response.status_code == 400
    if path == "/":
        [record] = response.json()
        assert list(record) == ERROR_FIELDS
        assert (record["success"], record["model"]) == (False, server.service.model_name)
        message = record["error"]
    else:
        error = response.json()["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["type"] == "invalid_request_error"
        message = error["message"]
    assert len(message) < 300
    assert response.elapsed.total_seconds() < 5


def test_of_two_values_under_one_name_none_is_taken(server: OurServer) -> None:
    """Which one counts differs from parser to parser: a gateway would check one, and the model read the other."""
    twice = server.post("/", b'{"inputs": {"query": "Rate?", "query": "Rhythm?"}}')
    assert (twice.status_code, "'query' twice" in twice.text) == (400, True)
    twice = server.post("/?seed=1&seed=2", {"inputs": "Rate?"})
    assert (twice.status_code, "twice" in twice.text) == (400, True)


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_other_content_types_are_400(server: OurServer, kind: str | None) -> None:
    for path in ("/", "/v1/chat/completions"):
        response = server.post(path, b'{"inputs": "Rate?"}', headers={"Content-Type": kind} if kind is not None else {})
        assert response.status_code == 400
        assert "application/json" in response.text


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        (body(max_new_tokens=5000), 422, "max_new_tokens"),
        (body(temprature=1), 422, "temperature"),
        (body({"image": "%%%"}), 422, "base64"),
        (body({"image": "http://127.0.0.1/x.png"}), 422, "refused"),
        (body({"image": base64.b64encode(b"BM" + bytes(16) + b"\xff\x7f\x00\x00" * 2 + bytes(40)).decode()}), 422, ""),
        (body("long " * 5_000), 422, "tokens"),
        (body(["x"] * 65), 413, "64"),
        (body([{"image": "%"}, {"query": 5}]), 422, "base64"),  # the highest of 422 and 400
        (body([{"image": "%"}, "Rate?"]), 200, "base64"),
    ],
)
def test_statuses_are_the_contracts(server: OurServer, data: Any, status: int, said: str) -> None:
    response = server.post("/", data)
    assert response.status_code == status
    assert said in response.text
    inputs = data["inputs"] if isinstance(data["inputs"], list) and status != 413 else [data["inputs"]]
    assert len(response.json()) == len(inputs)


def test_unknown_paths_and_methods(server: OurServer) -> None:
    for method, path, status in (
        ("GET", "/", 405),
        ("PUT", "/predict", 405),
        ("POST", "/health", 405),
        ("TRACE", "/", 405),
        ("GET", "/predict/", 404),
        ("POST", "/Jane%20Doe", 404),
        ("GET", "/ui", 404),
        ("GET", "/..%2f..%2fetc/passwd", 404),
    ):
        response = requests.request(method, server.url + path, timeout=PATIENCE)
        assert (response.status_code, list(response.json())) == (status, ["error"]), path
        assert ("allow" in response.headers) == (status == 405)
        assert response.headers.get("allow", "/openapi.json") in response.json()["error"]
    assert list(server.get("/v1/nothing").json()["error"]) == ["message", "type", "param", "code"]


def test_a_fault_of_ours_is_500_and_leaves_no_trace_of_what_was_sent(
    server: OurServer, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_args: object, **_options: object) -> None:
        raise RuntimeError("patient Jane Doe in /srv/secret")

    for place, name in ((handler._analyzer, "prepare"), (handler, "_report"), (server.service.workers, "start")):
        for path in ("/", "/v1/chat/completions"):
            data = body("Jane") if path == "/" else {"messages": [{"role": "user", "content": "Jane"}]}
            with monkeypatch.context() as patched:
                patched.setattr(place, name, broken)
                response = server.post(path, data, headers={**JSON, "X-Request-Id": "trace-5"})
            assert response.status_code == 500
            assert path != "/" or response.json()[0]["model"] == handler.model_name
            assert "reference trace-5" in response.text
            assert "request_id=trace-5 RuntimeError at test_serve_native.py" in caplog.text
    assert "Jane" not in caplog.text
    assert "srv" not in caplog.text
    assert server.post("/", body()).status_code == 200


def test_a_panic_of_a_library_ends_one_request(
    server: OurServer, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of Rust's libraries are no ``Exception``."""

    def panic(*_args: object, **_options: object) -> None:
        raise BaseException("patient Jane Doe")

    monkeypatch.setattr(handler, "_report", panic)
    response = server.post("/", body("Jane"), headers={**JSON, "X-Request-Id": "trace-5"})
    [record] = response.json()
    assert (response.status_code, record["model"]) == (500, handler.model_name)
    assert "reference trace-5" in record["error"]
    assert "request_id=trace-5 BaseException at test_serve_native.py" in caplog.text
    assert "Jane" not in caplog.text


# --- the stream


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_an_answer_that_is_not_streamed_is_computed_whole(
    server: OurServer, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """That costs the engine less."""
    whole, stream = list[bool](), handler._analyzer.stream

    def watched(*args: Any, **options: Any) -> Any:
        whole.append(options["whole"])
        return stream(*args, **options)

    monkeypatch.setattr(handler._analyzer, "stream", watched)
    data = body() if path == "/" else {"messages": [{"role": "user", "content": "Rate?"}], "max_tokens": 4}
    for streamed in (False, True):
        assert server.post(path, {**data, "stream": streamed}).status_code == 200
    assert whole == [True, False]


def test_an_event_has_one_line_whatever_a_reader_takes_for_its_end() -> None:
    """Hugging Face's client, for one, splits as ``str.splitlines`` does."""
    text = "".join(map(chr, range(0x3000))) + "\U0001fac0"
    [name, data, end] = sse.event({"text": text}, "text").decode().splitlines()
    assert (name, json.loads(data.removeprefix("data: ")), end) == ("event: text", {"text": text}, "")
    assert "ğüşıöç".encode() in sse.event({"text": "ğüşıöç"})


def test_a_stream_tells_the_record_piece_by_piece(server: OurServer, handler: EndpointHandler) -> None:
    data = body(details=True, enable_turkish_commentary=True)
    told = streamed(server, data, headers={**JSON, "X-Request-Id": "trace-9"})
    names = [name for name, _ in told]
    assert names == ["start", *["text"] * (len(told) - 3), "answer", "record"]
    assert told[0][1] == {"id": "trace-9", "model": handler.model_name}
    pieces = [data["text"] for name, data in told if name == "text"]
    assert all(pieces)
    [record] = handler(data)
    record.pop("details"), told[-1][1].pop("details")
    assert told[-1][1] == record
    assert "".join(pieces) == record["generated_text"]
    assert list(told[-2][1]) == ["generated_text", "model", "processing_method", "details"]


def test_the_question_is_in_the_record_and_in_no_piece(server: OurServer) -> None:
    told = streamed(server, body("Secret?", return_full_text=True))
    pieces = "".join(data["text"] for name, data in told if name == "text")
    assert told[-1][1]["generated_text"] == f"Secret?\n{pieces}"


def test_a_list_of_one_may_be_streamed(server: OurServer) -> None:
    assert streamed(server, body(["Rate?"]))[-1] == ("record", server.post("/", body()).json()[0])


@pytest.mark.parametrize("value", [False, None])
def test_a_stream_that_is_not_asked_for(server: OurServer, value: object) -> None:
    assert server.post("/", {**body(), "stream": value}).json() == server.post("/", body()).json()


def test_errors_before_the_first_event_are_ordinary_ones(server: OurServer) -> None:
    response = server.post("/", {**body({"image": "%"}), "stream": True})
    assert (response.status_code, response.headers["content-type"]) == (422, "application/json")
    assert list(response.json()[0]) == ERROR_FIELDS


def test_an_error_in_mid_answer_is_the_last_event(
    server: OurServer, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pulse_ecg.errors import OutOfMemoryError

    stream = handler._analyzer.stream

    class Failing:
        def __init__(self, inner: Any) -> None:
            self.inner, self.close = inner, inner.close

        def __iter__(self) -> Iterator[Any]:
            for number, step in enumerate(self.inner):
                if number == 4:
                    raise OutOfMemoryError("No memory is left.")
                yield step

    monkeypatch.setattr(handler._analyzer, "stream", lambda *args, **options: Failing(stream(*args, **options)))
    told = streamed(server, body())
    assert [name for name, _ in told[:2]] == ["start", "text"]
    name, record = told[-1]
    assert (name, list(record)) == ("error", [*ERROR_FIELDS, "status"])
    assert (record["error"], record["status"]) == ("No memory is left.", 503)


def test_the_commentary_comes_with_the_last_event(handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    from pulse_ecg.config import Settings
    from utils import DeepSeekClient

    with chat_server(answer()) as service, our_server(handler) as server:
        client = DeepSeekClient(Settings(commentary_key="sk-0", commentary_base_url=service.url))
        monkeypatch.setattr(handler, "_commentary", client)
        told = streamed(server, body(enable_turkish_commentary=True))
        client.close()
    assert "comment_text" not in told[-2][1]
    assert (told[-1][1]["comment_text"], told[-1][1]["commentary_status"]) == (TURKISH, "success")


def test_comments_keep_the_connection_alive_while_there_is_nothing_to_tell(
    server: OurServer, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils import Commentary

    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    asked, go = threading.Event(), threading.Event()

    class Waiting:
        def comment_all(self, *_: object, **__: object) -> list[Commentary]:
            asked.set()
            assert go.wait(PATIENCE)
            return [Commentary("no_text")]

    monkeypatch.setattr(handler, "_commentary", Waiting())
    data = {**body(enable_turkish_commentary=True), "stream": True}
    with requests.post(server.url, json=data, stream=True, timeout=PATIENCE) as response:
        assert asked.wait(PATIENCE)
        lines = response.iter_lines()
        comments = 0
        while comments < 3:
            comments += next(lines) == b": keep-alive"
        go.set()
        assert [line for line in lines if line.startswith(b"event")][-1] == b"event: record"


# --- backpressure and time


def test_past_the_queue_requests_are_refused_as_a_whole(
    server: OurServer, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "_admission", Admission(1, 0))
    chat = {"messages": [{"role": "user", "content": "Rate?"}]}
    with handler._admission.admitted():
        for data in (body(["a", "b"]), {**body(), "stream": True}, b"not even read"):
            response = server.post("/", data)
            assert (response.status_code, len(response.json())) == (429, 1)
            assert int(response.headers["retry-after"]) > 0
        response = server.post("/v1/chat/completions", chat)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(response.headers["retry-after"]) > 0
        ready = server.get("/ready")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
    assert server.get("/ready").json()["ready"] is True
    assert server.post("/", body()).status_code == 200


def test_what_is_refused_before_the_handler_is_asked_is_counted_and_logged(
    server: OurServer, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pulse.requests")

    def outcomes() -> Counter[str]:
        counts = Counter[str]()
        for entry in handler.monitor.snapshot()["requests"]:
            counts[entry["outcome"]] += entry["count"]
        return counts

    before = outcomes()
    server.post("/", b"{")
    server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Rate?"}], "model": "gpt-9"})
    server.post("/v1/chat/completions", {"messages": []})
    server.get("/v1/models/gpt-9")  # asks for no answer
    server.post("/nowhere", body())
    monkeypatch.setattr(handler, "_admission", Admission(1, 0))
    with handler._admission.admitted():
        server.post("/", body())
    server.quiet()
    assert outcomes() - before == {"malformed": 3, "busy": 1}
    lines = [json.loads(record.message) for record in caplog.records if record.name == "pulse.requests"]
    assert [line["outcome"] for line in lines] == ["malformed"] * 3 + ["busy"]
    assert all(line["request_id"] and line["engine"] for line in lines)


def test_one_that_comes_when_the_queue_fills_up_is_refused_too(
    server: OurServer, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The early look is not the last word: two may pass it for one place."""
    monkeypatch.setattr(handler, "_admission", Admission(1, 0))
    monkeypatch.setattr(type(server.service), "full", False)
    with handler._admission.admitted():
        response = server.post("/", body(["a", "b"]))
    assert (response.status_code, len(response.json())) == (429, 1)


def test_no_more_is_kept_of_bodies_than_there_is_memory_for(server: OurServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.quiet()  # what an earlier request took comes back after its answer
    monkeypatch.setattr(server.service.bodies, "_left", 1000)
    response = server.post("/", body("x" * SMALL_BODY_BYTES))
    assert (response.status_code, "retry-after" in response.headers) == (429, True)
    server.quiet()
    assert server.service.bodies._left == 1000
    assert server.post("/", body()).status_code == 200
    server.quiet()
    assert server.service.bodies._left == 1000


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_memory_for_a_body_is_what_its_text_takes_there(
    server: OurServer, monkeypatch: pytest.MonkeyPatch, path: str, escaped: bool
) -> None:
    """One emoji makes each character of its string take four bytes; beside it, an image's base64 takes one."""
    server.quiet()
    monkeypatch.setattr(server.service.bodies, "_left", 3 * SMALL_BODY_BYTES)

    def status(question: str, image: str) -> int:
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": image}}]
        messages = [{"role": "user", "content": content}]
        data = {"messages": messages} if path != "/" else {"inputs": {"messages": messages}}
        return server.post(path, json.dumps(data, ensure_ascii=escaped).encode()).status_code

    assert status("\U0001fac0" + "x" * SMALL_BODY_BYTES, "") == 429
    assert status("\U0001fac0", "data:image/png;base64," + "%" * SMALL_BODY_BYTES) in (400, 422)
    server.quiet()
    assert server.service.bodies._left == 3 * SMALL_BODY_BYTES


def test_what_has_no_effect_is_not_kept(
    server: OurServer, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, respond = list[Any](), handler.respond
    monkeypatch.setattr(handler, "respond", lambda data, call: given.append(data) or respond(data, call))
    assert server.post("/", {**body(), "options": {"use_cache": False}}).status_code == 200
    assert given == [body()]


def test_past_its_time_a_request_is_504(handler: EndpointHandler) -> None:
    with our_server(handler, request_timeout=0.05) as server:
        data = body(max_new_tokens=2000, stop=[])
        response = server.post("/", data)
        assert (response.status_code, response.json()[0]["success"]) == (504, False)
        name, record = streamed(server, data)[-1]
        assert (name, record["status"]) == ("error", 504)
        chat = {"messages": [{"role": "user", "content": "Rate?"}], "max_tokens": 2000, "stop": "zzzz"}
        response = server.post("/v1/chat/completions", chat)
        assert (response.status_code, response.json()["error"]["type"]) == (504, "server_error")


def test_a_stuck_handler_does_not_keep_the_caller(handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    go, prepare = threading.Event(), handler._analyzer.prepare
    monkeypatch.setattr("server.jobs.GRACE_S", 0.1)
    monkeypatch.setattr(
        handler._analyzer, "prepare", lambda *request, **how: go.wait(PATIENCE) and prepare(*request, **how)
    )
    with our_server(handler, request_timeout=0.2) as server:
        response = server.post("/", body())
        assert (response.status_code, response.json()[0]["error"][:10]) == (504, "The answer")
        assert handler.admission.full is False
        assert handler.admission.waiting == 0
        go.set()
        server.quiet()


def test_eight_answers_at_once_and_the_others_wait(server: OurServer, handler: EndpointHandler) -> None:
    with ThreadPoolExecutor(24) as threads:
        answers = list(threads.map(lambda _: server.post("/", body()), range(24)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    until(lambda: handler.admission.running == handler.admission.waiting == 0)
