"""What comes back with status 200: a list of records, or a stream of server-sent events."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from pulse_ecg_client._errors import ReplyError, RequestRefusedError, status_error
from pulse_ecg_client._types import AnswerEvent, Record, RecordEvent, StartEvent, StreamEvent, TextEvent

_COMMENTARY_FIELDS = frozenset(
    {
        "comment_text",
        "commentary_model",
        "commentary_tokens",
        "commentary_status",
        "commentary_error",
        "commentary_warnings",
    }
)


def parsed(text: str, *, shown: str, count: int = 1) -> list[Record]:
    """The records of a reply.

    Raises:
        RequestRefusedError: one error record instead of ``count`` records: the stock container refused the whole batch.
        ReplyError: something else, or another number of them than ``count``; its text is ``shown``.
    """
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, list) or not all(isinstance(item, dict) for item in document):
        message = "The reply is no list of records; is this the URL of a PULSE endpoint?"
        raise ReplyError(message, status=200, text=shown)
    if len(document) != count:
        if len(document) == 1 and "error" in document[0]:
            raise refusal(document[0])
        raise ReplyError(f"The reply has {len(document)} records instead of {count}.", status=200, text=shown)
    return document


def refusal(record: Record) -> RequestRefusedError:
    """The error of a request that was refused as a whole with status 200, as the stock container does."""
    return RequestRefusedError(str(record["error"]), status=200, text=json.dumps([record]), records=[record])


_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True)
class ServerSentEvent:
    """One event as it came; ``event`` is "message" where the server named none."""

    event: str
    data: str


class EventDecoder:
    """Server-sent events (WHATWG HTML, 9.2.6) out of a body's pieces; one may end anywhere, within a character too."""

    def __init__(self) -> None:
        self._rest, self._after_return = b"", False
        self._event, self._data = "", list[str]()

    def feed(self, piece: bytes) -> Iterator[ServerSentEvent]:
        """The events that ``piece`` completes.  What is left when the body ends is no event, as the standard has it."""
        if self._after_return and piece.startswith(b"\n"):  # the other half of a line's end
            piece, self._after_return = piece[1:], False
        if not piece:
            return
        self._after_return = piece.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + piece)
        for line in lines:
            if (event := self._take(line.decode("utf-8", "replace"))) is not None:
                yield event

    def _take(self, line: str) -> ServerSentEvent | None:
        if line:
            name, _, value = line.partition(":")  # a comment has an empty name
            value = value.removeprefix(" ")
            if name == "event":
                self._event = value
            elif name == "data":
                self._data.append(value)
            return None
        event, data = self._event, self._data
        self._event, self._data = "", []
        return ServerSentEvent(event or "message", "\n".join(data)) if data else None


def stream_event(received: ServerSentEvent, request_id: str | None = None) -> StreamEvent | None:
    """The protocol's event; None for one that a later version of the server may add.

    Raises:
        StatusError: the server's ``error`` event.
        ReplyError: data that is not what the event's name promises.
    """
    try:
        data = json.loads(received.data)
        return _known_event(received.event, data, request_id)
    except (ValueError, KeyError, TypeError):
        raise ReplyError(f"The stream holds a malformed event of the kind {received.event[:40]!r}.") from None


def _known_event(kind: str, data: dict[str, Any], request_id: str | None) -> StreamEvent | None:
    if kind == "start":
        return StartEvent(id=str(data["id"]), model=str(data["model"]))
    if kind == "text":
        return TextEvent(str(data["text"]))
    if kind == "answer":
        return AnswerEvent(cast(Record, dict(data)))
    if kind == "record":
        return RecordEvent(cast(Record, dict(data)))
    if kind == "error":
        status = int(data["status"])
        record = {name: value for name, value in data.items() if name != "status"}
        raise status_error(status, json.dumps([record], ensure_ascii=False), request_id=request_id)
    return None


def whole_answer(record: Record) -> Iterator[StreamEvent]:
    """The events of an answer that came in one piece."""
    yield StartEvent(id="", model=record.get("model", ""))
    if text := record.get("generated_text"):
        yield TextEvent(text)
    answer = {name: value for name, value in record.items() if name not in _COMMENTARY_FIELDS}
    yield AnswerEvent(cast(Record, answer))
    yield RecordEvent(record)
