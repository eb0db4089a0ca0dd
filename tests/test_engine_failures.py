"""Whatever goes wrong, every answer ends exactly once, only those to blame end in an error, and the engine goes on."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event, Thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pulse_ecg.engine import scheduler
from pulse_ecg.engine.scheduler import TransformersEngine
from pulse_ecg.errors import EngineStoppedError, OutOfMemoryError
from pulse_ecg.generation import TextGenerator
from tests.conftest import ROOT
from tests.engine_turns import (
    GREEDY,
    PATIENCE,
    STAGES,
    PromptEngine,
    SteppedEngine,
    alone,
    answered,
    ask_about,
    asks,
    engine_model,
    one_thread,
    outcome,
    picture,
    watch,
)

__all__ = ["one_thread"]  # a fixture that every test here uses

FLAT = "flat"
NAMES = ("short", "long", "image", "same size", "small image", "sampled")


def gpu_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory at /secret")


def cpu_memory() -> Exception:
    return RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.")


def driver_memory() -> Exception:
    return RuntimeError("CUDA error: out of memory")


def bug() -> Exception:
    return ValueError("a bug")


class Fault:
    """Raises at some (the first is 1) of the times that a stage is reached by the request in ``slot``, or by any."""

    def __init__(self, stage: str, error: Callable[[], Exception], *times: int, slot: int | None = None) -> None:
        self.stage, self.error, self.times, self.slot = stage, error, times, slot
        self.count = 0

    def __call__(self, stage: str, known: Any) -> None:
        if stage == self.stage and (self.slot is None or slot_of(stage, known) == self.slot):
            self.count += 1
            if self.count in self.times:
                raise self.error()


def slot_of(stage: str, known: Any) -> int | None:
    """Whose slot a stage works on, if it is one alone."""
    if stage in ("begin", "prefill"):
        return int(known[0])
    if stage in ("restore", "keep"):
        return int(known[1])
    if stage == "choose" and len(known[1]) == 1:
        return int(known[1][0])
    if stage == "feed" and len(known[0]) == 1:
        return int(known[0][0])
    return None


# --- errors that are one request's own

OWN_STAGES = [
    ("begin", 1),
    ("restore", 1),
    ("embed", 2),
    ("tower", 1, 2),  # with the other image, and alone
    ("prefill", 1),
    ("prefill", 2),
    ("prefill", 3),
    ("choose", 1),
    ("feed", 1),
]


@pytest.mark.parametrize("where", OWN_STAGES, ids=str)
@pytest.mark.parametrize("error", [gpu_memory, bug])
@pytest.mark.parametrize("ahead", [False, True])
def test_what_goes_wrong_with_one_prompt_ends_that_answer_alone(
    where: tuple[Any, ...], error: Callable[[], Exception], ahead: bool
) -> None:
    """Of three that run, the second (an image) fails: before, in and after its prompt's chunks."""
    stage, *times = where
    if error is gpu_memory and stage in ("tower", "prefill"):
        times.append(times[-1] + 1)  # these are tried once more
    engine = SteppedEngine(engine_model(FLAT), slots=3, ahead=ahead)
    engine.hook = Fault(stage, error, *times, slot=None if stage in ("embed", "tower") else 1)
    names = ("short", "image", "small image")
    first, failed, last = answered(engine, [asks(FLAT)[name] for name in names])
    assert (first, last) == (alone(FLAT, "short"), alone(FLAT, "small image"))
    if error is bug:
        assert isinstance(failed.error, ValueError)
    else:
        assert isinstance(failed.error, OutOfMemoryError)
        assert "no memory left" in str(failed.error) and "secret" not in str(failed.error)
    assert failed.token_ids == []
    assert answered(engine, [asks(FLAT)["image"]]) == [alone(FLAT, "image")]


@pytest.mark.parametrize("ahead", [False, True])
def test_no_memory_to_remember_an_image_costs_no_answer(ahead: bool) -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=3, ahead=ahead)
    engine.hook = Fault("keep", gpu_memory, 1, slot=1)
    names = ("short", "image", "small image")
    assert answered(engine, [asks(FLAT)[name] for name in names]) == [alone(FLAT, name) for name in names]


def test_a_bug_in_remembering_an_image_ends_that_answer_alone() -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=3)
    engine.hook = Fault("keep", bug, 1, slot=1)
    first, failed, last = answered(engine, [asks(FLAT)[name] for name in ("short", "image", "small image")])
    assert (first, last) == (alone(FLAT, "short"), alone(FLAT, "small image"))
    assert isinstance(failed.error, ValueError)


