"""The same cases through vLLM: token for token what the official code says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pulse_ecg.analyzer import Analysis
from tests.engines import running
from tests.parity import cases, oracle
from tests.parity.test_parity import CASES, official, request_of

__all__ = ["official"]

pytest.importorskip("vllm")
pytestmark = [pytest.mark.parity, pytest.mark.vllm, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module", params=CASES)
def answered(request: pytest.FixtureRequest, official: Any) -> tuple[str, dict[str, Analysis]]:
    """A checkpoint's name and the answers to its cases, all asked at once, twice: the second time of a used engine."""
    name: str = request.param
    with running("vllm", oracle.WORK / name) as analyzer:
        prepared = [analyzer.prepare(request_of(case)) for case in CASES[name]]
        with ThreadPoolExecutor(len(prepared)) as threads:
            list(threads.map(analyzer.answer, prepared))
            analyses = list(threads.map(analyzer.answer, prepared))
    return name, {case.name: analysis for case, analysis in zip(CASES[name], analyses, strict=True)}


def test_answers_equal_the_official_ones(answered: tuple[str, dict[str, Analysis]], official: Any) -> None:
    name, analyses = answered
    for case in CASES[name]:
        expected, analysis = official["answers"][name][case.name], analyses[case.name]
        assert analysis.prompt.ids == expected["prompt_ids"], case.name
        assert analysis.generation.token_ids == expected["token_ids"], case.name
        assert analysis.text == expected["text"], case.name


def test_the_cases_ask_for_penalties() -> None:
    """What vLLM's penalty counts in a prompt of embeddings would otherwise go unnoticed."""
    assert any(case.repetition_penalty > 1 for name in cases.MERGE_TYPES for case in CASES[name])
