"""Questions made from passages, for corpora that nobody has asked anything yet."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\n+|\n(?=\s*[-*#])")


@dataclass(frozen=True)
class MadeQuestion:
    """A sentence that stands for a question, and its passage without it."""

    text: str
    passage_id: str
    rest: str


def questions_from(corpus: Dataset, count: int, *, seed: int) -> Iterator[MadeQuestion]:
    """Take a sentence, title or heading of 5 to 30 words out of passages drawn at random, one a passage.

    The sentence is removed from its passage: otherwise BM25 would answer it word for word.

    Args:
        corpus: columns id and text.
        count: at most so many questions; passages without such a sentence, or with nothing else, give none.
        seed: of the draw.

    Source: the inverse cloze task (Lee, Chang and Toutanova, ACL 2019); half of DRAGON's queries are such sentences
    (Lin et al., arXiv 2302.07452).
    """
    order = list(range(len(corpus)))
    random.Random(seed).shuffle(order)
    made = 0
    for row in order:
        if made == count:
            return
        passage_id, text = corpus[row]["id"], corpus[row]["text"]
        sentences = [part.strip() for part in _SENTENCE_END.split(text)]
        fit = [one for one in sentences if 5 <= len(one.split()) <= 30 and _is_prose(one)]
        if len(sentences) < 2 or not fit:
            continue
        chosen = random.Random(f"{seed}\x1f{passage_id}").choice(fit)
        made += 1
        yield MadeQuestion(chosen, passage_id, " ".join(text.replace(chosen, " ").split()))


def _is_prose(text: str) -> bool:
    return sum(letter.isalpha() or letter == " " for letter in text) > 0.85 * len(text)
