"""How many slots, and how much else, the device's free memory allows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)

# Left free for activations, CUDA graphs and fragments: at least so much, and this share of what is free.
_SPARE_BYTES, _SPARE_SHARE = 1536 * 2**20, 0.08
_SLOTS_SHARE = 0.75  # of what may be used; the rest remembers prefixes
_PREFIXES = 16  # the most slots' worth of prefixes
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryPlan:
    """What the engine allocates: ``slots`` at its start, prefixes of up to ``prefix_bytes`` later on."""

    slots: int
    prefix_bytes: int


def plan(free_bytes: int, slot_bytes: int, wanted: int) -> MemoryPlan:
    """Share free memory out; at least one slot, at most ``wanted``."""
    usable = max(0.0, free_bytes - max(_SPARE_BYTES, _SPARE_SHARE * free_bytes))
    slots = min(wanted, max(1, int(_SLOTS_SHARE * usable) // slot_bytes))
    if slots < wanted:
        logger.warning(
            "Memory for %d answers at once, not %d: %.1f GiB are free, an answer's keys and values take %.2f GiB.",
            *(slots, wanted, free_bytes / 2**30, slot_bytes / 2**30),
        )
    left = max(0, int(usable) - slots * slot_bytes)
    return MemoryPlan(slots, min(left, _PREFIXES * slot_bytes))


def free_bytes(device: torch.device) -> int:
    """Memory that the device has left; of a CPU's, what the machine and the container allow."""
    if device.type == "cuda":
        # What torch keeps for its next tensors is free too.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text("ascii").strip()
        used = int((_CGROUP / "memory.current").read_text("ascii"))
        # Pages of files that were read, the checkpoint's above all, count as used and are given up when needed.
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text("ascii").splitlines())
        used -= int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return available
    return min(available, max(0, int(limit) - used)) if limit.isdigit() else available
