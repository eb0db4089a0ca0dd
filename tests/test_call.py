"""A host that listens, hangs up, or is in a hurry: `EndpointHandler.respond` beside the plain call."""

from __future__ import annotations

import base64
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from pulse_ecg.admission import Admission
from pulse_ecg.call import Answered, Call, Progress, Started, TextPiece
from pulse_ecg.cancellation import Cancellation
from pulse_ecg.engine.scheduler import TransformersEngine
from pulse_ecg.errors import DeadlineExceededError, ParameterError, RequestCancelledError
from pulse_ecg.fetch import FetchPolicy
from tests.commentary_service import answer as chat_answer
from tests.commentary_service import chat_server, slow_first_byte
from tests.servers import ImageHost, silent
from utils import Commentary, DeepSeekClient

PATIENCE = 30.0
PLAIN = {"max_new_tokens": 24, "do_sample": False, "enable_turkish_commentary": False}
COMMENTED = PLAIN | {"enable_turkish_commentary": True}


def body(inputs: object = "Rate?", **parameters: object) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": PLAIN | parameters}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Waiting:
    """In the commentary client's place: answers when it is let."""

    def __init__(self) -> None:
        self.asked, self.go = threading.Semaphore(0), threading.Event()
        self.timeouts: list[float] = []

    def comment_all(self, english_texts: list[str], *, timeout_s: float, cancel: Any = None) -> list[Commentary]:
        self.timeouts.append(timeout_s)
        self.asked.release()
        assert self.go.wait(PATIENCE)
        return [Commentary("success", "Türkçe.", "deepseek-x", 1) for _ in english_texts]


@pytest.fixture
def commentary(handler: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiting]:
    waiting = Waiting()
    monkeypatch.setattr(handler, "_commentary", waiting)
    yield waiting
    waiting.go.set()


# --- listening


def test_what_is_told_on_the_way_is_the_answer(handler: Any, sample_png: bytes) -> None:
    inputs = {"query": "Rate?", "image": base64.b64encode(sample_png).decode()}
    told: list[Progress] = []
    data = body(inputs, details=True, enable_turkish_commentary=True)
    [outcome] = handler.respond(data, Call(listen=told.append))
    assert told[0] == Started(handler.model_name)
    pieces = told[1:-1]
    assert len(pieces) > 1
    assert all(isinstance(piece, TextPiece) and piece.text for piece in pieces)
    assert "".join(piece.text for piece in pieces) == outcome.record["generated_text"]
    assert isinstance(told[-1], Answered)
    before = told[-1].record
    assert list(before) == ["generated_text", "model", "processing_method", "details"]
    assert (outcome.status, outcome.record["commentary_status"]) == (200, "api_key_missing")
    assert outcome.record["details"]["timings"].items() >= before["details"]["timings"].items()
    assert handler(body(inputs))[0]["generated_text"] == outcome.record["generated_text"]


def test_the_question_that_is_asked_for_in_the_record_is_in_no_piece(handler: Any) -> None:
    told: list[Progress] = []
    [outcome] = handler.respond(body("Secret?", return_full_text=True), Call(listen=told.append))
    joined = "".join(piece.text for piece in told if isinstance(piece, TextPiece))
    assert outcome.record["generated_text"] == f"Secret?\n{joined}"
    assert "Secret" not in repr(told) + repr(outcome)


def test_nothing_is_told_of_a_request_that_is_refused(handler: Any) -> None:
    told: list[Progress] = []
    [outcome] = handler.respond(body(top_p=7), Call(listen=told.append))
    assert (outcome.status, type(outcome.error), told) == (422, ParameterError, [])
    [outcome] = handler.respond(body({"image": "%"}), Call(listen=told.append))
    assert (outcome.status, told) == (422, [])


@pytest.mark.parametrize(
    ("data", "status"), [([], 400), ({"inputs": None}, 400), ({"inputs": "?", "parameters": {"seed": -1}}, 422)]
)
def test_outcomes_carry_the_errors_status(handler: Any, data: object, status: int) -> None:
    [outcome] = handler.respond(data)
    assert (outcome.status, outcome.record["error"]) == (status, str(outcome.error))
    assert handler(data) == [outcome.record]


