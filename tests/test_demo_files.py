"""The demo's stand-ins hold what they promise: a true-to-scale ECG print, and a checkpoint in PULSE-7B's layout."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open

from demo import __main__ as make_demo
from demo.build_checkpoint import MODEL_NAME, build_checkpoint
from demo.ecg_image import LAYOUTS, Page, Recording, read_recording, render
from demo.random_weights import TOKENIZER_PIECES, CheckpointShape
from tests.servers import Exchange, ImageHost, answer

TINY = CheckpointShape(
    layers=2, hidden=32, heads=4, kv_heads=2, intermediate=48, vision_layers=2, vision_hidden=16, vision_heads=2
)


# --- the ECG image ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording() -> Recording:
    return read_recording()


def ink(image: Image.Image) -> NDArray[np.bool_]:
    """Where the pen drew: darker than any grid line."""
    return np.asarray(image.convert("L")) < 100


def steps(recording: Recording, millivolts: float) -> Recording:
    """A recording of square waves: 0 mV, then ``millivolts`` for a tenth of a second out of each second."""
    time = np.arange(10_000) / 1000
    wave = np.where((time % 1.0 >= 0.5) & (time % 1.0 < 0.6), millivolts, 0.0)
    return Recording(dict.fromkeys(recording.leads, wave), 1000.0)


def test_the_sample_recording_is_ten_seconds_of_twelve_leads_in_millivolts(recording: Recording) -> None:
    assert list(recording.leads) == ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
    assert recording.seconds == 10.0
    assert recording.leads["V5"].max() == pytest.approx(1.9625)  # 1570 counts of 1.25 uV
    einthoven = recording.leads["I"] + recording.leads["III"] - recording.leads["II"]
    assert np.abs(einthoven).max() < 0.01


def test_the_print_has_the_training_images_size_and_the_same_pixels_each_time(recording: Recording) -> None:
    first, second = render(recording), render(recording)
    assert first.size == (2200, 1700)
    assert first.mode == "RGB"
    assert first.tobytes() == second.tobytes()


def test_the_layouts_give_different_images_of_one_size(recording: Recording) -> None:
    three_by_four, six_by_two = (render(recording, layout=LAYOUTS[name]) for name in ("3x4", "6x2"))
    assert three_by_four.size == six_by_two.size
    assert three_by_four.tobytes() != six_by_two.tobytes()


def test_grid_lines_stand_at_each_millimetre_and_are_bolder_at_each_fifth(recording: Recording) -> None:
    pixels = np.asarray(render(recording), dtype=np.int16)
    for line in (pixels[4], pixels[:, 4]):  # between two lines, in the margin: each grid line crosses it once
        starts = {
            tuple(colour): [i for i in range(len(line)) if (line[i] == colour).all() and (line[i - 1] != colour).any()]
            for colour in np.unique(line, axis=0)
        }
        bold, thin, _paper = (starts[colour] for colour in sorted(starts, key=sum))
        assert bold == list(range(0, len(line), 40))
        assert thin == [i for i in range(0, len(line), 8) if i % 40]


def test_the_calibration_pulse_is_ten_millimetres_high_and_five_wide(recording: Recording) -> None:
    page = Page()
    drawn = ink(render(recording))[:, : 14 * page.px_per_mm]  # left of the traces
    rows = [round(y * page.px_per_mm) for y in page.baselines(4)]
    for baseline in rows:
        strip = drawn[baseline - 120 : baseline + 40]
        at_baseline, at_top = (np.flatnonzero(strip[y]) for y in (120, 40))
        assert strip[: 40 - 3].sum() == strip[120 + 3 :].sum() == 0
        assert (at_top.max() - at_top.min()) == pytest.approx(40, abs=3)
        assert (at_baseline.max() - at_baseline.min()) == pytest.approx(72, abs=3)


@pytest.mark.parametrize(("millivolts", "px_per_mm", "mm_per_mv"), [(1.0, 8, 10.0), (-0.5, 8, 10.0), (1.0, 4, 5.0)])
def test_the_trace_is_true_to_scale(recording: Recording, millivolts: float, px_per_mm: int, mm_per_mv: float) -> None:
    page = Page(px_per_mm=px_per_mm, mm_per_mv=mm_per_mv)
    drawn = ink(render(steps(recording, millivolts), page=page))
    baseline = page.baselines(4)[3] * px_per_mm  # the rhythm strip
    height = round(millivolts * mm_per_mv * px_per_mm)
    level = round(baseline - height)
    left = round(page.trace_left * px_per_mm)
    drawn[:, : left + 8 * px_per_mm] = False  # the calibration pulse and the lead's name
    columns = np.flatnonzero(drawn[level]) - left
    pulses = np.split(columns, np.flatnonzero(np.diff(columns) > 10 * px_per_mm) + 1)
    assert len(pulses) == 10  # one a second, for the ten seconds
    second = page.mm_per_s * px_per_mm
    for number, pulse in enumerate(pulses):
        middle = (pulse.min() + pulse.max()) / 2
        assert middle == pytest.approx((number + 0.55) * second, abs=2)
        assert pulse.max() - pulse.min() == pytest.approx(0.1 * second, abs=4)
        assert len(pulse) == pulse.max() - pulse.min() + 1  # the plateau itself, not the flanks alone


def test_a_recording_without_a_lead_of_the_layout_is_refused(recording: Recording) -> None:
    without = {name: samples for name, samples in recording.leads.items() if name != "aVF"}
    with pytest.raises(ValueError, match="lead aVF"):
        render(Recording(without, 1000.0))


# --- the checkpoint --------------------------------------------------------------------------------------------------

LAYER = r"model\.layers\.\d+\."
VISION = r"model\.vision_tower\.vision_tower\.vision_model\."
REAL_NAMES = re.compile(
    "|".join(
        [
            r"lm_head\.weight|model\.(embed_tokens|norm)\.weight|model\.image_newline",
            r"model\.mm_projector\.[02]\.(weight|bias)",
            LAYER + r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|(input|post_attention)_layernorm)\.weight",
            VISION + r"embeddings\.(class_embedding|(patch|position)_embedding\.weight)",
            VISION + r"(pre_layrnorm|post_layernorm)\.(weight|bias)",
            VISION + r"encoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12]|layer_norm[12])\.(weight|bias)",
        ]
    )
)
REAL_CONFIG_KEYS = """
    _name_or_path architectures attention_bias attention_dropout bos_token_id eos_token_id freeze_mm_mlp_adapter
    freeze_mm_vision_resampler hidden_act hidden_size image_aspect_ratio image_crop_resolution
    image_grid_pinpoints image_split_resolution initializer_range intermediate_size max_position_embeddings
    mm_hidden_size mm_patch_merge_type mm_projector_lr mm_projector_type mm_resampler_type mm_use_im_patch_token
    mm_use_im_start_end mm_vision_select_feature mm_vision_select_layer mm_vision_tower mm_vision_tower_lr
    model_type num_attention_heads num_hidden_layers num_key_value_heads pad_token_id pretraining_tp
    rms_norm_eps rope_scaling rope_theta tie_word_embeddings tokenizer_model_max_length tokenizer_padding_side
    torch_dtype transformers_version tune_mm_mlp_adapter tune_mm_vision_resampler unfreeze_mm_vision_tower
    use_cache use_mm_proj vocab_size
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors(folder: Path) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Every tensor of every shard; float32 checkpoints only, as numpy knows no bfloat16."""
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as shard:
            assert shard.metadata() == {"format": "pt"}
            found[path.name] = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    first, again = (contents(build_checkpoint(tmp_path / name)) for name in ("first", "again"))
    other = contents(build_checkpoint(tmp_path / "other", seed=1))
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert sum(map(len, first.values())) < 8_000_000


def test_names_and_shapes_are_the_real_layouts(tmp_path: Path) -> None:
    (shard,) = tensors(build_checkpoint(tmp_path, shape=TINY, shards=1, dtype="float32")).values()
    assert [name for name in shard if not REAL_NAMES.fullmatch(name)] == []
    # PULSE-7B: 32 layers of 9, 24 vision layers of 16, and 15 others, of which 7 are the tower's: 687
    assert 32 * 9 + 24 * 16 + 15 == 687
    assert len(shard) == TINY.layers * 9 + TINY.vision_layers * 16 + 15
    shapes = {name: array.shape for name, array in shard.items()}
    vision = "model.vision_tower.vision_tower.vision_model."
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (TOKENIZER_PIECES, 32)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (16, 32)  # half of the heads share keys
    assert shapes["model.mm_projector.0.weight"] == (32, 16)
    assert shapes["model.image_newline"] == (32,)
    assert shapes[vision + "embeddings.patch_embedding.weight"] == (16, 3, 56, 56)
    assert shapes[vision + "embeddings.position_embedding.weight"] == (37, 16)


def test_the_index_names_each_tensors_shard_and_cutting_changes_no_tensor(tmp_path: Path) -> None:
    cut = build_checkpoint(tmp_path / "cut", shape=TINY, shards=3, dtype="float32")
    whole = build_checkpoint(tmp_path / "whole", shape=TINY, shards=1, dtype="float32")
    assert not (whole / "model.safetensors.index.json").exists()
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    shards = tensors(cut)
    assert len(shards) == 3
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    joined = {name: array for shard in shards.values() for name, array in shard.items()}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in joined.values())
    (single,) = tensors(whole).values()
    assert joined.keys() == single.keys()
    assert all(np.array_equal(joined[name], single[name]) for name in joined)


def test_the_config_has_the_real_keys_and_a_name_that_cannot_pass_for_the_real_model(tmp_path: Path) -> None:
    config = json.loads(
        (build_checkpoint(tmp_path, shape=TINY, merge_type="spatial_unpad") / "config.json").read_text()
    )
    assert config.keys() - {"pulse_model_name"} == set(REAL_CONFIG_KEYS.split())
    assert config["pulse_model_name"] == MODEL_NAME != "PULSE-7B"
    assert config["mm_patch_merge_type"] == "spatial_unpad"
    assert config["image_grid_pinpoints"] == [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def test_the_towers_folder_is_named_from_the_checkpoint_or_absolutely(tmp_path: Path) -> None:
    relative = build_checkpoint(tmp_path / "relative", shape=TINY)
    absolute = build_checkpoint(tmp_path / "absolute", shape=TINY, tower_path="absolute", tower_weights=True)
    assert json.loads((relative / "config.json").read_text())["mm_vision_tower"] == "vision_tower"
    named = Path(json.loads((absolute / "config.json").read_text())["mm_vision_tower"])
    assert named.is_absolute()
    assert named.samefile(absolute / "vision_tower")
    assert not list((relative / "vision_tower").glob("*.safetensors"))
    assert json.loads((named / "config.json").read_text())["patch_size"] == 56
    assert json.loads((named / "preprocessor_config.json").read_text())["crop_size"] == 336


def test_the_towers_own_weights_are_not_the_checkpoints(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path, shape=TINY, shards=1, dtype="float32", tower_weights=True)
    (checkpoint,), (stock,) = tensors(folder).values(), tensors(folder / "vision_tower").values()
    prefix = "model.vision_tower.vision_tower."
    assert {prefix + name for name in stock} == {name for name in checkpoint if name.startswith(prefix)}
    assert not any(np.array_equal(array, checkpoint[prefix + name]) for name, array in stock.items())


def test_the_tokenizer_has_llamas_settings_and_loses_no_text(tmp_path: Path) -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(build_checkpoint(tmp_path, shape=TINY) / "tokenizer.model")
    )
    assert tokenizer.vocab_size() == TOKENIZER_PIECES
    assert [tokenizer.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    for text in (
        "Is this ECG normal?",
        "two  spaces ",
        "\nline",
        "Kalp h\u0131z\u0131 75/dk, 3.2 \u00b5V \U0001fac0",
        "</s>",
    ):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2} & set(ids)
    assert tokenizer.encode("ECG 75", out_type=str) == ["\u2581ECG", "\u2581", "7", "5"]


def test_only_the_tokenizers_words_and_the_end_can_be_said(tmp_path: Path) -> None:
    shape = dataclasses.replace(TINY, vocab=1000)
    (shard,) = tensors(build_checkpoint(tmp_path, shape=shape, shards=1, dtype="float32")).values()
    said = set(np.flatnonzero(shard["lm_head.weight"][:, 0] == 0.0).tolist())
    assert said == {2, *range(259, TOKENIZER_PIECES)}
    assert (shard["model.embed_tokens.weight"][:, 0] > 0).all()
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert not shard[name][0].any()


def test_building_again_replaces_the_demos_checkpoint_and_no_other(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, shape=TINY, shards=3, tower_weights=True)
    build_checkpoint(tmp_path, shape=TINY, shards=1)
    assert [path.name for path in tmp_path.rglob("*.safetensors*")] == ["model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    del config["pulse_model_name"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="not the demo's"):
        build_checkpoint(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "sizes", [{"heads": 3}, {"heads": 4, "kv_heads": 3}, {"vision_heads": 5}, {"patch_size": 50}, {"vocab": 700}]
)
def test_a_shape_that_cannot_be_built_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=list(sizes)[-1]):
        CheckpointShape(**sizes)


def test_at_least_one_shard_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        build_checkpoint(tmp_path, shape=TINY, shards=0)


# --- what `make demo` asks -------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_no_proxy_stands_between_the_demo_and_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROOT": tmp_path, "BUILD": tmp_path, "START_S": 2}.items():
        monkeypatch.setattr(make_demo, name, value)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urlopen's, made before the variable was set

    def record(exchange: Exchange) -> None:
        exchange.sock.recv(65_536)  # the request's body: unread, it would reset the connection
        answer(b'[{"generated_text": "Sinus rhythm."}]')(exchange)

    with closing(ImageHost({"/": record, "/health": answer(b"{}")})) as server:
        address = server.url("")
        with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
            make_demo.wait_until_it_answers(process, address)
        assert make_demo.ask(address, "asked", "Rhythm?", "data:,")["generated_text"] == "Sinus rhythm."
