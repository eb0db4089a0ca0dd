"""From the threads in which requests are answered to the event loop that speaks HTTP, and hanging up the other way.

A job's thread runs at full speed whatever the client does: what it tells is kept until the loop takes it, and an answer
is small.  So a client that stalls holds a few kilobytes, never a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.types import Receive

from pulse_ecg.call import Call, Outcome, Progress, error_outcome, unheard
from pulse_ecg.cancellation import Cancellation
from pulse_ecg.errors import DeadlineExceededError, PulseError, QueueFullError, place_of
from server.errors import DisconnectedError, DrainingError
from server.log import logger

# Requests that wait for a commentary or for a fetch that nobody wants any more have a thread beyond the queue's.
SPARE_THREADS = 128
# The handler ends by itself at the deadline; should it be stuck, the caller is told so much later.
GRACE_S = 2.0


@dataclass(frozen=True)
class Finished:
    """The last thing that a job tells."""

    outcomes: list[Outcome] = field(repr=False)


Respond = Callable[[Call], list[Outcome]]
News = Progress | Finished


class Workers:
    """The threads: a request has one from when its body is there until its outcome is.  Belongs to the event loop."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="pulse-request")
        self._threads = threads
        self._jobs: set[Job] = set()

    @property
    def busy(self) -> int:
        """Jobs whose thread is still at work, those that nobody waits for included."""
        return len(self._jobs)

    def start(
        self,
        respond: Respond,
        *,
        request_id: str,
        deadline: float,
        model: str,
        stream: bool,
        receive: Receive,
        done: Callable[[], object],
    ) -> Job:
        """Begin to answer a request whose body has been read.

        Args:
            respond: what the job's thread does.
            request_id: its name in logs.
            deadline: a reading of ``time.monotonic()`` by which it should be answered.
            model: its name in an error record.
            stream: tell how the answer grows, not its end alone.
            receive: the request's, which tells of the caller's hanging up.
            done: is called in the loop when the thread is free.

        Raises:
            QueueFullError: every thread is taken.
        """
        if len(self._jobs) >= self._threads:
            raise QueueFullError("Too many requests are being answered; try again in a few seconds.")
        job = Job(request_id, deadline, model, stream=stream)

        def finished(_future: object) -> None:
            self._jobs.discard(job)
            done()

        work = asyncio.get_running_loop().run_in_executor(self._executor, job.run, respond)
        self._jobs.add(job)
        work.add_done_callback(finished)
        job.watch(receive)
        return job

    def cancel_all(self) -> None:
        """Give up whatever still runs."""
        for job in list(self._jobs):
            job.give_up()

    def close(self) -> None:
        """Start nothing more; does not wait."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class Job:
    """One request that is being answered.  ``take`` what it tells; ``close`` it in any case."""

    def __init__(self, request_id: str, deadline: float, model: str, *, stream: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._request_id, self._deadline, self._model = request_id, deadline, model
        self._listen = self._tell if stream else unheard  # the handler does less for who does not listen
        self._cancel = Cancellation()
        self._news: deque[News] = deque()
        self._woken = False  # a wake-up is on its way: the next one is saved
        self._wake = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._disconnected = self._given_up = self._finished = False

    # --- in the thread

    def run(self, respond: Respond) -> None:
        """Answer, and tell the loop."""
        try:
            outcomes = respond(Call(self._request_id, self._cancel, self._deadline, self._listen))
        except BaseException as error:  # noqa: BLE001 - the thread's boundary; Rust's panics are no Exception
            logger.error("request_id=%s %s", self._request_id, place_of(error))
            fault = PulseError(f"An internal error stopped this request (reference {self._request_id}).")
            outcomes = [error_outcome(fault, self._model)]
        self._tell(Finished(outcomes))

    def _tell(self, news: News) -> None:
        self._news.append(news)
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._wake.set)

    # --- in the loop

    def watch(self, receive: Receive) -> None:
        """From now on the caller's hanging up cancels the job."""

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._disconnected = True
            self._cancel.set()
            self._wake.set()

        self._watcher = asyncio.create_task(listen())

    async def take(self, patience: float | None = None) -> list[News]:
        """What was told since the last call, at least one thing; nothing after ``patience`` seconds without news.

        Raises:
            DisconnectedError: the caller hung up.
            DrainingError: the server gives the request up in order to end.
            DeadlineExceededError: the request is past its time and its thread does not say so itself.
        """
        while True:
            self._wake.clear()
            self._woken = False
            if self._disconnected:
                raise DisconnectedError
            if self._given_up:
                raise DrainingError("The server was stopped before the answer was finished.")
            if told := [self._news.popleft() for _ in range(len(self._news))]:
                self._finished = isinstance(told[-1], Finished)
                return told
            left = self._deadline + GRACE_S - time.monotonic()
            try:
                async with asyncio.timeout(left if patience is None else min(left, patience)):
                    await self._wake.wait()
            except TimeoutError:
                if time.monotonic() >= self._deadline + GRACE_S:
                    raise DeadlineExceededError("The answer was not finished in time; try again later.") from None
                return []

    async def outcomes(self) -> list[Outcome]:
        """What comes of the request, for a caller who waits for that alone; errors as of :meth:`take`."""
        while True:
            for news in await self.take():
                if isinstance(news, Finished):
                    return news.outcomes

    def give_up(self) -> None:
        """Cancel the job on the server's own account."""
        self._given_up = True
        self._cancel.set()
        self._wake.set()

    def close(self) -> None:
        """Nobody listens any more: cancel what is not finished."""
        if self._watcher is not None:
            self._watcher.cancel()
        if not self._finished:
            self._cancel.set()
