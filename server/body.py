"""A request's body: read within bounds of size, time and memory, and parsed within bounds of structure."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from itertools import chain
from typing import Any, NoReturn

from starlette.requests import Request

from pulse_ecg.errors import PayloadTooLargeError, QueueFullError, RequestError, excerpt
from server.errors import BodyTimeoutError, DisconnectedError

MAX_BODY_BYTES = 32_000_000
MAX_BUFFERED_BYTES = 32 * MAX_BODY_BYTES
SMALL_BODY_BYTES = 65_536
# Brackets and commas, also those in strings.  Empty lists and objects take twenty times their text in memory and
# seconds of parsing, during which nothing else runs; no prompt that the model could read has as many commas.
_MAX_STRUCTURE = 200_000
# Of a number; a 64-bit one has twenty.  Longer ones take seconds to convert where there are many.
_MAX_DIGITS = 64


class BodyBudget:
    """Bytes of all large bodies that are being received, waited with or worked on.  Belongs to the event loop."""

    def __init__(self, limit: int = MAX_BUFFERED_BYTES) -> None:
        self._left = limit

    def lease(self) -> BodyLease:
        """A share that grows with the body."""
        return BodyLease(self)

    def take(self, size: int) -> None:
        """For one body; errors as of :meth:`BodyLease.grow`."""
        if size > self._left:
            raise QueueFullError("Too many large requests are being received or worked on; try again in a few seconds.")
        self._left -= size

    def give_back(self, size: int) -> None:
        """For the next."""
        self._left += size


class BodyLease:
    """What one body has taken of the budget.  A small one takes nothing: a question does not wait behind images."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget, self._size, self._taken = budget, 0, 0

    def grow(self, size: int) -> None:
        """Make room for so many bytes more.

        Raises:
            QueueFullError: there is none.
        """
        self._size += size
        if self._size > SMALL_BODY_BYTES:
            more = self._size - self._taken
            self._budget.take(more)
            self._taken += more

    def cover(self, size: int) -> None:
        """Make room for so many bytes in all, if there is less; errors as of :meth:`grow`."""
        self.grow(max(0, size - self._size))

    def release(self) -> None:
        """Give everything back; once is enough."""
        self._budget.give_back(self._taken)
        self._taken = 0


async def read_body(request: Request, lease: BodyLease, *, timeout: float) -> bytes:
    """The whole body.

    Raises:
        RequestError: it is compressed, or its length is stated in two ways (RFC 9112 section 6.1: a smuggled request).
        PayloadTooLargeError: its header says that it is too large, before a byte is read, or it turns out to be.
        BodyTimeoutError: it did not arrive in ``timeout`` seconds.
        QueueFullError: the memory for bodies is taken.
        DisconnectedError: the caller left.
    """
    if "content-length" in request.headers and "transfer-encoding" in request.headers:
        raise RequestError("The request has a Content-Length and a Transfer-Encoding; send one of them.")
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) not in ("identity", ""):
        raise RequestError(f"The body has the Content-Encoding {excerpt(coding)}; send it as it is.")
    too_large = PayloadTooLargeError(f"The body has more than {MAX_BODY_BYTES:,} bytes, the most that is accepted.")
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        raise too_large
    chunks, size = list[bytes](), 0
    try:
        async with asyncio.timeout(timeout):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise DisconnectedError
                chunk: bytes = message.get("body", b"")
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    raise too_large
                lease.grow(len(chunk))
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise BodyTimeoutError(f"The body did not arrive within {timeout:g} seconds.") from None


def parse_json(body: bytes) -> Any:
    """The JSON value in a body (RFC 8259: UTF-8, no NaN; no key twice, of which readers take one or the other).

    Raises:
        RequestError: it is none; the message quotes nothing of it.
    """
    if not body.strip():
        raise RequestError('The body is empty; send a JSON object such as {"inputs": "What is a delta wave?"}.')
    if sum(map(body.count, (b"[", b"{", b","))) > _MAX_STRUCTURE:
        raise RequestError("The body has too many lists, objects and values.")
    try:
        return json.loads(
            body.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_int=lambda digits: int(_short(digits)),
            parse_float=lambda digits: float(_short(digits)),
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError:
        raise RequestError("The body is not valid UTF-8.") from None
    except RecursionError:
        raise RequestError("The body is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"The body is no valid JSON (line {error.lineno}, column {error.colno}).") from None


def size_in_memory(value: Any) -> int:
    """Bytes that a parsed body takes: one emoji, even in escapes, makes the string that has it four times as large."""
    size, level = 0, [value]
    while level:
        size += sum(map(sys.getsizeof, level))
        groups = [item for item in level if isinstance(item, dict | list)]
        level = [*chain.from_iterable(groups), *chain.from_iterable(g.values() for g in groups if isinstance(g, dict))]
    return size


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        [(doubled, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise RequestError(f"The body has the key {excerpt(doubled)} twice in one object.")
    return made


def _short(digits: str) -> str:
    if len(digits) > _MAX_DIGITS:
        raise RequestError("The body holds a number that is too long.")
    return digits


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"The body holds {name}, which is no JSON value.")


def media_type(request: Request) -> str:
    """The body's type without its parameters, in lower case; empty where there is no header."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
