"""Our own server for tests: in this process around a given handler, or as the process that operators start."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import requests
from starlette.routing import Route

from handler import EndpointHandler
from server.run import Server
from server.service import Service
from server.settings import ServerSettings

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0
JSON = {"Content-Type": "application/json"}


def until(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait for a state that nothing announces."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


class Address:
    """Where a server listens, and short ways to speak to it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=PATIENCE, **options)

    def post(self, path: str, body: object, **options: Any) -> requests.Response:
        data = json.dumps(body) if isinstance(body, (dict, list)) else body
        options.setdefault("headers", JSON)
        return requests.post(self.url + path, data, timeout=PATIENCE, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def exchange(self, data: bytes) -> bytes:
        """What comes back on a connection of its own until the server closes it, or is silent for a second."""
        with self.connect() as sock:
            sock.sendall(data)
            return received(sock, quiet=1)


def received(sock: socket.socket, *, quiet: float) -> bytes:
    sock.settimeout(quiet)
    pieces = []
    with contextlib.suppress(TimeoutError, ConnectionError):
        while piece := sock.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def request(path: str, body: bytes, *headers: str, method: str = "POST") -> bytes:
    """The bytes of one request."""
    head = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(head).encode() + body


# --- in this process


class OurServer(Address):
    """A server in a thread; its parts can be looked at."""

    def __init__(self, server: Server, service: Service) -> None:
        super().__init__(server.servers[0].sockets[0].getsockname()[1])
        self.server, self.service = server, service

    def quiet(self) -> None:
        """Wait until nothing is going on."""
        until(lambda: not self.service.workers.busy and not self.service._exchanges)

    def drain(self) -> None:
        """As on SIGTERM."""
        self.server._loop.call_soon_threadsafe(self.server._begin_drain)


@contextlib.contextmanager
def our_server(
    handler: EndpointHandler,
    *,
    load: Callable[[str], EndpointHandler] | None = None,
    ui: Sequence[Route] = (),
    **settings: Any,
) -> Iterator[OurServer]:
    """Serve on a free loopback port; ``settings`` are those of :class:`ServerSettings`."""
    service = Service(ServerSettings(port=0, **{"drain_timeout": 5.0, **settings}), handler._settings)
    server = Server(service, ui)
    with mock.patch("server.service.load_handler", load or (lambda _model: handler)):
        thread = threading.Thread(target=server.run, name="server")
        thread.start()
        until(lambda: server.started and (load or service.phase == "ok"))
        ours = OurServer(server, service)
        try:
            yield ours
        finally:
            with contextlib.suppress(RuntimeError):  # its loop is closed: it stopped in the test
                ours.drain()
            thread.join(PATIENCE)
            assert not thread.is_alive()


# --- as a process


class ServerProcess(Address):
    """``python serve.py`` on a free loopback port."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log
        until(lambda: process.poll() is not None or self._port())
        assert process.poll() is None, self.log
        super().__init__(self._port())

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8")

    def _port(self) -> int:
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", self.log)
        return int(found[1]) if found else 0

    def wait_for_health(self) -> None:
        until(lambda: self.process.poll() is not None or self.get("/health").status_code == 200)
        assert self.process.poll() is None, self.log

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


def environment(**variables: str) -> dict[str, str]:
    """The shell's, without what would reach the handler from it."""
    foreign = ("PULSE_", "DEEPSEEK_", "deep_key")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return plain | {"PULSE_DEVICE": "cpu", **variables}


def start(log: Path, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
    port = [] if "--port" in arguments else ["--port", "0"]
    command = [sys.executable, str(ROOT / "serve.py"), *port, *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment(**variables), stdout=file, stderr=file)


@contextlib.contextmanager
def server_process(folder: Path, *arguments: str, **variables: str) -> Iterator[ServerProcess]:
    """Run it; what it writes goes to a file in ``folder``."""
    process = start(folder / "serve.log", *arguments, **variables)
    try:
        yield ServerProcess(process, folder / "serve.log")
    finally:
        process.kill()
        process.wait(PATIENCE)
