"""What every engine answers, whichever it is: one suite for all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pulse_ecg.analyzer import EcgAnalyzer
from pulse_ecg.engine.vision import ImageEncoder
from pulse_ecg.errors import DeadlineExceededError, OutOfMemoryError, PromptTooLongError
from pulse_ecg.fetch import FetchPolicy
from pulse_ecg.generation import AnswerStream, Generation
from pulse_ecg.params import GenerationParams, load_defaults
from pulse_ecg.request import AnalysisRequest, parse_input
from tests.conftest import ROOT
from tests.engine_turns import picture
from tests.engines import ENGINES, running

GREEDY = replace(load_defaults(ROOT), do_sample=False, max_new_tokens=24, stop=())
SAMPLED = replace(GREEDY, do_sample=True, temperature=1.5, top_p=1.0, top_k=0, seed=3)
PATIENCE = 60.0


@pytest.fixture(scope="module", params=ENGINES)
def analyzer(request: pytest.FixtureRequest, demo_checkpoint: Path) -> Iterator[EcgAnalyzer]:
    """On each engine in turn; never more answers at once than three."""
    with running(request.param, demo_checkpoint, max_concurrent_requests=3) as analyzer:
        yield analyzer


@pytest.fixture(scope="module")
def reference(demo_checkpoint: Path) -> Iterator[EcgAnalyzer]:
    """On the transformers engine."""
    with running("transformers", demo_checkpoint) as analyzer:
        yield analyzer


def ask(
    analyzer: EcgAnalyzer, params: GenerationParams, image: Image.Image | None = None, question: str = "Rate?"
) -> Generation:
    inputs = {"query": question, "image": image} if image else question
    return analyzer.analyze(parse_input(inputs, params)).generation


def length_of(analyzer: EcgAnalyzer, image: Image.Image | None) -> int:
    return analyzer.prepare(parse_input({"query": "Rate?", "image": image} if image else "Rate?", GREEDY)).prompt.length


def with_config(analyzer: EcgAnalyzer, **changes: Any) -> EcgAnalyzer:
    """The same engine for a model whose config says something else."""
    model = replace(analyzer.model, config=replace(analyzer.model.config, **changes))
    return EcgAnalyzer(model, FetchPolicy(), engine=analyzer._generator.engine)


# --- the same answers


def test_greedy_answers_are_those_of_the_transformers_engine(analyzer: EcgAnalyzer, reference: EcgAnalyzer) -> None:
    """With a penalty too, and on an engine whose places were used before."""
    for penalty in (1.0, 1.05, 1.3, 2.0):
        params = replace(GREEDY, repetition_penalty=penalty)
        for image in (None, picture(1), picture(2, (600, 300))):
            for question in ("Rate?", "Is there an ST elevation? " * 9):
                ours, theirs = (ask(which, params, image, question) for which in (analyzer, reference))
                assert ours.token_ids == theirs.token_ids
                assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)


def test_another_image_changes_the_answer(analyzer: EcgAnalyzer) -> None:
    answers = {tuple(ask(analyzer, GREEDY, picture(seed)).token_ids) for seed in range(4)}
    assert len(answers) == 4
    assert tuple(ask(analyzer, GREEDY).token_ids) not in answers


def test_a_second_question_about_an_image_needs_no_tower(
    analyzer: EcgAnalyzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(5)
    first = ask(analyzer, GREEDY, image)
    monkeypatch.setattr(type(analyzer.model.network), "encode_tiles", lambda *_: pytest.fail("encoded again"))
    again, other = ask(analyzer, GREEDY, image), ask(analyzer, GREEDY, image, "Axis?")
    assert again.token_ids == first.token_ids != other.token_ids


def test_an_image_object_is_answered_like_its_file(analyzer: EcgAnalyzer) -> None:
    request = parse_input(picture(), GREEDY)
    assert isinstance(request, AnalysisRequest)
    theirs = ask(analyzer, GREEDY, picture(), request.conversation.question)
    assert analyzer.analyze(request).generation.token_ids == theirs.token_ids


@pytest.mark.parametrize(
    "params", [GREEDY, SAMPLED, replace(SAMPLED, stop=("e", "ST"))], ids=["greedy", "sampled", "stop"]
)
@pytest.mark.parametrize("with_image", [True, False])
def test_the_stream_joined_is_the_answer(analyzer: EcgAnalyzer, params: GenerationParams, with_image: bool) -> None:
    request = parse_input({"query": "Rate?", "image": picture()} if with_image else "Rate?", params)
    steps = list(analyzer.stream(analyzer.prepare(request)))
    whole = analyzer.analyze(request).generation
    assert "".join(step.text for step in steps) == whole.text
    assert [step.token_id for step in steps] == whole.token_ids
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].finish_reason == whole.finish_reason
    assert whole.text == whole.text.strip()


# --- sampling


@pytest.mark.parametrize("seed", [0, 17, 2**63 - 1])
def test_the_same_seed_gives_the_same_answer(analyzer: EcgAnalyzer, seed: int) -> None:
    params = replace(SAMPLED, seed=seed)
    first, second = ask(analyzer, params, picture()), ask(analyzer, params, picture())
    assert first.token_ids == second.token_ids
    assert first.seed == seed
    assert ask(analyzer, replace(SAMPLED, seed=1000), picture()).token_ids != first.token_ids


def test_without_a_seed_answers_vary_and_can_be_repeated(analyzer: EcgAnalyzer) -> None:
    params = replace(SAMPLED, seed=None)
    first, second = ask(analyzer, params), ask(analyzer, params)
    assert first.token_ids != second.token_ids
    assert ask(analyzer, replace(params, seed=first.seed)).token_ids == first.token_ids
    assert first.seed is not None and 0 <= first.seed < 2**53  # JavaScript's numbers are exact so far


@pytest.mark.parametrize(
    "params",
    [replace(GREEDY, do_sample=True, temperature=0.0), replace(SAMPLED, top_k=1), replace(SAMPLED, top_p=0.01)],
    ids=["zero temperature", "top one", "the likeliest hundredth"],
)
def test_what_leaves_one_token_to_choose_is_greedy(analyzer: EcgAnalyzer, params: GenerationParams) -> None:
    assert ask(analyzer, params).token_ids == ask(analyzer, GREEDY).token_ids


# --- ends


def test_max_new_tokens_ends_the_answer_with_length(analyzer: EcgAnalyzer) -> None:
    longer = ask(analyzer, GREEDY)
    for limit in (1, 2, 7):
        shorter = ask(analyzer, replace(GREEDY, max_new_tokens=limit))
        assert shorter.token_ids == longer.token_ids[:limit]
        assert shorter.finish_reason == "length"


def test_end_of_sequence_ends_the_answer_and_is_not_shown(analyzer: EcgAnalyzer) -> None:
    free = ask(analyzer, GREEDY)
    ending = free.token_ids[5]
    cut = ask(with_config(analyzer, eos_ids=frozenset({ending})), GREEDY)
    at = free.token_ids.index(ending)
    assert cut.token_ids == free.token_ids[: at + 1]
    assert cut.finish_reason == "eos"
    assert cut.text == analyzer.model.tokenizer.decode(free.token_ids[:at]).strip()


def test_a_stop_string_cuts_wherever_tokens_fall(analyzer: EcgAnalyzer) -> None:
    free = ask(analyzer, GREEDY)
    for start in range(0, len(free.text) - 5, 3):
        stop = free.text[start : start + 5]
        cut = ask(analyzer, replace(GREEDY, stop=(stop,)))
        assert cut.finish_reason == "stop"
        assert cut.text == free.text[: free.text.index(stop)].strip()
        assert len(cut.token_ids) <= len(free.token_ids)


@pytest.mark.parametrize("image", [None, picture()], ids=["text", "image"])
class TestPositions:
    """Prompt, image and answer share the context."""

    def limited(self, analyzer: EcgAnalyzer, positions: int) -> EcgAnalyzer:
        llama = analyzer.model.config.llama
        llama = type(llama)(**llama.to_dict() | {"max_position_embeddings": positions})
        return with_config(analyzer, llama=llama)

    def test_the_answer_is_cut_to_what_is_left(self, analyzer: EcgAnalyzer, image: Image.Image | None) -> None:
        free, length = ask(analyzer, GREEDY, image), length_of(analyzer, image)
        for left in (1, 3):
            cut = ask(self.limited(analyzer, length + left), GREEDY, image)
            assert cut.token_ids == free.token_ids[:left]
            assert cut.finish_reason == "length"

    def test_a_prompt_that_leaves_no_room_is_refused_with_its_length(
        self, analyzer: EcgAnalyzer, image: Image.Image | None
    ) -> None:
        length = length_of(analyzer, image)
        with pytest.raises(PromptTooLongError, match=f"{length:,} tokens"):
            ask(self.limited(analyzer, length), GREEDY, image)


def test_the_last_position_can_be_used(analyzer: EcgAnalyzer) -> None:
    """Of the model's own context, which the engine knows too."""
    filling = "a " * 4200
    while len(filling) > 0:
        try:
            found = ask(analyzer, GREEDY, question=filling)
        except PromptTooLongError as error:
            filling = filling[: -2 * max(1, int(str(error).split()[3].replace(",", "")) - 4093)]
        else:
            assert found.finish_reason == "length"
            assert 0 < len(found.token_ids) < GREEDY.max_new_tokens
            return
    pytest.fail("nothing fits")


