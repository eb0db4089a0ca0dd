"""A small random checkpoint in PULSE-7B's exact layout: the demo's and the tests' stand-in for the 14 GB ones.

The file names, the weight names, the config's keys and the kind of tokenizer are the real ones; the widths and the
weights are not, so its answers are gibberish.  They are *good* gibberish: the weights are drawn such that a greedy
answer depends on every token before it, on the question and on the image, with clear margins between the best tokens.
Code that drops a tensor, a tile or a token therefore changes the answer.

    python -m demo.build_checkpoint build/pulse-demo
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import torch
from safetensors.torch import save_file

from demo.random_weights import EOS, TOKENIZER_PIECES, CheckpointShape, Weight, draw, language_weights, vision_weights

MODEL_NAME = "PULSE-demo (random weights)"
DEFAULT_SEED = 6  # tried: on the sample images no answer stops at once or falls into a loop
_TOWER = "model.vision_tower.vision_tower."

DType = Literal["float32", "float16", "bfloat16"]
MergeType = Literal["flat", "spatial", "spatial_unpad"]


def build_checkpoint(
    folder: Path,
    *,
    seed: int = DEFAULT_SEED,
    shape: CheckpointShape | None = None,
    merge_type: MergeType = "flat",
    dtype: DType = "bfloat16",
    shards: int = 2,
    tower_path: Literal["relative", "absolute"] = "relative",
    tower_weights: bool = False,
) -> Path:
    """Write a random checkpoint and return its folder: same arguments, same bytes, and at most one shard in memory.

    Args:
        folder: made if missing; an earlier demo checkpoint in it is replaced.
        shards: into how many safetensors files the weights are cut, fewer where one tensor outweighs a shard; 1 writes
            a single ``model.safetensors`` without an index.  A tensor is the same however the checkpoint is cut.
        tower_path: how ``mm_vision_tower`` names the tower's folder.  PULSE reads a relative path from the checkpoint,
            the official code from the working directory: give that one "absolute".
        tower_weights: write weights into the tower's folder too.  The official code loads them before the
            checkpoint's own; as with CLIP's stock weights they are *not* the checkpoint's, and must not be used.

    Raises:
        FileExistsError: the folder holds a checkpoint that this function did not write.
        ValueError: ``shards`` is not positive.
    """
    if shards < 1:
        raise ValueError(f"shards must be at least 1, not {shards}.")
    shape = shape or CheckpointShape()
    tower = folder / "vision_tower"
    _clear(folder)
    tower.mkdir(parents=True, exist_ok=True)
    config = _config(shape, merge_type, dtype, str(tower.resolve()) if tower_path == "absolute" else tower.name)
    _write_json(folder / "config.json", config)
    _write_json(tower / "config.json", _tower_config(shape))
    _write_json(tower / "preprocessor_config.json", _preprocessor_config(shape))
    _write_tokenizer(folder, shape)
    _write_weights(folder, [*language_weights(shape), *vision_weights(shape, _TOWER)], seed, dtype, shards)
    if tower_weights:
        _write_weights(tower, list(vision_weights(shape, "")), seed, dtype, shards=1)
    return folder


def _clear(folder: Path) -> None:
    """Remove the weights of an earlier demo checkpoint, and of no other: real ones take hours to fetch again."""
    config = folder / "config.json"
    found = config.exists() and json.loads(config.read_text(encoding="utf-8")).get("pulse_model_name") == MODEL_NAME
    weights = [*folder.glob("*.safetensors*"), *folder.glob("vision_tower/*.safetensors")]
    if not found and (config.exists() or weights):
        raise FileExistsError(f"{folder} holds a checkpoint that is not the demo's.")
    for path in weights:
        path.unlink()


# --- configuration ---------------------------------------------------------------------------------------------------


def _config(shape: CheckpointShape, merge_type: MergeType, dtype: DType, tower: str) -> dict[str, Any]:
    """PULSE-7B's ``config.json``, key by key, with these sizes, this tower, and a name of its own."""
    tile = shape.image_size
    return {
        "_name_or_path": "pulse-demo",
        "architectures": ["LlavaLlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "image_aspect_ratio": "anyres",
        "image_crop_resolution": 224,
        "image_grid_pinpoints": [[tile * w, tile * h] for w, h in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))],
        "image_split_resolution": 224,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.positions,
        "mm_hidden_size": shape.vision_hidden,
        "mm_patch_merge_type": merge_type,
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": tower,
        "mm_vision_tower_lr": 2e-06,
        "model_type": "llava_llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "pulse_model_name": MODEL_NAME,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": shape.positions,
        "tokenizer_padding_side": "right",
        "torch_dtype": dtype,
        "transformers_version": "4.37.2",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": shape.vocab,
    }


