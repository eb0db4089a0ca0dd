"""Decode steps as CUDA graphs: the hundreds of kernels of a step are launched as one.

A graph has fixed shapes: the first B slots, L positions of each.  One is recorded for each B that is a power of two and
each L that is a multiple of 512; a step takes the smallest that holds its rows.  Slots among the B that have no row
write to their own next position, which is overwritten before anyone reads it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pulse_ecg.device import upload
from pulse_ecg.engine.slots import FirstSlotsView, KeyValueSlots, rounded

logger = logging.getLogger(__name__)

DecodeStep = Callable[[Tensor, FirstSlotsView], Tensor]
"""The logits ``(B, V)`` for tokens ``(B,)`` and a view."""
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Records a computation; returns how to repeat it, and where its result then lies."""

_WARM_UPS = 2  # libraries choose kernels and allocate in their first calls, which no graph may record


class DecodeGraphs:
    """Recorded decode steps over ``slots``."""

    def __init__(self, step: DecodeStep, slots: KeyValueSlots, record: Recorder) -> None:
        """Records all graphs."""
        device = slots.keys_SHLD[0].device
        self._slots = slots
        self._step = step  # a graph reads the memory of what it recorded
        self._tokens_S = torch.zeros(slots.count, dtype=torch.long, device=device)
        # Compiled code may count on tensors that begin at a multiple of 16 bytes: also the second row.
        aligned = torch.zeros(2, rounded(slots.count, 16), dtype=torch.long, device=device)
        self._places_2S = aligned[:, : slots.count]
        shapes = [(b, length) for b in batch_sizes(slots.count) for length in lengths(slots.positions)]
        # The largest first: the others find room in its memory.
        self._graphs = {
            shape: record(self._run(step, *shape))
            for shape in tqdm(sorted(shapes, reverse=True), desc="Recording CUDA graphs", unit="graph")
        }

    def _run(self, step: DecodeStep, batch: int, length: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            positions_B, last_B = self._places_2S[:, :batch].unbind()
            return step(self._tokens_S[:batch], FirstSlotsView(self._slots, positions_B, length, last_B=last_B))

        return run

    def replay(self, tokens_S: Tensor, slots: Sequence[int]) -> Tensor:
        """Logits ``(B, V)`` of the answers in ``slots``, in ascending order, as the eager step gives them."""
        longest = max(self._slots.filled[slot] for slot in slots) + 1
        batch = next(size for size in batch_sizes(self._slots.count) if size > slots[-1])
        repeat, logits_BV = self._graphs[batch, rounded(longest)]
        self._tokens_S.copy_(tokens_S)
        filled = self._slots.filled
        last = [position if slot in slots else 0 for slot, position in enumerate(filled)]
        self._places_2S.copy_(upload(torch.tensor([filled, last]), tokens_S.device))
        repeat()
        return logits_BV[: len(slots)] if slots[-1] == len(slots) - 1 else logits_BV[self._slots.index(slots)]


def cuda_graphs(step: DecodeStep, slots: KeyValueSlots) -> DecodeGraphs | None:
    """The graphs of a GPU, or None where they cannot be recorded, which the log then says."""
    started = time.perf_counter()
    try:
        graphs = DecodeGraphs(step, slots, _cuda_recorder())
    except Exception as error:  # noqa: BLE001 - out of memory, and all that a compiler may raise
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        logger.warning("No CUDA graphs of these decode steps: %s.", type(error).__name__)
        return None
    logger.info("CUDA graphs recorded in %.1f s.", time.perf_counter() - started)
    return graphs


def _cuda_recorder() -> Recorder:
    pool = torch.cuda.graph_pool_handle()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one for all: each keeps a workspace of its own

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits_BV = run()
        return graph.replay, logits_BV

    return record


def batch_sizes(slots: int) -> list[int]:
    """1, 2, 4, … and the number of slots."""
    powers = [1 << power for power in range(slots.bit_length())]
    return sorted({*(size for size in powers if size < slots), slots})


def lengths(positions: int) -> list[int]:
    """The lengths that positions are rounded up to."""
    return list(range(rounded(1), positions + 1, rounded(1)))