# --- leaving early


def test_cancelling_ends_within_a_token(analyzer: EcgAnalyzer) -> None:
    cancel = threading.Event()
    stream = analyzer.stream(analyzer.prepare(parse_input("Rate?", GREEDY)), cancel=cancel)
    steps = []
    for step in stream:
        steps.append(step)
        if len(steps) == 3:
            cancel.set()
    assert len(steps) == 3
    assert stream.finish_reason == "cancelled"


def test_who_waits_for_a_place_can_be_cancelled_and_frees_it(analyzer: EcgAnalyzer) -> None:
    """More answers than places, all dropped in the middle: the next one is answered at once."""
    expected, cancel = ask(analyzer, GREEDY).token_ids, threading.Event()
    endless = replace(GREEDY, max_new_tokens=2048)
    streams = [analyzer.stream(analyzer.prepare(parse_input(f"{n}?", endless)), cancel=cancel) for n in range(12)]
    begun = threading.Event()

    def drained(stream: AnswerStream) -> int:
        steps = []
        for step in stream:
            begun.set()
            steps.append(step)
        return len(steps)

    with ThreadPoolExecutor(len(streams)) as threads:
        running_s = [threads.submit(drained, stream) for stream in streams]
        assert begun.wait(PATIENCE)
        cancel.set()
        counts = [future.result(PATIENCE) for future in running_s]
    assert max(counts) < 2048
    assert [stream.finish_reason for stream in streams].count("cancelled") >= 4
    assert counts.count(0) >= 2, "some were waiting"
    assert ask(analyzer, GREEDY).token_ids == expected


