"""Obvious personal identifiers are masked before the answer leaves the machine.

Masked: names behind a label or a title, Turkish identity numbers, dates of birth, record numbers, telephone numbers,
e-mail and web addresses, file names.  This catches what is written in the usual ways; it is no anonymiser.
"""

from __future__ import annotations

import re
from functools import cache

from commentary.glossary import glossary
from commentary.text import word_set

_WORD = r"(?![PQRSTUJ][ -](?i:waves?|points?|segments?)\b)[A-ZÇĞİÖŞÜ](?:\.|[\w'’-]{0,40})"  # "T wave" is nobody
_GAP = r"[ \t]+"
_NAME = rf"{_WORD}(?:,?{_GAP}{_WORD}){{0,3}}"
_LABEL = (
    r"(?:patient(?:['’]s)?(?:\s+name)?|name(?:\s+of\s+(?:the\s+)?patient)?|full\s+name|surname|first\s+name|last\s+name"
    r"|hasta(?:n[ıi]n)?(?:\s+ad[ıi](?:\s+soyad[ıi])?)?|ad[ıi]?(?:[\s-]+soyad[ıi]?)|isim|physician|doctor|referred\s+by|technician)"
)
_LABELLED_NAME = re.compile(
    rf"(?i:\b({_LABEL}\s*+(?:[:=]|\bis\b|-)\s*+\**+\s*+))((?i:(?:mr|mrs|ms|miss|dr|prof)\.?\s+)?{_NAME})"
)
_TITLED_NAME = re.compile(
    rf"\b((?:Mr|Mrs|Ms|Miss|Dr|DR|Prof|PROF|Sn|Sayın|SAYIN)\.?{_GAP})({_NAME})"
    rf"|\b({_WORD})({_GAP}(?:Bey|Hanım|BEY|HANIM)\b)"
)
_NAMED_PATIENT = re.compile(rf"\b([Pp]atient,?{_GAP})({_WORD}{_GAP}{_NAME})")
_LOWER_CASE_NAME = re.compile(
    r"(?i:\b((?:name|ad[ıi]|soyad[ıi])\s*+[:=]\s*+\**+\s*+))([^\W\d_][\w'’-]+(?:,?[ \t]+[^\W\d_][\w'’-]+)?)"
)
_SIGNED_NAME = re.compile(
    rf"(?i:\b((?:confirmed|interpreted|reviewed|reported|requested|ordered|signed)\s+by[: \t]+))({_WORD}{_GAP}{_NAME})"
)
_INITIAL = re.compile(r"\w\.")
_DATE = (
    r"(?:\d{1,4}[./-]\d{1,2}[./-]\d{1,4}|\d{1,2}(?:st|nd|rd|th)?[\s./-]+[^\W\d_]{3,9}[\s.,/-]+\d{2,4}"
    r"|[^\W\d_]{3,9}\.?\s+\d{1,2}(?:st|nd|rd|th)?,?\s+\d{4}|(?:19|20)\d{2})"
)
_BORN = (
    r"(?:d\.?o\.?b\.?|date\s+of\s+birth|birth\s*date|birthday|born(?:\s+(?:on|in))?"
    r"|do[ğg]um\s+(?:tarihi|y[ıi]l[ıi])|d\.\s?tarihi)"
)
# "In this patient no 2nd degree block", "no Q in V2", "no 1-2 mm elevation" have no number.
_NO = r"no(?=\s*+(?:[.:=#]|[\w/-]{0,40}\d{3}|\d[\d/-]{0,40}\s*(?:[.,;)\n]|\Z)))"
_RECORD = (
    rf"(?:mrn|medical\s+record(?:\s+(?:number|{_NO}))?|accession(?:\s*(?:number|{_NO}))?"
    rf"|(?:record|patient|hospital|file|visit|case|order|study|exam|account)\s*(?:id|number|#|{_NO})|id(?=\s*[:=#])"
    r"|protokol(?:\s*(?:no|numaras[ıi]))?|(?:dosya|kay[ıi]t|ar[şs]iv)\s*(?:no|numaras[ıi])|hasta\s*no|tckn|national\s+id"
    r"|(?:t\.?c\.?\s*)?kimlik\s*(?:no|numaras[ıi])|identity\s+(?:number|no)|ssn|passport(?:\s*(?:number|no))?)"
)
_FILE_ENDINGS = "jpe?g|png|gif|bmp|webp|tiff?|pdf|dcm|dicom|xml|hea|dat|csv"
# Possessive: where several could share out a run of white space, a search would try every way to do it.
_MASKS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(?:https?|ftp|s3|file)://\S+|\bwww\.\S+", re.I), "[ADRES]"),
    (re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+"), "[E-POSTA]"),
    (re.compile(rf"(?<![\w~./\\-])(?:[\w~.-]{{0,255}}[/\\])*[\w-]{{1,255}}\.(?:{_FILE_ENDINGS})\b", re.I), "[DOSYA]"),
    (re.compile(r"(?<![\d.,])[1-9]\d{10}(?!\d|[.,]\d)"), "[KİMLİK NO]"),
    (re.compile(r"(?<![\d.,])[1-9]\d{2}[ -]\d{3}[ -]\d{3}[ -]\d{2}(?!\d)"), "[KİMLİK NO]"),
    (
        re.compile(
            rf"(?i:(\b{_BORN}\s*+\.?\s*+(?:\([^()\n]{{1,20}}\)\s*+)?[:=-]?\s*+(?:is\s++)?\**+\s*+))(?i:{_DATE})"
        ),
        r"\1[DOĞUM TARİHİ]",
    ),
    (
        re.compile(rf"(?i:(\b{_RECORD}\s*+\.?\s*+[:=#]{{0,2}}+\s*+(?:is\s++)?\**+\s*+))(?=[\w/-]*\d)[\w/-]+"),
        r"\1[KAYIT NO]",
    ),
    (re.compile(r"(?<![\w.,])(?:\+\d{1,3}[ -]?)?\(?0?[2-9]\d{2}\)?[ -]?\d{3}[ -]?\d{2}[ -]?\d{2}(?!\d)"), "[TELEFON]"),
)
_LAY = word_set(
    "male female man woman the a an normal abnormal sinus rhythm ecg ekg rate acute old none not unknown with and"
    " has is in no patient heart rhythm interval axis age sex gender date of for this year years"
    " possible probable anonymous"
)


