"""The glossary of ECG terms: what the prompt teaches and what the checks look for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from commentary.text import TermIndex


@dataclass(frozen=True)
class Term:
    """One entry of ``glossary.json``.

    ``false_friends`` are Turkish words that a careless translation of this term uses; ``contrast`` names terms
    that this one must not become; ``also`` names narrower terms whose Turkish says this one too.  A ``critical``
    term must not be left out; an ``absence`` says that something is missing.  A ``general`` term guides the wording
    and is not looked for in the Turkish text.
    """

    en: str
    tr: str
    gloss: str
    category: str
    variants: tuple[str, ...] = ()
    tr_variants: tuple[str, ...] = ()
    false_friends: tuple[str, ...] = ()
    contrast: frozenset[str] = frozenset()
    also: frozenset[str] = frozenset()
    critical: bool = False
    absence: bool = False
    general: bool = False


@cache
def glossary() -> dict[str, Term]:
    """All entries by their English name."""
    entries: list[dict[str, Any]] = json.loads(files("commentary").joinpath("glossary.json").read_text("utf-8"))
    terms = [Term(**{name: _frozen(name, value) for name, value in entry.items()}) for entry in entries]
    return {term.en: term for term in terms}


def _frozen(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return frozenset(value) if name in ("contrast", "also") else tuple(value)


@cache
def english_terms() -> TermIndex[str]:
    """Finds entries in English text, by name or variant."""
    return TermIndex([(term.en, form) for term in glossary().values() for form in (term.en, *term.variants)], "en")


@cache
def turkish_terms() -> TermIndex[str]:
    """Finds entries in Turkish text; general ones are left out."""
    wanted = [term for term in glossary().values() if not term.general]
    return TermIndex([(term.en, form) for term in wanted for form in (term.tr, *term.tr_variants)], "tr")


@cache
def false_friends() -> dict[str, TermIndex[str]]:
    """For each English name, a finder of its false friends; the key found is the false friend itself."""
    return {
        term.en: TermIndex([(word, word) for word in term.false_friends], "tr")
        for term in glossary().values()
        if term.false_friends
    }
