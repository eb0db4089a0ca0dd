"""What the engine's tests share: requests of every kind, and an engine whose turns the test takes itself.

With a thread of its own the engine decides when things happen; turn by turn the test does, and nothing depends on how
busy the machine is.  The turns run through the engine's own loop, its handling of errors included.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from demo.build_checkpoint import build_checkpoint
from demo.random_weights import CheckpointShape
from pulse_ecg.analyzer import EcgAnalyzer
from pulse_ecg.checkpoint import LoadedModel, load_model
from pulse_ecg.config import Settings
from pulse_ecg.engine.graphs import DecodeGraphs
from pulse_ecg.engine.scheduler import TransformersEngine
from pulse_ecg.fetch import FetchPolicy
from pulse_ecg.generation import Answer, EncodedPrompt, ImagePrompt, TextGenerator
from pulse_ecg.images import DecodedImage
from pulse_ecg.params import GenerationParams, load_defaults
from pulse_ecg.prompt import LLAVA_V1_SYSTEM, Conversation, Turn
from pulse_ecg.request import AnalysisRequest

PATIENCE = 60.0  # seconds after which a test gives up on an engine that runs by itself
TOKENS = 6
GREEDY = replace(
    load_defaults(Path(__file__).parents[1]), do_sample=False, max_new_tokens=TOKENS, stop=(), repetition_penalty=1.0
)
SAMPLED = replace(GREEDY, do_sample=True, temperature=1.3, top_p=0.9, top_k=40, seed=11, repetition_penalty=1.05)
LONG = "Please consider every lead in turn and say what you see. " * 18


def load_engine_model(kind: str) -> LoadedModel:
    """A random model whose images take up to 720 positions.

    Of the kind "grouped" it has fewer heads for keys, of the kind "padded" a table with more rows than tokens.
    """
    shapes = {
        "flat": CheckpointShape(layers=2, patch_size=28, positions=2048),
        "grouped": CheckpointShape(layers=2, patch_size=28, positions=2048, heads=4, kv_heads=2),
        "padded": CheckpointShape(layers=2, patch_size=28, positions=2048, vocab=800),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = build_checkpoint(
            Path(folder) / "model", shape=shapes[kind], merge_type="spatial_unpad" if kind == "grouped" else "flat"
        )
        return load_model(path, Settings(device="cpu"))


engine_model = cache(load_engine_model)
"""The same, loaded once for all tests."""


def picture(seed: int = 0, size: tuple[int, int] = (700, 500)) -> Image.Image:
    """Coarse noise: of (700, 500) five tiles are cut, of (600, 300) three."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 20, size[0] // 20, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model spends its time on waking threads: a module that imports this does without."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Ask:
    """A request, ready for any engine of its model; its image has not been seen by the tower."""

    prompt: EncodedPrompt
    params: GenerationParams


class _NoEngine:
    """Remembers no image."""

    def submit(self, answer: Answer) -> None:
        raise NotImplementedError

    def recall(self, image_key: str) -> ImagePrompt | None:
        return None


def ask_about(
    model: LoadedModel,
    question: str,
    image: Image.Image | None = None,
    params: GenerationParams = GREEDY,
    *,
    system: str = LLAVA_V1_SYSTEM,
) -> Ask:
    """A question as the analyzer prepares it."""
    source = DecodedImage(image) if image else None
    request = AnalysisRequest(Conversation((Turn("user", question),), system), source, params, form="object")
    return Ask(EcgAnalyzer(model, FetchPolicy(), engine=_NoEngine()).prepare(request).prompt, params)


@cache
def asks(kind: str) -> dict[str, Ask]:
    """Requests of every kind: short, of several chunks, about images of one and of several chunks, greedy, sampled."""
    model, penalised = engine_model(kind), replace(GREEDY, repetition_penalty=1.3)
    return {
        "short": ask_about(model, "Rate?"),
        "long": ask_about(model, LONG, params=penalised),
        "sampled": ask_about(model, "Is there an ST elevation?", params=SAMPLED),
        "image": ask_about(model, "Rate?", picture(1)),
        "image again": ask_about(model, "What is the axis, please?", picture(1), SAMPLED),
        "same size": ask_about(model, "Rate?", picture(2), penalised),
        "small image": ask_about(model, "Rhythm?", picture(3, (600, 300)), replace(SAMPLED, seed=5, top_k=0, top_p=1)),
        "other system": ask_about(model, "Rate?", picture(1), system="A chat between two cardiologists."),
    }


