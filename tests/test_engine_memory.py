"""What the engine remembers is bounded, never mixed up, and never changes an answer; what it allocates fits."""

from __future__ import annotations

import gc
import logging
import resource
import threading
import weakref
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from pulse_ecg.analyzer import EcgAnalyzer
from pulse_ecg.engine import memory, scheduler, vision
from pulse_ecg.engine.lru import Lru
from pulse_ecg.engine.memory import free_bytes, plan
from pulse_ecg.engine.prefixes import PrefixCache, prefix_key, prefix_length
from pulse_ecg.engine.scheduler import TransformersEngine
from pulse_ecg.engine.slots import KeyValueSlots, slot_bytes
from pulse_ecg.engine.vision import TILES_PER_PASS, ImageEncoder, first_pass
from pulse_ecg.fetch import FetchPolicy
from pulse_ecg.generation import TextGenerator
from pulse_ecg.request import parse_input
from tests.engine_turns import (
    GREEDY,
    PATIENCE,
    SteppedEngine,
    alone,
    answered,
    asks,
    engine_model,
    one_thread,
    outcome,
    picture,
)

__all__ = ["one_thread"]  # a fixture that every test here uses

FLAT, CPU, GIB = "flat", torch.device("cpu"), 2**30


# --- images and prefixes


def chunks(engine: SteppedEngine) -> list[tuple[int, int]]:
    return [known[1:] for stage, known in engine.work if stage == "prefill"]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_second_question_about_an_image_costs_its_own_words_alone(ahead: bool) -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=2, ahead=ahead)
    prefix = prefix_length(asks(FLAT)["image"].prompt)
    assert answered(engine, [asks(FLAT)["image"]]) == [alone(FLAT, "image")]
    assert (engine.count("tower"), chunks(engine)[-1][1]) == (1, asks(FLAT)["image"].prompt.length)
    for name in ("image again", "image"):
        engine.work.clear()
        assert answered(engine, [asks(FLAT)[name]]) == [alone(FLAT, name)]
        assert engine.count("tower") == 0
        assert chunks(engine) == [(prefix, asks(FLAT)[name].prompt.length)]


def test_an_image_that_the_engine_knows_is_not_even_tiled_again() -> None:
    model = engine_model(FLAT)
    engine = SteppedEngine(model, slots=1)
    analyzer = EcgAnalyzer(model, FetchPolicy(), engine=engine)
    request = parse_input({"query": "Rate?", "image": picture(1)}, GREEDY)
    first = analyzer.prepare(request).prompt
    assert answered(engine, [replace(asks(FLAT)["image"], prompt=first)]) == [alone(FLAT, "image")]
    second = analyzer.prepare(request).prompt
    assert second.image is not None and second.image.tiles is None
    engine._encoder._remembered.clear()
    engine._prefixes.clear()
    assert answered(engine, [replace(asks(FLAT)["image"], prompt=second)]) == [alone(FLAT, "image")], "it came along"
    assert engine.count("tower") == 1


def test_the_same_image_asked_about_by_several_at_once_is_computed_once() -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=4)
    names = ("image", "image again", "image", "image again")
    assert answered(engine, [asks(FLAT)[name] for name in names]) == [alone(FLAT, name) for name in names]
    assert [known for stage, known in engine.work if stage == "tower"] == [5]
    assert [start for start, _ in chunks(engine)].count(0) == 1


def test_a_prefix_is_known_by_its_image_and_all_that_stands_before_it() -> None:
    """Another system sentence or another image of the same size is another prefix."""
    keys = {name: prefix_key(asks(FLAT)[name].prompt) for name in asks(FLAT)}
    assert keys["short"] is None and keys["long"] is None
    assert keys["image"] == keys["image again"]
    assert len({keys[name] for name in ("image", "same size", "small image", "other system")}) == 4
    assert prefix_length(asks(FLAT)["image"].prompt) == prefix_length(asks(FLAT)["same size"].prompt)
    engine = SteppedEngine(engine_model(FLAT), slots=2)
    for name in ("image", "same size", "other system", "image"):
        assert answered(engine, [asks(FLAT)[name]]) == [alone(FLAT, name)]


