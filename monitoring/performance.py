"""Counts, latencies and memory, as Prometheus text and as a JSON snapshot.

Every label takes one of a fixed set of values, so the monitor's own size does not depend on how much it has seen.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from monitoring.report import (
    COMMENTARY_STATUSES,
    FORMS,
    IMAGE_SOURCES,
    OUTCOMES,
    STAGES,
    RequestReport,
    known,
)

logger = logging.getLogger("pulse.requests")

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
_QUANTILES = (0.5, 0.95, 0.99)
_TOKEN_KINDS = ("prompt", "image", "generated", "commentary")


class PerformanceMonitor:
    """Thread-safe; each instance has a registry of its own, so that two in one process do not meet.

    ``gpu_memory`` returns bytes by kind (such as ``{"allocated": …, "reserved": …}``) and is asked at each reading;
    the caller supplies it so that nothing here imports torch.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, *, gpu_memory: Callable[[], Mapping[str, float]] | None = None) -> None:
        self.registry = CollectorRegistry()
        self._gpu_memory = gpu_memory
        self._started = time.time()
        registry = self.registry
        self._requests = Counter(
            "pulse_requests",
            "Requests by form, image source and outcome.",
            ("form", "image", "outcome"),
            registry=registry,
        )
        self._commentaries = Counter("pulse_commentaries", "Commentaries by status.", ("status",), registry=registry)
        self._tokens = Counter("pulse_tokens", "Tokens in and out by kind.", ("kind",), registry=registry)
        self._stages = Histogram(
            "pulse_stage_seconds", "Seconds by stage.", ("stage",), buckets=_SECONDS, registry=registry
        )
        self._batch = Histogram("pulse_batch_size", "Inputs of a request.", buckets=_BATCH_SIZES, registry=registry)
        self._queue = Gauge("pulse_queue_size", "Requests waiting.", registry=registry)
        self._active = Gauge("pulse_active_requests", "Requests worked on.", registry=registry)
        self._process = Gauge("pulse_process_memory_bytes", "Resident memory of this process.", registry=registry)
        self._gpu = Gauge("pulse_gpu_memory_bytes", "GPU memory by kind.", ("kind",), registry=registry)
        self._process.set_function(_resident_bytes)

    def count_request(self, *, form: str, image_source: str, outcome: str) -> None:
        labels = known(form, FORMS), known(image_source, IMAGE_SOURCES), known(outcome, OUTCOMES)
        self._requests.labels(*labels).inc()

    def count_commentary(self, status: str) -> None:
        self._commentaries.labels(known(status, COMMENTARY_STATUSES)).inc()

    def count_tokens(self, kind: str, number: int) -> None:
        """``kind`` is "prompt", "image", "generated" or "commentary"."""
        if number > 0:
            self._tokens.labels(known(kind, _TOKEN_KINDS)).inc(number)

    def observe(self, stage: str, seconds: float) -> None:
        """One duration of a stage; ``STAGES`` lists them ("token" is the time of one generated token)."""
        self._stages.labels(known(stage, STAGES)).observe(seconds)

    @contextmanager
    def stage(self, name: str, report: RequestReport | None = None) -> Iterator[None]:
        """Time the block into ``report``, whose :meth:`finish` observes it, or observe it at once without one."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            if report is None:
                self.observe(name, seconds)
            else:
                report.timings_s[name] = report.timings_s.get(name, 0.0) + seconds

    @contextmanager
    def active(self) -> Iterator[None]:
        """Counts a request as worked on while the block runs."""
        self._active.inc()
        try:
            yield
        finally:
            self._active.dec()

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Have the queue's size asked of ``waiting`` at each reading."""
        self._queue.set_function(waiting)

    def observe_batch(self, sequences: int) -> None:
        self._batch.observe(sequences)

    def finish(self, report: RequestReport) -> None:
        """Count everything that the report holds and write its one log line."""
        self.count_request(form=report.form, image_source=report.image_source, outcome=report.outcome)
        self.count_commentary(report.commentary_status)
        for kind in _TOKEN_KINDS:
            self.count_tokens(kind, getattr(report, f"{kind}_tokens"))
        for stage, seconds in report.timings_s.items():
            self.observe(stage, seconds)
        logger.info("%s", report.log_line())

    def prometheus_text(self) -> str:
        """The text exposition format, to be served with :attr:`content_type`."""
        self._read_gpu()
        return generate_latest(self.registry).decode()

    def snapshot(self) -> dict[str, Any]:
        """The same numbers as plain JSON values; quantiles are read off the histogram's buckets."""
        self._read_gpu()
        samples = {
            (s.name, tuple(s.labels.items())): s.value for metric in self.registry.collect() for s in metric.samples
        }

        def by_label(name: str) -> list[tuple[dict[str, str], float]]:
            return [(dict(labels), value) for (sample, labels), value in samples.items() if sample == name]

        return {
            "uptime_s": round(time.time() - self._started, 3),
            "requests": [{**labels, "count": int(value)} for labels, value in by_label("pulse_requests_total")],
            "commentary": {labels["status"]: int(value) for labels, value in by_label("pulse_commentaries_total")},
            "tokens": {labels["kind"]: int(value) for labels, value in by_label("pulse_tokens_total")},
            "stages": {
                labels["stage"]: _histogram(by_label, "pulse_stage_seconds", labels)
                for labels, _ in by_label("pulse_stage_seconds_count")
            },
            "batch_size": _histogram(by_label, "pulse_batch_size", {}),
            "queue_size": int(samples[("pulse_queue_size", ())]),
            "active_requests": int(samples[("pulse_active_requests", ())]),
            "memory_bytes": {
                "process": int(samples[("pulse_process_memory_bytes", ())]),
                **{f"gpu_{labels['kind']}": int(value) for labels, value in by_label("pulse_gpu_memory_bytes")},
            },
        }

    def _read_gpu(self) -> None:
        if self._gpu_memory is None:
            return
        try:
            reading = self._gpu_memory()
        except RuntimeError as error:  # a device fault must not take the metrics with it
            logger.warning("gpu memory could not be read: %s", type(error).__name__)
            return
        for kind, size in reading.items():
            self._gpu.labels(kind).set(size)


def _histogram(
    by_label: Callable[[str], list[tuple[dict[str, str], float]]], name: str, labels: Mapping[str, str]
) -> dict[str, float]:
    """Count, mean and quantiles of one histogram."""

    def mine(suffix: str) -> list[tuple[dict[str, str], float]]:
        return [(found, value) for found, value in by_label(name + suffix) if labels.items() <= found.items()]

    count, total = mine("_count")[0][1], mine("_sum")[0][1]
    buckets = [(float(found["le"]), value) for found, value in mine("_bucket")]
    result = {"count": int(count), "mean": round(total / count, 6) if count else 0.0}
    return result | {f"p{round(100 * q)}": round(_quantile(buckets, q), 6) for q in _QUANTILES}


def _quantile(buckets: list[tuple[float, float]], q: float) -> float:
    """Linear within the bucket that holds it, as Prometheus' ``histogram_quantile``."""
    rank = q * buckets[-1][1]
    lower, below = 0.0, 0.0
    for upper, cumulative in buckets:
        if cumulative >= rank and cumulative > below:
            return lower if upper == float("inf") else lower + (upper - lower) * (rank - below) / (cumulative - below)
        lower, below = upper, cumulative
    return 0.0


def _resident_bytes() -> float:
    try:
        return float(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0.0
