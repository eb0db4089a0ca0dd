"""Decoding: one path for stream and whole answer, its limits and its ends, and what the model is shown."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from demo.build_checkpoint import build_checkpoint
from pulse_ecg.analyzer import EcgAnalyzer
from pulse_ecg.anyres import merge_order
from pulse_ecg.checkpoint import LoadedModel, load_model
from pulse_ecg.config import Settings
from pulse_ecg.errors import OutOfMemoryError, PromptTooLongError
from pulse_ecg.fetch import FetchPolicy
from pulse_ecg.generation import AnswerStream, EncodedPrompt, Generation, TextGenerator
from pulse_ecg.images import DecodedImage
from pulse_ecg.params import GenerationParams, load_defaults
from pulse_ecg.request import AnalysisRequest, parse_input

ROOT = Path(__file__).parents[1]
DEFAULTS = load_defaults(ROOT)
GREEDY = replace(DEFAULTS, do_sample=False, max_new_tokens=24, stop=())


@pytest.fixture(scope="module")
def model(demo_checkpoint: Path) -> LoadedModel:
    return load_model(demo_checkpoint, Settings(device="cpu"))


@pytest.fixture(scope="module")
def analyzer(model: LoadedModel) -> EcgAnalyzer:
    return EcgAnalyzer(model, FetchPolicy())


def picture(seed: int = 0, size: tuple[int, int] = (700, 500)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 20, size[0] // 20, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def ask(
    analyzer: EcgAnalyzer, params: GenerationParams, image: Image.Image | None = None, question: str = "Rate?"
) -> Generation:
    inputs = {"query": question, "image": image} if image else question
    return analyzer.analyze(parse_input(inputs, params)).generation


def prompt_for(analyzer: EcgAnalyzer, image: Image.Image | None, question: str = "Rate?") -> EncodedPrompt:
    return analyzer.prepare(parse_input({"query": question, "image": image} if image else question, GREEDY)).prompt


SAMPLED = replace(GREEDY, do_sample=True, temperature=1.5, top_p=1.0, top_k=0, seed=3)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(SAMPLED, stop=("e", "ST"))])
@pytest.mark.parametrize("with_image", [True, False])
def test_the_stream_joined_is_the_answer(analyzer: EcgAnalyzer, params: GenerationParams, with_image: bool) -> None:
    request = parse_input({"query": "Rate?", "image": picture()} if with_image else "Rate?", params)
    steps = list(analyzer.stream(analyzer.prepare(request)))
    whole = analyzer.analyze(request).generation
    assert "".join(step.text for step in steps) == whole.text
    assert [step.token_id for step in steps] == whole.token_ids
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].finish_reason == whole.finish_reason
    assert whole.text == whole.text.strip()


def test_another_image_changes_the_answer(analyzer: EcgAnalyzer) -> None:
    answers = {tuple(ask(analyzer, GREEDY, picture(seed)).token_ids) for seed in range(4)}
    assert len(answers) == 4
    assert tuple(ask(analyzer, GREEDY).token_ids) not in answers


def test_a_change_in_any_tile_changes_the_first_logits(analyzer: EcgAnalyzer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile reaches the model, the overview included."""
    prompt = prompt_for(analyzer, picture(size=(700, 700)))
    assert prompt.image is not None

    def first_logits() -> torch.Tensor:
        stream = TextGenerator(analyzer.model).stream(prompt, GREEDY)
        return stream._forward(stream._embed(), None)  # type: ignore[arg-type]

    tiles = prompt.image.tiles.pixels_TCHW
    before = first_logits()
    for tile in range(len(tiles)):
        tiles[tile] *= -1
        assert not torch.allclose(before, first_logits(), atol=1e-3), f"tile {tile} is not seen"
        tiles[tile] *= -1


@pytest.mark.parametrize("seed", [0, 17, 2**63 - 1])
def test_the_same_seed_gives_the_same_answer(analyzer: EcgAnalyzer, seed: int) -> None:
    params = replace(SAMPLED, seed=seed)
    first, second = ask(analyzer, params, picture()), ask(analyzer, params, picture())
    assert first.token_ids == second.token_ids
    assert first.seed == seed
    assert ask(analyzer, replace(SAMPLED, seed=1000), picture()).token_ids != first.token_ids


