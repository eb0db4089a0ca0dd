"""A local chat service that misbehaves on request: each request takes the next behaviour of a script."""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Behaviour = Callable[["Exchange"], None]

TURKISH = (
    "Kalp atımlarınız düzenli ve kalbiniz normal hızda çalışıyor (normal sinüs ritmi). "
    "Bu açıklama tanı değildir; sonucu doktorunuzla değerlendirin."
)


class Exchange(socketserver.StreamRequestHandler):
    """One connection; requests are read raw so that a behaviour may break HTTP anywhere."""

    server: ChatServer
    request_headers: dict[str, str]
    body: dict[str, Any]

    def handle(self) -> None:
        with self.server.lock:
            self.server.connections += 1
        with contextlib.suppress(ConnectionError, TimeoutError):
            while self._read():
                with self.server.lock:
                    self.server.requests.append((self.request_headers, self.body))
                    script = self.server.script
                    behaviour = script.pop(0) if len(script) > 1 else script[0]
                behaviour(self)

    def _read(self) -> bool:
        request_line = self.rfile.readline()
        if not request_line.strip():
            return False
        self.request_headers = {}
        while (line := self.rfile.readline().decode("latin-1").strip()) != "":
            name, _, value = line.partition(":")
            self.request_headers[name.lower()] = value.strip()
        self.body = json.loads(self.rfile.read(int(self.request_headers.get("content-length", 0))) or b"{}")
        return True

    def send(self, status: int, body: bytes, *headers: str) -> None:
        head = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
        self.wfile.write("\r\n".join([*head, "", ""]).encode() + body)

    def drip(self, data: bytes, interval_s: float = 0.1) -> None:
        for at in range(len(data)):
            if self.server.closing.wait(interval_s):
                return
            self.wfile.write(data[at : at + 1])

    def cut(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)


class ChatServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.script: list[Behaviour] = [answer()]
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.connections = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextlib.contextmanager
def chat_server(*script: Behaviour) -> Iterator[ChatServer]:
    """Serves on a free port; the last behaviour of the script repeats for ever."""
    with ChatServer() as server:
        server.script = list(script) or server.script
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join(5)


def completion(text: str | None = TURKISH, **changes: object) -> bytes:
    document: dict[str, Any] = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "local-turkish-1",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, "refusal": None}}
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 23, "total_tokens": 123},
    }
    return json.dumps({**document, **changes}).encode()


def answer(text: str | None = TURKISH, finish_reason: str = "stop", **changes: object) -> Behaviour:
    message = {"role": "assistant", "content": text}
    changes.setdefault("choices", [{"index": 0, "finish_reason": finish_reason, "message": message}])
    return lambda exchange: exchange.send(200, completion(text, **changes))


def status(code: int, *headers: str, body: bytes = b'{"error": {"message": "no"}}') -> Behaviour:
    return lambda exchange: exchange.send(code, body, *headers)


def raw(body: bytes) -> Behaviour:
    return lambda exchange: exchange.send(200, body)


def slow_first_byte(seconds: float = 30.0) -> Behaviour:
    def behave(exchange: Exchange) -> None:
        if not exchange.server.closing.wait(seconds):
            exchange.send(200, completion())

    return behave


def header_drip(exchange: Exchange) -> None:
    exchange.drip(b"HTTP/1.1 200 X\r\nX-Slow: " + b"y" * 10_000)


def body_drip(exchange: Exchange) -> None:
    exchange.wfile.write(b"HTTP/1.1 200 X\r\nContent-Length: 9999\r\n\r\n")
    exchange.drip(completion().ljust(9999))


def error_body_drip(exchange: Exchange) -> None:
    exchange.wfile.write(b"HTTP/1.1 400 X\r\nContent-Length: 9999\r\n\r\n")
    exchange.drip(b" " * 9999)


def cut_before_answer(exchange: Exchange) -> None:
    exchange.cut()


def cut_in_body(exchange: Exchange) -> None:
    exchange.wfile.write(b"HTTP/1.1 200 X\r\nContent-Length: 9999\r\n\r\n" + completion()[:40])
    exchange.cut()


def endless_body(code: int = 200, *headers: str) -> Behaviour:
    def behave(exchange: Exchange) -> None:
        head = [f"HTTP/1.1 {code} X", "Transfer-Encoding: chunked", *headers, "", ""]
        exchange.wfile.write("\r\n".join(head).encode())
        chunk = b"%x\r\n" % 65536 + b" " * 65536 + b"\r\n"
        while not exchange.server.closing.is_set():
            exchange.wfile.write(chunk)

    return behave


def retry_date(seconds: float) -> str:
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + seconds))
