"""Attention over slots sees each answer's own positions and nothing else; recorded steps are the eager ones."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from pulse_ecg.engine import graphs as module
from pulse_ecg.engine.graphs import DecodeGraphs, batch_sizes, cuda_graphs, lengths
from pulse_ecg.engine.runner import ModelRunner
from pulse_ecg.engine.slots import DecodeView, FirstSlotsView, KeyValueSlots, PrefillView, rounded, slot_bytes
from tests.engine_turns import SteppedEngine, alone, answered, asks, engine_model, one_thread, outcome, rerun

__all__ = ["one_thread"]  # a fixture that every test here uses

CPU = torch.device("cpu")
LAYER = SimpleNamespace(layer_idx=0)
POSITIONS = 1536


def slots_with(filled: list[int], *, heads: int = 4, key_heads: int = 2) -> KeyValueSlots:
    """Random keys and values up to each slot's ``filled``, and what an earlier answer left after them."""
    config = LlamaConfig(
        hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=key_heads, num_hidden_layers=1
    )
    slots = KeyValueSlots(config, count=len(filled), positions=POSITIONS, device=CPU, dtype=torch.float32)
    torch.manual_seed(0)
    slots.keys_SHLD[0].normal_(std=3)
    slots.values_SHLD[0].normal_()
    slots.filled = list(filled)
    return slots


def plain_attention(query_HD: Tensor, keys_HLD: Tensor, values_HLD: Tensor) -> Tensor:
    """One position, by the formula; heads of a group share keys."""
    groups = len(query_HD) // len(keys_HLD)
    keys, values = keys_HLD.repeat_interleave(groups, 0), values_HLD.repeat_interleave(groups, 0)
    weights = torch.einsum("hd,hld->hl", query_HD, keys) * 0.25
    return torch.einsum("hl,hld->hd", weights.softmax(-1), values)


class _OnGpu(Tensor):
    """Takes the way of a GPU, on the CPU."""

    is_cuda = True  # type: ignore[assignment]


FILLED = st.lists(st.integers(0, POSITIONS - 1), min_size=1, max_size=6)


