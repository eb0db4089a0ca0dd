"""Token for token what the official code says, and its logits within 1e-4."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import torch

from demo.random_weights import CheckpointShape
from pulse_ecg.analyzer import EcgAnalyzer
from pulse_ecg.checkpoint import load_model
from pulse_ecg.config import Settings
from pulse_ecg.fetch import FetchPolicy
from pulse_ecg.generation import AnswerStream
from pulse_ecg.images import image_source
from pulse_ecg.params import load_defaults
from pulse_ecg.prompt import Conversation, Turn
from pulse_ecg.request import AnalysisRequest
from pulse_ecg.tokenizer import Tokenizer
from tests import reference
from tests.parity import cases, oracle

# Time for the official code to be installed and asked; it is asked once.
pytestmark = [pytest.mark.parity, pytest.mark.timeout(3600)]

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


@pytest.fixture(scope="module")
def analyzers(official: Any) -> dict[str, EcgAnalyzer]:
    settings = Settings(device="cpu")
    return {name: EcgAnalyzer(load_model(oracle.WORK / name, settings), FetchPolicy()) for name in CASES}


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
    merge_type: str, case: cases.Case, official: Any, analyzers: dict[str, EcgAnalyzer], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = official["answers"][merge_type][case.name]
    logits: list[torch.Tensor] = []
    forward = AnswerStream._forward

    def recorded(self: AnswerStream, *args: Any) -> torch.Tensor:
        logits.append(forward(self, *args))
        return logits[-1]

    monkeypatch.setattr(AnswerStream, "_forward", recorded)
    analyzer = analyzers[merge_type]
    prepared = analyzer.prepare(request_of(case))
    assert prepared.prompt.ids == expected["prompt_ids"]
    analysis = analyzer.answer(prepared)
    assert analysis.generation.token_ids == expected["token_ids"]
    assert analysis.text == expected["text"]
    if case.repetition_penalty == 1.0:  # the official scores are the raw logits then
        scores = torch.from_numpy(official["logits"][f"{merge_type}/{case.name}"])
        torch.testing.assert_close(torch.stack(logits[: len(scores)]), scores, atol=1e-4, rtol=0)


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
