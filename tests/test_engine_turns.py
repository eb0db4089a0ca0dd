"""Turns: what is computed when, for whom, and that nothing is computed for those whom nobody waits for any more."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pulse_ecg import device
from pulse_ecg.engine import scheduler
from pulse_ecg.engine.runner import CHUNK, ModelRunner
from pulse_ecg.engine.scheduler import TransformersEngine
from pulse_ecg.errors import DeadlineExceededError
from pulse_ecg.generation import Answer, TextGenerator, Timings
from tests.conftest import ROOT
from tests.engine_turns import (
    GREEDY,
    PATIENCE,
    PromptEngine,
    SteppedEngine,
    alone,
    ask_about,
    asks,
    engine_model,
    one_thread,
    outcome,
    watch,
)

__all__ = ["one_thread"]  # a fixture that every test here uses

FLAT = "flat"
NAMES = ("short", "long", "image", "same size", "small image", "sampled")


def turns_of(engine: SteppedEngine) -> list[list[tuple[str, Any]]]:
    """The work, cut after each decode step."""
    turns: list[list[tuple[str, Any]]] = [[]]
    for item in engine.work:
        turns[-1].append(item)
        if item[0] == "decode":
            turns.append([])
    return turns


# --- sharing the device


@settings(max_examples=10)
@given(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), ahead=st.booleans())
def test_newcomers_cost_a_running_answer_one_chunk_a_token_at_most(names: list[str], ahead: bool) -> None:
    model = engine_model(FLAT)
    engine = SteppedEngine(model, slots=3, ahead=ahead)
    running = engine.ask(ask_about(model, "Is it a normal ECG?", params=replace(GREEDY, max_new_tokens=40)))
    engine.turn(2)
    others = [engine.ask(asks(FLAT)[name]) for name in names]
    engine.finish()
    shared = [turn for turn in turns_of(engine)[2:] if turn and turn[-1][0] == "decode" and 0 in turn[-1][1]]
    assert len(shared) >= 25, "the running answer had a token in each of them"
    for turn in shared:
        chunks = [end - start for _, (_, start, end) in (item for item in turn if item[0] == "prefill")]
        towers = [item for item in turn if item[0] == "tower"]
        assert sum(chunks) <= CHUNK
        assert len(towers) <= 1 and not (towers and chunks)
    assert len(outcome(running).token_ids) == 40
    assert [outcome(answer) for answer in others] == [alone(FLAT, name) for name in names]


def test_several_short_prompts_fit_one_turn() -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=8)
    answers = [engine.ask(asks(FLAT)["short"]) for _ in range(8)]
    engine.turn()
    length = asks(FLAT)["short"].prompt.length
    assert 8 * length <= CHUNK
    assert engine.work == [("prefill", (slot, 0, length)) for slot in range(8)] + [("decode", tuple(range(8)))]
    engine.finish()
    assert {tuple(outcome(answer).token_ids) for answer in answers} == {tuple(alone(FLAT, "short").token_ids)}


@settings(max_examples=8)
@given(names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=6), slots=st.integers(1, 4), ahead=st.booleans())
def test_first_come_first_served(names: list[str], slots: int, ahead: bool) -> None:
    """Nobody's first token comes before that of someone who asked earlier."""
    engine = SteppedEngine(engine_model(FLAT), slots=slots, ahead=ahead)
    answers = [engine.ask(asks(FLAT)[name]) for name in names]
    while not all(answer._count for answer in answers):
        engine.turn()
        begun = [answer._count > 0 for answer in answers]
        assert begun == sorted(begun, reverse=True)
    engine.finish()


def test_chunks_are_cut_where_the_prompt_says_and_at_the_image() -> None:
    """So the answer is computed from the same numbers whoever shares the turn."""
    prompt = asks(FLAT)["image"].prompt
    prefix = prompt.ids.index(-200) + 720
    for company in ([], ["short"], ["long", "sampled"]):
        engine = SteppedEngine(engine_model(FLAT), slots=4)
        for name in [*company, "image"]:
            engine.ask(asks(FLAT)[name])
        engine.finish()
        chunks = [known[1:] for stage, known in engine.work if stage == "prefill" and known[0] == len(company)]
        assert chunks == [(0, CHUNK), (CHUNK, prefix), (prefix, prompt.length)]


# --- ends before the end


def expire(answer: Answer, cancel: Event) -> None:
    answer._deadline = 0.0


def press_cancel(answer: Answer, cancel: Event) -> None:
    cancel.set()


def give_up(answer: Answer, cancel: Event) -> None:
    answer.give_up()