def _tower_config(shape: CheckpointShape) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": shape.vision_hidden,
        "image_size": shape.image_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": shape.vision_intermediate,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": shape.vision_heads,
        "num_channels": 3,
        "num_hidden_layers": shape.vision_layers,
        "patch_size": shape.patch_size,
        "projection_dim": shape.vision_hidden,
    }


def _preprocessor_config(shape: CheckpointShape) -> dict[str, Any]:
    """CLIP's public constants, in the form of openai/clip-vit-large-patch14-336."""
    return {
        "crop_size": shape.image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": shape.image_size,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- tokenizer -------------------------------------------------------------------------------------------------------


def _write_tokenizer(folder: Path, shape: CheckpointShape) -> None:
    """A sentencepiece model with Llama's settings, trained on ``corpus.txt``, and the files that stand around it."""
    corpus = Path(__file__).with_name("corpus.txt").read_text(encoding="utf-8").splitlines()
    (folder / "tokenizer.model").write_bytes(train_tokenizer(corpus))
    special = {
        token: {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        for token in ("<unk>", "<s>", "</s>")
    }
    _write_json(
        folder / "special_tokens_map.json",
        {
            "bos_token": special["<s>"],
            "eos_token": special["</s>"],
            "pad_token": "<unk>",
            "unk_token": special["<unk>"],
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {str(i): {**entry, "special": True} for i, entry in enumerate(special.values())},
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "legacy": False,
            "model_max_length": shape.positions,
            "pad_token": "<unk>",
            "padding_side": "right",
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )


def train_tokenizer(corpus: Sequence[str]) -> bytes:
    """A sentencepiece model with Llama's settings: same lines, same bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=TOKENIZER_PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=EOS,
        pad_id=-1,
        shuffle_input_sentence=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


# --- weights ---------------------------------------------------------------------------------------------------------


def _write_weights(folder: Path, weights: Sequence[Weight], seed: int, dtype: DType, shards: int) -> None:
    total = sum(weight.count for weight in weights)
    cuts: dict[int, list[Weight]] = {}
    done = 0
    for weight in weights:
        cuts.setdefault((2 * done + weight.count) * shards // (2 * total), []).append(weight)  # by the tensor's middle
        done += weight.count
    weight_map: dict[str, str] = {}
    for number, group in enumerate(cuts.values(), start=1):
        name = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{len(cuts):05d}.safetensors"
        kind: torch.dtype = getattr(torch, dtype)
        save_file(
            {weight.name: torch.from_numpy(draw(weight, seed)).to(kind) for weight in group},
            folder / name,
            metadata={"format": "pt"},
        )
        (folder / name).chmod(0o644)  # safetensors lets the owner alone read; a container's user may be another
        weight_map |= {weight.name: name for weight in group}
    if shards > 1:
        size = total * (4 if dtype == "float32" else 2)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a small random checkpoint in PULSE-7B's layout.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    args = parser.parse_args(argv)
    folder = build_checkpoint(args.folder, seed=args.seed)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {MODEL_NAME}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
