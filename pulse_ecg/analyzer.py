"""The whole way of one request: image in, tiles, prompt, answer out."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from threading import BoundedSemaphore, Event

from pulse_ecg.anyres import merge_order, tile_image
from pulse_ecg.checkpoint import LoadedModel
from pulse_ecg.fetch import FetchPolicy
from pulse_ecg.generation import AnswerStream, EncodedPrompt, Generation, ImagePrompt, TextGenerator
from pulse_ecg.image_file import decode_image
from pulse_ecg.images import DecodedImage, ImageSource, image_bytes, load_image
from pulse_ecg.prompt import prompt_ids
from pulse_ecg.request import AnalysisRequest

MAX_DECODING = 4


@dataclass(frozen=True)
class PreparedRequest:
    """A request whose image is at hand and whose prompt fits the model: all that is left is to answer it."""

    request: AnalysisRequest
    prompt: EncodedPrompt
    timings: dict[str, float]
    """Seconds by stage: ``image_fetch``, ``image_decode``, ``preprocess``."""
    image_bytes: int = 0
    """Size of the image file; 0 without one."""


@dataclass(frozen=True)
class Analysis:
    """An answer with all that the contract's ``details`` tell about it."""

    text: str = field(repr=False)
    question: str = field(repr=False)
    generation: Generation = field(repr=False)
    prompt: EncodedPrompt
    timings: dict[str, float]


class EcgAnalyzer:
    """Answers requests with one loaded model."""

    def __init__(self, model: LoadedModel, policy: FetchPolicy) -> None:
        """``policy`` decides which image URLs may be fetched."""
        self.model = model
        self._policy = policy
        self._generator = TextGenerator(model)
        # Decoding the largest image takes several hundred megabytes: not more of them at once than there are cores.
        self._decoding = BoundedSemaphore(min(MAX_DECODING, os.cpu_count() or 1))

    def prepare(self, request: AnalysisRequest) -> PreparedRequest:
        """Fetch and decode the image, cut it into tiles and encode the prompt.  Needs no device; threads may overlap.

        Raises:
            ImageError: the image cannot be had; nothing is generated then.
            PromptTooLongError: prompt and image leave no room for an answer.
        """
        timings: dict[str, float] = {}
        image, size = self._image_prompt(request.image, timings) if request.image is not None else (None, 0)
        ids = prompt_ids(
            request.conversation,
            with_image=image is not None,
            tokenizer=self.model.tokenizer,
            context_length=self.model.config.context_length,
        )
        prompt = EncodedPrompt(ids, image)
        self._generator.room(prompt)
        return PreparedRequest(request, prompt, timings, size)

    def stream(self, prepared: PreparedRequest, *, cancel: Event | None = None) -> AnswerStream:
        """The answer as it comes into being."""
        return self._generator.stream(prepared.prompt, prepared.request.params, cancel=cancel)

    def answer(self, prepared: PreparedRequest, *, cancel: Event | None = None) -> Analysis:
        """The whole answer."""
        generation = self._generator.generate(prepared.prompt, prepared.request.params, cancel=cancel)
        spent = generation.timings
        timings = {**prepared.timings, "vision": spent.vision, "prefill": spent.prefill, "decode": spent.decode}
        return Analysis(generation.text, prepared.request.conversation.question, generation, prepared.prompt, timings)

    def analyze(self, request: AnalysisRequest, *, cancel: Event | None = None) -> Analysis:
        """:meth:`prepare` and :meth:`answer` in one."""
        return self.answer(self.prepare(request), cancel=cancel)

    def _image_prompt(self, source: ImageSource, timings: dict[str, float]) -> tuple[ImagePrompt, int]:
        """The image as the model takes it, and the size of its file in bytes (0 for an image object)."""
        lap, config = _Lap(timings), self.model.config
        data = b"" if isinstance(source, DecodedImage) else image_bytes(source, self._policy)
        lap("image_fetch")
        with self._decoding:
            image = load_image(source, self._policy) if isinstance(source, DecodedImage) else decode_image(data)
            lap("image_decode")
            tiles = tile_image(image, config.preprocessing)
        order = merge_order(
            config.merge_type,
            grid=tiles.grid,
            side=config.patches_per_side,
            image_size=tiles.image_size,
            keep_cls=config.keep_cls,
        )
        lap("preprocess")
        return ImagePrompt(tiles, order), len(data)


class _Lap:
    """Writes the seconds since the last lap under a stage's name."""

    def __init__(self, timings: dict[str, float]) -> None:
        self._timings = timings
        self._since = time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self._timings[stage] = now - self._since
        self._since = now
