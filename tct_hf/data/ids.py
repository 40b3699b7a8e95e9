"""Ids of passages and queries: their hashes, repeated ones, and what can be written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


def hash_of(name: str) -> int:
    """64 bits of an id that depend on nothing else; ids are drawn in their order, and found by them."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def stable_id(key: str) -> int:
    """A non-negative 63-bit number for an id or a text, the same on every machine and in every process."""
    return hash_of(key) >> 1


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
    """Finds ids that come twice in a stream, in 16 bytes an id."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []  # digests, each array at least twice as long as the next

    def add(self, ids: Sequence[str]) -> list[int]:
        """Take the next ids; the places of those that came before, here or in an earlier call."""
        digests = np.array(
            [hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest() for name in ids], "S16"
        )
        fresh, first = np.unique(digests, return_index=True)
        new = np.ones(len(fresh), bool)
        for known in self._sorted:
            new &= known[np.minimum(np.searchsorted(known, fresh), len(known) - 1)] != fresh
        if new.any():
            self._sorted.append(fresh[new])
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
            self._sorted.append(np.sort(np.concatenate([self._sorted.pop(), self._sorted.pop()]), kind="stable"))
        return np.delete(np.arange(len(ids)), first[new]).tolist()
