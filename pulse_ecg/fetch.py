"""From an image URL to bytes, under a policy.

The URL is chosen by whoever calls the endpoint and fetched from inside the operator's network, so it is a way to
make this server talk to hosts that the caller cannot reach (server-side request forgery) or to keep it busy.
:func:`fetch_image_bytes` parses strictly (:func:`_target`), connects to addresses that were judged and to no others
(:func:`pulse_ecg.transport.get`, :func:`pulse_ecg.addresses.address_is_public`), follows redirects by hand through the
same steps, and reads under caps and one deadline (:func:`_body`, :class:`pulse_ecg.transport.Deadline`).
"""

from __future__ import annotations

import http.client
import ipaddress
import logging
import re
import ssl
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import idna
import requests
import urllib3.exceptions
from urllib3.response import HTTPResponse

from pulse_ecg.cancellation import Cancellation
from pulse_ecg.config import Settings
from pulse_ecg.errors import (
    ConfigurationError,
    ImageFetchError,
    ImageFetchTimeoutError,
    ImageTooLargeError,
    RequestCancelledError,
    excerpt,
)
from pulse_ecg.transport import Deadline, Target, get, refused

_MAX_URL_LENGTH = 8192
_CHUNK = 65_536
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"User-Agent": "pulse-ecg", "Accept": "image/*, */*;q=0.1", "Accept-Encoding": "identity"}

# RFC 1123 section 2.1 (and underscores, which real hosts use).
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
# "Ends in a number" of the WHATWG URL standard: such a host is an IPv4 address in disguise (2130706433, 0x7f.1, 127.1).
_NUMERIC_END = re.compile(r"(^|\.)([0-9]+|0x[0-9a-f]*)\Z")

_FETCHING: ContextVar[bool] = ContextVar("fetching", default=False)
_URL_LOGGERS = ("urllib3.connection", "urllib3.connectionpool", "urllib3.util.retry")

# Everything that requests, urllib3, http.client, ssl, socket, zlib, idna and the URL parsers raise.
_FOREIGN = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    ValueError,
    zlib.error,
)


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
        """The policy that the environment asks for; ConfigurationError as for the class."""
        return cls(allow_private=settings.allow_private_image_urls, allowed_hosts=settings.allowed_image_hosts)


def fetch_image_bytes(url: str, policy: FetchPolicy, cancel: Cancellation | None = None) -> bytes:
    """The body that ``url`` answers with, at least one byte and at most ``policy.max_bytes``.

    A redirect from https to http is refused: on the way an attacker could put another patient's tracing in its place.
    ``cancel`` ends it, but for an attempt to connect that is under way.
    Safe to call from several threads; leaves no socket and no thread behind, but for a look-up that the system's
    resolver still blocks (at most 32 of them).  While it runs, urllib3 logs nothing from the calling thread, since its
    records hold URLs with their query strings.

    Raises:
        ImageUrlRefusedError: the policy forbids the URL, or one that it redirects to.
        ImageFetchTimeoutError: ``policy.deadline_s`` passed.
        ImageTooLargeError: more than ``policy.max_bytes``.
        ImageFetchError: any other failure.
        RequestCancelledError: ``cancel`` was set before the image was there.
    """
    cancel, deadline = cancel or Cancellation(), Deadline(policy.deadline_s)
    with _urllib3_silenced(), _errors_mapped(deadline, cancel), deadline, cancel.calling(deadline.expire):
        target = _target(url, policy)
        for _ in range(policy.max_redirects + 1):
            answer = _get(target, policy, deadline)
            if isinstance(answer, bytes):
                return answer
            following = _target(answer, policy, base=target.url)
            if (target.scheme, following.scheme) == ("https", "http"):
                raise refused("it redirects from https to http")
            target = following
        raise ImageFetchError(f"The image URL redirects more than {policy.max_redirects} times.")


def _target(url: str, policy: FetchPolicy, *, base: str = "") -> Target:
    """Take a URL (relative to ``base``) apart, or refuse it.

    Back slashes, control characters and white space are where URL parsers disagree about which part is the host
    (``http://public\\@private/``), and line breaks could add headers of their own to the request.
    """
    if len(url) > _MAX_URL_LENGTH:
        raise refused(f"it is longer than {_MAX_URL_LENGTH} characters")
    if "\\" in url or any(c.isspace() or not c.isprintable() for c in url):
        raise refused("it holds white space, a control character or a back slash; percent-encode them")
    try:
        parts = urlsplit(urljoin(base, url))
        if parts.scheme not in ("http", "https"):
            raise refused("only http and https are accepted")
        if "@" in parts.netloc:
            raise refused("it holds credentials")
        host, port = _host(parts.hostname or ""), parts.port
        if "[" in parts.netloc and ":" not in host:  # IPvFuture (RFC 3986 section 3.2.2), [v1.a]
            raise refused("its host is malformed")
    except ValueError:
        raise refused("its host or port is malformed") from None
    port = {"http": 80, "https": 443}[parts.scheme] if port is None else port
    if port == 0 or not (policy.allow_private or port in policy.ports):
        raise refused(f"port {port} is not accepted, only {', '.join(map(str, sorted(policy.ports)))}")
    if policy.allowed_hosts is not None and host not in policy.allowed_hosts:
        raise refused(f"host {excerpt(host)} is not one that this server fetches images from")
    return Target(parts.scheme, host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


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


def _get(target: Target, policy: FetchPolicy, deadline: Deadline) -> bytes | str:
    """One request: the body, or the ``Location`` that a redirect names."""
    with get(target, _HEADERS, allow_private=policy.allow_private, deadline=deadline) as response:
        location = response.headers.get("Location")
        if response.status_code in _REDIRECTS and location:
            return str(location).encode("latin-1").decode("utf-8")
        if response.status_code != 200:
            raise ImageFetchError(f"The image's host answered with status {response.status_code}.")
        return _body(response.raw, policy.max_bytes, deadline)


def _body(raw: HTTPResponse, cap: int, deadline: Deadline) -> bytes:
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
def _errors_mapped(deadline: Deadline, cancel: Cancellation) -> Iterator[None]:
    """The one place where foreign errors become ours.  Their texts hold addresses, paths and queries: none is kept."""
    try:
        yield
    except _FOREIGN as error:
        if cancel.is_set():
            raise RequestCancelledError("The request was cancelled while its image was fetched.") from None
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
