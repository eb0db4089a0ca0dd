"""Synthetic 12-lead ECGs whose diagnosis is known, because it is what they were made from.

A beat is a sum of Gaussian waves, as in McSharry et al. (2003), "A dynamical model for generating synthetic
electrocardiogram signals", IEEE Trans. Biomed. Eng. 50(3); each wave is a vector in Frank's coordinates (x to the left,
y to the feet, z to the back), and the leads follow from the heart vector by the matrix of Dower et al. (1980),
"Deriving the 12-lead electrocardiogram from the Frank lead system", J. Electrocardiol. 13(2).  Leads of one ECG are
therefore consistent: III is II - I, and an inferior elevation shows its reciprocal depression in aVL.

Rhythms, intervals and voltages follow textbook criteria (PR over 200 ms, QRS over 120 ms, Sokolow-Lyon over 3.5 mV).
What varies between healthy hearts varies as widely here as in Rijnbeek et al. (2014), "Normal values of the
electrocardiogram for ages 16-90 years", J. Electrocardiol. 47(6): T waves of 0.1 to 1.1 mV in V3 and of either sign in
V1, an R in V1 and an S in II that may be all but absent.  Electrodes that move disturb the leads that they are part of.
Values within a hair of a criterion are not drawn, so that every label can be read off the print.  ST segments are read
where they begin, at the J point: later a tall T wave lifts them at fast rates, as it does in people.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from demo.ecg_image import Recording

SAMPLING_RATE = 250.0
SECONDS = 10.0
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")

Rhythm = Literal[
    "sinus rhythm",
    "sinus bradycardia",
    "sinus tachycardia",
    "atrial fibrillation",
    "sinus rhythm with premature ventricular complexes",
    "sinus rhythm with premature atrial complexes",
    "complete heart block",
    "ventricular paced rhythm",
]
RHYTHMS: tuple[tuple[Rhythm, float, tuple[float, float]], ...] = (
    ("sinus rhythm", 0.25, (60, 98)),
    ("sinus bradycardia", 0.11, (38, 56)),
    ("sinus tachycardia", 0.12, (103, 150)),
    ("atrial fibrillation", 0.16, (55, 150)),
    ("sinus rhythm with premature ventricular complexes", 0.11, (62, 98)),
    ("sinus rhythm with premature atrial complexes", 0.06, (62, 92)),
    ("complete heart block", 0.08, (28, 46)),
    ("ventricular paced rhythm", 0.11, (55, 95)),
)
"""Each rhythm with its share of the drawn ECGs and its range of ventricular rates."""

Finding = Literal[
    "none",
    "right bundle branch block",
    "left bundle branch block",
    "first-degree AV block",
    "ST elevation",
    "ST depression",
    "left ventricular hypertrophy",
]
FINDINGS: tuple[tuple[Finding, float], ...] = (
    ("none", 0.24),
    ("right bundle branch block", 0.11),
    ("left bundle branch block", 0.10),
    ("first-degree AV block", 0.10),
    ("ST elevation", 0.20),
    ("ST depression", 0.14),
    ("left ventricular hypertrophy", 0.11),
)
Territory = Literal["anterior", "inferior", "lateral"]
TERRITORIES: tuple[Territory, ...] = ("anterior", "inferior", "lateral")
Axis = Literal["normal axis", "left axis deviation", "right axis deviation"]
AXES: dict[Axis, tuple[float, float]] = {
    "normal axis": (-15, 80),
    "left axis deviation": (-75, -42),
    "right axis deviation": (108, 150),
}

# Rows: I, II, V1 ... V6; columns: x, y, z.
_DOWER = np.array(
    [
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)
_ST_DIRECTIONS: dict[Territory, tuple[float, float, float]] = {
    "anterior": (0.25, 0.05, -0.95),
    "inferior": (-0.10, 1.0, 0.05),
    "lateral": (0.97, 0.0, 0.25),
}
_TERRITORY_LEADS: dict[Territory, tuple[str, ...]] = {
    "anterior": ("V1", "V2", "V3", "V4"),
    "inferior": ("II", "III", "aVF"),
    "lateral": ("I", "aVL", "V5", "V6"),
}


@dataclass(frozen=True)
class Diagnosis:
    """The truth about a drawn ECG.  ``axis`` is None where the QRS is abnormal by origin, ``pr_ms`` without a PR."""

    rhythm: Rhythm
    rate: int
    finding: Finding
    territory: Territory | None
    axis: Axis | None
    pr_ms: int | None
    qrs_ms: int

    @property
    def normal(self) -> bool:
        """Whether a reader would call the ECG normal."""
        return self.rhythm == "sinus rhythm" and self.finding == "none" and self.axis == "normal axis"


@dataclass(frozen=True)
class SyntheticEcg:
    """A recording with its diagnosis, the times (s) and kinds of its QRS complexes, and each lead's ST level in mV."""

    recording: Recording
    diagnosis: Diagnosis
    beats: NDArray[np.float64]
    kinds: tuple[str, ...]
    st_levels: NDArray[np.float64]


