"""Loading: every tensor accounted for, nothing downloaded that is there, nothing kept that is not used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo.build_checkpoint import build_checkpoint
from demo.random_weights import CheckpointShape
from pulse_ecg import checkpoint
from pulse_ecg.checkpoint import LoadedModel, load_model
from pulse_ecg.checkpoint_config import CheckpointConfig
from pulse_ecg.config import Settings
from pulse_ecg.errors import CheckpointError, ConfigurationError, PulseError
from tests import reference

CPU = Settings(device="cpu")
TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture
def folder(demo_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(demo_checkpoint, tmp_path / "checkpoint"))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the weights as one file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / checkpoint.INDEX_FILE).unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")


def parameters_of(model: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: getattr(owner, leaf) for name, owner, leaf, _ in model.network.checkpoint_parameters()}


def test_every_stored_tensor_is_in_its_place_or_past_the_used_layer(demo_checkpoint: Path) -> None:
    model = load_model(demo_checkpoint, CPU)
    placed = parameters_of(model)
    for file in demo_checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if name in model.network.unused_shapes:
                assert name.startswith((TOWER + "encoder.layers.3.", TOWER + "post_layernorm."))
            else:
                assert torch.equal(placed.pop(name), tensor.float()), name
    assert not placed
    assert not any(t.is_meta for t in [*model.network.parameters(), *model.network.buffers()])
    assert not any(p.requires_grad for p in model.network.parameters())


def test_the_tower_ends_with_the_used_layer(demo_checkpoint: Path) -> None:
    model = load_model(demo_checkpoint, CPU)
    assert len(model.network.tower_body.get_submodule("encoder.layers")) == 3  # of 4, for the hidden state -2


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_single_file_and_shards_give_the_same_model(merge_type: str, tmp_path: Path) -> None:
    one = build_checkpoint(tmp_path / "one", merge_type=merge_type, shards=1)  # type: ignore[arg-type]
    five = build_checkpoint(tmp_path / "five", merge_type=merge_type, shards=5)  # type: ignore[arg-type]
    assert not (one / checkpoint.INDEX_FILE).exists()
    mine, other = parameters_of(load_model(one, CPU)), parameters_of(load_model(five, CPU))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_weights_in_the_towers_own_folder_are_not_used(tmp_path: Path) -> None:
    plain = build_checkpoint(tmp_path / "plain")
    stock = build_checkpoint(tmp_path / "stock", tower_weights=True)
    mine, other = parameters_of(load_model(plain, CPU)), parameters_of(load_model(stock, CPU))
    assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_have_the_dtype_asked_for(dtype: str, demo_checkpoint: Path) -> None:
    model = load_model(demo_checkpoint, Settings(device="cpu", dtype=dtype))
    assert {p.dtype for p in model.network.parameters()} == {getattr(torch, dtype)}
    assert model.network.language_model.model.rotary_emb.inv_freq.dtype == torch.float32


MISSING = ["lm_head.weight", "model.norm.weight", "model.mm_projector.2.bias", TOWER + "post_layernorm.weight"]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_stops_the_start_and_is_named(name: str, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(CheckpointError, match=f"lacks '{name}'"):
        load_model(folder, CPU)


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.mm_projector.4.bias", "extra"])
def test_an_unexpected_tensor_stops_the_start_and_is_named(name: str, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=f"no place for: '{name}'"):
        load_model(folder, CPU)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", TOWER + "embeddings.class_embedding", "model.image_newline"]
)
def test_a_wrong_shape_stops_the_start_and_is_named(name: str, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError, match=rf"'{name}' has the shape \(3, 5\)"):
        load_model(folder, CPU)


def test_computed_buffers_of_older_files_are_no_weights(folder: Path) -> None:
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        TOWER + "embeddings.position_ids": torch.arange(37)[None],
    }
    edit_tensors(folder, lambda tensors: tensors.update(old))
    frequencies = load_model(folder, CPU).network.language_model.model.rotary_emb.inv_freq
    assert frequencies[0] == 1  # computed, not the file's zeros


def test_the_newline_is_needed_by_spatial_unpad_alone(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.__delitem__("model.image_newline"))
    load_model(folder, CPU)
    edit_config(folder, mm_patch_merge_type="spatial_unpad")
    with pytest.raises(CheckpointError, match="image_newline"):
        load_model(folder, CPU)


def test_tied_embeddings_share_one_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.__delitem__("lm_head.weight"))
    edit_config(folder, tie_word_embeddings=True)
    model = load_model(folder, CPU).network.language_model
    assert model.lm_head.weight is model.get_input_embeddings().weight


def damaged_shard(folder: Path, content: bytes | None) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    if content is None:
        content = shard.read_bytes()[:-100]
    shard.write_bytes(content)


@pytest.mark.parametrize(
    "content", [None, b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"]
)
def test_a_damaged_shard_stops_the_start_and_is_named(content: bytes | None, folder: Path) -> None:
    damaged_shard(folder, content)
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors"):
        load_model(folder, CPU)


def test_a_missing_shard_stops_the_start_and_is_named(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors"):
        load_model(folder, CPU)


def test_a_single_file_comes_before_the_index_of_an_older_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the official code.  vLLM goes by the index: two engines would answer from two models."""
    stale = json.loads((folder / checkpoint.INDEX_FILE).read_text("utf-8"))
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(0.5))
    (folder / checkpoint.INDEX_FILE).write_text(json.dumps(stale), "utf-8")
    weight = load_model(folder, CPU).network.language_model.model.norm.weight
    assert (weight == 0.5).all()
    monkeypatch.setattr(checkpoint, "require_vllm", lambda: None)
    with pytest.raises(CheckpointError, match=r"vLLM would go by model.safetensors.index.json"):
        load_model(folder, replace(CPU, engine="vllm"))


