"""Questions made from passages, for corpora without queries."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tct_hf.data.near_duplicates import folded

if TYPE_CHECKING:
    from datasets import Dataset

_LEAST_REST = 3  # words that a passage keeps
_SENTENCE_WORDS = range(5, 31)
_TITLE_WORDS = range(3, 31)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\n+|\n(?=\s*[-*#])")


@dataclass(frozen=True)
class MadeQuestion:
    """A title or sentence that stands for a question, and its passage without it."""

    text: str
    passage_id: str
    rest: str


def questions_from(corpus: Dataset, count: int, *, seed: int, without: Iterable[str] = ()) -> Iterator[MadeQuestion]:
    """Take the title, or else a sentence or heading, out of passages drawn at random, one a passage.

    A title of 3 to 30 words is the question; where there is none, a sentence or heading of 5 to 30 words is drawn.
    It is removed from its passage: otherwise BM25 would answer it word for word.

    Args:
        corpus: columns id and text, and perhaps title; a title begins the text.
        count: the largest number of questions; passages with nothing that fits, or with nothing else, give none.
        seed: of the draw.
        without: texts that must not become questions, whatever their case and punctuation: queries of dev and test.

    Source: the inverse cloze task (Lee, Chang and Toutanova, ACL 2019); half of DRAGON's queries are such sentences
    (Lin et al., arXiv 2302.07452).
    """
    order = list(range(len(corpus)))
    random.Random(seed).shuffle(order)
    made, taken = 0, {folded(text) for text in without}
    for row in order:
        if made == count:
            return
        passage = corpus[row]
        passage_id, text, title = passage["id"], passage["text"], passage.get("title") or ""
        body = text.removeprefix(title)

        def fits(one: str, words: range) -> bool:
            return len(one.split()) in words and _is_prose(one) and folded(one) not in taken

        if fits(title, _TITLE_WORDS):
            chosen, rest = title, body
        else:
            sentences = [part.strip() for part in _SENTENCE_END.split(body)]
            fit = [one for one in sentences if fits(one, _SENTENCE_WORDS)]
            if not fit:
                continue
            chosen = random.Random(f"{seed}\x1f{passage_id}").choice(fit)
            rest = text.replace(chosen, " ")
        rest = " ".join(rest.split())
        if len(rest.split()) < _LEAST_REST:
            continue
        taken.add(folded(chosen))
        made += 1
        yield MadeQuestion(chosen, passage_id, rest)


def _is_prose(text: str) -> bool:
    return sum(letter.isalpha() or letter == " " for letter in text) > 0.85 * len(text)
