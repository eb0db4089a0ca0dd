"""How many requests may be present, and how many answers are generated at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock

from pulse_ecg.cancellation import Cancellation
from pulse_ecg.errors import DeadlineExceededError, QueueFullError, RequestCancelledError


class Presence:
    """A request that is present; ``places`` says how many of its answers are generated now."""

    def __init__(self) -> None:
        """None yet."""
        self.places = 0


class Admission:
    """Two bounds.  A request is *present* from its arrival to its last English answer; an answer has a *place* while it
    is generated, and waits for one in order of arrival.

    What needs no model happens without a place: images are fetched before, commentaries asked for after, and neither
    keeps the model from the next request.
    """

    def __init__(self, concurrent: int, queued: int) -> None:
        """``concurrent`` places, and as many requests present as have one, and ``queued`` more."""
        self.concurrent, self.queued = concurrent, queued
        self._free = concurrent
        self._present = set[Presence]()
        self._waiters: deque[_Waiter] = deque()
        self._lock = Lock()

    @property
    def running(self) -> int:
        """Answers that are being generated now."""
        return self.concurrent - self._free

    @property
    def waiting(self) -> int:
        """Requests that are present and have no place: their image is on its way, or the places are taken."""
        with self._lock:
            return sum(not request.places for request in self._present)

    @property
    def full(self) -> bool:
        """Whether one more request would be refused."""
        return len(self._present) >= self.concurrent + self.queued

    @contextmanager
    def admitted(self, cancel: Cancellation | None = None) -> Iterator[Presence]:
        """Be present while the block runs, or until ``cancel`` is set, should the block take longer to notice.

        Raises:
            QueueFullError: as many are present as may be.
        """
        with self._lock:
            if self.full:
                raise QueueFullError("Too many requests are waiting; try again in a few seconds.")
            self._present.add(request := Presence())

        def leave() -> None:
            with self._lock:
                self._present.discard(request)

        try:
            with (cancel or Cancellation()).calling(leave):
                yield request
        finally:
            leave()

    @contextmanager
    def place(
        self, request: Presence | None = None, *, cancel: Cancellation | None = None, deadline: float | None = None
    ) -> Iterator[None]:
        """Hold a place while the block runs, waiting for one if need be: first come, first served.

        Args:
            request: what the answer belongs to.
            cancel: once set, the wait is over.
            deadline: a reading of ``time.monotonic()`` at which it is over too.

        Raises:
            RequestCancelledError: ``cancel`` was set before.
            DeadlineExceededError: the deadline passed before.
        """
        cancel = cancel or Cancellation()
        waiter = self._enqueued(request or Presence())
        try:
            with cancel.calling(waiter.called.set):
                waiter.called.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            self._settle(waiter)
            if cancel.is_set():
                raise RequestCancelledError("The request was cancelled while it waited.")
            if not waiter.placed or (deadline is not None and time.monotonic() > deadline):
                raise DeadlineExceededError("The request's turn did not come in time; try again later.")
            yield
        finally:
            self._settle(waiter)
            if waiter.placed:
                self._give_back(waiter)

    def _enqueued(self, request: Presence) -> _Waiter:
        waiter = _Waiter(request)
        with self._lock:
            if self._free:  # nobody waits then: a place that is given back goes to the first who does
                self._free -= 1
                waiter.place()
            else:
                self._waiters.append(waiter)
        return waiter

    def _settle(self, waiter: _Waiter) -> None:
        """From now on no place is given to a waiter that has none."""
        with self._lock:
            if not waiter.placed and waiter in self._waiters:
                self._waiters.remove(waiter)

    def _give_back(self, waiter: _Waiter) -> None:
        with self._lock:
            waiter.request.places -= 1
            if self._waiters:
                self._waiters.popleft().place()
            else:
                self._free += 1


class _Waiter:
    """One who waits for a place; ``called`` wakes it, ``placed`` says whether it has one."""

    def __init__(self, request: Presence) -> None:
        self.request = request
        self.called = Event()
        self.placed = False

    def place(self) -> None:
        self.placed = True
        self.request.places += 1
        self.called.set()
