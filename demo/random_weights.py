"""The tensors of a PULSE checkpoint by their real names, with values that make a random model a demanding one.

The residual stream starts with unit variance, attention is sharp enough to pick single tokens out of the context, and
the blocks add several times what the embedding holds: the next token then depends on all before it, not on the last
one alone.  The MLPs add most of that; where attention does, thousands of image tokens drown the text and the answer
sticks to one word.  Channel 0 of the stream is a constant that no block writes to; lm_head uses it to keep some tokens
unsaid.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOKENIZER_PIECES = 768
EOS = 2
_FIRST_WORD_PIECE = 3 + 256  # <unk>, <s>, </s> and the 256 bytes come first
_CONSTANT = 2.0  # what channel 0 holds, in the embeddings and the image features
_UNSAID = -40.0  # lm_head, channel 0: lowers a token far below the others
_LOGITS_STD = 3.0  # greedy margins are then about 0.7, and sampling at temperature 1 still varies


@dataclass(frozen=True)
class CheckpointShape:
    """The sizes that a checkpoint of this layout may choose; PULSE-7B's own are in the comments.

    ``vocab`` may exceed the tokenizer's 768 pieces: the model then never says an id that the tokenizer lacks.
    """

    layers: int = 3  # 32
    hidden: int = 128  # 4096
    heads: int = 2  # 32
    kv_heads: int = 2  # 32
    intermediate: int = 352  # 11008
    vocab: int = TOKENIZER_PIECES  # 32000
    positions: int = 4096  # 4096
    vision_layers: int = 4  # 24
    vision_hidden: int = 64  # 1024
    vision_heads: int = 4  # 16
    vision_intermediate: int = 256  # 4096
    image_size: int = 336  # 336
    patch_size: int = 56  # 14: 576 tokens a tile; 56 makes 36

    def __post_init__(self) -> None:
        for name, whole, part in (
            ("heads must divide hidden", self.hidden, self.heads),
            ("kv_heads must divide heads", self.heads, self.kv_heads),
            ("vision_heads must divide vision_hidden", self.vision_hidden, self.vision_heads),
            ("patch_size must divide image_size", self.image_size, self.patch_size),
        ):
            if whole % part:
                raise ValueError(f"{name}: {whole} / {part}.")
        if self.vocab < TOKENIZER_PIECES:
            raise ValueError(f"vocab must hold the tokenizer's {TOKENIZER_PIECES} pieces, not {self.vocab}.")


@dataclass(frozen=True)
class Weight:
    """A tensor of independent normal values."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def _linear(name: str, rows: int, columns: int, gain: float = 1.0) -> Weight:
    return Weight(name + ".weight", (rows, columns), gain / math.sqrt(columns))


def _norm(name: str, width: int) -> Iterator[Weight]:
    yield Weight(name + ".weight", (width,), 0.1, mean=1.0)
    yield Weight(name + ".bias", (width,), 0.1)


def language_weights(shape: CheckpointShape) -> Iterator[Weight]:
    hidden, kv_width = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    attention_gain, mlp_gain = 1.0 / math.sqrt(shape.layers), 2.0 / math.sqrt(shape.layers)
    yield Weight("model.embed_tokens.weight", (shape.vocab, hidden), 1.0)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield _linear(prefix + "self_attn.q_proj", hidden, hidden, 1.8)
        yield _linear(prefix + "self_attn.k_proj", kv_width, hidden, 1.8)
        yield _linear(prefix + "self_attn.v_proj", kv_width, hidden)
        yield _linear(prefix + "self_attn.o_proj", hidden, hidden, attention_gain)
        yield _linear(prefix + "mlp.gate_proj", shape.intermediate, hidden)
        yield _linear(prefix + "mlp.up_proj", shape.intermediate, hidden)
        yield _linear(prefix + "mlp.down_proj", hidden, shape.intermediate, mlp_gain)
        yield Weight(prefix + "input_layernorm.weight", (hidden,), 0.1, mean=1.0)
        yield Weight(prefix + "post_attention_layernorm.weight", (hidden,), 0.1, mean=1.0)
    yield Weight("model.norm.weight", (hidden,), 0.1, mean=1.0)
    yield _linear("lm_head", shape.vocab, hidden, _LOGITS_STD)
    yield _linear("model.mm_projector.0", hidden, shape.vision_hidden)
    yield Weight("model.mm_projector.0.bias", (hidden,), 0.1)
    yield _linear("model.mm_projector.2", hidden, hidden, 1.5)
    yield Weight("model.mm_projector.2.bias", (hidden,), 0.1)
    yield Weight("model.image_newline", (hidden,), 1.0)


def vision_weights(shape: CheckpointShape, prefix: str) -> Iterator[Weight]:
    width, patch = shape.vision_hidden, shape.patch_size
    places = (shape.image_size // patch) ** 2 + 1
    prefix += "vision_model."
    yield Weight(prefix + "embeddings.class_embedding", (width,), 1.0)
    yield Weight(prefix + "embeddings.patch_embedding.weight", (width, 3, patch, patch), 1 / patch)
    yield Weight(prefix + "embeddings.position_embedding.weight", (places, width), 0.5)
    yield from _norm(prefix + "pre_layrnorm", width)  # the layout's own spelling
    for layer in range(shape.vision_layers):
        block = f"{prefix}encoder.layers.{layer}."
        for name, rows, columns, gain in (
            ("self_attn.q_proj", width, width, 1.5),
            ("self_attn.k_proj", width, width, 1.5),
            ("self_attn.v_proj", width, width, 1.0),
            ("self_attn.out_proj", width, width, 1.0),
            ("mlp.fc1", shape.vision_intermediate, width, 1.0),
            ("mlp.fc2", width, shape.vision_intermediate, 1.0),
        ):
            yield _linear(block + name, rows, columns, gain)
            yield Weight(f"{block}{name}.bias", (rows,), 0.1)
        yield from _norm(block + "layer_norm1", width)
        yield from _norm(block + "layer_norm2", width)
    yield from _norm(prefix + "post_layernorm", width)


def draw(weight: Weight, seed: int) -> NDArray[np.float32]:
    """The tensor's values, from its name and the seed alone."""
    generator = np.random.default_rng([seed, zlib.crc32(weight.name.encode())])
    values = generator.standard_normal(weight.shape, dtype=np.float32)
    values *= np.float32(weight.std)
    values += np.float32(weight.mean)
    match weight.name.removeprefix("model."):
        case "embed_tokens.weight":
            values[:, 0] = _CONSTANT
        case "image_newline" | "mm_projector.2.bias":
            values[0] = _CONSTANT
        case "lm_head.weight":
            values[:, 0] = _UNSAID  # control pieces, bytes, ids past the tokenizer's
            values[[EOS, *range(_FIRST_WORD_PIECE, TOKENIZER_PIECES)], 0] = 0.0
        case name if name.endswith(("self_attn.o_proj.weight", "down_proj.weight", "mm_projector.2.weight")):
            values[0] = 0.0
        case name if name.endswith("patch_embedding.weight"):
            values -= values.mean(axis=(2, 3), keepdims=True)  # as trained filters do: see lines, not the paper's pink
    return values
