"""From a checkpoint folder, or a hub id, to a model on its device: strict, and without a second copy in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm

from pulse_ecg.checkpoint_config import CheckpointConfig, read_json
from pulse_ecg.config import Settings
from pulse_ecg.errors import CheckpointError, ConfigurationError
from pulse_ecg.model import NEWLINE_NAME, PulseModel
from pulse_ecg.quantization import QuantizedLinear, quantized_layer, replace_linears
from pulse_ecg.tokenizer import Tokenizer
from pulse_ecg.vllm_engine.version import require_vllm

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# A shard is mapped anew after this many bytes, so that pages already copied to the device do not pile up.
_WINDOW_BYTES = 64 * 2**20
_FLOATS = ("F16", "BF16", "F32", "F64")
# Buffers that older transformers saved beside the weights; they are computed, not learnt.
_COMPUTED = (".rotary_emb.inv_freq", ".embeddings.position_ids")


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it.  For an engine that decodes by itself, ``network`` has no decoder."""

    network: PulseModel
    folder: Path
    tokenizer: Tokenizer
    config: CheckpointConfig
    device: torch.device
    dtype: torch.dtype
    revision: str

    @property
    def vocabulary(self) -> int:
        """How many of the logits are tokens' own: the table may be padded to more rows, which stand for nothing.

        The official code cuts them off: ``resize_token_embeddings(len(tokenizer))``.
        """
        highest = max({self.tokenizer.highest_id, *self.config.eos_ids})
        return min(highest + 1, self.config.llama.vocab_size)

    def device_memory(self) -> dict[str, float]:
        """Bytes on the model's GPU by kind; empty without one."""
        if self.device.type != "cuda":
            return {}
        return {
            "allocated": torch.cuda.memory_allocated(self.device),
            "reserved": torch.cuda.memory_reserved(self.device),
        }


def load_model(path: str | Path, settings: Settings) -> LoadedModel:
    """Load the checkpoint at ``path``, or the one that the settings name if ``path`` holds no weights.

    Raises:
        CheckpointError: a file, key or tensor is missing, unexpected or of the wrong shape; the message names it.
        ConfigurationError: the device, dtype, engine or quantisation of the settings is not to be had.
    """
    device, dtype = placement(settings)
    quantized = quantized_layer(settings.quantization)  # before anything is downloaded
    if settings.engine == "vllm":
        require_vllm()
    folder, revision = locate(Path(path), settings)
    config = CheckpointConfig.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.size > config.llama.vocab_size:
        raise CheckpointError(
            f"tokenizer.model has {tokenizer.size:,} pieces, config.json a vocab_size of {config.llama.vocab_size:,}."
        )
    network = PulseModel(config, decoder=settings.engine != "vllm")
    if quantized:
        replace_linears(network.language_model.model.layers, quantized)
    files = weight_files(folder)
    if settings.engine == "vllm" and files == [folder / SINGLE_FILE] and (folder / INDEX_FILE).is_file():
        raise CheckpointError(
            f"vLLM would go by {INDEX_FILE} and not read {SINGLE_FILE}: remove the one that is stale."
        )
    stored = _stored_shapes(files)
    _check(network, stored)
    _assign(network, files, device=device, dtype=dtype)
    if config.llama.tie_word_embeddings and settings.engine != "vllm":
        network.language_model.lm_head.weight = network.embed_tokens.weight
    network.to(device)  # buffers; the parameters are there already
    if quantized and device.type == "cuda":
        torch.cuda.empty_cache()  # the 16-bit tensors' memory: it counts as free again, for keys and values
    logger.info(
        "Loaded %s: %d tensors from %d files onto %s as %s%s.",
        *(config.name, len(stored), len(files), device, dtype),
        f", the decoder's linear layers as {settings.quantization}" if quantized else "",
    )
    return LoadedModel(network, folder, tokenizer, config, device, dtype, revision)


