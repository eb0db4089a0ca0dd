"""Time the official code's preprocessing.  Runs in its own environment: ``python … IMAGE REPEATS OUT.npy``."""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace

import numpy as np
from llava.mm_utils import process_images
from PIL import Image
from transformers import CLIPImageProcessor

CONFIG = SimpleNamespace(
    image_aspect_ratio="anyres",
    image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
)
PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})


def main() -> None:
    image = Image.open(sys.argv[1]).convert("RGB")
    seconds = []
    for _ in range(int(sys.argv[2]) + 1):
        started = time.perf_counter()
        pixels = process_images([image], PROCESSOR, CONFIG)
        seconds.append(time.perf_counter() - started)
    np.save(sys.argv[3], pixels[0].numpy())
    print(json.dumps(seconds[1:]))


if __name__ == "__main__":
    main()