# Words of the glossary that are surnames too: behind "name:", or behind a word that is a name, they are no findings.
_SURNAMES = word_set(
    "white wolff parkinson brugada osborn lown ganong levine mobitz wenckebach prinzmetal wellens long short block rae"
)
_SAYS_NAME = re.compile(r"name|\bad[ıi]\b|soyad|isim", re.IGNORECASE)


@cache
def _clinical_words() -> frozenset[str]:
    forms = (form for term in glossary().values() for form in (term.en, *term.variants))
    return _LAY | {word for form in forms for word in re.findall(r"\w+", form.lower()) if len(word) > 1}


def _clinical(word: str) -> bool:
    return word in _clinical_words() or all(part in _clinical_words() for part in word.split("-"))


def mask(text: str) -> str:
    """The text with placeholders in Turkish where an identifier stood; findings, leads and numbers stay."""
    for pattern, placeholder in _MASKS:
        text = pattern.sub(placeholder, text)
    for pattern in (_LABELLED_NAME, _NAMED_PATIENT, _SIGNED_NAME, _LOWER_CASE_NAME):
        text = pattern.sub(
            lambda match: match[1] + _masked_name(match[2], surely=bool(_SAYS_NAME.search(match[1]))), text
        )
    return _TITLED_NAME.sub(
        lambda match: match[1] + _masked_name(match[2]) if match[1] else _masked_name(match[3]) + match[4], text
    )


def _masked_name(name: str, *, surely: bool = False) -> str:
    """[AD], unless the words are those of a report ("Patient: Sinus rhythm"); clinical words behind a name stay."""
    words = re.split(r"(,?[ \t]+)", name)
    clinical = [_INITIAL.fullmatch(word) is None and _clinical(word.lower().strip(".,")) for word in words]
    surely = surely or ("," in name and not all(clinical[::2]))  # "White, John"
    at = 0
    while at < len(words) and not (clinical[at] and not ((surely or at) and words[at].lower() in _SURNAMES)):
        at += 2
    return name if at == 0 else "".join(["[AD]", *words[at - 1 :]])
