"""The handler and the server on vLLM: the same records and errors, refused arguments, and what its death means."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from demo.build_checkpoint import build_checkpoint
from demo.random_weights import CheckpointShape
from handler import EndpointHandler
from pulse_ecg.checkpoint import load_model
from pulse_ecg.config import Settings
from pulse_ecg.engine.slots import slot_bytes
from pulse_ecg.engines import start_engine
from pulse_ecg.errors import ConfigurationError, EngineStoppedError
from pulse_ecg.params import load_defaults
from pulse_ecg.request import parse_input
from tests.conftest import ROOT
from tests.engines import VLLM_ARGS, running, settings_for
from tests.our_server import our_server, server_process, until
from tests.test_checkpoint import edit_tensors

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

ARGS = json.dumps(VLLM_ARGS)
GREEDY = {"do_sample": False, "max_new_tokens": 16, "stop": [], "details": True, "enable_turkish_commentary": False}


@pytest.fixture(scope="module")
def on_vllm(demo_checkpoint: Path) -> Iterator[EndpointHandler]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("PULSE_DEVICE", "cpu")
        patch.setenv("PULSE_ENGINE", "vllm")
        patch.setenv("PULSE_VLLM_ARGS", ARGS)
        handler = EndpointHandler(str(demo_checkpoint))
        yield handler
        handler.close()


def engine_of(handler: EndpointHandler) -> Any:
    return handler._analyzer._generator.engine


BODIES: list[Any] = [
    {"inputs": "Rate?", "parameters": GREEDY},
    {"inputs": ["Rate?", "Axis?", {"query": "", "image": "nonsense"}, "Rhythm?"], "parameters": GREEDY},
    {"inputs": "Rate?", "parameters": GREEDY | {"stop": ["a"], "repetition_penalty": 1.2}},
    {"inputs": "Rate?", "parameters": GREEDY | {"return_full_text": True}},
    {"inputs": "Rate?", "parameters": GREEDY | {"max_new_tokens": 0}},
    {"inputs": "Rate?", "parameters": GREEDY | {"tensor_parallel": 2}},
    {"inputs": "word " * 5000, "parameters": GREEDY},
    {"inputs": {"image": "data:image/png;base64,AAAA"}, "parameters": GREEDY},
    {"inputs": 7},
    {},
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_records_and_errors_are_those_of_the_other_engine(
    handler: EndpointHandler, on_vllm: EndpointHandler, body: Any
) -> None:
    ours, theirs = on_vllm.respond(body), handler.respond(body)
    assert [outcome.status for outcome in ours] == [outcome.status for outcome in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        details, others = mine.record.pop("details", None), other.record.pop("details", None)
        assert mine.record == other.record
        if details:
            assert details.pop("engine") == "vllm" and others.pop("engine") == "transformers"
            assert details.pop("timings").keys() == others.pop("timings").keys()
            assert details == others


def test_the_largest_top_k_is_answered_and_nothing_is_left_of_it(on_vllm: EndpointHandler) -> None:
    """No message of vLLM's processes holds such a number."""
    parameters = {"do_sample": True, "top_k": 10**20, "seed": 1, "max_new_tokens": 4}
    [outcome] = on_vllm.respond({"inputs": "Rate?", "parameters": GREEDY | parameters})
    assert outcome.status == 200
    assert not engine_of(on_vllm)._llm.output_processor.request_states


def test_what_is_no_token_is_never_said(tmp_path: Path) -> None:
    """Of a padded table vLLM has the tokens' rows alone; the others are the likeliest here."""
    folder = build_checkpoint(tmp_path / "padded", shape=CheckpointShape(vocab=800))
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"][768:, 0].fill_(40.0))
    params = load_defaults(ROOT).updated({"do_sample": False, "max_new_tokens": 16})
    said = list[list[int]]()
    for engine in ("vllm", "transformers"):
        with running(engine, folder) as analyzer:
            said.append(analyzer.analyze(parse_input("Rate?", params)).generation.token_ids)
    assert said[0] == said[1]
    assert max(said[0]) < 768


