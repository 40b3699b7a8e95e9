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
_WORD = re.compile(r"\w\w+|(?<!\w['\u2019])\w(?!['\u2019]\w\w)")
# Combining marks, and all scripts but Latin, Greek, Cyrillic and Armenian: with them a word is five times as slow.
_OTHERS = re.compile("[\u0300-\u036f\u0483-\u0489\u0590-\u1fff\u20d0-\u20ff\u2c00-\U0010ffff]")


def analyser(language: str, stemmer: str | None) -> Callable[[str], list[str]]:
    """Make the function from text to terms: lower case, NFC, words, stop words out, stems.

    A word keeps the combining marks that its vowels are written with. What follows an apostrophe alone, as in "don't",
    or stands before one, as in "l'eau", is no word. Of scripts that are written without spaces, each letter is a term
    and so is each pair of neighbours.
    """
    stop_words = _stop_words(language)
    name = stemmer_of(language, stemmer)
    stem = cache(Stemmer.Stemmer(name).stemWord) if name is not None else str
    words, unspaced, run, letter = _patterns()

    def parts(word: str) -> Iterator[str]:
        for found in run.findall(word):
            letters = letter.findall(found) if unspaced.match(found) else [found]
            yield from letters
            yield from map("".join, pairwise(letters))

    def analyse(text: str) -> list[str]:
        text = text.lower()
        if not text.isascii():
            # Without soft hyphens and joiners, and the second dot of a Turkish capital I in lower case.
            text = text.replace("\u00ad", "").replace("\u200d", "")
            text = unicodedata.normalize("NFC", text).replace("i\u0307", "i")
        if text.isascii() or not _OTHERS.search(text):
            found = _WORD.findall(text)
        else:
            found = [part for word in words.findall(text) for part in parts(word)]
        return [stem(word) for word in found if word not in stop_words]

    return analyse


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
def _patterns() -> Any:
    """Patterns of a word, a letter of the scripts without spaces, a run of such letters or others, and a letter."""
    marks = "".join(chr(code) for code in range(0x300, 0x1F000) if unicodedata.category(chr(code))[0] == "M")
    more = rf"(?:[{marks}]+\w*)*"
    word = rf"\w\w+{more}|(?<!\w['\u2019])\w{more}(?!['\u2019]\w\w)"
    run = rf"[{UNSPACED}][{UNSPACED}{marks}]*|[^{UNSPACED}]+"
    return tuple(map(re.compile, (word, rf"[{UNSPACED}]", run, rf"[^{marks}][{marks}]*|[{marks}]+")))
