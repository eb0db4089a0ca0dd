"""One request to the addresses that were judged, and to no others, within one deadline.

:func:`get` resolves once and judges every address (:func:`_lookup`), connects to the judged addresses only
(:class:`_PinnedAdapter`), and leaves the socket under the watch of the :class:`Deadline`.

The adapter is used without a ``requests.Session``: no cookies, no netrc, no proxy variables, no redirects of its own.
Foreign errors leave this module as they are; :mod:`pulse_ecg.fetch` maps them.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import requests
import urllib3.exceptions
from requests_hardened.ip_filter_adapter import IPFilterAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool

from pulse_ecg.addresses import address_is_public
from pulse_ecg.errors import ImageFetchError, ImageUrlRefusedError, excerpt

_MAX_ADDRESSES_TRIED = 4

# At most so many look-ups at once in the process: one that the resolver blocks cannot be ended, only left behind.
_LOOKUPS = threading.BoundedSemaphore(32)
_LOOKUP_TURN_S = 0.2


@dataclass(frozen=True)
class Target:
    """A URL that the policy permits, in parts, so that no second parser can read it otherwise.

    ``host`` is canonical: lower case, ASCII, an IPv6 address without its brackets.  ``path`` has the query with it.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """Host and port as the ``Host`` header names them: the scheme's own port is left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The whole URL again, which a relative redirect is joined to."""
        return f"{self.scheme}://{self.authority}{self.path}"

    def at(self, address: str) -> str:
        """The URL with the host replaced by one of its addresses."""
        return f"{self.scheme}://{f'[{address}]' if ':' in address else address}:{self.port}{self.path}"


def refused(reason: str) -> ImageUrlRefusedError:
    """The error to raise for a URL that the policy forbids; ``reason`` is shown to the caller."""
    return ImageUrlRefusedError(f"The image URL was refused: {reason}.")


@contextmanager
def get(
    target: Target, headers: dict[str, str], *, allow_private: bool, deadline: Deadline
) -> Iterator[requests.Response]:
    """The answer to one request, with its body unread in ``raw``; leaving closes it and the connection.

    Redirects are not followed.  ``allow_private`` lifts the rules on addresses, nothing else.

    Raises:
        ImageUrlRefusedError: an address of the host is not public.
        ImageFetchError: the host was not found.
        TimeoutError: the deadline passed.
        OSError, ValueError, urllib3.exceptions.HTTPError: whatever else the libraries raise, texts and all.
    """
    addresses = _lookup(target, allow_private=allow_private, deadline=deadline)
    request = requests.Request("GET", target.at(addresses[0]), headers=headers).prepare()
    with (
        closing(_PinnedAdapter(target, addresses, allow_private=allow_private, deadline=deadline)) as adapter,
        closing(adapter.send(request, stream=True, timeout=deadline.remaining(), verify=True)) as response,
    ):
        yield response


