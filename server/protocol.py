"""HTTP/1.1 as uvicorn speaks it, with a time limit on everything that a client can be slow at.

uvicorn bounds the time between two requests.  It does not bound how long a request's head may take, nor how long a
client may leave an answer unread; both hold a connection for ever.  Bodies are bounded where they are read
(:func:`server.body.read_body`).
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 15.0
UNREAD_TIMEOUT_S = 30.0
MAX_CONNECTIONS = 4096
MAX_PIPELINED_BYTES = 65_536
"""Of the next requests, while one is answered; a client that sends more is cut off."""


class BoundedProtocol(H11Protocol):
    """One connection."""

    head_timeout_s = HEAD_TIMEOUT_S
    unread_timeout_s = UNREAD_TIMEOUT_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False  # it would write query strings; ours is in server.exchange
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request's head, unless there are too many who wait already."""
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > MAX_CONNECTIONS:
            self.transport.abort()
        else:
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._stop(self._head_timer)
        self._stop(self._unread_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A part of a head keeps the clock running from the head's first byte; a whole one stops it."""
        super().data_received(data)
        self._go_on_reading()
        self._watch_head()

    def _go_on_reading(self) -> None:
        """uvicorn stops reading when a next request arrives before the answer; it would not see a hang-up then."""
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            return  # there is no request, or its body has its own back-pressure
        if len(self.conn.trailing_data[0]) > MAX_PIPELINED_BYTES:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """The next request may have begun to arrive; of a closing connection the rest may be unread."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_unread()
        elif self.conn.trailing_data[0]:
            self._watch_head()

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.abort)

    def pause_writing(self) -> None:
        """The client reads too slowly for what is sent: it has some time to catch up."""
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        """It did; of a closing connection the rest still has to be read in time."""
        if not self.transport.is_closing():
            self._stop(self._unread_timer)
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; what the client still has not read of the last answer waits for a while only."""
        super().timeout_keep_alive_handler()
        self._watch_unread()

    def _watch_unread(self) -> None:
        self._stop(self._unread_timer)
        self._unread_timer = self.loop.call_later(self.unread_timeout_s, self.transport.abort)

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