def test_images_that_prompts_hold_are_bounded_though_they_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each of many waiting questions could keep embeddings of its own on the device."""
    image = asks(FLAT)["small image"].prompt.image
    assert image is not None
    encoder, tensors, held = ImageEncoder(engine_model(FLAT)), list[Any](), list[Any]()
    size = len(image.order) * engine_model(FLAT).config.llama.hidden_size * 4
    encoder._remembered = Lru(max_bytes=2 * size, max_entries=9)
    monkeypatch.setattr(vision, "_RECALLED_BYTES", 3 * size)
    for number in range(9):
        with torch.inference_mode():
            tensors.append(weakref.ref(encoder.encode([replace(image, key=str(number))])[0]))
        held += [encoder.recall(str(number)), encoder.recall(str(number))]
        assert sum(tensor().nbytes for tensor in tensors if tensor() is not None) <= (2 + 3) * size
    assert [prompt is not None for prompt in held] == [True] * 6 + [False] * 12
    assert held[0] is held[1] is encoder.recall("0"), "as long as it is held anyway"
    assert encoder.recall("8") is None
    del held[:2]
    assert encoder.recall("8") is not None and encoder.recall("0") is None


def test_what_was_forgotten_is_computed_again() -> None:
    model = engine_model(FLAT)
    engine = SteppedEngine(model, slots=2)
    largest = prefix_length(asks(FLAT)["image"].prompt) * engine.slots.position_bytes
    engine._prefixes._copies = Lru(max_bytes=largest, max_entries=9)
    engine._encoder._remembered = Lru(max_bytes=2**30, max_entries=1)
    for name in ("image", "same size", "image", "small image", "image again"):
        assert answered(engine, [asks(FLAT)[name]]) == [alone(FLAT, name)]
        assert engine._prefixes._copies.bytes <= largest
        assert len(engine._encoder._remembered) == 1
    assert engine.count("tower") == 5


def test_prefixes_that_fit_nowhere_are_not_kept() -> None:
    engine = SteppedEngine(engine_model(FLAT), slots=2)
    engine._prefixes = PrefixCache(engine.slots, 1000)
    for name in ("image", "image again"):
        assert answered(engine, [asks(FLAT)[name]]) == [alone(FLAT, name)]
    assert len(engine._prefixes._copies) == 0


def test_a_prefix_takes_no_more_memory_than_it_is_counted_with() -> None:
    """Neither for good nor for a moment: it is copied when memory is short."""
    slots = KeyValueSlots(engine_model(FLAT).config.llama, count=2, positions=1024, device=CPU, dtype=torch.float32)
    for tensor in (*slots.keys_SHLD, *slots.values_SHLD):
        tensor.normal_()
    taken: dict[int, int] = {}

    class Taken(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                    taken[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return result

    known = {t.untyped_storage().data_ptr() for t in (*slots.keys_SHLD, *slots.values_SHLD)}
    with Taken():
        copy = slots.read(1, 700)
    assert sum(taken.values()) == copy.nbytes == 700 * slots.position_bytes
    slots.write(0, copy)
    for tensor in (*slots.keys_SHLD, *slots.values_SHLD):
        assert torch.equal(tensor[0, :, :700], tensor[1, :, :700])
        assert not torch.equal(tensor[0, :, 700], tensor[1, :, 700])


def test_images_encoded_together_are_those_encoded_alone() -> None:
    names = ("image", "small image", "image", "same size")
    images = [image for name in names if (image := asks(FLAT)[name].prompt.image)]
    with torch.inference_mode():
        together = ImageEncoder(engine_model(FLAT)).encode(images)
        for image, embeddings in zip(images, together, strict=True):
            each = ImageEncoder(engine_model(FLAT)).encode([image])[0]
            assert embeddings.shape == (len(image.order), engine_model(FLAT).config.llama.hidden_size)
            torch.testing.assert_close(embeddings, each, atol=1e-4, rtol=1e-4)


@given(tiles=st.lists(st.integers(0, 20), min_size=1, max_size=9))
def test_a_pass_takes_as_many_images_as_it_holds_and_at_least_one(tiles: list[int]) -> None:
    """An image without tiles is known already."""
    images: list[Any] = [SimpleNamespace(tiles=SimpleNamespace(pixels_TCHW=[0] * n) if n else None) for n in tiles]
    taken = len(first_pass(images))
    assert first_pass(images) == images[:taken]
    assert taken == 1 or sum(tiles[:taken]) <= TILES_PER_PASS
    assert taken == len(tiles) or sum(tiles[: taken + 1]) > TILES_PER_PASS


# --- what was used lately

STEPS = st.tuples(st.sampled_from(["get", "put", "make_room"]), st.integers(0, 5), st.integers(0, 14))


@given(steps=st.lists(STEPS, max_size=40), max_bytes=st.integers(1, 20), max_entries=st.integers(1, 4))
def test_the_latest_that_fit_are_kept(steps: list[tuple[str, int, int]], max_bytes: int, max_entries: int) -> None:
    """Against the plainest model of it."""
    lru, model = Lru[int, object](max_bytes=max_bytes, max_entries=max_entries), OrderedDict[int, tuple[object, int]]()

    def room(size: int) -> bool:
        if size > max_bytes:
            return False
        while sum(s for _, s in model.values()) + size > max_bytes or len(model) + 1 > max_entries:
            model.popitem(last=False)
        return True

    for what, key, size in steps:
        if what == "get":
            if key in model:
                model.move_to_end(key)
            assert lru.get(key) is (model[key][0] if key in model else None)
        elif what == "make_room":
            assert lru.make_room(size) == room(size)
        else:
            value = object()
            lru.put(key, value, size=size)
            model.pop(key, None)
            if room(size):
                model[key] = (value, size)
        assert len(lru) == len(model) <= max_entries
        assert lru.bytes == sum(s for _, s in model.values()) <= max_bytes
    lru.clear()
    assert (len(lru), lru.bytes) == (0, 0)


# --- how much there is


@given(free=st.integers(0, 200 * GIB), slot=st.integers(1, 4 * GIB), wanted=st.integers(1, 64))
def test_a_plan_fits(free: int, slot: int, wanted: int) -> None:
    logging.disable()
    try:
        planned, richer = plan(free, slot, wanted), plan(free + GIB, slot, wanted)
    finally:
        logging.disable(logging.NOTSET)
    assert 1 <= planned.slots <= wanted
    assert 0 <= planned.prefix_bytes <= 16 * slot
    spare = max(1.5 * GIB, 0.08 * free)
    assert planned.slots == 1 or planned.slots * slot <= free - spare
    assert planned.prefix_bytes == 0 or planned.slots * slot + planned.prefix_bytes <= free - spare
    assert richer.slots >= planned.slots
    assert planned.slots == wanted or (planned.slots + 1) * slot > 0.75 * (free - spare) - 1, (
        "no more would have fitted"
    )


def test_fewer_slots_than_wanted_are_told_with_the_numbers(caplog: pytest.LogCaptureFixture) -> None:
    assert plan(10 * GIB, 2 * GIB, 8).slots == 3
    assert "Memory for 3 answers at once, not 8: 10.0 GiB are free" in caplog.text
    caplog.clear()
    assert plan(100 * GIB, 2 * GIB, 8).slots == 8
    assert not caplog.text


CGROUPS = [
    (f"{8 * GIB}\n", 3 * GIB, 0, 5 * GIB),
    (f"{8 * GIB}\n", 7 * GIB, 4 * GIB, 5 * GIB),  # the checkpoint's pages in the file cache are as good as free
    (f"{8 * GIB}\n", 9 * GIB, 0, 0),
    (f"{99 * GIB}\n", 3 * GIB, 0, 20 * GIB),
    ("max\n", 3 * GIB, 0, 20 * GIB),
    ("", 3 * GIB, 0, 20 * GIB),
    (None, 0, 0, 20 * GIB),
]


@pytest.mark.parametrize("cgroup", CGROUPS)
def test_a_container_has_what_its_limit_leaves(
    cgroup: tuple[str | None, int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the 20 GiB that the machine has."""
    limit, current, inactive, expected = cgroup
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * GIB))
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(f"{current}\n")
        (tmp_path / "memory.stat").write_text(f"anon 1\nfile 9\ninactive_anon 5\ninactive_file {inactive}\n")
    assert free_bytes(CPU) == expected


