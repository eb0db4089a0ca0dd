"""The engines that the tests can run, each on a model of its own; vLLM's where vLLM is installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pulse_ecg.analyzer import EcgAnalyzer
from pulse_ecg.checkpoint import load_model
from pulse_ecg.config import Settings
from pulse_ecg.engines import start_engine
from pulse_ecg.fetch import FetchPolicy

VLLM_ARGS = {"kv_cache_memory_bytes": 256 * 2**20}

ENGINES = ["transformers"]
if importlib.util.find_spec("vllm"):
    ENGINES.append(pytest.param("vllm", marks=pytest.mark.vllm))  # type: ignore[arg-type]


def settings_for(engine: str, **more: Any) -> Settings:
    """On a CPU."""
    return Settings(device="cpu", engine=engine, vllm_args=VLLM_ARGS if engine == "vllm" else {}, **more)


@contextmanager
def running(engine: str, checkpoint: Path, **more: Any) -> Iterator[EcgAnalyzer]:
    """An analyzer on an engine; vLLM's processes end with the block."""
    settings = settings_for(engine, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own
        model = load_model(checkpoint, settings)
        analyzer = EcgAnalyzer(model, FetchPolicy(), engine=start_engine(model, settings))
        try:
            yield analyzer
        finally:
            analyzer.close()
