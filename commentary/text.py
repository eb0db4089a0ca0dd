"""Text as the checks see it: folded letters, tokens with their sentence and parenthesis, terms with free suffixes."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Literal, TypeVar

Language = Literal["en", "tr"]
K = TypeVar("K")

_FOLDS = str.maketrans("ışğüöçâîûé", "isguocaiue")
_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W\d_]+)?")
_ENUMERATOR = re.compile(r"(?m)^\s*(?:\d{1,2}[.)](?!\s*(?:derece|tip))|[-•–])\s+")
_INLINE_ENUMERATOR = re.compile(r"(?<=[:.;)] )\d{1,2}[.)] (?=[A-ZÇĞİÖŞÜ])")
_SENTENCE_END = re.compile(r"(?<!\d)[.!?…]+(?=\s|$|[\"”»)])|(?<=\d)[.!?…](?=\s+[A-ZÇĞİÖŞÜ]|\s*$)|[;\n]+")
_GAP = 5


def clean(text: str) -> str:
    """Text that any encoder takes: no lone surrogates, no control characters but tab and newline."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(c for c in whole if c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0))


def word_set(words: str) -> frozenset[str]:
    """The words of a space-separated list."""
    return frozenset(words.split())


def fold(text: str) -> str:
    """Lower case without diacritics, of the same length: Turkish "SAĞ", "sağ" and "Sag" become one word.

    Dotted and dotless i fall together, so that it does not matter which rule of casing a writer followed.
    """
    return "".join(c if len(c) == 1 else c[0] for c in (letter.replace("İ", "i").lower() for letter in text)).translate(
        _FOLDS
    )


def plain(text: str) -> str:
    """Composed letters, no mark-up, no list numbers, one kind of dash and space, "V1-4" as "V1-V4".

    No white space or punctuation is left in long runs, over which searches would take the square of their length.
    """
    text = re.sub(r"[*#`_>|]+", " ", unicodedata.normalize("NFC", text))
    text = re.sub(r"(?: ?\n)+ ?", "\n", re.sub(r"[^\S\n]+", " ", text))
    text = re.sub(r"([.!?…])[.!?…]{2,}", r"\1", re.sub(r"[‐‑‒–—−]", "-", text))
    text = _INLINE_ENUMERATOR.sub("", re.sub(" +", " ", _ENUMERATOR.sub("", text)))
    return re.sub(r"\bV([1-9]) ?- ?([1-9])\b", r"V\1-V\2", text)


@dataclass(frozen=True, slots=True)
class Token:
    """A folded word.  ``depth`` counts the parentheses around it; ``after`` is the punctuation before it."""

    word: str
    sentence: int
    depth: int
    after: str
    start: int
    end: int


def tokens(text: str) -> list[Token]:
    """The words of :func:`plain` text; a suffix behind an apostrophe ("V1'de") is left off the word."""
    ends = [match.start() for match in _SENTENCE_END.finditer(text)]
    found: list[Token] = []
    sentence = depth = last = 0
    for match in _TOKEN.finditer(text):
        between = text[last : match.start()]
        while sentence < len(ends) and ends[sentence] < match.start():
            sentence += 1
        depth = max(0, depth + between.count("(") - between.count(")"))
        word = fold(re.split("['’]", match[0])[0])
        found.append(Token(word, sentence, depth, between, match.start(), match.end()))
        last = match.end()
    return found


# Case, possession, plural, copula and derivation, in any order, with the buffer letters; on folded letters.
_SUFFIX = (
    r"(?:l[ae]r|l[iu][kg]|l[iu]|s[iu]z|c[ae]|[yn]?[dt][ae](?:n|ki)?|[ysn]?[iu]n?|[yn]?[ae]|y?l[ae]|[iu]m[iu]z"
    r"|n[iu]z|[dt][iu]r|ki|s[ae]l|[iu]c[iu])"
)
_SHORT_SUFFIX = r"(?:[dt][ae](?:n|ki)?|[ysn]?[iu]n?|y?[ae]|yl[ae]|s[iu]nd[ae]n?)"
_SOFTENED = {"k": "[kg]", "t": "[td]", "p": "[pb]"}
_IRREGULAR = {"ritim": "riti?m", "kalp": "kal[pb]", "seyir": "seyi?r", "tip": "tip"}


