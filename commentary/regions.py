"""Left and right, and the walls of the heart, as sets that two languages can be compared by; on folded text."""

from __future__ import annotations

import re

from commentary.text import Language

_SIDES: dict[Language, dict[str, re.Pattern[str]]] = {
    "en": {
        "left": re.compile(r"\b(?:left(?:ward)?|lbbb|lvh|lafb|lpfb|lae)\b"),
        "right": re.compile(r"\b(?:right(?:ward)?|rbbb|rvh|rae)\b"),
    },
    "tr": {
        "left": re.compile(r"\bsol(?:a|da|dan|daki|un|u)?\b|\b(?:lbbb|lvh|lafb|lpfb)\b"),
        "right": re.compile(r"\bsag(?:a|da|dan|daki|in|i)?\b|\b(?:rbbb|rvh)\b"),
    },
}
_ENGLISH = {
    "anterior": re.compile(r"\bantero\w*|\banterior(?:ly)?\b"),
    "inferior": re.compile(r"\binfero\w*|\binferior(?:ly)?\b"),
    "lateral": re.compile(r"\b(?:antero|infero|postero)?-?lateral(?:ly)?\b"),
    "septal": re.compile(r"\b(?:antero|infero)?-?septal\b|\bseptum\b"),
    "posterior": re.compile(r"\bpostero\w*|\b(?:infero)?-?posterior(?:ly)?\b"),
}
_TURKISH_WORDS = {
    "anterior": ("on", "anterior", "antero"),
    "inferior": ("alt", "inferior", "infero"),
    "lateral": ("yan", "lateral"),
    "septal": ("septal", "septum"),
    "posterior": ("arka", "posterior", "postero"),
}
_LATIN = re.compile(r"antero|anterior|infero|inferior|postero|posterior|(?<!bi)lateral|septal|septum")
_WALL = re.compile(
    r"\b((?:(?:on|alt|yan|arka|septal|septum|lateral|anterior|inferior|posterior)(?:\s+ve\s+|\s*,\s*|\s*-\s*|\s+))+)"
    r"(?:\w+\s+)?(?:duvar|yuz|bolge|kisim|kism|kesim|bolum|taraf|miyokar|derivasyon)"
)
_SEPTUM = re.compile(r"\bseptum\w*|\b(?:bolme|ara) duvar\w*")


def sides(folded: str, language: Language) -> frozenset[str]:
    """ "left" and "right" as named or as held in an abbreviation."""
    return frozenset(side for side, pattern in _SIDES[language].items() if pattern.search(folded))


def territories(folded: str, language: Language) -> frozenset[str]:
    """Walls of the heart.  Turkish "ön", "alt", "yan" and "arka" count only before "duvar", "bölge" and the like."""
    if language == "en":
        return frozenset(name for name, pattern in _ENGLISH.items() if pattern.search(folded))
    words = " ".join([*_LATIN.findall(folded), *_WALL.findall(folded)])
    words += " septum" if _SEPTUM.search(folded) else ""
    said = set(re.findall(r"[a-z]+", words))
    return frozenset(name for name, forms in _TURKISH_WORDS.items() if said & set(forms))
