"""What each step of the training learns from: drawn images, new and seen before, with questions about them.

Every worker draws its own images, keeps some of them to be seen again, and makes whole batches of them, so that the
process that trains does nothing else.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from demo import sparse
from demo.auxiliary import Targets, targets
from demo.packing import Sequences, join, pack
from demo.questions import FOREIGN_PROMPT, KINDS, NO_IMAGE, Question, ask
from demo.samples import Sample, rate_target, sample_at
from demo.wordings import Kind
from pulse_ecg.prompt import LLAVA_V1_SYSTEM
from pulse_ecg.tokenizer import Tokenizer

Stage = Literal["see", "read", "both"]
"""The tower under auxiliary losses; the language model on the fixed tower; all of it together."""

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
_SPARSE_SHARE = 0.7  # of the batches; trained on parts alone, the tower misreads whole pages
_QUESTIONS: tuple[Kind, ...] = (*KINDS, "rhythm", "rate", "rate", "rate", "yes/no", "yes/no", "beyond")
_OTHERWISE = {FOREIGN_PROMPT: "foreign prompt", NO_IMAGE: "no image"}
"""The losses' names of the answers that say why there is no other."""


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
    """Patches of a tile that are mostly computed; 0 for all."""
    minutes: float = 0.0
    """Ends the stage early, its schedule shortened to fit; 0 for no limit.  Results then depend on the machine."""
    seed: int = 0


