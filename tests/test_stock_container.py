"""The stock container lets one call in at a time until it is told otherwise, and nothing else of it is touched."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest

from pulse_ecg.stock_container import admit_requests
from tests.test_handler import PLAIN

NAME = "huggingface_inference_toolkit.async_utils"
PATIENCE = 60.0

# As the toolkit guards its calls: by a semaphore of the module's, looked up at each of them.
SOURCE = """
import functools
import anyio

MAX_THREADS_GUARD = anyio.Semaphore(1)


async def async_handler_call(handler, body):
    async with MAX_THREADS_GUARD:
        return await anyio.to_thread.run_sync(functools.partial(handler, body))
"""


def toolkit() -> Any:
    module = ModuleType(NAME)
    exec(SOURCE, module.__dict__)
    return module


def four_calls(module: Any, handler: Callable[[Any], Any], *, first: Callable[[], object] = lambda: None) -> list[Any]:
    """The answers to requests that come at once; ``first`` runs before them, within the server's event loop."""
    answers: list[Any] = [None] * 4

    async def call(number: int) -> None:
        answers[number] = await module.async_handler_call(handler, number)

    async def serve() -> None:
        first()
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(call, number)

    anyio.run(serve)
    return answers


class Room:
    """Counts who is in it at once."""

    def __init__(self) -> None:
        self.most = self.now = 0
        self._lock = threading.Lock()

    def __call__(self, body: Any) -> Any:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.02)
        with self._lock:
            self.now -= 1
        return body


@pytest.mark.parametrize("made_in_loop", [False, True])
@pytest.mark.parametrize("told_in_loop", [False, True])
def test_several_calls_are_let_in_at_once(
    made_in_loop: bool, told_in_loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The container imports and starts the handler before its event loop runs, or within it."""
    module = None

    async def make() -> None:
        nonlocal module
        module = toolkit()

    if made_in_loop:
        anyio.run(make)
    module = module or toolkit()
    room = Room()
    assert four_calls(module, room) == [0, 1, 2, 3]
    assert room.most == 1
    monkeypatch.setitem(sys.modules, NAME, module)
    if not told_in_loop:
        assert admit_requests(4)
    together = threading.Barrier(4, timeout=PATIENCE)  # is passed by four at once or by none
    first = (lambda: admit_requests(4)) if told_in_loop else (lambda: None)
    four_calls(module, lambda body: together.wait(), first=first)


def test_no_more_than_the_limit_are_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module, room = toolkit(), Room()
    monkeypatch.setitem(sys.modules, NAME, module)
    assert admit_requests(2)
    assert four_calls(module, room) == [0, 1, 2, 3]
    assert room.most == 2


@pytest.mark.parametrize("guard", [None, threading.Semaphore(1), 1, anyio.Semaphore])
def test_a_container_that_works_otherwise_is_left_alone(guard: object, monkeypatch: pytest.MonkeyPatch) -> None:
    module = toolkit()
    module.MAX_THREADS_GUARD = guard
    monkeypatch.setitem(sys.modules, NAME, module)
    before = dict(vars(module))
    assert not admit_requests(4)
    assert vars(module) == before
    del module.MAX_THREADS_GUARD
    assert not admit_requests(4)
    assert not hasattr(module, "MAX_THREADS_GUARD")


def test_without_a_container_nothing_is_imported() -> None:
    assert NAME not in sys.modules
    assert not admit_requests(4)
    assert NAME not in sys.modules and NAME.partition(".")[0] not in sys.modules


def test_the_handler_lets_several_requests_in_as_it_starts(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from handler import EndpointHandler

    module = toolkit()
    monkeypatch.setitem(sys.modules, NAME, module)
    monkeypatch.setenv("PULSE_DEVICE", "cpu")
    monkeypatch.setenv("PULSE_MAX_CONCURRENT_REQUESTS", "4")
    handler = EndpointHandler(str(demo_checkpoint))
    together, prepare = threading.Barrier(4, timeout=PATIENCE), handler._analyzer.prepare

    def prepare_together(request: Any, **how: Any) -> Any:
        together.wait()
        return prepare(request, **how)

    monkeypatch.setattr(handler._analyzer, "prepare", prepare_together)
    answers = four_calls(module, lambda number: handler({"inputs": f"Rate {number}?", "parameters": PLAIN}))
    assert all(record["generated_text"] and "error" not in record for (record,) in answers)


@pytest.mark.parametrize("stock", [True, False])
def test_a_container_whose_device_is_lost_ends_once_its_last_answers_are_sent(
    stock: bool, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its health check would go on saying that all is well; a server of ours says itself that it is not."""
    from handler import EndpointHandler

    started, exits = list[threading.Timer](), list[int]()

    def note(timer: threading.Timer) -> None:
        started.append(timer)

    monkeypatch.setattr(threading.Timer, "start", note)
    monkeypatch.setattr(os, "_exit", exits.append)
    if stock:
        monkeypatch.setitem(sys.modules, NAME, toolkit())
    monkeypatch.setenv("PULSE_DEVICE", "cpu")
    handler = EndpointHandler(str(demo_checkpoint))
    asked = {"inputs": "Rate?", "parameters": PLAIN}
    assert "error" not in handler(asked)[0]
    assert not started
    monkeypatch.setattr(handler._analyzer._generator.engine, "_lost", True)
    for _ in range(2):
        assert handler(asked)[0]["success"] is False
    assert len(started) == caplog.text.count("the process ends") == stock
    for timer in started:
        assert timer.daemon and 0 < timer.interval <= 5
        timer.function(*timer.args, **timer.kwargs)
    assert exits == [1] * stock
