"""PULSE-7B as plain transformers parts: a CLIP tower, a projector, a Llama.  No code of the checkpoint is run.

Shapes: T tiles, P patches of a tile, V width of the tower, D width of the language model, L positions.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from pulse_ecg.anyres import NEWLINE
from pulse_ecg.checkpoint_config import CheckpointConfig
from pulse_ecg.device import upload
from pulse_ecg.errors import CheckpointError
from pulse_ecg.prompt import IMAGE_TOKEN_INDEX

TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_PREFIX = "model.mm_projector."
NEWLINE_NAME = "model.image_newline"


class PulseModel(nn.Module):
    """The network of a LLaVA-layout checkpoint, without weights until :mod:`pulse_ecg.checkpoint` assigns them.

    The tower is cut after the layer whose hidden state is used, so nothing past it is computed or kept.
    """

    def __init__(self, config: CheckpointConfig, *, decoder: bool = True) -> None:
        """Without ``decoder`` it makes embeddings alone, of images and of tokens: another engine decodes."""
        super().__init__()
        self.config = config
        with init_empty_weights(include_buffers=True):  # shapes alone: no memory, no time
            self.language_model = LlamaForCausalLM(config.llama)
            self.vision_tower = CLIPVisionModel(copy.deepcopy(config.vision))  # cut below
            self.mm_projector = _projector(config)
            self.image_newline = nn.Parameter(torch.empty(config.llama.hidden_size))
        self._compute_buffers()
        self.unused_shapes = self._cut_tower() | ({} if decoder else self._cut_decoder())
        self.eval().requires_grad_(False)

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The language model's table of token embeddings."""
        return cast(nn.Embedding, self.language_model.get_input_embeddings())

    @property
    def tower_body(self) -> nn.Module:
        """Holds ``embeddings``, ``encoder`` and the norms: transformers 4 nests it, transformers 5 does not."""
        body = getattr(self.vision_tower, "vision_model", self.vision_tower)
        assert isinstance(body, nn.Module)
        return body

    def checkpoint_parameters(self) -> Iterator[tuple[str, nn.Module, str, torch.Size]]:
        """``(name in the checkpoint, owner, attribute, shape)`` of every parameter that is used."""
        parts: list[tuple[str, nn.Module]] = [
            ("", self.language_model),
            (TOWER_PREFIX, self.tower_body),
            (PROJECTOR_PREFIX, self.mm_projector),
        ]
        for prefix, module in parts:
            for name, parameter in module.named_parameters():
                owner, _, attribute = name.rpartition(".")
                yield prefix + name, module.get_submodule(owner), attribute, parameter.shape
        yield NEWLINE_NAME, self, "image_newline", self.image_newline.shape

    def encode_tiles(self, pixels_TCHW: Tensor) -> Tensor:
        """Features of each tile in the language model's space, ``(T, P, D)``.

        Source: ``CLIPVisionTower.feature_select`` and ``encode_images`` of LLaVA.
        """
        weight = self.embed_tokens.weight
        hidden = self.vision_tower(pixels_TCHW.to(weight.device, weight.dtype)).last_hidden_state
        features_TPV = hidden if self.config.keep_cls else hidden[:, 1:]
        features_TPD: Tensor = self.mm_projector(features_TPV)
        return features_TPD

    def merge(self, features_TPD: Tensor, order: Tensor) -> Tensor:
        """The image's embeddings ``(tokens, D)`` in the order of :func:`pulse_ecg.anyres.merge_order`."""
        flat = features_TPD.flatten(0, 1)
        merged = flat[order.clamp(min=0)]
        newline = order == NEWLINE
        return torch.where(newline[:, None], self.image_newline.to(flat.dtype), merged)

    def embed(self, ids: Sequence[int], image_embeddings: Tensor | None) -> Tensor:
        """Embeddings of a prompt, ``(1, L, D)``: the image's stand where its slot is in ``ids``."""
        text = torch.tensor([i for i in ids if i != IMAGE_TOKEN_INDEX], dtype=torch.long)
        embeddings: Tensor = self.embed_tokens(upload(text, self.embed_tokens.weight.device))
        if image_embeddings is not None:
            slot = list(ids).index(IMAGE_TOKEN_INDEX)
            embeddings = torch.cat([embeddings[:slot], image_embeddings, embeddings[slot:]])
        return embeddings[None]

    def _compute_buffers(self) -> None:
        """Give the buffers, which no checkpoint holds, their values: rotary frequencies and position ids."""
        decoder = self.language_model.model
        decoder.rotary_emb = type(decoder.rotary_emb)(config=self.config.llama)
        embeddings = self.tower_body.get_submodule("embeddings")
        positions = self.config.patches_per_side**2 + 1
        embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
        empty = [name for name, buffer in self.named_buffers() if buffer.is_meta]
        assert not empty, f"buffers without values: {empty}"

    def _cut_tower(self) -> dict[str, torch.Size]:
        """Drop what lies past the used layer; returns the names and shapes that the checkpoint has for it."""
        body, used = self.tower_body, self.config.tower_layers_used
        past = re.compile(r"encoder\.layers\.(\d+)\.")
        unused = {
            TOWER_PREFIX + name: parameter.shape
            for name, parameter in body.named_parameters()
            if name.startswith("post_layernorm.") or ((at := past.match(name)) and int(at[1]) >= used)
        }
        encoder = body.get_submodule("encoder")
        encoder.layers = nn.ModuleList(list(encoder.get_submodule("layers").children())[:used])
        self.vision_tower.config.num_hidden_layers = used
        body.post_layernorm = nn.Identity()  # feeds the pooled output alone, which LLaVA does not use
        return unused

    def _cut_decoder(self) -> dict[str, torch.Size]:
        """Keep the language model's token embeddings alone; returns what the checkpoint has for the rest."""
        parameters = self.language_model.named_parameters()
        unused = {name: parameter.shape for name, parameter in parameters if not name.startswith("model.embed_tokens.")}
        self.language_model.model.layers = nn.ModuleList()
        self.language_model.model.norm = nn.Identity()
        self.language_model.lm_head = nn.Identity()
        return unused


def _projector(config: CheckpointConfig) -> nn.Module:
    """LLaVA's ``build_vision_projector``: ``linear``, ``identity`` or ``mlpNx_gelu``."""
    kind, width_in, width = config.projector_type, config.vision.hidden_size, config.llama.hidden_size
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width_in, width)
    depth = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if depth is None:
        raise CheckpointError(f"config.json: mm_projector_type '{kind[:24]}' is not supported.")
    layers: list[nn.Module] = [nn.Linear(width_in, width)]
    for _ in range(int(depth[1]) - 1):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)