@settings(max_examples=40)
@given(filled=FILLED, key_heads=st.sampled_from((1, 2, 4)), of_all=st.booleans(), gpu=st.booleans(), data=st.data())
def test_a_step_attends_to_each_rows_own_positions(
    filled: list[int], key_heads: int, of_all: bool, gpu: bool, data: st.DataObject
) -> None:
    slots = slots_with(filled, key_heads=key_heads)
    chosen = list(range(len(filled)))
    if of_all:
        view: DecodeView | FirstSlotsView = FirstSlotsView(slots, torch.tensor(filled), rounded(max(filled) + 1))
    else:
        chosen = sorted(data.draw(st.sets(st.sampled_from(chosen), min_size=1)))
        view = DecodeView(slots, chosen)
    before = slots.keys_SHLD[0].clone(), slots.values_SHLD[0].clone()
    query, key, value = (torch.randn(len(chosen), heads, 1, 8) for heads in (4, key_heads, key_heads))
    attended = view.attend(LAYER, query.as_subclass(_OnGpu) if gpu else query, key, value, 0.25)
    assert attended.shape == (len(chosen), 1, 4, 8)
    for row, slot in enumerate(chosen):
        end = filled[slot]
        for tensor, old, new in zip((slots.keys_SHLD[0], slots.values_SHLD[0]), before, (key, value), strict=True):
            assert torch.equal(tensor[slot, :, end], new[row, :, 0])
            old[slot, :, end] = new[row, :, 0]
        own = slots.keys_SHLD[0][slot, :, : end + 1], slots.values_SHLD[0][slot, :, : end + 1]
        expected = plain_attention(query[row, :, 0], *own)
        torch.testing.assert_close(attended[row, 0].as_subclass(Tensor), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(slots.keys_SHLD[0], before[0]) and torch.equal(slots.values_SHLD[0], before[1])


@settings(max_examples=30)
@given(start=st.integers(0, 600), count=st.integers(1, 40), key_heads=st.sampled_from((2, 4)))
def test_a_chunk_attends_to_what_came_before_and_causally_to_itself(start: int, count: int, key_heads: int) -> None:
    slots = slots_with([900, start], key_heads=key_heads)
    query, key, value = (torch.randn(1, heads, count, 8) for heads in (4, key_heads, key_heads))
    attended = PrefillView(slots, 1, start=start, count=count).attend(LAYER, query, key, value, 0.25)
    assert attended.shape == (1, count, 4, 8)
    keys, values = slots.keys_SHLD[0][1], slots.values_SHLD[0][1]
    assert torch.equal(keys[:, start : start + count], key[0])
    for position in range(count):
        end = start + position + 1
        expected = plain_attention(query[0, :, position], keys[:, :end], values[:, :end])
        torch.testing.assert_close(attended[0, position], expected, atol=1e-4, rtol=1e-4)


def test_a_chunk_that_is_not_the_last_fills_its_slot_and_computes_no_more() -> None:
    model = engine_model("flat")
    llama = model.config.llama
    slots = KeyValueSlots(llama, count=2, positions=600, device=CPU, dtype=torch.float32)
    runner = ModelRunner(model, slots)
    chunk_1ND = torch.randn(1, 40, llama.hidden_size)
    done: list[object] = []
    *_, final = model.network.language_model.model.layers
    hook = final.mlp.register_forward_hook(lambda *_: done.append(final))
    try:
        with torch.inference_mode():
            whole = runner.prefill(chunk_1ND, 0, 0, last=True)
            assert whole is not None and whole.shape == (1, llama.vocab_size)
            assert len(done) == 1
            assert runner.prefill(chunk_1ND, 1, 0, last=False) is None
            assert len(done) == 1
    finally:
        hook.remove()
    for tensor_SHLD in (*slots.keys_SHLD, *slots.values_SHLD):
        assert torch.equal(tensor_SHLD[0, :, :40], tensor_SHLD[1, :, :40])
        assert tensor_SHLD[1, :, :40].abs().sum() > 0


def test_a_slot_takes_the_memory_that_is_planned_for_it() -> None:
    for kind in ("flat", "grouped"):
        llama = engine_model(kind).config.llama
        slots = KeyValueSlots(llama, count=3, positions=700, device=CPU, dtype=torch.float16)
        taken = sum(tensor.nbytes for tensor in (*slots.keys_SHLD, *slots.values_SHLD))
        assert taken == 3 * slot_bytes(llama, 700, torch.float16) == 3 * 1025 * slots.position_bytes


# --- recorded steps


def test_batches_and_lengths_cover_all_there_is() -> None:
    assert [batch_sizes(slots) for slots in (1, 2, 3, 5, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 5], [1, 2, 4, 8]]
    assert lengths(1536) == [512, 1024, 1536]
    for kind in ("flat", "grouped"):
        engine = SteppedEngine(engine_model(kind), slots=3)
        assert lengths(engine.slots.positions)[-1] == engine.slots.positions


@settings(max_examples=60)
@given(filled=FILLED, data=st.data())
def test_the_smallest_graph_that_holds_the_rows_is_replayed(filled: list[int], data: st.DataObject) -> None:
    slots = slots_with(filled)
    chosen = sorted(data.draw(st.sets(st.sampled_from(range(len(filled))), min_size=1)))
    run = list[tuple[int, int]]()

    def step(tokens_B: Tensor, view: FirstSlotsView) -> Tensor:
        run.append((len(tokens_B), view.mask_B11L.shape[3]))
        return torch.stack([tokens_B, view.positions_B, view.last_B], dim=1)

    recorded = DecodeGraphs(step, slots, rerun)
    assert sorted(run) == sorted((b, n) for b in batch_sizes(len(filled)) for n in lengths(POSITIONS))
    run.clear()
    tokens_S = torch.arange(len(filled)) + 100
    rows = recorded.replay(tokens_S, chosen)
    assert rows.tolist() == [[100 + slot, filled[slot], filled[slot]] for slot in chosen]
    idle = [slot for slot in range(len(filled)) if slot not in chosen]
    assert not recorded._places_2S[1, idle].any(), "what nobody reads is computed"
    assert recorded._places_2S[0].tolist() == filled
    ((batch, length),) = run
    assert batch > chosen[-1]
    assert not [b for b in batch_sizes(len(filled)) if chosen[-1] < b < batch]
    longest = max(filled[slot] for slot in chosen)
    assert longest < length <= longest + 512


@settings(max_examples=15)
@given(filled=st.lists(st.integers(1, 1200), min_size=4, max_size=4), data=st.data())
def test_a_replayed_step_is_the_eager_one_whoever_is_idle(filled: list[int], data: st.DataObject) -> None:
    """Logits of the rows, and every position that is filled, whether its slot has a row, prefills or idles."""
    engine = shared_engine()
    chosen = sorted(data.draw(st.sets(st.sampled_from(range(4)), min_size=1)))
    with torch.inference_mode():
        torch.manual_seed(1)
        for tensor in (*engine.slots.keys_SHLD, *engine.slots.values_SHLD):
            tensor.normal_()
        engine.slots.filled = list(filled)
        engine._runner.tokens_S.copy_(torch.randint(3, 700, (4,)))
        held = [t.clone() for t in (*engine.slots.keys_SHLD, *engine.slots.values_SHLD)]
        replayed = engine._runner.decode(chosen).clone()
        after = [t.clone() for t in (*engine.slots.keys_SHLD, *engine.slots.values_SHLD)]
        recorded, engine._runner._graphs = engine._runner._graphs, None
        eager = engine._runner.decode(chosen)
        engine._runner._graphs = recorded
    torch.testing.assert_close(replayed, eager, atol=1e-3, rtol=1e-3)
    for was, now in zip(held, after, strict=True):
        for slot, end in enumerate(filled):
            assert torch.equal(was[slot, :, :end], now[slot, :, :end])
            assert torch.equal(was[slot, :, end + 1 :], now[slot, :, end + 1 :])


_engines: list[SteppedEngine] = []


def shared_engine() -> SteppedEngine:
    """One with recorded steps, for all examples."""
    if not _engines:
        _engines.append(SteppedEngine(engine_model("grouped"), slots=4, graphs=True))
    return _engines[0]


@pytest.mark.parametrize("kind", ["flat", "grouped"])
def test_answers_of_recorded_steps_with_idle_and_prefilling_slots_between(kind: str) -> None:
    engine = SteppedEngine(engine_model(kind), slots=4, graphs=True)
    recorded = engine._runner._graphs
    assert recorded is not None
    replays = list[tuple[int, ...]]()
    replay = recorded.replay
    recorded.replay = lambda tokens, slots: replays.append(tuple(slots)) or replay(tokens, slots)  # type: ignore
    short = engine.ask(asks(kind)["short"])
    leaving = engine.ask(asks(kind)["sampled"])
    last = engine.ask(asks(kind)["other system"])
    engine.turn(4)
    leaving.give_up()
    engine.finish()
    names = ("image", "long", "small image")
    assert answered(engine, [asks(kind)[name] for name in names]) == [alone(kind, name) for name in names]
    assert [outcome(short), outcome(last)] == [alone(kind, "short"), alone(kind, "other system")]
    assert any(slots[-1] != len(slots) - 1 for slots in replays), "a slot below one with a row had none"


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("capture failed"), TypeError("no such kernel")]
)
def test_decoding_is_eager_where_nothing_can_be_recorded(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cleaned = list[str]()
    monkeypatch.setattr(module, "_cuda_recorder", lambda: failing(error))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: cleaned.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleaned.append("empty_cache"))
    engine = SteppedEngine(engine_model("flat"), slots=2)
    assert cuda_graphs(engine._runner._decode, engine.slots) is None
    assert cleaned == ["synchronize", "empty_cache"]
    assert f"No CUDA graphs of these decode steps: {type(error).__name__}." in caplog.text
