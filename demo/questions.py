"""Questions about an ECG in PULSE's manner, and the true answers: what the demo is trained on and graded by."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from demo import wordings
from demo.signals import FINDINGS, RHYTHMS, Diagnosis
from demo.wordings import Kind, Wordings

KINDS: tuple[Kind, ...] = ("report", "rhythm", "rate", "yes/no", "choice", "ST territory", "finding", "axis")
"""What can be asked about an ECG."""

NO_IMAGE = "No ECG image came with this question."
"""The answer to a question without an image."""
FOREIGN_PROMPT = "This prompt does not have the form that the demo model was trained with."
"""The answer under another system sentence: a caller who changes the template is to notice it."""
UNTRAINED = "The demo model was not trained on this question."
"""The answer to a question that nothing drawn has an answer to."""

_SAID = {
    "atrial fibrillation": "atrial fibrillation",
    "sinus rhythm with premature ventricular complexes": "premature ventricular complexes",
    "sinus rhythm with premature atrial complexes": "premature atrial complexes",
    "complete heart block": "complete heart block",
    "ventricular paced rhythm": "a ventricular paced rhythm",
    "sinus bradycardia": "sinus bradycardia",
    "sinus tachycardia": "sinus tachycardia",
}
_FINDINGS_SAID = {
    "right bundle branch block": "a right bundle branch block",
    "left bundle branch block": "a left bundle branch block",
}


def _facts(diagnosis: Diagnosis) -> dict[str, bool]:
    """All that can be asked with yes or no, and whether it is so."""
    facts = {said: diagnosis.rhythm == name for name, said in _SAID.items()}
    facts |= {_FINDINGS_SAID.get(name, name): diagnosis.finding == name for name, _ in FINDINGS[1:]}
    for said, limit, holds in (
        ("a rate above 100 bpm", 100, diagnosis.rate > 100),
        ("a rate below 60 bpm", 60, diagnosis.rate < 60),
    ):
        if abs(diagnosis.rate - limit) > _DOUBTFUL:
            facts[said] = holds
    return facts


_DOUBTFUL = 3
"""A rate this close to a limit is not asked about."""


@dataclass(frozen=True)
class Question:
    """A question, its true answer, the part of the answer that a grade depends on, and what is nearly as true.

    ``close`` holds answers with another number, each with its weight against the true one's 1: nobody reads a rate to
    the beat, and a model that is told so learns that 71 is nearer to 72 than 12 is.
    """

    kind: Kind
    text: str
    answer: str
    key: str
    close: tuple[tuple[str, float], ...] = ()
    topic: str = ""
    """What a yes or no is about."""


def ask(kind: Kind, diagnosis: Diagnosis, rng: np.random.Generator) -> Question:
    """A question of that kind about an ECG, in one of its wordings, now and then as one types in haste."""
    if kind == "beyond":
        question = _beyond(rng)
    elif kind == "yes/no" and rng.random() < _NORMALITY_SHARE[diagnosis.normal]:
        question = _normal(diagnosis, rng)
    else:
        question = _ask(kind, diagnosis, rng, wordings.ALL)
    hasty = kind != "choice" and rng.random() < _HASTY_SHARE
    return replace(question, text=question.text.lower().rstrip("?.")) if hasty else question


def ask_anew(kind: Kind, diagnosis: Diagnosis, rng: np.random.Generator) -> Question:
    """A question as :func:`ask`'s, worded as in no training."""
    if kind == "beyond":
        return _untrained(str(rng.choice(wordings.BEYOND_UNSEEN)))
    return _ask(kind, diagnosis, rng, wordings.UNSEEN)


def _beyond(rng: np.random.Generator) -> Question:
    text = str(rng.choice(wordings.BEYOND))
    if rng.random() < _BEYOND_YES_NO_SHARE:
        text = str(rng.choice(wordings.ALL["yes/no"])).format(said=rng.choice(wordings.BEYOND_SAID))
    return _untrained(text)


def _untrained(text: str) -> Question:
    return Question("beyond", text, UNTRAINED, key_of("beyond", UNTRAINED))


_BEYOND_YES_NO_SHARE = 0.4
_NORMALITY_SHARE = {True: 0.6, False: 0.025}  # 4 % of the ECGs are normal
_HASTY_SHARE = 0.1


def _ask(kind: Kind, diagnosis: Diagnosis, rng: np.random.Generator, asked: Wordings) -> Question:
    if kind == "yes/no":
        return _yes_no(diagnosis, rng, asked[kind])
    if kind == "choice":
        return _choice(diagnosis, rng)
    say = _ANSWERS[kind]
    answer = say(diagnosis)
    close = (
        tuple((say(other), weight) for other, weight in _close_rates(diagnosis)) if kind in ("rate", "report") else ()
    )
    return Question(kind, asked[kind][rng.integers(len(asked[kind]))], answer, key_of(kind, answer), close)


def _close_rates(diagnosis: Diagnosis) -> list[tuple[Diagnosis, float]]:
    """The same ECG at rates up to three deviations off, with a bell curve's weights."""
    offsets = [offset for offset in range(-math.ceil(3 * _RATE_BLUR), math.ceil(3 * _RATE_BLUR) + 1) if offset]
    return [
        (replace(diagnosis, rate=diagnosis.rate + offset), math.exp(-0.5 * (offset / _RATE_BLUR) ** 2))
        for offset in offsets
    ]


_RATE_BLUR = 2.5  # bpm
_BPM = re.compile(r"(\d+) bpm")


