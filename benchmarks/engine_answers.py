"""The endpoint's handler in a process of its own, answering on command and under traffic.

python -m benchmarks.engine_answers CHECKPOINT THREADS
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.worker import serve


def _load() -> tuple[dict[str, Any], dict[str, Any]]:
    started = time.perf_counter()
    import torch

    from handler import EndpointHandler

    imported = time.perf_counter()
    torch.set_num_threads(int(sys.argv[2]))
    handler = EndpointHandler(sys.argv[1])
    ready = time.perf_counter()

    from benchmarks.traffic import Traffic  # brings the demo's ECG: not part of the start

    traffic = Traffic(handler)
    network = handler._analyzer.model.network
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    commands = {
        "answer": lambda image, **rest: traffic.answer(Path(image).read_bytes(), **rest),
        "level": traffic.level,
        "at_once": traffic.at_once,
        "throughput": traffic.throughput,
        "tokens": traffic.tokens,
        "same_image": traffic.same_image,
        "overhead": traffic.overhead,
        "peak": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    return {"import_s": imported - started, "start_s": ready - imported, "weights_bytes": weights}, commands


if __name__ == "__main__":
    serve(_load)
