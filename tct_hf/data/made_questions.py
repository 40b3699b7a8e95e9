"""Questions made from passages, for corpora that nobody has asked anything yet."""

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
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\n+|\n(?=\s*[-*#])")


@dataclass(frozen=True)
class MadeQuestion:
    """A sentence that stands for a question, and its passage without it."""

    text: str
    passage_id: str
    rest: str


def questions_from(corpus: Dataset, count: int, *, seed: int, without: Iterable[str] = ()) -> Iterator[MadeQuestion]:
    """Take a sentence, title or heading of 5 to 30 words out of passages drawn at random, one a passage.

    The sentence is removed from its passage: otherwise BM25 would answer it word for word.

    Args:
        corpus: columns id and text.
        count: at most so many questions; passages without such a sentence, or with nothing else, give none.
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
        passage_id, text = corpus[row]["id"], corpus[row]["text"]
        sentences = [part.strip() for part in _SENTENCE_END.split(text)]
        fit = [one for one in sentences if 5 <= len(one.split()) <= 30 and _is_prose(one) and folded(one) not in taken]
        if not fit:
            continue
        chosen = random.Random(f"{seed}\x1f{passage_id}").choice(fit)
        rest = " ".join(text.replace(chosen, " ").split())
        if len(rest.split()) < _LEAST_REST:
            continue
        taken.add(folded(chosen))
        made += 1
        yield MadeQuestion(chosen, passage_id, rest)


def _is_prose(text: str) -> bool:
    return sum(letter.isalpha() or letter == " " for letter in text) > 0.85 * len(text)
