"""The client for asyncio; `_blocking` wraps it for everybody else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

import httpx2

from pulse_ecg_client._body import checked, encoded, image_parameters, text_parameters
from pulse_ecg_client._connection import Connection, Deadline
from pulse_ecg_client._errors import ReplyError
from pulse_ecg_client._images import check_url
from pulse_ecg_client._reply import EventDecoder, parsed, refusal, stream_event, whole_answer
from pulse_ecg_client._types import (
    CommonParameters,
    Image,
    Input,
    Parameters,
    Record,
    RecordEvent,
    StreamEvent,
)

logger = logging.getLogger("pulse_ecg_client")

# Enough for an endpoint that sleeps: its replica loads 14 GB before it answers.
DEFAULT_TIMEOUT_S = 600.0


class AsyncPULSEEndpoint:
    """One endpoint, in the stock container or on our own server.  Use it in one event loop, and close it.

    Every method takes ``timeout``, the seconds that the call may take in all: waking, retries, the answer and its
    commentary.  Every method raises the errors of the tree under :class:`PULSEError`, OSError for an image file that
    cannot be read, and TypeError for a name that is no parameter.
    """

    def __init__(
        self,
        endpoint_url: str,
        hf_token: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            endpoint_url: where requests are posted to.
            hf_token: the bearer token; None for a server that wants none.
            timeout: seconds for each call in all, unless the call says otherwise.
            transport: an httpx2 transport, where certificates or a proxy of one's own are needed.

        Raises:
            ValueError: a URL, token or timeout that cannot be used.
        """
        self._connection = Connection(endpoint_url, hf_token, transport)
        self._timeout = _checked_timeout(timeout)
        self._streams = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.origin!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._connection.aclose()

    async def analyze_text(
        self,
        text: str,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        enable_turkish_commentary: bool = True,
        *,
        timeout: float | None = None,
        **more: Unpack[CommonParameters],
    ) -> Record:
        """The answer to a question without an image."""
        parameters = text_parameters(max_new_tokens, temperature, enable_turkish_commentary, more)
        return (await self._records(text, parameters, timeout))[0]

    async def analyze_image_url(
        self,
        image_url: str,
        query: str,
        max_new_tokens: int = 512,
        temperature: float = 0.2,
        enable_turkish_commentary: bool = True,
        *,
        timeout: float | None = None,
        **more: Unpack[CommonParameters],
    ) -> Record:
        """The answer to a question about an image that the endpoint fetches.

        Raises:
            ImageError: ``image_url`` is no URL; files are for :meth:`analyze_image_base64`.
        """
        check_url(image_url)
        parameters = image_parameters(max_new_tokens, temperature, enable_turkish_commentary, more)
        return (await self._records({"query": query, "image": image_url}, parameters, timeout))[0]

    async def analyze_image_base64(
        self,
        image_path: Image,
        query: str,
        max_new_tokens: int = 512,
        temperature: float = 0.2,
        enable_turkish_commentary: bool = True,
        *,
        timeout: float | None = None,
        **more: Unpack[CommonParameters],
    ) -> Record:
        """The answer to a question about an image of yours: a path, bytes, a data URI or a Pillow image."""
        parameters = image_parameters(max_new_tokens, temperature, enable_turkish_commentary, more)
        return (await self._records({"query": query, "image": image_path}, parameters, timeout))[0]

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        timeout: float | None = None,
        **parameters: Unpack[Parameters],
    ) -> Record:
        """The answer to a conversation; parameters that are not given have the endpoint's defaults."""
        return (await self._records({"messages": messages}, parameters, timeout))[0]

    async def analyze_batch(
        self, inputs: Sequence[Input], *, timeout: float | None = None, **parameters: Unpack[Parameters]
    ) -> list[Record]:
        """One record for each input, in order; an input that fails has an error record.

        Where every input failed, our own server says so with its status: then this raises, and the error's
        ``records`` are theirs.
        """
        if isinstance(inputs, str):
            raise TypeError("analyze_batch takes a list of inputs, not a string.")
        return await self._records(list(inputs), parameters, timeout)

    def stream(
        self, inputs: Input, *, timeout: float | None = None, **parameters: Unpack[Parameters]
    ) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is made: its start, its text in pieces, the answer, the whole record.

        The stock container cannot stream.  It is then asked once more, without streaming, and the whole answer comes
        as one piece of text, between the same events.  An error record, which the other methods return, is raised.
        """
        return self._stream(inputs, checked(parameters), self._seconds(timeout))

    async def _stream(
        self, inputs: Input, parameters: dict[str, object], timeout_s: float
    ) -> AsyncGenerator[StreamEvent, None]:
        deadline = Deadline(timeout_s)
        record: Record | None = None
        if self._streams:
            response = await self._post(inputs, parameters, deadline, stream=True)
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                async with aclosing(self._events(response, deadline)) as events:
                    async for event in events:
                        yield event
                return
            # No stream, so the host knows none.  Ours refuses the unknown key there; another may just have answered.
            logger.info("%s does not stream; the answer comes as a whole.", self._connection.origin)
            record = (await self._read(response, deadline))[0]
        if record is None or "error" in record:
            response = await self._post(inputs, parameters, deadline)
            record = (await self._read(response, deadline))[0]
        if "error" in record:
            raise refusal(record)
        self._streams = False
        for event in whole_answer(record):
            yield event

    async def _events(self, response: httpx2.Response, deadline: Deadline) -> AsyncGenerator[StreamEvent, None]:
        decoder, request_id = EventDecoder(), response.headers.get("x-request-id")
        async with aclosing(self._connection.pieces(response, deadline)) as pieces:
            async for piece in pieces:
                for received in decoder.feed(piece):
                    if (event := stream_event(received, request_id)) is not None:
                        yield event
                    if isinstance(event, RecordEvent):
                        return
        raise ReplyError("The stream ended before the answer was complete.", status=200)

    async def _records(
        self, inputs: Input | Sequence[Input], parameters: Parameters, timeout: float | None
    ) -> list[Record]:
        deadline = Deadline(self._seconds(timeout))
        response = await self._post(inputs, checked(parameters), deadline)
        count = len(inputs) if isinstance(inputs, list) else 1
        return await self._read(response, deadline, count)

    async def _post(
        self,
        inputs: Input | Sequence[Input],
        parameters: dict[str, object],
        deadline: Deadline,
        *,
        stream: bool = False,
    ) -> httpx2.Response:
        body = await asyncio.to_thread(partial(encoded, inputs, parameters, stream=stream))
        return await self._connection.post(body, deadline)

    async def _read(self, response: httpx2.Response, deadline: Deadline, count: int = 1) -> list[Record]:
        text = await self._connection.text(response, deadline)
        return parsed(text, shown=self._connection.safe(text), count=count)

    def _seconds(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else _checked_timeout(timeout)


def _checked_timeout(seconds: float) -> float:
    if not 0 < seconds < float("inf"):
        raise ValueError(f"The timeout is {seconds!r}; it must be a positive number of seconds.")
    return float(seconds)
