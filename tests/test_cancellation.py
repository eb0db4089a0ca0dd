"""Hanging up is heard once by everyone who listens, whenever they begin to."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from pulse_ecg.cancellation import Cancellation


def test_listeners_are_called_once_and_only_while_they_listen() -> None:
    cancel, heard = Cancellation(), list[str]()
    with cancel.calling(lambda: heard.append("gone before")):
        pass
    with cancel.calling(lambda: heard.append("first")), cancel.calling(lambda: heard.append("second")):
        cancel.set()
        cancel.set()
    assert heard == ["first", "second"]
    assert cancel.is_set()


def test_who_comes_late_is_told_at_once() -> None:
    cancel, heard = Cancellation(), list[str]()
    cancel.set()
    with cancel.calling(lambda: heard.append("late")):
        assert heard == ["late"]
    assert heard == ["late"]


def test_no_listener_is_missed_or_called_twice_while_threads_set_and_listen() -> None:
    with ThreadPoolExecutor(8) as threads:
        for _ in range(200):
            cancel, heard, start = Cancellation(), list[int](), threading.Barrier(8)

            def listen(cancel=cancel, heard=heard, start=start) -> None:
                start.wait(10)
                with cancel.calling(lambda: heard.append(1)):
                    assert cancel.wait(10)

            def hang_up(cancel=cancel, start=start) -> None:
                start.wait(10)
                cancel.set()

            done = [threads.submit(listen) for _ in range(7)] + [threads.submit(hang_up)]
            for future in done:
                future.result(10)
            assert len(heard) == 7
