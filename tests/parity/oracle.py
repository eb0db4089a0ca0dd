"""Builds the official code's environment and asks it, once for a set of cases; later runs read what it said."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from demo.build_checkpoint import build_checkpoint
from tests.parity import cases

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
WORK = ROOT / "build" / "parity"
LLAVA = "llava-torch==1.2.2.post1"


def python() -> Path:
    """The oracle's interpreter; its environment is made if missing (``PULSE_ORACLE_PYTHON`` names another)."""
    if given := os.environ.get("PULSE_ORACLE_PYTHON"):
        return Path(given)
    folder = ROOT / ".venv-oracle"
    interpreter = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-r", str(HERE / "requirements.txt")], check=True)
        subprocess.run([*install, "--no-deps", LLAVA], check=True)
        (folder / "complete").touch()
    return interpreter


def expectations(checkpoints: dict[str, Path], asked: dict[str, list[cases.Case]], tokenizers: dict[str, Path]) -> Any:
    """What the official code answers."""
    images = {name: str(cases.draw_image(name, WORK)) for name in cases.IMAGES}
    plan = {
        "checkpoints": {name: str(folder) for name, folder in checkpoints.items()},
        "cases": {name: [asdict(case) for case in some] for name, some in asked.items()},
        "images": images,
        "tokenizers": {name: str(folder) for name, folder in tokenizers.items()},
        "texts": cases.tokenizer_texts(),
    }
    text = json.dumps(plan, sort_keys=True)
    sources = [text.encode(), (HERE / "official.py").read_bytes()]
    sources += [file.read_bytes() for folder in checkpoints.values() for file in sorted(folder.rglob("*.*"))]
    output = WORK / f"official-{hashlib.sha256(b''.join(sources)).hexdigest()[:16]}"
    if not (output / "answers.json").is_file():  # written last
        output.mkdir(exist_ok=True)
        (WORK / "plan.json").write_text(text, "utf-8")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        subprocess.run([python(), HERE / "official.py", WORK / "plan.json", output], check=True, env=environment)
    answers: dict[str, Any] = json.loads((output / "answers.json").read_text("utf-8"))
    with np.load(output / "logits.npz") as logits:
        return answers | {"logits": dict(logits)}


def checkpoint(name: str, *, config: dict[str, Any] | None = None, **options: Any) -> Path:
    """A random checkpoint that the official code can load too (its tower's folder by an absolute path).

    ``config`` overrides keys of its ``config.json``.
    """
    folder = build_checkpoint(WORK / name, dtype="float32", tower_path="absolute", tower_weights=True, **options)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | (config or {})), "utf-8")
    return folder
