"""``POST /`` and ``POST /predict``: the endpoint's own contract, with HTTP statuses and Server-Sent Events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from pulse_ecg.call import Answered, Outcome, Started, TextPiece, error_outcome
from pulse_ecg.errors import PulseError, RequestError, excerpt
from server.answering import Answering
from server.body import media_type, parse_json
from server.errors import retry_headers
from server.jobs import Finished, News
from server.sse import event

_BOOLEANS = {True: True, False: False, None: False, "true": True, "false": False}


@dataclass(frozen=True)
class NativeRequest:
    """The handler's ``data``, and whether the answer is wanted as it grows."""

    data: Any = field(repr=False)
    stream: bool


async def predict(request: Request) -> ASGIApp:
    """The records of one body, or the stream of one record."""
    with Answering(request) as answering:
        asked = native_request(request, await answering.body())
        job = answering.start(asked.data, stream=asked.stream)
        if not asked.stream:
            return _records(await job.outcomes())
        first = await job.take()
        if isinstance(first[0], Finished):  # it came to nothing before the model was asked
            return _records(first[0].outcomes)
        return answering.stream(job, first, NativeEvents(answering.request_id, answering.model))


def native_request(request: Request, body: bytes) -> NativeRequest:
    """A body of either kind.

    Raises:
        RequestError: it is of neither, a parameter stands in the URL twice, or a stream of several inputs is asked for.
    """
    query, kind = _query(request), media_type(request)
    if kind.startswith("image/"):
        stream = query.pop("stream", None)
        data: Any = {"inputs": {"image": body}}
    elif kind == "application/json":
        data = parse_json(body)
        stream = data.pop("stream", None) if isinstance(data, dict) else None
        if isinstance(data, dict):
            data.pop("options", None)  # without effect in the contract: it need not be kept
    else:
        raise RequestError(f"The Content-Type is {excerpt(kind)}; accepted: application/json and image types.")
    if not isinstance(stream, bool | str | None) or stream not in _BOOLEANS:
        raise RequestError(f"'stream' is {excerpt(stream)}; accepted: true or false.")
    if query and isinstance(data, dict) and data.get("parameters") is None:
        data["parameters"] = query  # as the stock container does
    if _BOOLEANS[stream]:
        inputs = data.get("inputs") if isinstance(data, Mapping) else None
        if isinstance(inputs, list) and len(inputs) != 1:
            raise RequestError(f"A stream has one input; 'inputs' has {len(inputs)}. Leave 'stream' out for a batch.")
    return NativeRequest(data, _BOOLEANS[stream])


def _query(request: Request) -> dict[str, str]:
    given = request.query_params.multi_items()
    query = dict(given)
    if len(query) < len(given):
        raise RequestError("The URL has the same parameter twice; send it once.")
    return query


def _records(outcomes: list[Outcome]) -> JSONResponse:
    """200 as soon as one input was answered, else the highest of the statuses."""
    statuses = [outcome.status for outcome in outcomes]
    status = 200 if 200 in statuses else max(statuses)
    if status == 429:  # the request as a whole, whatever its number of inputs
        del outcomes[1:]
    return JSONResponse([outcome.record for outcome in outcomes], status, retry_headers(status))


class NativeEvents:
    """``start``, ``text``, ``answer`` and ``record`` or ``error``."""

    def __init__(self, request_id: str, model: str) -> None:
        self._request_id, self._model = request_id, model

    def news(self, news: News) -> bytes:
        """One event for each."""
        if isinstance(news, Started):
            return event({"id": self._request_id, "model": news.model}, "start")
        if isinstance(news, TextPiece):
            return event({"text": news.text}, "text")
        if isinstance(news, Answered):
            return event(news.record, "answer")
        [outcome] = news.outcomes
        return event(outcome.record, "record") if outcome.error is None else self._error(outcome)

    def failed(self, error: PulseError) -> bytes:
        """The last event."""
        return self._error(error_outcome(error, self._model))

    def _error(self, outcome: Outcome) -> bytes:
        return event({**outcome.record, "status": outcome.status}, "error")