@dataclass(frozen=True)
class Asked:
    """The questions of a batch: Q of them, whose answers have A tokens."""

    sequences: Sequences
    names: tuple[str, ...]
    """What the losses are called."""
    name_Q: Tensor
    rate_A: Tensor
    """The number that a rate's tokens say, as :func:`demo.samples.rate_target` has it."""
    rate_weight_A: Tensor
    """What the token counts among its image's rates; 0 where it says none."""

    def to(self, device: torch.device) -> Asked:
        """The same on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("sequences", "name_Q", "rate_A", "rate_weight_A")}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Batch:
    """B images: T tiles whole, or K patches of each of T tiles; P patches in all, one image's after another's."""

    images: int
    pixels: Tensor
    """``(T, TILE, TILE, 3)``, or ``(T, K, 3 x PATCH x PATCH)``, of 0 to 255."""
    place_TK: Tensor | None
    """The patches' places in their tiles, if they are a part."""
    truth: Targets
    asked: Asked | None
    beyond: int
    """No image of it or before it has this index or a later one."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return replace(
            self,
            pixels=self.pixels.to(device),
            place_TK=None if self.place_TK is None else self.place_TK.to(device),
            truth=self.truth.to(device),
            asked=None if self.asked is None else self.asked.to(device),
        )


def batches(plan: Plan, tokenizer: Tokenizer, *, first: int, workers: int) -> Iterator[Batch]:
    """Batches without end, of images from the index ``first`` on; drawn by this process if there are no workers.

    Workers hand them over in shared memory: two each, of up to 30 MB for 16 images.
    """
    stream = _Stream(plan, tokenizer, first)
    loader: DataLoader[Batch] = DataLoader(
        stream, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None, worker_init_fn=_give_way
    )
    return iter(loader)


def _give_way(_: int) -> None:
    """A worker draws in the gaps that the training leaves: a core that is taken from it holds the other one up too."""
    os.nice(19)


class _Stream(IterableDataset[Batch]):
    def __init__(self, plan: Plan, tokenizer: Tokenizer, first: int) -> None:
        self._plan, self._tokenizer, self._first = plan, tokenizer, first

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        maker = _Maker(self._plan, self._tokenizer, self._first + number, workers)
        while True:
            yield maker.batch()


class _Maker:
    """One worker's images: every ``stride``-th index, and those of them that it keeps."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, first: int, stride: int) -> None:
        self._plan, self._tokenizer = plan, tokenizer
        self._index, self._stride = first, stride
        self._few, self._kept = max(plan.batch, _FEW // stride), max(plan.batch, _KEPT // stride)
        self._seen: list[Sample] = []
        self._random = random.Random(plan.seed + first)  # noqa: S311 - no secret
        self._rng = np.random.default_rng([plan.seed, 9, first])

    def batch(self) -> Batch:
        """New images, and earlier ones again: drawing takes longer than learning from them once."""
        plan = self._plan
        # Few images again and again would be learnt by heart.
        new = [self._next() for _ in range(plan.fresh if len(self._seen) >= self._few else plan.batch)]
        samples = new + self._random.sample(self._seen, plan.batch - len(new))
        self._seen = (self._seen + new)[-self._kept :]
        truth = targets(samples)
        if plan.keep and self._random.random() < _SPARSE_SHARE:
            # In the first stage above all patches with a beat, where alone some targets exist.
            rows = [sparse.choose(sample, self._rng, plan.keep, beats_first=plan.stage == "see") for sample in samples]
            places = [row.ravel() for row in rows]
            starts = np.cumsum([0, *[sample.patch_count for sample in samples[:-1]]])
            chosen = np.concatenate([at + start for at, start in zip(places, starts, strict=True)])
            parts = [sparse.patch_pixels(sample, row) for sample, row in zip(samples, rows, strict=True)]
            truth, place_TK = (
                truth.of(torch.from_numpy(chosen)),
                torch.from_numpy(np.concatenate(rows) % sparse.PATCHES),
            )
        else:
            places = [np.arange(sample.patch_count) for sample in samples]
            parts, place_TK = [sample.tiles_THWC for sample in samples], None
        pixels = torch.from_numpy(np.concatenate(parts))
        asked = None if plan.stage == "see" else self._asked(samples, places)
        return Batch(len(samples), pixels, place_TK, truth, asked, max(sample.index for sample in samples) + 1)

    def _next(self) -> Sample:
        index = self._index
        self._index += self._stride
        return sample_at("train", index, plain=index < _PLAIN and index % 4 > 0)

    def _asked(self, samples: Sequence[Sample], places: Sequence[NDArray[np.int64]]) -> Asked:
        asked: list[list[Question]] = []
        packs = []
        for sample in samples:
            questions = [ask(kind, sample.diagnosis, self._rng) for kind in _QUESTIONS]
            system, image_tokens = LLAVA_V1_SYSTEM, sample.patch_count
            lot = self._random.random()
            if lot < _FOREIGN_SHARE:
                questions = [_instead(question, FOREIGN_PROMPT) for question in questions[:3]]
                system = self._random.choice(_FOREIGN_SYSTEMS)
            elif lot < _FOREIGN_SHARE + _NO_IMAGE_SHARE:
                questions = [_instead(question, NO_IMAGE) for question in self._random.sample(questions, 3)]
                image_tokens = 0
            asked.append(questions)
            packs.append(pack(questions, self._tokenizer, system=system, image_tokens=image_tokens))
        return _named(asked, samples, join(packs, places))


def _named(asked: Sequence[Sequence[Question]], samples: Sequence[Sample], sequences: Sequences) -> Asked:
    """The questions' losses get names, and the tokens that say a rate their number."""
    every = [(row, question) for row, questions in enumerate(asked) for question in questions]
    names = [f"answer {q.kind}" if q.key else _OTHERWISE[q.answer] for _, q in every]
    distinct = tuple(dict.fromkeys(names))
    image_Q = torch.tensor([row for row, _ in every])
    says_rate_Q = torch.tensor([question.kind == "rate" and bool(question.key) for _, question in every])
    target_B = torch.tensor([rate_target(sample.diagnosis) for sample in samples])
    image_A = image_Q[sequences.question_A]
    says_rate_A = says_rate_Q[sequences.question_A].float()
    count_B = torch.zeros(len(samples)).index_add(0, image_A, says_rate_A).clamp(min=1)
    return Asked(
        sequences,
        distinct,
        torch.tensor([distinct.index(name) for name in names]),
        target_B[image_A],
        says_rate_A / count_B[image_A],
    )


def _instead(question: Question, answer: str) -> Question:
    return Question(question.kind, question.text, answer, "")