@dataclass(frozen=True)
class Outcome:
    """All that an answer's caller gets to see."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    error: Exception | None = None


def outcome(answer: Answer) -> Outcome:
    """What was sent to the caller, who has not read yet; it must have been told exactly once that this is the end."""
    sent = list[Any]()
    try:
        while True:
            sent.append(answer._outbox.get_nowait())
    except Empty:
        pass
    assert [over for _, _, over in sent] == [False] * (len(sent) - 1) + [True], "not ended exactly once, and last"
    steps = [step for steps, _, _ in sent for step in steps]
    error = sent[-1][1]
    reason = None if error else ((steps[-1].finish_reason if steps else None) or "cancelled")
    return Outcome([step.token_id for step in steps], "".join(step.text for step in steps), reason, error)


Hook = Callable[[str, Any], None]

_STAGES = {
    "begin": ("_sampler", "begin"),
    "restore": ("_prefixes", "restore"),
    "embed": ("_runner", "embed"),
    "tower": ("_encoder", "_encode_new"),
    "prefill": ("_runner", "prefill"),
    "keep": ("_prefixes", "keep"),
    "decode": ("_runner", "decode"),
    "choose": ("_sampler", "choose"),
    "feed": ("_runner", "feed"),
}
STAGES = tuple(_STAGES)


def watch(engine: TransformersEngine, hook: Hook) -> None:
    """Call ``hook`` with a stage and what is known of it before each stage of an engine's work."""
    for stage, (part, name) in _STAGES.items():
        owner = getattr(engine, part)
        setattr(owner, name, _watched(stage, getattr(owner, name), hook))


def _watched(stage: str, method: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    def called(*given: Any, **options: Any) -> Any:
        known: Any = given
        if stage == "tower":
            known = sum(len(image.tiles.pixels_TCHW) for image in given[0])
            if not known:
                return method(*given, **options)
        elif stage == "prefill":
            embeddings_1ND, slot, start = given
            known = slot, start, start + embeddings_1ND.shape[1]
        elif stage == "decode":
            known = tuple(given[0])
        hook(stage, known)
        return method(*given, **options)

    return called


def rerun(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """A recorder without a GPU: the result lies where it lay, computed anew."""
    result = run()
    return lambda: result.copy_(run()), result


class SteppedEngine(TransformersEngine):
    """An engine without a thread: :meth:`turn` takes its turns, ``work`` lists the computations that were started."""

    def __init__(self, model: LoadedModel, *, slots: int = 4, ahead: bool = False, graphs: bool = False) -> None:
        super().__init__(model, max_slots=slots)
        assert self.slots.count == slots
        self._thread = threading.current_thread()  # so that none is started
        self._ahead = ahead
        self._turns_left = 0
        if graphs:
            with torch.inference_mode():
                self._runner._graphs = DecodeGraphs(self._runner._decode, self.slots, rerun)
        self._generator = TextGenerator(self, model.config, model.tokenizer)
        self.work: list[tuple[str, Any]] = []
        self.hook: Hook = lambda stage, known: None
        watch(self, self._on_stage)

    def _on_stage(self, stage: str, known: Any) -> None:
        if stage in ("tower", "prefill", "decode"):
            self.work.append((stage, known))
        self.hook(stage, known)

    def _wait_for_work(self) -> bool:
        self._turns_left -= 1
        return self._turns_left >= 0 and bool(self._waiting or self._running or self._on_the_way)

    def turn(self, count: int = 1) -> None:
        """Take some turns, fewer if there is nothing to do any more."""
        self._turns_left = count
        self._work()

    def finish(self) -> None:
        """Take turns until there is nothing left to do; everything is then free again."""
        self.turn(5000)
        assert not (self._waiting or self._running or self._on_the_way)
        assert sorted(self._free) == list(range(self.slots.count))

    def ask(self, ask: Ask, *, whole: bool = False, **ends: Any) -> Answer:
        """Submit a request; ``ends`` may be a ``cancel`` event and a ``deadline``."""
        answer = self._generator.stream(ask.prompt, ask.params, **ends, whole=whole)._answer
        self.submit(answer)
        return answer

    def count(self, stage: str) -> int:
        """How many computations of a stage were started."""
        return sum(found == stage for found, _ in self.work)


class PromptEngine(SteppedEngine):
    """Takes a few turns as soon as it is asked, so that one thread can ask and read."""

    def submit(self, answer: Answer) -> None:
        super().submit(answer)
        self.turn(3)


@cache
def alone(kind: str, name: str) -> Outcome:
    """What one of :func:`asks` is answered by an engine that has nothing else to do and saw nothing before."""
    return answered(SteppedEngine(engine_model(kind), slots=1), [asks(kind)[name]])[0]


def answered(engine: SteppedEngine, requests: Sequence[Ask], **how: Any) -> list[Outcome]:
    """The outcomes of requests that arrive together."""
    answers = [engine.ask(request, **how) for request in requests]
    engine.finish()
    return [outcome(answer) for answer in answers]
