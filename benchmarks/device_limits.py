"""How fast a device can be at best, and how much work an answer is: the two sides of a share of the limit."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pulse_ecg.checkpoint_config import CheckpointConfig
from pulse_ecg.model import PulseModel

# Memory bandwidth (bytes/s) and dense float16 matrix rate (FLOP/s) by the vendor's data sheets; the first whose words
# are among the device's own counts.
DATA_SHEETS = (
    ("H200", 4.8e12, 989e12),
    ("H100 PCIe", 2.0e12, 756e12),
    ("H100 NVL", 3.9e12, 835e12),
    ("H100", 3.35e12, 989e12),
    ("A100-SXM4-40GB", 1.555e12, 312e12),
    ("A100-PCIE-40GB", 1.555e12, 312e12),
    ("A100 80GB PCIe", 1.935e12, 312e12),
    ("A100", 2.039e12, 312e12),
    ("L40S", 0.864e12, 362e12),
    ("A10G", 0.6e12, 70e12),
    ("L4", 0.3e12, 121e12),
    ("T4", 0.32e12, 65e12),
)


@dataclass(frozen=True)
class Limits:
    """Measured in this run, and by the data sheet where the device is a known one."""

    name: str
    bandwidth: float
    matrix_rate: float
    sheet_bandwidth: float | None
    sheet_matrix_rate: float | None


def measure(device: torch.device, dtype: torch.dtype) -> Limits:
    """The device's own limits: a copy far larger than any cache, and a large product of random matrices."""
    on_gpu = device.type == "cuda"
    count, side = (2**31, 8192) if on_gpu else (2**25, 1024)
    copy_s = _copy_seconds(count, device)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.empty(side, side, device=device, dtype=dtype).normal_(generator=generator) for _ in range(2))
    product = torch.empty_like(a)
    product_s = _seconds(lambda: torch.mm(a, b, out=product), device)
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    sheet = next(((b, r) for part, b, r in DATA_SHEETS if re.search(rf"\b{part}\b", name)), (None, None))
    return Limits(name, 2 * count / copy_s, 2 * side**3 / product_s, *sheet)


def _copy_seconds(count: int, device: torch.device) -> float:
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source), device)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 15) -> float:
    """Median seconds of a piece of work, the device waited for on both sides."""
    times = []
    for number in range(repeats + 3):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        if number >= 3:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait for all that the device was given; the CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Work:
    """Bytes and operations of a model's stages, counted from its shapes.

    Only what cannot be avoided is counted: each weight that a step uses is read once, the keys and values of the
    context are read once; a multiplication and an addition are two operations; attention is causal.
    """

    def __init__(self, network: PulseModel) -> None:
        self._config: CheckpointConfig = network.config
        llama, language_model = network.config.llama, network.language_model
        self._table = network.embed_tokens.weight
        self._layers = llama.num_hidden_layers
        self._width = llama.num_attention_heads * (llama.hidden_size // llama.num_attention_heads)
        kv_heads = llama.num_key_value_heads or llama.num_attention_heads
        kv_width = kv_heads * (llama.hidden_size // llama.num_attention_heads)
        item = self._table.element_size()
        total = sum(parameter.numel() for parameter in language_model.parameters())
        self.weight_bytes = item * (total - self._table.numel())
        self.kv_bytes_per_position = item * 2 * self._layers * kv_width
        self._layer_parameters = sum(p.numel() for p in language_model.model.layers.parameters())
        self._head_parameters = language_model.lm_head.weight.numel()
        self._tower_parameters = sum(p.numel() for p in network.tower_body.get_submodule("encoder").parameters())
        self._projector_parameters = sum(p.numel() for p in network.mm_projector.parameters())

    def decode_bytes(self, contexts: list[float]) -> float:
        """Read for one step of as many answers as there are contexts (positions each): weights once, then theirs."""
        return self.weight_bytes + self.kv_bytes_per_position * sum(contexts)

    def prefill_flops(self, positions: int) -> float:
        """Of a prompt: the layers for each position, causal attention, lm_head for the last position."""
        attention = 2 * self._layers * self._width * positions**2
        return float(2 * self._layer_parameters * positions + attention + 2 * self._head_parameters)

    def vision_flops(self, tiles: int) -> float:
        """Of the tower's used layers and the projector (the patch embedding, under 1 %, is left out)."""
        config = self._config
        patches, width = config.patches_per_side**2, int(config.vision.hidden_size)
        tower = 2 * self._tower_parameters * (patches + 1)
        attention = 4 * config.tower_layers_used * width * (patches + 1) ** 2
        return float(tiles * (tower + attention + 2 * self._projector_parameters * patches))
