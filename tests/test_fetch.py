"""Fetching against real local hosts that attack or misbehave: the right error, in time, with nothing leaked or left."""

from __future__ import annotations

import gzip
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests.adapters
import requests_hardened.ip_filter  # type: ignore[import-untyped]
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pulse_ecg import transport
from pulse_ecg.addresses import address_is_public
from pulse_ecg.cancellation import Cancellation
from pulse_ecg.config import Settings
from pulse_ecg.errors import (
    ConfigurationError,
    ImageFetchError,
    ImageFetchTimeoutError,
    ImageTooLargeError,
    ImageUrlRefusedError,
    PulseError,
    RequestCancelledError,
)
from pulse_ecg.fetch import FetchPolicy, fetch_image_bytes
from tests.servers import PUBLIC, PUBLIC_6, ImageHost, Internet, answer, drip, flood, raw, redirect, silent, status

IMAGE = bytes(range(256)) * 40
PRIVATE = FetchPolicy(allow_private=True, deadline_s=5, max_bytes=100_000)
HASTY = FetchPolicy(allow_private=True, deadline_s=0.4, max_bytes=100_000)
PUBLIC_ONLY = FetchPolicy(deadline_s=5, max_bytes=100_000)
SECRETS = (
    "secret",
    "127.0.0.1",
    "169.254",
    "10.0.0",
    PUBLIC,
    PUBLIC_6[:9],
    "Error(",
    "0x",
    "urllib3",
    "/scan",
    "token",
)
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def host() -> Iterator[ImageHost]:
    image_host = ImageHost({})
    yield image_host
    image_host.close()


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch, host: ImageHost) -> Iterator[Internet]:
    """``images.example`` is public, and its address leads to ``host``."""
    pretended = Internet()
    pretended.names["images.example"] = [[PUBLIC]]
    pretended.hosts[PUBLIC] = host
    monkeypatch.setattr(socket, "getaddrinfo", pretended.getaddrinfo)
    monkeypatch.setattr("urllib3.util.connection.create_connection", pretended.create_connection)
    yield pretended
    pretended.unblock.set()


