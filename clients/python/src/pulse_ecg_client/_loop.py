"""One event loop in one thread, for callers that have none.

A blocking HTTP client can only bound each read; a host that sends a byte a minute keeps it for ever.  A coroutine can
be cancelled wherever it stands, so ``timeout`` holds to the second, and the two clients are one code.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")

_CLOSED = "This endpoint is closed."


class LoopThread:
    """Runs coroutines for any number of threads.  Started by the first, ended by :meth:`close`, or with its owner."""

    def __init__(self, farewell: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """``farewell`` runs last of all, in the loop."""
        self._farewell = farewell
        self._lock = threading.RLock()  # garbage collected while it is held may submit too
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        self._stop: Callable[[], object] | None = None
        self._closed = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What the coroutine returns or raises; an interrupt of the waiting thread cancels it.

        Raises:
            RuntimeError: as :meth:`submit`, or closed meanwhile.
        """
        future = self.submit(coroutine)
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError(_CLOSED) from None
        finally:
            future.cancel()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start the coroutine.

        Raises:
            RuntimeError: closed, or started in the process that this one was forked from.
        """
        try:
            with self._lock:
                return asyncio.run_coroutine_threadsafe(coroutine, self._started())
        except RuntimeError:
            coroutine.close()
            raise

    def close(self) -> None:
        """Cancel what still runs, and wait for the end of the thread; more than once does no harm."""
        with self._lock:
            self._closed = True
            stop, self._stop, self._loop = self._stop, None, None
        if stop is not None:
            stop()

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise RuntimeError(_CLOSED)
        if self._loop is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_serve, args=(loop, self._farewell), name="pulse-ecg-client", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # there is none to be had now; the next call may have more luck
                loop.close()
                raise
            self._stop = weakref.finalize(self, _stop, loop, thread)
            self._loop, self._process = loop, os.getpid()
        if self._process != os.getpid():
            raise RuntimeError("This endpoint was used before the process was forked; make one in each process.")
        return self._loop


def _serve(loop: asyncio.AbstractEventLoop, farewell: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        loop.run_forever()
        loop.run_until_complete(_wind_up(loop, farewell))
    finally:
        loop.close()


async def _wind_up(loop: asyncio.AbstractEventLoop, farewell: Callable[[], Coroutine[Any, Any, None]]) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await farewell()
    await loop.shutdown_default_executor()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():
        thread.join()