@pytest.mark.parametrize("stage", ["decode", "prefill"])
def test_an_engine_whose_device_is_lost_says_so_and_refuses(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call fails from then on: those who wait are told untried, and a health check can have it replaced."""

    def broken() -> Exception:
        return RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(scheduler, "lost", lambda device: True)
    engine = SteppedEngine(engine_model(FLAT), slots=2)
    engine.hook = Fault(stage, broken, *range(1, 50))
    assert engine.alive
    found = answered(engine, [asks(FLAT)[name] for name in ("short", "sampled", "long")])
    assert all(isinstance(f.error, EngineStoppedError) and not f.token_ids[1:] for f in found)
    assert engine.count("prefill") == 2, "who waits is not tried"
    assert not engine.alive
    with pytest.raises(EngineStoppedError, match="started anew"):
        answered(engine, [asks(FLAT)["short"]])


@pytest.mark.parametrize("error", [gpu_memory, cpu_memory, driver_memory])
def test_every_library_has_its_own_words_for_no_memory(error: Callable[[], Exception]) -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=1)
    engine.hook = Fault("prefill", error, 1, 2)
    assert isinstance(answered(engine, [asks(FLAT)["short"]])[0].error, OutOfMemoryError)


@pytest.mark.parametrize("stage", ["tower", "prefill", "decode"])
@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_remembered_makes_room_before_an_answer_fails(stage: str, ahead: bool) -> None:
    """And what the failed try computed is gone: an exception holds its frames, and these their tensors."""
    engine, tensors = SteppedEngine(engine_model(FLAT), slots=2, ahead=ahead), list[Any]()
    assert answered(engine, [asks(FLAT)["same size"]]) == [alone(FLAT, "same size")]

    def no_room_beside_memories(reached: str, known: Any) -> None:
        if reached == stage and engine._prefixes._copies.bytes + engine._encoder._remembered.bytes:
            activations = torch.zeros(1000)
            tensors.append(weakref.ref(activations))
            raise gpu_memory()
        assert [activations() for activations in tensors] == [None] * len(tensors)

    engine.hook = no_room_beside_memories
    names = ("image", "short")
    assert answered(engine, [asks(FLAT)[name] for name in names]) == [alone(FLAT, name) for name in names]
    assert tensors


@pytest.mark.parametrize("ahead", [False, True])
def test_a_token_that_cannot_be_put_into_words_ends_its_answer_alone(ahead: bool) -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=3, ahead=ahead)
    answers = [engine.ask(asks(FLAT)[name]) for name in ("short", "sampled", "long")]

    def fail(token_id: int) -> str:
        raise ValueError("a bug")

    answers[1]._text.push = fail  # type: ignore[method-assign]
    engine.finish()
    first, failed, last = [outcome(answer) for answer in answers]
    assert isinstance(failed.error, ValueError)
    assert (first, last) == (alone(FLAT, "short"), alone(FLAT, "long"))


def test_a_seed_that_no_generator_takes_ends_its_answer_alone() -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=3)
    sampled = asks(FLAT)["sampled"]
    bad = replace(sampled, params=replace(sampled.params, seed=2**70))
    first, failed, last = answered(engine, [asks(FLAT)["short"], bad, sampled])
    assert failed.error is not None
    assert (first, last) == (alone(FLAT, "short"), alone(FLAT, "sampled"))


# --- images that share a pass of the tower


@pytest.mark.parametrize("ahead", [False, True])
def test_images_too_many_for_the_memory_are_encoded_one_by_one(ahead: bool) -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=4, ahead=ahead)

    def at_most_five_tiles(stage: str, known: Any) -> None:
        if stage == "tower" and known > 5:
            raise gpu_memory()

    engine.hook = at_most_five_tiles
    names = ("image", "same size", "small image", "short")
    assert answered(engine, [asks(FLAT)[name] for name in names]) == [alone(FLAT, name) for name in names]


@pytest.mark.parametrize("error", [gpu_memory, bug])
def test_an_image_that_cannot_be_encoded_fails_alone(error: Callable[[], Exception]) -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=4)
    bad = ask_about(engine_model(FLAT), "Rate?", picture(9))
    assert bad.prompt.image is not None
    encode = engine._encoder._encode_new

    def fail_with_the_bad_one(images: Any) -> Any:
        if any(image.key == bad.prompt.image.key for image in images):
            raise error()
        return encode(images)

    engine._encoder._encode_new = fail_with_the_bad_one  # type: ignore[method-assign]
    for place in range(3):
        engine._encoder._remembered.clear()
        engine._prefixes.clear()
        requests = [asks(FLAT)["image"], asks(FLAT)["small image"]]
        requests.insert(place, bad)
        found = answered(engine, requests)
        assert found.pop(place).error is not None
        assert found == [alone(FLAT, "image"), alone(FLAT, "small image")]


def test_the_memory_of_a_failed_pass_is_free_for_the_next_try() -> None:
    """An exception holds its frames, and these their tensors: nothing may be tried again while it is handled."""
    engine, tensors = SteppedEngine(engine_model(FLAT), slots=2), list[Any]()
    encode = engine._encoder.encode

    def fail_for_several(images: Any) -> Any:
        if len(images) > 1:
            activations = torch.zeros(1000)
            tensors.append(weakref.ref(activations))
            raise gpu_memory()
        if tensors:
            assert tensors[0]() is None, "what the failed pass computed is still there"
        return encode(images)

    engine._encoder.encode = fail_for_several  # type: ignore[method-assign]
    names = ("image", "small image")
    assert answered(engine, [asks(FLAT)[name] for name in names]) == [alone(FLAT, name) for name in names]
    assert tensors


# --- errors that nobody in particular is to blame for


@pytest.mark.parametrize("stage", ["decode", "choose", "feed"])
@pytest.mark.parametrize("error", [gpu_memory, bug])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_failed_step_ends_those_at_work_and_later_ones_are_answered(
    stage: str, error: Callable[[], Exception], ahead: bool
) -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=2, ahead=ahead)
    times = (3, 4) if stage == "decode" else (5,)  # for want of memory it is tried once more
    engine.hook = Fault(stage, error, *times[: None if error is gpu_memory else 1])
    names = ("short", "sampled", "long", "image")
    found = answered(engine, [asks(FLAT)[name] for name in names])
    for failed, name in zip(found[:2], names[:2], strict=True):
        assert isinstance(failed.error, ValueError if error is bug else OutOfMemoryError)
        assert failed.token_ids == alone(FLAT, name).token_ids[: len(failed.token_ids)]
        assert len(failed.token_ids) <= 3
    assert found[2:] == [alone(FLAT, name) for name in names[2:]]


def test_a_device_that_refuses_everything_leaves_no_caller_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fault, CUDA answers every call with an error, also the ones that are to clean up."""

    def refuse() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    engine = SteppedEngine(engine_model(FLAT), slots=2, ahead=True)
    engine.hook = Fault("decode", gpu_memory, 2, 3)
    found = answered(engine, [asks(FLAT)[name] for name in ("short", "sampled", "long")])
    assert [type(f.error) for f in found] == [OutOfMemoryError, OutOfMemoryError, type(None)]


def test_a_thread_that_cannot_be_started_is_started_for_the_next_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine_model(FLAT)
    engine = TransformersEngine(model, max_slots=2)
    generator = TextGenerator(engine, model.config, model.tokenizer)

    def fail(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as short_of_threads:
        short_of_threads.setattr(Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            generator.generate(asks(FLAT)["short"].prompt, GREEDY)
    decoded = list[Any]()
    watch(engine, lambda stage, known: decoded.append(known) if stage == "decode" else None)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(generator.generate, asks(FLAT)["short"].prompt, GREEDY)
        assert call.result(PATIENCE).token_ids == alone(FLAT, "short").token_ids
    assert set(decoded) == {(0,)}, "the one that was refused is not worked on"


def test_an_error_lets_go_of_what_it_passed_through() -> None:
    """Else every failure would hold tensors and images until Python's next search for cycles."""
    engine, seen = PromptEngine(engine_model(FLAT), slots=1), list[Any]()

    def fail(stage: str, known: Any) -> None:
        if stage == "prefill":
            activations = torch.zeros(1000)
            seen.append(weakref.ref(activations))
            raise ValueError("a bug")

    engine.hook = fail
    generate, stream = engine._generator.generate, engine._generator.stream
    gc.disable()
    try:
        for how in (generate, lambda *given: list(stream(*given))):
            with pytest.raises(ValueError, match="a bug") as caught:
                how(asks(FLAT)["short"].prompt, GREEDY)
            del caught
        assert [activations() for activations in seen] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("midway", [False, True])
def test_an_answer_that_overflowed_harms_nobody_after_it(graphs: bool, midway: bool) -> None:
    """NaN in a masked position counts: zero times NaN is NaN."""
    model = engine_model(FLAT)
    engine = SteppedEngine(model, slots=2, graphs=graphs)
    prompt = asks(FLAT)["image"].prompt
    assert prompt.image is not None
    nan = torch.full((720, model.config.llama.hidden_size), float("nan"))
    overflowing = replace(prompt, image=replace(prompt.image, key="overflowing", tiles=None, embeddings=nan))
    bad = replace(asks(FLAT)["image"], prompt=overflowing)
    if midway:
        fault = Fault("logits", bug, 1)  # its keys are stored by then
        logits = engine._runner._logits

        def after_the_layers(hidden: torch.Tensor) -> torch.Tensor:
            fault("logits", None)
            return logits(hidden)

        engine._runner._logits = after_the_layers  # type: ignore[method-assign]
    found = answered(engine, [bad, *(asks(FLAT)[name] for name in ("short", "sampled", "short"))])
    assert (found[0].error is not None) == midway
    assert found[1:] == [alone(FLAT, name) for name in ("short", "sampled", "short")]


# --- anything, anywhere

FAULTS = st.tuples(st.sampled_from(STAGES), st.integers(1, 12), st.sampled_from((gpu_memory, cpu_memory, bug)))


@settings(max_examples=25)
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=5),
    faults=st.lists(FAULTS, min_size=1, max_size=4),
    arrivals=st.lists(st.tuples(st.integers(0, 3), st.none() | st.integers(0, 4)), min_size=5, max_size=5),
    slots=st.integers(1, 3),
    ahead=st.booleans(),
)
def test_faults_anywhere_leave_nobody_waiting_and_nothing_occupied(
    names: list[str],
    faults: list[tuple[str, int, Callable[[], Exception]]],
    arrivals: list[tuple[int, int | None]],
    slots: int,
    ahead: bool,
) -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=slots, ahead=ahead)
    armed = [Fault(stage, error, time) for stage, time, error in faults]

    def hook(stage: str, known: Any) -> None:
        for fault in armed:
            fault(stage, known)

    engine.hook = hook
    answers = list[Any]()
    for name, (turns, given_up) in zip(names, arrivals, strict=False):
        answers.append(engine.ask(asks(FLAT)[name]))
        engine.turn(turns)
        if given_up is not None and given_up < len(answers):
            answers[given_up].give_up()
    engine.finish()
    for answer, name in zip(answers, names, strict=False):
        found = outcome(answer)
        assert found.token_ids == alone(FLAT, name).token_ids[: len(found.token_ids)]
        assert found.error is not None or found.finish_reason == "cancelled" or found == alone(FLAT, name)
    engine.hook = lambda stage, known: None
    assert answered(engine, [asks(FLAT)[name] for name in ("image", "short")]) == [
        alone(FLAT, name) for name in ("image", "short")
    ]


