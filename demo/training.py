"""The training's state and its step: what is learnt, from what, how far it has come."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from demo import sparse
from demo.auxiliary import AuxiliaryHeads, RateReading, scores, targets
from demo.decoding import answers
from demo.muon import Muon
from demo.network import SHAPE, computing, fresh_model, normalised
from demo.packing import Pack, Told, answer_losses, pack
from demo.questions import FOREIGN_PROMPT, KINDS, NO_IMAGE, Question, ask, correct
from demo.samples import Sample, rate_target, sample_at
from demo.wordings import Kind
from pulse_ecg.prompt import LLAVA_V1_SYSTEM

logger = logging.getLogger(__name__)

Stage = Literal["see", "read", "both"]
"""The tower under auxiliary losses; the language model on the fixed tower; all of it together."""

PROGRESS, _STATE = "progress.jsonl", "state.pt"
_FEW, _KEPT = 200, 1500  # images that are seen again: not before there are so many, not more than so many
_PLAIN = 3000  # of the first samples three in four have no flaws
_FOREIGN_SYSTEMS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "You are a helpful assistant.",
    "",
)
_FOREIGN_SHARE = 0.06
_NO_IMAGE_SHARE = 0.03
_READING = 6.0  # what the rate that the language model reads as a number counts
_SPARSE_SHARE = 0.7  # of the steps or images; trained on parts alone, the tower misreads whole pages
_QUESTIONS: tuple[Kind, ...] = (*KINDS, "rhythm", "rate", "rate", "rate", "yes/no", "yes/no", "beyond")


@dataclass(frozen=True)
class Plan:
    """How a stage trains.  ``fresh`` of the ``batch`` images of a step are new, the others were seen before."""

    stage: Stage
    steps: int
    batch: int = 8
    fresh: int = 2
    lr: float = 2e-3
    tower_lr: float = 2e-3
    warmup: int = 100
    decay: float = 0.35
    keep: int = 0
    """Patches of a tile that are mostly computed, by the tower in "see", by the language model after it; 0 for all."""
    minutes: float = 0.0
    """Ends the stage early, its schedule shortened to fit; 0 for no limit.  Results then depend on the machine."""
    seed: int = 0


_MUON = 3.0  # Muon's updates may be this much larger than AdamW's


def stage_begun(folder: Path) -> Stage | None:
    """The stage that the folder's state belongs to; None without one."""
    file = folder / _STATE
    stage: Stage | None = torch.load(file, weights_only=True, mmap=True)["stage"] if file.exists() else None
    return stage