def test_weights_of_another_kind_are_not_replaced_by_the_hubs(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match=r"'pytorch_model-00001-of-00002.bin'.*convert them to safetensors"):
        load_model(folder, CPU)


def test_an_index_cannot_lead_out_of_the_folder(folder: Path) -> None:
    (folder / checkpoint.INDEX_FILE).write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    (folder.parent / "secret.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="missing"):
        load_model(folder, CPU)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.model"])
def test_a_missing_file_stops_the_start_and_is_named(file: str, folder: Path) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        load_model(folder, CPU)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"mm_patch_merge_type": "anything"}, "mm_patch_merge_type"),
        ({"mm_projector_type": "perceiver"}, "mm_projector_type"),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer"),
        ({"mm_vision_select_feature": "all"}, "mm_vision_select_feature"),
        ({"mm_vision_tower": "google/siglip"}, "mm_vision_tower"),
        ({"image_grid_pinpoints": [[336, 500]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": "__import__('os')"}, "config.json"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
        ({"hidden_size": 128.5}, "hidden_size"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500_000}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}}, "rope_parameters"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": ["2"]}, "eos_token_id"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"mm_vision_select_feature": "cls_patch", "mm_patch_merge_type": "spatial"}, "cls_patch"),
        ({"vocab_size": 700}, "vocab_size"),
    ],
)
def test_a_config_that_fits_no_model_is_refused(values: dict[str, object], named: str, folder: Path) -> None:
    edit_config(folder, **values)
    with pytest.raises(CheckpointError, match=named):
        load_model(folder, CPU)


