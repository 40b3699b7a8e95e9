"""The words of a text as BM25 counts them, in any script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import Stemmer

from tct_hf.data.near_duplicates import UNSPACED

LANGUAGE, STEMMER = "english", "auto"
# `\w` first, and alone: the search then looks for a set of characters, twice as fast as for either of two.
_ASCII_WORD = re.compile(r"\w(?:\w+|(?<!\w'\w)(?!'\w\w))", re.ASCII)
_HANGUL = "\uac00-\ud7a3"
# Joiners, variation selectors and keycaps; vowel points of Hebrew and Arabic, which few write: parts of no word.
_IGNORED = (
    "\u00ad\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0640\u064b-\u0652\u0670\u200c\u200d\u20e3\u2060"
    "\ufe00-\ufe0f\ufeff"
)
# What NFKC makes plain letters of: Thai and Lao am, styled letters, ligatures, half and full width.
_FORMS = "\u0e33\u0eb3\ufb00-\ufdff\ufe70-\ufefe\uff00-\uffef\U0001d400-\U0001d7ff"
_ANY_IGNORED, _FORM = re.compile(f"[{_IGNORED}]+"), re.compile(f"[{_FORMS}]+")
# Persian writes it between the parts of a word, which others write apart.
_PERSIAN_JOINER = re.compile("(?<=[\u0600-\u06ff])\u200c")
# Languages that neither bm25s nor PyStemmer has words of; they need none to be searched.
_PLAIN = ("burmese", "hebrew", "japanese", "khmer", "lao", "thai", "ukrainian", "urdu", "vietnamese")


class _Memo(dict[str, Any]):
    """What is made of words, once of each; reading is faster than a call of a cached function."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        self._make = make

    def __missing__(self, word: str) -> Any:
        made = self._make(word)
        if isinstance(made, str) or len(made) < 8:  # no sentence without spaces, which does not come again
            self[word] = made
        return made


def analyser(language: str, stemmer: str | None) -> Callable[[str], list[str]]:
    """Make the function from text to terms: lower case, NFC, words, stop words out, stems.

    A word keeps the combining marks that its vowels are written with, but for points of Hebrew and Arabic. What
    follows an apostrophe alone, as in "don't", or stands before one, as in "l'eau", is no word. Of scripts that are
    written without spaces, each letter is a term and so is each pair of neighbours; of a Korean word, it and each pair
    of its syllables. Full and half width, ligatures and styled letters are as their plain letters (NFKC), digits of
    any script as 0 to 9, and a German sharp s as two.
    """
    stop_words = _stop_words(language)
    name = stemmer_of(language, stemmer)
    stems = _Memo(Stemmer.Stemmer(name).stemWord if name is not None else str)
    found_words, words, in_letters, run, letter = _patterns()
    digits = _digits()

    def parts(word: str) -> Iterator[str]:
        if not in_letters.search(word):
            yield word
            return
        for found in run.findall(word):
            letters = letter.findall(found) if in_letters.match(found) else [found]
            if found[0] < "\uac00" or found[0] > "\ud7a3":
                yield from letters
            elif len(letters) != 2:
                yield found
            yield from map("".join, pairwise(letters))

    def terms_of(word: str) -> list[str]:
        plain = _FORM.sub(lambda form: unicodedata.normalize("NFKC", form.group()).casefold(), word)
        plain = _ANY_IGNORED.sub("", _PERSIAN_JOINER.sub(" ", plain))
        plain = unicodedata.normalize("NFC", plain).translate(digits)
        found = (part for one in words.findall(plain) for part in parts(one))
        return [stems[part] for part in found if part not in stop_words]

    terms = _Memo(terms_of)

    def analyse(text: str) -> list[str]:
        if text.isascii():
            return [stems[word] for word in _ASCII_WORD.findall(text.lower()) if word not in stop_words]
        # In lower case a Turkish capital I has a second dot.
        text = unicodedata.normalize("NFC", text.casefold()).replace("i\u0307", "i")
        return [term for word in found_words.findall(text) for term in terms[word]]

    return analyse


def stemmer_of(language: str, stemmer: str | None) -> str | None:
    """The Snowball language that a setting stands for, "auto" being that of the stop words; None for whole words."""
    language, name = language.lower(), stemmer and stemmer.lower()
    auto = name == STEMMER
    if auto:
        name = "english" if language == "none" else language.removesuffix("_plus")
    try:
        return name if name is None or Stemmer.Stemmer(name) else None
    except KeyError:
        if auto:
            return None
        raise ValueError(f"stemmer: {stemmer!r} is not one of {', '.join(Stemmer.algorithms())}") from None


def _stop_words(language: str) -> frozenset[str]:
    from bm25s.tokenization import _infer_stopwords

    name = language.lower()
    if name in ("none", *_PLAIN):
        return frozenset()
    try:
        return frozenset(map(str.casefold, _infer_stopwords(name)))
    except ValueError as error:
        if name in Stemmer.algorithms():
            return frozenset()
        raise ValueError(f'language: no stop words for {language!r} ({error}); pass language="none"') from error


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    """Patterns: words as they are written, words, a letter that is a term, parts of a word, and letters."""
    marks = _ranges("M")
    letters = UNSPACED + _HANGUL
    # One range for the marks of rare scripts: with each of theirs the search would take ten times as long.
    wide = rf"\w{_ranges('M', 0x10000)}{_IGNORED}\U00010480-\U0001efff"
    written = rf"\w(?:[{wide}]+|(?<![{wide}]['\u2019]\w)(?!['\u2019]\w\w))"
    run = rf"[{_HANGUL}]+|[{UNSPACED}][{UNSPACED}{marks}]*|[^{letters}]+"
    every = (written, rf"\w[\w{marks}]*", f"[{letters}]", run, rf"[^{marks}][{marks}]*|[{marks}]+")
    return tuple(map(re.compile, every))


@cache
def _digits() -> dict[int, str]:
    """Digits of other scripts to those of Latin."""
    codes = range(0x300, 0x1F000)
    return {code: str(unicodedata.decimal(chr(code))) for code in codes if unicodedata.category(chr(code)) == "Nd"}


def _ranges(kind: str, end: int = 0x1F000) -> str:
    """The characters beyond Latin of a Unicode category, as ranges of a pattern."""
    codes = [code for code in range(0x300, end) if unicodedata.category(chr(code)).startswith(kind)]
    starts = [code for at, code in enumerate(codes) if not at or codes[at - 1] != code - 1]
    lasts = [code for at, code in enumerate(codes) if at + 1 == len(codes) or codes[at + 1] != code + 1]
    return "".join(f"{chr(start)}-{chr(last)}" for start, last in zip(starts, lasts, strict=True))