class SampleStream(IterableDataset[Sample]):
    """Training samples one after another, from an index on, shared out among the workers."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        step, offset = (worker.num_workers, worker.id) if worker else (1, 0)
        for index in itertools.count(self._first + offset, step):
            yield sample_at("train", index, plain=index < _PLAIN and index % 4 > 0)


def _give_way(_: int) -> None:
    """A worker draws in the gaps that the training leaves: a core that is taken from it holds the other one up too."""
    os.nice(19)


class Trainer:
    """One stage of the training; resumes from its folder if an earlier run left its state there."""

    def __init__(self, folder: Path, plan: Plan, *, device: str, workers: int) -> None:
        self.plan, self._folder = plan, folder
        self.model = fresh_model(device, plan.seed)
        self.network = self.model.network
        self.network.vision_tower.config._attn_implementation = "eager"  # on CPUs faster than the fused one at its size
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
        ahead = 8 if workers else None
        loader = DataLoader(
            SampleStream(self.first),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=ahead,
            worker_init_fn=_give_way,
        )
        self._samples = iter(loader)
        self._seen: list[tuple[Sample, Tensor | None]] = []
        self._random = random.Random(plan.seed + self.first)  # noqa: S311 - no secret
        self._questions = np.random.default_rng([plan.seed, 9, self.first])

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
        losses = self._losses(self._batch())
        sum(losses.values(), torch.zeros((), device=self.model.device)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters.values(), 2.0)
        for optimiser in self._optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - since
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _batch(self) -> list[tuple[Sample, Tensor | None]]:
        """New images, and earlier ones again: drawing takes longer than learning from them once."""
        plan = self.plan
        # Few images again and again would be learnt by heart.
        fresh = plan.fresh if len(self._seen) >= _FEW else plan.batch
        new = [next(self._samples) for _ in range(fresh)]
        self.first += len(new)
        entries: list[tuple[Sample, Tensor | None]] = [(sample, None) for sample in new]
        if plan.stage == "read":  # the tower is fixed: its features are computed once
            with torch.no_grad():
                features = self.features(new)
            entries = list(zip(new, torch.split(features, [_patches(sample) for sample in new]), strict=True))
        batch = entries + self._random.sample(self._seen, plan.batch - len(new))
        self._seen = (self._seen + entries)[-_KEPT:]
        return batch

    def features(self, batch: Sequence[Sample]) -> Tensor:
        """Patch features of all tiles of all images, before the projector: ``(patches, V)``."""
        pixels = normalised([sample.tiles_THWC for sample in batch], self.model.device)
        with computing(self.model.device):
            hidden: Tensor = self.network.vision_tower(pixels).last_hidden_state
        return hidden[:, 1:].flatten(0, 1)

    def _some_features(self, samples: Sequence[Sample], chosen: Sequence[NDArray[np.int64]]) -> Tensor:
        """The same of the chosen patches alone."""
        pixels = [sparse.patch_pixels(sample, rows) for sample, rows in zip(samples, chosen, strict=True)]
        with computing(self.model.device):
            return sparse.encode(self.network, np.concatenate(pixels), np.concatenate(chosen)).flatten(0, 1)

    def _choose(self, sample: Sample) -> NDArray[np.int64]:
        """Patches to compute; in the first stage above all those with a beat, where alone some targets exist."""
        return sparse.choose(sample, self._questions, self.plan.keep, beats_first=self.plan.stage == "see")

    def _sparse(self) -> bool:
        """Whether to leave out patches this time."""
        return self.plan.keep > 0 and self._random.random() < _SPARSE_SHARE

    def _losses(self, batch: Sequence[tuple[Sample, Tensor | None]]) -> dict[str, Tensor]:
        samples = [sample for sample, _ in batch]
        places: list[Tensor | None] = [None] * len(samples)
        if self.plan.stage == "read":
            parts = [kept for _, kept in batch if kept is not None]
            for index, sample in enumerate(samples):
                if self._sparse():
                    places[index] = place = self._tensor(self._choose(sample).ravel())
                    parts[index] = parts[index][place]
            return self._answer_losses(samples, parts, places)
        truth, sizes = targets(samples, self.model.device), [_patches(sample) for sample in samples]
        if self._sparse():
            chosen = [self._choose(sample) for sample in samples]
            features = self._some_features(samples, chosen)
            starts = np.cumsum([0, *sizes[:-1]])
            truth = truth.of(
                self._tensor(np.concatenate([c.ravel() + at for c, at in zip(chosen, starts, strict=True)]))
            )
            places, sizes = [self._tensor(rows.ravel()) for rows in chosen], [rows.size for rows in chosen]
        else:
            features = self.features(samples)
        losses: dict[str, Tensor]
        losses, _ = self.heads(features, truth, len(samples))
        if self.plan.stage == "both":
            losses |= self._answer_losses(samples, torch.split(features, sizes), places)
        return losses

    def _tensor(self, indices: NDArray[np.int64]) -> Tensor:
        moved: Tensor = torch.from_numpy(indices).to(self.model.device)
        return moved

    def _answer_losses(
        self, samples: Sequence[Sample], parts: Sequence[Tensor], places: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        """What the answers' tokens cost, by kind of question, and the rate that the language model reads."""
        asked: list[list[Question]] = []
        packs = []
        parts, places = [*parts], [*places]
        for index, sample in enumerate(samples):
            questions = [ask(kind, sample.diagnosis, self._questions) for kind in _QUESTIONS]
            system, image_tokens = LLAVA_V1_SYSTEM, _patches(sample)
            lot = self._random.random()
            if lot < _FOREIGN_SHARE:
                questions = [_instead(question, FOREIGN_PROMPT) for question in questions[:3]]
                system = self._random.choice(_FOREIGN_SYSTEMS)
            elif lot < _FOREIGN_SHARE + _NO_IMAGE_SHARE:
                asked_of = self._random.sample(questions, 3)
                questions = [_instead(question, NO_IMAGE) for question in asked_of]
                parts[index], places[index], image_tokens = parts[index][:0], None, 0
            asked.append(questions)
            packs.append(pack(questions, self.model.tokenizer, system=system, image_tokens=image_tokens))
        totals: dict[str, list[Tensor]] = {}
        for sample, questions, told in zip(samples, asked, self._answered(parts, packs, places), strict=True):
            by_question = told.losses_A.new_zeros(len(questions)).index_add(0, told.owner_A, told.losses_A)
            for question, loss in zip(questions, by_question, strict=True):
                name = f"answer {question.kind}" if question.key else _OTHERWISE[question.answer]
                totals.setdefault(name, []).append(loss)
            of_rates = torch.tensor(
                [question.kind == "rate" and bool(question.key) for question in questions], device=told.owner_A.device
            )
            rate_hidden = told.inner_AD[of_rates[told.owner_A]]
            if len(rate_hidden):
                totals.setdefault("rate read", []).append(
                    _READING * self.reading.losses(rate_hidden, rate_target(sample.diagnosis)).mean()
                )
        return {name: torch.stack(values).sum() / (3 * len(samples)) for name, values in totals.items()}

    def _answered(
        self, parts: Sequence[Tensor], packs: Sequence[Pack], places: Sequence[Tensor | None] | None = None
    ) -> list[Told]:
        """:func:`answer_losses` on each image's features, or on those at some places."""
        with computing(self.model.device):
            embedded = torch.split(self.network.mm_projector(torch.cat([*parts])), [len(part) for part in parts])
            return answer_losses(self.network, embedded, packs, places)

    # --- progress ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Scores on held-out samples; for answers, the share whose every token is the model's choice, and for rates
        the share of greedy answers within 5 bpm."""
        sums: dict[str, float] = {}
        for start in range(0, len(samples), 8):
            part = samples[start : start + 8]
            features = self.features(part)
            truth = targets(part, self.model.device)
            _, predictions = self.heads(features, truth, len(part))
            found = {f"heads {n}": v for n, v in scores(predictions, part, truth).items()}
            if self.plan.stage != "see":
                found |= self._answer_scores(part, features)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value * len(part) / len(samples)
        return {name: round(value, 3) for name, value in sums.items()}

    def _answer_scores(self, samples: Sequence[Sample], features: Tensor) -> dict[str, float]:
        right = dict.fromkeys(KINDS, 0.0)
        packs = []
        for sample in samples:
            rng = np.random.default_rng(sample.index)
            packs.append(pack([ask(kind, sample.diagnosis, rng) for kind in KINDS], self.model.tokenizer))
        for told in self._answered(torch.split(features, [_patches(sample) for sample in samples]), packs):
            for number, kind in enumerate(KINDS):
                right[kind] += float(told.right_A[told.owner_A == number].all()) / len(samples)
        return {f"exact {kind}": value for kind, value in right.items()} | {"rate": self._rates_right(samples)}

    def _rates_right(self, samples: Sequence[Sample]) -> float:
        right = 0
        for sample in samples:
            question = ask("rate", sample.diagnosis, np.random.default_rng(sample.index))
            (answer,) = answers(
                self.model, normalised([sample.tiles_THWC], self.model.device), [question.text], limit=12
            )
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


_OTHERWISE = {FOREIGN_PROMPT: "foreign prompt", NO_IMAGE: "no image"}
"""The losses' names of the answers that say why there is no other."""


def _instead(question: Question, answer: str) -> Question:
    return Question(question.kind, question.text, answer, "")


def _patches(sample: Sample) -> int:
    return int(sample.patches.lead_TSS.size)


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
