"""The real handler with the demo checkpoint behind HTTP, as the stock container puts it there."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qsl, urlsplit

from PIL import Image

from demo.build_checkpoint import build_checkpoint
from handler import EndpointHandler

IMAGE_TYPES = frozenset({f"image/{kind}" for kind in ("png", "jpeg", "jpg", "tiff", "bmp", "gif", "webp")})


@contextmanager
def demo_handler(folder: Path) -> Iterator[EndpointHandler]:
    """A handler on a fresh demo checkpoint, without a commentary key; nothing of the caller's shell reaches it."""
    foreign = ("PULSE_", "DEEPSEEK_", "deep_key")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environ |= {"PULSE_DEVICE": "cpu", "PULSE_ALLOW_PRIVATE_IMAGE_URLS": "1"}
    with mock.patch.dict(os.environ, environ, clear=True):
        yield EndpointHandler(str(build_checkpoint(folder)))


class EndpointServer(ThreadingHTTPServer):
    """One endpoint on a loopback port.  ``files`` are what GET serves, for image URLs; ``bodies`` are what came in.

    ``most_new_tokens`` shortens the answers of requests that allow more, so that examples can be run as they stand.
    """

    daemon_threads = True

    def __init__(self, handler: EndpointHandler, *, most_new_tokens: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.endpoint, self.most_new_tokens = handler, most_new_tokens
        self.turn = threading.Lock()
        self.files: dict[str, bytes] = {}
        self.bodies: list[dict[str, Any]] = []
        self.tokens: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def shortened(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body with fewer new tokens, unless what it asks for would be refused anyway."""
        parameters = body.get("parameters")
        if not isinstance(parameters, (dict, type(None))):
            return body
        given = (parameters or {}).get("max_new_tokens", 512)
        if self.most_new_tokens is None or not isinstance(given, int) or not self.most_new_tokens < given <= 2048:
            return body
        return {**body, "parameters": {**(parameters or {}), "max_new_tokens": self.most_new_tokens}}


@contextmanager
def endpoint_server(handler: EndpointHandler, *, most_new_tokens: int | None = None) -> Iterator[EndpointServer]:
    with EndpointServer(handler, most_new_tokens=most_new_tokens) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(5)


class _Exchange(BaseHTTPRequestHandler):
    server: EndpointServer

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path in self.server.files:
            self._send(200, self.server.files[path], "image/jpeg")
        elif path in ("/", "/health"):
            self._send(200, b"Ok", "text/plain")
        else:
            self._send(404, b"Not Found", "text/plain")

    def do_POST(self) -> None:
        """Exact look-ups of the types, one call at a time, every exception a 400: the container's rules."""
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.append(self.headers.get("Authorization", ""))
        try:
            if self.headers.get("Accept", "*/*") not in ("*/*", "application/json"):
                raise ValueError("Accept type not supported.")
            body = self._deserialised(content)
            if "inputs" not in body:
                raise ValueError("Body needs to provide a inputs key.")
            self.server.bodies.append(body)
            with self.server.turn:
                answer = self.server.endpoint(self.server.shortened(body))
            self._send(200, json.dumps(answer, ensure_ascii=False).encode(), "application/json")
        except Exception as error:
            self._send(400, json.dumps({"error": str(error)}).encode(), "application/json")

    def _deserialised(self, content: bytes) -> dict[str, Any]:
        kind = self.headers.get("Content-Type")
        if kind == "application/json":
            body = json.loads(content)
        elif kind in IMAGE_TYPES:
            body = {"inputs": Image.open(io.BytesIO(content)).convert("RGB")}
        else:
            raise ValueError(f"Content type {kind} not supported.")
        query = dict(parse_qsl(urlsplit(self.path).query))
        if query and "parameters" not in body:
            words = {"true": True, "false": False}
            body["parameters"] = {k: int(v) if v.isnumeric() else words.get(v, v) for k, v in query.items()}
        return body

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' output is theirs."""