# Words that a gap never bridges: waves and segments, and what opens another statement.
_GAP_STOPS: dict[Language, frozenset[str]] = {
    "en": word_set("or and no with old prior previous remote acute but without than rather versus vs"),
    "tr": word_set("pr qrs st qt qtc t p q r u var yok degil akut eski gecirilmis ancak ama fakat"),
}


# "Also", which Turkish puts between a term's words: "QT aralığı da uzamış".
_PARTICLES: dict[Language, frozenset[str]] = {"en": frozenset(), "tr": word_set("da de")}


@lru_cache(maxsize=4096)
def _word_pattern(word: str, language: Language) -> re.Pattern[str]:
    if word.endswith("*"):
        return re.compile(re.escape(word[:-1]) + r"\w*")
    if language == "en":
        return re.compile(re.escape(word) + "(?:e?s)?")
    if len(word) <= 2:  # abbreviations and Roman numbers: "II" is no suffixed "I"
        return re.compile(re.escape(word))
    stem = _IRREGULAR.get(word) or re.escape(word[:-1]) + _SOFTENED.get(word[-1], re.escape(word[-1]))
    suffix = f"{_SHORT_SUFFIX}?" if len(word) <= 3 else _SUFFIX + "{0,5}"
    return re.compile(stem + suffix)


@dataclass(frozen=True, slots=True)
class Match(Generic[K]):
    """Tokens ``first`` to ``last`` (inclusive) say what ``key`` stands for; ``solid`` without words in between."""

    key: K
    first: int
    last: int
    solid: bool


class TermIndex(Generic[K]):
    """Finds terms in tokens, the longest first, without overlaps.

    A term is words with the language's suffixes allowed; ``stem*`` takes any ending and ``_`` up to five words
    in between, none of which starts another statement.  Particles may stand anywhere.  A term never crosses a
    sentence, a comma or a parenthesis.  Where the longest reading bridges a gap, what stands in the gap counts too:
    "ST yükselmesi ya da çökmesi" names both.
    """

    def __init__(self, terms: Iterable[tuple[K, str]], language: Language) -> None:
        self._language = language
        self._by_start: dict[str, list[tuple[K, tuple[str, ...]]]] = defaultdict(list)
        for key, term in terms:
            words = tuple(re.findall(r"[^\W_]+\*?|_", re.sub(r"['’]\w+", "", fold(term))))
            self._by_start[words[0][:2].rstrip("*")].append((key, words))

    def find(self, text: Sequence[Token]) -> list[Match[K]]:
        found: list[Match[K]] = []
        at = 0
        while at < len(text):
            here = self._at(text, at)
            found += here
            at = here[0].last + 1 if here and here[0].solid else at + 1
        return found

    def _at(self, text: Sequence[Token], at: int) -> list[Match[K]]:
        """The longest reading, and the longest without a gap where that is another term."""
        longest: Match[K] | None = None
        solid: Match[K] | None = None
        for key, words in self._by_start.get(text[at].word[:2], ()):
            last = self._end(text, at, words)
            if last is None:
                continue
            match = Match(key, at, last, last - at + 1 == len(words) - words.count("_"))
            if longest is None or last > longest.last:
                longest = match
            if match.solid and (solid is None or last > solid.last):
                solid = match
        different = longest and solid and longest.key != solid.key and longest.last > solid.last
        return [match for match in (solid if different else None, longest) if match]

    def _end(self, text: Sequence[Token], at: int, words: Sequence[str]) -> int | None:
        last, gap = at - 1, False
        for word in words:
            if word == "_":
                gap = True
                continue
            pattern = _word_pattern(word, self._language)
            particle = at <= last < len(text) - 1 and text[last + 1].word in _PARTICLES[self._language]
            reach = range(last + 1, last + 2 + (_GAP if gap else particle))
            last_found = next((i for i in reach if i < len(text) and pattern.fullmatch(text[i].word)), None)
            if last_found is None or not _joined(text, at, last_found):
                return None
            if any(text[i].word in _GAP_STOPS[self._language] for i in range(last + 1, last_found)):
                return None
            last, gap = last_found, False
        return last


def _joined(text: Sequence[Token], first: int, last: int) -> bool:
    same_sentence = text[first].sentence == text[last].sentence
    return same_sentence and not any(re.search(r"[,()]|:\s", text[i].after) for i in range(first + 1, last + 1))