def test_a_deadline_that_has_passed_ends_the_answer(analyzer: EcgAnalyzer) -> None:
    prepared = analyzer.prepare(parse_input("Rate?", GREEDY))
    with pytest.raises(DeadlineExceededError, match="in time"):
        analyzer.answer(prepared, deadline=time.monotonic() - 1)
    assert analyzer.answer(prepared, deadline=time.monotonic() + 60).text


def test_a_deadline_ends_an_answer_in_the_middle(analyzer: EcgAnalyzer) -> None:
    longest = replace(GREEDY, max_new_tokens=2048)
    prepared = analyzer.prepare(parse_input("Rate?", longest))
    with pytest.raises(DeadlineExceededError, match="in time"):
        analyzer.answer(prepared, deadline=time.monotonic() + 0.3)


def test_nothing_is_computed_before_the_first_token_is_asked_for(
    analyzer: EcgAnalyzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[object] = []
    engine = type(analyzer._generator.engine)
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda this, answer: taken.append(answer) or submit(this, answer))
    stream = analyzer.stream(analyzer.prepare(parse_input("Rate?", GREEDY)))
    assert not taken
    next(iter(stream))
    assert len(taken) == 1
    stream.close()


# --- failures and company


def out_of_gpu_memory(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory at /secret")


def out_of_cpu_memory(*_: object) -> torch.Tensor:
    return torch.empty(10**15)  # torch's own refusal, in its own words


@pytest.mark.parametrize(("fail", "unseen"), [(out_of_gpu_memory, 91), (out_of_cpu_memory, 92)])
def test_a_tower_without_memory_fails_the_request_alone(
    analyzer: EcgAnalyzer, monkeypatch: pytest.MonkeyPatch, fail: Any, unseen: int
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(ImageEncoder, "_encode_new", fail)
        with pytest.raises(OutOfMemoryError, match="no memory left") as caught:
            ask(analyzer, GREEDY, picture(unseen))
        assert ask(analyzer, GREEDY).text
    assert "secret" not in str(caught.value)
    assert ask(analyzer, GREEDY, picture(unseen)).text


def test_other_errors_are_not_taken_for_memory(analyzer: EcgAnalyzer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ImageEncoder, "_encode_new", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        ask(analyzer, GREEDY, picture(93))
    assert analyzer.engine_alive


def test_threads_do_not_disturb_each_other(analyzer: EcgAnalyzer) -> None:
    """Twice as many callers as places, with and without images, some of them sharing one."""
    asked = [(f"Question {n}?", picture(n % 3) if n % 2 else None) for n in range(6)]
    alone = [ask(analyzer, GREEDY, image, question).token_ids for question, image in asked]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda item: ask(analyzer, GREEDY, item[1], item[0]).token_ids, asked))
    assert together == alone


def test_timings_tell_the_stages(analyzer: EcgAnalyzer) -> None:
    fresh = ask(analyzer, GREEDY, picture(71)).timings
    known = ask(analyzer, GREEDY, picture(71)).timings
    assert fresh.vision > 0 and fresh.prefill > 0 and fresh.decode > 0 and fresh.queue >= 0
    assert known.vision < fresh.vision
