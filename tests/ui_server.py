"""The page on a server of the tests' own: behind it the real handler, or a script of what may go wrong."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pulse_ecg.call import Answered, Call, Progress, Started, TextPiece
from pulse_ecg.errors import PulseError
from server.ui import ui_routes

if TYPE_CHECKING:
    from handler import EndpointHandler

Body = dict[str, Any]
Play = Callable[[Body], Response]
MODEL = "PULSE-7B"


@dataclass
class UiServer:
    """Answers POST / with ``play``; ``bodies`` and ``tokens`` are what came in.  ``token``, if set, is demanded."""

    play: Play
    token: str = ""
    url: str = ""
    bodies: list[Body] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    async def post(self, request: Request) -> Response:
        given = request.headers.get("Authorization", "")
        self.tokens.append(given)
        self.bodies.append(json.loads(await request.body()))
        if self.token and given != f"Bearer {self.token}":
            return refused(401, "The bearer token is missing or wrong.", {"WWW-Authenticate": "Bearer"})
        return self.play(self.bodies[-1])


@contextmanager
def ui_server(play: Play) -> Iterator[UiServer]:
    """A server on a loopback port, for as long as the context lasts."""
    server = UiServer(play)
    app = Starlette(routes=[*ui_routes(), Route("/", server.post, methods=["POST"])])
    listener = socket.create_server(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    host = uvicorn.Server(config)
    thread = threading.Thread(target=host.run, args=([listener],), name="ui-server")
    thread.start()
    try:
        yield server
    finally:
        host.should_exit = True
        thread.join(10)
        listener.close()


# --- what the server may say


def refused(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error record with its status code."""
    return JSONResponse([error_record(message)], status, headers)


def error_record(message: str) -> Body:
    return {"generated_text": "", "error": message, "model": MODEL, "handler": "test", "success": False}


def record(text: str, **fields: Any) -> Body:
    return {"generated_text": text, "model": MODEL, "processing_method": "pipeline", **fields}


def details(**fields: Any) -> Body:
    timings = dict.fromkeys(("image_fetch", "image_decode", "preprocess", "vision", "prefill", "decode"), 0.25)
    counts = {"prompt_tokens": 2934, "image_tokens": 2880, "generated_tokens": 42, "seed": 7}
    return {"finish_reason": "eos", **counts, "timings": timings, "engine": "test", "model_revision": "local", **fields}


Event = tuple[str, Body]


def events_of(pieces: Iterable[str], final: Body) -> list[Event]:
    """A whole answer: its pieces, then its record, without and with commentary."""
    bare = {name: value for name, value in final.items() if not name.startswith("comment")}
    texts = [("text", {"text": piece}) for piece in pieces]
    return [("start", {"id": "test-request", "model": MODEL}), *texts, ("answer", bare), ("record", final)]


def streamed(events: Iterable[Event | threading.Event], cancelled: threading.Event | None = None) -> Response:
    """Events one by one; a ``threading.Event`` among them is waited for.  ``cancelled`` is set if the client leaves."""

    async def content() -> AsyncIterator[bytes]:
        try:
            for event in events:
                if isinstance(event, threading.Event):
                    yield b": keep-alive\n\n"
                    await anyio.to_thread.run_sync(event.wait, abandon_on_cancel=True)
                else:
                    yield encoded(event)
        except anyio.get_cancelled_exc_class():
            if cancelled:
                cancelled.set()
            raise

    return StreamingResponse(content(), media_type="text/event-stream", headers={"X-Request-Id": "test-request"})


def encoded(event: Event) -> bytes:
    return f"event: {event[0]}\ndata: {json.dumps(event[1], ensure_ascii=False)}\n\n".encode()


# --- the real handler


def answered_by(handler: EndpointHandler) -> Play:
    """The handler's own answers, streamed or not."""

    def play(body: Body) -> Response:
        if not body.pop("stream", False):
            return JSONResponse(handler(body))
        try:
            events = _events(handler, body)
            start = next(events)  # what fails before it fails as JSON
        except PulseError as error:
            return refused(error.status, str(error))

        def content() -> Iterator[bytes]:
            yield encoded(start)
            yield from map(encoded, events)

        return StreamingResponse(content(), media_type="text/event-stream")

    return play


def _events(handler: EndpointHandler, body: Body) -> Iterator[Event]:
    progress: list[Progress] = []
    [outcome] = handler.respond(body, Call(listen=progress.append))
    if outcome.error is not None:
        raise outcome.error
    for told in progress:
        match told:
            case Started(model):
                yield "start", {"id": "real", "model": model}
            case TextPiece(text):
                yield "text", {"text": text}
            case Answered(answer):
                yield "answer", answer
    yield "record", outcome.record