def placement(settings: Settings) -> tuple[torch.device, torch.dtype]:
    """Device and dtype: CUDA with float16, as the official code; else CPU with float32."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(f"PULSE_DEVICE is '{name}', but {torch.cuda.device_count()} CUDA devices are visible.")
    dtype = "float32" if device.type == "cpu" else "float16"
    return device, getattr(torch, dtype if settings.dtype == "auto" else settings.dtype)


def locate(path: Path, settings: Settings) -> tuple[Path, str]:
    """The folder that holds the weights, and the revision: ``local``, or the commit that the hub resolved.

    A repository with code, config and even the weight index but no shards is common; the weights then come from
    ``PULSE_MODEL_ID`` at ``PULSE_MODEL_REVISION``.
    """
    if not path.is_dir():
        raise CheckpointError(f"The checkpoint's path is no folder: '{path.name}'.")
    if any(path.glob("*.safetensors")):
        return path, "local"
    if others := sorted(path.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"The weights are stored as '{others[0].name}', which can hold code: convert them to safetensors, or "
            "remove them, and PULSE_MODEL_ID is loaded."
        )
    if Path(settings.model_id).is_dir():
        return Path(settings.model_id), "local"
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - a local start needs no hub client

    logger.info("No weights beside the handler; loading %s at %s.", settings.model_id, settings.model_revision)
    try:
        folder = Path(
            snapshot_download(
                settings.model_id,
                revision=settings.model_revision,
                allow_patterns=["*.json", "*.safetensors", "tokenizer.model"],
            )
        )
    except Exception as error:  # the hub client raises its own, requests', httpx's and OS errors
        raise CheckpointError(
            f"'{settings.model_id}' at '{settings.model_revision}' could not be downloaded ({type(error).__name__}); "
            "check PULSE_MODEL_ID, PULSE_MODEL_REVISION and the network, or put the weights beside handler.py."
        ) from error
    return folder, folder.name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sharded or single; where there are both, the single one.

    That is the official code's order: a model saved anew in one file may leave an older one's index behind.

    Raises:
        CheckpointError: there are none, or the index names one that is missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise CheckpointError(f"{INDEX_FILE} has no weight_map.")
        names = sorted({str(name) for name in weight_map.values()})
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"The checkpoint's weight file '{name[:80]}' is missing.")
    if not names:
        raise CheckpointError("The checkpoint holds no safetensors weights.")
    return [folder / name for name in names]


def _stored_shapes(files: Sequence[Path]) -> dict[str, torch.Size]:
    """Name and shape of every tensor in the files, from their headers alone."""
    shapes: dict[str, torch.Size] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in list(shard.keys()):
                    if name in shapes:
                        raise CheckpointError(f"Tensor '{name}' is in two weight files.")
                    tensor = shard.get_slice(name)
                    shapes[name] = torch.Size(tensor.get_shape())
                    if tensor.get_dtype() not in _FLOATS and not name.endswith(_COMPUTED):
                        raise CheckpointError(f"Tensor '{name}' is stored as {tensor.get_dtype()}, not as floats.")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"'{file.name}' is no complete safetensors file (a Git LFS pointer, or cut off?)."
            ) from error
    return shapes


def _check(network: PulseModel, stored: Mapping[str, torch.Size]) -> None:
    """Hold the stored tensors against the model's: none missing, none left over, all of the right shape."""
    tied = network.config.llama.tie_word_embeddings
    expected = {name: shape for name, _, _, shape in network.checkpoint_parameters()} | network.unused_shapes
    if tied:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    optional = {NEWLINE_NAME} if network.config.merge_type != "spatial_unpad" else set()
    optional |= {"lm_head.weight"} if tied else set()
    missing = [name for name in expected if name not in stored and name not in optional]
    if missing:
        raise CheckpointError(f"The checkpoint lacks {_listed(missing)}.")
    unexpected = [name for name in stored if name not in expected and not name.endswith(_COMPUTED)]
    if unexpected:
        raise CheckpointError(f"The checkpoint holds what the model has no place for: {_listed(unexpected)}.")
    for name, shape in stored.items():
        if name in expected and shape != expected[name]:
            raise CheckpointError(
                f"Tensor '{name}' has the shape {tuple(shape)}; config.json calls for {tuple(expected[name])}."
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more


def _assign(network: PulseModel, files: Sequence[Path], *, device: torch.device, dtype: torch.dtype) -> None:
    """Put the stored tensors in the place of the model's empty parameters, one at a time."""
    places = {name: (owner, attribute) for name, owner, attribute, _ in network.checkpoint_parameters()}
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, unit_divisor=1024) as progress:
        for file in files:
            for names in _windows(file, places):
                with safe_open(file, framework="pt", device=str(device)) as shard:
                    for name in names:
                        tensor = shard.get_tensor(name)
                        progress.update(tensor.nbytes)
                        owner, attribute = places[name]
                        if isinstance(owner, QuantizedLinear) and attribute == "weight":
                            owner.quantize(tensor.to(dtype))
                        else:
                            setattr(owner, attribute, nn.Parameter(tensor.to(dtype), requires_grad=False))
        progress.update(total - progress.n)
    if network.image_newline.is_meta:  # not stored, and not used by this merge type
        network.image_newline = nn.Parameter(torch.zeros_like(network.image_newline, device=device, dtype=dtype))


def _windows(file: Path, wanted: Mapping[str, object]) -> list[list[str]]:
    """The names that a file holds, in groups of about :data:`_WINDOW_BYTES`, in the order in which they lie in it."""
    groups, size = [list[str]()], 0
    with safe_open(file, framework="pt") as shard:
        in_file_order = getattr(shard, "offset_keys", shard.keys)  # older safetensors know no offsets
        for name in in_file_order():
            if name not in wanted:
                continue
            groups[-1].append(name)
            size += 4 * torch.Size(shard.get_slice(name).get_shape()).numel()
            if size >= _WINDOW_BYTES:
                groups.append([])
                size = 0
    return [group for group in groups if group]