@pytest.mark.parametrize("end", [expire, press_cancel, give_up])
@pytest.mark.parametrize("ahead", [False, True])
def test_an_end_at_any_moment_frees_the_slot_and_computes_nothing_more(
    end: Callable[[Answer, Event], None], ahead: bool
) -> None:
    """The moments: waiting for a slot, before and after the tower, between chunks, while decoding, after the end."""
    engine, kinds_seen = SteppedEngine(engine_model(FLAT), slots=1, ahead=ahead), set[str]()
    for moment in range(12):
        engine._encoder._remembered.clear()
        engine._prefixes.clear()
        engine.ask(asks(FLAT)["short"])
        engine.turn(3)
        cancel = Event()
        answer = engine.ask(asks(FLAT)["image"], cancel=cancel)
        after = engine.ask(asks(FLAT)["sampled"])
        engine.turn(moment)
        before, count = list(engine.work), answer._count
        had_ended = answer not in [sequence.answer for sequence in engine._running] + [e[0] for e in engine._waiting]
        kinds_seen |= {stage for stage, _ in before}
        end(answer, cancel)
        engine.turn()
        assert all(sequence.answer is not answer for sequence in engine._running)
        assert all(entry[0] is not answer for entry in engine._waiting)
        assert answer._count == count
        engine.finish()
        found = outcome(answer)
        assert found.token_ids == alone(FLAT, "image").token_ids[: len(found.token_ids)]
        if not had_ended:
            assert (
                isinstance(found.error, DeadlineExceededError) if end is expire else found.finish_reason == "cancelled"
            )
        lost = [known for stage, known in engine.work[len(before) :] if stage == "prefill" and known[2] > 67]
        assert not lost, "chunks for an answer that had ended"
        assert outcome(after) == alone(FLAT, "sampled")
        engine.work.clear()
    assert kinds_seen == {"tower", "prefill", "decode"}


def test_an_answer_that_was_over_before_it_began_costs_nothing() -> None:
    engine, cancel = SteppedEngine(engine_model(FLAT), slots=2), Event()
    cancel.set()
    answers = [engine.ask(asks(FLAT)["image"], cancel=cancel), engine.ask(asks(FLAT)["image"], deadline=0.0)]
    engine.finish()
    assert not engine.work
    assert outcome(answers[0]).finish_reason == "cancelled"
    assert isinstance(outcome(answers[1]).error, DeadlineExceededError)


def close(held: list[Any]) -> None:
    held[0].close()


def drop_all(held: list[Any]) -> None:
    held.clear()


def drop_in_a_loop(held: list[Any]) -> None:
    held.pop()  # the iterator
    for _ in held.pop():
        break


@pytest.mark.parametrize("leave", [close, drop_all, drop_in_a_loop])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_stream_that_is_left_ends_the_answer(leave: Callable[[list[Any]], None], ahead: bool) -> None:
    engine = PromptEngine(engine_model(FLAT), slots=1, ahead=ahead)
    ask = ask_about(engine_model(FLAT), "Is it a normal ECG?", params=replace(GREEDY, max_new_tokens=40))
    stream = engine._generator.stream(ask.prompt, ask.params)
    held = [stream, iter(stream)]
    answer = stream._answer
    del stream
    next(held[1])
    assert engine.count("decode") >= 2
    leave(held)
    before = list(engine.work)
    engine.finish()
    assert engine.work == before
    assert answer.finish_reason == "cancelled"


def test_a_stream_is_closed_by_another_thread_than_the_one_that_reads_it() -> None:
    """A server notices that a client left while a thread of its own waits for the next token."""
    model = engine_model(FLAT)
    engine, second, closed = TransformersEngine(model, max_slots=1), Event(), Event()

    def stop_at_second(stage: str, known: Any) -> None:
        if stage == "decode":
            second.set()
            assert closed.wait(PATIENCE)

    watch(engine, stop_at_second)
    generator = TextGenerator(engine, model.config, model.tokenizer)
    stream = generator.stream(asks(FLAT)["short"].prompt, replace(GREEDY, max_new_tokens=500))
    steps = list[Any]()
    reader = threading.Thread(target=lambda: steps.extend(stream))
    reader.start()
    assert second.wait(PATIENCE)
    stream.close()
    closed.set()
    reader.join(PATIENCE)
    assert not reader.is_alive()
    assert len(steps) <= 2 and stream.finish_reason == "cancelled"


def test_a_closed_stream_that_was_never_read_asks_for_nothing() -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=1)
    stream = engine._generator.stream(asks(FLAT)["short"].prompt, GREEDY)
    stream.close()
    assert list(stream) == []
    engine.finish()
    assert not engine.work


