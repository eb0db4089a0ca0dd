"""What vLLM loads of a LLaVA-layout checkpoint: its Llama.  Imported by each of vLLM's processes.

vLLM looks a model up by the architecture's name.  Importing this module makes ours known; a worker process imports it
because it is told that its class has an extension here (:data:`WORKER_EXTENSION`), on other machines too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig
from vllm import ModelRegistry
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.transformers_utils.config import register_config_parser
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from pulse_ecg.checkpoint_config import CheckpointConfig

CONFIG_FORMAT = "pulse"
WORKER_EXTENSION = f"{__name__}.WorkerExtension"
_ARCHITECTURE = "PulseLanguageModel"
# The tower, the projector and the newline embedding: they work in front of vLLM.
_OURS = ("model.vision_tower.", "model.mm_projector.", "model.image_newline")
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


class LanguageModel(LlamaForCausalLM):  # type: ignore[misc]  # vLLM is not there where types are checked
    """vLLM's Llama; it leaves the checkpoint's weights that are not the language model's, and rows that pad tables."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """See vLLM's ``LlamaForCausalLM``."""
        loaded: set[str] = super().load_weights(
            (name, tensor[: self.config.vocab_size] if name in _TABLES else tensor)
            for name, tensor in weights
            if not name.startswith(_OURS)
        )
        return loaded


class WorkerExtension:
    """Adds nothing to vLLM's workers."""


class ConfigParser(ConfigParserBase):  # type: ignore[misc]
    """Reads the checkpoint's ``config.json`` as this project does; no code of the checkpoint is run."""

    def parse(self, model: str | Path, *_: Any, **__: Any) -> tuple[dict[str, Any], LlamaConfig]:
        """The language model's part of it."""
        config = CheckpointConfig.from_folder(Path(model)).llama
        config.architectures = [_ARCHITECTURE]
        return config.to_dict(), config


ModelRegistry.register_model(_ARCHITECTURE, LanguageModel)
register_config_parser(CONFIG_FORMAT)(ConfigParser)
