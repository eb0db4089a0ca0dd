"""The client for code without an event loop: :class:`AsyncPULSEEndpoint`, run in a thread of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, Unpack

import httpx2

from pulse_ecg_client._client import DEFAULT_TIMEOUT_S, AsyncPULSEEndpoint
from pulse_ecg_client._loop import LoopThread
from pulse_ecg_client._types import CommonParameters, Image, Input, Parameters, Record, StreamEvent


class PULSEEndpoint:
    """One endpoint, in the stock container or on our own server; :class:`AsyncPULSEEndpoint` has the details.

    Safe to share between threads, but not across a fork.  Close it, or use it in a ``with`` statement.
    """

    def __init__(
        self,
        endpoint_url: str,
        hf_token: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """As that of :class:`AsyncPULSEEndpoint`."""
        self._endpoint = AsyncPULSEEndpoint(endpoint_url, hf_token, timeout=timeout, transport=transport)
        self._loop = LoopThread(self._endpoint.aclose)

    def __repr__(self) -> str:
        return repr(self._endpoint).removeprefix("Async")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections and end the thread; calls of other threads that still wait fail with RuntimeError."""
        self._loop.close()

    def analyze_text(
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
        answer = self._endpoint.analyze_text(
            text, max_new_tokens, temperature, enable_turkish_commentary, timeout=timeout, **more
        )
        return self._loop.run(answer)

    def analyze_image_url(
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
        """The answer to a question about an image that the endpoint fetches."""
        answer = self._endpoint.analyze_image_url(
            image_url, query, max_new_tokens, temperature, enable_turkish_commentary, timeout=timeout, **more
        )
        return self._loop.run(answer)

    def analyze_image_base64(
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
        answer = self._endpoint.analyze_image_base64(
            image_path, query, max_new_tokens, temperature, enable_turkish_commentary, timeout=timeout, **more
        )
        return self._loop.run(answer)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        timeout: float | None = None,
        **parameters: Unpack[Parameters],
    ) -> Record:
        """The answer to a conversation; parameters that are not given have the endpoint's defaults."""
        return self._loop.run(self._endpoint.chat(messages, timeout=timeout, **parameters))

    def analyze_batch(
        self, inputs: Sequence[Input], *, timeout: float | None = None, **parameters: Unpack[Parameters]
    ) -> list[Record]:
        """One record for each input, in order, as :meth:`AsyncPULSEEndpoint.analyze_batch`."""
        return self._loop.run(self._endpoint.analyze_batch(inputs, timeout=timeout, **parameters))

    def stream(
        self, inputs: Input, *, timeout: float | None = None, **parameters: Unpack[Parameters]
    ) -> Generator[StreamEvent, None, None]:
        """The answer as it is made, as :meth:`AsyncPULSEEndpoint.stream`; closing the generator ends the request."""
        return self._drained(self._endpoint.stream(inputs, timeout=timeout, **parameters))

    def _drained(self, events: AsyncGenerator[StreamEvent, None]) -> Generator[StreamEvent, None, None]:
        try:
            while (event := self._loop.run(_next(events))) is not None:
                yield event
        finally:
            with suppress(RuntimeError):  # the endpoint is closed, and the stream with it
                self._loop.submit(_close(events))  # not waited for: this may run wherever garbage is collected


async def _next(events: AsyncGenerator[StreamEvent, None]) -> StreamEvent | None:
    return await anext(events, None)


async def _close(events: AsyncGenerator[StreamEvent, None]) -> None:
    await events.aclose()
