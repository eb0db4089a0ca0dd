"""The custom handler of a Hugging Face Inference Endpoint: PULSE-7B reads an ECG image and answers a question about it.

The host loads this file under a module name of its own, so there are no relative imports here, and puts the
repository on ``sys.path`` in a form that Python may ignore, so this file adds its own folder.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

_ROOT = Path(__file__).resolve().parent
if str(_ROOT) not in sys.path:
    sys.path.insert(0, str(_ROOT))

from pulse_ecg.admission import Admission  # noqa: E402
from pulse_ecg.analyzer import Analysis, EcgAnalyzer  # noqa: E402
from pulse_ecg.checkpoint import load_model  # noqa: E402
from pulse_ecg.config import Settings  # noqa: E402
from pulse_ecg.errors import PulseError  # noqa: E402
from pulse_ecg.fetch import FetchPolicy  # noqa: E402
from pulse_ecg.params import GenerationParams, load_defaults  # noqa: E402
from pulse_ecg.request import parse_input, split_inputs  # noqa: E402
from utils import Commentary, DeepSeekClient, PerformanceMonitor, RequestReport, outcome_of  # noqa: E402

logger = logging.getLogger("pulse_ecg.handler")

Record = dict[str, Any]

HANDLER_NAME = "Ubden® Team Enhanced Handler"
PROCESSING_METHOD = "pipeline"

# What the monitor calls the stages of `details.timings`.
_MONITORED_STAGES = {"image_fetch": "fetch", "image_decode": "decode"}


class EndpointHandler:
    """Loads the model once; each call answers one request.  Calls from several threads are welcome.

    ``monitor`` counts and times what happens, for a host that wants to show it.
    """

    def __init__(self, path: str = "") -> None:
        """Load the checkpoint in ``path``, or the one that ``PULSE_MODEL_ID`` names if ``path`` holds no weights.

        Raises:
            ConfigurationError: an environment variable or ``generation_config.json`` has a value that cannot be used.
            CheckpointError: the checkpoint is incomplete or of another kind.
        """
        started = time.perf_counter()
        self._settings = Settings.from_env()
        self._defaults = load_defaults(_ROOT)
        policy = FetchPolicy.from_settings(self._settings)
        model = load_model(path or _ROOT, self._settings)
        self._analyzer = EcgAnalyzer(model, policy)
        self._commentary = _commentary_client(self._settings)
        self._admission = Admission(self._settings.max_concurrent_requests, self._settings.max_queued_requests)
        self._device_turn = Lock()
        self.monitor = PerformanceMonitor(gpu_memory=model.device_memory)
        self.monitor.watch_queue(lambda: self._admission.waiting)
        logger.info("Ready after %.1f s.", time.perf_counter() - started)

    def __call__(self, data: Any) -> list[Record]:
        """Answer a request body; one record per input, in order.  Never raises for what a caller sent.

        Args:
            data: ``{"inputs": …, "parameters": {…}}`` with the forms and parameters that README.md lists.
        """
        inputs: list[object] = [None]
        arrived = time.perf_counter()
        try:
            inputs, parameters = split_inputs(data)
            params = self._defaults.updated(parameters)
            with self._admission.admitted(), self.monitor.active():
                return self._records(inputs, params, arrived)
        except PulseError as error:
            return [self._refused(error, arrived) for _ in inputs]

    def _records(self, inputs: list[object], params: GenerationParams, arrived: float) -> list[Record]:
        """Images are fetched and commentaries asked for side by side; the device answers one at a time."""
        self.monitor.observe_batch(len(inputs))
        if len(inputs) == 1:
            return [self._record(inputs[0], params, arrived)]
        with ThreadPoolExecutor(min(len(inputs), self._settings.max_concurrent_requests)) as threads:
            return list(threads.map(lambda item: self._record(item, params, arrived, len(inputs)), inputs))

    def _record(self, item: object, params: GenerationParams, arrived: float, batch_size: int = 1) -> Record:
        """The record of one input.  The host's boundary: whatever fails here fails this input alone."""
        report = self._report(batch_size)
        report.timings_s["queue"] = time.perf_counter() - arrived
        try:
            return self._answered(item, params, report)
        except PulseError as error:
            report.outcome = outcome_of(error.status)
            return self._error_record(str(error))
        except Exception as error:  # noqa: BLE001 - the boundary
            # Type and place alone: the message of a foreign error can hold what the caller sent.
            frames = reversed(traceback.extract_tb(error.__traceback__))
            place = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
            logger.error("request_id=%s %s at %s", report.request_id, type(error).__name__, place)
            return self._error_record(f"An internal error stopped this request (reference {report.request_id}).")
        finally:
            report.timings_s["total"] = time.perf_counter() - arrived
            self.monitor.finish(report)

    def _answered(self, item: object, params: GenerationParams, report: RequestReport) -> Record:
        """Parse, prepare, answer, comment; fills the report on the way."""
        request = parse_input(item, params)
        report.form, report.image_source = request.form, request.image.kind if request.image else "none"
        prepared = self._analyzer.prepare(request)
        report.image_bytes = prepared.image_bytes
        with self._turn(report):
            analysis = self._analyzer.answer(prepared)
        timings = dict(analysis.timings)
        record = self._success_record(analysis, params)
        if params.enable_turkish_commentary:
            started = time.perf_counter()
            commentary = self._comment(analysis.text, params.deepseek_timeout)
            timings["commentary"] = time.perf_counter() - started
            record |= commentary.record_fields()
            report.commentary_status, report.commentary_tokens = commentary.status, commentary.tokens_spent
        if params.details:
            record["details"] = self._details(analysis, timings)
        self._complete(report, analysis, timings)
        return record

    @contextmanager
    def _turn(self, report: RequestReport) -> Iterator[None]:
        """Hold the device; the wait for it counts as queueing."""
        waiting = time.perf_counter()
        with self._device_turn:
            report.timings_s["queue"] += time.perf_counter() - waiting
            yield

    def _comment(self, answer: str, timeout_s: float) -> Commentary:
        """The commentary on an answer.  The answer alone leaves the machine: no image, no question."""
        if self._commentary is None:
            return Commentary.unavailable(self._settings.commentary_model)
        return self._commentary.comment(answer, timeout_s=timeout_s)

    def _success_record(self, analysis: Analysis, params: GenerationParams) -> Record:
        text = f"{analysis.question}\n{analysis.text}" if params.return_full_text else analysis.text
        name = self._analyzer.model.config.name
        return {"generated_text": text, "model": name, "processing_method": PROCESSING_METHOD}

    def _details(self, analysis: Analysis, timings: dict[str, float]) -> Record:
        generation = analysis.generation
        return {
            "finish_reason": generation.finish_reason,
            "prompt_tokens": analysis.prompt.length,
            "image_tokens": analysis.prompt.image_tokens,
            "generated_tokens": len(generation.token_ids),
            "seed": generation.seed,
            "timings": {stage: round(seconds, 6) for stage, seconds in timings.items()},
            "engine": self._settings.engine,
            "model_revision": self._analyzer.model.revision,
        }

    def _complete(self, report: RequestReport, analysis: Analysis, timings: dict[str, float]) -> None:
        """What the monitor is to know of an answer: sizes and times, never content."""
        generation, prompt = analysis.generation, analysis.prompt
        report.outcome, report.finish_reason = "ok", generation.finish_reason
        report.prompt_tokens, report.image_tokens = prompt.length, prompt.image_tokens
        report.generated_tokens = len(generation.token_ids)
        if prompt.image:
            report.image_width, report.image_height = prompt.image.tiles.image_size
        report.timings_s |= {
            _MONITORED_STAGES.get(stage, stage): s for stage, s in timings.items() if stage != "decode"
        }
        if len(generation.token_ids) > 1:  # the first token comes with the prefill
            report.timings_s["token"] = timings["decode"] / (len(generation.token_ids) - 1)

    def _refused(self, error: PulseError, arrived: float) -> Record:
        """The record of an input whose request was refused as a whole."""
        report = self._report()
        report.outcome = outcome_of(error.status)
        report.timings_s["total"] = time.perf_counter() - arrived
        self.monitor.finish(report)
        return self._error_record(str(error))

    def _report(self, batch_size: int = 1) -> RequestReport:
        revision = self._analyzer.model.revision
        return RequestReport(engine=self._settings.engine, model_revision=revision, batch_size=batch_size)

    def _error_record(self, message: str) -> Record:
        return {
            "generated_text": "",
            "error": message,
            "model": self._analyzer.model.config.name,
            "handler": HANDLER_NAME,
            "success": False,
        }


def _commentary_client(settings: Settings) -> DeepSeekClient | None:
    """The commentary client, or None where it cannot be loaded: the English answers do not depend on it."""
    try:
        return DeepSeekClient(settings)
    except ImportError as error:
        logger.warning("Commentary is unavailable: %s cannot be imported.", error.name)
        return None
