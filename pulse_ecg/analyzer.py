"""The whole way of one request: image in, tiles, prompt, answer out."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from threading import Event

from PIL import Image

from pulse_ecg.admission import Admission
from pulse_ecg.anyres import merge_order, tile_image
from pulse_ecg.cancellation import Cancellation
from pulse_ecg.checkpoint import LoadedModel
from pulse_ecg.engine.scheduler import TransformersEngine
from pulse_ecg.fetch import FetchPolicy
from pulse_ecg.generation import AnswerStream, EncodedPrompt, Engine, Generation, ImagePrompt, TextGenerator, collected
from pulse_ecg.image_file import decode_image
from pulse_ecg.images import DecodedImage, ImageSource, image_bytes, load_image
from pulse_ecg.params import GenerationParams
from pulse_ecg.prompt import prompt_ids
from pulse_ecg.request import DEFAULT_QUESTION, AnalysisRequest, parse_input

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

    def __init__(self, model: LoadedModel, policy: FetchPolicy, *, engine: Engine | None = None) -> None:
        """``policy`` decides which image URLs may be fetched; ``engine`` runs ``model``."""
        self.model = model
        self._policy = policy
        self._generator = TextGenerator(engine or TransformersEngine(model), model.config, model.tokenizer)
        # Decoding the largest image takes several hundred megabytes: not more of them at once than there are cores.
        self._decoding = Admission(min(MAX_DECODING, os.cpu_count() or 1), 0)

    @property
    def engine_alive(self) -> bool:
        """Whether the engine can still answer."""
        return self._generator.engine.alive

    def close(self) -> None:
        """End the engine."""
        self._generator.engine.close()

    def warm_up(self) -> None:
        """Answer a question that nobody asked, so that the first caller does not pay for what happens only once.

        On a GPU one about an image; on a CPU there is little to warm, and a large model takes long.
        """
        params = GenerationParams(2, temperature=1, top_p=0.9, top_k=9, do_sample=True, repetition_penalty=1.1, stop=())
        blank = Image.new("RGB", (2 * self.model.config.preprocessing.tile_size,) * 2)
        self.analyze(parse_input(blank if self.model.device.type == "cuda" else DEFAULT_QUESTION, params))

    def prepare(
        self, request: AnalysisRequest, *, cancel: Cancellation | None = None, deadline: float | None = None
    ) -> PreparedRequest:
        """Fetch and decode the image, cut it into tiles and encode the prompt.  Needs no device; threads may overlap.

        Raises:
            ImageError: the image cannot be had; nothing is generated then.
            PromptTooLongError: prompt and image leave no room for an answer.
            RequestCancelledError: ``cancel`` was set before the image was decoded.
            DeadlineExceededError: a reading of ``time.monotonic()`` passed before its decoding began.
        """
        timings: dict[str, float] = {}
        image, size = None, 0
        if request.image is not None:
            image, size = self._image_prompt(request.image, timings, cancel, deadline)
        ids = prompt_ids(
            request.conversation,
            with_image=image is not None,
            tokenizer=self.model.tokenizer,
            context_length=self.model.config.context_length,
        )
        prompt = EncodedPrompt(ids, image)
        self._generator.room(prompt)
        return PreparedRequest(request, prompt, timings, size)

    def stream(
        self,
        prepared: PreparedRequest,
        *,
        cancel: Event | None = None,
        deadline: float | None = None,
        whole: bool = False,
    ) -> AnswerStream:
        """The answer as it comes into being; see :meth:`pulse_ecg.generation.TextGenerator.stream`."""
        params = prepared.request.params
        return self._generator.stream(prepared.prompt, params, cancel=cancel, deadline=deadline, whole=whole)

    def answer(
        self,
        prepared: PreparedRequest,
        *,
        cancel: Event | None = None,
        deadline: float | None = None,
        tell: Callable[[str], object] | None = None,
    ) -> Analysis:
        """The whole answer; ``tell`` is given each piece of its text as it comes."""
        generation = collected(self.stream(prepared, cancel=cancel, deadline=deadline, whole=tell is None), tell)
        timings = prepared.timings | asdict(generation.timings)
        return Analysis(generation.text, prepared.request.conversation.question, generation, prepared.prompt, timings)

    def analyze(self, request: AnalysisRequest, *, cancel: Event | None = None) -> Analysis:
        """:meth:`prepare` and :meth:`answer` in one."""
        return self.answer(self.prepare(request), cancel=cancel)

    def _image_prompt(
        self, source: ImageSource, timings: dict[str, float], cancel: Cancellation | None, deadline: float | None
    ) -> tuple[ImagePrompt, int]:
        """The image as the model takes it, and the size of its file in bytes (0 for an image object).

        A file that was asked about lately is neither decoded nor tiled again; its URL is fetched all the same, since
        only its bytes tell that it is the same image.
        """
        lap = _Lap(timings)
        image: Image.Image | None = None
        decoding = partial(self._decoding.place, cancel=cancel, deadline=deadline)
        if isinstance(source, DecodedImage):
            data = b""
            lap("image_fetch")
            with decoding():
                image = load_image(source, self._policy)
                key = _digest(repr(image.size).encode(), image.tobytes())
        else:
            data = image_bytes(source, self._policy, cancel)
            lap("image_fetch")
            key = _digest(data)
        if prompt := self._generator.engine.recall(key):
            timings |= {"image_decode": 0.0, "preprocess": 0.0}
            return prompt, len(data)
        with decoding():
            image = image or decode_image(data)
            lap("image_decode")
            prompt = self._tiled(key, image)
            lap("preprocess")
        return prompt, len(data)

    def _tiled(self, key: str, image: Image.Image) -> ImagePrompt:
        config = self.model.config
        tiles = tile_image(image, config.preprocessing)
        order = merge_order(
            config.merge_type,
            grid=tiles.grid,
            side=config.patches_per_side,
            image_size=tiles.image_size,
            keep_cls=config.keep_cls,
        )
        return ImagePrompt(key, tiles.image_size, order, tiles)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


class _Lap:
    """Writes the seconds since the last lap under a stage's name."""

    def __init__(self, timings: dict[str, float]) -> None:
        self._timings = timings
        self._since = time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self._timings[stage] = now - self._since
        self._since = now
