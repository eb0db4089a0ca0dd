"""What a checkpoint's ``config.json`` says about the model, checked before a weight is read."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from transformers import CLIPVisionConfig, LlamaConfig

from pulse_ecg.anyres import AspectRatio, MergeType, Preprocessing, Size
from pulse_ecg.call import DEFAULT_MODEL_NAME
from pulse_ecg.errors import CheckpointError, excerpt

_LLAMA_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    *("rope_scaling", "attention_bias", "mlp_bias", "tie_word_embeddings"),
)
# Public architecture of the towers that LLaVA checkpoints name by hub id; the weights are in the checkpoint.
_KNOWN_TOWERS: Mapping[str, Mapping[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {"image_size": 336},
    "openai/clip-vit-large-patch14": {"image_size": 224},
}
_VIT_L_14: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class CheckpointConfig:
    """The model's shape and rules."""

    llama: LlamaConfig
    vision: CLIPVisionConfig
    preprocessing: Preprocessing
    merge_type: MergeType
    projector_type: str
    tower_layers_used: int
    keep_cls: bool
    eos_ids: frozenset[int]
    name: str

    @property
    def context_length(self) -> int:
        """Positions that prompt, image and answer share."""
        return int(self.llama.max_position_embeddings)

    @property
    def patches_per_side(self) -> int:
        """Patches along an edge of a tile."""
        return cast(int, self.vision.image_size) // cast(int, self.vision.patch_size)

    @classmethod
    def from_folder(cls, folder: Path) -> CheckpointConfig:
        """Read ``config.json``, ``generation_config.json`` (for the end-of-sequence ids) and the tower's folder if any.

        Raises:
            CheckpointError: a file is missing or says something that this model cannot be; the message names the key.
        """
        raw = read_json(folder / "config.json")
        if raw.get("model_type") not in ("llava_llama", "llava"):
            raise CheckpointError(
                f"config.json: model_type is {excerpt(raw.get('model_type'))}; expected 'llava_llama', "
                "the original LLaVA layout."
            )
        _refuse_unsupported(raw)
        try:
            llama = LlamaConfig(**_llama(raw))
            vision, processor = _tower(folder, str(raw.get("mm_vision_tower", "")))
            config = cls(
                llama=llama,
                vision=vision,
                preprocessing=_preprocessing(raw, vision, processor),
                merge_type=cast(MergeType, _one_of(raw, "mm_patch_merge_type", "flat", "spatial", "spatial_unpad")),
                projector_type=str(raw.get("mm_projector_type", "linear")),
                tower_layers_used=_layers_used(raw.get("mm_vision_select_layer", -2), vision.num_hidden_layers),
                keep_cls=_one_of(raw, "mm_vision_select_feature", "patch", "cls_patch") == "cls_patch",
                eos_ids=_eos_ids(folder, raw),
                name=str(raw.get("pulse_model_name") or DEFAULT_MODEL_NAME),
            )
            if config.keep_cls and config.merge_type != "flat":
                raise CheckpointError(
                    "config.json: mm_vision_select_feature 'cls_patch' needs mm_patch_merge_type 'flat'."
                )
            return config
        except CheckpointError:
            raise
        except Exception as error:  # transformers' config classes validate with exceptions of their own, by version
            raise CheckpointError(
                f"config.json describes no model that can be built ({type(error).__name__})."
            ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except OSError:
        raise CheckpointError(f"The checkpoint holds no readable {file.name}.") from None
    except ValueError:
        raise CheckpointError(f"{file.name} is no valid JSON.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name} holds no JSON object.")
    return value


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Keys that would change the answers, and that this model does not honour, are errors rather than ignored."""
    if raw.get("mm_use_im_start_end"):
        raise CheckpointError("config.json: mm_use_im_start_end is not supported.")
    if raw.get("quantization_config"):
        raise CheckpointError("config.json: quantization_config is not supported; use the unquantised checkpoint.")
    # The place where transformers 5 keeps what official code reads from the two keys.
    rope, theta = raw.get("rope_parameters"), raw.get("rope_theta") or 10_000
    if rope is not None and rope != {"rope_type": "default", "rope_theta": theta}:
        raise CheckpointError("config.json: rope_parameters is not supported; use rope_theta and rope_scaling.")
    for key in _LLAMA_KEYS:
        value = raw.get(key)
        expected = _KINDS.get(key, int)
        if value is not None and (not isinstance(value, expected) or isinstance(value, bool) != (expected is bool)):
            raise CheckpointError(f"config.json: {key} is {excerpt(value)}, which is of the wrong type.")
    if raw.get("rope_scaling") is not None:
        _refuse_unsupported_scaling(raw["rope_scaling"])


_NUMBER = (int, float)
_KINDS: Mapping[str, Any] = {
    "hidden_act": str,
    "rms_norm_eps": _NUMBER,
    "rope_theta": _NUMBER,
    "rope_scaling": dict,
    "attention_bias": bool,
    "mlp_bias": bool,
    "tie_word_embeddings": bool,
}
# With the numbers that each needs.  Not "dynamic" and "longrope", whose frequencies depend on the longest answer of a
# batch, and not "yarn", which transformers 4 and 5 compute differently.
_SCALINGS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _refuse_unsupported_scaling(scaling: Mapping[str, Any]) -> None:
    kind = scaling.get("rope_type", scaling.get("type"))
    given = {key: value for key, value in scaling.items() if key not in ("rope_type", "type")}
    numbers = _SCALINGS.get(kind) if isinstance(kind, str) and scaling.get("type", kind) == kind else None
    if numbers is None or given.keys() != set(numbers) or not all(map(_positive, given.values())):
        accepted = "; ".join(f"'{name}' with {', '.join(keys) or 'nothing'}" for name, keys in _SCALINGS.items())
        raise CheckpointError(
            f"config.json: rope_scaling is of the type {excerpt(kind)} with {excerpt(', '.join(given), 64)}; accepted: "
            f"null; {accepted}, all of them positive numbers."
        )


def _positive(value: object) -> bool:
    return isinstance(value, _NUMBER) and not isinstance(value, bool) and 0 < value < float("inf")


def _llama(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of transformers' config, which takes no integer for a float."""
    given = {key: raw[key] for key in _LLAMA_KEYS if raw.get(key) is not None}
    return {key: float(value) if _KINDS.get(key) == _NUMBER else value for key, value in given.items()}


def _tower(folder: Path, name: str) -> tuple[CLIPVisionConfig, dict[str, Any]]:
    """The tower's architecture and its preprocessor's constants, from a local folder or by a public hub id."""
    local = folder / name  # an absolute name stands for itself
    if name and (local / "config.json").is_file():
        raw = read_json(local / "config.json")
        vision = CLIPVisionConfig(**{k: v for k, v in raw.get("vision_config", raw).items() if k in _CLIP_KEYS})
        return vision, read_json(local / "preprocessor_config.json")
    if name not in _KNOWN_TOWERS:
        raise CheckpointError(
            f"config.json: mm_vision_tower {excerpt(name, 64)} is neither a folder with a config.json "
            f"nor one of {', '.join(_KNOWN_TOWERS)}."
        )
    return CLIPVisionConfig(**_VIT_L_14, **_KNOWN_TOWERS[name]), {}


_CLIP_KEYS = frozenset({*_VIT_L_14, "image_size", "num_channels", "attention_dropout"})


def _preprocessing(raw: Mapping[str, Any], vision: CLIPVisionConfig, processor: Mapping[str, Any]) -> Preprocessing:
    tile = cast(int, vision.image_size)
    sizes = {_edge(processor.get("size", tile)), _edge(processor.get("crop_size", tile)), tile}
    if sizes != {tile}:
        raise CheckpointError(f"The tower sees {tile} pixels a side, its preprocessor_config.json says otherwise.")
    for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if not processor.get(step, True):
            raise CheckpointError(f"preprocessor_config.json: {step} is off, which is not supported.")
    ratio = raw.get("image_aspect_ratio") or "square"
    if str(ratio).startswith(("anyres_", "highres", "crop_split")):  # of later LLaVA code than PULSE's
        raise CheckpointError(f"config.json: image_aspect_ratio {excerpt(ratio)} is not supported.")
    pinpoints = raw.get("image_grid_pinpoints") or []
    resolutions = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
    grid: tuple[Size, ...] = tuple((int(width), int(height)) for width, height in resolutions)
    if ratio == "anyres" and (not grid or any(edge <= 0 or edge % tile for size in grid for edge in size)):
        raise CheckpointError(f"config.json: image_grid_pinpoints must be multiples of the tower's {tile} pixels.")
    default = Preprocessing()
    return Preprocessing(
        tile_size=tile,
        aspect_ratio=cast(AspectRatio, ratio if ratio in ("anyres", "pad") else "square"),
        pinpoints=grid,
        mean=_channels(processor.get("image_mean", default.mean)),
        std=_channels(processor.get("image_std", default.std)),
        rescale_factor=float(processor.get("rescale_factor", default.rescale_factor)),
        resample=int(processor.get("resample", default.resample)),
    )


def _edge(size: object) -> int:
    """The edge that a preprocessor's ``size`` or ``crop_size`` stands for: older files hold a bare number."""
    if isinstance(size, Mapping):
        return int(size["shortest_edge"] if "shortest_edge" in size else size["height"])
    return int(cast(int, size))


def _channels(values: object) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in cast(list[float], values))
    return red, green, blue


