"""Passages and queries by id: hashes, repeated ids, and a corpus as a stream of checked passages."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

Passage = tuple[str, str]


def hash_of(name: str) -> int:
    """64 bits of an id that depend on nothing else; ids are drawn in their order, and found by them."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def find(keys: np.ndarray, wanted: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where hashes are among sorted ones, and which of them are there at all."""
    hashes = np.fromiter(wanted, np.uint64)
    at = np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)
    return at, keys[at] == hashes


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no half of a surrogate pair alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class SeenIds:
    """Finds an id that comes twice in a stream, in 16 bytes an id."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []  # digests, each array at least twice as long as the next

    def add(self, ids: Sequence[str]) -> int | None:
        """Take the next ids; the place among them of the first that came before, here or in an earlier call."""
        digests = np.array(
            [hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest() for name in ids], "S16"
        )
        fresh, first = np.unique(digests, return_index=True)
        again = np.ones(len(ids), bool)
        again[first] = False
        for known in self._sorted:
            at = np.searchsorted(known, digests)
            again |= known[np.minimum(at, len(known) - 1)] == digests
        if again.any():
            return int(np.flatnonzero(again)[0])
        if len(ids):
            self._sorted.append(fresh)
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
            self._sorted.append(np.sort(np.concatenate([self._sorted.pop(), self._sorted.pop()]), kind="stable"))
        return None


def rows_in_batches(rows: Any, keys: Collection[str] = ()) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set or any iterable; of a data set, only the columns `keys` where there are some."""
    if not hasattr(rows, "iter"):
        yield from rows
        return
    for batch in rows.iter(1000):  # a data set gives a thousand rows in little more time than one
        columns = {key: values for key, values in batch.items() if not keys or key in keys}
        for place in range(len(next(iter(batch.values())))):
            yield {key: values[place] for key, values in columns.items()}


def checked_passages(corpus: Iterable[Mapping[str, Any]], allow_empty: bool) -> Iterator[Passage]:
    """Id and text of each passage of a corpus, read once; a bad one is a ValueError with its number and id.

    Args:
        corpus: rows with "id" and "text"; a data set, or any iterable.
        allow_empty: passages without words may pass.
    """
    for number, row in enumerate(rows_in_batches(corpus, ("id", "text"))):
        for key in ("id", "text"):
            if not isinstance(row.get(key), str):
                raise ValueError(
                    f"corpus: passage number {number} (id {row.get('id')!r}) has {key} = {row.get(key)!r}: it must "
                    "be a string; name the columns id and text, or repair the row."
                )
        if not allow_empty and not row["text"].strip():
            raise ValueError(
                f"corpus: passage {row['id']!r} (number {number}) has no words: leave it out, or encode it as it is "
                "with allow_empty=True."
            )
        if not is_utf8(row["id"]):
            raise ValueError(
                f"corpus: the id {row['id']!r} (number {number}) has a lone surrogate, which no file can hold as "
                "UTF-8: rename the passage."
            )
        yield row["id"], row["text"]


def passage_shards(passages: Iterator[Passage], size: int) -> Iterator[list[Passage]]:
    """Consecutive passages, so many at a time; refuses an id that comes twice, in 16 bytes of memory an id."""
    seen, count = SeenIds(), 0
    while shard := list(islice(passages, size)):
        again = seen.add([passage_id for passage_id, _ in shard])
        if again is not None:
            raise ValueError(
                f"corpus: two passages have the id {shard[again][0]!r} (again at number {count + again}): give each "
                "its own id."
            )
        count += len(shard)
        yield shard
