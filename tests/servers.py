"""Local image hosts that misbehave, and a pretended internet whose public names and addresses lead to them."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable

import urllib3.util.connection

Behaviour = Callable[["Exchange"], None]

PUBLIC = "93.184.216.34"
PUBLIC_6 = "2606:2800:21f:cb07:6820:80da:af6b:8b2c"


class Exchange:
    """One connection whose request has been read; a behaviour may send whatever it likes."""

    def __init__(self, sock: socket.socket, request: bytes, closing: threading.Event) -> None:
        self.sock, self.request, self.closing = sock, request, closing

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def drip(self, data: bytes, interval_s: float = 0.05) -> None:
        for at in range(len(data)):
            self.send(data[at : at + 1])
            if self.closing.wait(interval_s):
                return

    def flood(self, data: bytes) -> None:
        while not self.closing.is_set():
            self.send(data)


class ImageHost:
    """Serves one behaviour per path, on a loopback port of its own; ``requests`` are the heads that it received."""

    def __init__(self, pages: dict[str, Behaviour], context: ssl.SSLContext | None = None) -> None:
        self.pages, self.context = pages, context
        self.requests: list[str] = []
        self.closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, name="image-host")]
        self._threads[0].start()

    def url(self, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def close(self) -> None:
        self.closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._converse, args=(sock,), name="image-host")
            self._threads.append(thread)
            thread.start()

    def _converse(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(sock)
            sock.settimeout(1)
            if self.context:
                sock = stack.enter_context(self.context.wrap_socket(sock, server_side=True))
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                if not (piece := sock.recv(1)):
                    return
                head += piece
            self.requests.append(head.decode("latin-1"))
            path = self.requests[-1].split(" ")[1].partition("?")[0]
            self.pages.get(path, self.pages.get("*", status(404)))(Exchange(sock, head, self.closing))


def answer(body: bytes, *headers: str, line: str = "200 OK", length: int | None = None) -> Behaviour:
    """A complete answer; ``length`` is a lie about the body's."""
    count = len(body) if length is None else length
    head = "\r\n".join([f"HTTP/1.1 {line}", f"Content-Length: {count}", *headers, "", ""])
    return lambda exchange: exchange.send(head.encode("latin-1") + body)


def status(code: int) -> Behaviour:
    return answer(b"secret-body", line=f"{code} Secret-Reason")


def redirect(location: str, code: int = 302) -> Behaviour:
    return answer(b"", f"Location: {location}", line=f"{code} Moved")


def raw(data: bytes) -> Behaviour:
    return lambda exchange: exchange.send(data)


def silent(exchange: Exchange) -> None:
    exchange.closing.wait(10)


def drip(data: bytes, *, after: bytes = b"") -> Behaviour:
    def behave(exchange: Exchange) -> None:
        exchange.send(after)
        exchange.drip(data)

    return behave


def flood(data: bytes, *, after: bytes = b"") -> Behaviour:
    def behave(exchange: Exchange) -> None:
        exchange.send(after)
        exchange.flood(data)

    return behave


class Internet:
    """Names with their successive DNS answers (the last one stays), and addresses that lead to local hosts.

    ``asked`` are the names that were looked up, ``dialled`` the addresses and ports that were connected to.
    """

    def __init__(self) -> None:
        self.names: dict[str, list[list[str]]] = {}
        self.hosts: dict[str, ImageHost] = {}
        self.asked: list[str] = []
        self.dialled: list[tuple[str, int]] = []
        self.unblock = threading.Event()
        self.unblock.set()
        self._getaddrinfo = socket.getaddrinfo
        self._create_connection = urllib3.util.connection.create_connection

    def getaddrinfo(self, host: str, port: int, *args: int, **kwargs: int) -> list[tuple[object, ...]]:
        with contextlib.suppress(socket.gaierror):
            return list(self._getaddrinfo(host, port, *args, **{**kwargs, "flags": socket.AI_NUMERICHOST}))
        self.asked.append(host)
        self.unblock.wait(10)
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, f"secret resolver text about {host}")
        answers = self.names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in addresses
        ]

    def create_connection(self, address: tuple[str, int], *args: object, **kwargs: object) -> socket.socket:
        self.dialled.append(address)
        host = self.hosts.get(address[0].strip("[]"))
        if host is None:
            raise ConnectionRefusedError(f"secret: nobody at {address[0]}")
        return self._create_connection(("127.0.0.1", host.port), *args, **kwargs)  # type: ignore[arg-type]