def test_the_default_rotation_may_be_named_as_transformers_5_does(folder: Path) -> None:
    edit_config(folder, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    assert load_model(folder, CPU).config.context_length


LLAMA_3 = {"factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("scaling", "fastest", "slowest"),
    [
        (None, 1, 1),
        ({"type": "default"}, 1, 1),
        ({"type": "linear", "factor": 2.0}, 2, 2),
        ({"rope_type": "linear", "factor": 4}, 4, 4),
        ({"type": "linear", "rope_type": "linear", "factor": 2.5}, 2.5, 2.5),
        ({"rope_type": "llama3"} | LLAMA_3, 1, 8),
    ],
    ids=str,
)
def test_a_scaled_rotation_does_not_depend_on_company(
    scaling: dict[str, object] | None, fastest: float, slowest: float, folder: Path
) -> None:
    """Whichever transformers is installed; the frequencies are divided by what the kind of scaling says."""
    edit_config(folder, rope_scaling=scaling)
    rotary = load_model(folder, CPU).network.language_model.model.rotary_emb
    plain = 1 / 10_000 ** (torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(rotary.inv_freq[[0, -1]], plain[[0, -1]] / torch.tensor([fastest, slowest]))
    alone, together = (rotary(torch.zeros(1), torch.tensor([rows]).T) for rows in ([5], [5, 4095]))
    for mine, joint in zip(alone, together, strict=True):
        assert torch.equal(mine[0], joint[0])


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"factor": 2.0},
        {"type": "linear"},
        {"type": "linear", "factor": "2"},
        {"type": "linear", "factor": True},
        {"type": "linear", "factor": 0},
        {"type": "linear", "factor": float("nan")},
        {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
        {"type": "linear", "rope_type": "default", "factor": 2.0},
        {"type": ["linear"], "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32},
        {"rope_type": "llama3", "factor": 8.0},
    ],
    ids=str,
)
def test_another_scaling_is_refused_with_what_is_accepted(scaling: dict[str, object], folder: Path) -> None:
    edit_config(folder, rope_scaling=scaling)
    with pytest.raises(CheckpointError, match="rope_scaling is of the type .* accepted: null; .*'linear' with factor"):
        load_model(folder, CPU)


def test_a_number_may_be_written_without_a_point(folder: Path) -> None:
    edit_config(folder, rms_norm_eps=1, rope_theta=500_000)
    norm = load_model(folder, CPU).network.language_model.model.norm
    assert norm.variance_epsilon == 1.0


@pytest.mark.parametrize(
    ("added", "eos", "count"),
    [({}, 2, 768), ({"2": True, "770": True}, 2, 771), ({}, [2, 775], 776), ({}, 5000, 800)],
    ids=str,
)
def test_rows_of_a_padded_table_are_no_tokens(
    added: dict[str, bool], eos: int | list[int], count: int, tmp_path: Path
) -> None:
    """Its 800 rows count as far as the tokenizer, special tokens that are added to it and ends of answers go."""
    folder = build_checkpoint(tmp_path / "padded", shape=CheckpointShape(vocab=800))
    file = folder / "tokenizer_config.json"
    decoder = {i: {"content": f"<{i}>", "special": special} for i, special in added.items()}
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"added_tokens_decoder": decoder}), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}), "utf-8")
    assert load_model(folder, CPU).vocabulary == count
    file.unlink()
    assert load_model(folder, CPU).vocabulary == (768 if added else count)


@pytest.mark.parametrize("step", ["do_resize", "do_center_crop", "do_rescale", "do_normalize"])
def test_a_preprocessing_step_that_is_off_is_refused_rather_than_ignored(step: str, folder: Path) -> None:
    file = folder / "vision_tower" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {step: False}), "utf-8")
    with pytest.raises(CheckpointError, match=step):
        load_model(folder, CPU)


def test_the_towers_config_may_be_nested_as_clips_own_is(folder: Path) -> None:
    before = CheckpointConfig.from_folder(folder).vision.to_dict()
    file = folder / "vision_tower" / "config.json"
    file.write_text(json.dumps({"model_type": "clip", "vision_config": json.loads(file.read_text("utf-8"))}), "utf-8")
    assert CheckpointConfig.from_folder(folder).vision.to_dict() == before


def test_a_tensor_in_two_files_is_refused_and_named(folder: Path) -> None:
    (folder / checkpoint.INDEX_FILE).unlink()
    save_file({"model.norm.weight": torch.zeros(128)}, folder / "more.safetensors")
    with pytest.raises(CheckpointError, match="'model.norm.weight' is in two"):
        load_model(folder, CPU)


