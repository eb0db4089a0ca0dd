"""What holds for every exchange of request and response, whatever its route: ASGI middleware.

:class:`Exchange` stands outermost, :class:`BearerAuth` before the routes.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from monitoring.report import new_request_id
from pulse_ecg.errors import PulseError, place_of
from server.errors import DisconnectedError, UnauthorizedError, error_response
from server.log import logger
from server.service import Service

# An answer may be about a patient: no cache keeps it.  The page has a policy of its own.
SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_QUIET = frozenset({"/health", "/ready", "/metrics"})

# Of a body that nobody wants, so much is read and thrown away: a client that is still sending sees the answer then.
LINGER_S = 5.0
_LINGER_BYTES = 64_000_000


class Exchange:
    """Names the request, adds the headers of every response, ends unread bodies, logs and counts, and is the boundary
    behind which no exception escapes."""

    def __init__(self, app: ASGIApp, *, routes: Iterable[str], service: Service) -> None:
        """``routes`` are the paths that logs may show; ``service`` is told when an exchange begins and ends."""
        self._app = app
        self._routes = frozenset(routes)
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the server's own start and end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith(("http://", "https://")):  # the absolute form (RFC 9112 section 3.2.2)
            with suppress(ValueError):  # no URL: no route either
                scope["path"] = urlsplit(scope["path"]).path or "/"
        request_id = scope.setdefault("state", {})["request_id"] = new_request_id(
            Headers(scope=scope).get("x-request-id")
        )
        started, route = time.perf_counter(), self._route(scope["path"])
        response = _Response(scope, receive, send, request_id, self._service)
        self._service.entered()
        try:
            await self._app(scope, response.receive, response.send)
        except DisconnectedError:
            pass
        except Exception as error:  # noqa: BLE001 - the boundary
            logger.error("request_id=%s %s", request_id, place_of(error))
            fault = PulseError(f"An internal error stopped this request (reference {request_id}).")
            if not response.status:
                answer = error_response(scope["path"], fault, self._service.name_in_errors)
                await answer(scope, response.receive, response.send)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            log = logger.debug if route in _QUIET else logger.info
            seconds = time.perf_counter() - started
            log("request_id=%s %s %s %d in %.3f s", request_id, method, route, response.status, seconds)
            self._service.left(route, response.status)

    def _route(self, path: str) -> str:
        """The path if it is one of ours; what else a caller writes there stays out of logs and metrics."""
        if path in self._routes:
            return path
        return next((route for route in self._routes if route.endswith("/*") and path.startswith(route[:-1])), "other")


class _Response:
    """The sending half of one exchange, and what it must know of the receiving one."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str, service: Service) -> None:
        headers = Headers(scope=scope)
        self._receive, self._send, self._request_id, self._service = receive, send, request_id, service
        self._body_read = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        self._body_held_back = headers.get("expect", "").lower() == "100-continue"
        self._gone = False
        self.status = 0

    async def receive(self) -> Message:
        """As uvicorn's, remembering whether the whole body was read."""
        self._body_held_back = self._body_held_back and bool(self.status)  # to read is to ask for it
        message = await self._receive()
        self._gone = self._gone or message["type"] == "http.disconnect"
        self._body_read = self._body_read or self._gone or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """As uvicorn's, with our headers, and the connection's end after an answer to a body that was not read."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._request_id
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            if not self._body_read or self._service.closing:
                headers["Connection"] = "close"
        elif not (self._body_read or self._body_held_back or message.get("more_body", False)):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _linger(self) -> None:
        """Read what the client still sends: closing at once would reset the connection, and the answer with it."""
        read = 0
        try:
            async with asyncio.timeout(LINGER_S):
                while not self._body_read and read < _LINGER_BYTES:
                    read += len((await self.receive()).get("body", b""))
        except TimeoutError:
            pass


class BearerAuth:
    """Lets in who knows the token (RFC 6750), and everyone where none is set or the path is open to all."""

    def __init__(self, app: ASGIApp, *, service: Service, token: str, is_open: Callable[[str], bool]) -> None:
        self._app, self._service, self._is_open = app, service, is_open
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or self._is_open(scope["path"]) or self._authorized(scope):
            await self._app(scope, receive, send)
            return
        error = UnauthorizedError("Send the server's token in the header 'Authorization: Bearer …'.")
        await error_response(scope["path"], error, self._service.name_in_errors)(scope, receive, send)

    def _authorized(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        sent = f"Bearer {given.strip()}" if scheme.lower() == "bearer" else ""
        return hmac.compare_digest(sent.encode("latin-1"), self._expected)  # in constant time, whatever was sent