# --- times, and the thread


@pytest.mark.parametrize("ahead", [False, True])
def test_times_are_told_by_stage(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, clock = SteppedEngine(engine_model(FLAT), slots=1, ahead=ahead), [1000.0]
    costs = {"tower": 100.0, "prefill": 10.0, "decode": 1.0}

    def tick(stage: str, known: Any) -> None:
        clock[0] += costs.get(stage, 0.0)

    engine.hook = tick
    for module in (scheduler, device):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    image, short = engine.ask(asks(FLAT)["image"]), engine.ask(asks(FLAT)["short"])
    engine.finish()
    late = 2.0 if ahead else 0.0  # a token is handed out after the decode steps of its own turn and of the next
    assert image.timings == Timings(queue=0.0, vision=100.0, prefill=30.0 + late, decode=5.0 - late)
    assert short.timings == Timings(queue=135.0, vision=0.0, prefill=10.0 + late, decode=5.0 - late)


def test_the_thread_ends_when_idle_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_IDLE_SECONDS", 0.01)
    model, threads = engine_model(FLAT), list[threading.Thread]()
    engine = TransformersEngine(model, max_slots=2)
    generator = TextGenerator(engine, model.config, model.tokenizer)
    for _ in range(3):
        stream = generator.stream(asks(FLAT)["short"].prompt, GREEDY)
        steps = iter(stream)
        next(steps)
        thread = engine._thread
        assert thread is not None and thread not in threads
        assert [step.token_id for step in steps] == alone(FLAT, "short").token_ids[1:]
        thread.join(PATIENCE)
        assert not thread.is_alive() and engine._thread is None
        threads.append(thread)


def test_answers_that_come_as_the_thread_goes_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_IDLE_SECONDS", 0.0)
    model = engine_model(FLAT)
    engine = TransformersEngine(model, max_slots=2)
    params = replace(GREEDY, max_new_tokens=1)
    for _ in range(50):
        stream = TextGenerator(engine, model.config, model.tokenizer).stream(asks(FLAT)["short"].prompt, params)
        assert [step.token_id for step in stream] == alone(FLAT, "short").token_ids[:1]


@pytest.mark.parametrize("moment", ["idle", "answering", "freeing"])
def test_the_interpreter_ends_after_the_thread(moment: str) -> None:
    """A thread that is killed inside torch aborts the process; the engine's last reference may be its thread's."""
    code = f"""
import threading, time
from tests.engine_turns import *
from pulse_ecg.engine import scheduler

class Slow:
    def __del__(self):
        freeing.set()
        time.sleep(0.5)
        print("freed", flush=True)

freeing, model = threading.Event(), load_engine_model("flat")
scheduler._IDLE_SECONDS = 0.2 if {moment!r} == "freeing" else 1e6
engine = TransformersEngine(model, max_slots=2)
params = replace(GREEDY, max_new_tokens=1000 if {moment!r} == "answering" else 1)
stream = TextGenerator(engine, model.config, model.tokenizer).stream(asks("flat")["short"].prompt, params)
print(len([next(iter(stream))]), "token", flush=True)
engine.slow = Slow()
if {moment!r} == "freeing":
    del engine, stream
    print(freeing.wait({PATIENCE}), flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=3 * PATIENCE
    )
    said = ["1 token", *(["True", "freed"] if moment == "freeing" else [])]
    assert (done.returncode, done.stdout.splitlines()[: len(said)]) == (0, said), done.stderr


def test_everything_happens_on_the_models_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, events and graphs belong to the thread's current GPU, which is the first one unless it is told."""
    happened, model = list[str](), engine_model(FLAT)

    @contextmanager
    def noted(chosen: torch.device) -> Iterator[None]:
        assert chosen == model.device
        happened.append("on")
        yield
        happened.append("off")

    monkeypatch.setattr(scheduler, "current", noted)
    monkeypatch.setattr(ModelRunner, "capture", lambda runner: happened.append("capture"))
    engine = SteppedEngine(model, slots=1)
    engine.hook = lambda stage, known: happened.append(stage)
    engine.ask(asks(FLAT)["short"])
    engine.finish()
    assert happened[:4] == ["on", "capture", "off", "on"]
    assert happened[-1] == "off" and happened.count("off") == 2
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device", lambda device: (device, "current"))
    assert device.current(torch.device("cuda", 1)) == (torch.device("cuda", 1), "current")
    assert isinstance(device.current(torch.device("cpu")), nullcontext)
