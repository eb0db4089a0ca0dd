"""The synthetic ECGs: leads agree, labels are what is drawn, each patch's target lies where its trace is."""

import numpy as np
import pytest

from demo import signals
from demo.drawing import LAYOUTS, draw_page, draw_style
from demo.ecg_image import read_recording
from demo.questions import KINDS, UNTRAINED, ask, ask_anew, correct, key_of
from demo.samples import PINPOINTS, image_at, sample_at
from demo.signals import LEADS, RHYTHMS, SAMPLING_RATE, draw_ecg
from demo.wordings import ALL, BEYOND, BEYOND_SAID, BEYOND_UNSEEN, UNSEEN
from pulse_ecg.anyres import Preprocessing, tile_image


def ecgs(count, wanted=lambda diagnosis: True):
    drawn = (draw_ecg(np.random.default_rng(seed)) for seed in range(100_000))
    return [ecg for ecg, _ in zip((ecg for ecg in drawn if wanted(ecg.diagnosis)), range(count), strict=False)]


def lead(ecg, name):
    return ecg.recording.leads[name]


def test_limb_leads_agree_with_einthoven_and_goldberger_up_to_the_noise():
    for ecg in ecgs(20):
        assert np.std(lead(ecg, "I") + lead(ecg, "III") - lead(ecg, "II")) < 0.12
        assert np.std(lead(ecg, "aVR") + lead(ecg, "aVL") + lead(ecg, "aVF")) < 0.12


def test_the_rate_is_that_of_the_beats_and_lies_in_the_rhythms_range():
    ranges = {name: limits for name, _, limits in RHYTHMS}
    for ecg in ecgs(60):
        assert ecg.diagnosis.rate == round(60 / np.diff(ecg.beats).mean())
        if ecg.diagnosis.rhythm.startswith("sinus") and "with" not in ecg.diagnosis.rhythm:
            low, high = ranges[ecg.diagnosis.rhythm]
            assert low - 3 <= ecg.diagnosis.rate <= high + 3


def test_beats_are_where_the_trace_moves_most():
    for ecg in ecgs(10, lambda d: d.rhythm == "sinus rhythm" and d.finding == "none"):
        steep = np.abs(np.gradient(lead(ecg, "V3") - np.median(lead(ecg, "V3"))))
        near = [steep[max(0, int(beat * SAMPLING_RATE) - 15) :][:30].max() for beat in ecg.beats[1:-1]]
        assert np.median(near) > 4 * np.median(steep)


@pytest.mark.parametrize(("territory", "name"), [("anterior", "V2"), ("inferior", "III"), ("lateral", "V5")])
def test_st_elevation_shows_in_the_leads_of_its_territory(territory, name):
    for ecg in ecgs(8, lambda d: d.finding == "ST elevation" and d.territory == territory):
        assert ecg.st_levels[LEADS.index(name)] > 0.1
    for ecg in ecgs(8, lambda d: d.finding == "ST depression" and d.territory == territory):
        assert ecg.st_levels[LEADS.index(name)] < -0.08


def test_an_elevated_st_segment_can_be_told_by_its_beginning(monkeypatch):
    """By 0.1 mV in two leads of a territory, 20 ms after narrow QRS complexes, however tall and fast the T waves."""
    monkeypatch.setattr(signals, "_noise", lambda times, rng: np.zeros((12, len(times))))
    monkeypatch.setattr(signals, "_moving_electrodes", lambda times, rng: np.zeros((12, len(times))))
    territories = (("V1", "V2", "V3", "V4"), ("II", "III", "aVF"), ("I", "aVL", "V5", "V6"))

    def narrow(diagnosis):
        own = diagnosis.rhythm in ("ventricular paced rhythm", "complete heart block")
        return not own and "bundle" not in diagnosis.finding and diagnosis.finding != "ST depression"

    def level(ecg, name):
        half = ecg.diagnosis.qrs_ms / 2000
        regular = [
            b for b, kind in zip(ecg.beats, ecg.kinds, strict=True) if kind not in ("PVC", "PAC") and 0.5 < b < 9
        ]
        after, before = ([int((b + at) * SAMPLING_RATE) for b in regular] for at in (half + 0.02, -half - 0.01))
        return np.median(lead(ecg, name)[after] - lead(ecg, name)[before])

    told = []
    for ecg in ecgs(400, narrow):
        seconds = [sorted(level(ecg, name) for name in leads)[-2] for leads in territories]
        told.append((max(seconds) > 0.1) == (ecg.diagnosis.finding == "ST elevation"))
    assert np.mean(told) > 0.98


def test_the_commonest_rhythm_is_at_most_three_tenths():
    assert max(share for _, share, _ in RHYTHMS) <= 0.3
    assert sum(share for _, share, _ in RHYTHMS) == pytest.approx(1)


def test_a_sample_is_the_same_each_time_and_no_other_splits():
    first, again, other = sample_at("train", 5), sample_at("train", 5), sample_at("test", 5)
    assert np.array_equal(first.tiles_THWC, again.tiles_THWC)
    assert first.tiles_THWC.shape != other.tiles_THWC.shape or not np.array_equal(first.tiles_THWC, other.tiles_THWC)


