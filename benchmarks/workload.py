"""What the engine's benchmarks ask, and of which checkpoint: the same for every side that is measured."""

from __future__ import annotations

import base64
import functools
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from demo.build_checkpoint import build_checkpoint
from demo.random_weights import EOS, CheckpointShape

WORK = Path(__file__).resolve().parents[1] / "build" / "bench"
SIZE = (1241, 704)  # a screenshot of an ECG: 5 tiles, 2,880 image tokens on the real model
MIDDLING = CheckpointShape(
    layers=8,
    hidden=512,
    heads=8,
    kv_heads=8,
    intermediate=1376,
    vocab=32_000,
    vision_layers=6,
    vision_hidden=256,
    vision_heads=4,
    vision_intermediate=1024,
    patch_size=14,
)
SMALL = CheckpointShape()
_MUTED = -40.0  # what demo.random_weights gives lm_head's constant channel for a token that is never said

IMAGE_QUESTIONS = ("What is the rhythm of this ECG?", "Is there ST elevation, and in which leads?")
_TOPICS = (
    "atrial fibrillation",
    "left bundle branch block",
    "hyperkalaemia",
    "a long QT interval",
    "pericarditis",
    "right ventricular hypertrophy",
    "an old inferior infarction",
    "Wolff-Parkinson-White syndrome",
)


def checkpoint(shape: CheckpointShape, name: str) -> Path:
    """A random checkpoint in float32 that the official code loads too, built once; its answers never end early.

    Its tower's folder is named by an absolute path, so a folder that was moved is built anew.
    """
    folder = WORK / name
    done = folder / "complete.json"
    stamp = json.dumps([str(folder), repr(shape)])
    if not done.is_file() or done.read_text("utf-8") != stamp:
        done.unlink(missing_ok=True)
        build_checkpoint(folder, shape=shape, dtype="float32", shards=1, tower_path="absolute", tower_weights=True)
        _mute_end(folder / "model.safetensors")
        done.write_text(stamp, "utf-8")
    return folder


def _mute_end(file: Path) -> None:
    """Keep the end-of-sequence token unsaid, so that every answer has exactly the tokens that were asked for."""
    weights = load_file(file)
    head: torch.Tensor = weights["lm_head.weight"]
    head[EOS, 0] = _MUTED
    save_file(weights, file, metadata={"format": "pt"})


@functools.cache
def _ecg() -> Image.Image:
    from demo.ecg_image import read_recording, render  # needs pydicom, which not every machine with a GPU has

    return render(read_recording()).resize(SIZE)


def ecg_png(number: int) -> bytes:
    """The PNG file of an ECG, 1241 x 704; every number gives another image (the trace moved around the page)."""
    file = io.BytesIO()
    ImageChops.offset(_ecg(), 13 * number, 7 * number).save(file, "PNG")
    return file.getvalue()


def drawing_png(number: int, size: tuple[int, int] = SIZE) -> bytes:
    """The PNG file of a seeded drawing of coloured patches, another one for every number; needs no ECG recording."""
    width, height = size
    coarse = np.random.default_rng(number).integers(0, 256, (height // 20 + 1, width // 20 + 1, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size).save(file, "PNG", compress_level=1)
    return file.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG file as callers put it into ``image``."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def text_question(number: int) -> str:
    """A question without an image; every number gives another one, all of about the same length."""
    return f"Case {number:04d}: which findings on a 12-lead ECG speak for {_TOPICS[number % len(_TOPICS)]}?"
