"""One question to an OpenAI-compatible chat service: retries, back-off and errors that are safe to show."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import random
import re
import time
from typing import Any
from urllib.parse import urlsplit

import openai

from commentary.reply import Reply, ServiceError
from commentary.text import clean
from commentary.transport import BodyRefusedError, http_client, httpx

logger = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset({408, 409, 429})
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 8.0
_CUT_OFF = "length"
_THOUGHTS = re.compile(r"\A\s*<think>.*?(</think>|\Z)", re.DOTALL)


class ChatService:
    """Asks one model of one service.  Every method belongs to one event loop; connections are kept between calls."""

    def __init__(self, *, api_key: str, base_url: str, model: str, max_retries: int, max_tokens: int) -> None:
        self._client = openai.AsyncOpenAI(
            api_key=api_key, base_url=base_url, max_retries=0, timeout=None, http_client=http_client()
        )
        self._completions = self._client.chat.completions  # loads the types now rather than inside a deadline
        self._model = model
        self._max_retries = max_retries
        self._options: dict[str, Any] = {"temperature": 0.2, "max_tokens": max_tokens}
        if _thinks_by_default(base_url, model):
            self._options["thinking"] = {"type": "disabled"}

    async def aclose(self) -> None:
        await self._client.close()

    async def ask(self, messages: list[dict[str, str]], *, deadline: float) -> Reply:
        """The answer, after as many retries as ``max_retries`` and ``deadline`` (``time.monotonic``) leave room for.

        Raises:
            ServiceError: no answer came, and trying again is pointless or would be too late.
        """
        retries = 0
        while True:
            try:
                return await self._ask_once(messages)
            except ServiceError as error:
                wait_s = _backoff_s(retries) if error.retry_after_s is None else error.retry_after_s
                if not error.retryable or retries >= self._max_retries or time.monotonic() + wait_s >= deadline:
                    raise
                retries += 1
                logger.info("commentary: %s Retry %d in %.2f s.", error, retries, wait_s)
            await asyncio.sleep(wait_s)

    async def _ask_once(self, messages: list[dict[str, str]]) -> Reply:
        options = self._options
        while True:
            try:
                async with self._completions.with_streaming_response.create(
                    model=self._model,
                    messages=messages,  # type: ignore[arg-type]  # plain dicts of role and content
                    extra_body=dict(options),
                ) as response:
                    body = await response.read()
                self._options = options  # only now is it sure that those left out were the reason
                return _reply(body, self._model)
            except openai.APIStatusError as error:
                rejected = _rejected_options(error, options)
                if not rejected:
                    raise _status_error(error.response) from None
                options = {name: value for name, value in options.items() if name not in rejected}
            except (openai.APIConnectionError, httpx.TransportError, BodyRefusedError) as error:
                if isinstance(error, BodyRefusedError) or isinstance(error.__cause__, BodyRefusedError):
                    raise ServiceError("The commentary service sent more than an answer can hold.") from None
                raise ServiceError("The commentary service could not be reached.", retryable=True) from None


def _thinks_by_default(base_url: str, model: str) -> bool:
    """DeepSeek's models think unless told not to; other services may refuse a field that they do not know."""
    host = urlsplit(base_url).hostname or ""
    return host == "deepseek.com" or host.endswith(".deepseek.com") or "deepseek" in model.lower()


def _rejected_options(error: openai.APIStatusError, options: dict[str, Any]) -> set[str]:
    """Optional fields that a 400 or 422 names: the service does not know them, and the question stands without."""
    if error.status_code not in (400, 422):
        return set()
    said = error.response.text
    return {name for name in options if name in said}


def _reply(body: bytes, configured_model: str) -> Reply:
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise ServiceError("The commentary service sent something that is no chat answer.") from None
    if refusal or choice.get("finish_reason") == "content_filter":
        raise ServiceError("The commentary service declined to answer.")
    text = clean(_THOUGHTS.sub("", text, count=1)).strip() if isinstance(text, str) else ""
    if not text:
        raise ServiceError("The commentary service sent an empty answer.")
    usage = answer.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    name = answer.get("model")
    named = isinstance(name, str) and name.strip() and name.isprintable() and len(name) <= 200
    return Reply(
        text=text,
        model=name.strip() if named else configured_model,
        tokens=tokens if type(tokens) is int and 0 <= tokens < 2**53 else 0,
        cut_off=choice.get("finish_reason") == _CUT_OFF,
    )


def _backoff_s(retries: int) -> float:
    """Exponential, with jitter so that clients that failed together do not return together."""
    return float(min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2**retries) * random.uniform(0.5, 1.0))  # noqa: S311 - no secret


def _status_error(response: httpx.Response) -> ServiceError:
    status = response.status_code
    reason = {
        400: "did not accept the request",
        401: "did not accept the key",
        402: "has no balance left for the key",
        403: "did not accept the key",
        404: "does not know the model or the address",
        408: "timed out",
        409: "reported a conflict",
        422: "did not accept the request",
        429: "is busy",
    }.get(status, "has a fault" if status >= 500 else "did not answer")
    retryable = status in RETRIED_STATUSES or status >= 500
    return ServiceError(
        f"The commentary service {reason} (HTTP {status}).",
        retryable=retryable,
        retry_after_s=_retry_after_s(response.headers) if retryable else None,
    )


def _retry_after_s(headers: httpx.Headers) -> float | None:
    """Seconds that the service asks to wait (RFC 9110, 10.2.3: a number or a date), or None."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value, re.ASCII):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError, IndexError):
        return None
