"""From the English answer to a checked Turkish commentary, within one deadline."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError

from commentary.faithfulness import check
from commentary.loop import LoopThread
from commentary.privacy import mask
from commentary.prompt import messages
from commentary.record import Commentary, Finding
from commentary.reply import Reply, ServiceError
from commentary.text import clean
from pulse_ecg.cancellation import Cancellation
from pulse_ecg.config import Settings

_MISSING = ""
try:  # with the other libraries, before the start: it takes most of a second
    from commentary import service
except Exception as error:  # noqa: BLE001 - a foreign package's fault must not stop the endpoint's start
    _MISSING = (error.name if isinstance(error, ImportError) else None) or f"openai ({type(error).__name__})"

logger = logging.getLogger(__name__)

_TOO_LATE = "The commentary service did not answer in time."
_HUNG_UP = "The caller hung up before the commentary came."
_GRACE_S = 0.25  # what the calling thread grants the loop to report its own time-out


class DeepSeekClient:
    """Turkish commentary from any OpenAI-compatible service.  Thread-safe; connections are kept between calls.

    ``settings`` are read from the environment when not given.  Raises :class:`ImportError` where the ``openai``
    package cannot be loaded or set up (its proxy or certificate variables may be unusable), whatever it raises
    itself: the host then records :meth:`Commentary.unavailable`.
    """

    def __init__(self, settings: Settings | None = None, *, max_retries: int = 3, max_tokens: int = 2048) -> None:
        settings = settings or Settings.from_env()
        self.model = settings.commentary_model
        self._loop = LoopThread("commentary")
        self._service: service.ChatService | None = None
        self._refused_key = False
        key = settings.commentary_key
        if key:
            self._refused_key = not (key.isascii() and key.isprintable() and " " not in key)
        if _MISSING:
            raise ImportError("The openai package could not be loaded.", name=_MISSING)
        try:
            if key and not self._refused_key:
                self._service = service.ChatService(
                    api_key=key,
                    base_url=settings.commentary_base_url,
                    model=self.model,
                    max_retries=max_retries,
                    max_tokens=max_tokens,
                )
        except Exception as error:  # noqa: BLE001 - a foreign package's start must not stop the endpoint's
            missing = error.name if isinstance(error, ImportError) else None
            raise ImportError(
                "The openai package could not be set up.", name=missing or f"openai ({type(error).__name__})"
            ) from None

    def __repr__(self) -> str:
        return f"DeepSeekClient(model={self.model!r})"

    def comment(self, english_text: str, *, timeout_s: float, cancel: Cancellation | None = None) -> Commentary:
        """The commentary on one answer; returns within ``timeout_s``, retries included, and never raises.

        Once ``cancel`` is set it returns at once, and the service is no longer waited for.
        """
        return self.comment_all([english_text], timeout_s=timeout_s, cancel=cancel)[0]

    def comment_all(
        self, english_texts: Sequence[str], *, timeout_s: float, cancel: Cancellation | None = None
    ) -> list[Commentary]:
        """The commentaries on a batch, in order, asked side by side under one deadline."""
        started = time.monotonic()
        outcomes = self._comment_all(list(english_texts), timeout_s, cancel)
        for outcome in outcomes:
            logger.info(
                "commentary: status=%s model=%s tokens=%d rules=%s seconds=%.2f",
                outcome.status,
                outcome.model,
                outcome.tokens,
                ",".join(sorted({finding.rule for finding in outcome.warnings})) or "-",
                time.monotonic() - started,
            )
        return outcomes

    def close(self) -> None:
        """Close the connections and stop the background thread."""
        if self._service is not None:
            try:
                self._loop.run(self._service.aclose(), timeout_s=2)
            except TimeoutError:
                logger.warning("commentary: the connections did not close in time")
        self._loop.close()

    def _comment_all(self, texts: list[str], timeout_s: float, cancel: Cancellation | None) -> list[Commentary]:
        if self._service is None or not any(text.strip() for text in texts):
            return [self._without_service(text) for text in texts]
        try:
            return self._loop.run(self._gather(texts, timeout_s), timeout_s=timeout_s + _GRACE_S, cancel=cancel)
        except TimeoutError:
            return [self._failed(_TOO_LATE) for _ in texts]
        except CancelledError:
            return [self._failed(_HUNG_UP) for _ in texts]
        except Exception as error:  # noqa: BLE001 - the boundary: a commentary never takes the English answer with it
            return [self._unexpected(error) for _ in texts]

    async def _gather(self, texts: list[str], timeout_s: float) -> list[Commentary]:
        deadline = time.monotonic() + timeout_s
        return list(await asyncio.gather(*(self._within(text, deadline) for text in texts)))

    async def _within(self, text: str, deadline: float) -> Commentary:
        if not text.strip():
            return self._without_service(text)
        try:
            return await self._ask_and_check(mask(clean(text)), deadline)
        except Exception as error:  # noqa: BLE001 - the same boundary, so that one of a batch does not take the others with it
            return self._unexpected(error)

    async def _ask_and_check(self, english: str, deadline: float) -> Commentary:
        """Ask; where the check finds something critical, ask once more and judge that answer alone."""
        assert self._service is not None
        findings: tuple[Finding, ...] = ()
        reply: Reply | None = None
        spent = 0
        for objections in (False, True):
            try:
                question = messages(english, findings if objections else ())
                reply = await self._ask_in_time(question, deadline, answered=objections)
            except ServiceError as error:
                return self._failed(str(error), reply, findings, spent)
            spent += reply.tokens
            findings = check(english, reply.text, cut_off=reply.cut_off)
            critical = [finding for finding in findings if finding.severity == "critical"]
            if not critical:
                return Commentary("success", reply.text, reply.model, reply.tokens, "", findings, spent)
            logger.info("commentary: refused by %s", ",".join(sorted({finding.rule for finding in critical})))
        rules = ", ".join(sorted({finding.rule for finding in findings if finding.severity == "critical"}))
        return self._failed(f"The commentary departed from the English answer ({rules}).", reply, findings, spent)

    async def _ask_in_time(self, question: list[dict[str, str]], deadline: float, *, answered: bool) -> Reply:
        """The reply; out of time after a first answer, the reason names the answer's fault rather than the clock."""
        assert self._service is not None
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._service.ask(question, deadline=deadline)
        except TimeoutError:
            late = "The commentary departed from the English answer, and no time was left to ask again."
            raise ServiceError(late if answered else _TOO_LATE) from None

    def _without_service(self, text: str) -> Commentary:
        if not text.strip():
            return Commentary("no_text", model=self.model)
        if self._refused_key:
            return self._failed("The commentary key holds characters that no key has.")
        return Commentary("api_key_missing", model=self.model)

    def _unexpected(self, error: Exception) -> Commentary:
        """A fault of ours; only its type is logged, since its message may hold the key or the text."""
        logger.error("commentary: unexpected %s", type(error).__name__)
        return self._failed("The commentary could not be made.")

    def _failed(
        self, reason: str, reply: Reply | None = None, findings: tuple[Finding, ...] = (), spent: int = 0
    ) -> Commentary:
        model, tokens = (reply.model, reply.tokens) if reply else (self.model, 0)
        return Commentary("failed", "", model, tokens, reason, findings, spent)
