"""One event loop in one thread, so that a blocking caller can give up on a network call at any instant.

A blocking client can only bound each read; a server that sends one byte a second keeps it for ever.  A coroutine
can be cancelled wherever it stands, and cancelling closes its socket: no thread and no connection is left behind.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

from pulse_ecg.cancellation import Cancellation

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for any number of threads.  Started by the first call, stopped by :meth:`close` or at exit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: weakref.finalize[Any, Any] | None = None

    def run(self, coroutine: Coroutine[Any, Any, T], *, timeout_s: float, cancel: Cancellation | None = None) -> T:
        """The coroutine's result, or :class:`TimeoutError` after ``timeout_s``, or :class:`CancelledError` (that of
        ``concurrent.futures``) once ``cancel`` is set; the coroutine is then cancelled.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._started())
        except RuntimeError:
            coroutine.close()
            raise
        try:
            with (cancel or Cancellation()).calling(future.cancel):
                return future.result(timeout_s)
        finally:
            future.cancel()

    def close(self) -> None:
        """Cancel what runs, stop the thread, close the loop; a later :meth:`run` starts afresh."""
        with self._lock:
            if self._stop is not None:
                self._stop()
            self._loop = self._stop = None

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                thread = threading.Thread(target=_serve, args=(loop,), name=self._name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # there is none to be had now; the next call may have more luck
                    loop.close()
                    raise
                self._stop = weakref.finalize(self, _stop, loop, thread)
                self._loop = loop
            return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():
        thread.join(5)
