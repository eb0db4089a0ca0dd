"""How vLLM is started: what this engine needs, our defaults for this load, and what the operator says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from pulse_ecg.checkpoint import LoadedModel
from pulse_ecg.engine.memory import free_bytes, plan
from pulse_ecg.engine.slots import slot_bytes
from pulse_ecg.errors import ConfigurationError, excerpt, nearest_hint
from pulse_ecg.vllm_engine.language_model import CONFIG_FORMAT, WORKER_EXTENSION

VARIABLE = "PULSE_VLLM_ARGS"

_GPU_SHARE = 0.92  # vLLM's own default, the most that it gets here
_TOWER_BYTES = 2**30  # what the tower and the images that it remembers take on the GPU while it works
_SET_ELSEWHERE = {
    "model": "PULSE_MODEL_ID",
    "revision": "PULSE_MODEL_REVISION",
    "dtype": "PULSE_DTYPE",
    "max_model_len": "the checkpoint",
    "tokenizer": "the checkpoint",
    "trust_remote_code": "this engine",
    "generation_config": "this engine",
    "max_num_queued_reqs": "PULSE_MAX_QUEUED_REQUESTS",
    "max_num_queued_tokens": "PULSE_MAX_QUEUED_REQUESTS",
    "disable_log_stats": "this engine",
    "enable_log_requests": "this engine",
}


def engine_config(model: LoadedModel, given: Mapping[str, Any], *, max_answers: int) -> VllmConfig:
    """vLLM's configuration: the operator's arguments in the place of the defaults.

    Raises:
        ConfigurationError: an argument is unknown to vLLM, refused by it, or not the operator's to set; or vLLM was
            built for another kind of device than the model's.
    """
    try:
        return engine_args(model, given, max_answers=max_answers).create_engine_config()
    except ConfigurationError:
        raise
    except ValidationError as error:
        raise ConfigurationError(f"{VARIABLE}: vLLM says: {error.errors()[0]['msg']}") from error
    except Exception as error:  # vLLM's checks raise what they like
        raise ConfigurationError(f"{VARIABLE}: vLLM says: {error}") from error


def engine_args(model: LoadedModel, given: Mapping[str, Any], *, max_answers: int) -> AsyncEngineArgs:
    """vLLM's engine arguments; errors: those of :func:`engine_config` that are not vLLM's own."""
    kind = "cpu" if current_platform.is_cpu() else "cuda"
    if model.device.type != kind:
        raise ConfigurationError(f"PULSE_DEVICE is '{model.device}', but the vLLM that is installed runs on {kind}.")
    fixed = {
        "model": str(model.folder),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": model.config.context_length,
        "config_format": CONFIG_FORMAT,
        "hf_overrides": {"vocab_size": model.vocabulary},  # without a padded table's other rows
        "worker_extension_cls": WORKER_EXTENSION,
        "enable_prompt_embeds": True,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
    }
    _refuse_unusable(given, fixed)
    return AsyncEngineArgs(**(_defaults(model, max_answers) | dict(given) | fixed))


def _refuse_unusable(given: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(AsyncEngineArgs)}
    for name in given:
        if name in fixed or name in _SET_ELSEWHERE:
            raise ConfigurationError(f"{VARIABLE}: '{name}' is set by {_SET_ELSEWHERE.get(name, 'this engine')}.")
        if name not in known:
            hint = nearest_hint(name, known)
            raise ConfigurationError(f"{VARIABLE}: vLLM has no engine argument {excerpt(name, 40)}.{hint}")


def _defaults(model: LoadedModel, max_answers: int) -> dict[str, Any]:
    """As many answers at once as are let in, and memory for their keys and values."""
    defaults = {"max_num_seqs": max_answers}
    if model.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(model.device)
        if free <= _TOWER_BYTES:
            raise ConfigurationError(f"PULSE_DEVICE: '{model.device}' has no memory left for vLLM.")
        # The tower is there already: of what it left, its working memory is kept back.
        return defaults | {"gpu_memory_utilization": min(_GPU_SHARE, round((free - _TOWER_BYTES) / total, 3))}
    slot = slot_bytes(model.config.llama, model.config.context_length, model.dtype)
    memory = plan(free_bytes(model.device) - _decoder_bytes(model), slot, max_answers)
    # vLLM keeps a block of its own: without room beside the slots, a lone answer could not use its whole slot.
    spare = slot_bytes(model.config.llama, 1, model.dtype)
    # Compiling takes minutes and a compiler; on a CPU, where one tries things out, neither is wanted.
    return defaults | {"enforce_eager": True, "kv_cache_memory_bytes": memory.slots * slot + spare}


def _decoder_bytes(model: LoadedModel) -> int:
    """What vLLM will load."""
    shapes = model.network.unused_shapes.values()
    return sum(shape.numel() for shape in shapes) * model.dtype.itemsize
