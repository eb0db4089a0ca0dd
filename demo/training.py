"""The training's state and its step: what is learnt, from what, how far it has come."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from demo import sparse
from demo.auxiliary import AuxiliaryHeads, RateReading, scores, targets
from demo.batches import Asked, Batch, Plan, Stage, batches
from demo.decoding import answers
from demo.muon import Muon
from demo.network import SHAPE, fresh_model, normalised
from demo.packing import answer_losses, join, pack
from demo.questions import KINDS, ask, correct
from demo.samples import Sample

logger = logging.getLogger(__name__)

PROGRESS, _STATE = "progress.jsonl", "state.pt"
_READING = 6.0  # what the rate that the language model reads as a number counts
_MUON = 3.0  # Muon's updates may be this much larger than AdamW's


def stage_begun(folder: Path) -> Stage | None:
    """The stage that the folder's state belongs to; None without one."""
    file = folder / _STATE
    stage: Stage | None = torch.load(file, weights_only=True, mmap=True)["stage"] if file.exists() else None
    return stage


class Trainer:
    """One stage of the training; resumes from its folder if an earlier run left its state there."""

    def __init__(self, folder: Path, plan: Plan, *, device: str, workers: int) -> None:
        self.plan, self._folder = plan, folder
        self.model = fresh_model(device, plan.seed)
        self.network = self.model.network
        if self.model.device.type == "cpu":  # faster there than the fused one at its size
            self.network.vision_tower.config._attn_implementation = "eager"
        self.heads = AuxiliaryHeads(SHAPE.vision_hidden).to(self.model.device)
        self.reading = RateReading(SHAPE.hidden).to(self.model.device)
        self.first = self.step = 0
        self.seconds = 0.0
        state = self._restored()
        self._parameters = self._trainable()
        self._optimisers = _optimisers(self._parameters, plan)
        if state.get("stage") == plan.stage:
            if state.get("plan") != asdict(plan):
                logger.warning("The run was begun under another plan: %s", state.get("plan"))
            for optimiser, saved in zip(self._optimisers, state["optimisers"], strict=True):
                peaks = [group["peak"] for group in optimiser.param_groups]  # the plan's may have changed
                optimiser.load_state_dict(saved)
                for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                    group["peak"] = peak
            self.step, self.seconds = state["step"], state["seconds"]
        self._batches = batches(plan, self.model.tokenizer, first=self.first, workers=workers)

    def _restored(self) -> dict[str, Any]:
        file = self._folder / _STATE
        if not file.exists():
            return {}
        state: dict[str, Any] = torch.load(file, weights_only=True, map_location=self.model.device)
        self.network.load_state_dict(state["network"])
        self.heads.load_state_dict(state["heads"])
        self.reading.load_state_dict(state["reading"])
        self.first = state["first"]
        return state

    def save(self) -> None:
        """Write all that a later run needs to go on from here."""
        state = {
            "stage": self.plan.stage,
            "network": self.network.state_dict(),
            "heads": self.heads.state_dict(),
            "reading": self.reading.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
            "first": self.first,
            "step": self.step,
            "seconds": self.seconds,
            "plan": asdict(self.plan),
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, self._folder / "state.tmp")
        (self._folder / "state.tmp").replace(self._folder / _STATE)

    def _trainable(self) -> dict[str, nn.Parameter]:
        stage = self.plan.stage
        modules: dict[str, nn.Module] = {}
        if stage != "read":
            modules |= {"tower": self.network.vision_tower, "heads": self.heads}
        if stage != "see":
            modules |= {
                "language": self.network.language_model,
                "mm_projector": self.network.mm_projector,
                "reading": self.reading,
            }
        self.network.requires_grad_(False)
        for module in modules.values():
            module.requires_grad_(True)
        return {f"{n}.{name}": p for n, module in modules.items() for name, p in module.named_parameters()}

    @property
    def progress(self) -> float:
        """The share of the stage that is done."""
        by_time = self.seconds / (60 * self.plan.minutes) if self.plan.minutes else 0.0
        return min(1.0, max(by_time, self.step / self.plan.steps))

    # --- one step ------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """One update; returns the losses by name."""
        since = time.perf_counter()
        plan = self.plan
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * _schedule(self.step, self.progress, plan)
        batch = next(self._batches)
        losses = self.losses(batch.to(self.model.device))
        stacked = torch.stack([*losses.values()])
        stacked.sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters.values(), 2.0)
        for optimiser in self._optimisers:
            optimiser.step()
            optimiser.zero_grad()
        said = stacked.tolist()
        self.first, self.step = max(self.first, batch.beyond), self.step + 1
        self.seconds += time.perf_counter() - since
        return dict(zip(losses, said, strict=True))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """What the stage makes smaller, by name."""
        with torch.set_grad_enabled(self.plan.stage != "read"):
            features = self._features(batch.pixels, batch.place_TK)
        losses: dict[str, Tensor] = {}
        if self.plan.stage != "read":
            losses, _ = self.heads(features, batch.truth, batch.images)
        if batch.asked:
            losses |= self._answer_losses(features, batch.asked, batch.images)
        return losses

    def _features(self, pixels: Tensor, place_TK: Tensor | None = None) -> Tensor:
        """Patch features before the projector, ``(P, V)``, of whole tiles or of the given patches alone."""
        if place_TK is not None:
            return sparse.encode(self.network, pixels, place_TK).flatten(0, 1)
        hidden: Tensor = self.network.vision_tower(normalised(pixels)).last_hidden_state
        return hidden[:, 1:].flatten(0, 1)

    def _answer_losses(self, features: Tensor, asked: Asked, images: int) -> dict[str, Tensor]:
        """What the answers' tokens cost, by kind of question, and the rate that the language model reads."""
        told = answer_losses(self.network, self.network.mm_projector(features), asked.sequences)
        name_A = asked.name_Q[asked.sequences.question_A]
        by_name = told.losses_A.new_zeros(len(asked.names)).index_add(0, name_A, told.losses_A)
        losses = dict(zip(asked.names, (by_name / (3 * images)).unbind(), strict=True))
        reading_A = self.reading.losses(told.inner_AD, asked.rate_A)
        return losses | {"rate read": _READING * (reading_A * asked.rate_weight_A).sum() / (3 * images)}

    # --- progress ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Scores on held-out samples; for answers, the share whose every token is the model's choice, and for rates
        the share of greedy answers within 5 bpm."""
        sums: dict[str, float] = {}
        for start in range(0, len(samples), 8):
            part = samples[start : start + 8]
            features = self._features(self._pixels(part))
            truth = targets(part).to(self.model.device)
            _, predictions = self.heads(features, truth, len(part))
            found = {f"heads {n}": v for n, v in scores(predictions, part, truth).items()}
            if self.plan.stage != "see":
                found |= self._answer_scores(part, features)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value * len(part) / len(samples)
        return {name: round(value, 3) for name, value in sums.items()}

    def _pixels(self, samples: Sequence[Sample]) -> Tensor:
        return torch.from_numpy(np.concatenate([sample.tiles_THWC for sample in samples])).to(self.model.device)

    def _answer_scores(self, samples: Sequence[Sample], features: Tensor) -> dict[str, float]:
        sizes = [sample.patch_count for sample in samples]
        packs = []
        for sample, size in zip(samples, sizes, strict=True):
            rng = np.random.default_rng(sample.index)
            questions = [ask(kind, sample.diagnosis, rng) for kind in KINDS]
            packs.append(pack(questions, self.model.tokenizer, image_tokens=size))
        sequences = join(packs, [np.arange(size) for size in sizes]).to(self.model.device)
        told = answer_losses(self.network, self.network.mm_projector(features), sequences)
        wrong = torch.zeros(len(samples) * len(KINDS), device=features.device)
        wrong = wrong.index_add(0, sequences.question_A, (~told.right_A).float()).view(-1, len(KINDS))
        right = dict(zip(KINDS, (wrong == 0).float().mean(0).tolist(), strict=True))
        return {f"exact {kind}": share for kind, share in right.items()} | {"rate": self._rates_right(samples)}

    def _rates_right(self, samples: Sequence[Sample]) -> float:
        right = 0
        for sample in samples:
            question = ask("rate", sample.diagnosis, np.random.default_rng(sample.index))
            (answer,) = answers(self.model, normalised(self._pixels([sample])), [question.text], limit=12)
            right += correct(question, answer)
        return right / len(samples)

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to the folder's ``PROGRESS`` file."""
        with (self._folder / PROGRESS).open("a", encoding="utf-8") as file:
            head = {"stage": self.plan.stage, "step": self.step, "images": self.first, "seconds": round(self.seconds)}
            file.write(json.dumps(head | record) + "\n")

    def describe(self) -> dict[str, Any]:
        """The plan, for the record."""
        return asdict(self.plan)


def _schedule(step: int, progress: float, plan: Plan) -> float:
    """Linear warm-up, constant, linear decay over the last part."""
    return min(1.0, (step + 1) / plan.warmup, max(0.02, (1 - progress) / plan.decay))


def _optimisers(parameters: dict[str, nn.Parameter], plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network, AdamW for embeddings, norms and heads."""

    def groups(names: Sequence[str], scale: float = 1.0) -> list[dict[str, Any]]:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for name in names:
            rate = scale * (plan.tower_lr if name.startswith(("tower", "heads")) else plan.lr)
            # A patch's thousands of pixels are nearly equal: their weights' steps add up.
            by_rate.setdefault(rate * (0.15 if parameters[name].ndim == 4 else 1.0), []).append(parameters[name])
        return [{"params": part, "lr": rate, "peak": rate} for rate, part in by_rate.items()]

    inner = [n for n, p in parameters.items() if p.ndim == 2 and ("layers." in n or "mm_projector" in n)]
    rest = [n for n in parameters if n not in set(inner)]
    return [
        Muon(groups(inner, _MUON), weight_decay=0.01),
        torch.optim.AdamW(groups(rest), betas=(0.9, 0.98), weight_decay=0.01),
    ]
