"""From an image URL to bytes, under a policy.

The URL is chosen by whoever calls the endpoint and fetched from inside the operator's network, so it is a way to
make this server talk to hosts that the caller cannot reach (server-side request forgery) or to keep it busy.
:func:`fetch_image_bytes` parses strictly (:func:`_target`), resolves once and judges every address (:func:`_lookup`),
connects to the judged addresses only (:class:`_PinnedAdapter`), follows redirects by hand through the same steps, and
reads under caps and one deadline (:func:`_body`, :class:`_Deadline`).

The adapter is used without a ``requests.Session``: no cookies, no netrc, no proxy variables, no redirects of its own.
"""

from __future__ import annotations

import http.client
import ipaddress
import logging
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast
from urllib.parse import urljoin, urlsplit

import idna
import requests
import urllib3.exceptions
from requests_hardened.ip_filter_adapter import IPFilterAdapter  # type: ignore[import-untyped]
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.response import HTTPResponse

from pulse_ecg.config import Settings
from pulse_ecg.errors import (
    ConfigurationError,
    ImageFetchError,
    ImageFetchTimeoutError,
    ImageTooLargeError,
    ImageUrlRefusedError,
    excerpt,
)

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAX_URL_LENGTH = 8192
_MAX_ADDRESSES_TRIED = 4
_CHUNK = 65_536
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"User-Agent": "pulse-ecg", "Accept": "image/*, */*;q=0.1", "Accept-Encoding": "identity"}

# RFC 1123 section 2.1 (and underscores, which real hosts use).
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
# "Ends in a number" of the WHATWG URL standard: such a host is an IPv4 address in disguise (2130706433, 0x7f.1, 127.1).
_NUMERIC_END = re.compile(r"(^|\.)([0-9]+|0x[0-9a-f]*)\Z")

# Refused on top of what `is_global` refuses; which of these that knows depends on Python's version.
_REFUSED: tuple[_Network, ...] = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",  # RFC 1122: this host
        "100.64.0.0/10",  # RFC 6598: carriers' and clouds' inner networks (100.100.100.200 is Alibaba's metadata)
        "168.63.129.16/32",  # Azure's wire server, a public-looking address inside every Azure network
        "192.0.0.0/24",  # RFC 6890: protocol assignments (192.0.0.192 is Oracle's metadata)
        "192.88.99.0/24",  # RFC 7526: 6to4 relays
        "198.18.0.0/15",  # RFC 2544: benchmarks
        "224.0.0.0/4",  # RFC 5771: multicast
        "240.0.0.0/4",  # RFC 1112: reserved, broadcast
        "2001::/23",  # RFC 2928: Teredo (which embeds IPv4), ORCHIDv2, benchmarks
        "2001:db8::/32",  # RFC 3849: documentation
        "2002::/16",  # RFC 3056: 6to4, embeds any IPv4 address
        "3fff::/20",  # RFC 9637: documentation
    )
)
# The only IPv6 space that is routed (RFC 4291 section 2.4).  Outside it lie all forms that smuggle an inner address:
# mapped ::ffff:0:0/96, compatible ::/96, NAT64 64:ff9b::/96 and 64:ff9b:1::/48, site-local fec0::/10, 5f00::/16.
_IPV6_UNICAST = ipaddress.IPv6Network("2000::/3")

# At most so many look-ups at once in the process: one that the resolver blocks cannot be ended, only left behind.
_LOOKUPS = threading.BoundedSemaphore(32)

_FETCHING: ContextVar[bool] = ContextVar("fetching", default=False)
_URL_LOGGERS = ("urllib3.connection", "urllib3.connectionpool", "urllib3.util.retry")

# Everything that requests, urllib3, http.client, ssl, socket, zlib, idna and the URL parsers raise.
_URLLIB3 = urllib3.exceptions.HTTPError
_FOREIGN = (requests.RequestException, _URLLIB3, http.client.HTTPException, OSError, ValueError, zlib.error)


