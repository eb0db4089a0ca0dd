"""Never more at work than may be, never more present than may wait, first come first served, and nothing is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from pulse_ecg.admission import Admission
from pulse_ecg.cancellation import Cancellation
from pulse_ecg.errors import DeadlineExceededError, QueueFullError, RequestCancelledError

PATIENCE = 20.0


class Work:
    """Requests that hold their place until they are let go."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.entered = threading.Semaphore(0)
        self.go = threading.Event()

    def __call__(self) -> str:
        with self.admission.admitted() as request, self.admission.place(request):
            self.entered.release()
            assert self.go.wait(PATIENCE)
            return "done"

    def wait_for(self, count: int) -> None:
        """Until ``count`` of them are at work."""
        for _ in range(count):
            assert self.entered.acquire(timeout=PATIENCE)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def busy(admission: Admission, *, working: int, waiting: int) -> Iterator[tuple[Work, list[Future[str]]]]:
    """That many at work, and that many in the queue."""
    work = Work(admission)
    with ThreadPoolExecutor(working + waiting) as threads:
        try:
            futures = [threads.submit(work) for _ in range(working + waiting)]
            work.wait_for(working)
            until(lambda: len(admission._waiters) == waiting)
            yield work, futures
        finally:
            work.go.set()


def test_the_next_after_a_full_queue_is_refused_at_once() -> None:
    admission = Admission(2, 3)
    with busy(admission, working=2, waiting=3) as (work, futures):
        assert (admission.running, admission.waiting, admission.full) == (2, 3, True)
        for _ in range(3):
            with pytest.raises(QueueFullError, match="try again") as caught, admission.admitted():
                pytest.fail("let in")
        assert caught.value.status == 429
        assert not work.entered.acquire(blocking=False)  # nobody who waits was let in meanwhile
        work.go.set()
        assert [future.result(PATIENCE) for future in futures] == ["done"] * 5
    assert (admission.running, admission.waiting, admission.full) == (0, 0, False)


def test_without_a_queue_nobody_waits() -> None:
    admission = Admission(1, 0)
    with admission.admitted(), pytest.raises(QueueFullError), admission.admitted():
        pytest.fail("let in")


def test_who_is_present_without_a_place_takes_none_from_others() -> None:
    admission = Admission(1, 1)
    with admission.admitted():  # its image is on its way
        with admission.admitted() as request, admission.place(request):
            assert (admission.running, admission.waiting) == (1, 1)
        assert (admission.running, admission.waiting) == (0, 1)


def test_who_waits_is_counted_whatever_the_others_hold() -> None:
    admission = Admission(3, 5)
    with admission.admitted() as batch, admission.admitted():
        with admission.place(batch), admission.place(batch), admission.place(batch):
            assert (admission.running, admission.waiting) == (3, 1)
        assert (admission.running, admission.waiting) == (0, 2)


def test_places_go_to_those_who_came_first() -> None:
    admission, order, lock = Admission(1, 5), list[int](), threading.Lock()
    with ThreadPoolExecutor(5) as threads, admission.place():
        for number in range(5):

            def take(number: int = number) -> None:
                with admission.place(), lock:
                    order.append(number)

            threads.submit(take)
            until(lambda number=number: len(admission._waiters) == number + 1)
    assert order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_error_gives_its_place_back(error: type[BaseException]) -> None:
    admission = Admission(1, 0)
    for _ in range(3):
        with pytest.raises(error), admission.admitted(), admission.place():
            raise error
    with admission.admitted(), admission.place():
        pass


# --- hanging up and deadlines


def test_who_hangs_up_while_waiting_leaves_at_once_and_frees_the_queue() -> None:
    admission, cancel = Admission(1, 1), Cancellation()
    with busy(admission, working=1, waiting=0), ThreadPoolExecutor(1) as threads:

        def wait() -> None:
            with admission.admitted(cancel), admission.place(cancel=cancel):
                pytest.fail("had a place")

        waiting = threads.submit(wait)
        until(lambda: len(admission._waiters) == 1)
        assert admission.full
        cancel.set()
        with pytest.raises(RequestCancelledError):
            waiting.result(PATIENCE)
        assert (admission.full, len(admission._waiters)) == (False, 0)


def test_who_hangs_up_is_no_longer_present_however_long_its_block_takes_to_notice() -> None:
    admission, cancel = Admission(1, 0), Cancellation()
    with admission.admitted(cancel):  # in the middle of a fetch, say
        cancel.set()
        assert not admission.full
        with admission.admitted():
            assert admission.full
    assert not admission.full


def test_a_free_place_is_not_given_to_who_has_hung_up_or_is_late() -> None:
    admission, cancel = Admission(1, 0), Cancellation()
    cancel.set()
    with pytest.raises(RequestCancelledError), admission.place(cancel=cancel):
        pytest.fail("had a place")
    with pytest.raises(DeadlineExceededError), admission.place(deadline=time.monotonic() - 1):
        pytest.fail("had a place")
    assert admission.running == 0


def test_the_wait_ends_at_the_deadline() -> None:
    admission = Admission(1, 1)
    with busy(admission, working=1, waiting=0):
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError) as caught, admission.place(deadline=started + 0.1):
            pytest.fail("had a place")
        assert 0.1 <= time.monotonic() - started < 5
        assert caught.value.status == 504
        assert len(admission._waiters) == 0
    until(lambda: admission.running == 0)


def test_a_place_given_in_the_instant_of_hanging_up_is_not_lost() -> None:
    admission = Admission(1, 100)
    with ThreadPoolExecutor(1) as threads:
        for _ in range(300):
            cancel = Cancellation()

            def wait(cancel: Cancellation = cancel) -> None:
                with admission.place(cancel=cancel):
                    pass

            with admission.place():
                waiting = threads.submit(wait)
                until(lambda: len(admission._waiters) == 1)
                threading.Thread(target=cancel.set).start()
            assert isinstance(waiting.exception(PATIENCE), RequestCancelledError | None)
            assert admission.running == 0


# --- many threads


def test_sixteen_threads_are_all_served_and_never_more_than_three_at_once() -> None:
    admission, lock = Admission(3, 13), threading.Lock()
    start = threading.Barrier(16)
    inside, most, served = 0, 0, 0

    def request() -> None:
        nonlocal inside, most, served
        start.wait(PATIENCE)
        for _ in range(5):
            with admission.admitted(), admission.place():
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
            with admission.admitted(), admission.place():
                time.sleep(0.01)
        except QueueFullError:
            return False
        return True

    with ThreadPoolExecutor(16) as threads:
        outcomes = [future.result(PATIENCE) for future in [threads.submit(request) for _ in range(16)]]
    assert outcomes.count(True) >= 2
    with admission.admitted(), admission.place():
        pass
