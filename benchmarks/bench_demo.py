"""Start, one image answer and peak memory of the demo, and the preprocessing against the official code's.

    python -m benchmarks.bench_demo [--rounds 5] [--without-official]

The official code runs in its own environment, which is installed first if it is missing.  The last line is one JSON
document; times are seconds, medians over the rounds:

- ``import_s``: importing the handler with torch and transformers.  ``start_s``: ``EndpointHandler(path)``.
- ``first_answer_s``, ``answer_s``: a report of the sample ECG (2200 x 1700), greedy; the first one, and the median of
  those after it, each about an image that is new.  ``tokens``: the report's length.  ``token_s``: decoding, per token.
- ``peak_rss_bytes``: the process's peak resident memory after the answers.
- ``preprocess``: by image size, ``ours_s`` and ``official_s`` for an RGB image to normalised tiles, ``ratio``
  (median of the paired ratios official / ours), ``max_difference`` between the two results.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo.__main__ import CHECKPOINT, PARAMETERS, REPORT
from demo.ecg_image import read_recording, render

SIZES = ((1241, 704), (2200, 1700))
REPEATS = 10
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def answers(image: Image.Image, rounds: int) -> dict[str, Any]:
    """Start a handler on the demo model and ask it."""
    os.environ["PULSE_DEVICE"] = "cpu"
    started = time.perf_counter()
    from handler import EndpointHandler

    imported = time.perf_counter()
    handler = EndpointHandler(str(CHECKPOINT))
    ready = time.perf_counter()
    parameters = PARAMETERS | {"enable_turkish_commentary": False}
    seconds, per_token, details = list[float](), list[float](), dict[str, Any]()
    for number in range(rounds + 1):
        page = image.copy()
        page.putpixel((number, 0), (0, 0, 0))  # else the handler would know it
        body = {"inputs": {"query": REPORT, "image": page}, "parameters": parameters}
        asked = time.perf_counter()
        details = handler(body)[0]["details"]
        seconds.append(time.perf_counter() - asked)
        per_token.append(details["timings"]["decode"] / max(1, details["generated_tokens"] - 1))
    return {
        "import_s": round(imported - started, 3),
        "start_s": round(ready - imported, 3),
        "first_answer_s": round(seconds[0], 3),
        "answer_s": round(statistics.median(seconds[1:]), 3),
        "tokens": details["generated_tokens"],
        "token_s": round(statistics.median(per_token[1:]), 5),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def preprocessing(image: Image.Image, folder: Path, rounds: int, official: Path | None) -> dict[str, Any]:
    """Our tiling and normalisation, and the official one in turn with it."""
    from pulse_ecg.anyres import Preprocessing, tile_image

    file, result_file = folder / "image.png", folder / "official.npy"
    image.save(file)
    ours: list[float] = []
    theirs: list[float] = []
    pixels = None
    for _ in range(rounds):
        if official:
            script = Path(__file__).with_name("official_preprocessing.py")
            command = [str(part) for part in (official, script, file, REPEATS, result_file)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            theirs.append(statistics.median(json.loads(output.splitlines()[-1])))
        laps = []
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            pixels = tile_image(image, Preprocessing(pinpoints=PINPOINTS)).pixels_TCHW
            laps.append(time.perf_counter() - started)
        ours.append(statistics.median(laps[1:]))
    result: dict[str, Any] = {"ours_s": round(statistics.median(ours), 4)}
    if theirs:
        result["official_s"] = round(statistics.median(theirs), 4)
        result["ratio"] = round(statistics.median(t / o for t, o in zip(theirs, ours, strict=True)), 2)
        result["max_difference"] = float(np.abs(np.load(result_file) - pixels).max())
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-official", action="store_true", help="leave the official code out")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    official = None
    if not options.without_official:
        from tests.parity.oracle import python

        official = python()
    ecg = render(read_recording())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = answers(ecg, options.rounds)
        print("answers:", json.dumps(figures), flush=True)
        figures["preprocess"] = {}
        for size in SIZES:
            key = f"{size[0]}x{size[1]}"
            figures["preprocess"][key] = preprocessing(ecg.resize(size), folder, options.rounds, official)
            print(f"preprocess {key}:", json.dumps(figures["preprocess"][key]), flush=True)
    print(json.dumps(figures | {"python": sys.version.split()[0], "cpus": os.cpu_count()}))


if __name__ == "__main__":
    main()
