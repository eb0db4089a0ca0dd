"""What both sides are asked.  Imported by the official code's environment too: standard library, numpy and Pillow."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")

# Other checkpoints of the same layout: keys of config.json that change the mathematics.
VARIANTS: dict[str, dict[str, object]] = {
    "rope_theta": {"rope_theta": 500000.0},
    "rope_linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "last_layer": {"mm_vision_select_layer": -1},
    "second_layer": {"mm_vision_select_layer": 2},
    "with_cls": {"mm_vision_select_feature": "cls_patch"},
    "pad": {"image_aspect_ratio": "pad"},
    "square": {"image_aspect_ratio": None},
    "norm_eps": {"rms_norm_eps": 0.05},
    "pinpoints": {"image_grid_pinpoints": [[672, 672], [336, 672], [1344, 336]]},
}

IMAGES = {
    "wide": (1000, 500),
    "panorama": (3000, 1000),
    "ribbon": (1400, 60),
    "tall": (500, 1400),
    "tiny": (40, 30),
    "one_tile": (336, 336),  # two pinpoints tie: the first wins
    "four_tiles": (672, 672),
    "screenshot": (1241, 704),
    "print": (2200, 1700),
    "odd": (333, 1001),
}

QUESTIONS = {
    "plain": "What is the rhythm of this ECG?",
    "turkish": "Bu EKG'de ritim nedir? Çarpıntısı olan hastada ST çökmesi var mı, ığüşöç İĞÜŞÖÇ?",
    "spaces": "  Two  leading spaces,   and\ttabs  inside ",
    "lines": "First line.\nSecond line.\n\n- a list\n- of findings\n",
    "long": "Please consider every lead in turn and say what you see. " * 40,
    "signs": "QTc = 450 ms @ 25 mm/s; ΔST ≥ 0.1 mV → ❤️ 心电图 ▁ under",
}


@dataclass(frozen=True)
class Case:
    """One greedy generation: (user, assistant, user, …) turns, an image or none, a repetition penalty."""

    name: str
    turns: tuple[str, ...]
    image: str | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int = field(default=24)


def generation_cases(merge_type: str) -> list[Case]:
    """Every image with every question for ``flat``, PULSE's own type; every image with some for the others."""
    questions = list(QUESTIONS) if merge_type == "flat" else ["plain", "turkish"]
    cases = [Case(f"{i}-{q}", (QUESTIONS[q],), i) for i in IMAGES for q in questions]
    cases += [Case(f"text-{q}", (QUESTIONS[q],)) for q in questions]
    for penalty in (1.05, 1.3, 2.0):
        cases.append(Case(f"penalty-{penalty}", (QUESTIONS["plain"],), "screenshot", penalty, 48))
        cases.append(Case(f"penalty-{penalty}-text", (QUESTIONS["turkish"],), None, penalty, 48))
    chat = (QUESTIONS["plain"], "Sinus rhythm, rate 72.", QUESTIONS["spaces"])
    cases.append(Case("chat-image", chat, "wide"))
    cases.append(Case("chat-text", chat))
    cases.append(Case("chat-long", (*chat, "Yes.\nNo ST elevation.", QUESTIONS["turkish"]), "tall"))
    return cases


def variant_cases() -> list[Case]:
    """A few for each of :data:`VARIANTS`: enough to notice a key that is not honoured."""
    cases = [Case(f"{image}-plain", (QUESTIONS["plain"],), image) for image in ("panorama", "tall", "screenshot")]
    return [*cases, Case("text", (QUESTIONS["turkish"],), None, 1.05, 48)]


def draw_image(name: str, folder: Path) -> Path:
    """A seeded picture of the case's size: smooth colours, lines and noise, different in every region."""
    width, height = IMAGES[name]
    source = np.random.default_rng(sum(map(ord, name)))
    coarse = source.integers(0, 256, (max(2, height // 40), max(2, width // 40), 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(30):
        ends = source.integers(0, [width, height, width, height]).tolist()
        pen.line(ends, fill=tuple(source.integers(0, 256, 3).tolist()), width=1 + max(width, height) // 300)
    file = folder / f"{name}.png"
    image.save(file)
    return file


def tokenizer_texts(count: int = 400) -> list[str]:
    """Texts that tokenisers get wrong: runs of spaces, line breaks, other scripts, combining marks; none special."""
    source = random.Random(7)
    atoms = [" ", "  ", "   ", "\n", "\t", "a", "b", "ECG", "St", "ST", "1", "23", ".", ",", "'", "<", ">", "/", "s"]
    atoms += [
        "ş",
        "ğ",
        "İ",
        "é",
        "e\u0301",
        "心",
        "❤️",
        "▁",
        "USER:",
        "ASSISTANT:",
        "\u00a0",
        "\u200b",
        "\ufb01",
        "Δ",
        "\x00",
    ]
    texts = ["a  b", " a", "  a", "a ", "", " ", "\n", "\n ", " \n", "▁", "▁▁a", "a▁b", "USER: x", *QUESTIONS.values()]
    texts += ["".join(source.choices(atoms, k=source.randint(1, 14))) for _ in range(count)]
    return texts
