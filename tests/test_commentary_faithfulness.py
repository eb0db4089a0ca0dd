"""How wide the net's meshes are, measured on hand-written pairs, and each rule on its own.

Every English text appears twice: told faithfully, and with one planted fault.  ``commentary_pairs_held_out.json`` was
written after the rules were finished, and no rule was changed for it: its rates are the ones to quote.

``commentary_pairs.json`` began with 112 pairs at hand while the rules were written.  Five more rounds were each written
blind, run once, and then learnt from.  Their first runs, faults detected and faithful texts blamed: 23 of 24 and 4 of
24; 20 of 20 and 1 of 20; 20 of 20 and 4 of 20; 19 of 20 and 3 of 20; 17 of 20 and 3 of 20.  A sixth was aimed at weak
places by a reader of the rules, 18 of 20 and 3 of 20; a seventh came after it, 9 of 10 and none of 10.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commentary.faithfulness import check

DATA = Path(__file__).parent / "data"
SETS = ("commentary_pairs.json", "commentary_pairs_held_out.json")


def rules(english: str, turkish: str, severity: str | None = None) -> set[str]:
    return {finding.rule for finding in check(english, turkish) if severity in (None, finding.severity)}


@pytest.mark.parametrize("name", SETS)
def test_rates(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = json.loads((DATA / name).read_text("utf-8"))
    faulty = [bool(check(pair["en"], pair["tr"])) for pair in pairs if pair["fault"]]
    faithful = [bool(check(pair["en"], pair["tr"])) for pair in pairs if not pair["fault"]]
    assert len(faulty) == len(faithful)
    detection, false_alarms = sum(faulty) / len(faulty), sum(faithful) / len(faithful)
    with capsys.disabled():
        print(
            f"\n{name}: {sum(faulty)} of {len(faulty)} faults detected ({detection:.1%}), "
            f"{sum(faithful)} of {len(faithful)} faithful texts blamed ({false_alarms:.1%})"
        )
    assert detection >= 0.95
    assert false_alarms <= 0.05


def test_the_set_is_large_and_varied() -> None:
    pairs = [pair for name in SETS for pair in json.loads((DATA / name).read_text("utf-8"))]
    assert len(pairs) >= 150
    assert len({pair["fault"] for pair in pairs if pair["fault"]}) >= 12
    assert len({(pair["en"], pair["tr"]) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize(
    ("english", "turkish", "rule"),
    [
        ("No ST elevation.", "Kaydınızda ST yükselmesi var.", "negation"),
        ("There is ST elevation.", "Kaydınızda ST yükselmesi izlenmedi.", "negation"),
        ("Ischemia cannot be ruled out.", "Kalbinizde iskemi bulgusu yoktur.", "negation"),
        ("ST depression in V5.", "V5 derivasyonunda ST depresyonu var.", "false_friend"),
        ("Peripheral hypotension.", "Kaydınıza göre düşük tansiyon var.", "false_friend"),
        ("QRS duration 120 ms.", "QRS süresi 210 ms olarak ölçüldü.", "number"),
        ("QRS duration 120 ms.", "QRS süresi 120 saniye olarak ölçüldü.", "number"),
        ("Heart rate 30 bpm.", "Kalbiniz olağandan yavaş atıyor, acil bir durum bu.", "number"),
        ("T wave inversion in V1-V3.", "V1, V2 ve V4 derivasyonlarında T dalgası inversiyonu var.", "leads"),
        ("Left atrial enlargement.", "Kaydınızda sağ atriyal genişleme görülüyor.", "laterality"),
        ("Anterior ischemia.", "Kalbinizin alt duvarında iskemi görülüyor.", "territory"),
        ("Ventricular tachycardia.", "Kalbiniz hızlı atıyor, hemen 112'yi arayın.", "omission"),
        ("Ventricular tachycardia.", "Kaydınızda ventriküler taşikardi görülüyor.", "urgency"),
        ("Sinus rhythm.", "Ritminiz sinüs ritmi. Ayrıca ventriküler fibrilasyon var.", "addition"),
        ("No sign of infarction.", "Kaydınızda kalp krizi belirtileri görülüyor.", "negation"),
        ("Sinus rhythm.", "Ritminiz sinüs ritmi. Ayrıca STEMI belirtileri var.", "addition"),
        ("The QT interval is not prolonged.", "Kaydınızda QT aralığı da uzamış.", "negation"),
        ("Sinus bradycardia, first-degree AV block.", "Kalbiniz gayet normal çalışıyor, için rahat olsun.", "omission"),
        ("No evidence of ischemia.", "Kalp kasının kanlanması yetersiz.", "negation"),
        ("Regular rhythm.", "Ritminiz düzensiz ve dikkat gerektiriyor.", "substitution"),
        ("Absent P waves, peaked T waves.", "P dalgaları görülmüyor. Sivri T dalgası yok.", "negation"),
        ("Sinus rhythm.", "Ritminiz sinüs ritmi. Hayati risk taşıyan ventriküler taşikardi var.", "addition"),
        ("ST elevation of 2 mm in V2.", "V2 derivasyonunda 2 cm ST yükselmesi var.", "number"),
        ("ST elevation of 2 mm in V2.", "V2 derivasyonunda 2 mV ST yükselmesi var.", "number"),
        ("Sinus rhythm at 72 bpm.", "Ritminiz sinüs ritmi, kalbiniz saniyede 72 kez atıyor.", "number"),
        ("Sinus rhythm.", "Your rhythm is normal and it is coming from the sinus node.", "language"),
        ("Sinus rhythm.", "Üzgünüm, buna yardımcı olamam.", "refusal"),
        ("Sinus rhythm.", "Ritminiz doğal, yani sinüs ritmi ve bu", "cut_off"),
    ],
)
def test_each_rule_refuses(english: str, turkish: str, rule: str) -> None:
    assert rule in rules(english, turkish, "critical")


@pytest.mark.parametrize(
    ("english", "turkish"),
    [
        ("PR 120 ms.", "PR aralığı 0,12 saniye olarak ölçülmüş."),
        ("RR interval 1200 ms.", "RR aralığı 1.200 ms olarak ölçülmüş."),
        ("Sinus rhythm at 75 bpm.", "Ritminiz sinüs ritmi; 112'yi aramanız gerekmez, dakikada 75 atım."),
        ("T wave inversion in V1-V3.", "V1, V2 ve V3 derivasyonlarında T dalgaları ters dönmüş."),
        ("ST elevation in V1 to V4.", "V1 ile V4 arasındaki derivasyonlarda ST yükselmesi var."),
        ("ST elevation in II, III, aVF.", "DII, DIII ve aVF derivasyonlarında ST yükselmesi var."),
        ("Ischemia cannot be excluded.", "Kalbinizde iskemi dışlanamaz."),
        ("No ST elevation or depression.", "Kaydınızda ST yükselmesi ya da çökmesi görülmüyor."),
        ("No infarction.", "Kalp krizi bulgusu yok. Göğüs ağrınız olursa bu bir kalp krizi belirtisi olabilir."),
        ("No acute infarct; old inferior infarct.", "Alt duvarda eski bir kalp krizi izi var; akut enfarktüs yok."),
        ("LBBB.", "ST BÖLÜMÜ, SOL DAL BLOĞU NEDENİYLE DEĞERLENDİRİLEMİYOR."),
        ("Sinus rhythm, V1-4 normal.", "Ritminiz sinüs ritmi, V1-V4 derivasyonları normal."),
        ("Atrial flutter rather than atrial fibrillation.", "Atriyal fibrilasyondan çok atriyal çırpıntı olası."),
        ("Old inferior infarction.", "Alt duvarda önceden kalp krizi geçirdiğinizi gösteren bir iz var."),
        ("Abnormal ECG. PR interval within normal limits.", "EKG'niz normal değil. PR aralığı normal sınırlarda."),
        ("Intervals are within normal limits.", "Kaydınızda ölçülen bütün süreler olağan."),
        ("Irregular rhythm with frequent PVCs.", "Ritminiz düzensiz, sık ventriküler erken vuru var."),
        ("Absent P waves, wide QRS complexes.", "P dalgaları görülmüyor, QRS kompleksleri geniş."),
        ("No P waves or ST elevation.", "P dalgaları görülmüyor. ST yükselmesi de yok."),
        ("Heart rate – 72 bpm.", "Kalbiniz dakikada 72 atımla çalışıyor."),
        ("QRS axis: -30 degrees.", "Kalbin elektriksel ekseni eksi 30 derece."),
        ("AV block with coronary artery disease.", "AV blok ve koroner arter hastalığı (damar tıkanıklığı) var."),
    ],
)
def test_each_rule_lets_pass(english: str, turkish: str) -> None:
    assert check(english, turkish) == ()


@given(st.text(max_size=300), st.text(max_size=300))
@settings(max_examples=100, deadline=None)
def test_no_text_breaks_it(english: str, turkish: str) -> None:
    assert all(finding.severity in ("critical", "warning") for finding in check(english, turkish))


@pytest.mark.parametrize("space", [" ", "  ", "\u2009", "\u202f", "\u00a0", "\t"])
def test_white_space_of_any_kind_parts_words(space: str) -> None:
    english = "ST elevation in leads V1 - V4, D1 and aVL. The PR interval is 160 ms."
    turkish = (
        "Kaydınızda V1 - V4, D1 ve aVL derivasyonlarında ST yükselmesi var. PR aralığı 160 ms. Bu bulgu acil olabilir; "
        "yakınmanız varsa hemen 112'yi arayın."
    )
    spaced = turkish.replace(" - ", f"{space}-{space}").replace("D1", f"D{space}1").replace("160 ms", f"160{space}ms")
    assert check(english, spaced) == check(english, turkish)
    assert check(english, turkish.replace("D1", f"D{space}\n1")) is not None


def test_presence_of_p_waves_is_not_read_as_their_absence() -> None:
    for absent in ("P dalgaları görülmüyor.", "P dalgaları seçilemiyor.", "P dalgası izlenmedi."):
        assert check("No visible P waves.", f"Kaydınızda {absent}") == ()
    assert "omission" in rules("No visible P waves.", "Kaydınızda P dalgaları görülüyor.")


def test_megabytes_are_refused_before_any_pattern_runs_over_them() -> None:
    """A pattern holds the whole process while it runs, so that no deadline could be kept."""
    for endless in ("1", "a", ".", "(", "kalp ", "1."):
        started = time.perf_counter()
        assert rules("Sinus rhythm.", endless * 500_000) == {"length"}
        assert time.perf_counter() - started < 0.5


def test_it_is_fast_on_long_and_on_hostile_text() -> None:
    pair = json.loads((DATA / SETS[0]).read_text("utf-8"))[0]
    for english, turkish in [
        (pair["en"] * 40, pair["tr"] * 15),
        ("no " * 5000, "V1 ve " * 1300),
        ("V1 " * 5000, "ST " * 2600),
        ("1" * 15000, "1." * 3900),
        ("(" * 15000, "yan ve " * 1100),
        ("a" * 15000, "a," * 3900),
        ("no ST elevation, " * 900, "ST yükselmesi, " * 500),
        ("V1" + "\n" * 15000, "V1" + "\n" * 7900),
        ("V1" + " \n\t" * 5000, "V1" + " \u2009" * 3900),
        ("!" * 15000 + "x", "!" * 7900 + "x"),
    ]:
        started = time.process_time()
        check(english, turkish)
        assert time.process_time() - started < 2.0
