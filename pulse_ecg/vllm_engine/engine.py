"""Answers by vLLM: its processes decode, one thread here asks them, another one works the vision tower.

The asking thread runs an event loop with a task for each answer: encode the image, hand over the prompt, push tokens
as they come.  Which answers share a step, and where keys and values lie, is vLLM's business.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import signal
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import resource_tracker
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from pulse_ecg.checkpoint import LoadedModel
from pulse_ecg.device import NO_MEMORY_LEFT, Span, current, lost, out_of_memory
from pulse_ecg.engine.vision import ImageEncoder
from pulse_ecg.errors import EngineStoppedError, OutOfMemoryError
from pulse_ecg.generation import Answer, ImagePrompt, Timings
from pulse_ecg.vllm_engine.arguments import engine_config
from pulse_ecg.vllm_engine.prompts import prompt_input, sampling_params

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_SECONDS = 0.1  # how often answers that vLLM says nothing about are asked whether anybody still wants them
_STOPPED = "The engine has stopped; the server has to be restarted."


@dataclass(eq=False)
class _Request:
    """An answer at work.  Whoever ends it does so through here, and once."""

    answer: Answer
    asked: float = field(default_factory=time.perf_counter)
    began: float = 0.0
    vision: float = 0.0
    first_token: float | None = None
    ended: bool = False
    task: asyncio.Task[None] | None = None

    def push(self, token_ids: list[int]) -> bool:
        """Add tokens that have arrived; returns whether the answer goes on after them."""
        now = time.perf_counter()
        self.first_token = self.first_token or now
        # What vLLM lets an answer wait counts as prefill.
        prefill = self.first_token - self.began - self.vision
        timings = Timings(self.began - self.asked, self.vision, prefill, now - self.first_token)
        self.ended = not all(self.answer.push(token_id, timings) for token_id in token_ids)
        return not self.ended

    def over(self) -> bool:
        """Whether it has ended, or does so now, since nobody waits for it or its time is over."""
        self.ended = self.ended or self.answer.over()
        return self.ended

    def fail(self, error: Exception) -> None:
        """End it with an error, if it has not ended."""
        if not self.ended:
            self.ended = True
            self.answer.fail(error)


class VllmEngine:
    """Answers many prompts at once by vLLM.  Implements :class:`pulse_ecg.generation.Engine`."""

    def __init__(self, model: LoadedModel, given: Mapping[str, Any], *, max_answers: int = 8) -> None:
        """Start vLLM's processes and wait until they have loaded the language model.

        Args:
            model: loaded without its decoder; its folder is read by vLLM, on each machine that takes part.
            given: vLLM's engine arguments as the operator wants them.
            max_answers: how many there are at once, unless ``given`` says so.

        Raises:
            ConfigurationError: an argument cannot be used.
            EngineStoppedError: vLLM did not start.
        """
        config = engine_config(model, given, max_answers=max_answers)
        self._model = model
        self._encoder = ImageEncoder(model)
        self._tower = ThreadPoolExecutor(1, thread_name_prefix="pulse-vision")
        self._requests: set[_Request] = set()
        self._numbers = count(1)
        self._looking: asyncio.Task[None] | None = None
        self._stopped = self._lost = False
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="pulse-vllm", daemon=True)
        self._thread.start()
        try:
            self._llm = self._run(_launched(config))
        except BaseException:
            self._end_threads()
            raise
        atexit.register(self.close)

    def submit(self, answer: Answer) -> None:
        """Take an answer in hand.

        Raises:
            EngineStoppedError: there is nothing any more that could answer.
        """
        if not self.alive:
            raise EngineStoppedError(_STOPPED)
        self._loop.call_soon_threadsafe(self._begin, _Request(answer))

    def recall(self, image_key: str) -> ImagePrompt | None:
        """An image that was encoded lately, with its embeddings."""
        return self._encoder.recall(image_key)

    @property
    def alive(self) -> bool:
        """False once one of vLLM's processes has ended, as it starts no other, or the tower's device is lost."""
        return self._thread.is_alive() and not self._lost and not self._llm.errored

    def close(self) -> None:
        """End the answers at work, and vLLM's processes.  May be called again."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._run(self._stop())
            self._end_threads()

    # --- in the loop's thread

    def _begin(self, request: _Request) -> None:
        if self._stopped:
            request.fail(EngineStoppedError(_STOPPED))
            return
        self._requests.add(request)
        request.task = self._loop.create_task(self._answer(request))
        # Not in the task itself: one that is cancelled before its first step never runs.
        request.task.add_done_callback(lambda _: self._requests.discard(request))
        if self._looking is None:
            self._looking = self._loop.create_task(self._look())

    async def _answer(self, request: _Request) -> None:
        """Bring an answer to its end; who cancels this has done so already."""
        try:
            await self._generate(request, await self._embeddings(request))
        except Exception as error:  # noqa: BLE001 - its caller gets it
            request.fail(self._explained(error))

    async def _embeddings(self, request: _Request) -> Tensor:
        """The prompt's embeddings ``(L, D)`` in main memory, from where vLLM takes them."""
        image = request.answer.prompt.image
        thread = self._tower if image is not None and image.embeddings is None else None
        return await self._loop.run_in_executor(thread, self._embed, request)

    async def _generate(self, request: _Request, embeddings_LD: Tensor) -> None:
        prompt = prompt_input(embeddings_LD, self._model.tokenizer.bos_id)
        outputs = self._llm.generate(prompt, sampling_params(request.answer), f"pulse-{next(self._numbers)}")
        aborted = False
        async with aclosing(outputs):
            async for output in outputs:
                goes_on = request.push(output.outputs[0].token_ids) and not request.over()
                if not (goes_on or output.finished):
                    return  # vLLM drops a request whose outputs nobody wants
                aborted = output.outputs[0].finish_reason == "abort"
        if not request.ended and aborted:  # by vLLM itself, whose process was told to end
            raise EngineStoppedError(_STOPPED)
        if not request.ended:
            raise RuntimeError("vLLM ended an answer that was not complete.")

    async def _look(self) -> None:
        """Drop answers that nobody waits for or whose time is over, as long as any are at work."""
        while self._requests:
            await asyncio.sleep(_LOOK_SECONDS)
            for request in list(self._requests):
                if not request.ended and request.over() and request.task is not None:
                    request.task.cancel()
        self._looking = None

    async def _stop(self) -> None:
        self._stopped = True
        for request in list(self._requests):
            request.fail(EngineStoppedError(_STOPPED))
        tasks = [request.task for request in self._requests if request.task is not None]
        tasks += [self._looking] if self._looking is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._llm.shutdown()

    def _explained(self, error: Exception) -> Exception:
        if isinstance(error, EngineDeadError):
            return EngineStoppedError(_STOPPED)
        if not out_of_memory(error):
            self._lost = self._lost or lost(self._model.device)
            return EngineStoppedError(_STOPPED) if self._lost else error
        self._encoder.clear()
        if self._model.device.type == "cuda":
            with suppress(RuntimeError):  # a device that is broken refuses this too
                torch.cuda.empty_cache()
        return OutOfMemoryError(NO_MEMORY_LEFT)

    # --- in other threads

    def _embed(self, request: _Request) -> Tensor:
        request.began = time.perf_counter()
        prompt, device = request.answer.prompt, self._model.device
        with current(device), torch.inference_mode():
            if prompt.image is None:
                return self._model.network.embed(prompt.ids, None)[0].cpu()
            span = Span(device)
            [image] = self._encoder.encode([prompt.image])
            span.end()
            embeddings_LD = self._model.network.embed(prompt.ids, image)[0].cpu()
            request.vision = span.seconds()
        return embeddings_LD

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the loop do some work, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_threads(self) -> None:
        self._tower.shutdown(wait=False, cancel_futures=True)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _launched(config: Any) -> AsyncLLM:
    """vLLM's engine; made in the loop that is to ask it."""
    # Its processes inherit this: a terminal's Ctrl-C goes to all of them, and is this one's alone to act on.  Python's
    # resource tracker comes first, as its start unblocks the signal again.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except Exception as error:  # whatever a process of vLLM's fails with
        logger.error("vLLM: %s", error)
        raise EngineStoppedError("vLLM did not start; what its processes logged above says why.") from error