def test_memory_that_ran_out_is_what_was_remembered(
    on_vllm: EndpointHandler, sample_png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(on_vllm)
    image = {"image": "data:image/png;base64," + base64.b64encode(sample_png).decode(), "query": "Rate?"}
    assert [outcome.status for outcome in on_vllm.respond({"inputs": image, "parameters": GREEDY})] == [200]
    assert len(engine._encoder._remembered) == 1

    def no_room(request: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_embed", no_room)
        assert [outcome.status for outcome in on_vllm.respond({"inputs": image, "parameters": GREEDY})] == [503]
    assert len(engine._encoder._remembered) == 0


# --- arguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensor_paralel_size": 2}, "Did you mean 'tensor_parallel_size'"),
        ({"model": "another/model"}, "'model' is set by PULSE_MODEL_ID"),
        ({"dtype": "float16"}, "PULSE_DTYPE"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"enable_prompt_embeds": False}, "this engine"),
        ({"max_model_len": 9999}, "the checkpoint"),
        ({"max_num_seqs": "many"}, "PULSE_VLLM_ARGS"),
        ({"quantization": "nonsense"}, "PULSE_VLLM_ARGS"),
        ({"compilation_config": {"nonsense": 1}}, "PULSE_VLLM_ARGS"),
        ({"attention_config": {"nonsense": 1}}, "PULSE_VLLM_ARGS"),
        ({"max_num_queued_reqs": 1}, "PULSE_MAX_QUEUED_REQUESTS"),
    ],
)
def test_an_argument_that_cannot_be_used_stops_the_start(
    demo_checkpoint: Path, given: dict[str, Any], message: str
) -> None:
    settings = Settings(device="cpu", engine="vllm", vllm_args=given)
    with pytest.raises(ConfigurationError, match=message) as caught:
        start_engine(load_model(demo_checkpoint, settings), settings)
    assert "PULSE_VLLM_ARGS" in str(caught.value) and str(demo_checkpoint) not in str(caught.value)


def test_arguments_reach_vllm(demo_checkpoint: Path, on_vllm: EndpointHandler) -> None:
    from pulse_ecg.vllm_engine.arguments import engine_args

    model = engine_of(on_vllm)._model
    given = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "distributed_executor_backend": "ray"}
    args = engine_args(model, given, max_answers=5)
    assert {name: getattr(args, name) for name in given} == given
    assert args.max_num_seqs == 5
    assert engine_args(model, {"max_num_seqs": 7}, max_answers=5).max_num_seqs == 7
    assert (args.max_model_len, args.dtype) == (4096, "float32")
    slot = slot_bytes(model.config.llama, 4096, model.dtype)
    alone = engine_args(model, {}, max_answers=1)
    assert alone.kv_cache_memory_bytes > slot, "a lone answer has all of its positions, and vLLM its own block"


def test_no_other_token_than_the_checkpoints_own_ends_an_answer() -> None:
    """vLLM reads ids of its own from configurations, Llama's default among them."""
    from pulse_ecg.vllm_engine.prompts import sampling_params

    answer = SimpleNamespace(limit=4, eos_ids={7}, params=load_defaults(ROOT), seed=1, whole=True)
    params = sampling_params(answer)
    params.update_from_generation_config({"eos_token_id": [2, 3]}, 2)
    assert params.stop_token_ids == [7]
    assert params.ignore_eos


def test_an_answer_that_is_over_before_its_first_step_is_forgotten(on_vllm: EndpointHandler) -> None:
    from pulse_ecg.vllm_engine.engine import _Request

    engine = engine_of(on_vllm)
    answer = SimpleNamespace(over=lambda: True)

    async def begun_and_cancelled() -> None:
        request = _Request(answer)
        engine._begin(request)
        request.task.cancel()

    engine._run(begun_and_cancelled())
    until(lambda: not engine._requests and engine._looking is None)


