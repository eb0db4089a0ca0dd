"""An answer does not depend on its company: on who else is at work, came before, joins, leaves, or shares its image."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Event

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pulse_ecg.engine.scheduler import TransformersEngine
from pulse_ecg.generation import Answer, TextGenerator
from tests.engine_turns import (
    GREEDY,
    PATIENCE,
    SAMPLED,
    Outcome,
    SteppedEngine,
    alone,
    answered,
    ask_about,
    asks,
    engine_model,
    load_engine_model,
    one_thread,
    outcome,
)

KINDS = ("flat", "grouped")
__all__ = ["one_thread"]  # a fixture that every test here uses

NAMES = ("short", "long", "sampled", "image", "image again", "same size", "small image", "other system")


@pytest.mark.parametrize("kind", KINDS)
def test_alone_it_is_the_answer_of_transformers_own_generate(kind: str) -> None:
    """Slots, chunks and masks of ours against the library's attention and cache."""
    network = load_engine_model(kind).network
    assert network.language_model.config._attn_implementation == "sdpa"
    for name in ("short", "long", "image", "other system"):
        ask = replace(asks(kind)[name], params=GREEDY)
        image, features = ask.prompt.image, None
        with torch.inference_mode():
            if image is not None and image.tiles is not None:
                features = network.encode_tiles(torch.from_numpy(image.tiles.pixels_TCHW))
                features = network.merge(features, torch.from_numpy(image.order))
            prompt = network.embed(ask.prompt.ids, features)
            theirs = network.language_model.generate(
                inputs_embeds=prompt,
                attention_mask=torch.ones(prompt.shape[:2]),
                max_new_tokens=GREEDY.max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        ours = answered(SteppedEngine(engine_model(kind), slots=1), [ask])[0]
        assert ours.token_ids == theirs[0].tolist()


def test_what_is_no_token_is_never_said() -> None:
    """Though a table's padding be likelier than all else: it would be text that nobody sees, up to the limit."""
    model = load_engine_model("padded")
    expected = answered(SteppedEngine(model, slots=2), [ask_about(model, "Rate?"), asks("flat")["sampled"]])
    model = load_engine_model("padded")
    model.network.language_model.lm_head.weight[model.vocabulary :, 0] = 40.0
    found = answered(SteppedEngine(model, slots=2), [ask_about(model, "Rate?"), asks("flat")["sampled"]])
    assert found == expected
    assert all(max(answer.token_ids) < model.tokenizer.size for answer in found)


def test_the_requests_of_these_tests_are_answered_differently() -> None:
    """Else a mix-up would go unnoticed."""
    for kind in KINDS:
        answers = [alone(kind, name) for name in NAMES]
        assert len({tuple(found.token_ids) for found in answers}) == len(NAMES)
        assert all(found.error is None for found in answers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("slots", "how"),
    [(1, {}), (2, {"ahead": True, "graphs": True}), (3, {"ahead": True}), (8, {"graphs": True})],
    ids=str,
)
def test_all_at_once_is_each_alone(kind: str, slots: int, how: dict[str, bool]) -> None:
    engine = SteppedEngine(engine_model(kind), slots=slots, **how)
    expected = [alone(kind, name) for name in NAMES]
    assert answered(engine, [asks(kind)[name] for name in NAMES]) == expected
    assert answered(engine, [asks(kind)[name] for name in reversed(NAMES)]) == expected[::-1], "remembered images"


@dataclass(frozen=True)
class Arrival:
    """A request that comes some turns after the one before, and is cancelled after some more, or never."""

    name: str
    later: int
    cancelled_after: int | None
    whole: bool


ARRIVALS = st.builds(
    Arrival,
    name=st.sampled_from(NAMES),
    later=st.integers(0, 4),
    cancelled_after=st.none() | st.none() | st.integers(0, 8),
    whole=st.booleans(),
)


def run_schedule(engine: SteppedEngine, kind: str, arrivals: list[Arrival]) -> list[tuple[Arrival, Answer]]:
    """Let requests come and go as scheduled."""
    begun = list[tuple[Arrival, Answer]]()
    cancels = list[tuple[int, Event]]()
    turn = 0
    for arrival in arrivals:
        for _ in range(arrival.later):
            engine.turn()
            turn += 1
            [cancel.set() for due, cancel in cancels if due <= turn]
        cancel = Event()
        if arrival.cancelled_after is not None:
            cancels.append((turn + arrival.cancelled_after, cancel))
        begun.append((arrival, engine.ask(asks(kind)[arrival.name], whole=arrival.whole, cancel=cancel)))
    while engine._waiting or engine._running or engine._on_the_way:
        [cancel.set() for due, cancel in cancels if due <= turn]
        engine.turn()
        turn += 1
    engine.finish()
    return begun


@settings(max_examples=15)
@given(
    kind=st.sampled_from(KINDS),
    slots=st.sampled_from((1, 2, 3, 8)),
    ahead=st.booleans(),
    graphs=st.booleans(),
    arrivals=st.lists(ARRIVALS, min_size=2, max_size=5),
)
def test_whoever_comes_and_goes(kind: str, slots: int, ahead: bool, graphs: bool, arrivals: list[Arrival]) -> None:
    engine = SteppedEngine(engine_model(kind), slots=slots, ahead=ahead, graphs=graphs)
    for arrival, answer in run_schedule(engine, kind, arrivals):
        found, expected = outcome(answer), alone(kind, arrival.name)
        if arrival.cancelled_after is None:
            assert found == expected
        else:
            assert found.error is None
            assert found.token_ids == expected.token_ids[: len(found.token_ids)]
            assert expected.text.startswith(found.text)
            assert found.finish_reason == "cancelled" or found == expected


def test_seeds_are_each_answers_own() -> None:
    model, seeds = engine_model("flat"), (0, 1, 2, 11, 2**63 - 1)
    requests = [ask_about(model, "Rate?", params=replace(SAMPLED, seed=seed)) for seed in seeds]
    each = [answered(SteppedEngine(model, slots=1), [request])[0] for request in requests]
    assert len({tuple(found.token_ids) for found in each}) == len(seeds)
    for slots, how in ((2, {}), (5, {"ahead": True})):
        assert answered(SteppedEngine(model, slots=slots, **how), requests) == each


@pytest.mark.parametrize("ahead", [False, True])
def test_many_more_answers_than_slots(ahead: bool) -> None:
    model = engine_model("flat")
    topics = ("Rate", "Rhythm", "Axis", "Infarction", "Block", "Pacing", "QT", "ST", "Sinus")
    requests = [ask_about(model, f"{topic}?", params=replace(GREEDY, max_new_tokens=3)) for topic in topics]
    each = [answered(SteppedEngine(model, slots=1), [request])[0] for request in requests]
    assert len({tuple(found.token_ids) for found in each}) > 4
    engine = SteppedEngine(model, slots=3, ahead=ahead)
    assert answered(engine, requests * 5) == each * 5


def cut(free: Outcome, stop: str) -> str:
    return free.text[: free.text.index(stop)].strip()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_ends_of_all_kinds_at_once(ahead: bool, whole: bool) -> None:
    model, params = engine_model("flat"), replace(GREEDY, max_new_tokens=20)
    questions = ["Rate?", "Rhythm?", "Is there an infarction?", "Axis?"]
    asked = [ask_about(model, question, params=params) for question in questions]
    free = [answered(SteppedEngine(model, slots=1), [ask])[0] for ask in asked]
    stops = [found.text[at : at + 4] for at, found in zip((3, 8, 20), free, strict=False)]
    ending = next(token for token in free[3].token_ids[4:] if token not in {t for f in free[:3] for t in f.token_ids})
    ends = replace(model, config=replace(model.config, eos_ids=frozenset({ending})))
    requests = [replace(ask, params=replace(params, stop=(stop,))) for ask, stop in zip(asked, stops, strict=False)]
    requests += [asked[3], replace(asked[0], params=replace(params, max_new_tokens=2)), asked[0]]
    found = answered(SteppedEngine(ends, slots=4, ahead=ahead), requests, whole=whole)
    assert [f.finish_reason for f in found] == ["stop", "stop", "stop", "eos", "length", "length"]
    assert [f.text for f in found[:3]] == [cut(f, stop) for f, stop in zip(free, stops, strict=False)]
    assert found[3].token_ids == free[3].token_ids[: free[3].token_ids.index(ending) + 1]
    assert found[4].token_ids == free[0].token_ids[:2]
    assert found[5] == free[0]


def test_what_was_computed_reaches_its_caller_though_the_next_step_fails() -> None:
    model = engine_model("flat")
    engine, steps = SteppedEngine(model, slots=2, ahead=True), itertools.count(1)

    def fail(stage: str, _: object) -> None:
        if stage == "decode" and next(steps) == 2:
            raise RuntimeError("a bug")

    engine.hook = fail
    short, long = (
        engine.ask(ask_about(model, "Rate?", params=replace(GREEDY, max_new_tokens=count))) for count in (2, 9)
    )
    engine.finish()
    assert [step.finish_reason for step in short.receive()] == [None, "length"]
    with pytest.raises(RuntimeError, match="a bug"):
        list(long.receive())


@pytest.mark.parametrize("ahead", [False, True])
def test_callers_on_threads_get_what_each_would_get_alone(ahead: bool) -> None:
    """Through the engine's own thread, streamed and whole."""
    model = engine_model("flat")
    engine = TransformersEngine(model, max_slots=3)
    engine._ahead = ahead
    generator = TextGenerator(engine, model.config, model.tokenizer)

    def whole(name: str) -> list[int]:
        return generator.generate(asks("flat")[name].prompt, asks("flat")[name].params).token_ids

    def streamed(name: str) -> list[int]:
        return [step.token_id for step in generator.stream(asks("flat")[name].prompt, asks("flat")[name].params)]

    with ThreadPoolExecutor(8) as threads:
        calls = [(threads.submit(how, name), name) for name in NAMES for how in (whole, streamed)]
        for call, name in calls:
            assert call.result(PATIENCE) == alone("flat", name).token_ids
    assert sorted(engine._free) == [0, 1, 2]
