"""How fast, and in how much memory, a checkpoint of about 1 GB is loaded.

    python -m benchmarks.bench_loading [--dtype float32] [--runs 5]

Each run is a process of its own, after one that warms the page cache.  The last line is one JSON document:

- ``weights_bytes``: the parameters as they lie in memory after loading.
- ``plain_read_s``: seconds to read the files once, each into memory of its own (``read_bytes``).
- ``buffer_read_s``: the same into one reused buffer of 1 MiB, which spares the memory but is no loading.
- ``load_s``: seconds of ``load_model``, from the call to the ready model.
- ``load_over_read``: median of the paired ratios ``load_s / plain_read_s``.
- ``touch_s``: seconds to read every loaded weight once afterwards (on the CPU, weights of the files' own dtype are
  mapped, so this is where their pages are first used).
- ``peak_over_weights``: the process's peak resident memory while loading, less what it had with all libraries
  imported, over ``weights_bytes``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from demo.build_checkpoint import DType, build_checkpoint
from demo.random_weights import CheckpointShape

WORK = Path(__file__).resolve().parents[1] / "build" / "bench"
# About 1 GB as float16 or bfloat16, half of it in one embedding-sized tensor pair as in the real model.
SHAPE = CheckpointShape(
    layers=16,
    hidden=1536,
    heads=24,
    kv_heads=24,
    intermediate=4096,
    vision_layers=8,
    vision_hidden=512,
    vision_heads=8,
    vision_intermediate=2048,
    patch_size=14,
    vocab=32_000,
)


def checkpoint(dtype: DType) -> Path:
    """The checkpoint, built once."""
    folder = WORK / f"loading-{dtype}"
    if not (folder / "model.safetensors.index.json").is_file():
        print(f"Building a checkpoint of about 1 GB in {folder} …", flush=True)
        build_checkpoint(folder, shape=SHAPE, dtype=dtype, shards=3)
    return folder


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """One run in this process."""
    import torch

    from pulse_ecg.checkpoint import load_model
    from pulse_ecg.config import Settings

    torch.zeros(1).sum()
    buffer_read_s = _buffer_read(folder)
    started = time.perf_counter()
    contents = [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]
    plain_read_s = time.perf_counter() - started
    del contents
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    started = time.perf_counter()
    model = load_model(folder, Settings(device="cpu", dtype=dtype))
    load_s = time.perf_counter() - started
    peak = _resident("VmHWM")
    started = time.perf_counter()
    for parameter in model.network.parameters():
        parameter.sum()
    return {
        "weights_bytes": sum(p.nbytes for p in model.network.parameters()),
        "plain_read_s": plain_read_s,
        "buffer_read_s": buffer_read_s,
        "load_s": load_s,
        "touch_s": time.perf_counter() - started,
        "peak_bytes": peak - before,
        "peak_touched_bytes": _resident("VmHWM") - before,
    }


def _buffer_read(folder: Path) -> float:
    buffer = memoryview(bytearray(2**20))
    started = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started


def _resident(field: str) -> int:
    """Bytes, from the kernel's own account of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", default="float16", help="dtype of the files")
    parser.add_argument("--dtype", default="auto", help="dtype in memory; auto is float32 on the CPU")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = checkpoint(options.stored)
    if options.one:
        print(json.dumps(measure(folder, options.dtype)))
        return
    command = [sys.executable, "-m", __spec__.name, "--one", "--stored", options.stored, "--dtype", options.dtype]
    runs: list[dict[str, Any]] = []
    for number in range(options.runs + 1):
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        if number:
            runs.append(json.loads(output))
            print(f"run {number}: {output}", flush=True)
    print(json.dumps(summary(runs) | {"stored": options.stored, "dtype": options.dtype}))


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the runs, ratios pair by pair."""

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 4)

    return {
        "weights_bytes": runs[0]["weights_bytes"],
        "plain_read_s": median([r["plain_read_s"] for r in runs]),
        "buffer_read_s": median([r["buffer_read_s"] for r in runs]),
        "load_s": median([r["load_s"] for r in runs]),
        "touch_s": median([r["touch_s"] for r in runs]),
        "load_over_read": median([r["load_s"] / r["plain_read_s"] for r in runs]),
        "peak_over_weights": median([r["peak_bytes"] / r["weights_bytes"] for r in runs]),
        "peak_touched_over_weights": median([r["peak_touched_bytes"] / r["weights_bytes"] for r in runs]),
    }


if __name__ == "__main__":
    main()
