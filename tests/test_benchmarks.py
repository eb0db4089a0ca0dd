"""The long measurements run: each once, in its smallest form, to the JSON document that its docstring explains."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plots import draw

ROOT = Path(__file__).parents[1]


def last_line(module: str, *arguments: str) -> dict[str, Any]:
    """The document that a script ends with; it must end well."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def explained(module: str) -> set[str]:
    """Every name in the list of a script's docstring."""
    text = importlib.import_module(f"benchmarks.{module}").__doc__ or ""
    return set(re.findall(r"``(\w+)``", text[text.index("\n- ") :]))


@pytest.mark.parametrize(
    ("module", "arguments", "pictures"),
    [
        ("bench_engine", ("--quick", "--without-official", "--without-sweep"), ["answer.png"]),
        ("bench_gpu", ("--device", "cpu", "--tiny"), ["gpu.png"]),
    ],
)
def test_every_metric_is_explained_and_the_pictures_are_drawn(
    module: str, arguments: Sequence[str], pictures: list[str], tmp_path: Path
) -> None:
    document = last_line(module, *arguments)
    assert [file.name for file in draw(document, tmp_path) if file.stat().st_size > 5000] == pictures
    assert set(document) <= explained(module)
    said = document.get("parity") or document["image_answer"]
    assert said.get("agreement", said.get("tokens_equal")) == 1  # the sides said the same


def test_a_short_soak_holds() -> None:
    document = last_line("soak", "--minutes", "0.1", "--growth", "0.5")
    assert (document["ok"], document["violations"]) == (True, [])
    assert document["records"] > 0
    assert set(document) <= explained("soak")
