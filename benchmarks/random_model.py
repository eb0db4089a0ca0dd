"""A random model of PULSE-7B's true shape, drawn on the device itself: nothing of its 14 GB is ever on a disk."""

from __future__ import annotations

import json
import math
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from demo.build_checkpoint import build_checkpoint
from pulse_ecg.checkpoint import LoadedModel
from pulse_ecg.checkpoint_config import CheckpointConfig
from pulse_ecg.model import PulseModel
from pulse_ecg.tokenizer import Tokenizer

CLIP_VIT_L_336 = "openai/clip-vit-large-patch14-336"


@dataclass(frozen=True)
class Sizes:
    """The language model's sizes; the defaults are PULSE-7B's.  ``tower`` is CLIP ViT-L/14-336 or the demo's."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    intermediate: int = 11008
    vocabulary: int = 32_000
    true_tower: bool = True


TINY = Sizes(layers=2, hidden=128, heads=2, intermediate=352, true_tower=False)


def random_model(sizes: Sizes, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LoadedModel:
    """Such a model, ready to answer.  Same arguments and device kind, same weights.

    The tokenizer is the demo's, so most of the tokens that it says have no text.  It never ends an answer by itself:
    no id that it can say counts as the end of a sequence.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = build_checkpoint(Path(name) / "demo")
        file = folder / "config.json"
        raw = json.loads(file.read_text("utf-8")) | {
            "num_hidden_layers": sizes.layers,
            "hidden_size": sizes.hidden,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.heads,
            "intermediate_size": sizes.intermediate,
            "vocab_size": sizes.vocabulary,
        }
        if sizes.true_tower:
            raw |= {"mm_vision_tower": CLIP_VIT_L_336, "mm_hidden_size": 1024}
        file.write_text(json.dumps(raw), "utf-8")
        config = CheckpointConfig.from_folder(folder)
        tokenizer = Tokenizer.from_folder(folder)
    config = replace(config, eos_ids=frozenset({sizes.vocabulary}))
    network = PulseModel(config)
    for parameter_name, owner, attribute, shape in list(network.checkpoint_parameters()):
        values = _draw(parameter_name, shape, sizes.layers, device=device, dtype=dtype, seed=seed)
        setattr(owner, attribute, nn.Parameter(values, requires_grad=False))
    network.to(device)  # buffers; the parameters are there already
    return LoadedModel(network, folder, tokenizer, config, device, dtype, "random")


def _draw(name: str, shape: torch.Size, layers: int, *, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values of a scale at which activations stay within float16 and the next token depends on all before it."""
    mean, std = _scale(name, shape, layers)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) ^ seed)
    return torch.empty(shape, device=device, dtype=dtype).normal_(mean, std, generator=generator)


def _scale(name: str, shape: torch.Size, layers: int) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's values."""
    if name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name or "layrnorm.weight" in name:
        return 1.0, 0.1
    if name.endswith(".bias"):
        return 0.0, 0.1
    if "embed_tokens" in name or "image_newline" in name or "class_embedding" in name:
        return 0.0, 1.0
    if "position_embedding" in name:
        return 0.0, 0.5
    gain = 1.0
    if name == "lm_head.weight":
        gain = 3.0
    elif name.startswith("model.layers."):
        if "q_proj" in name or "k_proj" in name:
            gain = 1.8
        elif "o_proj" in name:
            gain = 1.0 / math.sqrt(layers)
        elif "down_proj" in name:
            gain = 2.0 / math.sqrt(layers)
    return 0.0, gain / math.sqrt(shape[1:].numel())
