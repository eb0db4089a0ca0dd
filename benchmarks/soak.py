"""Mixed traffic for a long time: every answer right, nothing stuck, nothing left over, no growth.

    python -m benchmarks.soak [--minutes 30] [--callers 6] [--seed 0] [--growth 0.02]

Runs the handler on the demo checkpoint, on the CPU, beside a local commentary service that misbehaves.  Callers send
known questions (greedy, and sampled with a seed), new and repeated images, batches, streams read to the end,
cancelled, closed and abandoned, deadlines, and bodies that must be refused.  Every answer of a known request is
compared with what was answered when nothing else ran.  The traffic pauses at least every minute; then the endpoint
must be idle, answer at once, and its memory is read (after garbage collection and ``malloc_trim``).
``--minutes 0.2`` is a quick check; over so short a time caches are still filling, so give it ``--growth 0.1``.

malloc is kept to one arena unless ``MALLOC_ARENA_MAX`` is set: with glibc's default, sixteen on two cores, the resident
memory drifts by a tenth for many minutes as freed blocks are scattered over them, and a leak would hide in that.

The exit status is 1 if anything did not hold.  The last line is one JSON document:

- ``ok``; ``violations``: what did not hold, the first twenty.
- ``minutes`` of traffic; ``actions``: how often each kind was sent; ``records``: what the handler answered, which must
  be what its monitor counted.
- ``rss``: resident bytes ``after_warm_up`` (the first fifth of the pauses), ``at_end`` (the last fifth), medians,
  and ``growth``, the change relative to the former.
- ``idle_answer_s``: the slowest answer during a pause.  ``threads``: how many there were after the start and at the
  end.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import json
import logging
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.soak_traffic import Caller, Endpoint, Known, Tally, ViolationError, check, known_requests
from benchmarks.workload import WORK
from demo.build_checkpoint import build_checkpoint
from tests.commentary_service import (
    Behaviour,
    ChatServer,
    Exchange,
    answer,
    chat_server,
    cut_before_answer,
    cut_in_body,
    raw,
    slow_first_byte,
    status,
)

_M_ARENA_MAX = -8  # malloc.h
PAUSES = 10  # at least; the memory's first and last fifth need some
LONGEST_SLICE_S = 60.0
STUCK_S = 90.0  # longer than any request may take: queue, answer and commentary
PROMPT_S = 15.0  # for an answer of some dozen tokens on an idle machine, with room for one that is busy with others

# A hang takes a commentary's whole time, so it is rare.
BEHAVIOURS: tuple[tuple[Behaviour, int], ...] = (
    (answer(), 20),
    (answer(""), 2),
    (status(500), 4),
    (status(400), 4),
    (status(429), 2),
    (raw(b"no JSON"), 4),
    (cut_before_answer, 3),
    (cut_in_body, 3),
    (slow_first_byte(), 1),
)


@dataclass(frozen=True)
class Pause:
    """What was seen while nothing was asked."""

    rss: int
    answer_s: float


class Soak:
    """One handler under traffic, slice by slice."""

    def __init__(self, service: ChatServer, minutes: float, callers: int, seed: int) -> None:
        source = random.Random(seed)  # noqa: S311 - chooses faults
        behaviours, weights = zip(*BEHAVIOURS, strict=True)

        def misbehave(exchange: Exchange) -> None:
            source.choices(behaviours, weights)[0](exchange)

        service.script = [misbehave]
        self._service = service
        self._seconds = 60 * minutes
        self._slice_s = min(LONGEST_SLICE_S, self._seconds / PAUSES)
        self.tally = Tally()
        self._handler = _handler(service.url)
        self._endpoint = Endpoint(self._handler, self.tally)
        self._known = known_requests(self._endpoint, 48 if minutes >= 1 else 18)
        self._callers = [Caller(self._endpoint, self._known, seed + number) for number in range(callers)]
        self._callers[0].commented()  # its client starts a thread when it is first asked
        self._threads = _threads()
        self.pauses: list[Pause] = []

    def run(self) -> None:
        """Traffic and pauses in turn until the time is up."""
        spent = 0.0
        while spent < self._seconds - 0.01:
            self._traffic(min(self._slice_s, self._seconds - spent))
            spent += self._slice_s
            self.pauses.append(self._pause())
            self._progress(min(spent, self._seconds))

    def _traffic(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        _in_threads([partial(caller.run, until) for caller in self._callers], within_s=seconds + STUCK_S)

    def _pause(self) -> Pause:
        with self._service.lock:
            self._service.requests.clear()  # the fake service remembers all that it was asked
        seen = self._handler.monitor.snapshot()
        answered = sum(entry["count"] for entry in seen["requests"])
        self._hold(answered == self.tally.records, f"{answered} counted, {self.tally.records} records came back")
        self._hold(seen["active_requests"] == seen["queue_size"] == 0, "requests are left over")
        seconds: list[float] = []
        asked = self._known[: len(self._callers)]
        _in_threads([lambda: seconds.extend(map(self._prompt, asked))], within_s=STUCK_S)
        answer_s = max(seconds)
        self._hold(answer_s < PROMPT_S, f"an answer of an idle endpoint took {answer_s:.1f} s")
        return Pause(_resident(), answer_s)

    def _prompt(self, known: Known) -> float:
        started = time.perf_counter()
        (record,) = self._endpoint.ask(known.inputs, known.parameters)
        self._hold(record.get("generated_text") == known.text, "an answer of an idle endpoint changed")
        return time.perf_counter() - started

    def _hold(self, holds: bool, what: str) -> None:
        """Note what does not hold; the run goes on, and fails at its end."""
        try:
            check(holds, what)
        except ViolationError as error:
            self.tally.violated("pause", error)

    def verdict(self, growth_bound: float) -> dict[str, Any]:
        """The document; ``ok`` says whether all held."""
        fifth = max(1, len(self.pauses) // 5)
        after_warm_up = statistics.median(pause.rss for pause in self.pauses[:fifth])
        at_end = statistics.median(pause.rss for pause in self.pauses[-fifth:])
        growth = at_end / after_warm_up - 1
        self._hold(growth <= growth_bound, f"memory grew by {100 * growth:.1f} %")
        left = _threads(until=len(self._threads))
        names = sorted({thread.name for thread in left} - {thread.name for thread in self._threads})
        self._hold(len(left) <= len(self._threads), f"threads are left over: {names[:5]}")
        return {
            "ok": not self.tally.violations,
            "violations": self.tally.violations[:20],
            "minutes": round(self._seconds / 60, 3),
            "actions": dict(sorted(self.tally.actions.items())),
            "records": self.tally.records,
            "rss": {"after_warm_up": int(after_warm_up), "at_end": int(at_end), "growth": round(growth, 4)},
            "idle_answer_s": round(max(pause.answer_s for pause in self.pauses), 3),
            "threads": {"after_start": len(self._threads), "at_end": len(left)},
        }

    def _progress(self, spent: float) -> None:
        pause = self.pauses[-1]
        print(
            f"{spent / 60:.2f} min: {sum(self.tally.actions.values())} sent, {len(self.tally.violations)} violations, "
            f"{pause.rss / 1e6:.0f} MB, idle answer {pause.answer_s:.2f} s, {threading.active_count()} threads",
            flush=True,
        )


def _in_threads(work: Sequence[Callable[[], None]], *, within_s: float) -> None:
    """Do all of it side by side.

    Raises:
        ViolationError: it was not done in time; the stacks of all threads are on standard error.
    """
    until = time.monotonic() + within_s
    threads = [threading.Thread(target=each, name="caller") for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            faulthandler.dump_traceback(all_threads=True)
            raise ViolationError("a caller waits for an answer that does not come")


def _handler(commentary_url: str) -> Any:
    for name in [n for n in os.environ if n.startswith(("PULSE_", "DEEPSEEK_"))]:
        del os.environ[name]
    # Fewer places than callers, so that some wait.
    os.environ.update(PULSE_DEVICE="cpu", PULSE_MAX_CONCURRENT_REQUESTS="4", deep_key="a-key-of-no-service")
    os.environ["DEEPSEEK_BASE_URL"] = commentary_url
    from handler import EndpointHandler

    return EndpointHandler(str(build_checkpoint(WORK / "soak")))


def _threads(until: int | None = None) -> list[threading.Thread]:
    """Threads alive, but for the fake service's and asyncio's bounded pool; some seconds to come down to a number."""
    deadline = time.monotonic() + 15
    while True:
        alive = [t for t in threading.enumerate() if not ("process_request" in t.name or t.name.startswith("asyncio_"))]
        if until is None or len(alive) <= until or time.monotonic() > deadline:
            return alive
        alive[-1].join(0.2)


def _one_arena() -> None:
    """Have malloc serve all threads from one heap, unless the environment says otherwise; glibc alone knows how."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _resident() -> int:
    """Resident bytes once all that can be given back is given back; the median of a few readings."""
    readings = []
    for _ in range(3):
        gc.collect()
        with suppress(AttributeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        readings.append(pages * os.sysconf("SC_PAGE_SIZE"))
    return int(statistics.median(readings))


def main() -> None:
    """Soak, print, and fail if anything did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--callers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="another one sends other traffic")
    parser.add_argument("--growth", type=float, default=0.02, help="of the memory, at most, relative")
    options = parser.parse_args()
    _one_arena()
    logging.disable(logging.CRITICAL)  # thousands of refused bodies would be told one by one
    with chat_server() as service:
        try:
            soak = Soak(service, options.minutes, options.callers, options.seed)
            soak.run()
        except ViolationError as error:
            print(json.dumps({"ok": False, "violations": [str(error)]}), flush=True)
            os._exit(1)  # threads that hang would keep the process
        document = soak.verdict(options.growth)
    print(json.dumps(document))
    sys.exit(not document["ok"])


if __name__ == "__main__":
    main()
