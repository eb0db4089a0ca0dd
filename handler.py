"""The custom handler of a Hugging Face Inference Endpoint: PULSE-7B reads an ECG image and answers a question about it.

The host loads this file under a module name of its own, so there are no relative imports here, and puts the
repository on ``sys.path`` in a form that Python may ignore, so this file adds its own folder.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from utils import Commentary, DeepSeekClient

logger = logging.getLogger("pulse_ecg.handler")

Record = dict[str, Any]

HANDLER_NAME = "Ubden® Team Enhanced Handler"
PROCESSING_METHOD = "pipeline"


class EndpointHandler:
    """Loads the model once; each call answers one request.  Calls from several threads are welcome."""

    def __init__(self, path: str = "") -> None:
        """Load the checkpoint in ``path``, or the one that ``PULSE_MODEL_ID`` names if ``path`` holds no weights.

        Raises:
            ConfigurationError: an environment variable or ``generation_config.json`` has a value that cannot be used.
            CheckpointError: the checkpoint is incomplete or of another kind.
        """
        started = time.perf_counter()
        self._settings = Settings.from_env()
        self._defaults = load_defaults(_ROOT)
        self._analyzer = EcgAnalyzer(load_model(path or _ROOT, self._settings), FetchPolicy.from_settings(self._settings))
        self._commentary = _commentary_client(self._settings)
        self._admission = Admission(self._settings.max_concurrent_requests, self._settings.max_queued_requests)
        self._device_turn = Lock()
        logger.info("Ready after %.1f s.", time.perf_counter() - started)

    def __call__(self, data: Any) -> list[Record]:
        """Answer a request body; one record per input, in order.  Never raises for what a caller sent.

        Args:
            data: ``{"inputs": …, "parameters": {…}}`` with the forms and parameters that README.md lists.
        """
        try:
            inputs, parameters = split_inputs(data)
        except PulseError as error:
            return [self._error_record(str(error))]
        try:
            params = self._defaults.updated(parameters)
            with self._admission.admitted():
                if len(inputs) == 1:
                    return [self._record(inputs[0], params)]
                # Images are fetched and commentaries asked for side by side; the device answers one at a time.
                with ThreadPoolExecutor(min(len(inputs), self._settings.max_concurrent_requests)) as threads:
                    return list(threads.map(lambda item: self._record(item, params), inputs))
        except PulseError as error:
            return [self._error_record(str(error)) for _ in inputs]

    def _record(self, item: object, params: GenerationParams) -> Record:
        """The record of one input.  The host's boundary: whatever fails here fails this input alone."""
        reference, started = uuid.uuid4().hex[:12], time.perf_counter()
        try:
            request = parse_input(item, params)
            prepared = self._analyzer.prepare(request)
            with self._device_turn:
                analysis = self._analyzer.answer(prepared)
            record = self._success_record(analysis, params)
        except PulseError as error:
            logger.info("request=%s outcome=%s", reference, type(error).__name__)
            return self._error_record(str(error))
        except Exception as error:
            # Type and place alone: the message of a foreign error can hold what the caller sent.
            place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__)))
            logger.error("request=%s outcome=%s at %s", reference, type(error).__name__, place)
            return self._error_record(f"An internal error stopped this request (reference {reference}); it was logged.")
        logger.info(
            "request=%s outcome=answered form=%s prompt_tokens=%d image_tokens=%d generated_tokens=%d seconds=%.3f",
            reference,
            request.form,
            analysis.prompt.length,
            analysis.prompt.image_tokens,
            len(analysis.generation.token_ids),
            time.perf_counter() - started,
        )
        return record

    def _success_record(self, analysis: Analysis, params: GenerationParams) -> Record:
        text = f"{analysis.question}\n{analysis.text}" if params.return_full_text else analysis.text
        record: Record = {
            "generated_text": text,
            "model": self._analyzer.model.config.name,
            "processing_method": PROCESSING_METHOD,
        }
        timings = dict(analysis.timings)
        if params.enable_turkish_commentary:
            started = time.perf_counter()
            record |= self._comment(analysis.text, params.deepseek_timeout)
            timings["commentary"] = time.perf_counter() - started
        if params.details:
            record["details"] = self._details(analysis, timings)
        return record

    def _comment(self, answer: str, timeout_s: float) -> Record:
        """The commentary's fields.  The answer alone leaves the machine: no image, no question."""
        if self._commentary is None:
            fields = {"comment_text": "", "commentary_model": self._settings.commentary_model, "commentary_tokens": 0}
            return {**fields, "commentary_status": "unavailable"}
        commentary: Commentary = self._commentary.comment(answer, timeout_s=timeout_s)
        return commentary.record_fields()

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
        from utils import DeepSeekClient

        return DeepSeekClient(settings)
    except ImportError as error:
        logger.warning("Commentary is unavailable: %s cannot be imported.", error.name)
        return None
