"""The decoder for decode steps on a GPU: transformers' own results, shared weights, and two compilations in all."""

from __future__ import annotations

import copy
import logging
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from pulse_ecg.engine import runner as module
from pulse_ecg.engine import scheduler
from pulse_ecg.engine.fast_decoder import fast_decoder
from pulse_ecg.engine.graphs import DecodeGraphs
from pulse_ecg.engine.packed_linear import PackedLinear
from pulse_ecg.engine.runner import ModelRunner
from pulse_ecg.engine.slots import FirstSlotsView, KeyValueSlots, LayerView
from tests.engine_turns import SteppedEngine, alone, answered, asks, load_engine_model, one_thread, rerun

__all__ = ["one_thread"]  # a fixture that every test here uses

CPU = torch.device("cpu")
TRACED = "aot_eager"  # all of the compiler but the code that it writes, for which it would need another one


@pytest.fixture(autouse=True)
def compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(module, "_missing_for_triton", lambda: None)  # which is not needed here


def a_runner(kind: str, slots: int = 4) -> ModelRunner:
    model = load_engine_model(kind)
    llama = model.config.llama
    return ModelRunner(model, KeyValueSlots(llama, count=slots, positions=2048, device=CPU, dtype=torch.float32))


def fill(runner: ModelRunner) -> None:
    torch.manual_seed(1)
    for tensor in (*runner._slots.keys_SHLD, *runner._slots.values_SHLD):
        tensor.normal_()


def assert_steps_agree(runner: ModelRunner, decoder: nn.Module, rows: int, length: int) -> None:
    """The same logits, and the same keys and values stored."""
    torch.manual_seed(rows + length)
    positions_B, tokens_B = torch.randint(0, length, (rows,)), torch.randint(3, 700, (rows,))
    found = []
    for either in (None, decoder):
        fill(runner)
        logits_BV = runner._decode(tokens_B, FirstSlotsView(runner._slots, positions_B, length), either)
        found.append([logits_BV, *(t.clone() for t in (*runner._slots.keys_SHLD, *runner._slots.values_SHLD))])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["flat", "grouped"])
def test_one_compilation_for_a_row_and_one_for_several_serve_every_layer_and_length(kind: str) -> None:
    runner = a_runner(kind)
    with torch.inference_mode():
        decoder = fast_decoder(runner._decoder, backend=TRACED)
        assert decoder is not None
        for rows in (1, 2, 3, 4):
            for length in (512, 1024, 2048):
                assert_steps_agree(runner, decoder, rows, length)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.filterwarnings("ignore")  # the compiler's, about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++ on a CPU")
def test_compiled_code_gives_the_plain_logits() -> None:
    runner = a_runner("grouped")
    with torch.inference_mode():
        decoder = fast_decoder(runner._decoder)
        assert decoder is not None
        for rows in (1, 3):
            assert_steps_agree(runner, decoder, rows, 1024)


def test_the_weights_are_shared_and_the_model_is_as_it_was() -> None:
    runner = a_runner("flat")
    model = runner._decoder
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    names = [name for name, _ in model.named_modules()]
    decoder = fast_decoder(model, backend=None)
    assert decoder is not None
    assert [name for name, _ in model.named_modules()] == names
    after = dict(model.named_parameters())
    assert all(torch.equal(parameter, after[name]) for name, parameter in before.items())
    assert all(type(layer) is not PackedLinear for layer in model.modules())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    again = fast_decoder(model, backend=None)  # what was recorded on the first stays right
    assert again is not None
    for other in (decoder, again):
        shared = list(inner(other).parameters())
        assert len(shared) == len(before)
        assert {parameter.data_ptr() for parameter in shared} == own
        joints = {id(part._joint): part._joint for part in inner(other).modules() if hasattr(part, "_joint")}
        assert len(joints) == 4 * len(model.layers)
        assert {joint.weight.data_ptr() for joint in joints.values()} <= own
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) == sum(parameter.nbytes for parameter in before.values())
    assert {buffer.data_ptr() for buffer in decoder.buffers()} == {buffer.data_ptr() for buffer in model.buffers()}


