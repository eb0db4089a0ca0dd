"""The question that is put to the service: rules, the glossary entries that the answer needs, and the answer.

Only the (masked) English answer goes in: this module is given nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from string import Template

from commentary.glossary import Term, english_terms, glossary
from commentary.record import Finding
from commentary.text import plain, tokens

PROMPT_VERSION = "turkish_v1"
_OPEN, _CLOSE = "<<<RAPOR", "RAPOR>>>"
_AGAIN = (
    "\n\nBu rapor için yazılan önceki açıklama şu denetimlerden geçemedi; bu kez bunlara özellikle dikkat et:\n{faults}"
)
_FAULTS = {
    "addition": "raporda olmayan bir bulgu eklenmişti",
    "cut_off": "yazı yarım kalmıştı; daha kısa yaz ve son cümleyi bitir",
    "false_friend": "yanlış bir karşılık kullanılmıştı",
    "language": "yazının tümü Türkçe değildi",
    "laterality": "sağ ile sol karışmıştı",
    "leads": "derivasyonlar rapordakilerle aynı değildi",
    "length": "yazının uzunluğu uygun değildi",
    "negation": "var olanla olmayan karışmıştı",
    "number": "bir sayı ya da birimi değişmişti",
    "omission": "önemli bir bulgu atlanmıştı",
    "refusal": "açıklama yapılmamıştı",
    "substitution": "bir bulgu başka bir bulguya dönüşmüştü",
    "territory": "kalp bölgesi değişmişti",
    "urgency": "aciliyet ve 112 belirtilmemişti",
}


@cache
def _template() -> Template:
    return Template(files("commentary").joinpath("prompts", f"{PROMPT_VERSION}.md").read_text("utf-8"))


def messages(english: str, findings: Sequence[Finding] = ()) -> list[dict[str, str]]:
    """Chat messages for one answer; ``findings`` of a first attempt are named, so that the second avoids them."""
    said = dict.fromkeys(match.key for match in english_terms().find(tokens(plain(english))))
    entries = "\n".join(_line(glossary()[name]) for name in said) or "(bu rapor için özel terim yok)"
    report = re.sub(r"<{2,}|>{2,}", " ", english).strip()  # no bracket, nor what would become one
    question = f"{_OPEN}\n{report}\n{_CLOSE}"
    if findings:
        lines = (f"- {_FAULTS.get(f.rule, f.rule)}: {f.detail}" for f in findings if f.severity == "critical")
        question += _AGAIN.format(faults="\n".join(lines))
    return [
        {"role": "system", "content": _template().substitute(glossary=entries)},
        {"role": "user", "content": question},
    ]


def _line(term: Term) -> str:
    avoid = f"; KULLANMA: {', '.join(term.false_friends)}" if term.false_friends else ""
    return f"- {term.en} = {term.tr}: {term.gloss}{avoid}"
