"""What differs between a GPU, which works behind the host's back, and a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")

NO_MEMORY_LEFT = "The device has no memory left for this request; try again, or send fewer at once."


def in_passing_thread(work: Callable[[], T]) -> T:
    """What ``work`` returns or raises, done in a thread that ends with it.

    OpenMP keeps a team for every thread that has computed in parallel.  With more of them than cores, as the thread
    that loads a model and the one that runs it would have, teams no longer wait actively, and on a CPU each small
    product begins with waking one up: a decode step took a third longer.
    """
    with ThreadPoolExecutor(1, "pulse-load") as thread:
        return thread.submit(work).result()


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the one that streams, events and graphs of this thread belong to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; the host does not wait for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


_NO_MEMORY = ("allocate memory", "out of memory", "STATUS_ALLOC_FAILED")  # the last is how CUDA's libraries say it


def out_of_memory(error: Exception) -> bool:
    """Whether it says so.  CPU torch, the CUDA driver and CUDA's libraries raise a bare RuntimeError for it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def lost(device: torch.device) -> bool:
    """Whether the device answers nothing any more: a CUDA context that has failed once fails for ever."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


class Download:
    """A copy to the host that is under way; :meth:`wait` gives it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> Tensor:
        """The copy; blocks until the device has come so far."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor


class Span:
    """Seconds that a piece of work takes on the device; made before it, ended after it was launched."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._mark()
        self._ended = self._began

    def end(self) -> None:
        """The work is launched."""
        self._ended = self._mark()

    def seconds(self) -> float:
        """The time between; on a GPU, to be asked once something later has arrived from there."""
        if isinstance(self._began, float) or isinstance(self._ended, float):
            return cast(float, self._ended) - cast(float, self._began)
        milliseconds: float = self._began.elapsed_time(self._ended)
        return milliseconds / 1000

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
