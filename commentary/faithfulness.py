"""Does the Turkish text say what the English one says?  Rules, not a model: fast, offline, and each with a name.

What it cannot see: a finding outside the glossary, two findings that swap places, tone.  It is a net under the
service, not a proof; ``tests/test_commentary_faithfulness.py`` measures how wide its meshes are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from commentary.glossary import english_terms, false_friends, glossary, turkish_terms
from commentary.measures import RATIO, Measure, leads, measures, spelt_numbers
from commentary.polarity import Claim, english_claim, turkish_claim
from commentary.record import Finding
from commentary.regions import sides, territories
from commentary.text import Language, Match, fold, plain, tokens
from commentary.wording import form_faults

MAX_CHARACTERS = 8_000
# A sentence about what might happen, which states no finding: "kalp krizi belirtisi olursa 112'yi arayın".
_CONDITIONAL = re.compile(
    r"\w+(?:irsa|ursa|arsa|erse|irse|urse|iyorsa|uyorsa|varsa|saniz|seniz|rsaniz|rseniz)\b|durumunda|halinde"
    # "belirtileri var" states a finding, "bir belirtisi olabilir" does not
    r"|belirti(?!\w*\s(?:\w+\s){0,2}(?:var(?:dir)?\b|gorul(?:uyor|mekte)|izlen(?:iyor|mekte)|saptan|mevcut))"
    # "inme riski var" states no stroke, "risk taşıyan taşikardi var" a tachycardia
    r"|\brisk(?!\w*\s(?:tasi|olustur|yarat|icer|barindir))|yol acabil|neden olabil"
)
_URGENT = re.compile(r"\b112\b|\bacil|\bhemen\b|\bderhal\b|(?:vakit|zaman) kaybetme|gecik(?:tir)?meden|beklemeden")
_CALM = re.compile(r"\b(?:yok(?:tur)?|degil(?:dir)?|gerekmi\w+|gerekmez|gerektirm\w+)\b")
# A false friend is none where the English answer really speaks of the thing.
_EXCUSES = {
    "depres": re.compile(r"antidepress|depressive"),
    "tansiyon": re.compile(r"hypertensi|(?<!peripheral )hypotensi|blood pressure"),
    "kan basinc": re.compile(r"hypertensi|(?<!peripheral )hypotensi|blood pressure"),
    "damar": re.compile(r"coronar|infarct|isch?aem|ischem|occlu|stenos|artery"),
    "arter": re.compile(r"\barter"),
}
_NO_FINDING = ("year", "mm/s", "mm/mv")  # age, paper speed and gain need not be told to the patient
_TERM_IN_PARENTHESES = 5
_SEVERE_RATES = (40.0, 150.0)


def check(english: str, turkish: str, *, cut_off: bool = False) -> tuple[Finding, ...]:
    """Every departure found, critical ones first; empty when none is.  Never raises on any text.

    Length comes first, and alone where it is at fault: a pattern that runs over megabytes holds the whole process.
    """
    if len(turkish) > MAX_CHARACTERS or len(english) > 2 * MAX_CHARACTERS:
        return (_critical("length", "the text is far longer than a commentary"),)
    found = list(form_faults(turkish, cut_off=cut_off))
    if not any(finding.rule in ("language", "refusal") for finding in found):
        found += _Comparison(plain(english), plain(turkish)).findings()
    unique = dict.fromkeys(found)
    return tuple(sorted(unique, key=lambda finding: finding.severity != "critical"))


def _critical(rule: str, detail: str) -> Finding:
    return Finding(rule, "critical", detail)


def _warning(rule: str, detail: str) -> Finding:
    return Finding(rule, "warning", detail)


class _Side:
    """One text, its words, and what it claims of each glossary term."""

    def __init__(self, text: str, language: Language) -> None:
        self.text = text
        self.folded = fold(text)
        self.words = tokens(text)
        index = english_terms() if language == "en" else turkish_terms()
        self.matches = index.find(self.words)
        self._named = {at for match in self.matches for at in range(match.first, match.last + 1)}
        self._spans: dict[int, tuple[int, int]] = {}
        for word in self.words:
            start, _ = self._spans.get(word.sentence, (word.start, 0))
            self._spans[word.sentence] = (start, word.end)
        self.claims: dict[str, list[tuple[Match[str], Claim]]] = {}
        for match in self.matches:
            claim = self._claim(language, match)
            self.claims.setdefault(match.key, []).append((match, claim))

    def _claim(self, language: Language, match: Match[str]) -> Claim:
        if language == "en":
            return english_claim(self.text, self.words, match.first, match.last, named=self._named)
        return turkish_claim(self.words, match.first, match.last, absence=glossary()[match.key].absence)

    def asserts(self, term: str) -> bool:
        return any(claim.asserted for _, claim in self.claims.get(term, ()))

    def asserts_plainly(self, term: str) -> bool:
        """Asserted in a sentence that is no "if" and no gloss of several words in parentheses."""
        return any(
            claim.asserted and not self._glossed(match) and not _CONDITIONAL.search(self.sentence_of(match))
            for match, claim in self.claims.get(term, ())
        )

    def denies(self, term: str) -> bool:
        return any(claim.denied for _, claim in self.claims.get(term, ()))

    def _glossed(self, match: Match[str]) -> bool:
        first = self.words[match.first]
        if not first.depth:
            return False
        inside = [word for word in self.words if word.sentence == first.sentence and word.depth >= first.depth]
        return len(inside) > _TERM_IN_PARENTHESES

    def sentence_of(self, match: Match[str]) -> str:
        return self.sentence_at(self.words[match.first].sentence)

    def sentence_at(self, number: int) -> str:
        start, end = self._spans[number]
        return self.folded[start:end]

    def sentences(self) -> Iterator[str]:
        return (self.folded[start:end] for start, end in self._spans.values())

    def regional_text(self) -> str:
        """The folded text without terms whose own name holds a direction that is no territory of the heart."""
        text = self.folded
        for match in self.matches:
            if glossary()[match.key].category in ("conduction", "axis"):
                start, end = self.words[match.first].start, self.words[match.last].end
                text = text[:start] + "#" * (end - start) + text[end:]
        return text


class _Comparison:
    def __init__(self, english: str, turkish: str) -> None:
        self.en = _Side(english, "en")
        self.tr = _Side(turkish, "tr")

    def findings(self) -> Iterator[Finding]:
        yield from self._false_friends()
        for name in self.en.claims:
            if not glossary()[name].general:
                yield from self._term(name)
        yield from self._nothing_told()
        yield from self._additions()
        yield from self._regions()
        yield from self._numbers()
        yield from self._ratios()
        yield from self._leads()
        yield from self._urgency()

    def _false_friends(self) -> Iterator[Finding]:
        finders = false_friends()
        for name in self.en.claims:
            if name in finders:
                for match in finders[name].find(self.tr.words):
                    friend = fold(match.key)
                    if any(part in friend and reason.search(self.en.folded) for part, reason in _EXCUSES.items()):
                        continue
                    yield _critical("false_friend", f"'{match.key}' is not what '{name}' means")

    def _term(self, name: str) -> Iterator[Finding]:
        """Omission, turned negation and lost doubt of one English term."""
        equals = (name, *glossary()[name].also)
        asserted, denied = self.en.asserts(name), self.en.denies(name)
        said = [other for other in equals if other in self.tr.claims]
        if not said:
            if asserted:
                yield self._omitted(name)
            return
        tr_asserts = any(self.tr.asserts(other) for other in said)
        tr_denies = any(self.tr.denies(other) for other in said)
        if asserted and not denied and not tr_asserts:
            yield _critical("negation", f"'{name}' is stated in English and denied in Turkish")
        stated = any(self.tr.asserts_plainly(other) and not self._true_of_another(other) for other in said)
        if denied and not asserted and stated and not tr_denies:
            yield _critical("negation", f"'{name}' is denied in English and stated in Turkish")
        if asserted and tr_asserts and self._only_hedged(self.en, (name,)) and not self._hedged(self.tr, said):
            yield _warning("certainty", f"'{name}' is uncertain in English and certain in Turkish")

    def _nothing_told(self) -> Iterator[Finding]:
        """Findings that are harmless one by one and all left out: the text is not about this answer."""
        stated = [name for name in self.en.claims if self.en.asserts(name) and not glossary()[name].general]
        told = any(other in self.tr.claims for name in stated for other in (name, *glossary()[name].also))
        if len(stated) > 1 and not told:
            yield _critical("omission", "none of the findings is told")

    def _omitted(self, name: str) -> Finding:
        term = glossary()[name]
        swapped = [other for other in term.contrast if self.tr.asserts(other) and other not in self.en.claims]
        if swapped:
            return _critical("substitution", f"'{name}' became '{sorted(swapped)[0]}'")
        make = _critical if term.critical else _warning
        return make("omission", f"'{name}' is missing")

    def _true_of_another(self, said: str) -> bool:
        """The Turkish term also names something that English asserts ("no acute infarct, old infarct")."""
        return any(self.en.asserts(name) for name in (said, *glossary()[said].also) if name in self.en.claims)

    @staticmethod
    def _hedged(side: _Side, names: tuple[str, ...] | list[str]) -> bool:
        return any(claim.hedged for name in names for _, claim in side.claims[name])

    @staticmethod
    def _only_hedged(side: _Side, names: tuple[str, ...]) -> bool:
        return all(claim.hedged for name in names for _, claim in side.claims[name])

    def _additions(self) -> Iterator[Finding]:
        """Critical terms, and opposites of what English says, that stand in Turkish alone, outside advice and gloss."""
        opposites = {other for name in self.en.claims for other in glossary()[name].contrast}
        implied = {wide for name in self.en.claims for wide in glossary() if name in glossary()[wide].also}
        for name in self.tr.claims:
            term = glossary()[name]
            known = name in self.en.claims or name in implied or any(other in self.en.claims for other in term.also)
            if known or not (term.critical or name in opposites):
                continue
            if self.tr.asserts_plainly(name) and not self._only_hedged(self.tr, (name,)):
                yield _critical("addition", f"'{name}' is not in the English answer")

    def _regions(self) -> Iterator[Finding]:
        en, tr = self.en.regional_text(), self.tr.regional_text()
        for kind, english, turkish in (
            ("laterality", sides(self.en.folded, "en"), sides(self.tr.folded, "tr")),
            ("territory", territories(en, "en"), territories(tr, "tr")),
        ):
            lost, new = english - turkish, turkish - english
            if lost and new:
                yield _critical(kind, f"{', '.join(sorted(lost))} became {', '.join(sorted(new))}")
            elif lost and kind == "territory":
                yield _warning(kind, f"{', '.join(sorted(lost))} is missing")

    def _numbers(self) -> Iterator[Finding]:
        english, turkish = measures(self.en.text), measures(self.tr.text)
        spelt_en, spelt_tr = spelt_numbers(self.en.text), spelt_numbers(self.tr.text)
        lost = [one for one in english if not any(other.says(one) for other in turkish) and not one.values & spelt_tr]
        new = [one for one in turkish if not any(one.says(other) for other in english) and not one.values & spelt_en]
        for one in lost:
            if one.unit in _NO_FINDING:
                continue
            changed = next((other for other in new if _comparable(one, other) or one.values & other.values), None)
            severe = one.unit == "/min" and not any(
                _SEVERE_RATES[0] <= value <= _SEVERE_RATES[1] for value in one.values
            )
            if changed:
                new.remove(changed)
                yield _critical("number", f"{one.written} {one.unit} became {changed.written} {changed.unit}".strip())
            else:
                make = _critical if severe else _warning
                yield make("number", f"{one.written} {one.unit} is missing".replace("  ", " "))
        for other in new:
            yield _warning("number", f"{other.written} {other.unit} is not in the English answer".replace("  ", " "))

    def _ratios(self) -> Iterator[Finding]:
        english, turkish = set(RATIO.findall(self.en.text)), set(RATIO.findall(self.tr.text))
        if english - turkish and turkish - english:
            yield _critical("number", "a conduction ratio changed")
        elif english - turkish:
            yield _warning("number", "a conduction ratio is missing")

    def _leads(self) -> Iterator[Finding]:
        english, turkish = leads(self.en.text), leads(self.tr.text)
        new = [lead for lead in sorted(turkish - english) if not _stands_alone(lead, self.en.text)]
        lost = [lead for lead in sorted(english - turkish) if not _stands_alone(lead, self.tr.text)]
        if new:
            yield _critical("leads", f"{', '.join(new)}: not in the English answer")
        if lost:
            yield _warning("leads", f"{', '.join(lost)}: missing")

    def _urgency(self) -> Iterator[Finding]:
        alarming = [name for name in self.en.claims if glossary()[name].critical and self.en.asserts(name)]
        stated = any(_URGENT.search(sentence) and not _CALM.search(sentence) for sentence in self.tr.sentences())
        if alarming and not stated:
            make = _warning if all(self._only_hedged(self.en, (name,)) for name in alarming) else _critical
            yield make("urgency", f"no urgency is stated although '{alarming[0]}' is")


def _stands_alone(lead: str, text: str) -> bool:
    """A limb lead written where nothing shows that it is one ("inverted in III")."""
    return lead in ("I", "II", "III") and re.search(rf"\bD?{lead}\b", text) is not None


def _comparable(one: Measure, other: Measure) -> bool:
    return not one.unit or not other.unit or one.unit == other.unit or {one.unit, other.unit} == {"s", "ms"}
