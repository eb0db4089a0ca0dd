"""The figures of ``bench_engine`` and ``bench_gpu`` as pictures.

    python -m benchmarks.plots RESULT.json DIR

``RESULT.json`` holds the benchmark's JSON document (``--out``), or all that it printed.  DIR gets ``answer.png``
(one image answer by side and stage) and, unless the sweep was left out, ``concurrency.png`` (throughput and latency
against callers); of ``bench_gpu``, ``gpu.png`` (shares of the device's limits, and answers against plain ``generate``).
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

_STAGES = {"preprocess": "#8c8c8c", "vision": "#4c78a8", "prefill": "#f58518", "decode": "#54a24b"}
_SIDES = {"official": "official code", "plain": "transformers generate", "ours": "this engine"}
_KINDS = {"text": "#4c78a8", "image": "#f58518"}
_PANELS = (
    ("tokens_per_s", "generated tokens per second"),
    ("requests_per_s", "requests per second"),
    ("first_token_s", "time to first token, s"),
    ("token_s", "time per output token, s"),
)


def draw(figures: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures and return their files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    if "limits" in figures:
        painters = {"gpu": _gpu}
    else:
        painters = {"answer": _answer} | ({"concurrency": _concurrency} if "text" in figures else {})
    for name, painter in painters.items():
        picture = painter(pyplot, figures)
        files.append(folder / f"{name}.png")
        picture.savefig(files[-1], dpi=110, metadata={"Software": None})
        pyplot.close(picture)
    return files


def _answer(pyplot: Any, figures: dict[str, Any]) -> Any:
    """One bar a side, cut into stages."""
    answer = figures["image_answer"]
    sides = [side for side in _SIDES if side in answer]
    picture, axes = pyplot.subplots(figsize=(8, 0.7 + 0.6 * len(sides)), layout="constrained")
    left = [0.0] * len(sides)
    for stage, colour in _STAGES.items():
        widths = [answer[side]["stages"][stage] for side in sides]
        axes.barh([_SIDES[side] for side in sides], widths, left=left, color=colour, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, side in enumerate(sides):
        axes.annotate(f"{answer[side]['answer_s']:.2f} s", (left[row], row), xytext=(4, -4), textcoords="offset points")
    axes.set_xlim(0, 1.12 * max(left))
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds: one image question, {answer['new_tokens']} new tokens")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(_STAGES), loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)
    return picture


def _concurrency(pyplot: Any, figures: dict[str, Any]) -> Any:
    """Throughput above, latency below."""
    picture, panels = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex=True)
    for axes, (metric, title) in zip(panels.flat, _PANELS, strict=True):
        for kind, colour in _KINDS.items():
            levels = sorted(int(level) for level in figures[kind] if level.isdigit())
            values = [figures[kind][str(level)][metric] for level in levels]
            label = f"{kind}, {figures[kind]['new_tokens']} new tokens"
            axes.plot(levels, values, marker="o", color=colour, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(levels, [str(level) for level in levels])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("callers at once")
    panels[0][0].legend(frameon=False)
    return picture


def _gpu(pyplot: Any, figures: dict[str, Any]) -> Any:
    """What is reached of the device's limits; seconds of answers, one and sixteen."""
    picture, (shares, answers) = pyplot.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    reached = {
        "prefill": figures["prefill"]["of_matrix_rate"],
        "vision tower": figures["vision"]["of_matrix_rate"],
        "decode, about a text": figures["decode"]["text"]["of_bandwidth"],
        "decode, about an image": figures["decode"]["image"]["of_bandwidth"],
    }
    [(many, found)] = [(n.removeprefix("image_"), f) for n, f in figures["decode"].items() if n.startswith("image_")]
    if found:
        reached[f"decode, {many} images at once"] = found["of_bandwidth"]
    colours = ["#f58518" if name in ("prefill", "vision tower") else "#54a24b" for name in reached]
    _bars(shares, {name: 100 * share for name, share in reached.items()}, colours, "{:.0f} %")
    shares.set_xlabel("% of the measured matrix rate (orange) or bandwidth (green)")
    plain, at_once = figures["plain"], figures["at_once"]
    seconds = {
        "transformers generate": plain["answer_s"],
        "this engine": plain["answer_s"] / plain["over_ours"],
        f"generate, {many} times that": at_once["over_plain"] * at_once["together_s"],
        f"this engine, {many} one by one": at_once["one_after_another_s"],
        f"this engine, {many} at once": at_once["together_s"],
    }
    _bars(answers, seconds, ["#8c8c8c", "#4c78a8", "#8c8c8c", "#4c78a8", "#4c78a8"], "{:.1f} s")
    answers.set_xlabel(f"seconds; image questions, {figures['parity']['tokens']} new tokens each")
    picture.suptitle(f"{figures['limits']['name']}, {figures['model']['dtype']}", fontsize=10)
    return picture


def _bars(axes: Any, values: dict[str, float], colours: list[str], form: str) -> None:
    axes.barh(list(values), list(values.values()), color=colours)
    for row, value in enumerate(values.values()):
        axes.annotate(form.format(value), (value, row), xytext=(4, -4), textcoords="offset points")
    axes.set_xlim(0, 1.15 * max(values.values()))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    for file in draw(json.loads(options.result.read_text("utf-8").splitlines()[-1]), options.folder):
        print(file)


if __name__ == "__main__":
    main()
