"""What the transformers engine shows its model, and how it fails; what every engine answers is in test_engines."""

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
from pulse_ecg.engine.runner import ModelRunner
from pulse_ecg.engine.scheduler import TransformersEngine
from pulse_ecg.errors import OutOfMemoryError
from pulse_ecg.fetch import FetchPolicy
from pulse_ecg.generation import EncodedPrompt, Generation, TextGenerator
from pulse_ecg.params import GenerationParams, load_defaults
from pulse_ecg.request import parse_input

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


def generator(model: LoadedModel) -> TextGenerator:
    return TextGenerator(TransformersEngine(model), model.config, model.tokenizer)


def prompt_for(analyzer: EcgAnalyzer, image: Image.Image | None, question: str = "Rate?") -> EncodedPrompt:
    return analyzer.prepare(parse_input({"query": question, "image": image} if image else question, GREEDY)).prompt


SAMPLED = replace(GREEDY, do_sample=True, temperature=1.5, top_p=1.0, top_k=0, seed=3)


def test_a_change_in_any_tile_changes_the_first_logits(analyzer: EcgAnalyzer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile reaches the model, the overview included."""
    prompt = prompt_for(analyzer, picture(size=(700, 700)))
    assert prompt.image is not None and prompt.image.tiles is not None
    seen: list[torch.Tensor] = []
    choose = TransformersEngine._choose
    monkeypatch.setattr(
        TransformersEngine, "_choose", lambda engine, logits, who: seen.append(logits) or choose(engine, logits, who)
    )

    def first_logits(key: str) -> torch.Tensor:
        image = replace(prompt.image, key=key)  # another image as far as the engine remembers
        next(iter(generator(analyzer.model).stream(replace(prompt, image=image), GREEDY)))
        return seen[-1]

    tiles = prompt.image.tiles.pixels_TCHW
    before = first_logits("before")
    for tile in range(len(tiles)):
        tiles[tile] *= -1
        assert not torch.allclose(before, first_logits(f"{tile}"), atol=1e-3), f"tile {tile} is not seen"
        tiles[tile] *= -1


def test_prompt_length_counts_the_image_in_place_of_its_slot(
    analyzer: EcgAnalyzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[torch.Tensor] = []
    embed = ModelRunner.embed
    monkeypatch.setattr(ModelRunner, "embed", lambda *given: embedded.append(embed(*given)) or embedded[-1])
    prompt = prompt_for(analyzer, picture(seed=77))
    next(iter(generator(analyzer.model).stream(prompt, GREEDY)))
    assert embedded[0].shape[1] == prompt.length == len(prompt.ids) - 1 + prompt.image_tokens


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


def out_of_gpu_memory(*_: object, **__: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory at /secret")


def out_of_cpu_memory(*_: object, **__: object) -> torch.Tensor:
    return torch.empty(10**15)  # torch's own refusal, in its own words


def out_of_library_memory(*_: object, **__: object) -> torch.Tensor:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)` at /secret")


@pytest.mark.parametrize("forward", [out_of_gpu_memory, out_of_cpu_memory, out_of_library_memory])
def test_out_of_memory_fails_the_request_alone(
    analyzer: EcgAnalyzer, monkeypatch: pytest.MonkeyPatch, forward: Any
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(ModelRunner, "prefill", forward)
        with pytest.raises(OutOfMemoryError, match="no memory left") as caught:
            ask(analyzer, GREEDY)
    assert "secret" not in str(caught.value)
    assert ask(analyzer, GREEDY).text


def test_other_runtime_errors_are_not_taken_for_memory(analyzer: EcgAnalyzer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ModelRunner, "prefill", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        ask(analyzer, GREEDY)


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


@pytest.mark.parametrize("step", ["load_image", "tile_image"])
def test_no_more_images_are_decoded_at_once_than_there_are_cores(
    step: str, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pulse_ecg import analyzer as module

    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    analyzer, lock = EcgAnalyzer(model, FetchPolicy()), threading.Lock()
    now, most, done = 0, 0, getattr(module, step)

    def counted(*given: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return done(*given)

    monkeypatch.setattr(module, step, counted)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda seed: prompt_for(analyzer, picture(seed)), range(8)))
    assert most == 2
