"""Ids of passages and queries: repeated ones, an order of their own, and what can be written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class SeenIds:
    """Finds an id that comes twice in a stream, in 16 bytes an id."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []  # digests, each array at least twice as long as the next

    def add(self, ids: Sequence[str]) -> int | None:
        """Take the next ids.

        Args:
            ids: any number of them.

        Returns:
            The place among them of the first that came before, here or in an earlier call; None where there is none.
        """
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


def order_of(name: str) -> int:
    """The place of an id in an order that depends on nothing else."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no half of a surrogate pair alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