def test_tensors_that_are_no_floats_are_refused_and_named(folder: Path) -> None:
    """Weights of a quantised checkpoint would load as plain numbers."""
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(128, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is stored as I8"):
        load_model(folder, CPU)


def test_files_are_mapped_anew_before_their_pages_pile_up(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_WINDOW_BYTES", 100_000)
    file = sorted(demo_checkpoint.glob("*.safetensors"))[0]
    with safe_open(file, framework="pt") as shard:
        names = list(shard.keys())
        sizes = {name: 4 * torch.Size(shard.get_slice(name).get_shape()).numel() for name in names}
    groups = checkpoint._windows(file, dict.fromkeys(names))
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert len(groups) > 3
    assert all(sum(sizes[name] for name in group[:-1]) < 100_000 for group in groups)


@pytest.mark.parametrize("path", ["missing", "config.json"])
def test_a_path_that_is_no_folder_is_refused_before_anything_is_downloaded(
    path: str, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match=f"no folder: '{path}'"):
        load_model(demo_checkpoint / path, CPU)


def test_pinpoints_may_be_written_as_text(folder: Path) -> None:
    edit_config(folder, image_grid_pinpoints="[(336, 672), (672, 336)]")
    assert CheckpointConfig.from_folder(folder).preprocessing.pinpoints == ((336, 672), (672, 336))


def test_a_tower_named_by_hub_id_needs_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    shutil.rmtree(folder / "vision_tower")
    edit_config(folder, mm_vision_tower="openai/clip-vit-large-patch14-336")
    config = CheckpointConfig.from_folder(folder)
    vision = config.vision
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1024, 24, 16)
    assert (vision.intermediate_size, vision.hidden_act, config.patches_per_side) == (4096, "quick_gelu", 24)
    assert config.tower_layers_used == 23


def test_a_folder_without_shards_sends_to_the_hub(
    folder: Path, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in folder.glob("*.safetensors"):  # config, tokenizer and index stay, as in a repository without weights
        shard.unlink()
    asked: list[tuple[str, str]] = []

    def download(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        assert "*.safetensors" in allow_patterns
        return str(demo_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = load_model(folder, Settings(device="cpu", model_id="someone/pulse", model_revision="v2"))
    assert asked == [("someone/pulse", "v2")]
    assert model.revision == demo_checkpoint.name


def test_a_hub_that_cannot_be_reached_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("secret detail")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match="PULSE-ECG/PULSE-7B") as caught:
        load_model(tmp_path, CPU)
    assert "secret" not in str(caught.value)


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigurationError, match="PULSE_DEVICE"):
        checkpoint.placement(Settings(device="cuda"))


def test_progress_is_shown(demo_checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(demo_checkpoint, CPU)
    assert "Loading weights: 100%" in capfd.readouterr().err


def test_nothing_of_the_checkpoint_is_executed(folder: Path) -> None:
    trace = folder / "was_run"
    (folder / "modeling_llava.py").write_text(f"open({str(trace)!r}, 'w')")
    edit_config(
        folder, auto_map={"AutoModelForCausalLM": "modeling_llava.Model", "AutoConfig": "modeling_llava.Config"}
    )
    load_model(folder, CPU)
    assert not trace.exists()


def test_startup_errors_are_of_our_tree(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(PulseError):
        load_model(tmp_path, CPU)


def test_reference_names_are_the_ones_that_are_read() -> None:
    """PULSE-7B's own weight index, where it is at hand: the network at true size wants exactly its tensors."""
    if not reference.FOLDER.is_dir():
        pytest.skip("the reference files are not here")
    from pulse_ecg.model import PulseModel

    network = PulseModel(CheckpointConfig.from_folder(reference.FOLDER))
    wanted = {name for name, *_ in network.checkpoint_parameters()} | set(network.unused_shapes)
    index = json.loads((reference.FOLDER / checkpoint.INDEX_FILE).read_text("utf-8"))
    assert wanted == set(index["weight_map"])
    size = sum(shape.numel() for *_, shape in network.checkpoint_parameters())
    size += sum(shape.numel() for shape in network.unused_shapes.values())
    assert 2 * size == index["metadata"]["total_size"]


def test_safetensors_are_mapped_not_copied_where_the_dtype_fits(tmp_path: Path) -> None:
    """On the CPU, weights of the files' own dtype are the files' pages: no second copy in memory."""
    folder = build_checkpoint(tmp_path / "f32", dtype="float32", shards=1)
    model = load_model(folder, CPU)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("lm_head.weight"), model.network.language_model.lm_head.weight)
    maps = Path("/proc/self/maps")
    if maps.is_file():
        assert str(folder / "model.safetensors") in maps.read_text()
