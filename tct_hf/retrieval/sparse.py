"""Learned sparse retrieval: exact search of the inverted lists of a sparse student's vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tct_hf.retrieval.index import VectorIndex, check_ids, id_array
from tct_hf.retrieval.inverted_lists import append_rows, are_lists, best_rows, count_terms
from tct_hf.retrieval.rows import as_csr, sparse_blocks

_ARRAYS = {"starts": "int64", "rows": "uint32", "weights": "float32"}


class SparseIndex(VectorIndex):
    """Inverted lists that answer sparse query vectors with passage ids; make one with `build` or `load`.

    Search is exact: scores are the inner products, added up in float32 term after term. Equal scores are ordered by
    passage id. A posting takes 8 bytes, on disk and in memory, where the lists can stay mapped from their files.
    """

    kind, title, tags = "sparse index", "Inverted lists", ("sparse", "splade")
    settings_file, format = "tct_sparse.json", 2

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

        Memory holds the index and a block of rows; of an iterator, all its blocks.

        Args:
            vectors: (passages, dimension): a scipy sparse matrix, the torch sparse tensor that
                `SparseEncoder.encode_document` returns, what `load_vectors` returns, or an iterable of such blocks.
                Nothing is densified.
            ids: passage ids, one a row, each once.
            built_by: the model that encoded the passages, "model" in the manifest of `encode_corpus`.

        Raises:
            ValueError: vectors of another kind or of several dimensions, a weight that is NaN, infinite or negative,
                ids that don't fit, or no non-zero at all.
        """
        blocks = sparse_blocks(vectors, "vectors")
        counts: np.ndarray | None = None
        passages = 0
        for block in blocks:
            if counts is None:
                counts = np.zeros(block.shape[1], np.int64)
            if block.shape[1] != len(counts):
                raise ValueError(
                    f"vectors: dimension {block.shape[1]} from row {passages} on where it was {len(counts)} before; "
                    "encode all passages with one model"
                )
            count_terms(block.indices, counts)
            passages += block.shape[0]
        id_list = list(ids)
        check_ids(id_list, passages, "vectors")
        assert counts is not None
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        if not starts[-1]:
            raise ValueError(
                "vectors: every passage is zero in all dimensions, so that nothing could be found; the model has "
                "collapsed, or texts were left out when they were encoded"
            )
        if passages >= 2**32:
            raise ValueError(f"vectors: {passages:,} passages, and an index holds less than 2**32; build several")
        rows, weights = np.empty(starts[-1], np.uint32), np.empty(starts[-1], np.float32)
        ends, first = starts[:-1].copy(), 0
        for block in blocks:
            append_rows(block.indptr.astype(np.int64), block.indices, block.data, first, ends, rows, weights)
            first += block.shape[0]
        return cls(starts, rows, weights, id_array(id_list), built_by=built_by)

    def search(  # type: ignore[override]
        self, query_vectors: Any, k: int = 100, *, threads: int = 1
    ) -> tuple[list[list[str]], list[np.ndarray]]:
        """Find the passages with the greatest inner product.

        Args:
            query_vectors: (queries, dimension) sparse, of scipy or torch; or one vector of torch.
            k: passages a query, at most; passages without any term of the query are never returned.
            threads: queries searched at a time.

        Returns:
            Ids and float32 scores, one list and one array a query, best first; empty for a query without a term that
            a passage has.

        Raises:
            ValueError: k or threads below 1, a wrong shape, a weight that is NaN, infinite or negative, or a score
                that float32 can't hold.
        """
        for name, number in (("k", k), ("threads", threads)):
            if number < 1:
                raise ValueError(f"{name}: {number} is below 1; ask for at least one")
        queries = as_csr(query_vectors, "query_vectors")
        if queries.shape[1] != self.dimension:
            raise ValueError(
                f"query_vectors: dimension {queries.shape[1]} where the index has {self.dimension}; "
                "encode queries with the model that encoded the passages"
            )
        depth, numbers = min(k, len(self)), range(queries.shape[0])
        if threads == 1:
            found = [self._best(queries, row, depth) for row in numbers]
        else:
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(lambda row: self._best(queries, row, depth), numbers))
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
        names = self._names(rows)
        best = sorted(order.tolist(), key=lambda at: (-scores[at], names[at]))[:k]
        return [names[at] for at in best], scores[best]

    def _settings(self) -> dict[str, Any]:
        return {"dimension": self.dimension, "postings": self.postings, "built_by": self.built_by}

    def _write(self, folder: Path) -> None:
        for name, part in zip(_ARRAYS, (self._starts, self._rows, self._weights), strict=True):
            np.save(folder / f"{name}.npy", part, allow_pickle=False)

    @classmethod
    def _open(cls, folder: Path, settings: dict[str, Any], ids: Any, *, mmap: bool, verify: bool) -> SparseIndex:
        mode: Any = "r" if mmap else None
        starts, rows, weights = (
            np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False) for name in _ARRAYS
        )
        # Compiled search trusts its arrays.
        if (
            tuple(part.dtype.name for part in (starts, rows, weights)) != tuple(_ARRAYS.values())
            or not len(ids)
            or starts.shape != (settings["dimension"] + 1,)
            or not rows.shape == weights.shape == (settings["postings"],)
            or starts[0] != 0
            or starts[-1] != settings["postings"]
            or (np.diff(starts) < 0).any()
            or (verify and not _searchable(starts, rows, weights, len(ids)))
        ):
            raise ValueError(
                f"its arrays are not those of {len(ids)} passages of dimension {settings['dimension']} with "
                f"{settings['postings']} non-zeros"
            )
        return cls(starts, rows, weights, ids, built_by=settings["built_by"])

    def _card(self) -> tuple[str, list[tuple[str, str]]]:
        of_what, model = self._model_card()
        return of_what, [
            ("dimension", f"{self.dimension:,}"),
            ("active dims a passage", f"{self.active_dims:,.1f}"),
            ("bytes a passage", f"{self.nbytes / len(self):,.0f}"),
            model,
        ]


def _read_only(array: np.ndarray) -> np.ndarray:
    """A plain view that can't be written to: mapped and unmapped arrays then search by one compiled function."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def _searchable(starts: np.ndarray, rows: np.ndarray, weights: np.ndarray, passages: int) -> bool:
    """Whether lists name passages that are there, rising, with weights that are finite and above 0."""
    step = 1 << 20  # weights that are looked at together
    parts = (weights[first : first + step] for first in range(0, len(weights), step))
    return bool(are_lists(*map(_read_only, (starts, rows)), passages)) and all(
        bool((np.isfinite(part) & (part > 0)).all()) for part in parts
    )
