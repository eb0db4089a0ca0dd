"""The HTTP client below the ``openai`` package: no redirects, nothing sent that need not be, bodies capped."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from importlib import import_module
from typing import TYPE_CHECKING

from openai import DefaultAsyncHttpxClient

if TYPE_CHECKING:
    import httpx2 as httpx
else:  # the openai package moved from httpx to httpx2 in its version 3; the one that it builds on is meant
    _BASES = (base.__module__.split(".")[0] for base in DefaultAsyncHttpxClient.__mro__)
    httpx = import_module(next(name for name in _BASES if name.startswith("httpx")))

__all__ = ["BodyRefusedError", "http_client", "httpx"]

MAX_BODY_BYTES = 2 * 1024 * 1024
CONNECT_TIMEOUT_S = 5.0
_SENT_HEADERS = frozenset(
    {"host", "accept", "accept-encoding", "authorization", "connection", "content-length", "content-type", "user-agent"}
    | {"x-stainless-raw-response"}  # the library reads it back from its own request; it says "stream"
)


class BodyRefusedError(httpx.StreamError):
    """The service's answer is compressed unasked or larger than any answer can be."""


class _CappedStream(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        received = 0
        async for chunk in self._stream:
            received += len(chunk)
            if received > MAX_BODY_BYTES:
                raise BodyRefusedError("the answer is too large")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _send_only_what_is_needed(request: httpx.Request) -> None:
    """Drop what the library adds about this machine, and what OPENAI_* variables meant for another service add."""
    for name in [name for name in request.headers if name.lower() not in _SENT_HEADERS]:
        del request.headers[name]
    request.headers["User-Agent"] = "pulse-ecg"


async def _cap_body(response: httpx.Response) -> None:
    """Guard success and error bodies alike, before a byte of them is read."""
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        await response.aclose()
        raise BodyRefusedError("the answer is compressed")
    if isinstance(response.stream, httpx.AsyncByteStream):
        response.stream = _CappedStream(response.stream)


def _without_debug(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


def http_client() -> httpx.AsyncClient:
    """Keeps connections for the next call.  Time is bounded by whoever awaits, except the connection's set-up."""
    for name in ("openai._base_client", "openai._response", "openai._legacy_response"):
        # Before its version 3 the openai package wrote whole requests to its debug log.
        logging.getLogger(name).addFilter(_without_debug)
    return DefaultAsyncHttpxClient(
        follow_redirects=False,  # a redirect would take the answer to a host that nobody configured
        headers={"Accept-Encoding": "identity"},
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=64, max_keepalive_connections=16, keepalive_expiry=60.0),
        event_hooks={"request": [_send_only_what_is_needed], "response": [_cap_body]},
    )