@pytest.mark.parametrize("index", range(6))
def test_training_tiles_are_the_endpoints_own(index):
    from demo.network import normalised

    preprocessing = Preprocessing(pinpoints=PINPOINTS)
    endpoints = tile_image(image_at("train", index)[0], preprocessing).pixels_TCHW
    torch = pytest.importorskip("torch")
    trained = normalised(torch.from_numpy(sample_at("train", index).tiles_THWC)).numpy()
    assert np.abs(trained - endpoints).max() < 1e-5


def test_patches_with_a_lead_hold_ink_and_each_beat_lies_in_a_patch():
    for index in range(4):
        sample = sample_at("train", index, plain=True)
        tiles = sample.tiles_THWC.astype(int).sum(-1)
        darkest = tiles.reshape(len(tiles), 12, 28, 12, 28).min(axis=(2, 4))
        bright = np.median(tiles)
        assert (darkest[sample.patches.lead_TSS > 0] < 0.85 * bright).mean() > 0.97
        assert (sample.patches.beat_TSS > 0).sum() >= 2 * len(sample.ecg.beats)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_real_recording_can_be_printed_on_each_page(layout):
    from dataclasses import replace

    rng = np.random.default_rng(0)
    style = replace(draw_style(rng), layout=layout)
    drawing = draw_page(read_recording(), style, rng)
    assert drawing.image.size == style.size
    assert {trace.lead for trace in drawing.traces} == set(LEADS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_true_answer_is_right_and_anothers_is_not(kind):
    rng = np.random.default_rng(1)
    asked = [ask(kind, ecg.diagnosis, rng) for ecg in ecgs(30)]
    assert all(correct(question, question.answer) for question in asked)
    assert not any(correct(question, "") for question in asked)
    different = [(a, b) for a in asked for b in asked if a.key != b.key]
    assert different
    if kind != "rate":
        assert not any(correct(a, b.answer) for a, b in different)


def test_a_rate_may_be_off_by_five_and_no_more():
    question = ask("rate", ecgs(1)[0].diagnosis, np.random.default_rng(0))
    assert correct(question, f"The heart rate is {int(question.key) + 5} bpm.")
    assert not correct(question, f"The heart rate is {int(question.key) + 6} bpm.")
    assert key_of("rate", "I do not know.") == ""


def test_no_wording_asks_two_kinds_of_question():
    trained, unseen = [*ALL.values(), BEYOND], [*UNSEEN.values(), BEYOND_UNSEEN]
    texts = [text.lower().rstrip("?.!") for texts in (*trained, *unseen) for text in texts]
    assert len(set(texts)) == len(texts)
    assert set(ALL) == set(UNSEEN) == set(KINDS) - {"choice"}


def test_what_is_beyond_the_training_is_never_drawn():
    diagnoses = [draw_ecg(np.random.default_rng([5, index])).diagnosis for index in range(200)]
    rng = np.random.default_rng(5)
    drawn = {ask("yes/no", diagnosis, rng).topic for diagnosis in diagnoses}
    assert drawn.isdisjoint(BEYOND_SAID)
    asked = [asks("beyond", diagnosis, rng) for asks in (ask, ask_anew) for diagnosis in diagnoses]
    assert {question.answer for question in asked} == {UNTRAINED}
    assert all(correct(question, UNTRAINED) for question in asked)
    assert not any(correct(question, "Yes, this ECG shows atrial flutter.") for question in asked)


def test_a_question_about_any_kind_is_worded_in_many_ways_with_one_answer():
    diagnosis = ecgs(1)[0].diagnosis
    for kind in set(KINDS) - {"choice", "yes/no"}:
        rng = np.random.default_rng(3)
        asked = [ask(kind, diagnosis, rng) for _ in range(60)]
        assert len({question.answer for question in asked}) == 1
        assert len({question.text for question in asked}) > 10


def test_whether_an_ecg_is_normal_is_asked_either_way():
    rng = np.random.default_rng(4)
    drawn = (draw_ecg(np.random.default_rng([4, index])).diagnosis for index in range(2000))
    asked = [(ask("yes/no", diagnosis, rng), diagnosis.normal) for diagnosis in drawn]
    about = [(question, normal) for question, normal in asked if question.topic in ("normal", "abnormal")]
    assert {(question.topic, normal) for question, normal in about} == {
        (topic, normal) for topic in ("normal", "abnormal") for normal in (False, True)
    }
    assert 0.4 < sum(question.key == "yes" for question, _ in about) / len(about) < 0.6
    for question, normal in about:
        assert question.topic in question.text.split(" ")[-1].lower()
        assert question.key == ("yes" if (question.topic == "normal") == normal else "no")
        assert question.answer.endswith(f"is {'normal' if normal else 'abnormal'}.")


def test_yes_and_no_are_as_common():
    rng = np.random.default_rng(2)
    said = [ask("yes/no", ecg.diagnosis, rng).key for ecg in ecgs(300)]
    assert 0.38 < said.count("yes") / len(said) < 0.6
