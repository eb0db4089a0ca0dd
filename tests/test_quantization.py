"""Quantised weights: which layers have them, what memory they take, also while loading, and what answers come of it."""

from __future__ import annotations

import base64
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from demo.build_checkpoint import build_checkpoint
from demo.random_weights import CheckpointShape
from pulse_ecg import quantization
from pulse_ecg.analyzer import EcgAnalyzer
from pulse_ecg.checkpoint import LoadedModel, load_model
from pulse_ecg.config import QUANTIZATIONS, Settings
from pulse_ecg.errors import CheckpointError, ConfigurationError
from pulse_ecg.fetch import FetchPolicy
from pulse_ecg.params import load_defaults
from pulse_ecg.quantization import Int4Linear, Int8Linear, QuantizedLinear
from pulse_ecg.request import parse_input
from tests.conftest import ROOT
from tests.test_checkpoint import edit_config, edit_tensors
from tests.test_structure import SOURCES, imported

KINDS = ["int8", "int4"]
GREEDY = replace(load_defaults(ROOT), do_sample=False, max_new_tokens=24, stop=())
MODERATE = CheckpointShape(layers=4, hidden=768, heads=6, kv_heads=6, intermediate=2048)
BITS = {"int8": 8 + 32 / 256, "int4": 4 + 32 / 64}  # of a weight, its share of a block's scale included


@pytest.fixture(scope="module")
def moderate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    """A checkpoint of moderate width, as it is and quantised."""
    folder = build_checkpoint(tmp_path_factory.mktemp("moderate") / "checkpoint", shape=MODERATE, dtype="float16")
    return {kind: loaded(folder, kind) for kind in ("none", *KINDS)}


def loaded(folder: Path, kind: str, dtype: str = "auto") -> LoadedModel:
    return load_model(folder, Settings(device="cpu", dtype=dtype, quantization=kind))


def decoder_linears(model: LoadedModel) -> dict[str, Any]:
    decoder = model.network.language_model.model
    return {name: module for name, module in decoder.named_modules() if name.endswith("_proj")}