@dataclass(frozen=True)
class FetchPolicy:
    """What may be fetched.  ``max_bytes`` counts the body as received and, again, as decompressed; ``deadline_s`` is
    in seconds and covers everything from the look-up to the last byte.  ``allow_private`` lifts the rules on addresses
    and ports, nothing else.

    Raises:
        ConfigurationError: one of ``allowed_hosts`` is no host name.
    """

    allow_private: bool = False
    allowed_hosts: frozenset[str] | None = None
    max_bytes: int = 20_000_000
    deadline_s: float = 10.0
    max_redirects: int = 3
    ports: frozenset[int] = frozenset({80, 443, 8080, 8443})

    def __post_init__(self) -> None:
        if self.allowed_hosts is not None:
            try:
                hosts = frozenset(_host(host.strip("[]")) for host in self.allowed_hosts)
            except ValueError:
                raise ConfigurationError("PULSE_ALLOWED_IMAGE_HOSTS holds something that is no host name.") from None
            object.__setattr__(self, "allowed_hosts", hosts)

    @classmethod
    def from_settings(cls, settings: Settings) -> FetchPolicy:
        return cls(allow_private=settings.allow_private_image_urls, allowed_hosts=settings.allowed_image_hosts)


def address_is_public(ip: str | ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address belongs to the public internet and embeds no other address; False for anything in doubt."""
    try:
        address = ipaddress.ip_address(str(ip))
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and (address.scope_id is not None or address not in _IPV6_UNICAST):
        return False
    return address.is_global and not any(address in network for network in _REFUSED)


def fetch_image_bytes(url: str, policy: FetchPolicy) -> bytes:
    """The body that ``url`` answers with, at least one byte and at most ``policy.max_bytes``.

    A redirect from https to http is refused: on the way an attacker could put another patient's tracing in its place.
    Safe to call from several threads; leaves no socket and no thread behind, but for a look-up that the system's
    resolver still blocks (at most 32 of them).  While it runs, urllib3 logs nothing from the calling thread, since its
    records hold URLs with their query strings.

    Raises:
        ImageUrlRefusedError: the policy forbids the URL, or one that it redirects to.
        ImageFetchTimeoutError: ``policy.deadline_s`` passed.
        ImageTooLargeError: more than ``policy.max_bytes``.
        ImageFetchError: any other failure.
    """
    with _urllib3_silenced(), _Deadline(policy.deadline_s) as deadline, _errors_mapped(deadline):
        target = _target(url, policy)
        for _ in range(policy.max_redirects + 1):
            answer = _get(target, policy, deadline)
            if isinstance(answer, bytes):
                return answer
            following = _target(answer, policy, base=target.url)
            if (target.scheme, following.scheme) == ("https", "http"):
                raise _refused("it redirects from https to http")
            target = following
        raise ImageFetchError(f"The image URL redirects more than {policy.max_redirects} times.")


@dataclass(frozen=True)
class _Target:
    """A URL that the policy permits, in parts, so that no second parser can read it otherwise."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"

    def at(self, address: str) -> str:
        """The URL with the host replaced by one of its addresses."""
        return f"{self.scheme}://{f'[{address}]' if ':' in address else address}:{self.port}{self.path}"


def _refused(reason: str) -> ImageUrlRefusedError:
    return ImageUrlRefusedError(f"The image URL was refused: {reason}.")


def _target(url: str, policy: FetchPolicy, *, base: str = "") -> _Target:
    """Take a URL (relative to ``base``) apart, or refuse it.

    Back slashes, control characters and white space are where URL parsers disagree about which part is the host
    (``http://public\\@private/``), and line breaks could add headers of their own to the request.
    """
    if len(url) > _MAX_URL_LENGTH:
        raise _refused(f"it is longer than {_MAX_URL_LENGTH} characters")
    if "\\" in url or any(c.isspace() or not c.isprintable() for c in url):
        raise _refused("it holds white space, a control character or a back slash; percent-encode them")
    try:
        parts = urlsplit(urljoin(base, url))
        if parts.scheme not in ("http", "https"):
            raise _refused("only http and https are accepted")
        if "@" in parts.netloc:
            raise _refused("it holds credentials")
        host, port = _host(parts.hostname or ""), parts.port
        if "[" in parts.netloc and ":" not in host:  # IPvFuture (RFC 3986 section 3.2.2), [v1.a]
            raise _refused("its host is malformed")
    except ValueError:
        raise _refused("its host or port is malformed") from None
    port = {"http": 80, "https": 443}[parts.scheme] if port is None else port
    if port == 0 or not (policy.allow_private or port in policy.ports):
        raise _refused(f"port {port} is not accepted, only {', '.join(map(str, sorted(policy.ports)))}")
    if policy.allowed_hosts is not None and host not in policy.allowed_hosts:
        raise _refused(f"host {excerpt(host, 64)} is not one that this server fetches images from")
    return _Target(parts.scheme, host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


def _host(text: str) -> str:
    """A host in its one canonical form: lower case, no trailing dot, IDNA in ASCII, addresses as RFC 5952 writes them.

    ``http://127.1``, ``0x7f.1``, ``0177.0.0.1``, ``2130706433`` and ``①②⑦.0.0.1`` all mean loopback to some resolver:
    an address must be written in full, in decimal and in ASCII.

    Raises:
        ValueError: malformed.
    """
    if ":" in text:
        if "%" in text:
            raise ValueError("scoped address")
        return str(ipaddress.IPv6Address(text))
    host = (text if text.isascii() else idna.encode(text, uts46=True).decode("ascii")).lower().removesuffix(".")
    if not _HOST_NAME.fullmatch(host):
        raise ValueError("no host name")
    if _NUMERIC_END.search(host):
        if not text.isascii():
            raise ValueError("address in other digits")
        return str(ipaddress.IPv4Address(host))
    return host


def _lookup(target: _Target, policy: FetchPolicy, deadline: _Deadline) -> list[str]:
    """Every address of the host, all of them judged: one inner address among public ones is DNS rebinding.

    ``getaddrinfo`` has no time-out, so it runs in a daemon thread that the deadline may leave behind.

    Raises:
        ImageUrlRefusedError: an address is not public.
        OSError: the host was not found, or not in time.
    """
    answers: list[str] = []

    def look_up() -> None:
        try:
            with suppress(OSError, ValueError):
                found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
                answers.extend(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
        finally:
            _LOOKUPS.release()

    if not _LOOKUPS.acquire(timeout=deadline.remaining()):
        raise TimeoutError
    thread = threading.Thread(target=look_up, name="pulse-ecg-lookup", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        _LOOKUPS.release()
        raise OSError("no thread to be had") from None
    thread.join(deadline.remaining())
    if thread.is_alive():
        raise TimeoutError
    if not answers:
        raise ImageFetchError(f"The image URL's host {excerpt(target.host, 64)} was not found.")
    if any("%" in address for address in answers):
        raise _refused("its host has a scoped address")
    if not (policy.allow_private or all(map(address_is_public, answers))):
        raise _refused("its host does not resolve to public addresses only")
    return answers


def _get(target: _Target, policy: FetchPolicy, deadline: _Deadline) -> bytes | str:
    """One request: the body, or the ``Location`` that a redirect names."""
    addresses = _lookup(target, policy, deadline)
    request = requests.Request("GET", target.at(addresses[0]), headers=_HEADERS).prepare()
    with (
        closing(_PinnedAdapter(target, addresses, policy, deadline)) as adapter,
        closing(adapter.send(request, stream=True, timeout=deadline.remaining(), verify=True)) as response,
    ):
        location = response.headers.get("Location")
        if response.status_code in _REDIRECTS and location:
            return str(location).encode("latin-1").decode("utf-8")
        if response.status_code != 200:
            raise ImageFetchError(f"The image's host answered with status {response.status_code}.")
        return _body(response.raw, policy.max_bytes, deadline)


class _PinnedAdapter(IPFilterAdapter):  # type: ignore[misc]
    """Connects to the judged addresses and speaks to the host: ``Host``, SNI and certificate are those of its name.

    The parent resolves the name a second time, looks at the first answer alone, and misses several networks.  Here it
    is given an address instead of the name: it resolves nothing, and its filter is a second opinion on that address.
    """

    def __init__(self, target: _Target, addresses: list[str], policy: FetchPolicy, deadline: _Deadline) -> None:
        super().__init__(is_https_proto=target.scheme == "https")
        self._target, self._addresses, self._policy, self._deadline = target, addresses, policy, deadline
        self._pool: HTTPConnectionPool | None = None

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: bool | str, cert: str | tuple[str, str] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        host_params: dict[str, Any]
        pool_kwargs: dict[str, Any]
        parent: Any = super(IPFilterAdapter, self) if self._policy.allow_private else super()
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

    def __init__(self, *args: Any, addresses: list[str], deadline: _Deadline, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._addresses, self._deadline = addresses[:_MAX_ADDRESSES_TRIED], deadline

    def _new_conn(self) -> socket.socket:
        while True:
            self._dns_host, *others = self._addresses
            self.timeout = self._deadline.remaining() / len(self._addresses)
            try:
                sock = super()._new_conn()
            except _URLLIB3:
                if not others:
                    raise
                self._addresses = others
            else:
                sock.settimeout(self._deadline.remaining())
                return self._deadline.watch(sock)


class _GuardedHTTPSConnection(_GuardedHTTPConnection, HTTPSConnection):
    pass


class _Deadline:
    """One clock for a whole fetch.  When it runs out, the socket is shut down under whoever waits on it.

    Time-outs of sockets count from the last byte, so a host that sends one byte a second (in its TLS handshake, its
    headers or its body) never meets one.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._fired = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()
        if self._socket is not None:
            self._socket.close()

    @property
    def expired(self) -> bool:
        return self._fired or time.monotonic() >= self._end

    def remaining(self) -> float:
        """Seconds left, more than zero.

        Raises:
            TimeoutError: none are.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def watch(self, sock: socket.socket) -> socket.socket:
        """Watch a duplicate, since TLS takes the file descriptor out of the original; the one before is let go."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = sock.dup()
            if self._fired:
                self._shut_down()
        return sock

    def _expire(self) -> None:
        with self._lock:
            self._fired = True
            self._shut_down()

    def _shut_down(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _body(raw: HTTPResponse, cap: int, deadline: _Deadline) -> bytes:
    """The body, counted as received and as decompressed: 20 kB of gzip may hold 20 MB.

    We ask for no compression; a host that sends gzip or deflate (RFC 9110 section 8.4.1) anyway is understood, stacked
    and other codings are not.  A body shorter than its ``Content-Length``, or than its chunks, is urllib3's to refuse.
    """
    too_large = ImageTooLargeError(f"The image has more than {cap:,} bytes, the most that is accepted.")
    if (raw.length_remaining or 0) > cap:
        raise too_large
    coding = raw.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("identity", "", "gzip", "x-gzip", "deflate"):
        raise ImageFetchError("The image's host sent it in a Content-Encoding other than identity, gzip or deflate.")
    inflater, body, received = None, bytearray(), 0
    while chunk := raw.read(_CHUNK, decode_content=False):
        if not received and coding not in ("identity", ""):
            # gzip, zlib, or the headless deflate that some servers send under that name
            inflater = zlib.decompressobj(31 if "gzip" in coding else 15 if chunk[0] & 0x0F == 8 else -15)
        received += len(chunk)
        body += inflater.decompress(chunk, cap + 1 - len(body)) if inflater else chunk
        if max(received, len(body)) > cap:
            raise too_large
    if deadline.expired:  # the watch's shutdown looks like an ordinary end of the body
        raise TimeoutError
    if inflater and not inflater.eof:
        raise ImageFetchError("The image could not be fetched: its host sent a part of it only.")
    if not body:
        raise ImageFetchError("The image URL gave an empty answer.")
    return bytes(body)


@contextmanager
def _errors_mapped(deadline: _Deadline) -> Iterator[None]:
    """The one place where foreign errors become ours.  Their texts hold addresses, paths and queries: none is kept."""
    try:
        yield
    except _FOREIGN as error:
        slow = (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError)
        tls = (ssl.SSLError, requests.exceptions.SSLError, urllib3.exceptions.SSLError)
        if deadline.expired or isinstance(error, slow):
            raise ImageFetchTimeoutError(
                f"The image's host did not deliver it within {deadline.seconds:g} seconds."
            ) from None
        if isinstance(error, tls):
            raise ImageFetchError("The image's host offers no secure connection with a valid certificate.") from None
        raise ImageFetchError("The image could not be fetched: its host refused or broke off the connection.") from None


@contextmanager
def _urllib3_silenced() -> Iterator[None]:
    """Keep urllib3's records of this thread out of the logs: at DEBUG, and in a warning, they hold whole URLs."""
    for name in _URL_LOGGERS:
        logging.getLogger(name).addFilter(_outside_a_fetch)  # adding it again changes nothing
    token = _FETCHING.set(True)
    try:
        yield
    finally:
        _FETCHING.reset(token)


def _outside_a_fetch(_record: logging.LogRecord) -> bool:
    return not _FETCHING.get()
