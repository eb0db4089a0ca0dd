"""The handler as its hosts use it: records, errors, batches, commentary, what leaks and what does not."""

from __future__ import annotations

import base64
import importlib.util
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo.__main__ import file_server
from pulse_ecg.analyzer import EcgAnalyzer
from pulse_ecg.engine.scheduler import TransformersEngine
from pulse_ecg.errors import ConfigurationError
from pulse_ecg.fetch import FetchPolicy
from pulse_ecg.request import parse_input

ROOT = Path(__file__).parents[1]
SHORT = {"max_new_tokens": 6, "do_sample": False}
PLAIN = SHORT | {"enable_turkish_commentary": False}
ERROR_FIELDS = ["generated_text", "error", "model", "handler", "success"]
COMMENTED = ["generated_text", "model", "processing_method", "comment_text"]
COMMENTED += ["commentary_model", "commentary_tokens", "commentary_status"]


def ask(handler: Any, inputs: object, **parameters: object) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = handler({"inputs": inputs, "parameters": PLAIN | parameters})
    json.dumps(records)  # the stock container's serializer knows JSON alone
    return records


def encoded(png: bytes) -> str:
    return base64.b64encode(png).decode()


class FakeCommentary:
    """In the client's place: says what it was given, after a while."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seen: list[tuple[str, float]] = []
        self._seconds = seconds

    def comment_all(self, english_texts: list[str], *, timeout_s: float, cancel: Any = None) -> Any:
        from utils import Commentary

        self.seen += [(text, timeout_s) for text in english_texts]
        time.sleep(self._seconds)
        return [Commentary("success", "Türkçe açıklama.", "deepseek-x", 42) for _ in english_texts]


@pytest.fixture
def commentary(handler: Any, monkeypatch: pytest.MonkeyPatch) -> FakeCommentary:
    fake = FakeCommentary()
    monkeypatch.setattr(handler, "_commentary", fake)
    return fake


# --- records


def test_without_commentary_a_record_has_three_fields(handler: Any) -> None:
    (record,) = ask(handler, "Rate?")
    assert list(record) == ["generated_text", "model", "processing_method"]
    assert record["model"].startswith("PULSE-demo")
    assert record["processing_method"] == "pipeline"


def test_a_commented_record_has_the_contracts_fields(handler: Any, commentary: FakeCommentary) -> None:
    (record,) = ask(handler, "Rate?", enable_turkish_commentary=True, deepseek_timeout=17)
    assert list(record) == COMMENTED
    assert record["comment_text"] == "Türkçe açıklama."
    assert (record["commentary_model"], record["commentary_tokens"]) == ("deepseek-x", 42)
    assert record["commentary_status"] == "success"
    assert commentary.seen == [(record["generated_text"], 17)]


def test_commentary_is_on_unless_switched_off(handler: Any, commentary: FakeCommentary) -> None:
    (record,) = handler({"inputs": "Rate?", "parameters": SHORT})
    assert record["commentary_status"] == "success"
    ask(handler, "Rate?", enable_turkish_commentary="false")
    assert len(commentary.seen) == 1


def test_the_answer_alone_is_commented_on(handler: Any, commentary: FakeCommentary, sample_png: bytes) -> None:
    inputs = {"query": "Secret question?", "image": encoded(sample_png)}
    (record,) = ask(handler, inputs, enable_turkish_commentary=True, return_full_text=True)
    assert record["generated_text"] == f"Secret question?\n{commentary.seen[0][0]}"
    assert "Secret" not in commentary.seen[0][0]


def test_a_client_that_breaks_leaves_the_answer(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "_commentary", "no client")
    (record,) = ask(handler, "Rate?", enable_turkish_commentary=True)
    assert (record["commentary_status"], record["commentary_error"]) == ("failed", "The commentary could not be made.")
    assert record["generated_text"]


def test_without_a_key_the_status_says_so(handler: Any) -> None:
    (record,) = ask(handler, "Rate?", enable_turkish_commentary=True)
    assert record["commentary_status"] == "api_key_missing"
    assert record["comment_text"] == ""


def test_a_client_that_cannot_be_loaded_is_unavailable(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import handler as module

    def broken(_: object) -> None:
        raise ImportError("no openai", name="openai")

    monkeypatch.setattr(module, "DeepSeekClient", broken)
    monkeypatch.setattr(handler, "_commentary", module._commentary_client(handler._settings))
    (record,) = ask(handler, "Rate?", enable_turkish_commentary=True)
    assert list(record) == COMMENTED
    assert record["commentary_status"] == "unavailable"
    assert record["generated_text"]


@pytest.mark.parametrize("spoken", [True, "true", "True"])
def test_details_tell_how_the_answer_came_about(handler: Any, sample_png: bytes, spoken: object) -> None:
    inputs = {"query": "Rate?", "image": encoded(sample_png)}
    (record,) = ask(handler, inputs, details=spoken, do_sample=True, seed=11)
    details = record["details"]
    assert details["seed"] == 11
    assert details["finish_reason"] in ("stop", "eos", "length")
    assert details["image_tokens"] == 5 * 36
    assert details["prompt_tokens"] > details["image_tokens"]
    assert 1 <= details["generated_tokens"] <= 6
    assert details["engine"] == "transformers"
    assert details["model_revision"] == "local"
    stages = {"image_fetch", "image_decode", "preprocess", "vision", "prefill", "decode"}
    assert stages <= set(details["timings"])
    assert all(seconds >= 0 for seconds in details["timings"].values())


def test_an_error_record_has_the_contracts_fields(handler: Any) -> None:
    (record,) = ask(handler, "Rate?", temprature=1)
    assert list(record) == ERROR_FIELDS
    assert record["generated_text"] == ""
    assert record["success"] is False
    assert record["handler"] == "Ubden® Team Enhanced Handler"
    assert "temperature" in record["error"]


# --- images


def test_every_way_to_send_an_image_gives_the_same_answer(
    handler: Any, sample_png: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ecg.png").write_bytes(sample_png)
    file = tmp_path / "ecg.png"
    data = encoded(sample_png)
    question = "What is the rhythm?"
    policy = type(handler._analyzer._policy)(allow_private=True)
    monkeypatch.setattr(handler._analyzer, "_policy", policy)
    with file_server(tmp_path) as address, Image.open(file) as image:
        url = f"{address}/ecg.png?signature=secret"
        part = {"type": "image_url", "image_url": {"url": url}}
        ways: list[Any] = [
            {"query": question, "image": data},
            {"text": question, "image_base64": f"data:image/png;base64,{data}"},
            {"prompt": question, "image_url": url},
            {"query": question, "image": image},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": question}, part]}]},
        ]
        answers = [ask(handler, way)[0]["generated_text"] for way in ways]
        assert answers[0]
        assert answers == [answers[0]] * len(ways)
        assert ask(handler, ways)[-1]["generated_text"] == answers[0]
    assert ask(handler, question)[0]["generated_text"] != answers[0]


@pytest.mark.parametrize(
    "image",
    [
        "",
        "not base64!",
        "data:image/png;base64,AAAA",
        "http://127.0.0.1/x.png",
        "http://169.254.169.254/latest",
        5,
        {},
        [],
    ],
)
def test_an_image_that_cannot_be_had_is_an_error_and_nothing_is_generated(
    handler: Any, image: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as watched:
        watched.setattr(TransformersEngine, "submit", lambda *_: pytest.fail("the model was asked"))
        (record,) = ask(handler, {"query": "Rate?", "image": image})
    assert list(record) == ERROR_FIELDS
    assert "image" in record["error"].lower()
    assert ask(handler, "Rate?")[0]["generated_text"]


# --- batches and threads


def test_a_batch_equals_its_items_alone_in_order(handler: Any, sample_png: bytes) -> None:
    items: list[Any] = ["Rate?", {"query": "Rhythm?", "image": encoded(sample_png)}, "Axis?", "Rate?"]
    assert ask(handler, items) == [ask(handler, item)[0] for item in items]


def test_one_lazily_opened_image_may_stand_in_a_batch_many_times(handler: Any, sample_png: bytes) -> None:
    with Image.open(BytesIO(sample_png)) as image:
        records = ask(handler, [image] * 6, max_new_tokens=1)
    assert records == [records[0]] * 6
    assert "error" not in records[0]


def test_waiting_for_a_slot_counts_as_queueing(
    handler: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pulse.requests")
    model = handler._analyzer.model
    monkeypatch.setattr(
        handler, "_analyzer", EcgAnalyzer(model, FetchPolicy(), engine=TransformersEngine(model, max_slots=1))
    )
    params = handler._defaults.updated(SHORT | {"max_new_tokens": 2048, "stop": []})
    holding = handler._analyzer.stream(handler._analyzer.prepare(parse_input("Rate?", params)))
    next(iter(holding))
    waiting = threading.Thread(target=ask, args=(handler, "Axis?"))
    waiting.start()
    time.sleep(0.3)
    holding.close()
    waiting.join()
    line = json.loads(caplog.records[-1].getMessage())
    assert 0.25 < line["seconds"]["queue"] <= line["seconds"]["total"]


def test_a_bad_item_leaves_the_others_alone(handler: Any) -> None:
    records = ask(handler, ["Rate?", {"image": "?"}, None, ["nested"], "Axis?"])
    assert ["error" in record for record in records] == [False, True, True, True, False]


def test_a_bad_parameter_gives_an_error_for_each_input(handler: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pulse.requests")
    records = ask(handler, ["a", "b", "c"], top_p=7)
    assert [list(record) for record in records] == [ERROR_FIELDS] * 3
    assert [json.loads(line.getMessage())["batch_size"] for line in caplog.records] == [3] * 3


def test_commentaries_of_a_batch_are_asked_for_side_by_side(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "_commentary", FakeCommentary(seconds=0.5))
    started = time.perf_counter()
    records = ask(handler, ["a", "b", "c", "d", "e"], enable_turkish_commentary=True, max_new_tokens=1)
    assert time.perf_counter() - started < 5 * 0.5
    assert [record["commentary_status"] for record in records] == ["success"] * 5


def test_the_commentary_does_not_hold_the_device(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Waiting(FakeCommentary):
        def comment_all(self, english_texts: list[str], *, timeout_s: float, cancel: Any = None) -> Any:
            assert release.wait(30)
            return super().comment_all(english_texts, timeout_s=timeout_s)

    monkeypatch.setattr(handler, "_commentary", Waiting())
    slow = threading.Thread(target=ask, args=(handler, "Rate?"), kwargs={"enable_turkish_commentary": True})
    slow.start()
    try:
        assert ask(handler, "Axis?")[0]["generated_text"]
        assert slow.is_alive()
    finally:
        release.set()
        slow.join()


def test_past_the_queue_requests_are_refused(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pulse_ecg.admission import Admission

    monkeypatch.setattr(handler, "_admission", Admission(1, 0))
    with handler._admission.admitted():
        (record,) = ask(handler, "Rate?")
    assert "waiting" in record["error"]
    assert "error" not in ask(handler, "Rate?")[0]


# --- what must not leak


def test_a_fault_of_ours_is_a_record_without_its_message(
    handler: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("patient Jane Doe in /srv/secret")

    caplog.set_level(logging.DEBUG)
    with monkeypatch.context() as broken:
        broken.setattr(TransformersEngine, "_prefill_chunk", fail)
        (record,) = ask(handler, "Rate?")
    assert list(record) == ERROR_FIELDS
    reference = re.search(r"reference (\w+)", record["error"])
    assert reference is not None
    logged = caplog.text
    assert reference[1] in logged
    assert "RuntimeError" in logged and "test_handler.py" in logged
    assert not any(secret in logged + record["error"] for secret in ("Jane", "/srv"))
    assert ask(handler, "Rate?")[0]["generated_text"]


def test_logs_hold_no_content(handler: Any, sample_png: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    data = encoded(sample_png)
    (record,) = ask(handler, {"query": "Patient Jane Doe?", "image": data}, enable_turkish_commentary=True)
    ask(handler, {"query": "Jane", "image": "http://images.invalid/ecg.png?token=tttt"})
    ask(handler, "Jane", sekret="Jane")
    assert "image_width" in caplog.text  # it does log
    for content in ("Jane", data[:40], record["generated_text"], "tttt", "ecg.png"):
        assert content not in caplog.text


def test_one_log_line_for_each_record(handler: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pulse.requests")
    handler({"inputs": ["Rate?", None], "parameters": PLAIN})
    handler({})
    handler({"inputs": "x", "parameters": {"top_p": 3}})
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "pulse.requests"]
    assert sorted(line["outcome"] for line in lines) == ["invalid", "malformed", "malformed", "ok"]


def test_the_monitor_counts_what_happened(handler: Any, sample_png: bytes) -> None:
    def count(outcome: str) -> int:
        return sum(e["count"] for e in handler.monitor.snapshot()["requests"] if e["outcome"] == outcome)

    before = count("ok"), count("invalid")
    ask(handler, [{"image": encoded(sample_png)}, {"image": "%"}])
    assert (count("ok"), count("invalid")) == (before[0] + 1, before[1] + 1)
    text = handler.monitor.prometheus_text()
    assert 'pulse_stage_seconds_count{stage="prefill"}' in text
    assert 'image="base64"' in text


def test_only_stages_that_there_were_are_timed(handler: Any) -> None:
    def counts() -> dict[str, float]:
        return {name: stage["count"] for name, stage in handler.monitor.snapshot()["stages"].items()}

    before = counts()
    ask(handler, "Rate?", enable_turkish_commentary=True)  # without a key: none is asked for
    grown = {name for name, count in counts().items() if count > before.get(name, 0)}
    assert grown == {"queue", "prefill", "token", "total"}


def test_the_queue_and_batch_gauges_follow_the_requests(handler: Any) -> None:
    batches = handler.monitor.snapshot()["batch_size"]["count"]
    ask(handler, ["Rate?", "Axis?"])
    snapshot = handler.monitor.snapshot()
    assert snapshot["batch_size"]["count"] == batches + 1
    assert snapshot["queue_size"] == snapshot["active_requests"] == 0


# --- loading


def test_the_host_can_load_the_file_without_the_folder_on_its_path(demo_checkpoint: Path, tmp_path: Path) -> None:
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", {str(ROOT / "handler.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules["handler.EndpointHandler"] = module
spec.loader.exec_module(module)
handler = module.EndpointHandler({str(demo_checkpoint)!r})
print(handler({{"inputs": "Rate?", "parameters": {{"max_new_tokens": 3}}}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PULSE_DEVICE": "cpu", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "generated_text" in done.stdout, done.stderr[-2000:]


@pytest.fixture
def fresh_handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from handler import EndpointHandler

    monkeypatch.setenv("PULSE_DEVICE", "cpu")
    yield EndpointHandler


def test_a_bad_variable_stops_the_start(
    fresh_handler: Any, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PULSE_DTYPE", "float8")
    with pytest.raises(ConfigurationError, match="PULSE_DTYPE"):
        fresh_handler(str(demo_checkpoint))


def test_a_bad_policy_stops_the_start_before_the_weights_are_read(
    fresh_handler: Any, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PULSE_ALLOWED_IMAGE_HOSTS", "images.example.org:8080")
    monkeypatch.setattr("handler.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigurationError, match="PULSE_ALLOWED_IMAGE_HOSTS"):
        fresh_handler(str(demo_checkpoint))


def test_defaults_come_from_the_file_alone(handler: Any) -> None:
    values = json.loads((ROOT / "generation_config.json").read_text("utf-8"))
    for name in ("max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "repetition_penalty"):
        assert getattr(handler._defaults, name) == values[name]
    source = "".join(file.read_text("utf-8") for file in [ROOT / "handler.py", *(ROOT / "pulse_ecg").glob("*.py")])
    assert "1.05" not in source
    assert importlib.util.find_spec("pulse_ecg") is not None
