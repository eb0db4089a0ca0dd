"""How many requests are worked on at once, and how many may wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, Semaphore

from pulse_ecg.errors import QueueFullError


class Admission:
    """Lets ``concurrent`` requests in at once and ``queued`` more wait; the next is refused."""

    def __init__(self, concurrent: int, queued: int) -> None:
        """Both count requests, whatever their number of inputs."""
        self._places = Semaphore(concurrent)
        self._concurrent = concurrent
        self._capacity = concurrent + queued
        self._present = 0
        self._lock = Lock()

    @property
    def waiting(self) -> int:
        """Requests that wait for a place now."""
        return max(0, self._present - self._concurrent)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold a place while the block runs, waiting for one if need be.

        Raises:
            QueueFullError: as many wait as may.
        """
        with self._lock:
            if self._present >= self._capacity:
                raise QueueFullError("Too many requests are waiting; try again in a few seconds.")
            self._present += 1
        try:
            with self._places:
                yield
        finally:
            with self._lock:
                self._present -= 1
