"""The monitor under 10,000 requests from 16 threads: counts exact, memory flat, logs without content."""

from __future__ import annotations

import gc
import json
import logging
import re
import threading
import tracemalloc
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from monitoring.report import STAGES
from pulse_ecg.config import Settings
from server.service import Service
from server.settings import ServerSettings
from utils import PerformanceMonitor, RequestReport, new_request_id, outcome_of

THREADS, REQUESTS = 16, 10_000
ROOT = Path(__file__).parents[1]


def one_report(number: int) -> RequestReport:
    return RequestReport(
        form=("text", "object", "chat", f"made up by caller {number}")[number % 4],
        image_source=("none", "url")[number % 2],
        outcome=outcome_of((200, 422)[number % 5 == 0]),
        commentary_status="success",
        prompt_tokens=10,
        image_tokens=100,
        generated_tokens=5,
        commentary_tokens=7,
        timings_s=dict.fromkeys(STAGES, 0.01),
    )


def drive(monitor: PerformanceMonitor, requests: int) -> None:
    def work(first: int) -> None:
        for number in range(first, requests, THREADS):
            with monitor.active():
                monitor.observe_batch(number % 8 + 1)
                monitor.finish(one_report(number))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_ten_thousand_requests_are_counted_exactly_and_leave_nothing_behind() -> None:
    logging.getLogger("pulse.requests").setLevel(logging.WARNING)
    monitor = PerformanceMonitor()
    drive(monitor, 500)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    drive(monitor, REQUESTS - 500)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    logging.getLogger("pulse.requests").setLevel(logging.NOTSET)
    assert grown < 100_000
    snapshot = monitor.snapshot()
    assert sum(entry["count"] for entry in snapshot["requests"]) == REQUESTS
    assert sum(entry["count"] for entry in snapshot["requests"] if entry["outcome"] == "invalid") == REQUESTS / 5
    assert sum(entry["count"] for entry in snapshot["requests"] if entry["form"] == "other") == REQUESTS / 4
    assert snapshot["commentary"] == {"success": REQUESTS}
    assert snapshot["tokens"] == {
        "prompt": 10 * REQUESTS, "image": 100 * REQUESTS, "generated": 5 * REQUESTS, "commentary": 7 * REQUESTS,
    }  # fmt: skip
    assert {stage: entry["count"] for stage, entry in snapshot["stages"].items()} == dict.fromkeys(STAGES, REQUESTS)
    assert snapshot["batch_size"]["count"] == REQUESTS
    assert snapshot["active_requests"] == 0


def test_text_and_snapshot_say_the_same() -> None:
    monitor = PerformanceMonitor(gpu_memory=lambda: {"allocated": 2**30})
    drive(monitor, 100)
    monitor.watch_queue(lambda: 3)
    families = {family.name: family for family in text_string_to_metric_families(monitor.prometheus_text())}
    snapshot = json.loads(json.dumps(monitor.snapshot()))
    total = sum(sample.value for sample in families["pulse_requests"].samples if sample.name.endswith("_total"))
    assert total == sum(entry["count"] for entry in snapshot["requests"]) == 100
    assert families["pulse_queue_size"].samples[0].value == snapshot["queue_size"] == 3
    assert families["pulse_gpu_memory_bytes"].samples[0].value == snapshot["memory_bytes"]["gpu_allocated"] == 2**30
    assert snapshot["memory_bytes"]["process"] > 1_000_000
    assert snapshot["stages"]["vision"]["mean"] == pytest.approx(0.01)
    assert 0.005 <= snapshot["stages"]["vision"]["p95"] <= 0.01


def test_monitors_do_not_meet() -> None:
    first, second = PerformanceMonitor(), PerformanceMonitor()
    first.count_commentary("success")
    assert second.snapshot()["commentary"] == {}


def test_stage_times_into_the_report() -> None:
    monitor, report = PerformanceMonitor(), RequestReport()
    with monitor.stage("fetch", report), monitor.stage("decode"):
        pass
    assert list(report.timings_s) == ["fetch"]
    assert list(monitor.snapshot()["stages"]) == ["decode"]


def test_a_failing_gpu_reading_does_not_take_the_metrics_with_it() -> None:
    def broken() -> dict[str, float]:
        raise RuntimeError("CUDA error")

    assert "pulse_queue_size" in PerformanceMonitor(gpu_memory=broken).prometheus_text()


def test_one_log_line_per_request_without_content(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pulse.requests")
    monitor = PerformanceMonitor()
    content = "Ayşe\n{65 years}"
    report = one_report(0)
    report.request_id = report.form = report.image_source = report.finish_reason = report.model_revision = content
    report.timings_s[content] = 1.0
    monitor.finish(report)
    (record,) = caplog.records
    line = record.getMessage()
    assert "\n" not in line and "65 years" not in line and "Ay" not in line
    entry = json.loads(line)
    assert entry["form"] == entry["image"] == "other" and entry["prompt_tokens"] == 10
    assert set(entry["seconds"]) == {*STAGES, "other"}


def test_request_ids() -> None:
    assert new_request_id("trace-1.2") == "trace-1.2"
    assert re.fullmatch("[0-9a-f]{16}", new_request_id("no good\n"))
    assert new_request_id() != new_request_id()


def test_the_dashboard_asks_only_for_metrics_that_exist() -> None:
    monitor = PerformanceMonitor(gpu_memory=lambda: {"allocated": 1})
    drive(monitor, 16)
    service = Service(ServerSettings(port=0), Settings())
    service.entered()
    service.left("/", 429)
    exposed = set(re.findall(r"^(\w+)", monitor.prometheus_text() + service.metrics(), re.MULTILINE))
    dashboard = json.loads((ROOT / "deploy" / "grafana_dashboard.json").read_text("utf-8"))
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"\bpulse_\w+", target["expr"])
    }
    assert asked and asked <= exposed