def test_without_a_seed_answers_vary_and_can_be_repeated(analyzer: EcgAnalyzer) -> None:
    params = replace(SAMPLED, seed=None)
    first, second = ask(analyzer, params), ask(analyzer, params)
    assert first.token_ids != second.token_ids
    assert ask(analyzer, replace(params, seed=first.seed)).token_ids == first.token_ids
    assert first.seed is not None and 0 <= first.seed < 2**53  # JavaScript's numbers are exact so far


@pytest.mark.parametrize(
    "params", [replace(GREEDY, do_sample=True, temperature=0.0), replace(GREEDY, do_sample=True, top_k=1)]
)
def test_zero_temperature_and_top_one_are_greedy(analyzer: EcgAnalyzer, params: GenerationParams) -> None:
    assert ask(analyzer, params).token_ids == ask(analyzer, GREEDY).token_ids


def test_max_new_tokens_ends_the_answer_with_length(analyzer: EcgAnalyzer) -> None:
    longer = ask(analyzer, GREEDY)
    for limit in (1, 2, 7):
        shorter = ask(analyzer, replace(GREEDY, max_new_tokens=limit))
        assert shorter.token_ids == longer.token_ids[:limit]
        assert shorter.finish_reason == "length"


def test_end_of_sequence_ends_the_answer_and_is_not_shown(analyzer: EcgAnalyzer, model: LoadedModel) -> None:
    free = ask(analyzer, GREEDY)
    ending = free.token_ids[5]
    config = replace(model.config, eos_ids=frozenset({ending}))
    cut = ask(EcgAnalyzer(replace(model, config=config), FetchPolicy()), GREEDY)
    at = free.token_ids.index(ending)
    assert cut.token_ids == free.token_ids[: at + 1]
    assert cut.finish_reason == "eos"
    assert cut.text == model.tokenizer.decode(free.token_ids[:at]).strip()


def test_a_stop_string_cuts_wherever_tokens_fall(analyzer: EcgAnalyzer, model: LoadedModel) -> None:
    free = ask(analyzer, GREEDY)
    for start in range(0, len(free.text) - 5, 3):
        stop = free.text[start : start + 5]
        cut = ask(analyzer, replace(GREEDY, stop=(stop,)))
        assert cut.finish_reason == "stop"
        assert cut.text == free.text[: free.text.index(stop)].strip()
        assert len(cut.token_ids) <= len(free.token_ids)


class TestPositions:
    """Prompt, image and answer share the context."""

    def limited(self, model: LoadedModel, positions: int) -> EcgAnalyzer:
        config = replace(model.config, llama=type(model.config.llama)(**model.config.llama.to_dict()))
        config.llama.max_position_embeddings = positions
        return EcgAnalyzer(replace(model, config=config), FetchPolicy())

    @pytest.mark.parametrize("image", [None, picture()])
    def test_the_answer_is_cut_to_what_is_left(
        self, model: LoadedModel, analyzer: EcgAnalyzer, image: Image.Image | None
    ) -> None:
        free = ask(analyzer, GREEDY, image)
        length = prompt_for(analyzer, image).length
        for left in (1, 3):
            cut = ask(self.limited(model, length + left), GREEDY, image)
            assert cut.token_ids == free.token_ids[:left]
            assert cut.finish_reason == "length"

    @pytest.mark.parametrize("image", [None, picture()])
    def test_a_prompt_that_leaves_no_room_is_refused_with_its_length(
        self, model: LoadedModel, analyzer: EcgAnalyzer, image: Image.Image | None
    ) -> None:
        length = prompt_for(analyzer, image).length
        with pytest.raises(PromptTooLongError, match=f"{length:,} tokens"):
            ask(self.limited(model, length), GREEDY, image)

    def test_prompt_length_counts_the_image_in_place_of_its_slot(
        self, model: LoadedModel, analyzer: EcgAnalyzer
    ) -> None:
        prompt = prompt_for(analyzer, picture())
        stream = TextGenerator(model).stream(prompt, GREEDY)
        assert stream._embed().shape[1] == prompt.length == len(prompt.ids) - 1 + prompt.image_tokens