def test_faults_anywhere_leave_no_thread_waiting() -> None:
    """The same through the engine's own thread, with callers on theirs."""
    model, dice = engine_model(FLAT), random.Random(4)
    engine = TransformersEngine(model, max_slots=3)
    generator = TextGenerator(engine, model.config, model.tokenizer)

    def hook(stage: str, known: Any) -> None:
        if dice.random() < 0.02:
            raise dice.choice((gpu_memory, cpu_memory, bug))()

    watch(engine, hook)

    def call(number: int) -> bool:
        name, ask = NAMES[number % len(NAMES)], asks(FLAT)[NAMES[number % len(NAMES)]]
        cancel = Event()
        try:
            if number % 3 == 0:
                for count, _ in enumerate(generator.stream(ask.prompt, ask.params, cancel=cancel)):
                    if count == number % 4:
                        break
                return True
            if number % 5 == 0:
                cancel.set()
            found = generator.generate(ask.prompt, ask.params, cancel=cancel)
        except (OutOfMemoryError, ValueError):
            return True
        return found.finish_reason == "cancelled" or found.token_ids == alone(FLAT, name).token_ids

    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(call, number) for number in range(40)]
        assert all(call.result(PATIENCE) for call in calls)
    dice.random = lambda: 1.0  # type: ignore[method-assign]
    assert call(7)
    assert sorted(engine._free) == [0, 1, 2] and not engine._running


EXIT = """
from dataclasses import replace
from tests.engine_turns import GREEDY, asks, engine_model
from pulse_ecg.engine.scheduler import TransformersEngine
from pulse_ecg.generation import TextGenerator
model = engine_model("flat")
stream = TextGenerator(TransformersEngine(model), model.config, model.tokenizer).stream(
    asks("flat")["short"].prompt, replace(GREEDY, max_new_tokens=1900)
)
next(iter(stream))
print("leaving")
"""


def test_a_process_ends_cleanly_in_the_middle_of_an_answer() -> None:
    """A thread that is killed inside torch would abort the whole process."""
    command = [sys.executable, "-c", EXIT]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=4 * PATIENCE, check=False)
    assert "leaving" in run.stdout
    assert run.returncode == 0, run.stderr[-300:]
