"""``PULSE_ENGINE=vllm`` where it cannot be had, and the part of the model that stays ours."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pulse_ecg.checkpoint import load_model
from pulse_ecg.config import Settings
from pulse_ecg.engines import start_engine
from pulse_ecg.errors import CheckpointError, ConfigurationError
from pulse_ecg.vllm_engine.version import REQUIREMENTS, require_vllm
from tests.conftest import ROOT
from tests.test_checkpoint import edit_tensors

VLLM, TRANSFORMERS = Settings(device="cpu", engine="vllm"), Settings(device="cpu")


def install(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """A vLLM of some version that does nothing, or none."""
    module = None
    if version is not None:
        module = ModuleType("vllm")
        module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.mark.parametrize(
    ("version", "message"), [(None, "cannot be imported"), ("0.31.2", "0.31.2 is older than 0.32"), ("0.9.0", "older")]
)
def test_without_a_vllm_that_will_do_the_start_stops_and_says_what_to_install(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, message: str
) -> None:
    install(monkeypatch, version)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_model(demo_checkpoint, VLLM)
    assert REQUIREMENTS in str(caught.value) and "PULSE_ENGINE" in str(caught.value)
    assert (ROOT / REQUIREMENTS).is_file()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc1", "1.0", "0.33.0+cpu", "unknown"])
def test_newer_versions_are_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, version)
    require_vllm()


def test_quantisation_of_the_other_engine_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="PULSE_QUANTIZATION is 'int8'.*PULSE_VLLM_ARGS"):
        Settings.from_env({"PULSE_ENGINE": "vllm", "PULSE_QUANTIZATION": "int8"})


def test_answers_name_the_engine_and_its_quantisation() -> None:
    assert Settings(engine="vllm").engine_name == "vllm"
    assert Settings(engine="vllm", vllm_args={"quantization": "fp8"}).engine_name == "vllm-fp8"
    assert Settings(vllm_args={"quantization": "fp8"}).engine_name == "transformers"
    online = {"quantization_config": {"linear": "fp8"}, "kv_cache_dtype": "fp8"}
    assert Settings(engine="vllm", vllm_args=online).engine_name == "vllm-quantized-kv-fp8"
    assert Settings(engine="vllm", vllm_args={"kv_cache_dtype": "auto"}).engine_name == "vllm"


class TestModelWithoutDecoder:
    """What is loaded beside an engine that decodes by itself."""

    @pytest.fixture
    def here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, "0.32.0")

    def test_it_holds_the_tower_and_the_embeddings_alone(self, demo_checkpoint: Path, here: None) -> None:
        whole, part = (load_model(demo_checkpoint, settings).network for settings in (TRANSFORMERS, VLLM))
        names = {name for name, *_ in part.checkpoint_parameters()}
        ours = ("model.vision_tower.", "model.mm_projector.", "model.image_newline", "model.embed_tokens.")
        assert names == {name for name, *_ in whole.checkpoint_parameters() if name.startswith(ours)}
        assert not any(parameter.is_meta for parameter in part.parameters())

    def test_it_gives_the_same_embeddings(self, demo_checkpoint: Path, here: None) -> None:
        whole, part = (load_model(demo_checkpoint, settings).network for settings in (TRANSFORMERS, VLLM))
        pixels = torch.randn(2, 3, 336, 336)
        with torch.inference_mode():
            features = part.encode_tiles(pixels)
            assert torch.equal(features, whole.encode_tiles(pixels))
            ids = [1, -200, 7, 9]
            assert torch.equal(part.embed(ids, features[0]), whole.embed(ids, features[0]))

    def test_the_checkpoint_must_be_complete_all_the_same(
        self, demo_checkpoint: Path, here: None, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(demo_checkpoint, tmp_path / "incomplete"))
        edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
        with pytest.raises(CheckpointError, match="model.norm.weight"):
            load_model(folder, VLLM)


def test_a_vllm_that_lacks_what_is_imported_is_named_with_what_to_install(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "0.40.0")  # and none of its parts
    with pytest.raises(ConfigurationError, match=f"something of 'vllm.*install {REQUIREMENTS}"):
        start_engine(load_model(demo_checkpoint, VLLM), VLLM)


def test_the_other_engine_is_chosen_without_vllm(demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    assert start_engine(load_model(demo_checkpoint, TRANSFORMERS), TRANSFORMERS).alive
