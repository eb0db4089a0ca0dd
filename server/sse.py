"""Server-Sent Events (WHATWG HTML, section 9.2): a job's news as they come."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from pulse_ecg.errors import PulseError
from server.jobs import Finished, Job, News

KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_S = 15.0
# The last one keeps proxies such as nginx from collecting the events.
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
# JSON has no need to escape these; clients that split with `str.splitlines` take them for the ends of lines.
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


class Encoder(Protocol):
    """How a route tells a job's news; each is some events, or none."""

    def news(self, news: News) -> bytes:
        """One piece of news; :class:`Finished` is the last."""

    def failed(self, error: PulseError) -> bytes:
        """The end of an answer that the server itself could not bring to its end."""


def event(data: Any, name: str = "") -> bytes:
    """One event; ``data`` is one line: JSON escapes control characters, and what else breaks lines is escaped here."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    text = text.translate(_ESCAPES)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


class EventStream:
    """An ASGI response.  It closes the job when it ends, however it ends."""

    def __init__(self, job: Job, first: list[News], encoder: Encoder) -> None:
        """``first`` is what the job has told already."""
        self._job, self._first, self._encoder = job, first, encoder

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send events until the job has told everything."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            async for chunk in self._chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._job.close()

    async def _chunks(self) -> AsyncIterator[bytes]:
        told = self._first
        try:
            while True:
                yield b"".join(map(self._encoder.news, told)) if told else KEEP_ALIVE
                if told and isinstance(told[-1], Finished):
                    return
                told = await self._job.take(KEEP_ALIVE_S)
        except PulseError as error:
            yield self._encoder.failed(error)
