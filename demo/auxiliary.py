"""Losses that exist during training alone: what each patch shows, and what all of them together say.

One answer's few words teach a tower little about 720 patches.  These heads ask every patch for its lead, its beats and
their timing, and a pooled summary for the diagnosis.  No checkpoint holds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from demo.samples import Sample, rate_of, rate_target
from demo.signals import FINDINGS, RHYTHMS, TERRITORIES

_RHYTHMS = [name for name, *_ in RHYTHMS]
_FINDINGS = [name for name, _ in FINDINGS]
_AXES = [None, "normal axis", "left axis deviation", "right axis deviation"]
_CLASSES = {"rhythm": len(_RHYTHMS), "finding": len(_FINDINGS), "territory": 4, "axis": 4}


@dataclass(frozen=True)
class Targets:
    """Tensors of a batch: P patches of all its images, B images."""

    lead_P: Tensor
    beat_P: Tensor
    timing_P3: Tensor
    level_P2: Tensor
    classes: dict[str, Tensor]
    values_B3: Tensor
    owner_P: Tensor

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        classes = {name: index.to(device) for name, index in moved.pop("classes").items()}
        return Targets(classes=classes, **{name: tensor.to(device) for name, tensor in moved.items()})

    def of(self, chosen: Tensor) -> Targets:
        """The targets of these patches alone."""
        return replace(
            self,
            lead_P=self.lead_P[chosen],
            beat_P=self.beat_P[chosen],
            timing_P3=self.timing_P3[chosen],
            level_P2=self.level_P2[chosen],
            owner_P=self.owner_P[chosen],
        )


def targets(samples: Sequence[Sample]) -> Targets:
    """The truth about a batch."""
    lead, beat, timing, level, owner = [], [], [], [], []
    for index, sample in enumerate(samples):
        patches = sample.patches
        flat = patches.lead_TSS.ravel()
        levels = np.concatenate([[0.0], sample.ecg.st_levels * 5])[flat]
        lead.append(flat)
        beat.append(patches.beat_TSS.ravel())
        timing.append(patches.timing_TSS3.reshape(-1, 3))
        level.append(np.stack([levels, np.full(len(flat), rate_target(sample.diagnosis))], 1))
        owner.append(np.full(len(flat), index))
    diagnoses = [sample.diagnosis for sample in samples]
    classes = {
        "rhythm": [_RHYTHMS.index(d.rhythm) for d in diagnoses],
        "finding": [_FINDINGS.index(d.finding) for d in diagnoses],
        "territory": [0 if d.territory is None else 1 + TERRITORIES.index(d.territory) for d in diagnoses],
        "axis": [_AXES.index(d.axis) for d in diagnoses],
    }
    values = [(rate_target(d), (d.pr_ms - 160) / 50 if d.pr_ms else math.nan, (d.qrs_ms - 100) / 25) for d in diagnoses]

    def tensor(parts: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(dtype)

    return Targets(
        tensor(lead, torch.long),
        tensor(beat, torch.long),
        tensor(timing, torch.float32),
        tensor(level, torch.float32),
        {name: torch.tensor(index) for name, index in classes.items()},
        torch.tensor(values),
        tensor(owner, torch.long),
    )


class AuxiliaryHeads(nn.Module):
    """Linear readings of patch features, and of attentive summaries of an image's patches."""

    def __init__(self, width: int, summaries: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.lead = nn.Linear(width, 13)
        self.beat = nn.Linear(width, 4)
        self.timing = nn.Linear(width, 3)
        self.level = nn.Linear(width, 2)
        self.query = nn.Linear(width, summaries)
        self.pooled = nn.ModuleDict({n: nn.Linear(width * summaries, c) for n, c in _CLASSES.items()})
        self.values = nn.Linear(width * summaries, 3)

    def forward(self, features_PV: Tensor, truth: Targets, images: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by name, and the pooled predictions."""
        features = self.norm(features_PV)
        on_lead, on_beat = truth.lead_P > 0, truth.beat_P > 0
        losses = {
            "lead": functional.cross_entropy(self.lead(features), truth.lead_P),
            "beat": functional.cross_entropy(
                self.beat(features), truth.beat_P, weight=torch.tensor([0.4, 1.0, 2.0, 2.0], device=features.device)
            ),
            "timing": 4
            * functional.smooth_l1_loss(self.timing(features[on_beat]), truth.timing_P3[on_beat], beta=0.05),
            "level": functional.smooth_l1_loss(self.level(features[on_lead]), truth.level_P2[on_lead], beta=0.3),
        }
        pooled = self._pool(features, truth.owner_P, images)
        predictions = {name: head(pooled) for name, head in self.pooled.items()} | {"values": self.values(pooled)}
        for name, index in truth.classes.items():
            losses[name] = functional.cross_entropy(predictions[name], index)
        known = ~truth.values_B3.isnan()
        losses["values"] = 6 * functional.smooth_l1_loss(predictions["values"][known], truth.values_B3[known], beta=0.1)
        return losses, predictions

    def _pool(self, features: Tensor, owner_P: Tensor, images: int) -> Tensor:
        """Softmax over each image's own patches, once for each summary: ``(B, summaries x V)``."""
        score_PQ = self.query(features)
        weight_PQ = torch.exp(score_PQ.clamp(-12, 12))
        zeros = features.new_zeros(images, weight_PQ.shape[1])
        total_BQ = zeros.index_add(0, owner_P, weight_PQ)
        share_PQ = weight_PQ / total_BQ[owner_P]
        parts = share_PQ[:, :, None] * features[:, None, :]
        return features.new_zeros(images, *parts.shape[1:]).index_add(0, owner_P, parts).flatten(1)


class RateReading(nn.Module):
    """The rate as a number, read from what the language model's last layer gets where a rate is being answered.

    Digits alone teach slowly that what the image says is a quantity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.value = nn.Linear(width, 1)

    def losses(self, hidden_AD: Tensor, target_A: Tensor) -> Tensor:
        """``(A,)``, for the answer tokens of rates."""
        value_A = self.value(self.norm(hidden_AD))[:, 0]
        return functional.smooth_l1_loss(value_A, target_A, beta=0.1, reduction="none")


def scores(predictions: dict[str, Tensor], samples: Sequence[Sample], truth: Targets) -> dict[str, float]:
    """Accuracy of the pooled predictions: progress, not a result."""
    result = {n: float((predictions[n].argmax(-1) == truth.classes[n]).float().mean()) for n in _CLASSES}
    rates = rate_of(predictions["values"][:, 0])
    true = torch.tensor([float(s.diagnosis.rate) for s in samples], device=rates.device)
    result["rate"] = float(((rates - true).abs() <= 5.0).float().mean())
    return result
