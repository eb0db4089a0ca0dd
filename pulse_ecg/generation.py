"""Answers: what an engine is asked, what it gives token by token, and how callers read it.

There is one path.  :meth:`TextGenerator.stream` hands an :class:`Answer` to an :class:`Engine`, which pushes token ids
into it; :class:`AnswerStream` is the caller's end of the same answer, and :meth:`TextGenerator.generate` consumes it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pulse_ecg.anyres import ImageTiles, Size
from pulse_ecg.checkpoint_config import CheckpointConfig
from pulse_ecg.errors import DeadlineExceededError, PromptTooLongError
from pulse_ecg.params import GenerationParams
from pulse_ecg.text_stream import TextStream
from pulse_ecg.tokenizer import Tokenizer

FinishReason = Literal["stop", "eos", "length", "cancelled"]


@dataclass(frozen=True)
class ImagePrompt:
    """An image as the model takes it: its tiles, and the order in which their patches enter the prompt.

    ``key`` is a digest of the image's content.  One of ``tiles`` and ``embeddings`` is there: an image that an engine
    remembers comes with its embeddings ``(tokens, D)`` and needs no tiles.
    """

    key: str
    size: Size
    order: NDArray[np.int64] = field(repr=False)
    tiles: ImageTiles | None = field(repr=False)
    embeddings: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class EncodedPrompt:
    """What the model is asked: token ids, with the image's slot among them if there is an image."""

    ids: list[int] = field(repr=False)
    image: ImagePrompt | None = None

    @property
    def image_tokens(self) -> int:
        """Positions that the image takes."""
        return len(self.image.order) if self.image else 0

    @property
    def length(self) -> int:
        """Positions that the whole prompt takes."""
        return len(self.ids) + self.image_tokens - (1 if self.image else 0)


@dataclass(frozen=True)
class Step:
    """One token of an answer, the text that it lets through (often none), and why the answer ends, if it does."""

    token_id: int
    text: str = field(repr=False)
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Timings:
    """Seconds of an answer: ``queue`` for a slot, ``prefill`` until the first token, ``decode`` until the last."""

    queue: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Generation:
    """A finished answer: its text, its tokens (the end-of-sequence token included) and how it came about."""

    text: str = field(repr=False)
    token_ids: list[int] = field(repr=False)
    finish_reason: FinishReason
    seed: int | None
    timings: Timings


class Engine(Protocol):
    """What computes answers: many at once, each pushed its tokens until :meth:`Answer.push` or :meth:`Answer.over`."""

    def submit(self, answer: Answer) -> None:
        """Take an answer in hand and return at once; every answer is brought to an end exactly once."""

    def recall(self, image_key: str) -> ImagePrompt | None:
        """An image that was encoded lately, with its embeddings."""

    @property
    def alive(self) -> bool:
        """Whether it can still answer.  Once false it stays false, and the process is to be replaced."""

    def close(self) -> None:
        """End processes of its own: an abrupt exit would leave them behind.  Nothing is answered after that."""


class TextGenerator:
    """Generates answers with an engine.  Calls from several threads do not disturb each other."""

    def __init__(self, engine: Engine, config: CheckpointConfig, tokenizer: Tokenizer) -> None:
        """``config`` and ``tokenizer`` are those of the model that ``engine`` runs."""
        self.engine = engine
        self._config = config
        self._tokenizer = tokenizer

    def room(self, prompt: EncodedPrompt) -> int:
        """Positions that a prompt leaves for its answer.

        Raises:
            PromptTooLongError: none; the message says how many tokens there are.
        """
        context = self._config.context_length
        if prompt.length >= context:
            image = f" ({prompt.image_tokens:,} of them the image's)" if prompt.image else ""
            raise PromptTooLongError(
                f"The prompt has {prompt.length:,} tokens{image} and leaves no room for an answer: prompt, image and "
                f"answer share the model's {context:,} positions. Shorten the question."
            )
        return context - prompt.length

    def generate(
        self,
        prompt: EncodedPrompt,
        params: GenerationParams,
        *,
        cancel: Event | None = None,
        deadline: float | None = None,
    ) -> Generation:
        """The whole answer.  Errors: those of :meth:`stream`."""
        return collected(self.stream(prompt, params, cancel=cancel, deadline=deadline, whole=True))

    def stream(
        self,
        prompt: EncodedPrompt,
        params: GenerationParams,
        *,
        cancel: Event | None = None,
        deadline: float | None = None,
        whole: bool = False,
    ) -> AnswerStream:
        """The answer token by token; nothing is computed before the first token is asked for.

        Args:
            prompt: its length must leave at least one position.
            params: an answer is cut to the positions that are left.
            cancel: once set, the answer ends before the next token.
            deadline: a reading of ``time.monotonic()`` after which no further token is computed.
            whole: all tokens come at once, at the end; that costs the engine less.

        Raises:
            PromptTooLongError: the prompt leaves no position.
            OutOfMemoryError: while iterating; the device has no room for the request.
            DeadlineExceededError: while iterating; the deadline passed before the answer's end.
        """
        answer = Answer(
            prompt,
            params,
            limit=min(params.max_new_tokens, self.room(prompt)),
            text=TextStream(self._tokenizer, params.stop),
            eos_ids=self._config.eos_ids,
            cancel=cancel,
            deadline=deadline,
            whole=whole,
        )
        return AnswerStream(self.engine, answer)


