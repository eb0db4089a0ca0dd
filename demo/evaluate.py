"""How well the demo model reads: held-out synthetic ECGs, and a real one.

    python -m demo.evaluate demo/checkpoint --images 2000

Each question is graded against what the image was drawn from, beside three controls: always giving the commonest
answer; guessing from the question alone, with all that the training's diagnoses tell of how common everything is; and
answering about another image.  Answers are greedy, without a repetition penalty.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from demo.decoding import answers
from demo.drawing import draw_page, draw_style
from demo.ecg_image import LAYOUTS as SAMPLE_LAYOUTS
from demo.ecg_image import read_recording, render
from demo.network import trained_model
from demo.questions import KINDS, Question, ask, ask_anew, correct, key_of, rhythm_of
from demo.samples import diagnosis_at, image_at
from demo.signals import Diagnosis
from demo.wordings import UNSEEN, Kind
from pulse_ecg.anyres import tile_image
from pulse_ecg.checkpoint import LoadedModel

REAL_RATE = 61
"""By the RR interval of 982 ms that the recording's own device read."""

_QUICK: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind != "report")
_REPORT_EVERY = 4
_CONTROL_EVERY = 5
_ANEW, _BEYOND = "one of these, in an unseen wording", "beyond its training, in an unseen wording"
_COUNTED = 5000  # diagnoses of the training that tell what is common


@dataclass
class Tally:
    """Graded answers of one kind of question."""

    keys: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)

    def add(self, question: Question, answer: str) -> None:
        self.add_graded(question.key, key_of(question.kind, answer), correct(question, answer))

    def add_graded(self, key: str, given: str, right: bool) -> None:
        self.keys.append(key)
        self.given.append(given)
        self.right.append(right)

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.right)) if self.right else float("nan")

    @property
    def majority(self) -> float:
        """What always giving the one best answer would score; for rates, the best window of 11 bpm."""
        if self.keys and all(key.isdigit() for key in self.keys):
            rates = np.array([int(key) for key in self.keys])
            return max(float(np.mean(np.abs(rates - rate) <= 5)) for rate in range(25, 160))
        return max(Counter(self.keys).values()) / len(self.keys) if self.keys else float("nan")


class Guesser:
    """Answers without an image: what is most often right about such a question."""

    def __init__(self, diagnoses: Iterable[Diagnosis]) -> None:
        rng = np.random.default_rng(13)
        self._answers: dict[tuple[Kind, str], Counter[str]] = {}
        self._names: Counter[str] = Counter()
        rates: list[int] = []
        for diagnosis in diagnoses:
            for question in (ask(kind, diagnosis, rng) for kind in KINDS):
                self._answers.setdefault((question.kind, question.topic), Counter())[question.answer] += 1
            self._names.update((diagnosis.rhythm, diagnosis.finding))
            rates.append(diagnosis.rate)
        self._rate = max(range(25, 160), key=lambda rate: np.sum(np.abs(np.array(rates) - rate) <= 5))

    def answer(self, question: Question) -> str:
        """The best guess."""
        match question.kind:
            case "rate":
                return f"{self._rate} bpm"
            case "choice":
                options = re.findall(r"([A-D])\. (.*?)(?= [A-D]\. |$)", question.text)
                letter, name = max(options, key=lambda option: self._names[option[1]])
                return f"{name} ({letter})"
        known = self._answers.get((question.kind, question.topic))
        return known.most_common(1)[0][0] if known else ""


def questions_about(diagnosis: Diagnosis, index: int) -> list[Question]:
    """The questions that are asked about a held-out image: the same in each run."""
    rng = np.random.default_rng([7, index])
    kinds = _QUICK if index % _REPORT_EVERY else KINDS
    return [ask(kind, diagnosis, rng) for kind in kinds]


def questions_anew(diagnosis: Diagnosis, index: int) -> dict[str, Question]:
    """Questions in wordings that the training never used, by the row of the table that their answers count for."""
    rng = np.random.default_rng([17, index])
    kinds = list(UNSEEN)
    return {
        _ANEW: ask_anew(kinds[index % len(kinds)], diagnosis, rng),
        _BEYOND: ask_anew("beyond", diagnosis, rng),
    }


def graded(model: LoadedModel, images: int) -> dict[str, dict[str, Tally]]:
    """Answers about ``images`` held-out images, guesses without them, and answers of a fifth of them about another."""
    tallies: dict[str, dict[str, Tally]] = {"own image": {}, "no image": {}, "another image": {}}
    guesser = Guesser(diagnosis_at("train", index) for index in range(_COUNTED))
    for index in tqdm(range(images), desc="Held-out images", mininterval=10):
        image, ecg = image_at("test", index)
        pixels = torch.from_numpy(tile_image(image, model.config.preprocessing).pixels_TCHW)
        asked = questions_about(ecg.diagnosis, index)
        anew = questions_anew(ecg.diagnosis, index)
        given = _answered(model, pixels, [*asked, *anew.values()])
        _grade(tallies["own image"], asked, given[: len(asked)], ecg.diagnosis)
        for (row, question), answer in zip(anew.items(), given[len(asked) :], strict=True):
            tallies["own image"].setdefault(row, Tally()).add(question, answer)
        _grade(tallies["no image"], asked, [guesser.answer(question) for question in asked], ecg.diagnosis)
        if index % _CONTROL_EVERY == 0:
            other = diagnosis_at("test", index + 1)
            asked = questions_about(other, index)
            _grade(tallies["another image"], asked, _answered(model, pixels, asked), other)
    return tallies


