"""Token for token what the official code says, and its logits but for rounding, with many answers at once."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from demo.random_weights import CheckpointShape
from pulse_ecg.analyzer import Analysis, EcgAnalyzer
from pulse_ecg.checkpoint import load_model
from pulse_ecg.config import Settings
from pulse_ecg.engine.scheduler import TransformersEngine
from pulse_ecg.fetch import FetchPolicy
from pulse_ecg.images import image_source
from pulse_ecg.params import load_defaults
from pulse_ecg.prompt import Conversation, Turn
from pulse_ecg.request import AnalysisRequest
from pulse_ecg.tokenizer import Tokenizer
from tests import reference
from tests.parity import cases, oracle

# Time for the official code to be installed and asked; it is asked once.
pytestmark = [pytest.mark.parity, pytest.mark.timeout(3600)]

ROUNDING = 3e-6
"""How far logits may be off, in shares of the largest: float32 keeps 6e-8, and sums in another order add up to this."""

TOKENIZERS = {"demo": oracle.WORK / "flat"} | ({"pulse-7b": reference.FOLDER} if reference.FOLDER.is_dir() else {})
CASES = {name: cases.generation_cases(name) for name in cases.MERGE_TYPES}
CASES |= {name: cases.variant_cases() for name in cases.VARIANTS} | {"grouped_heads": cases.variant_cases()}


@pytest.fixture(scope="module")
def official() -> Any:
    oracle.WORK.mkdir(parents=True, exist_ok=True)
    folders = {name: oracle.checkpoint(name, merge_type=name) for name in cases.MERGE_TYPES}
    folders |= {name: oracle.checkpoint(name, config=config) for name, config in cases.VARIANTS.items()}
    folders["grouped_heads"] = oracle.checkpoint("grouped_heads", shape=CheckpointShape(heads=4, kv_heads=2))
    return oracle.expectations(folders, CASES, TOKENIZERS)


@dataclass(frozen=True)
class Answered:
    """What our side said to one case."""

    analysis: Analysis
    logits: list[torch.Tensor]


@pytest.fixture(scope="module")
def ours(official: Any) -> dict[str, dict[str, Answered]]:
    """Every case, all of a checkpoint's at once: prompts are prefilled while others decode, eight to a step."""
    logits: dict[int, list[torch.Tensor]] = {}
    choose = TransformersEngine._choose

    def recorded(engine: TransformersEngine, logits_bv: torch.Tensor, sequences: list[Any]) -> Any:
        for sequence, logits_v in zip(sequences, logits_bv, strict=True):
            logits.setdefault(id(sequence.answer.prompt), []).append(logits_v.clone())
        return choose(engine, logits_bv, sequences)

    def answered(name: str) -> dict[str, Answered]:
        analyzer = EcgAnalyzer(load_model(oracle.WORK / name, Settings(device="cpu")), FetchPolicy())
        prepared = [analyzer.prepare(request_of(case)) for case in CASES[name]]
        with ThreadPoolExecutor(len(prepared)) as threads:
            analyses = list(threads.map(analyzer.answer, prepared))
        return {
            case.name: Answered(analysis, logits[id(request.prompt)])
            for case, request, analysis in zip(CASES[name], prepared, analyses, strict=True)
        }

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TransformersEngine, "_choose", recorded)
        return {name: answered(name) for name in CASES}


def request_of(case: cases.Case) -> AnalysisRequest:
    turns = tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(case.turns))
    image = None
    if case.image:
        encoded = base64.b64encode((oracle.WORK / f"{case.image}.png").read_bytes()).decode()
        image = image_source(f"data:image/png;base64,{encoded}")
    params = load_defaults(oracle.ROOT).updated(
        {
            "do_sample": False,
            "repetition_penalty": case.repetition_penalty,
            "max_new_tokens": case.max_new_tokens,
            "stop": [],
        }
    )
    return AnalysisRequest(Conversation(turns), image, params, "chat")


@pytest.mark.parametrize(
    ("merge_type", "case"),
    [pytest.param(name, case, id=f"{name}-{case.name}") for name in CASES for case in CASES[name]],
)
def test_answer_equals_the_official_one(
    merge_type: str, case: cases.Case, official: Any, ours: dict[str, dict[str, Answered]]
) -> None:
    expected, answered = official["answers"][merge_type][case.name], ours[merge_type][case.name]
    assert answered.analysis.prompt.ids == expected["prompt_ids"]
    assert answered.analysis.generation.token_ids == expected["token_ids"]
    assert answered.analysis.text == expected["text"]
    if case.repetition_penalty == 1.0:  # the official scores are the raw logits then
        scores = torch.from_numpy(official["logits"][f"{merge_type}/{case.name}"])
        ours_of_scores = torch.stack(answered.logits[: len(scores)])
        torch.testing.assert_close(ours_of_scores, scores, atol=ROUNDING * float(scores.abs().max()), rtol=0)


def test_the_cases_can_tell_answers_apart(official: Any) -> None:
    """A checkpoint that says the same to everything would prove nothing."""
    answers = official["answers"]["flat"]
    by_image = {tuple(answers[f"{image}-plain"]["token_ids"]) for image in cases.IMAGES}
    by_question = {tuple(answers[f"wide-{question}"]["token_ids"]) for question in cases.QUESTIONS}
    assert len(by_image) == len(cases.IMAGES)
    assert len(by_question) == len(cases.QUESTIONS)
    assert all(len(set(ids)) > len(ids) / 2 for ids in by_image)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_equal_the_official_ones(name: str, official: Any) -> None:
    tokenizer = Tokenizer.from_folder(TOKENIZERS[name])
    for text, expected in zip(cases.tokenizer_texts(), official["tokenizers"][name], strict=True):
        assert tokenizer.encode(text) == expected, repr(text)