def test_an_engine_whose_own_device_is_lost_says_so_and_refuses(
    on_vllm: EndpointHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tower's: vLLM's processes may live on."""
    engine = engine_of(on_vllm)

    def broken(request: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_embed", broken)
        assert [outcome.status for outcome in on_vllm.respond({"inputs": "Rate?", "parameters": GREEDY})] == [500]
        assert engine.alive
        patch.setattr("pulse_ecg.vllm_engine.engine.lost", lambda device: True)
        for _ in range(2):
            [outcome] = on_vllm.respond({"inputs": "Rate?", "parameters": GREEDY})
            assert outcome.status == 503 and "restarted" in outcome.record["error"]
        assert not engine.alive
    engine._lost = False


def test_ctrl_c_is_not_for_vllms_processes(on_vllm: EndpointHandler) -> None:
    """A terminal sends it to all of them; the server alone drains, and then ends them."""
    engines = [p for p in psutil.Process().children(recursive=True) if "Engine" in p.name()]
    assert engines
    for process in engines:
        status = Path(f"/proc/{process.pid}/status").read_text()
        blocked = int(re.search(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)[1], 16)
        assert blocked >> (signal.SIGINT - 1) & 1


# --- the end


def test_when_vllm_dies_answers_fail_health_does_and_new_requests_are_refused(demo_checkpoint: Path) -> None:
    """What it kills is every engine of this process; no test below asks the one above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PULSE_DEVICE", "cpu")
        patch.setenv("PULSE_ENGINE", "vllm")
        patch.setenv("PULSE_VLLM_ARGS", ARGS)
        handler = EndpointHandler(str(demo_checkpoint))
    with our_server(handler) as server, ThreadPoolExecutor(1) as thread:
        assert server.get("/health").json() == {"status": "ok"}
        endless = {"inputs": "Rate?", "parameters": GREEDY | {"max_new_tokens": 2048}}
        answering = thread.submit(server.post, "/", endless)
        until(lambda: handler.admission.running)
        for process in psutil.Process().children(recursive=True):
            if "Engine" in process.name():
                os.kill(process.pid, signal.SIGKILL)
        assert answering.result(60).status_code == 503
        until(lambda: not handler.alive)
        health = server.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "stopped"})
        refused = server.post("/", endless)
        assert refused.status_code == 503
        assert "restarted" in refused.json()[0]["error"]
    engine_of(handler).close()
    with pytest.raises(EngineStoppedError):
        engine_of(handler).submit(None)


def test_a_closed_engine_refuses_answers_and_ends_its_processes(demo_checkpoint: Path) -> None:
    settings = settings_for("vllm")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    engine: Any = start_engine(load_model(demo_checkpoint, settings), settings)
    started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before and "VLLM" in p.name()]
    assert started and engine.alive
    engine.close()
    engine.close()
    assert not engine.alive
    _, left = psutil.wait_procs(started, timeout=30)
    assert not left
    with pytest.raises(EngineStoppedError):
        engine.submit(None)


def test_a_server_that_must_exit_abruptly_leaves_no_process_behind(demo_checkpoint: Path, tmp_path: Path) -> None:
    """A request that cannot be answered in time keeps a thread busy: the server exits without waiting for it."""
    arguments = ["--model", str(demo_checkpoint), "--drain-timeout", "1"]
    variables = {"PULSE_ENGINE": "vllm", "PULSE_VLLM_ARGS": ARGS, "PULSE_ALLOW_PRIVATE_IMAGE_URLS": "1"}
    with server_process(tmp_path, *arguments, **variables) as server:
        server.wait_for_health()
        started = [p for p in psutil.Process(server.process.pid).children(recursive=True) if "VLLM" in p.name()]
        with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as thread:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/ecg.png"
            asking = thread.submit(server.post, "/", {"inputs": {"query": "Rate?", "image": url}})
            connection, _ = silent.accept()
            assert server.terminate() == 0
            connection.close()
            asking.exception(60)  # whatever it was told: nobody waited for it
    _, left = psutil.wait_procs(started, timeout=30)
    assert started and not left