@dataclass(frozen=True)
class _Plan:
    """The parameters of one ECG; times in seconds, voltages in mV."""

    rhythm: Rhythm
    rate: float
    finding: Finding
    territory: Territory | None
    axis: Axis
    axis_degrees: float
    pr: float
    qrs: float
    qtc: float
    voltage: float


class _Waves:
    """Gaussian waves of a heart vector, gathered and then summed at once."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, ...]] = []

    def add(self, centre: float, width: float, vector: Sequence[float] | NDArray[np.float64]) -> None:
        self._rows.append((centre, width, *vector))

    def sum(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """The heart vector ``(3, samples)``."""
        rows = np.array(self._rows, np.float32)
        phase = (times.astype(np.float32)[None] - rows[:, :1]) / rows[:, 1:2]
        return np.asarray(rows[:, 2:].T @ np.exp(-0.5 * np.square(phase)), np.float64)


def draw_ecg(rng: np.random.Generator) -> SyntheticEcg:
    """A random ECG: same generator state, same ECG."""
    plan = _plan(rng)
    times = np.arange(0.0, SECONDS, 1 / SAMPLING_RATE)
    beats, kinds = _beat_times(plan, rng)
    shape = _BeatShape(plan, rng)
    waves = _Waves()
    for beat, kind in zip(beats, kinds, strict=True):
        shape.add(waves, beat, kind, rng=rng)
    if plan.rhythm == "complete heart block":
        _add_free_p_waves(waves, shape, rng)
    vector = waves.sum(times)
    if plan.rhythm == "atrial fibrillation":
        vector += _fibrillation(times, rng)
    gains = np.exp(rng.normal(0.0, 0.14, 6))
    leads = _leads(vector, gains)
    leads = _scaled_to_voltage(leads, plan, beats)
    st_levels = _leads(shape.st_vector[:, None], gains)[:, 0]
    noisy = leads + _noise(times, rng) + _moving_electrodes(times, rng)
    recording = Recording({name: noisy[i] for i, name in enumerate(LEADS)}, SAMPLING_RATE)
    inside = (beats >= 0) & (beats < SECONDS)
    shown = tuple(kind for kind, drawn in zip(kinds, inside, strict=True) if drawn)
    return SyntheticEcg(recording, _diagnosis(plan, beats[inside]), beats[inside], shown, st_levels)


def _plan(rng: np.random.Generator) -> _Plan:
    rhythm, _, (low, high) = RHYTHMS[rng.choice(len(RHYTHMS), p=[share for _, share, _ in RHYTHMS])]
    rate = rng.uniform(low, high)
    finding = _finding(rhythm, rate, rng)
    axis: Axis = "normal axis"
    if finding in ("none", "first-degree AV block"):
        axis = ("normal axis", "left axis deviation", "right axis deviation")[rng.choice(3, p=(0.6, 0.22, 0.18))]
    low, high = AXES[axis]
    long_pr = finding == "first-degree AV block"
    wide = finding.endswith("branch block") or rhythm == "ventricular paced rhythm"
    wide |= rhythm == "complete heart block" and rng.random() < 0.5  # a ventricular escape rhythm
    return _Plan(
        rhythm=rhythm,
        rate=rate,
        finding=finding,
        territory=TERRITORIES[rng.integers(3)] if finding.startswith("ST") else None,
        axis=axis,
        axis_degrees=rng.uniform(low, high),
        pr=rng.uniform(0.225, 0.32) if long_pr else rng.uniform(0.12, 0.185),
        qrs=rng.uniform(0.13, 0.165) if wide else rng.uniform(0.08, 0.105),
        qtc=rng.uniform(0.36, 0.45),
        voltage=rng.uniform(3.9, 5.2) if finding == "left ventricular hypertrophy" else rng.uniform(1.5, 3.2),
    )


def _finding(rhythm: Rhythm, rate: float, rng: np.random.Generator) -> Finding:
    """A finding that can stand beside the rhythm and be seen."""
    if rhythm in ("complete heart block", "ventricular paced rhythm"):
        return "none"
    while True:
        finding = FINDINGS[rng.choice(len(FINDINGS), p=[share for _, share in FINDINGS])][0]
        if finding != "first-degree AV block" or (rhythm.startswith("sinus") and rate < 110):
            return finding


def _diagnosis(plan: _Plan, beats: NDArray[np.float64]) -> Diagnosis:
    own_origin = plan.rhythm in ("complete heart block", "ventricular paced rhythm")
    has_pr = plan.rhythm.startswith("sinus")
    return Diagnosis(
        rhythm=plan.rhythm,
        rate=round(60 / float(np.mean(np.diff(beats)))),
        finding=plan.finding,
        territory=plan.territory,
        axis=None if own_origin or plan.finding.endswith("branch block") else plan.axis,
        pr_ms=round(plan.pr * 1000) if has_pr else None,
        qrs_ms=round(plan.qrs * 1000),
    )


# --- rhythm ----------------------------------------------------------------------------------------------------------


def _beat_times(plan: _Plan, rng: np.random.Generator) -> tuple[NDArray[np.float64], list[str]]:
    """Times of the QRS complexes from before the recording's start to past its end, and each one's kind."""
    rr = 60 / plan.rate
    time, beats, kinds = -rng.uniform(0.2, 1.0) * rr - rr, list[float](), list[str]()
    premature = plan.rhythm.endswith("complexes")
    kind = {"complete heart block": "escape", "ventricular paced rhythm": "paced", "atrial fibrillation": "no P"}
    regular = kind.get(plan.rhythm, "sinus")
    breath = rng.uniform(0, 2 * math.pi)
    depth = rng.uniform(0.0, 0.03) if regular == "sinus" else 0.0
    early = _early_beats(rng) if premature else set()
    while time < SECONDS + rr:
        beats.append(time)
        kinds.append(regular)
        step = rr * (1 + depth * math.sin(2 * math.pi * 0.25 * time + breath) + rng.normal(0, 0.005))
        if regular == "no P":
            step = max(rr * (1 + 0.22 * float(rng.standard_normal())), 0.32, 0.5 * rr)
        if len(beats) in early:
            coupling = rng.uniform(0.55, 0.7) * rr
            ventricular = "ventricular" in plan.rhythm
            beats.append(time + coupling)
            kinds.append("PVC" if ventricular else "PAC")
            step = 2 * rr if ventricular else coupling + rng.uniform(1.0, 1.15) * rr
        time += step
    return np.array(beats), kinds


def _early_beats(rng: np.random.Generator) -> set[int]:
    """After which regular beats a premature one comes: at least one of them in the middle of the recording."""
    every = int(rng.integers(2, 7))
    start = int(rng.integers(2, 5))
    return set(range(start, 40, every))


def _add_free_p_waves(waves: _Waves, shape: _BeatShape, rng: np.random.Generator) -> None:
    """P waves that march through at a rate of their own."""
    step = 60 / rng.uniform(70, 105)
    for time in np.arange(-rng.uniform(0, step), SECONDS + step, step):
        shape.add_p(waves, float(time + rng.normal(0, 0.004)))


def _fibrillation(times: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Fibrillatory waves of 4 to 8 Hz, strongest to the right and front (V1)."""
    phase = 2 * math.pi * np.cumsum(rng.uniform(4.5, 7.5) + np.interp(times, np.arange(11), rng.normal(0, 0.8, 11)))
    wave = np.sin(phase / SAMPLING_RATE) * np.interp(times, np.arange(11), rng.uniform(0.4, 1.0, 11))
    direction = np.array([-0.3, 0.6, -0.7])
    return np.asarray(rng.uniform(0.02, 0.09) * direction[:, None] * wave[None])


