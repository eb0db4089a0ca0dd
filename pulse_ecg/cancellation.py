"""A caller who hangs up: an event that also wakes whoever works or waits for the request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock


class Cancellation(Event):
    """Set once, by any thread.  It can be polled like every event, or be listened to without a thread that waits."""

    def __init__(self) -> None:
        """Not set."""
        super().__init__()
        self._lock = Lock()
        self._listeners: dict[object, Callable[[], object]] = {}

    def set(self) -> None:
        """Set the event and call the listeners, each once, in this thread; they must be quick and must not raise."""
        with self._lock:
            super().set()
            listeners = list(self._listeners.values())
            self._listeners.clear()
        for listener in listeners:
            listener()

    @contextmanager
    def calling(self, listener: Callable[[], object]) -> Iterator[None]:
        """Have ``listener`` called if the event is set while the block runs, or at once if it is set already."""
        key = object()
        with self._lock:
            already = self.is_set()
            if not already:
                self._listeners[key] = listener
        if already:
            listener()
        try:
            yield
        finally:
            with self._lock:
                self._listeners.pop(key, None)
