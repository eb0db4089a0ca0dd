"""Is the text a finished answer in Turkish at all?"""

from __future__ import annotations

import re
from collections.abc import Iterator

from commentary.record import Finding
from commentary.text import fold, plain, tokens, word_set

_ENGLISH = word_set(
    "the is are was of and with in no this that to for on not your you it be has have there which by from an as at"
    " heart rate rhythm shows normal may should please"
)
_TURKISH = word_set(
    "ve bir bu icin ile olan kalp degil da de daha gibi cok en ya veya ancak olarak var yok kalbin kalbiniz kalbinizin"
    " her hemen gore size sizin doktorunuz normal ise ama kadar sonra once en az"
)
_TURKISH_ENDING = re.compile(
    r"\w{3,}(?:iyor|uyor|dir|dur|tir|tur|lar|ler|lari|leri|siniz|iniz|unuz|nin|nun|ndan|nden|nda|nde|maz|mez|mek|mak"
    r"|abilir|ebilir)"
)
_REFUSALS = re.compile(
    r"yardimci olama|yanit vereme|cevap vereme|yerine getireme|uzgunum|kusura bakma|bir yapay zeka (?:dil )?model|"
    r"yapay zeka olarak|i'?m sorry|i cannot|i can't|as an ai|ceviremem|aciklama yapamam|yorum yapamam|yorumlayamam"
)
_ENDS = re.compile(r"[.!?…][)\]\"'”’»*\s]*$")
_SHORTEST = 20


def form_faults(turkish: str, *, cut_off: bool) -> Iterator[Finding]:
    """Refusal, wrong language, and text that breaks off."""
    text = plain(turkish)
    if _REFUSALS.search(fold(text)):
        yield Finding("refusal", "critical", "the service declined to comment")
    if not _is_turkish(text):
        yield Finding("language", "critical", "the text is not Turkish throughout")
    if cut_off or not _ENDS.search(text):
        yield Finding("cut_off", "critical", "the text breaks off")
    if len(text.strip()) < _SHORTEST:
        yield Finding("length", "critical", "the text is too short to be a commentary")


def _is_turkish(text: str) -> bool:
    """As a whole, and in every sentence of some length, so that a paragraph left in English is noticed."""
    words = tokens(text)
    by_sentence: dict[int, list[str]] = {}
    for word in words:
        by_sentence.setdefault(word.sentence, []).append(word.word)
    if not words or _share_turkish([word.word for word in words], text) < 0.15:
        return False
    return not any(
        len(sentence) >= 6 and _share(sentence, _ENGLISH) > 0.25 and _share(sentence, _TURKISH) < 0.1
        for sentence in by_sentence.values()
    )


def _share(words: list[str], known: frozenset[str]) -> float:
    return sum(word in known for word in words) / len(words)


def _share_turkish(words: list[str], text: str) -> float:
    spelt = len(re.findall(r"\w*[ğışĞİŞ]\w*", text))
    sounding = sum(word in _TURKISH or bool(_TURKISH_ENDING.fullmatch(word)) for word in words)
    return max(spelt, sounding) / len(words)
