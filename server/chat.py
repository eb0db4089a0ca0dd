"""``POST /v1/chat/completions`` and ``GET /v1/models``, as OpenAI defines them."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from pulse_ecg.call import Answered, Outcome, Record, Started, TextPiece
from pulse_ecg.errors import PulseError, RequestError, excerpt
from server.answering import Answering
from server.body import media_type, parse_json
from server.chat_request import ChatRequest, chat_request, is_name
from server.errors import ChatFieldError, openai_error, openai_status, retry_headers
from server.jobs import Finished, News
from server.service import Service
from server.sse import event

_FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
_COMMENTARY_FIELDS = (
    *("comment_text", "commentary_model", "commentary_tokens", "commentary_status"),
    *("commentary_error", "commentary_warnings"),
)


async def completions(request: Request) -> ASGIApp:
    """One completion, whole or in chunks."""
    with Answering(request) as answering:
        if (kind := media_type(request)) != "application/json":
            raise RequestError(f"The Content-Type is {excerpt(kind)}; accepted: application/json.")
        asked = chat_request(parse_json(await answering.body()), model_names(request))
        told = Completion(answering.request_id, answering.model, asked)
        job = answering.start(asked.data, stream=asked.stream)
        if not asked.stream:
            return told.whole(await job.outcomes())
        first = await job.take()
        if isinstance(first[0], Finished):  # it came to nothing before the model was asked
            return told.whole(first[0].outcomes)
        return answering.stream(job, first, told)


async def models(request: Request) -> JSONResponse:
    """The one model."""
    return JSONResponse({"object": "list", "data": [_model(request)]})


async def model(request: Request) -> JSONResponse:
    """The same by its name.

    Raises:
        ChatFieldError: there is no model of this name.
    """
    if not is_name(request.path_params["name"], model_names(request)):
        raise ChatFieldError(
            "This server has no model of that name.", param="model", code="model_not_found", status=404
        )
    return JSONResponse(_model(request))


def model_names(request: Request) -> tuple[str, ...]:
    """What the model is called here: by its checkpoint, and on the hub.

    Raises:
        ModelLoadingError: it is not loaded yet.
    """
    service: Service = request.app.state.service
    return (service.model_name, service.hub_name)


def _model(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    created = int(service.loaded_at)
    return {"id": model_names(request)[0], "object": "model", "created": created, "owned_by": "PULSE-ECG"}


class Completion:
    """One completion: as one object, and as chunks."""

    def __init__(self, request_id: str, model: str, asked: ChatRequest) -> None:
        self._id, self._model, self._asked = f"chatcmpl-{request_id}", model, asked
        self._created = int(time.time())

    def whole(self, outcomes: list[Outcome]) -> JSONResponse:
        """The completion, or the error in its place."""
        [outcome] = outcomes
        if outcome.error is not None:
            status = openai_status(outcome.error)
            return JSONResponse(openai_error(outcome.error), status, retry_headers(status))
        record = outcome.record
        message = {"role": "assistant", "content": record["generated_text"], "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(record)}
        completion = self._object("chat.completion", [choice]) | {"usage": _usage(record)}
        return JSONResponse(completion | self._commentary(record))

    # --- in chunks

    def news(self, news: News) -> bytes:
        """Some chunks for each piece of news, and the end after the last."""
        if isinstance(news, Started):
            return self._chunk({"role": "assistant", "content": "", "refusal": None})
        if isinstance(news, TextPiece):
            return self._chunk({"content": news.text})
        if isinstance(news, Answered):
            last = self._chunk({}, _finish_reason(news.record))
            return last + self._usage_chunk(news.record)
        [outcome] = news.outcomes
        if outcome.error is not None:
            return self.failed(outcome.error)
        added = self._commentary(outcome.record)
        chunk = event(self._object("chat.completion.chunk", []) | added) if added else b""
        return chunk + event("[DONE]")

    def failed(self, error: PulseError) -> bytes:
        """The error in a chunk's place, as OpenAI's clients know it."""
        return event(openai_error(error))

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._asked.include_usage else {}
        return event(self._object("chat.completion.chunk", [choice]) | usage)

    def _usage_chunk(self, record: Record) -> bytes:
        if not self._asked.include_usage:
            return b""
        return event(self._object("chat.completion.chunk", []) | {"usage": _usage(record)})

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
            "choices": choices,
        }

    def _commentary(self, record: Record) -> dict[str, Any]:
        """Our extension: the commentary's fields under one name."""
        if not self._asked.commentary:
            return {}
        return {"turkish_commentary": {name: record[name] for name in _COMMENTARY_FIELDS if name in record}}


def _finish_reason(record: Record) -> str:
    return _FINISH_REASONS[record["details"]["finish_reason"]]


def _usage(record: Record) -> dict[str, int]:
    details = record["details"]
    prompt, answer = details["prompt_tokens"], details["generated_tokens"]
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
