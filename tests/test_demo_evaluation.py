"""The demo's grades are what they say: right answers count, the controls are honest, the card tells the scores."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from demo import evaluate
from demo.evaluate import Guesser, Tally, markdown, questions_about, questions_anew, real_score, table, write_card
from demo.plots import confusion, plot_confusion, plot_rates
from demo.questions import KINDS, Question, ask, correct, key_of
from demo.samples import diagnosis_at
from demo.signals import RHYTHMS, draw_ecg


def tally(kind: str, *answers: tuple[str, str]) -> Tally:
    """Of (key, answer) pairs."""
    found = Tally()
    for key, answer in answers:
        found.add(Question(kind, "?", "", key), answer)  # type: ignore[arg-type]
    return found


def test_a_rate_may_be_off_by_five_and_nonsense_is_wrong() -> None:
    answers = ("The heart rate is 75 bpm.", "The heart rate is 76 bpm.", "The heart rate is 65 bpm.", "", "70")
    assert tally("rate", *[("70", answer) for answer in answers]).right == [True, False, True, False, False]


REPORT = Question(
    "report",
    "Write a report of this ECG.",
    "Rhythm: sinus rhythm. Heart rate: 70 bpm. QRS complex: narrow. Other findings: none. Conclusion: normal ECG.",
    "",
)


@pytest.mark.parametrize(
    ("said", "instead", "right"),
    [
        ("70", "75", True),
        ("70", "76", False),
        ("70 bpm", "bpm", False),
        ("sinus rhythm", "atrial fibrillation", False),
        ("none", "ST elevation in the inferior leads", False),
        (" Conclusion: normal ECG.", "", False),
    ],
)
def test_a_report_is_right_if_all_of_its_lines_are(said: str, instead: str, right: bool) -> None:
    question = replace(REPORT, key=key_of("report", REPORT.answer))
    assert correct(question, REPORT.answer)
    assert correct(question, REPORT.answer.replace(said, instead)) is right


def test_guesses_are_the_best_that_the_questions_alone_allow() -> None:
    diagnoses = [diagnosis_at("train", index) for index in range(300)]
    guesser, names = Guesser(diagnoses), Counter(diagnosis.rhythm for diagnosis in diagnoses)
    rng = np.random.default_rng(0)
    for diagnosis in diagnoses[:40]:
        choice = ask("choice", diagnosis, rng)
        name, letter = re.fullmatch(r"(.*) \(([A-D])\)", guesser.answer(choice)).groups()
        options = re.split(r" ?[A-D]\. ", choice.text)[1:]
        assert options["ABCD".index(letter)] == name
        if "rhythm?" in choice.text:
            assert all(names[name] >= names[option] for option in options)
        rhythm = ask("rhythm", diagnosis, rng)
        assert key_of("rhythm", guesser.answer(rhythm)) == names.most_common(1)[0][0]
    guessed = tally("rate", *[(str(d.rate), guesser.answer(ask("rate", d, rng))) for d in diagnoses])
    assert guessed.accuracy == pytest.approx(guessed.majority)


def test_answers_are_graded_with_their_own_image_and_the_control_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that knows each image by heart is always right about it, and about another as often as that is alike."""
    splits: list[str] = []

    def image_at(split: str, index: int) -> tuple[int, SimpleNamespace]:
        splits.append(split)
        return index, SimpleNamespace(diagnosis=diagnosis_at("test", index))

    def read(_: object, pixels: torch.Tensor, asked: Sequence[str]) -> list[str]:
        index = int(pixels)
        own = diagnosis_at("test", index)
        known = {q.text: q.answer for q in (*questions_about(own, index), *questions_anew(own, index).values())}
        return [known.get(text, "") for text in asked]

    monkeypatch.setattr(evaluate, "image_at", image_at)
    monkeypatch.setattr(evaluate, "answers", read)
    monkeypatch.setattr(evaluate, "tile_image", lambda image, _: SimpleNamespace(pixels_TCHW=np.array(image)))
    monkeypatch.setattr(evaluate, "_COUNTED", 50)
    tallies = evaluate.graded(SimpleNamespace(config=SimpleNamespace(preprocessing=None)), 20)
    assert set(splits) == {"test"}
    assert len(splits) == len(tallies["own image"]["rhythm"].right) == 20
    assert all(tally.accuracy == 1 for tally in tallies["own image"].values())
    pairs = [(diagnosis_at("test", index), diagnosis_at("test", index + 1)) for index in range(0, 20, 5)]
    assert tallies["another image"]["rhythm"].right == [own.rhythm == other.rhythm for own, other in pairs]
    assert tallies["another image"]["rate"].right == [abs(own.rate - other.rate) <= 5 for own, other in pairs]
    assert {row["kind"] for row in table(tallies)} >= {*KINDS, "report, its rhythm"}


def test_the_majority_is_the_best_single_answer() -> None:
    assert tally("rhythm", ("a", ""), ("b", ""), ("a", ""), ("c", "")).majority == 0.5
    # 66 bpm is within five of 61, 65, 70 and 71 alone.
    assert tally("rate", *[(str(rate), "") for rate in (40, 61, 65, 70, 71, 150)]).majority == pytest.approx(4 / 6)


def test_the_same_questions_are_asked_each_time_and_reports_about_one_image_in_four() -> None:
    diagnosis = draw_ecg(np.random.default_rng(0)).diagnosis
    assert questions_about(diagnosis, 5) == questions_about(diagnosis, 5)
    kinds = [{question.kind for question in questions_about(diagnosis, index)} for index in range(8)]
    assert [asked == set(KINDS) for asked in kinds] == [True, False, False, False] * 2


def test_both_must_be_right_about_the_real_recording() -> None:
    right = {"rhythm": "The rhythm is sinus rhythm.", "rate": "The heart rate is 61 bpm."}
    answers = [
        right,
        right | {"rate": "The heart rate is 67 bpm."},
        right | {"rhythm": "The rhythm is sinus bradycardia."},
    ]
    assert real_score(answers) == {"renderings": 3, "rhythm": 2, "rate": 2, "both": 1}


def test_the_card_has_the_scores_beside_their_controls(tmp_path: Path) -> None:
    own, other = (
        tally("rhythm", ("a", "The rhythm is a."), ("b", "The rhythm is a.")),
        tally("rhythm", ("a", "The rhythm is b.")),
    )
    rows = table({"own image": {"rhythm": own}, "no image": {}, "another image": {"rhythm": other}})
    assert list(markdown(rows))[-1] == "| rhythm | 2 | 50.0 % | 50.0 % | – | 0.0 % |"
    write_card(tmp_path, 2, rows, {"renderings": 10, "rhythm": 9, "rate": 8, "both": 7}, "Trained today.")
    card = (tmp_path / "README.md").read_text("utf-8")
    assert all(text in card for text in ("| rhythm | 2 |", "Trained today.", "both in 7", "not for clinical use"))


def test_the_confusion_table_counts_every_answer_once(tmp_path: Path) -> None:
    names = [str(name) for name, *_ in RHYTHMS]
    answers = [(name, f"The rhythm is {name}.") for name in names] + [(names[0], "Nonsense.")]
    found = tally("rhythm", *answers)
    labels, counts = confusion(found)
    assert len(labels) == len(names)
    assert counts.sum() == len(answers)
    assert (np.diag(counts[:, :-1]) == 1).all()
    assert counts[0, -1] == 1
    plot_confusion(found, tmp_path / "confusion.png")
    plot_rates(tally("rate", ("70", "The heart rate is 72 bpm."), ("80", "")), tmp_path / "rates.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("confusion.png", "rates.png"))