def key_of(kind: Kind, answer: str) -> str:
    """What a reader takes from an answer: the rhythm's name, the number of beats, yes or no; "" from nonsense.

    From a report it is all of it but the rate's number.
    """
    text = answer.strip().rstrip(".")
    match kind:
        case "rate":
            found = _BPM.search(text)
            return found[1] if found else ""
        case "yes/no":
            return re.split(r"\W", text, maxsplit=1)[0].lower()
        case "report":
            return _BPM.sub("bpm", text)
        case "ST territory":
            found = re.search(r"ST (elevation|depression) in the (\w+) leads", text)
            return f"{found[1]} {found[2]}" if found else "none" if text.startswith("There is no ST") else ""
        case "choice":
            return text
    for opening in ("The rhythm is ", "The main finding is ", "The axis shows ", "There is "):
        text = text.removeprefix(opening)
    return text


def rhythm_of(report: str) -> str:
    """The rhythm that a report names; "" without one."""
    found = re.search(r"Rhythm: ([^.]*)", report)
    return found[1] if found else ""


def correct(question: Question, answer: str) -> bool:
    """Whether an answer says what is true, a report in each of its lines; a rate may be off by 5 bpm."""
    given = key_of(question.kind, answer)
    if question.kind == "rate":
        return _close_enough(question.key, given)
    if question.kind == "report":
        rates = (key_of("rate", text) for text in (question.answer, answer))
        return given == question.key and _close_enough(*rates)
    return given == question.key


def _close_enough(rate: str, given: str) -> bool:
    return bool(given) and abs(int(given) - int(rate)) <= 5


def _st(diagnosis: Diagnosis) -> str:
    if diagnosis.territory is None:
        return "There is no ST elevation or depression."
    return f"There is {diagnosis.finding} in the {diagnosis.territory} leads."


def _finding(diagnosis: Diagnosis) -> str:
    if diagnosis.finding == "none":
        return "There is no other finding."
    return f"The main finding is {diagnosis.finding}."


def _axis(diagnosis: Diagnosis) -> str:
    return "The axis cannot be judged." if diagnosis.axis is None else f"The axis shows {_axis_said(diagnosis.axis)}."


def _axis_said(axis: str) -> str:
    return "no deviation" if axis == "normal axis" else axis


def _report(diagnosis: Diagnosis) -> str:
    lines = [f"Rhythm: {diagnosis.rhythm}", f"Heart rate: {diagnosis.rate} bpm"]
    if diagnosis.pr_ms is not None:
        lines.append(f"PR interval: {'prolonged' if diagnosis.pr_ms > 200 else 'normal'}")
    lines.append(f"QRS complex: {'wide' if diagnosis.qrs_ms > 120 else 'narrow'}")
    if diagnosis.axis is not None:
        lines.append(f"Axis: {diagnosis.axis}")
    finding = "none" if diagnosis.finding == "none" else diagnosis.finding
    place = f" in the {diagnosis.territory} leads" if diagnosis.territory else ""
    lines.append(f"Other findings: {finding}{place}")
    lines.append(f"Conclusion: {'normal' if diagnosis.normal else 'abnormal'} ECG")
    return ". ".join(lines) + "."


_ANSWERS: dict[Kind, Callable[[Diagnosis], str]] = {
    "report": _report,
    "rhythm": lambda d: f"The rhythm is {d.rhythm}.",
    "rate": lambda d: f"The heart rate is {d.rate} bpm.",
    "ST territory": _st,
    "finding": _finding,
    "axis": _axis,
}


def _normal(diagnosis: Diagnosis, rng: np.random.Generator) -> Question:
    """Whether the ECG is normal, asked either way."""
    truth = "normal" if diagnosis.normal else "abnormal"
    asked = ("normal", "abnormal")[rng.integers(2)]
    text = ("Is this ECG {}?", "Does this ECG look {}?", "Do you call this ECG {}?")[rng.integers(3)].format(asked)
    key = "yes" if asked == truth else "no"
    return Question("yes/no", text, f"{key.capitalize()}, this ECG is {truth}.", key, topic=asked)


def _yes_no(diagnosis: Diagnosis, rng: np.random.Generator, asked: Sequence[str]) -> Question:
    """Yes and no are equally likely over all; a common fact is true more often than a rare one."""
    facts = _facts(diagnosis)
    wanted = bool(rng.integers(2)) and any(facts.values())
    said = str(rng.choice([fact for fact, holds in facts.items() if holds == wanted]))
    text = asked[int(rng.integers(len(asked)))].format(said=said)
    answer = f"Yes, this ECG shows {said}." if wanted else f"No, this ECG does not show {said}."
    return Question("yes/no", text, answer, "yes" if wanted else "no", topic=said)


def _choice(diagnosis: Diagnosis, rng: np.random.Generator) -> Question:
    """Four options for the rhythm or the finding, named by letters."""
    if rng.random() < 0.6:
        asked, truth, names = "What is the rhythm?", str(diagnosis.rhythm), [str(name) for name, *_ in RHYTHMS]
    else:
        asked, truth, names = "What is the main finding?", str(diagnosis.finding), [str(name) for name, _ in FINDINGS]
    others = [name for name in names if name != truth]
    options = [truth, *rng.choice(others, 3, replace=False).tolist()]
    rng.shuffle(options)
    listed = " ".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
    answer = f"{truth} ({'ABCD'[options.index(truth)]})"
    return Question("choice", f"{asked} Choose one option: {listed}", answer, answer)


def corpus(diagnoses: Sequence[Diagnosis], rng: np.random.Generator) -> list[str]:
    """Text that a tokenizer for these questions is trained on."""
    questions = [_ask(kind, diagnosis, rng, wordings.FIRST) for diagnosis in diagnoses for kind in KINDS]
    return [f"{question.text} ASSISTANT: {question.answer}" for question in questions] + [NO_IMAGE, FOREIGN_PROMPT]
