"""Train the demo model from nothing, in one command: ``python -m demo.train build/demo-training``.

Three stages: the tower learns to see, the language model to answer from what it sees, then both together.  A run that
was interrupted goes on where it stopped; ``--stage`` runs one stage alone.  The folder gets the state, the progress as
lines of JSON and as a plot, and, after each stage that answers, the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from demo.batches import Plan, Stage
from demo.network import write_checkpoint
from demo.plots import plot_progress
from demo.samples import Sample, sample_at
from demo.training import PROGRESS, Trainer, stage_begun

logger = logging.getLogger("demo.train")

PLANS: dict[str, dict[Stage, Plan]] = {
    "cpu": {
        "see": Plan("see", steps=9000, fresh=3, keep=72, tower_lr=1e-3, decay=1.0),
        "read": Plan("read", steps=1000, batch=4, fresh=1, keep=72, lr=1.5e-3),
        "both": Plan("both", steps=3400, batch=4, keep=72, lr=1e-3, tower_lr=3e-4, decay=1.0),
    },
    "cuda": {
        "see": Plan("see", steps=5800, batch=16, fresh=4, keep=72, tower_lr=1.4e-3, decay=1.0),
        "read": Plan("read", steps=450, batch=16, fresh=4, keep=72, lr=2e-3),
        "both": Plan("both", steps=3000, batch=16, fresh=4, keep=72, lr=1.5e-3, tower_lr=6e-4, decay=1.0),
    },
}
"""By kind of device: a GPU takes more images at once.  Its plan takes eight minutes on an H100 with 16 cores."""


def train(folder: Path, plan: Plan, held_out: Sequence[Sample], *, device: str, workers: int) -> None:
    """Run one stage to its end, or to the end of its plan if it had begun before."""
    trainer = Trainer(folder, plan, device=device, workers=workers)
    logger.info("Stage %s from step %d: %s", plan.stage, trainer.step, trainer.describe())
    if trainer.progress >= 1:
        logger.info("It is complete; for another run take another folder.")
    sums: dict[str, float] = {}
    while trainer.progress < 1:
        validated = int(_VALIDATIONS * trainer.progress)
        for name, loss in trainer.train_step().items():
            sums[name] = sums.get(name, 0.0) + loss / 25
        if trainer.step % 25 == 0:
            trainer.log({"losses": {name: round(value, 4) for name, value in sums.items()}})
            logger.info("%s %d/%d %.0f s %s", plan.stage, trainer.step, plan.steps, trainer.seconds, _short(sums))
            sums = {}
        if trainer.step % 100 == 0 or trainer.progress >= 1:
            trainer.save()
        if int(_VALIDATIONS * trainer.progress) > validated:
            held = trainer.validate(held_out)
            trainer.log({"held_out": held})
            plot_progress(folder / PROGRESS, folder / "progress.png")
            logger.info("held out: %s", json.dumps(held))
    if plan.stage != "see":
        write_checkpoint(trainer.network, folder / "checkpoint")


_VALIDATIONS = 8
"""In a stage."""


def stages_left(folder: Path) -> list[Stage]:
    """The stages that an earlier run in this folder did not leave behind, the one it was in first."""
    stages, begun = list(get_args(Stage)), stage_begun(folder)
    return stages[stages.index(begun) :] if begun else stages


def _usable_cores() -> int:
    """Those that this process may use, where the system tells, or else all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _short(sums: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.3f}" for name, value in sums.items())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("folder", type=Path, help="for the state, the progress and the checkpoint")
    parser.add_argument("--stage", choices=get_args(Stage), help="this stage alone")
    parser.add_argument("--steps", type=int, help="instead of the stage's own number")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--fresh", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--tower-lr", type=float)
    parser.add_argument("--decay", type=float)
    parser.add_argument("--keep", type=int)
    parser.add_argument("--minutes", type=float, help="end the stage after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, help="processes that draw images; on a GPU all cores but one, up to 15")
    parser.add_argument("--held-out", type=int, default=96)
    args = parser.parse_args(argv)
    kind = args.device.partition(":")[0]
    if kind not in PLANS:
        parser.error(f"--device {args.device}: there are plans for {' and '.join(PLANS)}.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    settings = ("steps", "batch", "fresh", "lr", "tower_lr", "decay", "keep", "minutes")
    changes = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    plans = PLANS[kind]
    workers = args.workers if args.workers is not None else 1 if kind == "cpu" else max(1, min(15, _usable_cores() - 1))
    held_out = [sample_at("held-out", index) for index in range(args.held_out)]
    for name in [args.stage] if args.stage else stages_left(args.folder):
        train(args.folder, replace(plans[name], **changes), held_out, device=args.device, workers=workers)


if __name__ == "__main__":
    main()