def collected(stream: AnswerStream, tell: Callable[[str], object] | None = None) -> Generation:
    """The answer that a stream gives; ``tell`` hears each piece of its text, none empty.  Ends the stream."""
    text, token_ids = list[str](), list[int]()
    try:
        for step in stream:
            token_ids.append(step.token_id)
            if step.text:
                text.append(step.text)
                if tell is not None:
                    tell(step.text)
    finally:
        stream.close()
    return Generation("".join(text), token_ids, stream.finish_reason, stream.seed, stream.timings)


class Answer:
    """The engine's end of an answer: it is pushed tokens, settles where the answer ends, and tells its caller."""

    def __init__(
        self,
        prompt: EncodedPrompt,
        params: GenerationParams,
        *,
        limit: int,
        text: TextStream,
        eos_ids: frozenset[int],
        cancel: Event | None,
        deadline: float | None,
        whole: bool,
    ) -> None:
        """``limit`` is the most tokens that the answer may have; ``whole``: its caller waits for all of them."""
        self.prompt = prompt
        self.params = params
        self.limit = limit
        self.eos_ids = eos_ids
        # 32 bits, so that JSON readers with double precision alone (JavaScript) can send it back.
        self.seed = secrets.randbits(32) if params.seed is None and not params.greedy else params.seed
        self.finish_reason: FinishReason = "cancelled"
        self.timings = Timings()
        self._text = text
        self._caller_cancels = cancel
        self._deadline = deadline
        self.whole = whole
        self._given_up = False
        self._count = 0
        self._pending: list[Step] = []
        self._outbox: SimpleQueue[tuple[list[Step], Exception | None, bool]] = SimpleQueue()

    # --- the engine's side

    def push(self, token_id: int, timings: Timings) -> bool:
        """Add a token; returns whether the answer goes on after it."""
        self._count += 1
        step = self._step(token_id)
        self.timings = timings
        self._pending.append(step)
        if step.finish_reason:
            self._send(over=True)
        elif not self.whole:
            self._send(over=False)
        return step.finish_reason is None

    def over(self) -> bool:
        """Whether to compute nothing more for it: cancelled, out of time, or nobody waits.  The caller is told."""
        if self._given_up or self._cancelled():
            self._send(over=True)
            return True
        if self._deadline is not None and time.monotonic() > self._deadline:
            late = "The answer was not finished in time; ask for fewer tokens, or try again later."
            self.fail(DeadlineExceededError(late))
            return True
        return False

    def fail(self, error: Exception) -> None:
        """End the answer with an error, which its caller gets."""
        self._send(error, over=True)

    def _send(self, error: Exception | None = None, *, over: bool) -> None:
        steps, self._pending = self._pending, []
        self._outbox.put((steps, error, over))

    def _step(self, token_id: int) -> Step:
        """Turn a token into a step and settle whether the answer ends with it."""
        if token_id in self.eos_ids:
            return Step(token_id, self._text.finish(), "eos")
        shown = self._text.push(token_id)
        if self._text.stopped:
            return Step(token_id, shown, "stop")
        if self._count == self.limit:
            # What was held back can complete no stop string any more: it is shown.
            return Step(token_id, shown + self._text.finish(), "length")
        return Step(token_id, shown)

    # --- the caller's side

    def receive(self) -> Generator[Step, None, None]:
        """The steps as they come; blocks while there is none.  Cancelled, it ends though there be more."""
        over = False
        while not over:
            steps, error, over = self._outbox.get()
            for step in steps:
                if self._cancelled():
                    return
                self.finish_reason = step.finish_reason or self.finish_reason
                yield step
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # its traceback holds this frame, and all that it passed through

    def _cancelled(self) -> bool:
        return self._caller_cancels is not None and self._caller_cancels.is_set()

    def give_up(self) -> None:
        """Nobody will read on: the engine is to stop."""
        self._given_up = True


class AnswerStream:
    """An answer as it comes into being: iterate for :class:`Step`, then read how it ended.

    Dropping it, or :meth:`close`, ends the answer within a token.
    """

    def __init__(self, engine: Engine, answer: Answer) -> None:
        """The answer is handed to the engine when the first step is asked for."""
        self._answer = answer
        self._steps = _steps(engine, answer)

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    def close(self) -> None:
        """End the answer now and free what it holds on the device.  Any thread may do it."""
        self._answer.give_up()
        with suppress(ValueError):  # a thread is waiting for the next step right now: the engine tells it of the end
            self._steps.close()

    @property
    def seed(self) -> int | None:
        """What decided the draws; None for a greedy answer without one."""
        return self._answer.seed

    @property
    def finish_reason(self) -> FinishReason:
        """Why the answer ended; ``cancelled`` as long as it has not."""
        return self._answer.finish_reason

    @property
    def timings(self) -> Timings:
        """Seconds so far."""
        return self._answer.timings


def _steps(engine: Engine, answer: Answer) -> Generator[Step, None, None]:
    # No reference to the stream: it can be collected, and this generator with it, while the engine works.
    engine.submit(answer)
    try:
        yield from answer.receive()
    finally:
        answer.give_up()
