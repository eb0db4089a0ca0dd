"""The custom handler of a Hugging Face Inference Endpoint: PULSE-7B reads an ECG image and answers a question about it.

The host loads this file under a module name of its own, so there are no relative imports here, and puts the
repository on ``sys.path`` in a form that Python may ignore, so this file adds its own folder.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent
if str(_ROOT) not in sys.path:
    sys.path.insert(0, str(_ROOT))

from pulse_ecg.admission import Admission, Presence  # noqa: E402
from pulse_ecg.analyzer import Analysis, EcgAnalyzer, PreparedRequest  # noqa: E402
from pulse_ecg.call import (  # noqa: E402
    PROCESSING_METHOD,
    Answered,
    Call,
    Outcome,
    Record,
    Started,
    TextPiece,
    error_outcome,
    unheard,
)
from pulse_ecg.checkpoint import load_model  # noqa: E402
from pulse_ecg.config import Settings  # noqa: E402
from pulse_ecg.device import in_passing_thread  # noqa: E402
from pulse_ecg.engines import start_engine  # noqa: E402
from pulse_ecg.errors import PulseError, RequestCancelledError, place_of  # noqa: E402
from pulse_ecg.fetch import FetchPolicy  # noqa: E402
from pulse_ecg.params import GenerationParams, load_defaults  # noqa: E402
from pulse_ecg.request import parse_input, split_inputs  # noqa: E402
from pulse_ecg.stock_container import admit_requests, end_process  # noqa: E402
from utils import (  # noqa: E402
    Commentary,
    DeepSeekClient,
    PerformanceMonitor,
    RequestReport,
    new_request_id,
    outcome_of,
)

logger = logging.getLogger("pulse_ecg.handler")

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
            EngineStoppedError: vLLM, where that is asked for, did not start.
        """
        started = time.perf_counter()
        self._settings = Settings.from_env()
        self._defaults = load_defaults(_ROOT)
        policy = FetchPolicy.from_settings(self._settings)
        model = in_passing_thread(partial(load_model, path or _ROOT, self._settings))
        engine = in_passing_thread(partial(start_engine, model, self._settings))
        self._analyzer = EcgAnalyzer(model, policy, engine=engine)
        self._commentary = _commentary_client(self._settings)
        self._admission = Admission(self._settings.max_concurrent_requests, self._settings.max_queued_requests)
        # An image may have 20 MB: the items of all batches hold no more of them than single requests may.
        self._with_images = Admission(self._settings.max_concurrent_requests + self._settings.max_queued_requests, 0)
        self.monitor = PerformanceMonitor(gpu_memory=model.device_memory)
        self.monitor.watch_queue(lambda: self._admission.waiting)
        self._analyzer.warm_up()
        self._in_stock_container = admit_requests(self._settings.max_concurrent_requests)
        logger.info("Ready after %.1f s.", time.perf_counter() - started)

    @property
    def admission(self) -> Admission:
        """Who is worked on and who waits, for a host that shows it."""
        return self._admission

    @property
    def alive(self) -> bool:
        """Whether its engine can still answer; once false, the process is to be replaced."""
        return self._analyzer.engine_alive

    def close(self) -> None:
        """End the engine, with processes of its own where it has any; for a host that is about to exit abruptly."""
        self._analyzer.close()

    @property
    def model_name(self) -> str:
        """What records call the model."""
        return self._analyzer.model.config.name

    def __call__(self, data: Any) -> list[Record]:
        """Answer a request body; one record per input, in order.  Never raises for what a caller sent.

        Args:
            data: ``{"inputs": …, "parameters": {…}}`` with the forms and parameters that README.md lists.
        """
        records = [outcome.record for outcome in self.respond(data)]
        if self._in_stock_container and not self.alive:
            self._in_stock_container = False  # once
            end_process()
        return records

    def respond(self, data: Any, call: Call | None = None) -> list[Outcome]:
        """The same for a host that has HTTP statuses, shows answers as they grow, or may hang up: see :class:`Call`.

        Images are fetched and commentaries asked for side by side, and without a place among the running answers.
        """
        call = replace(call or Call(), request_id=new_request_id(call.request_id if call else None))
        arrived, inputs = time.perf_counter(), list[object]([None])
        try:
            inputs, parameters = split_inputs(data)
            params = self._defaults.updated(parameters)
            with self._admission.admitted(call.cancel) as present:
                self.monitor.observe_batch(len(inputs))
                report = partial(self._report, call, len(inputs))
                attempts = [_Attempt(item, params, call, report(), arrived, present) for item in inputs]
                _side_by_side(self._answer, attempts, at_once=self._settings.max_concurrent_requests)
        except PulseError as error:
            return [self._refused(error, call, arrived, batch_size=len(inputs)) for _ in inputs]
        if params.enable_turkish_commentary:
            self._comment(attempts, call)
        return [self._complete(attempt) for attempt in attempts]

    def note_refusal(self, error: PulseError, request_id: str) -> None:
        """Count and log a request that a host refused without asking here; the answer to it is the host's."""
        self._refused(error, Call(request_id), time.perf_counter(), batch_size=1)

    def _answer(self, attempt: _Attempt) -> None:
        """Parse, prepare, wait for a place, generate."""
        call, report = attempt.call, attempt.report
        with _boundary(attempt), ExitStack() as held:
            request = parse_input(attempt.item, attempt.params)
            report.form, report.image_source = request.form, request.image.kind if request.image else "none"
            if request.image:
                held.enter_context(self._with_images.place(cancel=call.cancel, deadline=call.deadline))
            report.timings_s["queue"] = time.perf_counter() - attempt.arrived
            prepared = self._analyzer.prepare(request, cancel=call.cancel, deadline=call.deadline)
            report.image_bytes = prepared.image_bytes
            call.listen(Started(self.model_name))
            with self._place(attempt):
                analysis = attempt.analysis = self._generated(prepared, call)
            report.timings_s["queue"] += analysis.timings["queue"]
            analysis.timings["queue"] = report.timings_s["queue"]
            _note(report, analysis)
            call.listen(Answered(self._record(analysis, attempt.params)))

    @contextmanager
    def _place(self, attempt: _Attempt) -> Iterator[None]:
        """A place among the running answers; the wait for it counts as queueing."""
        call, waiting = attempt.call, time.perf_counter()
        place = self._admission.place(attempt.present, cancel=call.cancel, deadline=call.deadline)
        with place, self.monitor.active():
            attempt.report.timings_s["queue"] += time.perf_counter() - waiting
            yield

    def _generated(self, prepared: PreparedRequest, call: Call) -> Analysis:
        """The answer, told piece by piece if somebody listens."""
        tell = None if call.listen is unheard else (lambda text: call.listen(TextPiece(text)))
        analysis = self._analyzer.answer(prepared, cancel=call.cancel, deadline=call.deadline, tell=tell)
        if analysis.generation.finish_reason == "cancelled":
            raise RequestCancelledError("The request was cancelled while it was answered.")
        return analysis

    def _comment(self, attempts: Sequence[_Attempt], call: Call) -> None:
        """Ask for the commentaries on what was answered, side by side."""
        answered = [(attempt, attempt.analysis) for attempt in attempts if attempt.analysis and not attempt.error]
        if not answered:
            return
        started = time.perf_counter()
        texts = [analysis.text for _, analysis in answered]
        commentaries = self._commentaries(texts, attempts[0].params.deepseek_timeout, call)
        seconds = time.perf_counter() - started
        for (attempt, analysis), commentary in zip(answered, commentaries, strict=True):
            attempt.commentary, report = commentary, attempt.report
            analysis.timings["commentary"] = seconds
            report.commentary_tokens = commentary.tokens_spent
            if call.cancel.is_set():
                attempt.error = RequestCancelledError("The request was cancelled while it waited for its commentary.")
                if commentary.status == "failed":
                    continue  # cut off: that says nothing of the service
            report.commentary_status = commentary.status
            if commentary.status in ("success", "failed"):  # else nothing was asked for
                report.timings_s["commentary"] = seconds

    def _commentaries(self, answers: list[str], timeout_s: float, call: Call) -> list[Commentary]:
        """One for each answer, whatever happens.  The answers alone leave the machine: no image, no question."""
        model = self._settings.commentary_model
        if self._commentary is None:
            return [Commentary.unavailable(model)] * len(answers)
        if call.deadline is not None:
            timeout_s = max(0.0, min(timeout_s, call.deadline - time.monotonic()))
        try:
            return self._commentary.comment_all(answers, timeout_s=timeout_s, cancel=call.cancel)
        except Exception as error:  # noqa: BLE001 - a boundary: the English answers do not fail with it
            logger.error("request_id=%s %s", call.request_id, place_of(error))
            return [Commentary("failed", model=model, error="The commentary could not be made.")] * len(answers)

    def _complete(self, attempt: _Attempt) -> Outcome:
        """Close the books."""
        report, error = attempt.report, attempt.error
        report.outcome = outcome_of(error.status if error else 200)
        report.timings_s["total"] = time.perf_counter() - attempt.arrived
        self.monitor.finish(report)
        if error:
            return error_outcome(error, self.model_name)
        assert attempt.analysis is not None
        return Outcome(self._record(attempt.analysis, attempt.params, attempt.commentary))

    def _record(self, analysis: Analysis, params: GenerationParams, commentary: Commentary | None = None) -> Record:
        text = f"{analysis.question}\n{analysis.text}" if params.return_full_text else analysis.text
        record = {"generated_text": text, "model": self.model_name, "processing_method": PROCESSING_METHOD}
        commented = commentary.record_fields() if commentary else {}
        details = {"details": self._details(analysis)} if params.details else {}
        return record | commented | details

    def _details(self, analysis: Analysis) -> Record:
        generation = analysis.generation
        return {
            "finish_reason": generation.finish_reason,
            "prompt_tokens": analysis.prompt.length,
            "image_tokens": analysis.prompt.image_tokens,
            "generated_tokens": len(generation.token_ids),
            "seed": generation.seed,
            "timings": {stage: round(seconds, 6) for stage, seconds in analysis.timings.items()},
            "engine": self._settings.engine_name,
            "model_revision": self._analyzer.model.revision,
        }

    def _refused(self, error: PulseError, call: Call, arrived: float, *, batch_size: int) -> Outcome:
        """What comes of an input whose request was refused as a whole."""
        report = self._report(call, batch_size)
        return self._complete(_Attempt(None, self._defaults, call, report, arrived, error=error))

    def _report(self, call: Call, batch_size: int) -> RequestReport:
        return RequestReport(
            request_id=new_request_id(call.request_id),
            engine=self._settings.engine_name,
            model_revision=self._analyzer.model.revision,
            batch_size=batch_size,
        )


