"""The words of a text as BM25 counts them, in any script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise

import Stemmer

from tct_hf.data.near_duplicates import UNSPACED

LANGUAGE, STEMMER = "english", "auto"
_WORD = re.compile(r"\w\w+|(?<!\w['\u2019])\w(?!['\u2019]\w\w)")
_HANGUL = "\uac00-\ud7a3"
# Soft hyphens, joiners, variation selectors and keycaps, which belong to no word.
_IGNORED = "\u00ad\u200c\u200d\u20e3\u2060\ufe00-\ufe0f\ufeff"
# What NFKC makes plain letters of: Thai and Lao am, styled letters, ligatures, half and full width.
_FORMS = "\u0e33\u0eb3\ufb00-\ufdff\ufe70-\ufefe\uff00-\uffef\U0001d400-\U0001d7ff"
_ANY_IGNORED = re.compile(f"[{_IGNORED}]")
# Persian writes it between the parts of a word, which others write apart.
_PERSIAN_JOINER = re.compile("(?<=[\u0600-\u06ff])\u200c")


class _Stems(dict[str, str]):
    """Words with their stems, each made once; reading is faster than a call of a cached function."""

    def __init__(self, stem: Callable[[str], str]) -> None:
        self._stem = stem

    def __missing__(self, word: str) -> str:
        self[word] = self._stem(word)
        return self[word]


def analyser(language: str, stemmer: str | None) -> Callable[[str], list[str]]:
    """Make the function from text to terms: lower case, NFC, words, stop words out, stems.

    A word keeps the combining marks that its vowels are written with. What follows an apostrophe alone, as in "don't",
    or stands before one, as in "l'eau", is no word. Of scripts that are written without spaces, each letter is a term
    and so is each pair of neighbours; of a Korean word, it and each pair of its syllables. Full and half width,
    ligatures and styled letters are as their plain letters (NFKC), and digits of any script as 0 to 9.
    """
    stop_words = _stop_words(language)
    name = stemmer_of(language, stemmer)
    stems = _Stems(Stemmer.Stemmer(name).stemWord if name is not None else str)
    special, folded, in_letters, words, run, letter = _patterns()

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

    def analyse(text: str) -> list[str]:
        text = text.lower()
        if not text.isascii():
            # In lower case a Turkish capital I has a second dot.
            text = unicodedata.normalize("NFC", text).replace("i\u0307", "i")
        if text.isascii() or not special.search(text):
            found = _WORD.findall(text)
        else:
            if "\u200c" in text:
                text = _PERSIAN_JOINER.sub(" ", text)
            text = unicodedata.normalize("NFC", folded.sub(_fold, text))
            found = [part for word in words.findall(text) for part in parts(word)]
        return [stems[word] for word in found if word not in stop_words]

    return analyse


def _fold(found: re.Match[str]) -> str:
    plain = unicodedata.normalize("NFKC", _ANY_IGNORED.sub("", found.group())).lower()
    return "".join(str(unicodedata.decimal(letter, letter)) for letter in plain)


def stemmer_of(language: str, stemmer: str | None) -> str | None:
    """The Snowball language that a setting stands for, "auto" being that of the stop words; None for whole words."""
    auto = stemmer == STEMMER
    name = ("english" if language == "none" else language.removesuffix("_plus")) if auto else stemmer
    try:
        return name if name is None or Stemmer.Stemmer(name) else None
    except KeyError:
        if auto:
            return None
        raise ValueError(f"stemmer: {stemmer!r} is not one of {', '.join(Stemmer.algorithms())}") from None


def _stop_words(language: str) -> frozenset[str]:
    from bm25s.tokenization import _infer_stopwords

    if language == "none":
        return frozenset()
    try:
        return frozenset(_infer_stopwords(language))
    except ValueError as error:
        if language in Stemmer.algorithms():
            return frozenset()
        raise ValueError(f'language: no stop words for {language!r} ({error}); pass language="none"') from error


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    """Patterns: what plain words lack, what is folded, a letter that is a term, words, their parts and letters."""
    marks, digits = _ranges("M"), _ranges("Nd")
    letters = UNSPACED + _HANGUL
    word = rf"\w[\w{marks}]+|(?<!\w['\u2019])\w(?!['\u2019]\w\w)"
    run = rf"[{_HANGUL}]+|[{UNSPACED}][{UNSPACED}{marks}]*|[^{letters}]+"
    # One range for the marks and digits of rare scripts: with each of theirs the search would take ten times as long.
    common = "".join(_ranges(kind, 0x10000) for kind in ("M", "Nd"))
    special = f"[{common}{_IGNORED}{_FORMS}{letters}\U00010480-\U0001efff]"
    folded = f"[{digits}{_IGNORED}{_FORMS}]+"
    return tuple(map(re.compile, (special, folded, f"[{letters}]", word, run, rf"[^{marks}][{marks}]*|[{marks}]+")))


def _ranges(kind: str, end: int = 0x1F000) -> str:
    """The characters beyond Latin of a Unicode category, as ranges of a pattern."""
    codes = [code for code in range(0x300, end) if unicodedata.category(chr(code)).startswith(kind)]
    starts = [code for at, code in enumerate(codes) if not at or codes[at - 1] != code - 1]
    lasts = [code for at, code in enumerate(codes) if at + 1 == len(codes) or codes[at + 1] != code + 1]
    return "".join(f"{chr(start)}-{chr(last)}" for start, last in zip(starts, lasts, strict=True))
