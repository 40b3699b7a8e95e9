"""Compiled search of inverted lists: term at a time over blocks of passages, exact."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

# Scores of this many passages are added up at a time: 256 KB of them, which stays in a core's own cache.
_BLOCK = 65_536
_GROUP = 64
_TINY = np.nextafter(np.float32(0), np.float32(1))


def _compiled(function: Any) -> Any:
    compiled = numba.njit(function, nogil=True)
    try:
        # Compiling takes seconds: kept on disk for the next process.
        compiled.enable_caching()
    except RuntimeError:  # no folder that numba may write to: compiled in this process alone
        pass
    return compiled


@_compiled
def count_terms(terms, counts):  # type: ignore[no-untyped-def]
    """Add to `counts` (terms,) how often each term stands in `terms` (postings,)."""
    for at in range(len(terms)):
        counts[terms[at]] += 1


@_compiled
def append_rows(row_starts, terms, weights, first_row, ends, list_rows, list_weights):  # type: ignore[no-untyped-def]
    """Append a block of passages, as CSR, to the lists; `ends` (terms,) says where each list goes on, and moves."""
    for row in range(len(row_starts) - 1):
        for at in range(row_starts[row], row_starts[row + 1]):
            place = ends[terms[at]]
            list_rows[place] = first_row + row
            list_weights[place] = weights[at]
            ends[terms[at]] = place + 1


@_compiled
def are_lists(starts, list_rows, passages):  # type: ignore[no-untyped-def]
    """Whether the rows of every list rise and are below `passages`: `best_rows` writes where they say."""
    for term in range(len(starts) - 1):
        before = np.int64(-1)
        for at in range(starts[term], starts[term + 1]):
            row = np.int64(list_rows[at])
            if row <= before or row >= passages:
                return False
            before = row
    return True


@_compiled
def _replace_least(heap, value):  # type: ignore[no-untyped-def]
    """Replace the least of a heap, its first."""
    at = 0
    size = len(heap)
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value


@_compiled
def _first_from(list_rows, low, high, row):  # type: ignore[no-untyped-def]
    """The first place from `low` to `high` whose row is `row` or greater."""
    while low < high:
        middle = (low + high) // 2
        if list_rows[middle] < row:
            low = middle + 1
        else:
            high = middle
    return low


@_compiled
def best_rows(starts, list_rows, list_weights, passages, terms, weights, k):  # type: ignore[no-untyped-def]
    """The k best passages of one query, and all that equal the last of them: rows int64, rising, and scores float32.

    Args:
        starts: (terms + 1,) int64, where each term's list begins.
        list_rows: (postings,) uint32, rising within a list.
        list_weights: (postings,) float32.
        passages: rows in all.
        terms: (query terms,) int64, each once, rising.
        weights: (query terms,) float32.
        k: passages wanted, at least 1; those of a score of 0 are left out.
    """
    heap = np.zeros(k, np.float32)  # the k greatest scores so far, the least first; zeros where there are fewer
    rows = np.empty(max(4 * k, 1024), np.int64)
    scores = np.empty(len(rows), np.float32)
    found = 0
    places = np.empty(len(terms), np.int64)
    for number in range(len(terms)):
        places[number] = starts[terms[number]]
    sums = np.empty(min(_BLOCK, passages), np.float32)
    for first in range(0, passages, _BLOCK):
        size = min(_BLOCK, passages - first)
        sums[:size] = 0
        for number in range(len(terms)):
            begin, end, weight = places[number], starts[terms[number] + 1], weights[number]
            if first + size < passages:
                end = _first_from(list_rows, begin, end, first + size)
            for at in range(begin, end):
                sums[np.int64(list_rows[at]) - first] += weight * list_weights[at]
            places[number] = end
        for near in range(0, size, _GROUP):
            far = min(near + _GROUP, size)
            least = max(heap[0], _TINY)
            # A comparison of many at a time, which most groups don't pass.
            reached = 0
            for row in range(near, far):
                reached |= sums[row] >= least
            if not reached:
                continue
            for row in range(near, far):
                score = sums[row]
                if score < heap[0] or score <= 0:
                    continue
                if score > heap[0]:
                    _replace_least(heap, score)
                if found == len(rows):
                    kept = 0
                    for at in range(found):
                        if scores[at] >= heap[0]:
                            rows[kept] = rows[at]
                            scores[kept] = scores[at]
                            kept += 1
                    found = kept
                    if 2 * found > len(rows):  # equals of the last, which the ids decide among
                        more_rows = np.empty(2 * len(rows), np.int64)
                        more_scores = np.empty(2 * len(rows), np.float32)
                        more_rows[:found] = rows[:found]
                        more_scores[:found] = scores[:found]
                        rows, scores = more_rows, more_scores
                rows[found] = first + row
                scores[found] = score
                found += 1
    chosen = scores[:found] >= heap[0]
    return rows[:found][chosen], scores[:found][chosen]
