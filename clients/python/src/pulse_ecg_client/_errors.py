"""Every error that a call can end with.

::

    PULSEError
    ├── ImageError                 the image cannot be sent (also a ValueError)
    ├── EndpointConnectionError    no connection, or one that broke
    ├── DeadlineError              not answered within ``timeout`` (also a TimeoutError)
    ├── ReplyError                 the reply is not one that this protocol knows
    └── StatusError                any other HTTP status than 200
        ├── AuthenticationError    401, 403
        ├── RequestRefusedError    400, 413, 422 and other 4xx
        ├── BusyError              429
        ├── UnavailableError       502, 503
        └── ServerError            500, 504 and other 5xx

No message, text or repr holds the token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from pulse_ecg_client._types import Record

_EXCERPT = 500


class PULSEError(Exception):
    """Base of the tree.

    Attributes:
        status: the HTTP status, or None where no reply came.
        text: the reply's body, as text.
        records: the records of the body, where it held any; a batch whose items all failed has one for each.
        request_id: the server's name for the request in its logs, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        text: str = "",
        records: Sequence[Record] = (),
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.text = text
        self.records = list(records)
        self.request_id = request_id


class ImageError(PULSEError, ValueError):
    """The image cannot be sent: empty, too large, or of a type that is no image."""


class EndpointConnectionError(PULSEError):
    """No connection to the endpoint, or one that broke before the reply was complete."""


class DeadlineError(PULSEError, TimeoutError):
    """The call was not answered within its ``timeout``, retries included."""


class ReplyError(PULSEError):
    """The reply is not one that this protocol knows, or it ended early."""


class StatusError(PULSEError):
    """The endpoint answered with another status than 200."""


class AuthenticationError(StatusError):
    """The token is missing, wrong, or not allowed here."""


class RequestRefusedError(StatusError):
    """The request must be changed; the message says how."""


class BusyError(StatusError):
    """Too many requests wait; try again later."""


class UnavailableError(StatusError):
    """The endpoint sleeps, starts, or has no replica."""


class ServerError(StatusError):
    """A fault of the endpoint's, or it ran out of time."""


def status_error(status: int, text: str, *, request_id: str | None = None) -> StatusError:
    """The error of a reply with this status and body."""
    records = _records(text)
    message = f"HTTP {status}: {_explanation(text)}"
    return _kind(status)(message, status=status, text=text, records=records, request_id=request_id)


def _kind(status: int) -> type[StatusError]:
    kinds = {401: AuthenticationError, 403: AuthenticationError, 429: BusyError}
    kinds |= {502: UnavailableError, 503: UnavailableError}
    if status in kinds:
        return kinds[status]
    return ServerError if status >= 500 else RequestRefusedError if status >= 400 else StatusError


def _records(text: str) -> list[Record]:
    try:
        document = json.loads(text)
    except ValueError:
        return []
    return document if isinstance(document, list) and all(isinstance(item, dict) for item in document) else []


def _explanation(text: str) -> str:
    """What a body says in words: the field ``error`` of a record or object, else the beginning of the text."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    first = document[0] if isinstance(document, list) and document else document
    said = first.get("error") if isinstance(first, dict) else None
    words = " ".join((said if isinstance(said, str) else text).split())
    return words if len(words) <= _EXCERPT else words[: _EXCERPT - 1] + "…"