def test_cancelling_ends_within_a_token(analyzer: EcgAnalyzer) -> None:
    cancel = threading.Event()
    stream = analyzer.stream(analyzer.prepare(parse_input("Rate?", GREEDY)), cancel=cancel)
    steps = []
    for step in stream:
        steps.append(step)
        if len(steps) == 3:
            cancel.set()
    assert len(steps) == 3
    assert stream.finish_reason == "cancelled"


def test_nothing_is_computed_before_the_first_token_is_asked_for(
    analyzer: EcgAnalyzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[object] = []
    embed = AnswerStream._embed
    monkeypatch.setattr(AnswerStream, "_embed", lambda stream: computed.append(stream) or embed(stream))
    stream = analyzer.stream(analyzer.prepare(parse_input("Rate?", GREEDY)))
    assert not computed
    next(iter(stream))
    assert computed == [stream]
    stream.close()


def test_the_language_model_head_sees_one_position_at_a_time(
    analyzer: EcgAnalyzer, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[Any] = []
    hook = model.network.language_model.lm_head.register_forward_hook(
        lambda _, given, __: shapes.append(given[0].shape)
    )
    try:
        ask(analyzer, GREEDY, picture())
    finally:
        hook.remove()
    assert len(shapes) == len(set(shapes)) * len(shapes) and shapes[0].numel() == model.config.llama.hidden_size


def out_of_gpu_memory(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory at /secret")


def out_of_cpu_memory(*_: object) -> torch.Tensor:
    return torch.empty(10**15)  # torch's own refusal, in its own words


@pytest.mark.parametrize("forward", [out_of_gpu_memory, out_of_cpu_memory])
def test_out_of_memory_fails_the_request_alone(
    analyzer: EcgAnalyzer, monkeypatch: pytest.MonkeyPatch, forward: Any
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(AnswerStream, "_forward", forward)
        with pytest.raises(OutOfMemoryError, match="no memory left") as caught:
            ask(analyzer, GREEDY)
    assert "secret" not in str(caught.value)
    assert ask(analyzer, GREEDY).text


def test_other_runtime_errors_are_not_taken_for_memory(analyzer: EcgAnalyzer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(AnswerStream, "_forward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        ask(analyzer, GREEDY)


def test_threads_do_not_disturb_each_other(analyzer: EcgAnalyzer) -> None:
    questions = [f"Question {number}?" for number in range(6)]
    alone = [ask(analyzer, GREEDY, question=question).token_ids for question in questions]
    together: dict[int, list[int]] = {}

    def work(number: int) -> None:
        together[number] = ask(analyzer, GREEDY, question=questions[number]).token_ids

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(6)] == alone


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_merged_features_follow_the_order(merge_type: Any, tmp_path: Path) -> None:
    model = load_model(build_checkpoint(tmp_path / "c", merge_type=merge_type), Settings(device="cpu"))
    network, side = model.network, model.config.patches_per_side
    order = merge_order(merge_type, grid=(2, 2), side=side, image_size=(700, 500))
    features = torch.randn(5, side * side, model.config.llama.hidden_size)
    merged = network.merge(features, torch.from_numpy(order))
    flat = features.flatten(0, 1)
    for position, source in enumerate(order.tolist()):
        expected = network.image_newline if source < 0 else flat[source]
        assert torch.equal(merged[position], expected)


def test_tiles_are_encoded_independently_of_each_other(model: LoadedModel) -> None:
    tiles = torch.randn(3, 3, 336, 336)
    with torch.inference_mode():
        together = model.network.encode_tiles(tiles)
        alone = torch.cat([model.network.encode_tiles(tile[None]) for tile in tiles])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_an_image_object_is_answered_like_its_file(analyzer: EcgAnalyzer) -> None:
    request = parse_input(picture(), GREEDY)
    assert isinstance(request, AnalysisRequest)
    assert isinstance(request.image, DecodedImage)
    assert (
        analyzer.analyze(request).generation.token_ids
        == ask(analyzer, GREEDY, picture(), request.conversation.question).token_ids
    )


def test_no_more_images_are_decoded_at_once_than_there_are_cores(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pulse_ecg import analyzer as module

    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    analyzer, lock = EcgAnalyzer(model, FetchPolicy()), threading.Lock()
    now, most, cut = 0, 0, module.tile_image

    def counted(*given: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return cut(*given)

    monkeypatch.setattr(module, "tile_image", counted)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda seed: prompt_for(analyzer, picture(seed)), range(8)))
    assert most == 2
