"""Groups of texts that are nearly the same, so that a split can keep them together."""

from __future__ import annotations

import itertools
import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tct_hf.data.ids import stable_id

# Ranges of Thai, Lao, Burmese, Khmer, kana and Han, written without blanks: there each letter is a word.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def groups(pairs: Sequence[tuple[int, int]], size: int) -> list[int]:
    """The group of each of the items 0 .. size-1 that pairs join, named by its smallest member."""
    left, right = np.array(pairs, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(left)), (left, right)), shape=(size, size))
    _, first, group = np.unique(connected_components(graph, directed=False)[1], return_index=True, return_inverse=True)
    return list(first[group].tolist())


def folded(text: str) -> str:
    """Normalise case, punctuation and white space; a text of nothing but punctuation keeps it."""
    text = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.translate(_BARE).split()) or " ".join(text.split())


class _Bare(dict[int, str]):
    """A blank for punctuation; symbols stay ("C", "C++"), and so do marks that some scripts write vowels with."""

    def __missing__(self, code: int) -> str:
        found = self[code] = " " if unicodedata.category(chr(code))[0] == "P" else chr(code)
        return found


_BARE = _Bare()


@cache
def _first(char: str) -> str:
    """What a letter or digit begins with once it is decomposed and folded; nothing for others."""
    return unicodedata.normalize("NFKD", char).casefold()[:1] if char.isalnum() else ""


def same(one: str, other: str) -> bool:
    """Whether two texts count as the same; most differ in their first letters."""
    starts = {_first(one[:1]), _first(other[:1])}
    return (len(starts) == 1 or "" in starts) and folded(one) == folded(other)


def is_query(text: str, query: str, *, title: str = "", same_id: bool = False) -> bool:
    """Whether a passage is the query itself: its text, with or without its title; after any words under its id."""
    if same_id:  # ids alone don't say it: queries and passages may be numbered each for themselves
        return f" {folded(text)}".endswith(f" {folded(query)}")
    return same(text, query) or (title != "" and same(text.removeprefix(title.strip()).lstrip(), query))


def text_key(text: str) -> int:
    """The number that a text is known by where there is no id; texts that count as the same share it."""
    return stable_id(folded(text))


def shingles(text: str, width: int) -> frozenset[int]:
    """Hash every run of `width` words of a text (letters, in scripts without blanks); fewer words are one shingle."""
    words = _WORD.findall(unicodedata.normalize("NFC", text.lower()))
    return frozenset(
        zlib.crc32(" ".join(words[at : at + width]).encode()) for at in range(max(1, len(words) - width + 1))
    )


def share_most(a: frozenset[int], b: frozenset[int], threshold: float) -> bool:
    """Whether the Jaccard index of two sets of :func:`shingles` reaches a threshold, 0 to 1."""
    if min(len(a), len(b)) < threshold * max(len(a), len(b)):
        return False
    shared = len(a & b)
    return shared >= threshold * (len(a) + len(b) - shared)


def near_duplicate_pairs(
    texts: Sequence[str], *, width: int, threshold: float, sketch: int = 24, max_bucket: int = 200
) -> list[tuple[int, int]]:
    """Pairs of texts (left < right, in order) that share most of their shingles of `width` words.

    Candidates share at least one of their `sketch` smallest shingle hashes (bottom-k sketch; Broder, "On the
    resemblance and containment of documents", 1997); each is then judged by the exact Jaccard index. A shingle of more
    than `max_bucket` texts is boilerplate and proposes only neighbours in order.
    """
    sets = [shingles(text, width) for text in texts]
    buckets: dict[int, list[int]] = defaultdict(list)
    for index, members in enumerate(sets):
        for shingle in sorted(members)[:sketch]:
            buckets[shingle].append(index)
    candidates: set[tuple[int, int]] = set()
    for bucket in buckets.values():
        pairs = itertools.pairwise if len(bucket) > max_bucket else partial(itertools.combinations, r=2)
        candidates.update(pairs(bucket))
    return [(left, right) for left, right in sorted(candidates) if share_most(sets[left], sets[right], threshold)]