def _lookup(target: Target, *, allow_private: bool, deadline: Deadline) -> list[str]:
    """Every address of the host, all of them judged: one inner address among public ones is DNS rebinding.

    ``getaddrinfo`` has no time-out, so it runs in a daemon thread that the deadline may leave behind.

    Raises:
        ImageUrlRefusedError: an address is not public.
        ImageFetchError: the host was not found.
        OSError: not in time, or no thread was left.
    """
    answers: list[str] = []
    done = threading.Event()

    def look_up() -> None:
        try:
            with suppress(OSError, ValueError):
                found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
                answers.extend(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
        finally:
            _LOOKUPS.release()
            done.set()

    while not _LOOKUPS.acquire(timeout=min(_LOOKUP_TURN_S, deadline.remaining())):
        pass
    thread = threading.Thread(target=look_up, name="pulse-ecg-lookup", daemon=True)
    try:
        _start(thread)
    except OSError:
        _LOOKUPS.release()
        raise
    deadline.wait(done)
    if not answers:
        raise ImageFetchError(f"The image URL's host {excerpt(target.host)} was not found.")
    if any("%" in address for address in answers):
        raise refused("its host has a scoped address")
    if not (allow_private or all(map(address_is_public, answers))):
        raise refused("its host does not resolve to public addresses only")
    return answers


class _PinnedAdapter(IPFilterAdapter):  # type: ignore[misc]
    """Connects to the judged addresses and speaks to the host: ``Host``, SNI and certificate are those of its name.

    The parent resolves the name a second time, looks at the first answer alone, and misses several networks.  Here it
    is given an address instead of the name: it resolves nothing, and its filter is a second opinion on that address.
    """

    def __init__(self, target: Target, addresses: list[str], *, allow_private: bool, deadline: Deadline) -> None:
        super().__init__(is_https_proto=target.scheme == "https")
        self._target, self._addresses, self._deadline = target, addresses, deadline
        self._allow_private = allow_private
        self._pool: HTTPConnectionPool | None = None

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: bool | str, cert: str | tuple[str, str] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        host_params: dict[str, Any]
        pool_kwargs: dict[str, Any]
        parent: Any = super(IPFilterAdapter, self) if self._allow_private else super()
        host_params, pool_kwargs = parent.build_connection_pool_key_attributes(request, verify, cert)
        request.headers["Host"] = self._target.authority
        if self._target.scheme == "https":
            pool_kwargs["assert_hostname"] = pool_kwargs["server_hostname"] = self._target.host
        return host_params, pool_kwargs

    def get_connection_with_tls_context(
        self,
        request: requests.PreparedRequest,
        verify: bool | str,
        proxies: dict[str, str] | None = None,
        cert: str | tuple[str, str] | None = None,
    ) -> HTTPConnectionPool:
        pool = cast(HTTPConnectionPool, super().get_connection_with_tls_context(request, verify, proxies, cert))
        connection = _GuardedHTTPSConnection if self._target.scheme == "https" else _GuardedHTTPConnection
        pool.ConnectionCls = cast(Any, partial(connection, addresses=self._addresses, deadline=self._deadline))
        self._pool = pool
        return pool

    def close(self) -> None:
        """Close the connection now; urllib3 would leave that to the garbage collector."""
        if self._pool is not None:
            self._pool.close()
        super().close()


class _GuardedHTTPConnection(HTTPConnection):
    """Tries the judged addresses in turn and puts the socket under the deadline's watch."""

    def __init__(self, *args: Any, addresses: list[str], deadline: Deadline, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._addresses, self._deadline = addresses[:_MAX_ADDRESSES_TRIED], deadline

    def _new_conn(self) -> socket.socket:
        while True:
            self._dns_host, *others = self._addresses
            self.timeout = self._deadline.remaining() / len(self._addresses)
            try:
                sock = super()._new_conn()
            except urllib3.exceptions.HTTPError:
                if not others:
                    raise
                self._addresses = others
            else:
                sock.settimeout(self._deadline.remaining())
                return self._deadline.watch(sock)


class _GuardedHTTPSConnection(_GuardedHTTPConnection, HTTPSConnection):
    pass


class Deadline:
    """One clock for a whole fetch.  When it runs out, the socket is shut down under whoever waits on it.

    Time-outs of sockets count from the last byte, so a host that sends one byte a second (in its TLS handshake, its
    headers or its body) never meets one.  Entering starts the clock's thread; leaving ends it and closes the watched
    socket.

    Raises:
        OSError: on entry, when no thread was left.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._fired = False
        self._socket: socket.socket | None = None
        self._awaited: threading.Event | None = None
        self._timer = threading.Timer(seconds, self.expire)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        _start(self._timer)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()
        with self._lock:  # whoever says that the time is up may be about to shut it down
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    @property
    def expired(self) -> bool:
        """Whether the time is up, so that a failure, or an end of the body, is the shutdown's doing."""
        return self._fired or time.monotonic() >= self._end

    def remaining(self) -> float:
        """Seconds left, more than zero.

        Raises:
            TimeoutError: none are.
        """
        left = self._end - time.monotonic()
        if self._fired or left <= 0:
            raise TimeoutError
        return left

    def wait(self, event: threading.Event) -> None:
        """Wait for ``event``.

        Raises:
            TimeoutError: the time was up before.
        """
        with self._lock:
            self._awaited = event
        event.wait(self.remaining())
        self.remaining()

    def watch(self, sock: socket.socket) -> socket.socket:
        """Watch a duplicate, since TLS takes the file descriptor out of the original; the one before is let go."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = sock.dup()
            if self._fired:
                self._shut_down()
        return sock

    def expire(self) -> None:
        """The time is up now; any thread may say so."""
        with self._lock:
            self._fired = True
            self._shut_down()
            if self._awaited is not None:
                self._awaited.set()

    def _shut_down(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _start(thread: threading.Thread) -> None:
    """Start a thread; that the system has none left is an :class:`OSError` here, like any other want of it."""
    try:
        thread.start()
    except RuntimeError:
        raise OSError("no thread to be had") from None