def _layers_used(select_layer: int, layers: int) -> int:
    """Encoder layers up to the hidden state ``select_layer``; state 0 is the embedding, state ``layers`` the last."""
    used = select_layer if select_layer >= 0 else layers + 1 + select_layer
    if not 0 <= used <= layers:
        raise CheckpointError(f"config.json: mm_vision_select_layer {select_layer} is not among {layers} layers.")
    return used


def _eos_ids(folder: Path, raw: Mapping[str, Any]) -> frozenset[int]:
    file = folder / "generation_config.json"
    declared = read_json(file).get("eos_token_id") if file.is_file() else None
    given = declared if declared is not None else raw.get("eos_token_id", 2)
    ids = given if isinstance(given, list) else [given]
    if not all(isinstance(token, int) for token in ids):
        raise CheckpointError(f"eos_token_id is {excerpt(given)}; it must be a token id or a list of them.")
    return frozenset(ids)


def _one_of(
    raw: Mapping[str, Any], key: str, *accepted: Literal["flat", "spatial", "spatial_unpad", "patch", "cls_patch"]
) -> str:
    value = raw.get(key, accepted[0])
    if value not in accepted:
        raise CheckpointError(f"config.json: {key} is {excerpt(value)}; supported: {', '.join(accepted)}.")
    return str(value)