def refusal(url: str, policy: FetchPolicy, kind: type[PulseError]) -> str:
    """The message of the error that fetching ends with: of this very class, in time, and safe to show."""
    start = time.monotonic()
    with pytest.raises(PulseError) as caught:
        fetch_image_bytes(url, policy)
    assert type(caught.value) is kind, caught.value
    assert time.monotonic() - start < policy.deadline_s + 2
    assert not (caught.value.__cause__ or (caught.value.__context__ and not caught.value.__suppress_context__))
    message = str(caught.value)
    assert message.endswith(".")
    assert not [secret for secret in SECRETS if secret in message], message
    return message


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread of a fetch and no connected socket outlives it."""
    before = open_sockets()
    yield
    threads = [t for t in threading.enumerate() if t.name != "pulse-engine"]  # of other tests, it goes when idle
    names = [t.name for t in threads if isinstance(t, threading.Timer) or "pulse" in t.name]
    assert not names
    assert len(open_sockets()) <= len(before)


def open_sockets() -> list[str]:
    folder = Path("/proc/self/fd")
    links = [entry.readlink() for entry in folder.iterdir() if entry.is_symlink()] if folder.exists() else []
    return [str(link) for link in links if str(link).startswith("socket:")]


# --- which addresses are public


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "100.63.255.255", "2606:4700:4700::1111", "2a00:1450::1"]
)
def test_public_addresses(address: str) -> None:
    assert address_is_public(address)


INNER = [
    address
    for group in (
        "0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 169.254.169.254 169.254.170.2",
        "168.63.129.16 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.9 192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1",
        "198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255",
        ":: ::1 ::7f00:1 ::5db8:d822 ::ffff:127.0.0.1 ::ffff:93.184.216.34 ::ffff:0:1.1.1.1 64:ff9b::a9fe:a9fe",
        "64:ff9b::101:101 64:ff9b:1::1 100::1 2001::1 2001:0:5ef5:79fb::1 2001:2::1 2001:20::1 2001:db8::1",
        "2002:7f00:1:: 2002:5db8:d822::1 3fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0",
        "2606:4700::1%1 fec0::1 ff02::1 ff0e::1 rubbish",
    )
    for address in group.split()
]


@pytest.mark.parametrize("address", INNER)
def test_inner_addresses(address: str) -> None:
    assert not address_is_public(address)


@given(st.ip_addresses())
def test_a_public_address_is_global_unicast(address: object) -> None:
    if address_is_public(address):  # type: ignore[arg-type]
        assert address.is_global  # type: ignore[attr-defined]
        assert not (address.is_multicast or address.is_reserved)  # type: ignore[attr-defined]


# --- which URLs are refused before anything is sent


@pytest.mark.parametrize(
    "url",
    [
        *(f"http://{a}/scan?token=1" for a in INNER if "." in a and ":" not in a),
        *(f"http://[{a}]/scan?token=1" for a in INNER if ":" in a),
        "http://localhost/",
        "http://LOCALHOST./",
        "http://metadata.google.internal/computeMetadata/v1/",
        "http://2130706433/",
        "http://0177.0.0.1/",
        "http://0x7f.1/",
        "http://0x7f000001/",
        "http://127.1/",
        "http://1.1.1.1.1/",
        "http://0x/",
        "http://①②⑦.0.0.1/",
        "http://127。0。0。1/",
        "http://⑧.8.8.8/",
        "http://１.1.1.1/",
        "http://[::1/",
        "http://[::1%25lo]/",
        "http://[v1.a]/",
        "http:///scan",
        "http:images.example",
        "http://.images.example/",
        "http://images..example/",
        "http://-images.example/",
        "http://images.example%2f@localhost/",
        "http://images.ex%61mple/",
        f"http://{'a' * 64}.example/",
        f"http://{'a.' * 130}example/",
        "http://user:secret@images.example/",
        "http://user@images.example/",
        "http://@images.example/",
        "http://images.example:22/",
        "http://images.example:0/",
        "http://images.example:65536/",
        "http://images.example:８０/",
        "http://images.example:+80/",
        "http://images.example\\@localhost/",
        "http:\\\\images.example/",
        "http://images.example/a b",
        "http://images.example/\r\nX-Secret: 1",
        "http://images.example/\u2028",
        "http://images.example/\x00",
        "\x01http://images.example/",
        " http://images.example/",
        "ht\ntp://images.example/",
        "ftp://images.example/",
        "file:///etc/passwd",
        "gopher://images.example/",
        "javascript:alert(1)",
        "//images.example/",
        "images.example",
        "",
        "http://images.example/" + "a" * 8192,
    ],
)
def test_refused_urls(url: str, internet: Internet) -> None:
    internet.names.update({"localhost": [["127.0.0.1"]], "metadata.google.internal": [["169.254.169.254"]]})
    refusal(url, PUBLIC_ONLY, ImageUrlRefusedError)
    assert internet.dialled == []


@pytest.mark.parametrize(
    "scheme", ["http://user:secret@127.0.0.1:{}/", "ftp://127.0.0.1:{}/", "http://127.0.0.1:0/?{}"]
)
def test_private_addresses_lift_no_other_rule(scheme: str, host: ImageHost) -> None:
    refusal(scheme.format(host.port), PRIVATE, ImageUrlRefusedError)
    assert host.requests == []


@pytest.mark.parametrize(
    "bad", [["10.0.0.1"], [PUBLIC, "10.0.0.1"], ["127.0.0.1", PUBLIC], [PUBLIC, "::1"], ["fe80::1%2"]]
)
def test_every_address_of_a_name_must_be_public(bad: list[str], internet: Internet) -> None:
    internet.names["images.example"] = [bad]
    message = refusal("http://images.example/", PUBLIC_ONLY, ImageUrlRefusedError)
    assert message == "The image URL was refused: its host does not resolve to public addresses only." or "%" in bad[0]
    assert internet.dialled == []


def test_the_address_that_was_checked_is_the_one_connected_to(internet: Internet, host: ImageHost) -> None:
    host.pages["/"] = answer(IMAGE)
    internet.names["images.example"] = [[PUBLIC], ["127.0.0.1"]]  # DNS rebinding: public first, then inner
    assert fetch_image_bytes("http://images.example/", PUBLIC_ONLY) == IMAGE
    assert internet.asked == ["images.example"]
    assert [address for address, _ in internet.dialled] == [PUBLIC]


def test_the_library_filter_is_a_second_opinion(internet: Internet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "address_is_public", lambda _: True)
    internet.names["images.example"] = [["10.0.0.1"]]
    with pytest.raises(ImageFetchError):
        fetch_image_bytes("http://images.example/", PUBLIC_ONLY)
    assert internet.dialled == []


def test_further_addresses_are_tried(internet: Internet, host: ImageHost) -> None:
    host.pages["/"] = answer(IMAGE)
    internet.names["images.example"] = [[PUBLIC_6, PUBLIC]]
    assert fetch_image_bytes("http://images.example/", PUBLIC_ONLY) == IMAGE
    assert [address.strip("[]") for address, _ in internet.dialled] == [PUBLIC_6, PUBLIC]
    internet.names["images.example"] = [[f"93.184.216.{n}" for n in range(100, 200)]]
    internet.dialled.clear()
    refusal("http://images.example/", PUBLIC_ONLY, ImageFetchError)
    assert len(internet.dialled) == 4


@pytest.mark.parametrize("port", [80, 8080, 8443, 443])
def test_what_a_host_is_asked(port: int, internet: Internet, host: ImageHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    host.pages["/a/b.png"] = answer(IMAGE, "Set-Cookie: a=b")
    url = f"http://Images.EXAMPLE.:{port}/a/b.png?x=1&y=%20#fragment"
    assert fetch_image_bytes(url, PUBLIC_ONLY) == IMAGE
    assert fetch_image_bytes(url, PUBLIC_ONLY) == IMAGE
    line, *headers = host.requests[-1].strip().split("\r\n")
    assert line == "GET /a/b.png?x=1&y=%20 HTTP/1.1"
    named = dict(header.split(": ", 1) for header in headers)
    assert named["Host"] == ("images.example" if port == 80 else f"images.example:{port}")
    assert named["User-Agent"] == "pulse-ecg"
    assert named["Accept-Encoding"] == "identity"
    assert "image/*" in named["Accept"]
    assert not {"Cookie", "Authorization", "Proxy-Authorization"} & set(named)
    assert internet.dialled[-1] == (PUBLIC, port)


def test_allowed_hosts(internet: Internet, host: ImageHost) -> None:
    host.pages = {"/": answer(IMAGE), "/away": redirect("http://other.example/")}
    internet.names["other.example"] = [[PUBLIC]]
    policy = FetchPolicy(allowed_hosts=frozenset({"Images.Example.", "bücher.example", "[2606:2800:0::1]"}))
    assert fetch_image_bytes("http://IMAGES.example./", policy) == IMAGE
    assert policy.allowed_hosts == frozenset({"images.example", "xn--bcher-kva.example", "2606:2800::1"})
    for url in ("http://other.example/", "http://images.example/away", "http://sub.images.example/", "http://example/"):
        assert "fetches images from" in refusal(url, policy, ImageUrlRefusedError)
    inner = FetchPolicy(allowed_hosts=frozenset({"10.0.0.1"}))
    refusal("http://10.0.0.1/", inner, ImageUrlRefusedError)
    with pytest.raises(ConfigurationError):
        FetchPolicy(allowed_hosts=frozenset({"a b"}))


def test_policy_from_settings() -> None:
    policy = FetchPolicy.from_settings(
        Settings(allowed_image_hosts=frozenset({"a.example"}), allow_private_image_urls=True)
    )
    assert policy == FetchPolicy(allow_private=True, allowed_hosts=frozenset({"a.example"}))
    assert (policy.max_bytes, policy.deadline_s, policy.max_redirects) == (20_000_000, 10.0, 3)


# --- redirects


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "location", ["/image", "image?x=ü", "//images.example:8080/image", "http://images.example/image"]
)
def test_redirects_are_followed(code: int, location: str, internet: Internet, host: ImageHost) -> None:
    host.pages = {"/": redirect(location.encode().decode("latin-1"), code), "/image": answer(IMAGE)}
    assert fetch_image_bytes("http://images.example/", PUBLIC_ONLY) == IMAGE
    assert internet.asked == ["images.example"] * 2


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://metadata.google.internal/",
        "http://[::ffff:169.254.169.254]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://rebound.example/",
        "http://2852039166/",
        "http://user:secret@images.example/",
        "http://images.example:22/",
        "file:///etc/passwd",
        "ftp://images.example/",
        "data:image/png;base64,AAAA",
        "http://images.example\\@localhost/",
        "http://[",
    ],
)
def test_redirects_meet_the_same_rules(location: str, internet: Internet, host: ImageHost) -> None:
    internet.names["metadata.google.internal"] = [["169.254.169.254"]]
    internet.names["rebound.example"] = [[PUBLIC, "10.0.0.1"]]
    host.pages = {"/": redirect("/hop"), "/hop": redirect(location)}
    refusal("http://images.example/", PUBLIC_ONLY, ImageUrlRefusedError)
    assert {address for address, _ in internet.dialled} == {PUBLIC}


def test_redirects_are_limited(host: ImageHost) -> None:
    host.pages = {f"/{n}": redirect(f"/{n - 1}") for n in range(1, 5)} | {
        "/0": answer(IMAGE),
        "/loop": redirect("/loop"),
    }
    assert fetch_image_bytes(host.url("/3"), PRIVATE) == IMAGE
    assert "3 times" in refusal(host.url("/4"), PRIVATE, ImageFetchError)
    host.requests.clear()
    refusal(host.url("/loop"), PRIVATE, ImageFetchError)
    assert len(host.requests) == 4


# --- answers


@pytest.mark.parametrize("code", [201, 204, 206, 300, 304, 305, 401, 403, 404, 407, 418, 500, 503])
def test_statuses(code: int, host: ImageHost) -> None:
    host.pages["/"] = status(code)
    assert str(code) in refusal(host.url(), PRIVATE, ImageFetchError)


def test_redirect_without_location(host: ImageHost) -> None:
    host.pages["/"] = status(302)
    assert "302" in refusal(host.url(), PRIVATE, ImageFetchError)


def gz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def bare_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gz(IMAGE)),
        ("X-GZIP", gz(IMAGE)),
        ("deflate", zlib.compress(IMAGE)),
        ("deflate", bare_deflate(IMAGE)),
        ("identity", IMAGE),
        ("", IMAGE),
    ],
)
def test_compressed_answers(coding: str, body: bytes, host: ImageHost) -> None:
    host.pages["/"] = answer(body, f"Content-Encoding: {coding}")
    assert fetch_image_bytes(host.url(), PRIVATE) == IMAGE


BOMB = gz(bytes(100_000_000))
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (answer(BOMB, "Content-Encoding: gzip"), ImageTooLargeError),
        (answer(zlib.compress(bytes(100_000_000)), "Content-Encoding: deflate"), ImageTooLargeError),
        (answer(gz(BOMB), "Content-Encoding: gzip, gzip"), ImageFetchError),
        (answer(IMAGE, "Content-Encoding: br"), ImageFetchError),
        (answer(IMAGE, "Content-Encoding: gzip"), ImageFetchError),
        (answer(gz(IMAGE)[:-9], "Content-Encoding: gzip"), ImageFetchError),
        (raw(OK + b"Content-Encoding: gzip\r\n\r\n" + gz(IMAGE) + bytes(100_001)), ImageTooLargeError),
        (answer(bytes(100_001)), ImageTooLargeError),
        (answer(b"", length=100_001), ImageTooLargeError),
        (answer(IMAGE, length=len(IMAGE) + 1), ImageFetchError),
        (answer(b""), ImageFetchError),
        (answer(gz(b""), "Content-Encoding: gzip"), ImageFetchError),
        (raw(OK + b"\r\n" + bytes(100_001)), ImageTooLargeError),
        (raw(CHUNKED + b"186a1\r\n" + bytes(100_001) + b"\r\n0\r\n\r\n"), ImageTooLargeError),
        (raw(CHUNKED + b"10\r\nabc"), ImageFetchError),
        (raw(CHUNKED + b"zz\r\nabc"), ImageFetchError),
        (raw(CHUNKED + b"-1\r\nabc"), ImageFetchError),
        (flood(b"x" * 65_536, after=OK + b"\r\n"), ImageTooLargeError),
        (flood(b"8000\r\n" + bytes(32_768) + b"\r\n", after=CHUNKED), ImageTooLargeError),
        (flood(b"x" * 65_536, after=CHUNKED), ImageFetchError),
        (flood(b"X: y\r\n" * 100, after=OK), ImageFetchError),
        (flood(b"x" * 65_536, after=OK + b"X: "), ImageFetchError),
        (flood(b"x" * 65_536), ImageFetchError),
        (raw(b""), ImageFetchError),
        (raw(b"rubbish\r\n\r\n"), ImageFetchError),
        (raw(b"SSH-2.0-secret\r\n"), ImageFetchError),
        (raw(b"HTTP/1.1 999999 secret\r\n\r\n"), ImageFetchError),
        (raw(OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"), ImageFetchError),
        (raw(OK + b"secret token\r\n: \xff\r\n\r\n"), ImageFetchError),
        (redirect("http://images.example/\xff"), ImageFetchError),
    ],
)
def test_bad_answers(behaviour: object, kind: type[PulseError], host: ImageHost) -> None:
    host.pages["/scan"] = behaviour  # type: ignore[assignment]
    tracemalloc.start()
    try:
        refusal(host.url("/scan?token=1"), PRIVATE, kind)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_cap_is_exact(host: ImageHost) -> None:
    body = bytes(100_000)
    host.pages = {
        "/": answer(body),
        "/gz": answer(gz(body), "Content-Encoding: gzip"),
        "/end": raw(OK + b"\r\n" + body),
    }
    for path in host.pages:
        assert fetch_image_bytes(host.url(path), PRIVATE) == body


# --- one deadline


@pytest.mark.parametrize(
    "behaviour",
    [
        silent,
        drip(b"HTTP/1.1 200 OK"),
        drip(b"X-Header: slow", after=OK),
        drip(IMAGE, after=OK + b"Content-Length: 10240\r\n\r\n"),
        drip(IMAGE, after=OK + b"\r\n"),
        drip(b"1\r\nx\r\n" * 99, after=CHUNKED),
        drip(b"0" * 999, after=CHUNKED),
        flood(b"HTTP/1.1 100 Continue\r\n\r\n" * 50),
        flood(b"X: y\r\n" * 9, after=CHUNKED + b"0\r\n"),
        drip(gz(IMAGE), after=OK + b"Content-Encoding: gzip\r\n\r\n"),
    ],
)
def test_slow_hosts(behaviour: object, host: ImageHost) -> None:
    host.pages["/"] = behaviour  # type: ignore[assignment]
    assert "0.4 seconds" in refusal(host.url(), HASTY, ImageFetchTimeoutError)


def test_slow_redirects_share_the_deadline(host: ImageHost) -> None:
    def slow_redirect(exchange: object) -> None:
        time.sleep(0.15)
        redirect("/")(exchange)  # type: ignore[arg-type]

    host.pages["/"] = slow_redirect
    refusal(host.url(), HASTY, ImageFetchTimeoutError)


def test_slow_tls(host: ImageHost) -> None:
    host.pages["*"] = silent
    refusal(host.url().replace("http:", "https:"), HASTY, ImageFetchTimeoutError)


def test_tls_handshake_drip() -> None:
    """Each byte of a handshake record restarts a socket's time-out; the deadline does not care."""
    closing = threading.Event()

    def serve(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.sendall(b"\x16\x03\x03\x40\x00")
            while not closing.wait(0.05):
                try:
                    sock.sendall(b"\x02")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            refusal(f"https://127.0.0.1:{listener.getsockname()[1]}/", HASTY, ImageFetchTimeoutError)
        finally:
            closing.set()
            thread.join()


def test_full_backlog() -> None:
    """A host that never accepts: the connection itself is what takes too long."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        try:
            for sock in waiting:
                sock.setblocking(False)
                sock.connect_ex(address)
            refusal(f"http://127.0.0.1:{address[1]}/", HASTY, ImageFetchTimeoutError)
        finally:
            for sock in waiting:
                sock.close()


def test_blocked_lookup(internet: Internet) -> None:
    internet.unblock.clear()
    refusal("http://images.example/", FetchPolicy(deadline_s=0.3), ImageFetchTimeoutError)
    internet.unblock.set()
    for thread in threading.enumerate():
        if "pulse" in thread.name:
            thread.join(5)


@pytest.mark.parametrize("where", ["lookup", "head", "body"])
def test_a_cancelled_fetch_ends(where: str, internet: Internet, host: ImageHost) -> None:
    host.pages["/"] = silent if where == "head" else drip(IMAGE, after=OK + b"\r\n")
    if where == "lookup":
        internet.unblock.clear()
    cancel = Cancellation()
    timer = threading.Timer(0.3, cancel.set)
    timer.start()
    started = time.monotonic()
    with pytest.raises(RequestCancelledError):
        fetch_image_bytes("http://images.example/", PUBLIC_ONLY, cancel)
    assert 0.2 < time.monotonic() - started < 2
    timer.join()
    internet.unblock.set()
    for thread in threading.enumerate():
        if "pulse-ecg-lookup" in thread.name:
            thread.join(5)


def test_blocked_lookups_are_bounded(internet: Internet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_LOOKUPS", threading.BoundedSemaphore(2))
    internet.unblock.clear()
    for _ in range(4):
        refusal("http://images.example/", FetchPolicy(deadline_s=0.1), ImageFetchTimeoutError)
    assert len(internet.asked) == 2
    lookups = [thread for thread in threading.enumerate() if "pulse" in thread.name]
    assert len(lookups) == 2
    internet.unblock.set()
    for thread in lookups:
        thread.join(5)
    refusal("http://nobody.example/", PUBLIC_ONLY, ImageFetchError)


def test_unknown_host(internet: Internet) -> None:
    assert "'nobody.example' was not found" in refusal("http://nobody.example/scan", PUBLIC_ONLY, ImageFetchError)
    assert internet.dialled == []


def test_refused_connection(host: ImageHost) -> None:
    url = host.url("/scan?token=1")
    host.close()
    refusal(url, PRIVATE, ImageFetchError)


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of images.example with its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    path = tmp_path_factory.mktemp("tls") / "images.pem"
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -out {path} "
    command += f"-keyout {path}.key -subj /CN=images.example -addext subjectAltName=DNS:images.example"
    subprocess.run(command.split(), check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.key").read_text())
    return path


@pytest.fixture
def secure(internet: Internet, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ImageHost]:
    """``images.example`` over https; ``requests`` holds the server names that clients asked for, too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    image_host = ImageHost({"/": answer(IMAGE)}, context)
    context.sni_callback = lambda _socket, name, _context: image_host.requests.append(f"SNI {name}")
    internet.hosts[PUBLIC] = image_host
    monkeypatch.setattr(requests.adapters, "DEFAULT_CA_BUNDLE_PATH", str(certificate))
    if hasattr(requests.adapters, "_preloaded_ssl_context"):  # requests 2.32.3 read the bundle when imported
        trusting = ssl.create_default_context(cafile=str(certificate))
        monkeypatch.setattr(requests.adapters, "_preloaded_ssl_context", trusting)
    yield image_host
    image_host.close()


def test_tls_speaks_to_the_name(secure: ImageHost, internet: Internet) -> None:
    assert fetch_image_bytes("https://images.example/", PUBLIC_ONLY) == IMAGE
    assert secure.requests[0] == "SNI images.example"
    assert "Host: images.example\r\n" in secure.requests[1]
    assert internet.dialled == [(PUBLIC, 443)]


def test_tls_certificate_must_be_of_the_name(secure: ImageHost, internet: Internet) -> None:
    internet.names["other.example"] = [[PUBLIC]]
    assert "certificate" in refusal("https://other.example/", PUBLIC_ONLY, ImageFetchError)
    assert "certificate" in refusal(f"https://{PUBLIC}/", PUBLIC_ONLY, ImageFetchError)
    assert [line for line in secure.requests if not line.startswith("SNI")] == []


def test_tls_certificate_must_be_trusted(secure: ImageHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    url = f"https://127.0.0.1:{secure.port}/"
    assert "certificate" in refusal(url, PRIVATE, ImageFetchError)


def test_no_redirect_from_https_to_http(secure: ImageHost) -> None:
    secure.pages["/down"] = redirect("http://images.example/")
    secure.pages["/same"] = redirect("//images.example/")
    assert fetch_image_bytes("https://images.example/same", PUBLIC_ONLY) == IMAGE
    assert "https to http" in refusal("https://images.example/down", PUBLIC_ONLY, ImageUrlRefusedError)


# --- logs, threads, arbitrary input


def test_logs_hold_no_url(host: ImageHost, internet: Internet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    host.pages = {"/": answer(IMAGE), "/odd": raw(OK + b"secret\r\n\r\nx"), "/hop": redirect("/?token=2")}
    internet.names["inner.example"] = [["10.0.0.1"]]
    for path in ("/?token=1", "/odd?token=1", "/hop?token=1", "/none?token=1"):
        for url in (f"http://images.example{path}", f"http://inner.example{path}"):
            try:
                fetch_image_bytes(url, PUBLIC_ONLY)
            except PulseError:
                logging.getLogger("test").exception("failed")
    assert "failed" in caplog.text
    assert not [word for word in ("token", "secret", "10.0.0.1", PUBLIC, "inner.example") if word in caplog.text]
    logging.getLogger("urllib3.connectionpool").debug("others still log")
    assert "others still log" in caplog.text
    assert requests_hardened.ip_filter.logger.isEnabledFor(logging.WARNING)


def test_concurrent_fetches(host: ImageHost) -> None:
    host.pages = {f"/{n}": answer(bytes([n]) * 1000) for n in range(16)} | {"/slow": silent}
    policy = FetchPolicy(allow_private=True, deadline_s=1.5)
    with ThreadPoolExecutor(20) as pool:
        slow = [pool.submit(fetch_image_bytes, host.url("/slow"), policy) for _ in range(4)]
        quick = [pool.submit(fetch_image_bytes, host.url(f"/{n}"), policy) for n in range(16)]
        assert [future.result() for future in quick] == [bytes([n]) * 1000 for n in range(16)]
        assert all(isinstance(future.exception(), ImageFetchTimeoutError) for future in slow)


url_text = st.one_of(
    st.text(max_size=60),
    st.builds(
        "{}://{}{}".format, st.sampled_from(["http", "https", "HTTP"]), st.text(max_size=40), st.text(max_size=20)
    ),
    st.builds("http://{}/{}".format, st.from_regex(r"[a-z0-9.:@\[\]%-]{1,30}", fullmatch=True), st.text(max_size=20)),
)
LENIENT = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LENIENT
@given(url=url_text, private=st.booleans())
def test_any_url_gives_bytes_or_our_error(url: str, private: bool, internet: Internet) -> None:
    try:
        assert fetch_image_bytes(url, FetchPolicy(allow_private=private, deadline_s=2))
    except PulseError as error:
        assert not [secret for secret in ("secret", PUBLIC, "Error(") if secret in str(error)]
    internet.names.setdefault("images.example", [[PUBLIC]])


@LENIENT
@given(
    head=st.sampled_from([b"", b"HTTP/1.1 ", OK, OK + b"\r\n", CHUNKED, OK + b"Content-Encoding: gzip\r\n\r\n"]),
    rest=st.one_of(st.binary(max_size=80), st.text("HTP/1.0 2\r\n:;,abcLocation-", max_size=60).map(str.encode)),
)
def test_any_answer_gives_bytes_or_our_error(head: bytes, rest: bytes, host: ImageHost) -> None:
    host.pages["/"] = raw(head + rest)
    try:
        assert fetch_image_bytes(host.url(), PRIVATE)
    except PulseError as error:
        assert not isinstance(error, ImageFetchTimeoutError)
