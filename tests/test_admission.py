"""Never more at work than may be, never more waiting than may wait, and every place is given back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from pulse_ecg.admission import Admission
from pulse_ecg.errors import QueueFullError

PATIENCE = 20.0


class Work:
    """Blocks of work that last until they are let go."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.entered = threading.Semaphore(0)
        self.go = threading.Event()

    def __call__(self) -> str:
        with self.admission.admitted():
            self.entered.release()
            assert self.go.wait(PATIENCE)
            return "done"

    def wait_for(self, count: int) -> None:
        """Until ``count`` of them are at work."""
        for _ in range(count):
            assert self.entered.acquire(timeout=PATIENCE)


@contextmanager
def busy(admission: Admission, *, working: int, waiting: int) -> Iterator[tuple[Work, list[Future[str]]]]:
    """That many at work, and that many in the queue."""
    work = Work(admission)
    with ThreadPoolExecutor(working + waiting) as threads:
        try:
            futures = [threads.submit(work) for _ in range(working + waiting)]
            work.wait_for(working)
            deadline = time.monotonic() + PATIENCE
            while admission._present < working + waiting and time.monotonic() < deadline:
                time.sleep(0.001)
            yield work, futures
        finally:
            work.go.set()


def test_the_next_after_a_full_queue_is_refused_at_once() -> None:
    admission = Admission(2, 3)
    with busy(admission, working=2, waiting=3) as (work, futures):
        for _ in range(3):
            with pytest.raises(QueueFullError, match="try again") as caught, admission.admitted():
                pytest.fail("let in")
        assert caught.value.status == 429
        assert not work.entered.acquire(blocking=False)  # nobody who waits was let in meanwhile
        work.go.set()
        assert [future.result(PATIENCE) for future in futures] == ["done"] * 5
    with admission.admitted():
        pass


def test_without_a_queue_nobody_waits() -> None:
    admission = Admission(1, 0)
    with admission.admitted(), pytest.raises(QueueFullError), admission.admitted():
        pytest.fail("let in")


def test_a_place_given_back_lets_the_next_one_in() -> None:
    admission = Admission(1, 1)
    with busy(admission, working=1, waiting=1) as (work, futures):
        work.go.set()
        assert [future.result(PATIENCE) for future in futures] == ["done", "done"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_error_gives_its_place_back(error: type[BaseException]) -> None:
    admission = Admission(1, 0)
    for _ in range(3):
        with pytest.raises(error), admission.admitted():
            raise error
    with admission.admitted():
        pass


def test_sixteen_threads_are_all_served_and_never_more_than_three_at_once() -> None:
    admission, lock = Admission(3, 13), threading.Lock()
    start = threading.Barrier(16)
    inside, most, served = 0, 0, 0

    def request() -> None:
        nonlocal inside, most, served
        start.wait(PATIENCE)
        for _ in range(5):
            with admission.admitted():
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.001)
                with lock:
                    inside -= 1
                    served += 1

    with ThreadPoolExecutor(16) as threads:
        for future in [threads.submit(request) for _ in range(16)]:
            future.result(PATIENCE)
    assert (served, most, inside) == (80, 3, 0)


def test_threads_that_are_refused_leave_the_others_alone() -> None:
    admission = Admission(1, 1)
    start = threading.Barrier(16)

    def request() -> bool:
        start.wait(PATIENCE)
        try:
            with admission.admitted():
                time.sleep(0.01)
        except QueueFullError:
            return False
        return True

    with ThreadPoolExecutor(16) as threads:
        outcomes = [future.result(PATIENCE) for future in [threads.submit(request) for _ in range(16)]]
    assert outcomes.count(True) >= 2
    with admission.admitted():
        pass