def logits(model: LoadedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        output: Tensor = model.network.language_model(ids).logits
    return output.float()[..., WORDS]


# --- what is quantised


@pytest.mark.parametrize(("kind", "layer"), [("int8", Int8Linear), ("int4", Int4Linear)])
def test_the_decoders_linear_layers_are_quantised_and_nothing_else(
    kind: str, layer: type[QuantizedLinear], demo_checkpoint: Path
) -> None:
    model = loaded(demo_checkpoint, kind)
    linears = decoder_linears(model)
    assert len(linears) == 7 * model.config.llama.num_hidden_layers
    for name, module in linears.items():
        assert type(module) is layer, name
        assert module.weight.dtype == torch.uint8, name
    network, plain = model.network, loaded(demo_checkpoint, "none").network
    assert type(network.language_model.lm_head) is nn.Linear
    assert sum(isinstance(module, QuantizedLinear) for module in network.modules()) == len(linears)
    for name, parameter in plain.named_parameters():
        if not name.endswith("_proj.weight") or not name.startswith("language_model."):
            assert torch.equal(network.get_parameter(name), parameter), name


def test_without_quantisation_no_layer_changes_and_the_library_is_not_imported(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    for module in decoder_linears(loaded(demo_checkpoint, "none")).values():
        assert type(module) is nn.Linear
    assert not [file.name for file in SOURCES if "bitsandbytes" in imported(file)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_quantised_layers_take_a_half_or_a_quarter_of_16_bits(kind: str, dtype: str, demo_checkpoint: Path) -> None:
    plain = decoder_linears(loaded(demo_checkpoint, "none", "float16"))
    layers = decoder_linears(loaded(demo_checkpoint, kind, dtype))
    taken = sum(layer.weight.nbytes + layer.scales.absmax.nbytes for layer in layers.values())
    share = taken / sum(layer.weight.nbytes for layer in plain.values())
    assert share == pytest.approx(BITS[kind] / 16, rel=1e-3)
    assert share == pytest.approx({"int8": 0.51, "int4": 0.28}[kind], abs=0.005)


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_says_that_weights_are_quantised(
    kind: str, demo_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="pulse_ecg.checkpoint"):
        loaded(demo_checkpoint, kind)
    [line] = [record.getMessage() for record in caplog.records if record.name == "pulse_ecg.checkpoint"]
    assert line.endswith(f"the decoder's linear layers as {kind}.")


# --- what it costs: rounding of the weights, and of nothing else

# A weight's error over its layer's standard deviation, root mean square.  Of 255 even levels in blocks of 256 normal
# values, and of NF4 in blocks of 64, 0.6 and 9 percent are to be expected.
ROUNDING = {"int8": 0.008, "int4": 0.11}
# Of the logits of words, relative to their standard deviation: these random models amplify an error several times.
LOGITS = {"int8": 0.03, "int4": 0.4}
WORDS = slice(3 + 256, None)  # the other pieces are kept from being said by logits far below


def dequantised(layer: nn.Module, width: int) -> Tensor:
    with torch.inference_mode():
        product: Tensor = layer(torch.eye(width))
    return product.T


@pytest.mark.parametrize("kind", KINDS)
def test_a_layers_product_is_that_of_its_rounded_weight(kind: str, moderate: dict[str, LoadedModel]) -> None:
    plain = decoder_linears(moderate["none"])
    for name, layer in decoder_linears(moderate[kind]).items():
        weight = plain[name].weight
        rounded = dequantised(layer, weight.shape[1])
        assert rounded.shape == weight.shape
        error = ((rounded - weight).square().mean().sqrt() / weight.std()).item()
        assert ROUNDING[kind] / 3 < error < ROUNDING[kind], name
        x = torch.randn(2, 5, weight.shape[1], generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            assert torch.allclose(layer(x), x @ rounded.T, atol=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_close_to_those_of_unquantised_weights(kind: str, moderate: dict[str, LoadedModel]) -> None:
    ids = torch.randint(300, 700, (2, 64), generator=torch.Generator().manual_seed(0))
    plain = logits(moderate["none"], ids)
    error = (logits(moderate[kind], ids) - plain).square().mean().sqrt() / plain.std()
    assert LOGITS[kind] / 10 < error < LOGITS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_quantisation_follows_the_dtype(kind: str, demo_checkpoint: Path) -> None:
    ids = torch.randint(300, 700, (1, 16), generator=torch.Generator().manual_seed(0))
    reference = logits(loaded(demo_checkpoint, kind), ids)
    for dtype in ("float16", "bfloat16"):
        model = loaded(demo_checkpoint, kind, dtype)
        given = torch.ones(1, 1, model.config.llama.hidden_size, dtype=model.dtype)
        assert model.network.language_model.model.layers[0].mlp.up_proj(given).dtype == model.dtype
        assert (logits(model, ids) - reference).square().mean().sqrt() / reference.std() < LOGITS[kind]


def test_biases_are_loaded_and_added_as_they_are(demo_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_checkpoint, tmp_path / "biased"))
    biases = {
        f"model.layers.{layer}.self_attn.{name}_proj.bias": torch.full((128,), 0.5)
        for layer in range(3)
        for name in "qkvo"
    }
    edit_tensors(folder, lambda tensors: tensors.update(biases))
    edit_config(folder, attention_bias=True)
    for kind in KINDS:
        layer = loaded(folder, kind).network.get_submodule("language_model.model.layers.1.self_attn.q_proj")
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(layer(torch.zeros(1, 128)), torch.full((1, 128), 0.5))


# --- answers


def analyzer(folder: Path, kind: str) -> EcgAnalyzer:
    return EcgAnalyzer(loaded(folder, kind), FetchPolicy())


def ask(analyzer: EcgAnalyzer, image: bytes, question: str = "Rate?") -> list[int]:
    inputs = {"query": question, "image": base64.b64encode(image).decode()}
    return analyzer.analyze(parse_input(inputs, GREEDY)).generation.token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same_each_time_and_whoever_asks_beside(
    kind: str, demo_checkpoint: Path, sample_png: bytes
) -> None:
    questions = ["Rate?", "What is the rhythm?", "Is there ST elevation, and in which leads?", "Axis?"]
    first = analyzer(demo_checkpoint, kind)
    alone = [ask(first, sample_png, question) for question in questions]
    assert len({tuple(answer) for answer in alone}) == len(questions)
    with ThreadPoolExecutor(len(questions)) as threads:
        together = list(threads.map(lambda question: ask(first, sample_png, question), questions))
    assert together == alone
    again = analyzer(demo_checkpoint, kind)
    assert [ask(again, sample_png, question) for question in questions] == alone


def test_answers_come_from_the_quantised_weights(demo_checkpoint: Path, sample_png: bytes) -> None:
    """That 4 bits give the official answer would be no good sign here: these models are made to be sensitive."""
    assert ask(analyzer(demo_checkpoint, "int4"), sample_png) != ask(analyzer(demo_checkpoint, "none"), sample_png)


@pytest.mark.parametrize(("kind", "engine"), [("none", "transformers"), ("int4", "transformers-int4")])
def test_details_say_that_weights_are_quantised(
    kind: str, engine: str, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from handler import EndpointHandler

    monkeypatch.setenv("PULSE_DEVICE", "cpu")
    monkeypatch.setenv("PULSE_QUANTIZATION", kind)
    parameters = {"details": True, "max_new_tokens": 2, "enable_turkish_commentary": False}
    [record] = EndpointHandler(str(demo_checkpoint))({"inputs": "Rate?", "parameters": parameters})
    assert record["details"]["engine"] == engine


# --- loading


LOADING = """
import sys
from pathlib import Path
from pulse_ecg import checkpoint
from pulse_ecg.config import Settings

small, large, kind = sys.argv[1:]
settings = Settings(device="cpu", dtype="float32", quantization=kind)
checkpoint.load_model(Path(small), settings)  # imports, threads and allocators are not what is measured
checkpoint._WINDOW_BYTES = 2**20  # less than a tensor: its pages go when it is read

def resident(field):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024

before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
model = checkpoint.load_model(Path(large), settings)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be reset here")
def test_16_bit_weights_are_never_in_memory_together(demo_checkpoint: Path, tmp_path: Path) -> None:
    shape = CheckpointShape(layers=8, hidden=768, heads=6, kv_heads=6, intermediate=2048)
    folder = build_checkpoint(tmp_path / "deep", shape=shape, dtype="float16")
    weights = shape.layers * (4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate)
    in_work = 8 * 4 * shape.hidden * shape.intermediate  # a tensor and what the library makes of it on the way
    # Blocks as small as these would be kept by malloc for later ones; those of a real layer go back to the system.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for kind in KINDS:
        command = [sys.executable, "-c", LOADING, str(demo_checkpoint), str(folder), kind]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        peak = int(run.stdout)
        assert weights * BITS[kind] / 8 < peak < weights * BITS[kind] / 8 + in_work < 2 * weights, kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "lacks 'model.layers.1.mlp.up_proj.weight'"),
        (lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.bias": torch.zeros(352)}), "no place for"),
        (lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 5)}), "has the shape"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.ones(768, 128, dtype=torch.int8)}), "stored as I8"),
    ],
    ids=["missing", "unexpected", "shape", "dtype"],
)
def test_the_loader_is_as_strict_as_without(
    kind: str, change: Callable[[dict[str, Tensor]], None], message: str, demo_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(demo_checkpoint, tmp_path / "checkpoint"))
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        loaded(folder, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_library_stops_the_start_before_anything_is_downloaded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ConfigurationError, match=r"^PULSE_QUANTIZATION .* needs bitsandbytes: add .* requirements.txt"):
        load_model(tmp_path, Settings(device="cpu", quantization=kind))
    assert (ROOT / quantization.REQUIREMENTS).is_file()


def test_every_setting_but_none_has_a_layer() -> None:
    assert ["none", *quantization.LAYERS] == list(QUANTIZATIONS)
    assert quantization.quantized_layer("none") is None


@pytest.mark.parametrize(("file", "halves", "point"), [("README.md", 1, "."), ("deployment_guide.md", 2, ".,")])
def test_memory_sums_of_the_documents_add_up(file: str, halves: int, point: str) -> None:
    weights, cache = 14_125_813_760, 2 * 32 * 4096 * 2 * 4096
    quantised = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    parts = re.split(r"^# (?:English|Türkçe)$", (ROOT / file).read_text("utf-8"), flags=re.MULTILINE)[-halves:]
    for part, mark in zip(parts, point, strict=True):
        for kind, bits in {"none": 16.0, **BITS}.items():
            [row] = re.findall(rf"^\| `{kind}`.*", part, re.MULTILINE)
            size = weights - (16 - bits) / 8 * quantised
            sums = [f"{bytes_ / 2**30:.1f}".replace(".", mark) for bytes_ in (size, size + cache)]
            assert row.endswith(f"| {sums[0]} GiB | {sums[1]} GiB |")
