"""Learned sparse retrieval: exact search of the inverted lists of a sparse student's vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np

from tct_hf.retrieval.checks import check_ids, check_lists
from tct_hf.retrieval.index import VectorIndex, best_first, id_array
from tct_hf.retrieval.vectors import ShardedRows, as_csr, csr_blocks

# Scores of this many passages are added up at a time: 256 KB of them, which stays in a core's own cache.
_BLOCK = 65_536
_GROUP = 64
_TINY = np.nextafter(np.float32(0), np.float32(1))
_ARRAYS = {"starts": "int64", "rows": "uint32", "weights": "float32"}


class SparseIndex(VectorIndex):
    """Inverted lists that answer sparse query vectors with passage ids; make one with `build` or `load`.

    Search is exact: scores are the inner products, added up in float32 term after term. Equal scores are ordered by
    passage id. A posting takes 8 bytes, on disk and in memory, where the lists can stay mapped from their files.
    """

    kind, title, tags = "sparse index", "Inverted lists", ("sparse", "splade")
    settings_file, format = "tct_sparse.json", 3
    _rows_of = staticmethod(as_csr)

    def __init__(
        self,
        starts: np.ndarray,
        rows: np.ndarray,
        weights: np.ndarray,
        ids: Sequence[str],
        *,
        built_by: Mapping[str, Any] | None = None,
    ) -> None:
        self._starts, self._rows, self._weights = (_read_only(part) for part in (starts, rows, weights))
        self.ids = ids
        self.built_by = dict(built_by) if built_by else None

    @property
    def dimension(self) -> int:
        """Terms that a vector can have: the size of the vocabulary."""
        return len(self._starts) - 1

    @property
    def postings(self) -> int:
        """Non-zeros of all passages."""
        return len(self._rows)

    @property
    def active_dims(self) -> float:
        """Mean number of non-zeros of a passage."""
        return self.postings / len(self)

    @property
    def nbytes(self) -> int:
        """Bytes of lists and ids, in memory or mapped."""
        return int(self._starts.nbytes + self._rows.nbytes + self._weights.nbytes + self.ids.nbytes)

    @classmethod
    def build(cls, vectors: Any, ids: Iterable[str], *, built_by: Mapping[str, Any] | None = None) -> SparseIndex:
        """Index passage vectors, as they are: nothing is normalised, rounded or left out.

        Memory holds the index and a block of rows; nothing is densified.

        Args:
            vectors: (passages, dimension): a scipy sparse matrix, the torch sparse tensor that
                `SparseEncoder.encode_document` returns, or what `load_vectors` returns.
            ids: passage ids, one a row, each once.
            built_by: the model that encoded the passages, "model" in the manifest of `encode_corpus`.

        Raises:
            ValueError: vectors of another kind, a weight that is NaN, infinite or negative, ids that don't fit, or no
                non-zero at all.
        """
        matrix = vectors if isinstance(vectors, ShardedRows) else as_csr(vectors, "vectors")
        passages, dimension = matrix.shape
        id_list = list(ids)
        check_ids(id_list, passages, "vectors")
        counts = np.zeros(dimension, np.int64)
        for block in csr_blocks(matrix):
            counts += np.bincount(block.indices, minlength=dimension)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        if not starts[-1]:
            raise ValueError(
                "vectors: every passage is zero in all dimensions, so that nothing could be found; the model has "
                "collapsed, or texts were left out when they were encoded"
            )
        rows, weights = np.empty(starts[-1], np.uint32), np.empty(starts[-1], np.float32)
        ends, first = starts[:-1].copy(), 0
        for block in csr_blocks(matrix):
            append_rows(block.indptr.astype(np.int64), block.indices, block.data, first, ends, rows, weights)
            first += block.shape[0]
        return cls(starts, rows, weights, id_array(id_list), built_by=built_by)

    def _search(self, queries: Any, k: int) -> tuple[list[list[str]], list[np.ndarray]]:
        found = [self._best(queries, row, k) for row in range(queries.shape[0])]
        return [names for names, _ in found], [scores for _, scores in found]

    def _best(self, queries: Any, row: int, k: int) -> tuple[list[str], np.ndarray]:
        begin, end = queries.indptr[row], queries.indptr[row + 1]
        terms, weights = queries.indices[begin:end].astype(np.int64), queries.data[begin:end]
        rows, scores = best_rows(self._starts, self._rows, self._weights, len(self), terms, weights, k)
        if not np.isfinite(scores).all():
            raise ValueError(
                f"query_vectors: row {row} has a score that is infinite: its products with passages leave the range "
                "of float32; check the model, or scale its vectors down"
            )
        order = np.argsort(-scores, kind="stable")
        ordered = scores[order]
        if not (ordered[1:] == ordered[:-1]).any():
            return self._names(rows[order[:k]]), ordered[:k]
        return best_first(self._names(rows), scores, k)

    def _settings(self) -> dict[str, Any]:
        return {"built_by": self.built_by}

    def _write(self, folder: Path) -> None:
        for name, part in zip(_ARRAYS, (self._starts, self._rows, self._weights), strict=True):
            np.save(folder / f"{name}.npy", part, allow_pickle=False)

    @classmethod
    def _open(cls, folder: Path, settings: dict[str, Any], ids: Any, *, mmap: bool, verify: bool) -> SparseIndex:
        mode: Any = "r" if mmap else None
        starts, rows, weights = (
            np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False).astype(kind, copy=False)
            for name, kind in _ARRAYS.items()
        )
        check_lists((weights, rows, starts), len(ids), verify)
        return cls(starts, rows, weights, ids, built_by=settings["built_by"])

    def _facts(self) -> list[tuple[str, str]]:
        size = f"{self.nbytes / len(self):,.0f}"
        return [("active dims a passage", f"{self.active_dims:,.1f}"), ("bytes a passage", size)]


def _read_only(array: np.ndarray) -> np.ndarray:
    """A plain view that can't be written to: mapped and unmapped arrays then search by one compiled function."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def _compiled(function: Any) -> Any:
    compiled = numba.njit(function, nogil=True)
    try:
        # Compiling takes seconds: kept on disk for the next process.
        compiled.enable_caching()
    except RuntimeError:  # no folder that numba may write to: compiled in this process alone
        pass
    return compiled


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
    sums = np.zeros(passages, np.float32)
    places = np.empty(len(terms), np.int64)
    for number in range(len(terms)):
        places[number] = starts[terms[number]]
    for first in range(0, passages, _BLOCK):
        last = min(first + _BLOCK, passages)
        for number in range(len(terms)):
            begin, end, weight = places[number], starts[terms[number] + 1], weights[number]
            if last < passages:
                end = _first_from(list_rows, begin, end, last)
            for at in range(begin, end):
                sums[np.int64(list_rows[at])] += weight * list_weights[at]
            places[number] = end
        for near in range(first, last, _GROUP):
            far = min(near + _GROUP, last)
            least = heap[0]
            # A comparison of many at a time, which most groups don't pass.
            reached = 0
            for row in range(near, far):
                reached |= sums[row] > least
            if reached:
                for row in range(near, far):
                    if sums[row] > heap[0]:
                        _replace_least(heap, sums[row])
    rows = np.flatnonzero(sums >= max(heap[0], _TINY))
    return rows, sums[rows]
