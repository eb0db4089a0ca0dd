"""Numbers with their units, and leads, as sets that two languages can be compared by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from commentary.text import fold

_NUMBER = re.compile(
    r"(?<![\w.,:'’])(?P<minus>-|(?<=[:=]\s)-\s|(?:eksi|minus)\s)?(?P<digits>\d+(?:[.,]\d+)*)(?![\d:]|\.\d)"
)
_ORDINAL = re.compile(
    r"\b\d+(?:st|nd|rd|th)\b|\b\d+(?:'?inci|'?nci|'?uncu|'?üncü|'?ıncı|'?ncü)\b|\b\d\.\s*(?=derece|tip)"
    r"|\b\d+[- ](?:lead|derivasyon\w*|kanal\w*)\b|\b(?:type|tip|mobitz|grade|evre|class)\s*\d+\b"
    r"|\bV\d+R?\b|\bD\s?[1-3]\b",
    re.IGNORECASE,
)
_DATE = re.compile(r"\b\d{4}-\d{1,2}-\d{1,2}\b|\b\d{1,2}[./]\d{1,2}[./]\d{2,4}\b|\b\d{1,2}:\d{2}(?::\d{2})?\b")
RATIO = re.compile(r"(?<![\d:])([1-9]):([1-9])(?![\d:])")
_EMERGENCY_NUMBER = 112.0

_SPELT = {
    **{"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10},
    **{"iki": 2, "uc": 3, "dort": 4, "bes": 5, "alti": 6, "yedi": 7, "sekiz": 8, "dokuz": 9, "one": 1, "tek": 1},
}

# The unit behind a number, on folded text; the first that fits.
_UNITS: tuple[tuple[str, str], ...] = (
    ("mm/s", r"mm\s?/\s?s\w*|mm per second|milimetre\s?/\s?saniye"),
    ("mm/mv", r"mm\s?/\s?mv|milimetre\s?/\s?milivolt"),
    ("/min", r"bpm|beats?(?: per |\s?/\s?)min\w*|per min\w*|(?:atim|vuru|atis)\s?/\s?(?:dakika|dk)"
             r"|/\s?(?:dakika|dk|min)\w*|(?:kez|defa|atim|vuru|atis)\w*"),
    ("ms", r"ms(?:n|ec)?\b|millisecond\w*|milisaniye\w*"),
    ("s", r"s(?:n|ec|aniye|econd)?s?\b|saniye\w*|seconds?"),
    ("mv", r"mv\b|milivolt\w*|millivolt\w*"),
    ("mm", r"mm\b|milimetre\w*|millimet\w*"),
    ("cm", r"cm\b|santim\w*|centimet\w*"),
    ("deg", r"°|deg\w*|derece\w*"),
    ("%", r"%|percent"),
    ("year", r"years?\b|year-old|yas\w*|yil\w*|y/o"),
    ("hour", r"hours?|saat\w*"),
    ("mmol", r"m?mol\w*(?:/l)?|meq\w*(?:/l)?"),
)  # fmt: skip
_UNIT_BEHIND = [(unit, re.compile(rf"['’]?\s?-?(?:{pattern})(?!\w)")) for unit, pattern in _UNITS]
_RANGE_BEHIND = re.compile(r"\s?(?:-|/|to|and|ile|ila)\s?-?\d+(?:[.,]\d+)?")
_PER_MINUTE_BEFORE = re.compile(
    r"(?:dakikada|dakika basina|dakikadaki|heart rate(?: of| is)?)\s*(?:\w+\s){0,2}(?:\d+\s?-\s?)?$"
)
_SLOWER_OR_FASTER_BEFORE = re.compile(r"\b(saniyede|saatte|gunde)\s(?:\w+\s){0,2}$")
_PERCENT_BEFORE = re.compile(r"(?:%|yuzde )\s?$")


@dataclass(frozen=True)
class Measure:
    """A number as written.  ``values`` holds its possible readings: Turkish writes 1.200 for 1200 and 0,12 for 0.12."""

    written: str
    values: frozenset[float]
    unit: str

    def says(self, other: Measure) -> bool:
        """The same quantity; seconds and milliseconds are one unit, and a unit may be left out by one side."""
        if self.unit and other.unit and self.unit != other.unit:
            return {self.unit, other.unit} == {"s", "ms"} and bool(self._in_ms() & other._in_ms())
        return bool(self.values & other.values)

    def _in_ms(self) -> frozenset[float]:
        scale = 1000 if self.unit == "s" else 1
        return frozenset(round(value * scale, 3) for value in self.values)


def measures(text: str) -> list[Measure]:
    """The numbers of plain text, without ordinals, lead names, ratios, dates and the emergency number."""
    text = _DATE.sub(lambda match: " " * len(match[0]), text)
    text = RATIO.sub(lambda match: " " * len(match[0]), text)
    text = _ORDINAL.sub(lambda match: " " * len(match[0]), text)
    folded = fold(text)
    found = []
    for match in _NUMBER.finditer(folded):
        values = _readings(match["digits"])
        minus = match["minus"] and not folded[: match.start()].rstrip().endswith(tuple("0123456789"))
        if minus:
            values = frozenset(-value for value in values)
        measure = Measure(match[0].strip(), values, _unit(folded, match.start(), match.end()))
        if values != {_EMERGENCY_NUMBER} or measure.unit:
            found.append(measure)
    return found


def spelt_numbers(text: str) -> frozenset[float]:
    """Small numbers written as words; Turkish "bir" and "on" are left out, being other words too."""
    return frozenset(float(_SPELT[word]) for word in re.findall(r"[a-z]+", fold(text)) if word in _SPELT)


def _readings(digits: str) -> frozenset[float]:
    if not re.search("[.,]", digits):
        return frozenset({float(digits)})
    readings = {digits.replace(",", ".")} if digits.count(".") + digits.count(",") == 1 else set()
    if re.fullmatch(r"[1-9]\d{0,2}(?:[.,]\d{3})+", digits):
        readings.add(re.sub("[.,]", "", digits))
    return frozenset(float(reading) for reading in readings)


def _unit(folded: str, start: int, end: int) -> str:
    if _PERCENT_BEFORE.search(folded[:start]):
        return "%"
    if other := _SLOWER_OR_FASTER_BEFORE.search(folded[max(0, start - 60) : start]):
        return other[1]
    ahead = folded[end : end + 40]
    for rest in (ahead, ahead[match.end() :] if (match := _RANGE_BEHIND.match(ahead)) else ""):
        for unit, pattern in _UNIT_BEHIND:
            if rest and pattern.match(rest):
                return unit
    return "/min" if _PER_MINUTE_BEFORE.search(folded[max(0, start - 60) : start]) else ""


_ATOM = r"(?:[aA][vV][rRlLfF]|V\s?[1-9]R?|D?(?:III|II|I)|D\s?[1-3])"
_SUFFIX = r"(?:['’][a-zçğıöşü]+)?"
_JOIN = r"\s*(?:,?\s*(?:and|ve|ile|to|through|ila)\s+|[,/&-]\s*|\s)\s*"
_LEAD_LIST = re.compile(rf"(?<![\w'’]){_ATOM}{_SUFFIX}(?:{_JOIN}{_ATOM}{_SUFFIX})*(?!\w)")
_LEAD = re.compile(_ATOM)
_ROMANS = {"I": "I", "II": "II", "III": "III", "1": "I", "2": "II", "3": "III"}
_NO_LEAD_BEFORE = re.compile(r"(?:mobitz|type|tip|tipi|class|evre|grade|sinif)\s*$")


def leads(text: str) -> frozenset[str]:
    """Lead names in text of either language, ranges spelt out; "I" to "III" only where a list or "lead" shows them."""
    found: set[str] = set()
    for match in _LEAD_LIST.finditer(text):
        before, after = (
            fold(text[max(0, match.start() - 30) : match.start()]),
            fold(text[match.end() : match.end() + 25]),
        )
        names = [(_name(atom[0]), atom.start(), atom.end()) for atom in _LEAD.finditer(match[0])]
        certain = any(name[0] in "aV" or match[0][start] == "D" for name, start, _ in names)
        named = re.search(r"(?:leads?|derivasyon\w*)\s*:?\s*\(?$", before) or re.match(
            r"\s*\)?(?:lead|derivasyon)", after
        )
        if _NO_LEAD_BEFORE.search(before) or not (certain or named or len(names) > 1):
            continue
        found.update(name for name, _, _ in names)
        for (left, _, left_end), (right, right_start, _) in pairwise(names):
            between = fold(match[0][left_end:right_start])
            spans = "-" in between or re.search(r"\b(?:to|through|ila)\b|^['’]?d[ae]n\b", between)
            between_both = "ile" in between and re.match(r"\s*(?:aras|dahil)", after)
            if (spans or between_both) and left[0] == right[0] == "V":
                found.update(f"V{n}" for n in range(int(left[1]), int(right[1]) + 1))
    return frozenset(found)


def _name(atom: str) -> str:
    atom = re.sub(r"\s", "", atom)
    if atom[0] in "aA":
        return "aV" + atom[2].upper()
    return atom if atom[0] == "V" else _ROMANS[atom.removeprefix("D")]
