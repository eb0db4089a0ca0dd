"""Which engine answers."""

from __future__ import annotations

from pulse_ecg.checkpoint import LoadedModel
from pulse_ecg.config import Settings
from pulse_ecg.engine.scheduler import TransformersEngine
from pulse_ecg.errors import ConfigurationError, excerpt
from pulse_ecg.generation import Engine
from pulse_ecg.vllm_engine.version import REQUIREMENTS


def start_engine(model: LoadedModel, settings: Settings) -> Engine:
    """The engine that the settings name, on a model that was loaded with them.

    Raises:
        ConfigurationError: a setting of the engine cannot be used.
        EngineStoppedError: it did not start.
    """
    if settings.engine == "transformers":
        return TransformersEngine(model, max_slots=settings.max_concurrent_requests)
    try:
        from pulse_ecg.vllm_engine.engine import VllmEngine  # noqa: PLC0415 - vLLM is not there unless it is asked for
    except ImportError as error:  # it is there, but another version of it than this engine was written for
        missing = (
            f"something of {excerpt(error.name, 64)} is missing" if error.name else "one of its libraries is missing"
        )
        raise ConfigurationError(
            f"PULSE_ENGINE is 'vllm', but this vLLM cannot be used ({missing}): install {REQUIREMENTS}."
        ) from error
    return VllmEngine(model, settings.vllm_args, max_answers=settings.max_concurrent_requests)
