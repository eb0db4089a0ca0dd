"""Plots of the training and of the evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from demo.signals import RHYTHMS

if TYPE_CHECKING:
    from demo.evaluate import Tally

_SHORT = {
    "sinus rhythm": "sinus",
    "sinus bradycardia": "bradycardia",
    "sinus tachycardia": "tachycardia",
    "atrial fibrillation": "fibrillation",
    "sinus rhythm with premature ventricular complexes": "PVC",
    "sinus rhythm with premature atrial complexes": "PAC",
    "complete heart block": "complete block",
    "ventricular paced rhythm": "paced",
}


def confusion(tally: Tally) -> tuple[list[str], np.ndarray]:
    """Row per true rhythm, column per answer; the last column is all that is no rhythm."""
    names = [str(name) for name, *_ in RHYTHMS]
    counts = np.zeros((len(names), len(names) + 1), int)
    for key, given in zip(tally.keys, tally.given, strict=True):
        counts[names.index(key), names.index(given) if given in names else len(names)] += 1
    return [_SHORT[name] for name in names], counts


def plot_confusion(tally: Tally, file: Path) -> None:
    """The rhythm that was drawn against the rhythm that was read."""
    names, counts = confusion(tally)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure, axes = plt.subplots(figsize=(6.4, 4.8), dpi=80)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(names) + 1), [*names, "other"], rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="read", ylabel="drawn", title=f"Rhythm: {100 * tally.accuracy:.1f} % right")
    _save(figure, file)


def plot_rates(tally: Tally, file: Path) -> None:
    """The rate that was drawn against the rate that was read, with the band that counts as right."""
    drawn = np.array([float(key) for key in tally.keys])
    read = np.array([float(given or "nan") for given in tally.given])
    figure, axes = plt.subplots(figsize=(4.8, 4.8), dpi=80)
    limits = np.array([25.0, 165.0])
    axes.fill_between(limits, limits - 5, limits + 5, color="tab:green", alpha=0.2, label="± 5 bpm")
    axes.plot(drawn, read, ".", markersize=2, alpha=0.5)
    axes.set(xlabel="drawn, bpm", ylabel="read, bpm", xlim=limits, ylim=limits)
    axes.set_title(f"Heart rate: {100 * tally.accuracy:.1f} % within 5 bpm")
    axes.legend()
    _save(figure, file)


def plot_progress(progress: Path, file: Path) -> None:
    """Held-out scores over the minutes of training."""
    records = [json.loads(line) for line in progress.read_text("utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7.2, 4.0), dpi=80)
    lines: dict[str, list[tuple[float, float]]] = {}
    elapsed, before, stage = 0.0, 0.0, None
    for record in records:
        if record["stage"] != stage:
            before, stage = elapsed, record["stage"]
        elapsed = before + record["seconds"]
        for name, value in record.get("held_out", {}).items():
            lines.setdefault(name, []).append((elapsed / 60, value))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), "--" if name.startswith("heads") else "-", label=name, linewidth=1)
    axes.set(xlabel="minutes", ylabel="share right", title="Held-out images during training", ylim=(0, 1))
    axes.legend(fontsize=6, ncols=2, loc="lower right")
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    import argparse

    parser = argparse.ArgumentParser(description="Plot a training's progress.")
    parser.add_argument("progress", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args(argv)
    plot_progress(args.progress, args.output)


if __name__ == "__main__":
    main()
