"""The demo's grades are what they say: right answers count, the controls are honest, the card tells the scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from demo.evaluate import Tally, markdown, questions_about, real_score, table, write_card
from demo.plots import confusion, plot_confusion, plot_rates
from demo.questions import KINDS, Question
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
    rows = table({"own image": {"rhythm": own}, "another image": {"rhythm": other}})
    assert list(markdown(rows))[-1] == "| rhythm | 2 | 50.0 % | 50.0 % | 0.0 % |"
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
