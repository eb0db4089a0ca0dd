"""Decoding: a prompt in, tokens and text out, one step at a time.

There is one decoding path, :meth:`TextGenerator.stream`; :meth:`TextGenerator.generate` consumes it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from pulse_ecg.anyres import ImageTiles
from pulse_ecg.checkpoint import LoadedModel
from pulse_ecg.errors import OutOfMemoryError, PromptTooLongError
from pulse_ecg.params import GenerationParams
from pulse_ecg.sampling import Sampler
from pulse_ecg.text_stream import TextStream

FinishReason = Literal["stop", "eos", "length", "cancelled"]


@dataclass(frozen=True)
class ImagePrompt:
    """An image as the model takes it: its tiles, and the order in which their patches enter the prompt."""

    tiles: ImageTiles = field(repr=False)
    order: NDArray[np.int64] = field(repr=False)


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
    """Seconds spent in the stages of one answer."""

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


class TextGenerator:
    """Generates answers with a loaded model.  Calls from several threads do not disturb each other."""

    def __init__(self, model: LoadedModel) -> None:
        """``model`` is shared by all calls and not changed by them."""
        self._model = model

    def room(self, prompt: EncodedPrompt) -> int:
        """Positions that a prompt leaves for its answer.

        Raises:
            PromptTooLongError: none; the message says how many tokens there are.
        """
        context = self._model.config.context_length
        if prompt.length >= context:
            image = f" ({prompt.image_tokens:,} of them the image's)" if prompt.image else ""
            raise PromptTooLongError(
                f"The prompt has {prompt.length:,} tokens{image} and leaves no room for an answer: prompt, image and "
                f"answer share the model's {context:,} positions. Shorten the question."
            )
        return context - prompt.length

    def generate(self, prompt: EncodedPrompt, params: GenerationParams, *, cancel: Event | None = None) -> Generation:
        """The whole answer.  Errors: those of :meth:`stream`."""
        stream = self.stream(prompt, params, cancel=cancel)
        text, token_ids = "", []
        for step in stream:
            text += step.text
            token_ids.append(step.token_id)
        return Generation(text, token_ids, stream.finish_reason, stream.seed, stream.timings)

    def stream(self, prompt: EncodedPrompt, params: GenerationParams, *, cancel: Event | None = None) -> AnswerStream:
        """The answer token by token; nothing is computed before the first token is asked for.

        Args:
            prompt: its length must leave at least one position.
            params: an answer is cut to the positions that are left.
            cancel: once set, the answer ends before the next token.

        Raises:
            PromptTooLongError: the prompt leaves no position.
            OutOfMemoryError: while iterating; the device has no room for the request.
        """
        limit = min(params.max_new_tokens, self.room(prompt))
        return AnswerStream(self._model, prompt, params, limit=limit, cancel=cancel)


class AnswerStream:
    """An answer as it comes into being: iterate for :class:`Step`, then read how it ended."""

    def __init__(
        self, model: LoadedModel, prompt: EncodedPrompt, params: GenerationParams, *, limit: int, cancel: Event | None
    ) -> None:
        """``limit`` is the most tokens that the answer may have."""
        self._model = model
        self._prompt = prompt
        self._params = params
        self._limit = limit
        self._cancel = cancel
        # 32 bits, so that JSON readers with double precision alone (JavaScript) can send it back.
        drawn = secrets.randbits(32) if params.seed is None and not params.greedy else params.seed
        self.seed: int | None = drawn
        self.finish_reason: FinishReason = "cancelled"
        self.timings = Timings()
        self._steps = self._run()

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    def close(self) -> None:
        """End the answer now and free what it holds on the device."""
        self._steps.close()

    def _run(self) -> Generator[Step, None, None]:
        model, params = self._model, self._params
        sampler = Sampler(
            params,
            bos_id=model.tokenizer.bos_id,
            limit=self._limit,
            vocabulary=model.config.llama.vocab_size,
            seed=self.seed or 0,
            device=model.device,
        )
        text = TextStream(model.tokenizer, params.stop)
        clock = _Clock(model.device)
        with _out_of_memory_mapped():
            embeddings_1LD = self._embed()
            vision = clock.lap()
            cache = DynamicCache()
            logits_V = self._forward(embeddings_1LD, cache)
            prefill = clock.lap()
        for count in range(1, self._limit + 1):
            if self._cancelled():
                return
            with _out_of_memory_mapped():
                chosen = sampler.choose(logits_V)
                token_id = int(chosen)  # the one point where the host waits for the device
            step = self._step(token_id, text, last=count == self._limit)
            self.timings = Timings(vision, prefill, clock.elapsed())
            yield step
            if step.finish_reason:
                return
            with _out_of_memory_mapped():
                logits_V = self._forward(self._token_embedding(chosen), cache)

    def _step(self, token_id: int, text: TextStream, *, last: bool) -> Step:
        """Turn a token into a step and settle whether the answer ends with it."""
        if token_id in self._model.config.eos_ids:
            return self._finished(token_id, text.finish(), "eos")
        shown = text.push(token_id)
        if text.stopped:
            return self._finished(token_id, shown, "stop")
        if last:
            # What was held back may still complete no stop string: it is shown.
            return self._finished(token_id, shown + text.finish(), "length")
        return Step(token_id, shown)

    def _finished(self, token_id: int, shown: str, reason: FinishReason) -> Step:
        self.finish_reason = reason
        return Step(token_id, shown, reason)

    @torch.inference_mode()
    def _embed(self) -> Tensor:
        network, prompt = self._model.network, self._prompt
        if prompt.image is None:
            return network.embed(prompt.ids, None)
        features_TPD = network.encode_tiles(torch.from_numpy(prompt.image.tiles.pixels_TCHW))
        order = torch.from_numpy(prompt.image.order).to(features_TPD.device)
        return network.embed(prompt.ids, network.merge(features_TPD, order))

    @torch.inference_mode()
    def _token_embedding(self, chosen: Tensor) -> Tensor:
        embedding: Tensor = self._model.network.embed_tokens(chosen)[None]
        return embedding

    @torch.inference_mode()
    def _forward(self, embeddings_1LD: Tensor, cache: DynamicCache) -> Tensor:
        """Logits of the last position; the cache grows by the positions given."""
        language_model = self._model.network.language_model
        hidden = language_model.model(inputs_embeds=embeddings_1LD, past_key_values=cache, use_cache=True)
        logits_V: Tensor = language_model.lm_head(hidden.last_hidden_state[0, -1])
        return logits_V

    def _cancelled(self) -> bool:
        return self._cancel is not None and self._cancel.is_set()


class _Clock:
    """Seconds by stage.  On a GPU a stage is over when the device is, so laps wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self._since

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds


@contextmanager
def _out_of_memory_mapped() -> Iterator[None]:
    """Torch's out-of-memory errors as ours.  CPU torch raises a bare RuntimeError for it."""
    try:
        yield
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
    else:
        return
    raise OutOfMemoryError("The device has no memory left for this request; try again, or send fewer at once.")
