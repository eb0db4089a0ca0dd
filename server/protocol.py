"""HTTP/1.1 as uvicorn speaks it, with limits on all that a client can be slow at, and on what costs more than it sends.

uvicorn bounds the time between two requests.  It does not bound how long a request's head may take, nor how long a
client may leave an answer unread; both hold a connection for ever.  Nor does it bound how many chunks a body comes in,
each of which takes the loop's time.  Bodies are bounded in size where they are read (:func:`server.body.read_body`).
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 15.0
UNREAD_TIMEOUT_S = 30.0
MAX_CONNECTIONS = 4096
MAX_HEAD_BYTES = 32_768
"""Of a request's head that is not complete; a whole one may be larger by one reading of the socket."""
MAX_PIPELINED_BYTES = 65_536
"""Of the next requests, while one is answered; a client that sends more is cut off."""
READ_BYTES = 16_384
"""Taken from a connection at once: full of the smallest chunks, they keep the loop for some 20 ms."""
MEAN_CHUNK_BYTES = 64
"""Of a body, at least: each chunk takes h11 some ten microseconds, however small."""
SPARE_CHUNKS = 4096
"""So many do not count."""


class _Connection(h11.Connection):
    """h11's, to which a body in crumbs is malformed."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._spare_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """As h11's; after large chunks as many small ones may come as at first."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._spare_bytes = SPARE_CHUNKS * MEAN_CHUNK_BYTES
        elif isinstance(event, h11.Data):
            spare = self._spare_bytes + len(event.data) - MEAN_CHUNK_BYTES * event.chunk_start
            if spare < 0:
                raise h11.RemoteProtocolError("The body comes in too many small chunks.")
            self._spare_bytes = min(spare, SPARE_CHUNKS * MEAN_CHUNK_BYTES)
        return event


class BoundedProtocol(H11Protocol):
    """One connection."""

    head_timeout_s = HEAD_TIMEOUT_S
    unread_timeout_s = UNREAD_TIMEOUT_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Connection()
        self.access_log = False  # it would write query strings; ours is in server.exchange
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request's head, unless there are too many who wait already."""
        super().connection_made(transport)  # type: ignore[arg-type]
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]  # asyncio's own loop has it
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

    def send_400_response(self, msg: str) -> None:
        """The connection's end, in silence where an answer has begun; what is still to be answered on it is not."""
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # an answer has begun, or may have no body
            self.transport.close()
        if self.cycle:
            self.cycle.disconnected = True
        self._watch_unread()

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
