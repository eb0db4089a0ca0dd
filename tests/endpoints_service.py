"""A stand-in for the hub and for the service that runs Inference Endpoints, the endpoints themselves included."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NOW = "2026-01-01T00:00:00.000Z"
USER, TOKEN = "someone", "hf_" + "x" * 30
FILES = ["README.md", "handler.py", "utils.py", "requirements.txt", "model-00001-of-00003.safetensors"]


class EndpointsService(ThreadingHTTPServer):
    """``endpoints`` by name, as the service would show them; ``writes`` are the requests that change something.

    ``states`` are what a deployment goes through, one for each look at it; the last one stays; a number is the
    HTTP status of a failing service.  ``refusal`` meets whoever creates an endpoint.  ``answer`` is what the
    endpoints answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.writes: list[tuple[str, str, dict[str, Any]]] = []
        self.states: list[tuple[str | int, str]] = [("running", "")]
        self.answer: tuple[int, Any] = (
            200,
            [{"generated_text": "Sinus rhythm.", "model": "PULSE-7B", "processing_method": "pipeline"}],
        )
        self.refusal: tuple[int, str] | None = None
        self.files = list(FILES)
        self.commits = {"main": "a" * 40, "a" * 40: "a" * 40, "b" * 40: "b" * 40}
        self.authorizations: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def created(self, body: dict[str, Any]) -> dict[str, Any]:
        status = {"state": "pending", "message": "", "createdAt": NOW, "updatedAt": NOW, "url": f"{self.url}/endpoint"}
        raw = {**body, "status": status, "healthRoute": "/health"}
        raw["model"]["secrets"] = dict.fromkeys(raw["model"].get("secrets") or {}, "")
        self.endpoints[body["name"]] = raw
        return raw

    def updated(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        raw = self.endpoints[name]
        scaling = body.get("compute", {}).pop("scaling", {})
        raw["compute"]["scaling"] |= scaling
        raw["compute"] |= body.get("compute", {})
        raw["model"] |= body.get("model", {})
        return raw

    def looked_at(self, name: str) -> tuple[int, dict[str, Any]]:
        """The HTTP status and body of a look at an endpoint."""
        if not (raw := self.endpoints.get(name)):
            return 404, {"error": "no such endpoint"}
        state, message = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, int):
            return state, {"error": message}
        raw["status"] |= {"state": state, "message": message}
        return 200, raw


class _Exchange(BaseHTTPRequestHandler):
    server: EndpointsService
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/endpoint":
            self._send(200, "up")
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid token"})
        elif path.endswith("/whoami-v2"):
            self._send(200, {"name": USER, "type": "user"})
        elif model := re.fullmatch(r"/api/models/someone/pulse(?:/revision/(.*))?", path):
            self._model(model[1] or "main")
        elif path.startswith("/api/models/"):
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            self._send(*self.server.looked_at(path.rpartition("/")[2]))

    def _model(self, revision: str) -> None:
        if commit := self.server.commits.get(revision):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._send(200, {"id": "someone/pulse", "sha": commit, "siblings": siblings})
        else:
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/endpoint":
            self.server.authorizations.append(self.headers["Authorization"])
            self._send(*self.server.answer)
            return
        self.server.writes.append(("POST", self.path, body))
        if self.server.refusal:
            status, message = self.server.refusal
            self._send(status, {"error": message})
        elif self.path.endswith("/resume"):
            self._send(200, self.server.endpoints[self.path.split("/")[-2]])
        else:
            self._send(200, self.server.created(json.loads(json.dumps(body))))

    def do_PUT(self) -> None:
        body = self._body()
        self.server.writes.append(("PUT", self.path, body))
        self._send(200, self.server.updated(self.path.rpartition("/")[2], json.loads(json.dumps(body))))

    def _body(self) -> dict[str, Any]:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def endpoints_service() -> Iterator[EndpointsService]:
    with EndpointsService() as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield service
        finally:
            service.shutdown()
            thread.join()