def test_the_request_id_is_in_the_log_and_in_references(
    handler: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pulse.requests")
    with monkeypatch.context() as broken:
        broken.setattr(TransformersEngine, "_prefill_chunk", lambda *_: 1 / 0)
        [outcome] = handler.respond(body(), Call("trace-17"))
    assert outcome.status == 500
    assert "reference trace-17" in outcome.record["error"]
    assert '"request_id":"trace-17"' in caplog.text
    handler.respond(body(), Call("no good\n{}"))
    assert re.search(r'"request_id":"[0-9a-f]{16}"', caplog.records[-1].getMessage())


# --- hanging up


def test_hanging_up_stops_the_answer_within_one_token(handler: Any) -> None:
    cancel, pieces = Cancellation(), list[str]()

    def listen(progress: Progress) -> None:
        if isinstance(progress, TextPiece):
            pieces.append(progress.text)
            if len(pieces) == 2:
                cancel.set()

    [outcome] = handler.respond(body(max_new_tokens=2000, stop=[]), Call(cancel=cancel, listen=listen))
    assert isinstance(outcome.error, RequestCancelledError)
    assert len(pieces) == 2
    assert (handler.admission.running, handler.admission.waiting) == (0, 0)
    assert handler.monitor.snapshot()["active_requests"] == 0


def test_hanging_up_before_the_model_is_asked_costs_it_nothing(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel = Cancellation()
    with monkeypatch.context() as watched:
        watched.setattr(TransformersEngine, "submit", lambda *_: pytest.fail("the model was asked"))
        [outcome] = handler.respond(body(), Call(cancel=cancel, listen=lambda _: cancel.set()))
    assert outcome.status == 499


def test_hanging_up_during_the_commentary_does_not_wait_for_it(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel = Cancellation()
    with chat_server(slow_first_byte()) as server:
        from pulse_ecg.config import Settings

        client = DeepSeekClient(Settings(commentary_key="sk-0", commentary_base_url=server.url))
        monkeypatch.setattr(handler, "_commentary", client)
        with ThreadPoolExecutor(1) as threads:
            pending = threads.submit(handler.respond, body(enable_turkish_commentary=True), Call(cancel=cancel))
            until(lambda: bool(server.requests))
            started = time.monotonic()
            cancel.set()
            [outcome] = pending.result(PATIENCE)
        assert time.monotonic() - started < 5
        assert outcome.status == 499
        server.script = [chat_answer()]
        assert client.comment("Normal sinus rhythm.", timeout_s=PATIENCE).status == "success", "it is still of use"
        client.close()


# --- deadlines


def test_past_the_deadline_the_answer_is_an_error(handler: Any) -> None:
    [outcome] = handler.respond(body(), Call(deadline=time.monotonic() - 1))
    assert (type(outcome.error), outcome.status) == (DeadlineExceededError, 504)
    assert outcome.record["success"] is False


def test_the_commentary_gets_what_is_left_of_the_time(handler: Any, commentary: Waiting) -> None:
    commentary.go.set()
    handler.respond(body(enable_turkish_commentary=True), Call(deadline=time.monotonic() + 5))
    handler.respond(body(enable_turkish_commentary=True), Call(deadline=time.monotonic() + 500))
    short, whole = commentary.timeouts
    assert 0 < short < 5
    assert whole == 30


# --- places


@pytest.mark.parametrize("inputs", ["Rate?", ["Rate?", "Axis?", "Rhythm?"]], ids=["one", "batch"])
def test_waiting_for_the_commentary_takes_no_place(
    handler: Any, commentary: Waiting, monkeypatch: pytest.MonkeyPatch, inputs: Any
) -> None:
    monkeypatch.setattr(handler, "_admission", Admission(1, 0))
    count = len(inputs) if isinstance(inputs, list) else 1
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(handler, body(inputs, enable_turkish_commentary=True))
        assert commentary.asked.acquire(timeout=PATIENCE)
        assert "error" not in handler(body())[0]
        assert not slow.done()
        commentary.go.set()
        assert [record["commentary_status"] for record in slow.result(PATIENCE)] == ["success"] * count


def test_fetching_an_image_takes_no_place(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "_admission", Admission(1, 1))
    prepare, fetching, go = handler._analyzer.prepare, threading.Event(), threading.Event()

    def slow(request: Any, **how: Any) -> Any:
        if request.conversation.question == "slow":
            fetching.set()
            assert go.wait(PATIENCE)
        return prepare(request, **how)

    monkeypatch.setattr(handler._analyzer, "prepare", slow)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(handler, body("slow"))
        assert fetching.wait(PATIENCE)
        assert "error" not in handler(body())[0]
        go.set()
        assert "error" not in first.result(PATIENCE)[0]


def test_a_batch_never_has_more_places_than_there_are(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    admission = Admission(2, 5)
    monkeypatch.setattr(handler, "_admission", admission)
    running: list[int] = []
    call = Call(listen=lambda told: running.append(admission.running) if isinstance(told, TextPiece) else None)
    outcomes = handler.respond(body(["a", "b", "c", "d", "e"]), call)
    assert [outcome.status for outcome in outcomes] == [200] * 5
    assert 1 <= max(running) <= 2


def test_the_items_of_all_batches_hold_no_more_images_than_single_requests(
    handler: Any, sample_png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 64 in every place of the queue would otherwise hold gigabytes, from a few kilobytes of URLs."""
    settings = handler._settings
    assert handler._with_images.concurrent == settings.max_concurrent_requests + settings.max_queued_requests
    monkeypatch.setattr(handler, "_with_images", Admission(3, 0))
    prepare, lock, present, most, go = handler._analyzer.prepare, threading.Lock(), [], [], threading.Event()

    def counted(request: Any, **how: Any) -> Any:
        if request.image is None:
            return prepare(request, **how)
        with lock:
            present.append(request)
            most.append(len(present))
        assert go.wait(PATIENCE)
        with lock:
            present.pop()
        return prepare(request, **how)

    monkeypatch.setattr(handler._analyzer, "prepare", counted)
    cancel = Cancellation()
    with ThreadPoolExecutor(3) as threads:
        asked = {"query": "Rate?", "image": base64.b64encode(sample_png).decode()}
        batches = [threads.submit(handler, body([asked] * 4)) for _ in range(2)]
        until(lambda: len(present) == 3)
        waiting = threads.submit(handler.respond, body(asked), Call(cancel=cancel))
        until(lambda: handler._with_images._waiters and len(handler._with_images._waiters) == 6)
        assert handler(body())[0]["generated_text"]  # text has no part in it
        cancel.set()  # who waits for his turn notices it at once
        assert isinstance(waiting.result(PATIENCE)[0].error, RequestCancelledError)
        go.set()
        records = [record for batch in batches for record in batch.result(PATIENCE)]
    assert max(most) == 3
    assert len(records) == 8
    assert all(record["generated_text"] for record in records)


@pytest.mark.parametrize("where", ["fetched", "decoded"])
def test_nobody_waits_for_the_image_of_a_caller_who_has_gone(
    where: str, handler: Any, sample_png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel, decoding = Cancellation(), Admission(1, 0)
    monkeypatch.setattr(handler._analyzer, "_policy", FetchPolicy(allow_private=True))
    monkeypatch.setattr(handler._analyzer, "_decoding", decoding)
    with ExitStack() as held, ThreadPoolExecutor(1) as threads:
        host = ImageHost({"/ecg.png": silent})
        held.callback(host.close)
        if where == "fetched":
            image, arrived = host.url("/ecg.png"), lambda: bool(host.requests)
        else:
            held.enter_context(decoding.place())
            image, arrived = base64.b64encode(sample_png + b"1").decode(), lambda: bool(decoding._waiters)
        outcome = threads.submit(handler.respond, body({"image": image}), Call(cancel=cancel))
        until(arrived)
        since = time.monotonic()
        cancel.set()
        assert isinstance(outcome.result(PATIENCE)[0].error, RequestCancelledError)
        assert time.monotonic() - since < 3
    assert handler._with_images.running == 0


def test_an_image_whose_turn_to_be_decoded_does_not_come_in_time(
    handler: Any, sample_png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler._analyzer, "_decoding", decoding := Admission(1, 0))
    with decoding.place():
        asked = body({"image": base64.b64encode(sample_png + b"2").decode()})
        [outcome] = handler.respond(asked, Call(deadline=time.monotonic() + 0.1))
    assert isinstance(outcome.error, DeadlineExceededError)


@pytest.mark.parametrize("threads_left", [0, 1])
def test_a_batch_is_answered_where_the_system_has_no_more_threads(
    threads_left: int, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, left = threading.Thread.start, [threads_left]

    def scarce(thread: threading.Thread) -> None:
        if thread.name.startswith("ThreadPoolExecutor"):
            if not left[0]:
                raise RuntimeError("can't start new thread")
            left[0] -= 1
        start(thread)

    alone = [handler(body(f"Rate {n}?"))[0] for n in range(5)]
    monkeypatch.setattr(threading.Thread, "start", scarce)
    assert handler(body([f"Rate {n}?" for n in range(5)])) == alone