def test_an_engine_with_memory_for_one_answers_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "free_bytes", lambda device: 0)
    engine = SteppedEngine(engine_model(FLAT), slots=1)
    names = ("image", "short", "image again")
    assert answered(engine, [asks(FLAT)[name] for name in names]) == [alone(FLAT, name) for name in names]
    monkeypatch.undo()
    assert TransformersEngine(engine_model(FLAT), max_slots=5).slots.count == 5


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="Linux alone tells")
@pytest.mark.skipif(
    HUGE_PAGES.is_file() and "[always]" in HUGE_PAGES.read_text(), reason="a page is as large as a head's positions"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_slots_take_memory_as_they_are_written(dtype: torch.dtype) -> None:
    config = LlamaConfig(hidden_size=1024, num_attention_heads=8, num_hidden_layers=2)
    slot, before = slot_bytes(config, 4096, dtype), resident_bytes()
    slots = KeyValueSlots(config, count=8, positions=4096, device=CPU, dtype=dtype)
    tensors = (*slots.keys_SHLD, *slots.values_SHLD)
    slots.clear(7)
    assert not any(tensor[7].any() for tensor in tensors)
    assert resident_bytes() - before < slot / 2
    for tensor in tensors:
        tensor[0] = 1
    assert resident_bytes() - before < 1.5 * slot
    slots.filled[0] = 4096
    slots.clear(0)
    assert not any(tensor[0].any() for tensor in tensors)


# --- nothing is left behind


@pytest.mark.parametrize("ahead", [False, True])
def test_nothing_of_an_ended_answer_is_kept(ahead: bool) -> None:
    engine, kept = SteppedEngine(engine_model(FLAT), slots=2, ahead=ahead), list[Any]()
    for name in ("short", "image", "sampled"):
        answer = engine.ask(asks(FLAT)[name])
        engine.finish()
        outcome(answer)
        kept.append(weakref.ref(answer))
    del answer
    assert [answer() for answer in kept] == [None, None, None]


def test_engines_that_nobody_uses_leave_no_thread_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_IDLE_SECONDS", 0.01)
    model, kept, threads = engine_model(FLAT), list[Any](), set[threading.Thread]()
    for _ in range(5):
        engine = TransformersEngine(model, max_slots=2)
        stream = TextGenerator(engine, model.config, model.tokenizer).stream(asks(FLAT)["short"].prompt, GREEDY)
        next(iter(stream))
        assert engine._thread is not None
        threads.add(engine._thread)
        stream.close()
        kept += [weakref.ref(engine), weakref.ref(engine.slots.keys_SHLD[0]), weakref.ref(engine._sampler._seen_SV)]
    del engine, stream
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    gc.collect()
    assert [thing() for thing in kept] == [None] * 15
