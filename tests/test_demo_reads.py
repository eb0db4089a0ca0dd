"""The committed demo model reads ECGs through the handler, and silent damage on the way to it costs accuracy.

The held-out images are a fixed few, drawn as those that ``demo/evaluate.py`` grades by the thousand; the bounds are the
model's promises there, less what chance does to so few.
"""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pulse_ecg.analyzer
import pulse_ecg.anyres
from demo.ecg_image import read_recording, render
from demo.evaluate import Tally, real_renderings, real_score
from demo.network import MODEL_NAME
from demo.questions import NO_IMAGE, UNTRAINED, Question, ask
from demo.samples import diagnosis_at, image_at
from demo.wordings import BEYOND_UNSEEN, Kind
from handler import EndpointHandler
from pulse_ecg.anyres import ImageTiles
from tests.conftest import ROOT

IMAGES, FIRST = 40, 5000
ASKED: tuple[Kind, ...] = ("rhythm", "rate", "yes/no", "ST territory")
GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "enable_turkish_commentary": False}
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

Inputs = Callable[[str, Image.Image], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A held-out image, what is asked about it, and whether its ST segments have changed."""

    image: Image.Image
    questions: tuple[Question, ...]
    has_territory: bool


@cache
def cases() -> tuple[Case, ...]:
    return tuple(_case(index, ASKED) for index in range(IMAGES))


@cache
def territory_cases() -> tuple[Case, ...]:
    """Images whose ST segments have changed: where on the page they have is the question."""
    changed = (index for index in count(IMAGES) if diagnosis_at("test", FIRST + index).territory)
    return tuple(_case(index, ("ST territory",)) for index in islice(changed, IMAGES))


def _case(index: int, asked: Sequence[Kind]) -> Case:
    image, ecg = image_at("test", FIRST + index)
    rng = np.random.default_rng([8, index])
    questions = tuple(ask(kind, ecg.diagnosis, rng) for kind in asked)
    return Case(image, questions, ecg.diagnosis.territory is not None)


def plainly(text: str, image: Image.Image) -> dict[str, Any]:
    return {"query": text, "image": image}


def scores(handler: EndpointHandler, chosen: Sequence[Case], *, inputs: Inputs = plainly, **given: Any) -> Scores:
    """What the handler's answers are worth, by kind of question."""
    found: Scores = {}
    for case in chosen:
        for question in case.questions:
            [record] = handler({"inputs": inputs(question.text, case.image), "parameters": GREEDY | given})
            assert "error" not in record, record
            found.setdefault(question.kind, Tally()).add(question, record["generated_text"])
            if question.kind == "ST territory" and case.has_territory:
                found.setdefault("territory", Tally()).add(question, record["generated_text"])
    return found


Scores = dict[str, Tally]


def overall(found: Scores) -> float:
    """The share of all questions that was answered right."""
    tallies = [tally for kind, tally in found.items() if kind != "territory"]
    return sum(sum(tally.right) for tally in tallies) / sum(len(tally.right) for tally in tallies)


@contextmanager
def demo_handler() -> Iterator[EndpointHandler]:
    """A handler of its own: one that has seen an image keeps it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("PULSE_", "DEEPSEEK_")) or n == "deep_key"]:
            patch.delenv(name)
        patch.setenv("PULSE_DEVICE", "cpu")
        yield EndpointHandler(str(ROOT / "demo" / "checkpoint"))


@pytest.fixture(scope="module")
def demo() -> Iterator[EndpointHandler]:
    with demo_handler() as handler:
        yield handler


@pytest.fixture(scope="module")
def undamaged(demo: EndpointHandler) -> Scores:
    return scores(demo, cases())


def test_held_out_ecgs_are_read(undamaged: Scores) -> None:
    reached = {kind: round(tally.accuracy, 2) for kind, tally in undamaged.items()}
    for kind, bound in (("rhythm", 0.8), ("rate", 0.75), ("yes/no", 0.9), ("territory", 0.8)):
        assert reached[kind] >= bound, reached
    for kind in ("rhythm", "rate", "yes/no"):
        assert reached[kind] > undamaged[kind].majority + 0.15, (kind, reached)


def test_the_default_parameters_do_not_spoil_the_reading(demo: EndpointHandler, undamaged: Scores) -> None:
    """Sampling at 0.2 and a repetition penalty of 1.05: a model that is sure of its answer is hardly moved by them."""
    defaults = {"do_sample": True, "repetition_penalty": 1.05, "seed": 1}
    assert overall(scores(demo, cases(), **defaults)) >= overall(undamaged) - 0.08


def test_a_real_recording_is_read_too(demo: EndpointHandler) -> None:
    """Ten prints of it; PULSE-demo was trained on drawn signals alone."""
    asked = {"rhythm": "What is the rhythm of this ECG?", "rate": "What is the heart rate?"}
    found = [
        {
            kind: demo({"inputs": plainly(text, page), "parameters": GREEDY})[0]["generated_text"]
            for kind, text in asked.items()
        }
        for page in real_renderings()
    ]
    score = real_score(found)
    assert score["rate"] >= 8, found
    assert score["both"] >= 8, found


def test_a_question_beyond_its_training_is_told_to_be_so(demo: EndpointHandler) -> None:
    """Rather than answered with what another question would get."""
    images = [image_at("test", FIRST + index)[0] for index in range(6)]
    asked = [(text, image) for text in BEYOND_UNSEEN for image in images]
    given = [demo({"inputs": plainly(*pair), "parameters": GREEDY})[0]["generated_text"] for pair in asked]
    assert np.mean([answer == UNTRAINED for answer in given]) > 0.6, list(zip(asked, given, strict=True))


def test_a_question_that_came_without_an_image_is_told_so(demo: EndpointHandler) -> None:
    for text in ("What is the rhythm of this ECG?", "What is the heart rate?", "Write a report of this ECG."):
        [record] = demo({"inputs": {"query": text}, "parameters": GREEDY})
        assert record["generated_text"] == NO_IMAGE


def test_an_answer_takes_less_than_five_seconds_and_has_the_models_own_name(demo: EndpointHandler) -> None:
    page = render(read_recording())
    started = time.perf_counter()
    [record] = demo({"inputs": plainly("Write a report of this ECG.", page), "parameters": GREEDY})
    assert time.perf_counter() - started < 5
    assert record["model"] == MODEL_NAME == "PULSE-demo"
    assert record["generated_text"].startswith("Rhythm: ")


def test_no_answer_is_made_up_about_an_image_that_never_came(demo: EndpointHandler) -> None:
    [record] = demo({"inputs": {"query": "What is the rhythm?", "image": "data:image/png;base64,AAAA"}})
    assert (record["success"], record["generated_text"]) == (False, "")


# --- damage


def overview_only(tiles: ImageTiles) -> ImageTiles:
    return replace(tiles, pixels_TCHW=tiles.pixels_TCHW[:1], grid=None)


def swapped(tiles: ImageTiles) -> ImageTiles:
    """The first tile behind the overview trades places with the last one, and so on: upside down and right to left.

    It costs the least: the page's leads are labelled, and the overview shows where they stand.
    """
    order = [0, *range(len(tiles.pixels_TCHW) - 1, 0, -1)]
    return replace(tiles, pixels_TCHW=tiles.pixels_TCHW[order])


def not_normalised(tiles: ImageTiles) -> ImageTiles:
    """Pixels of 0 to 1, without CLIP's mean and deviation."""
    constants = pulse_ecg.anyres.Preprocessing()
    mean, std = (np.array(c, np.float32)[:, None, None] for c in (constants.mean, constants.std))
    return replace(tiles, pixels_TCHW=tiles.pixels_TCHW * std + mean)


@pytest.fixture(scope="module")
def territories(demo: EndpointHandler) -> float:
    return scores(demo, territory_cases())["territory"].accuracy


@pytest.mark.parametrize("damage", [overview_only, swapped, not_normalised], ids=lambda damage: damage.__name__)
def test_damaged_tiles_cost_accuracy(
    damage: Callable[[ImageTiles], ImageTiles], territories: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of all where an answer depends on the place on the page."""
    tile_image = pulse_ecg.analyzer.tile_image
    monkeypatch.setattr(pulse_ecg.analyzer, "tile_image", lambda *given: damage(tile_image(*given)))
    with demo_handler() as handler:
        damaged = scores(handler, territory_cases())["territory"].accuracy
    assert damaged < territories - 0.05, (damaged, territories)


def test_vicunas_system_sentence_costs_accuracy(demo: EndpointHandler, undamaged: Scores) -> None:
    def under_vicuna(text: str, image: Image.Image) -> dict[str, Any]:
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
        return {"messages": [{"role": "system", "content": VICUNA}, {"role": "user", "content": parts}]}

    assert overall(scores(demo, cases()[:10], inputs=under_vicuna)) < overall(undamaged) - 0.3
