"""What every route that asks the model does: refuse early, read the body, start the job, let go of everything."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Self

from starlette.requests import Request

from pulse_ecg.errors import PulseError
from server.body import read_body, size_in_memory
from server.jobs import Job, News
from server.service import Service
from server.sse import Encoder, EventStream


class Answering:
    """One request from its head to its job; leaving it lets go of what was not handed on to a response.

    The errors that its methods raise are the responses to the request: see :func:`server.app.refused`.
    """

    def __init__(self, request: Request) -> None:
        """Asks whether the model is there and has room, before a byte of the body is read.

        Raises:
            ModelLoadingError: it is not there.
            QueueFullError: it has no room.
        """
        self._service: Service = request.app.state.service
        self._request = request
        try:
            self._handler = self._service.handler
        except PulseError as error:
            self._service.note_refusal(error, self.request_id)
            raise
        self._deadline = time.monotonic() + self._service.settings.request_timeout
        self._lease = self._service.bodies.lease()
        self._job: Job | None = None
        self._handed_on = False

    @property
    def request_id(self) -> str:
        """The request's name in logs and in its response."""
        return str(self._request.state.request_id)

    @property
    def model(self) -> str:
        """The name of the model that is asked."""
        name: str = self._handler.model_name
        return name

    async def body(self) -> bytes:
        """The whole body; errors as of :func:`server.body.read_body`."""
        return await read_body(self._request, self._lease, timeout=self._service.settings.body_timeout)

    def start(self, data: Any, *, stream: bool) -> Job:
        """Have the handler answer ``data``; with ``stream`` the job tells more than how that ended.

        Raises:
            QueueFullError: no thread is free, or no memory for what the body has become.
        """
        self._lease.cover(size_in_memory(data))
        self._job = self._service.workers.start(
            partial(self._handler.respond, data),
            request_id=self.request_id,
            deadline=self._deadline,
            model=self.model,
            stream=stream,
            receive=self._request.receive,
            done=self._lease.release,
        )
        return self._job

    def stream(self, job: Job, first: list[News], encoder: Encoder) -> EventStream:
        """The response that tells what the job tells, as long as it does; the job is the response's to close."""
        self._handed_on = True
        return EventStream(job, first, encoder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._job is None:
            self._lease.release()
            if isinstance(error, PulseError):
                self._service.note_refusal(error, self.request_id)
        elif not self._handed_on:
            self._job.close()
