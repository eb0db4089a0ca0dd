"""Is a term asserted or denied where it stands?  English negates before the term, Turkish behind it.

English follows NegEx (Chapman et al. 2001): a trigger reaches to the right until a clause ends.  In Turkish the
first predicate behind the term decides ("ST yükselmesi izlenmedi"), or the term's own suffix ("yükselmesiz").
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass

from commentary.text import Token


@dataclass(frozen=True, slots=True)
class Claim:
    """What is said of a term at one place.  Both where a list may or may not belong to the predicate at its end."""

    asserted: bool
    denied: bool
    hedged: bool


_REACH = 60  # words to either side; no sentence worth reading is longer
_EN_NEGATIONS = frozenset(
    {"no", "without", "not", "absence", "absent", "negative", "denies", "neither", "nor", "lacks", "never"}
)
_EN_STOPS = frozenset(
    {"but", "however", "although", "though", "except", "yet", "whereas", "while", "despite", "there", "with", "which",
     "is", "are", "was", "were", "has", "have", "shows", "show", "suggests", "suggest", "indicates", "indicate",
     "demonstrates"}
)  # fmt: skip
# Behind the term, at most five words on: "ST elevation or depression is not seen", "ischemia: none".
_EN_DENIED_AFTER = re.compile(
    r"^(?:\W+\w+){0,5}?\W+(?:not (?:present|seen|evident|observed|identified|noted|detected|found|visible|apparent)"
    r"|(?:is|are|was|were|be) (?:\w+ )?(?:absent|unlikely)|(?:been |is |are |was |were )?(?:ruled out|excluded))\b"
    r"|^\s*[:=]\s*(?:no|none|absent|negative)\b"
)
_EN_OPEN = re.compile(r"\b(?:must|should|needs? to|has to|have to|to) (?:\w+ )?be (?:\w+ )?(?:ruled out|excluded)\b")
_EN_HEDGES = re.compile(
    r"\b(?:possibl[ey]|probabl[ey]|may|might|could|suspected|suspicious|suggest(?:s|ive|ing)?|likely|cannot|can't|consider"
    r"|rule out|question(?:able)?|concern(?:ing)? for|not (?:be )?excluded|perhaps|potential(?:ly)?|appears?)\b"
)
_EN_HEDGED_AFTER = re.compile(
    r"^[^,;]*\b(?:(?:is|are|be) (?:\w+ )?(?:possible|likely|suspected|considered|questionable)|cannot)\b"
)
_EN_CANNOT = re.compile(
    r"\b(?:cannot|can not|can't|could not|not possible to|not)\b.{0,40}\b(?:ruled out|rule out|excluded?)\b"
)
_EN_BREAK = re.compile(
    r"\b(?:but|however|although|whereas|while|as|because|since)\b|[,;] (?:and|the|there|which|with)\b"
)

_TR_DENIALS = re.compile(
    r"yok(?:tur)?|degil(?:dir)?|dislan(?:di|mis\w*|arak)|olmaksizin"
    r"|\w{2,}m[ae](?:d[iu]\w*|m[iu]s(?:t[iu]r)?|mekte\w*|makta\w*|z|yan\w*|yen\w*|y[iu]p|dan|den)|\w{2,}m[iu]yor\w*"
)
_TR_AFFIRMATIONS = re.compile(
    r"var(?:dir)?|olup|\w{2,}m[ae]kle|mevcut(?:tur)?|\w{2,}[iu]yor(?:du|mus)?|\w{2,}m[ae]kt[ae](?:dir)?|\w{2,}m[iu]s(?:t[iu]r)"
    r"|\w{2,}[ae]bilir|(?:gorul|izlen|saptan|bulun|gozlen|ol|ed[iu]l|gor|kaydedil|rastlan|sapta)(?:d[iu]|mus|mis)"
    r"|(?:gorul|izlen|saptan|bulun|gozlen|ed[iu]l)(?:m[ae]si|[iu]r)|uyumlu(?:dur)?|normal(?:dir)?|(?:dusundur|destekle)(?:uyor|ur|r|mustur)"
)
_TR_CONTRASTS = frozenset({"ancak", "ama", "fakat", "oysa", "lakin", "ragmen", "karsin"})
_TR_CAUSES = frozenset(
    {
        "nedeniyle",
        "dolayi",
        "yuzunden",
        "varliginda",
        "oldugundan",
        "oldugu",
        "sebebiyle",
        "disinda",
        "haricinde",
        "haric",
    }
)
_TR_NO_DENIAL_BEFORE = re.compile(
    r"disla\w*|ekarte|ihmal|ardi|gecik\w*|unut\w*|kesin(?:lik\w*)?|net|yalnizca|sadece|tek|sart|atla\w*|sayil\w*"
)
_TR_OPEN = re.compile(r"dislanm[ae]\w*|dislanam\w*|dislayam\w*|(?:yorumlan|degerlendiril|olcul|okun|hesaplan)[ae]m\w*")
_TR_WITHOUT_DELAY = re.compile(r"(?:bekle|gecik|geciktir|kaybet|oyalan|ertele)m[ae]d[ae]n")
_TR_HEDGES = re.compile(
    r"olasi\w*|ol(?:abil|mus olabil)\w*|muhtemel\w*|mumkun\w*|ihtimal\w*|suphe\w*|kusku\w*|dusundur\w*|belki|sanki"
    r"|\w*[ae]bil\w*|dislan[ae]m\w*|dusun\w*|gorun\w*|izlenim\w*|degerlendiril\w*|bakilmali\w*|akla"
)


_TR_WITHOUT = re.compile(r"(?!(?:duzen|yeter|denge|yanit)siz)\w{4,}s[iu]z(?:d[iu]r)?")  # "irregular" denies nothing


def english_claim(text: str, words: Sequence[Token], first: int, last: int, *, named: Set[int] = frozenset()) -> Claim:
    """What the English sentence says of the term at tokens ``first`` to ``last``; ``text`` is what was tokenised.

    ``named`` are the tokens of all terms: the "absent" of "absent P waves" denies no other.
    """
    start, end = _sentence(words, first, last)
    before = text[words[start].start : words[first].start].lower()
    after = _EN_BREAK.split(text[words[last].end : words[end].end].lower())[0]
    clause = _EN_BREAK.split(before)[-1]
    hedged = bool(_EN_HEDGES.search(re.split("[,:]|explain|because", clause)[-1]) or _EN_HEDGED_AFTER.search(after))
    whole = text[words[start].start : words[end].end].lower()
    if _EN_CANNOT.search(whole) and (_EN_CANNOT.search(after) or "cannot" in clause or "not" in clause):
        return Claim(True, False, True)
    if _EN_OPEN.search(after):
        return Claim(True, False, True)
    if any(word.word == "not" for word in words[first + 1 : last]):  # "the QT interval is not prolonged"
        return Claim(False, True, hedged)
    if _EN_DENIED_AFTER.search(after) and not re.search(r",.*\b(?:absent|excluded|not)\b", after):
        return Claim(False, True, hedged)
    denied = _english_trigger(words, start, first, named)
    return Claim(not denied, denied, hedged)


def _english_trigger(words: Sequence[Token], start: int, first: int, named: Set[int]) -> bool:
    for at in range(first - 1, start - 1, -1):
        word = words[at].word
        if word in _EN_NEGATIONS and (at not in named or any(w.word in ("or", "nor") for w in words[at:first])):
            only = at + 1 < len(words) and words[at + 1].word in ("only", "longer")
            return not only
        opened = re.match(r"\s*[,:]", words[at + 1].after) and words[at + 1].word in ("and", "the", "there")
        if word in _EN_STOPS or ":" in words[at + 1].after or opened:
            return False
    return False


def turkish_claim(words: Sequence[Token], first: int, last: int, *, absence: bool = False) -> Claim:
    """What the Turkish sentence says of the term at tokens ``first`` to ``last``.

    ``absence`` marks a term whose own name denies something ("P dalgası görülmüyor").
    """
    start, end = _sentence(words, first, last)
    hedged = any(_TR_HEDGES.fullmatch(word.word) for word in words[start : end + 1])
    if not absence and last > first and _TR_DENIALS.fullmatch(words[last].word):  # "QT aralığı uzamamış"
        return Claim(False, True, hedged)
    if not absence and _TR_WITHOUT.fullmatch(words[last].word):
        return Claim(False, True, hedged)
    if re.search(r"[dt][iu]r$", words[last].word):
        return Claim(True, False, hedged)
    depth, listed = words[last].depth, False
    for at in range(last + 1, end + 1):
        word = words[at]
        if word.depth > depth:
            continue
        depth = min(depth, word.depth)
        listed = listed or "," in word.after or word.word == "ve"
        if word.word in _TR_CONTRASTS or word.word in _TR_CAUSES:
            break
        if _TR_OPEN.fullmatch(word.word):
            return Claim(True, False, True)
        if _TR_DENIALS.fullmatch(word.word) and not _TR_WITHOUT_DELAY.fullmatch(word.word):
            excused = any(_TR_NO_DENIAL_BEFORE.fullmatch(words[i].word) for i in range(max(first, at - 2), at))
            excused = excused or any(words[i].word in ("yalnizca", "sadece") for i in range(start, first))
            return Claim(excused or listed, not excused, hedged or excused)
        followed = at + 1 <= end and words[at + 1].word.startswith(("degil", "yok"))
        if _TR_AFFIRMATIONS.fullmatch(word.word) and not followed:
            break
    return Claim(True, False, hedged)


def _sentence(words: Sequence[Token], first: int, last: int) -> tuple[int, int]:
    start, end = first, last
    while start > max(0, first - _REACH) and words[start - 1].sentence == words[first].sentence:
        start -= 1
    while end + 1 < min(len(words), last + _REACH) and words[end + 1].sentence == words[last].sentence:
        end += 1
    return start, end