def _answered(model: LoadedModel, pixels: torch.Tensor, asked: Sequence[Question]) -> list[str]:
    return answers(model, pixels, [question.text for question in asked])


def _grade(tallies: dict[str, Tally], asked: Sequence[Question], given: Sequence[str], truth: Diagnosis) -> None:
    for question, answer in zip(asked, given, strict=True):
        tallies.setdefault(question.kind, Tally()).add(question, answer)
        if question.kind == "ST territory" and truth.territory:
            tallies.setdefault("ST territory, where there is one", Tally()).add(question, answer)
        if question.kind == "report":
            said = rhythm_of(answer)
            tallies.setdefault("report, its rhythm", Tally()).add_graded(truth.rhythm, said, said == truth.rhythm)


def table(tallies: dict[str, dict[str, Tally]]) -> list[dict[str, Any]]:
    """One row for each kind of question."""

    def share(control: str, kind: str) -> float | None:
        return round(tallies[control][kind].accuracy, 3) if kind in tallies[control] else None

    return [
        {
            "kind": kind,
            "questions": len(tally.right),
            "accuracy": round(tally.accuracy, 3),
            "majority": None if kind in (_ANEW, _BEYOND) else round(tally.majority, 3),
            "no image": share("no image", kind),
            "another image": share("another image", kind),
        }
        for kind, tally in tallies["own image"].items()
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows as a table for the card."""
    columns = {
        "accuracy": "accuracy",
        "majority": "commonest answer",
        "no image": "guessed from the question",
        "another image": "about another image",
    }
    yield f"| question | asked | {' | '.join(columns.values())} |"
    yield "|---" * (len(columns) + 2) + "|"
    for row in rows:
        shares = ["–" if row[name] is None else f"{100 * row[name]:.1f} %" for name in columns]
        yield f"| {row['kind']} | {row['questions']} | {' | '.join(shares)} |"


def real_renderings() -> list[Image.Image]:
    """The real recording, printed in ten ways: the sample page in two layouts, and eight pages with their flaws."""
    recording = read_recording()
    pages = [render(recording), render(recording, layout=SAMPLE_LAYOUTS["6x2"])]
    for seed in range(8):
        rng = np.random.default_rng([11, seed])
        pages.append(draw_page(recording, draw_style(rng), rng).image)
    return pages


def read_real(model: LoadedModel) -> list[dict[str, str]]:
    """What the model says about each rendering of the real recording (sinus rhythm, 61 bpm, normal)."""
    asked = ["What is the rhythm of this ECG?", "What is the heart rate?", "Write a report of this ECG."]
    found = []
    for image in real_renderings():
        pixels = torch.from_numpy(tile_image(image, model.config.preprocessing).pixels_TCHW)
        found.append(dict(zip(("rhythm", "rate", "report"), answers(model, pixels, asked), strict=True)))
    return found


def real_score(found: Sequence[dict[str, str]]) -> dict[str, int]:
    """In how many renderings the rhythm, the rate and both are right."""
    rhythm = [key_of("rhythm", answer["rhythm"]) == "sinus rhythm" for answer in found]
    rate = [abs(int(key_of("rate", answer["rate"]) or 0) - REAL_RATE) <= 5 for answer in found]
    both = sum(a and b for a, b in zip(rhythm, rate, strict=True))
    return {"renderings": len(found), "rhythm": sum(rhythm), "rate": sum(rate), "both": both}


def write_card(
    checkpoint: Path, images: int, rows: Sequence[dict[str, Any]], real: dict[str, int], training: str
) -> None:
    """The checkpoint's README: what it is, and how well it read this time."""
    card = Path(__file__).with_name("CARD.md").read_text("utf-8")
    lines = [
        *(["", training] if training else []),
        "",
        "## Scores",
        "",
        f"`python -m demo.evaluate demo/checkpoint --images {images}` on held-out drawn ECGs, greedy answers without a",
        "repetition penalty.  A rate is right within 5 bpm, a report if all of its lines are.",
        "",
        *markdown(rows),
        "",
        f"The real recording that pydicom ships, in {real['renderings']} renderings: rhythm right in {real['rhythm']}, "
        f"rate within 5 bpm in {real['rate']}, both in {real['both']}.",
    ]
    (checkpoint / "README.md").write_text(card + "\n".join(lines) + "\n", "utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Grade the demo model.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("build/demo-evaluation"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--card", action="store_true", help="write the checkpoint's README.md with these scores")
    parser.add_argument("--training", default="", help="for the card: steps, time and machine of the training")
    parser.add_argument("--no-plots", action="store_true", help="plots need matplotlib")
    args = parser.parse_args(argv)
    model = trained_model(args.checkpoint, args.device)
    tallies = graded(model, args.images)
    rows = table(tallies)
    print("\n".join(markdown(rows)))
    real = read_real(model)
    print(json.dumps(real, indent=1), json.dumps(real_score(real)))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "scores.json").write_text(
        json.dumps({"held-out": rows, "real": real_score(real)}, indent=2) + "\n", "utf-8"
    )
    if args.card:
        write_card(args.checkpoint, args.images, rows, real_score(real), args.training)
    if not args.no_plots:
        from demo.plots import plot_confusion, plot_rates

        plot_confusion(tallies["own image"]["rhythm"], args.output / "confusion.png")
        plot_rates(tallies["own image"]["rate"], args.output / "rates.png")


if __name__ == "__main__":
    main()