def test_layers_with_a_bias() -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=50,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    original = copy.deepcopy(model)
    decoder = fast_decoder(model, backend=None)
    assert decoder is not None
    x = torch.randn(3, 1, 32)
    for owner, names in (("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")), ("mlp", ("gate_proj", "up_proj"))):
        for name in names:
            plain, own, fast = (m.get_submodule(f"layers.0.{owner}.{name}") for m in (original, model, inner(decoder)))
            torch.testing.assert_close(fast(x), plain(x))
            torch.testing.assert_close(own(x), plain(x))


def inner(decoder: nn.Module) -> nn.Module:
    """The decoder with its layers laid bare."""
    bare = copy.copy(decoder)
    bare._modules = dict(decoder._modules)
    bare.layers = nn.ModuleList([layer._step.__self__ for layer in decoder.layers])
    return bare


def test_each_layer_is_right_in_whatever_order_and_of_whatever_it_is_asked() -> None:
    runner = a_runner("grouped")
    decoder = fast_decoder(runner._decoder, backend=None)
    assert decoder is not None
    attention, plain = inner(decoder).get_submodule("layers.0.self_attn"), runner._decoder.layers[0].self_attn
    x, y = torch.randn(2, 1, 128), torch.randn(2, 1, 128)
    asked = [("v_proj", x), ("q_proj", x), ("k_proj", y), ("q_proj", y), ("q_proj", x), ("v_proj", y), ("k_proj", x)]
    for name, given in asked:
        torch.testing.assert_close(getattr(attention, name)(given), getattr(plain, name)(given))


class Other(nn.Linear):
    """A layer that does something else with its weight."""


def test_there_is_none_where_a_layer_is_not_plain() -> None:
    runner = a_runner("flat")
    runner._decoder.layers[1].mlp.down_proj = Other(8, 8)
    weights = [parameter.data_ptr() for parameter in runner._decoder.parameters()]
    assert fast_decoder(runner._decoder) is None
    assert runner._fast_step() is None
    assert [parameter.data_ptr() for parameter in runner._decoder.parameters()] == weights


# --- a step is only taken that was seen to be right


def assert_empty(slots: KeyValueSlots) -> None:
    assert slots.filled == [0] * slots.count
    assert not any(tensor[:, :, : slots.positions].any() for tensor in (*slots.keys_SHLD, *slots.values_SHLD))


@pytest.mark.parametrize("slots", [1, 3])
def test_a_step_that_agrees_is_taken(
    slots: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "fast_decoder", partial(fast_decoder, backend=None))
    runner = a_runner("flat", slots)
    with torch.inference_mode(), caplog.at_level(logging.INFO):
        assert runner._fast_step() is not None
    assert "Decode steps compiled" in caplog.text
    assert_empty(runner._slots)


def wrong_positions(model: nn.Module) -> nn.Module | None:
    """Several rows lie where they should not; a single one is right."""
    decoder = fast_decoder(model, backend=None)
    assert decoder is not None
    forward = decoder.forward

    def shifted(*, position_ids: Tensor, **given: Any) -> Any:
        return forward(position_ids=position_ids * (4 if len(position_ids) > 1 else 1), **given)

    decoder.forward = shifted  # type: ignore[method-assign]
    return decoder


def not_a_number(model: nn.Module) -> nn.Module | None:
    """Of several rows; of a single one all is well."""
    decoder = fast_decoder(model, backend=None)
    assert decoder is not None
    forward = decoder.forward

    def sometimes(*, position_ids: Tensor, **given: Any) -> Any:
        output = forward(position_ids=position_ids, **given)
        if len(position_ids) > 1:
            output.last_hidden_state[-1] = float("nan")
        return output

    decoder.forward = sometimes  # type: ignore[method-assign]
    return decoder


HALF, BRAIN = (module._tolerance(dtype) for dtype in (torch.float16, torch.bfloat16))


@pytest.mark.parametrize("decoder", [wrong_positions, not_a_number])
def test_a_step_that_differs_is_not(
    decoder: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "fast_decoder", decoder)
    monkeypatch.setattr(module, "_tolerance", lambda _: BRAIN)
    runner = a_runner("flat", 3)
    with torch.inference_mode():
        assert runner._fast_step() is None
    assert "Decode steps are not compiled: compiled, the logits differ by a share of " in caplog.text
    assert_empty(runner._slots)