@dataclass
class _Attempt:
    """One input on its way to its outcome: what is known of it so far."""

    item: object = field(repr=False)
    params: GenerationParams
    call: Call
    report: RequestReport
    arrived: float
    present: Presence | None = None
    analysis: Analysis | None = None
    commentary: Commentary | None = None
    error: PulseError | None = None


@contextmanager
def _boundary(attempt: _Attempt) -> Iterator[None]:
    """The host's boundary: whatever fails in the block fails this input alone."""
    try:
        yield
    except PulseError as error:
        attempt.error = error
    except Exception as error:  # noqa: BLE001 - the boundary
        reference = attempt.report.request_id
        logger.error("request_id=%s %s", reference, place_of(error))
        attempt.error = PulseError(f"An internal error stopped this request (reference {reference}).")


def _side_by_side(work: Callable[[_Attempt], None], attempts: Sequence[_Attempt], *, at_once: int) -> None:
    if len(attempts) == 1:
        work(attempts[0])
        return
    with suppress(RuntimeError), ThreadPoolExecutor(min(len(attempts), at_once)) as threads:
        for attempt in attempts:
            threads.submit(work, attempt)
    for attempt in attempts:  # the system had no thread for them
        if attempt.analysis is None and attempt.error is None:
            work(attempt)


def _note(report: RequestReport, analysis: Analysis) -> None:
    """What the monitor is to know of an answer: sizes and times, never content."""
    generation, prompt = analysis.generation, analysis.prompt
    report.finish_reason = generation.finish_reason
    report.prompt_tokens, report.image_tokens = prompt.length, prompt.image_tokens
    report.generated_tokens = len(generation.token_ids)
    if prompt.image:
        report.image_width, report.image_height = prompt.image.size
    report.timings_s |= {
        _MONITORED_STAGES.get(stage, stage): seconds
        for stage, seconds in analysis.timings.items()
        if stage != "decode" and seconds > 0  # a stage that there was not would make the others look shorter
    }
    if len(generation.token_ids) > 1:  # the first token comes with the prefill
        report.timings_s["token"] = analysis.timings["decode"] / (len(generation.token_ids) - 1)


def _commentary_client(settings: Settings) -> DeepSeekClient | None:
    """The commentary client, or None where it cannot be loaded: the English answers do not depend on it."""
    try:
        return DeepSeekClient(settings)
    except ImportError as error:
        logger.warning("Commentary is unavailable: %s cannot be imported.", error.name)
        return None