# --- beats -----------------------------------------------------------------------------------------------------------


class _BeatShape:
    """The waves of one heart: drawn once, the same in each of its beats but for small variations."""

    def __init__(self, plan: _Plan, rng: np.random.Generator) -> None:
        self._plan = plan
        vary = rng.normal(1.0, 0.12, 12)
        angle = math.radians(plan.axis_degrees)
        self._p = (np.array([0.07, 0.13, -0.02]) + rng.normal(0, (0.015, 0.015, 0.025))) * rng.uniform(0.7, 1.4)
        septal = (rng.uniform(0.2, 1.2), 1.0, rng.uniform(0.15, 1.25))
        self._septal = np.array([-0.16, -0.04, -0.34]) * vary[:3] * septal
        self._main = np.array([math.cos(angle), math.sin(angle), 0.42 * vary[3]]) * np.array([1.15, 0.95, 1.0])
        self._basal = np.array([-0.16, -0.16, 0.40]) * vary[4:7] * (rng.uniform(0.0, 1.2), rng.uniform(0.0, 1.2), 1.0)
        self._t = np.array([0.30 * vary[7], 0.21 * vary[8], rng.uniform(-0.22, 0.02)]) * rng.uniform(0.6, 2.1)
        self._t_rise = rng.uniform(0.0, 0.4)
        self._pvc = _random_direction(rng, around=(-0.3, 0.4, -0.6)) * rng.uniform(1.3, 2.0)
        self._spike = rng.uniform(0.3, 1.0) * np.array([0.5, -0.8, 0.3])
        self._dual = bool(rng.integers(2))
        self._wide_escape = plan.rhythm == "complete heart block" and plan.qrs > 0.12
        self.st_vector = self._st_vector(rng)

    def _st_vector(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """The injury current: its voltage is that of the lead which shows it best."""
        territory = self._plan.territory
        if territory is None:
            return rng.normal(0, 0.012, 3)
        direction = _random_direction(rng, around=_ST_DIRECTIONS[territory], spread=0.10)
        elevation = self._plan.finding == "ST elevation"
        leads = _leads(direction[:, None], np.ones(6))[:, 0]
        strongest = max(leads[LEADS.index(name)] for name in _TERRITORY_LEADS[territory])
        amount = rng.uniform(0.20, 0.45) if elevation else -rng.uniform(0.15, 0.30)
        return np.asarray(direction * amount / strongest)

    def add(self, waves: _Waves, at: float, kind: str, *, rng: np.random.Generator) -> None:
        """A beat whose QRS is centred on ``at``."""
        scale = rng.normal(1.0, 0.02)
        qt = min(max(self._plan.qtc * math.sqrt(60 / self._plan.rate), 0.26), 0.48)
        if kind == "PVC":
            waves.add(at - 0.02, 0.030, self._pvc * scale)
            waves.add(at + 0.045, 0.028, self._pvc * (0.5, -0.3, 0.4))
            waves.add(at + 0.28, 0.06, -0.35 * self._pvc)
            return
        if kind in ("sinus", "PAC") or (kind == "paced" and self._dual):
            pr = self._plan.pr if kind == "sinus" else 0.14
            self.add_p(waves, at - self._plan.qrs / 2 - pr + 0.045, 1.0 if kind != "PAC" else -0.6)
        t_end = qt - self._plan.qrs / 2
        width = 0.105 * qt
        if kind == "paced":
            waves.add(at - self._plan.qrs / 2 - 0.012, 0.003, self._spike)
            self._slow_qrs(waves, at, scale, np.array([0.85, -0.95, 0.50]))
            waves.add(at + 0.27, 0.05, (-0.28, 0.32, -0.22))
        elif self._plan.finding == "left bundle branch block" or self._wide_escape:
            self._slow_qrs(waves, at, scale, np.array([1.05, 0.25, 0.60]))
            waves.add(at + t_end - 2 * width, width, (-0.30, -0.04, -0.26))
        else:
            self._fast_qrs(waves, at, scale)
            right = self._plan.finding == "right bundle branch block"
            t = self._t + (np.array([0.05, 0, 0.32]) if right else 0.0)
            waves.add(at + t_end - 2.2 * width, width, (1 - 0.5 * self._t_rise) * t)
            waves.add(at + t_end - 3.0 * width, 1.5 * width, self._t_rise * t)  # it rises more slowly than it falls
            self._add_st(waves, at, t_end, width)

    def add_p(self, waves: _Waves, at: float, sign: float = 1.0) -> None:
        """A P wave centred on ``at``."""
        waves.add(at - 0.014, 0.018, self._p * (0.3, 0.9, 1.0) * sign)
        waves.add(at + 0.014, 0.018, self._p * (1.0, 0.7, -0.6) * sign)

    def _fast_qrs(self, waves: _Waves, at: float, scale: float) -> None:
        unit = 0.09 if self._plan.finding == "right bundle branch block" else self._plan.qrs
        waves.add(at - 0.26 * unit, 0.10 * unit, self._septal * scale)
        waves.add(at, 0.13 * unit, self._main * scale)
        waves.add(at + 0.28 * unit, 0.10 * unit, self._basal * scale)
        if self._plan.finding == "right bundle branch block":
            waves.add(at + self._plan.qrs - 0.085, 0.019, np.array([-0.50, -0.05, -0.68]) * scale)

    def _slow_qrs(self, waves: _Waves, at: float, scale: float, vector: NDArray[np.float64]) -> None:
        unit = max(self._plan.qrs, 0.13)
        waves.add(at - 0.16 * unit, 0.15 * unit, vector * scale)
        waves.add(at + 0.20 * unit, 0.14 * unit, vector * (0.85, 0.6, 0.8) * scale)

    def _add_st(self, waves: _Waves, at: float, t_end: float, width: float) -> None:
        """A segment that leaves the QRS at its level and merges with the T wave."""
        start, stop = at + self._plan.qrs / 2 + 0.01, at + t_end - 2.2 * width
        for share in (0.15, 0.55, 0.95):
            waves.add(start + share * (stop - start), 0.22 * (stop - start) + 0.01, 0.72 * self.st_vector)


def _random_direction(
    rng: np.random.Generator, *, around: Sequence[float], spread: float = 0.45
) -> NDArray[np.float64]:
    vector = np.asarray(around) / np.linalg.norm(around) + rng.normal(0, spread, 3)
    return np.asarray(vector / np.linalg.norm(vector))


# --- leads -----------------------------------------------------------------------------------------------------------


def _leads(vector: NDArray[np.float64], gains: NDArray[np.float64]) -> NDArray[np.float64]:
    """The twelve leads ``(12, samples)`` of a heart vector; ``gains`` scale the chest leads."""
    one, two, *chest = _DOWER @ vector
    limb = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    return np.array([*limb, *(np.array(chest) * gains[:, None])])


def _scaled_to_voltage(leads: NDArray[np.float64], plan: _Plan, beats: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale the QRS alone such that S in V1 plus R in V5 (Sokolow-Lyon) is as planned."""
    if plan.rhythm in ("complete heart block", "ventricular paced rhythm") or plan.finding.endswith("branch block"):
        return leads
    times = np.arange(leads.shape[1]) / SAMPLING_RATE
    near = np.abs(times[:, None] - beats[None]).min(axis=1) < 0.045
    regular = leads[:, near]
    sokolow = float(np.quantile(-regular[6], 0.97) + np.quantile(regular[10], 0.97))
    factor = plan.voltage / max(sokolow, 0.6)
    if plan.finding != "left ventricular hypertrophy":
        factor = min(max(factor, 0.6), 1.5)
    distance = np.abs(times[:, None] - beats[None]).min(axis=1)
    envelope = 1 + (factor - 1) / (1 + np.exp((distance - 0.055) / 0.006))
    return np.asarray(leads * envelope)


def _noise(times: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Baseline wander, muscle and mains, by lead."""
    count = len(LEADS)
    wander = rng.uniform(0, 0.08) * np.sin(
        2 * math.pi * (rng.uniform(0.1, 0.4) * times[None] + rng.uniform(0, 1, (count, 1)))
    )
    muscle = rng.uniform(0, 0.022) * rng.standard_normal((count, len(times)))
    mains = rng.uniform(0, 0.012) * (rng.random() < 0.3) * np.sin(2 * math.pi * rng.choice([50.0, 60.0]) * times)
    return np.asarray(wander * rng.uniform(0.3, 1.0, (count, 1)) + muscle + mains[None])


def _moving_electrodes(times: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Now and then an electrode's potential jumps for a moment, in every lead that is measured against it."""
    arms_foot_chest = np.zeros((9, len(times)))
    if rng.random() < 0.3:
        for _ in range(rng.integers(1, 4)):
            at, width = rng.uniform(0, SECONDS), rng.uniform(0.02, 0.12)
            bump = rng.choice((-1, 1)) * rng.uniform(0.05, 0.30) * np.exp(-0.5 * np.square((times - at) / width))
            arms_foot_chest[rng.integers(9)] += bump
    right, left, foot, *chest = arms_foot_chest
    limb = [left - right, foot - right, foot - left]
    augmented = [right - (left + foot) / 2, left - (right + foot) / 2, foot - (right + left) / 2]
    return np.array([*limb, *augmented, *(np.array(chest) - (right + left + foot) / 3)])