def seen(
    view: LayerView, query: Tensor, scaling: float, *, first: int = 0, less: int = 0, unmasked: bool = False
) -> Any:
    """Attention by the formula, to some of the positions only or to too many."""
    found = []
    for row, position in enumerate(view.positions_B.tolist()):
        end = view.mask_B11L.shape[3] if unmasked else max(first + 1, position + 1 - less)
        keys, values = view.keys_SHLD[row, :, first:end], view.values_SHLD[row, :, first:end]
        weights = (query[row] @ keys.transpose(1, 2) * scaling).softmax(-1)
        found.append((weights @ values).transpose(0, 1))
    return torch.stack(found)


SABOTAGES: dict[str, Callable[[LayerView, Tensor, float], Tensor]] = {
    "nothing is attended to": lambda view, query, scaling: torch.zeros_like(seen(view, query, scaling)),
    "what lies past the position too": lambda view, query, scaling: seen(view, query, scaling, unmasked=True),
    "not the own position": lambda view, query, scaling: seen(view, query, scaling, less=1),
    "not the first positions": lambda view, query, scaling: seen(view, query, scaling, first=64),
    "heads in another order": lambda view, query, scaling: seen(view, query, scaling).flip(2),
    "no scaling": lambda view, query, scaling: seen(view, query, 1.0),
}


@pytest.mark.parametrize("sabotage", SABOTAGES)
@pytest.mark.parametrize("tolerance", [HALF, BRAIN])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_step_that_attends_to_something_else_is_not(
    sabotage: str, tolerance: float, slots: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attend = LayerView.attend

    def attends(view: LayerView, *given: Any) -> Tensor:
        attend(view, *given)  # what is stored is right
        return SABOTAGES[sabotage](view, given[1], given[4])

    monkeypatch.setattr(module, "fast_decoder", partial(fast_decoder, backend=None))
    monkeypatch.setattr(module, "_tolerance", lambda _: tolerance)
    runner = a_runner("flat", slots)
    with torch.inference_mode():
        assert runner._fast_step() is not None
        monkeypatch.setattr(LayerView, "attend", attends)
        assert runner._fast_step() is None
    assert "the logits differ" in caplog.text


def test_where_compiling_fails_the_plain_step_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: object, **__: object) -> Any:
        raise RuntimeError("backend='inductor' raised") from OSError("/home/somebody/gcc is missing")

    monkeypatch.setattr(torch, "compile", no_compiler)
    runner = a_runner("flat")
    assert runner._fast_step() is None
    assert "not compiled: RuntimeError from OSError." in caplog.text and "somebody" not in caplog.text
    with torch.inference_mode():
        assert runner.decode([0]).isfinite().all()


def test_without_what_triton_needs_nothing_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "fast_decoder", lambda _: pytest.fail("it was tried"))
    compiler, headers = tmp_path / "gcc", tmp_path / "Python.h"
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    for given, missing in ((None, "C compiler"), ("/nowhere/cc", "C compiler"), (None, "Python.h"), (None, None)):
        monkeypatch.delenv("CC", raising=False)
        if given:
            monkeypatch.setenv("CC", given)
        assert missing in (module._missing_for_triton() or "") if missing else module._missing_for_triton() is None
        if missing == "C compiler" and given:
            compiler.touch(mode=0o755)
        elif missing == "Python.h":
            headers.touch()
    headers.unlink()
    assert a_runner("flat")._fast_step() is None
    assert "Decode steps are not compiled: there is no Python.h" in caplog.text


@pytest.mark.parametrize("kind", ["flat", "grouped"])
def test_answers_of_recorded_fast_steps_are_the_plain_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fast_decoder", partial(fast_decoder, backend=TRACED))
    monkeypatch.setattr(scheduler, "pack_linear_layers", lambda _: 0)  # as on a GPU
    engine = SteppedEngine(load_engine_model(kind), slots=4)
    steps = list[int]()
    with torch.inference_mode():
        step = engine._runner._fast_step()
        assert step is not None
        engine._runner._graphs = DecodeGraphs(
            lambda tokens_B, view: steps.append(len(tokens_B)) or step(tokens_B, view), engine.slots, rerun
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "something was compiled anew for a recording"
    steps.clear()
    names = ("image", "short", "sampled", "other system", "long", "small image")
    assert answered(engine, [asks(kind)[name] for name in names]) == [alone(kind, name) for name in names]
    assert 4 in steps
