"""HTTP below the client: one POST at a time, asked again while the endpoint wakes, all of it within one deadline."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass

import httpx2

from pulse_ecg_client import _retry as retry
from pulse_ecg_client._errors import (
    DeadlineError,
    EndpointConnectionError,
    PULSEError,
    StatusError,
    status_error,
)

logger = logging.getLogger("pulse_ecg_client")

CONNECT_TIMEOUT_S = 10.0
# Shorter than servers keep an idle connection, so that a request does not meet one that is just being closed.
KEEPALIVE_S = 4.0
# Nothing was sent.
_NOT_CONNECTED = (httpx2.ConnectError, httpx2.ConnectTimeout)


class Deadline:
    """The moment by which a call, retries included, must be over.  Made inside the event loop that will wait."""

    def __init__(self, total_s: float) -> None:
        self._total_s = total_s
        self._clock = asyncio.get_running_loop().time
        self._at = self._clock() + total_s

    @property
    def left_s(self) -> float:
        """Seconds left; negative once it has passed."""
        return self._at - self._clock()

    @asynccontextmanager
    async def bounded(self) -> AsyncIterator[None]:
        """Cancel what runs inside at the deadline, and raise :class:`DeadlineError`."""
        try:
            async with asyncio.timeout(max(0.0, self.left_s)):
                yield
        except TimeoutError:
            raise DeadlineError(f"The endpoint did not answer within {self._total_s:g} seconds.") from None


@dataclass(frozen=True)
class _Failure:
    """An attempt that may be repeated: nothing of an answer had begun."""

    error: PULSEError
    retry_after_s: float | None = None


class Connection:
    """Posts to one URL with one token; knows nothing of what is posted."""

    def __init__(
        self, endpoint_url: str, token: str | None, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        """Nothing is sent yet.

        Raises:
            ValueError: a URL or a token that cannot be one; the message holds neither.
        """
        self._url = _checked_url(endpoint_url)
        self._token = _checked_token(token)
        # The stock container looks both types up as they stand: no charset, no list of types.
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "pulse-ecg-client"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        self._client = httpx2.AsyncClient(
            headers=headers,
            transport=transport,
            follow_redirects=False,  # a redirect would take the token and the image to a host that nobody named
            timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S),  # the deadline bounds everything
            limits=httpx2.Limits(keepalive_expiry=KEEPALIVE_S),
        )

    @property
    def origin(self) -> str:
        """Scheme, host and port: what may be shown of the URL."""
        return _origin(self._url)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def post(self, body: bytes, deadline: Deadline) -> httpx2.Response:
        """A reply with status 200 whose body is still to be read, with :meth:`text` or :meth:`pieces`.

        Raises:
            StatusError: another status; after 429, 502 and 503 only once no further attempt fits into the deadline.
            EndpointConnectionError: no connection in several attempts, or one that broke.
            DeadlineError: no reply in time.
        """
        attempt = unconnected = 0  # the latter in a row
        while True:
            attempt += 1
            async with deadline.bounded():
                outcome = await self._attempt(body)
            if not isinstance(outcome, _Failure):
                return outcome
            delay = retry.delay_s(attempt, outcome.retry_after_s)
            unconnected = unconnected + 1 if outcome.error.status is None else 0
            if unconnected == retry.MOST_CONNECTION_ATTEMPTS or delay >= deadline.left_s:
                raise outcome.error
            logger.info("%s Trying again in %.1f s; %.0f s left.", outcome.error, delay, deadline.left_s)
            await asyncio.sleep(delay)

    async def text(self, response: httpx2.Response, deadline: Deadline) -> str:
        """The whole body; errors as :meth:`pieces`."""
        async with aclosing(self.pieces(response, deadline)) as pieces:
            return b"".join([piece async for piece in pieces]).decode("utf-8", "replace")

    def safe(self, text: str) -> str:
        """Text for messages and errors: a host that shows a request's headers shows them without the token."""
        # A shorter token is a word like any other, which a caller tries a local server with.
        return text.replace(self._token, "***") if self._token and len(self._token) >= 8 else text

    async def pieces(self, response: httpx2.Response, deadline: Deadline) -> AsyncGenerator[bytes, None]:
        """The body as it comes.

        Raises:
            EndpointConnectionError: it did not come whole.
            DeadlineError: nor in time.
        """
        async with aclosing(response):
            pieces = response.aiter_bytes()
            while True:
                async with deadline.bounded():
                    with self._translated():
                        piece = await anext(pieces, None)
                if piece is None:
                    return
                yield piece

    async def _attempt(self, body: bytes) -> httpx2.Response | _Failure:
        request = self._client.build_request("POST", self._url, content=body)
        try:
            with self._translated():
                response = await self._client.send(request, stream=True)
        except EndpointConnectionError as error:
            if not isinstance(error.__cause__, _NOT_CONNECTED):
                raise
            return _Failure(error)
        if response.status_code == 200:
            return response
        async with aclosing(response):
            with self._translated():
                text = self.safe((await response.aread()).decode("utf-8", "replace"))
        failure = _status_error(response, text)
        if response.status_code not in retry.RETRIED_STATUSES:
            raise failure
        return _Failure(failure, retry.retry_after_s(response.headers))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The library's errors as ours."""
        try:
            yield
        except httpx2.HTTPError as error:
            fault = f"No connection to {self.origin}"
            if not isinstance(error, _NOT_CONNECTED):
                fault = f"The exchange with {self.origin} broke off"
            words = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise EndpointConnectionError(self.safe(f"{fault} ({words}).")) from error


def _status_error(response: httpx2.Response, text: str) -> StatusError:
    status, request_id = response.status_code, response.headers.get("x-request-id")
    if response.has_redirect_location:
        return StatusError(
            f"HTTP {status}: the endpoint redirects to {_target(response)}; redirects are not followed.",
            status=status,
            text=text,
            request_id=request_id,
        )
    return status_error(status, text, request_id=request_id)


def _target(response: httpx2.Response) -> str:
    try:
        return _origin(response.url.join(response.headers["location"]))
    except httpx2.InvalidURL:
        return "what is no address"


def _origin(url: httpx2.URL) -> str:
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def _checked_url(text: str) -> httpx2.URL:
    try:
        url = httpx2.URL(text.strip())
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("The endpoint's URL must begin with https:// (or http://) and name a host.")
    if url.userinfo:
        raise ValueError("The endpoint's URL must not hold a user name or password.")
    return url


def _checked_token(token: str | None) -> str | None:
    """The token without the line break that a file or a shell may have left; an empty one is none."""
    token = (token or "").strip()
    if not all("!" <= character <= "~" for character in token):
        raise ValueError("The token holds characters that cannot be in a token.")
    return token or None
