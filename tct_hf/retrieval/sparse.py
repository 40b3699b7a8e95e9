"""Learned sparse retrieval: exact search of the inverted lists of a sparse student's vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.data.ids import IdTable
from tct_hf.retrieval.bm25 import check_ids
from tct_hf.retrieval.built_by import check_model, described
from tct_hf.retrieval.pinned import PinnedIndex
from tct_hf.retrieval.runs import Run, one_id_a_vector, run_of
from tct_hf.retrieval.sparse_rows import as_csr, row_blocks

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SparseEncoder

_SETTINGS_FILE = "tct_sparse.json"
_ARRAYS = {"starts": "int64", "rows": "uint32", "weights": "float32"}
_FORMAT = 1


class SparseIndex(PinnedIndex):
    """Inverted lists that answer sparse query vectors with passage ids; make one with `build` or `load`.

    Search is exact: scores are the inner products, added up in float32 term after term. Equal scores are ordered by
    passage id. A posting takes 8 bytes, on disk and in memory, where the lists can stay mapped from their files.

    Attributes:
        ids: passage ids, one a row.
        built_by: {"id", "weights_sha256", "encoding"} of the model that encoded the passages, where it was given; from
            the Hub also "revision".
    """

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
        self.ids: Sequence[str] = ids
        self.built_by = dict(built_by) if built_by else None

    def __len__(self) -> int:
        return len(self.ids)

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
        """Non-zeros of a passage, a mean."""
        return self.postings / len(self)

    @property
    def nbytes(self) -> int:
        """Bytes of lists and ids, in memory or mapped."""
        lists = self._starts.nbytes + self._rows.nbytes + self._weights.nbytes
        return int(lists + getattr(self.ids, "nbytes", 0))

    @classmethod
    def build(cls, vectors: Any, ids: Iterable[str], *, built_by: Mapping[str, Any] | None = None) -> SparseIndex:
        """Index passage vectors, as they are: nothing is normalised, rounded or left out.

        Memory holds the index and a block of rows; of an iterator, all its blocks.

        Args:
            vectors: (passages, dimension): a scipy sparse matrix, the torch sparse tensor that
                `SparseEncoder.encode_document` returns, what `load_vectors` returns, or an iterable of such blocks.
                Nothing is densified.
            ids: passage ids, one a row, each once.
            built_by: {"id", "weights_sha256", "encoding"} of the model that encoded the passages, kept with the index:
                "model" in the manifest of `encode_corpus`.

        Returns:
            The index.

        Raises:
            ValueError: vectors of another kind or of several dimensions, a weight that is NaN, infinite or negative,
                ids that don't fit, or no non-zero at all.
        """
        import numpy as np

        from tct_hf.retrieval import inverted_lists

        blocks = row_blocks(vectors, "vectors")
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
            inverted_lists.count_terms(block.indices, counts)
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
            begins = block.indptr.astype(np.int64)
            inverted_lists.append_rows(begins, block.indices, block.data, first, ends, rows, weights)
            first += block.shape[0]
        return cls(starts, rows, weights, IdTable.of(id_list), built_by=built_by)

    def search(
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
        rows, scores = self.search_rows(query_vectors, k, threads=threads)
        return [[self.ids[row] for row in found.tolist()] for found in rows], scores

    def search_rows(
        self, query_vectors: Any, k: int = 100, *, threads: int = 1
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Like `search`, with the passages' row numbers in place of their ids."""
        from concurrent.futures import ThreadPoolExecutor

        for name, number in (("k", k), ("threads", threads)):
            if number < 1:
                raise ValueError(f"{name}: {number} is below 1; ask for at least one")
        queries = as_csr(query_vectors, "query_vectors")
        if queries.shape[1] != self.dimension:
            raise ValueError(
                f"query_vectors: dimension {queries.shape[1]} where the index has {self.dimension}; "
                "encode queries with the model that encoded the passages"
            )
        depth = min(k, len(self))

        def search_one(row: int) -> tuple[np.ndarray, np.ndarray]:
            return self._best(queries, row, depth)

        if threads == 1:
            found = [search_one(row) for row in range(queries.shape[0])]
        else:
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(search_one, range(queries.shape[0])))
        return [rows for rows, _ in found], [scores for _, scores in found]

    def _best(self, queries: Any, row: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        from tct_hf.retrieval.inverted_lists import best_rows

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
        if (ordered[1:] == ordered[:-1]).any():
            order = np.array(sorted(order.tolist(), key=lambda at: (-scores[at], self.ids[rows[at]])), np.int64)
        return rows[order[:k]], scores[order[:k]]

    def run(self, query_ids: Sequence[str], query_vectors: Any, k: int = 100, *, threads: int = 1) -> Run:
        """Search and return a run.

        Args:
            query_ids: query ids, one a row of `query_vectors`, each once.
            query_vectors: (queries, dimension) sparse.
            k: passages a query, at most.
            threads: queries searched at a time.

        Returns:
            Query id to passage id to score; every query has an entry, if an empty one.

        Raises:
            ValueError: ids that don't fit the vectors; see `search` for the rest.
        """
        queries = as_csr(query_vectors, "query_vectors")
        names = one_id_a_vector(query_ids, queries.shape[0])
        return run_of(names, *self.search(queries, k, threads=threads))

    def save(self, directory: str | Path) -> None:
        """Write the index to a folder; an index that is there is replaced whole.

        Args:
            directory: the folder.

        Raises:
            OSError: it can't be written, or it holds something else.
        """
        import numpy as np

        from tct_hf.retrieval.storage import write_directory

        ids = self.ids if isinstance(self.ids, IdTable) else IdTable.of(self.ids)

        def fill(staging: Path) -> None:
            for name, part in zip(_ARRAYS, (self._starts, self._rows, self._weights), strict=True):
                np.save(staging / f"{name}.npy", part, allow_pickle=False)
            ids.save(staging)

        settings = {
            "format": _FORMAT,
            "passages": len(self),
            "dimension": self.dimension,
            "postings": self.postings,
            "built_by": self.built_by,
        }
        write_directory(directory, fill, _SETTINGS_FILE, settings)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        mmap: bool = False,
        verify: bool = True,
        model: SparseEncoder | Mapping[str, Any] | None = None,
    ) -> SparseIndex:
        """Open an index that `save` wrote.

        Args:
            directory: the folder.
            mmap: leave lists and ids on disk and map them: what is searched with stays in memory as long as there is
                room.
            verify: compare the files' checksums and look at every posting, which reads each file once or twice; sizes
                are always compared. Leave it on for an index from elsewhere: search trusts its lists.
            model: that will encode queries, or its {"id", "weights_sha256", "encoding"}, to be compared with the one
                that built the index, as `DenseIndex.load` does.

        Returns:
            The index.

        Raises:
            FileNotFoundError: there is no such index.
            ValueError: it was written by another version or built by another model, or a file is missing, truncated or
                altered.
        """
        import numpy as np

        from tct_hf.retrieval.storage import read_settings

        directory = Path(directory)
        settings = read_settings(directory, _SETTINGS_FILE, _FORMAT, "sparse index", verify=verify)
        if model is not None:
            check_model(directory, settings["built_by"], model if isinstance(model, Mapping) else described(model))
        try:
            starts, rows, weights = (
                np.load(directory / f"{name}.npy", mmap_mode="r" if mmap else None, allow_pickle=False)
                for name in _ARRAYS
            )
            ids = IdTable.load(directory, mmap=mmap)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{directory}: damaged sparse index ({error}); build and save it again") from error
        # Compiled search trusts its arrays.
        if (
            tuple(part.dtype.name for part in (starts, rows, weights)) != tuple(_ARRAYS.values())
            or not len(ids) == settings["passages"] > 0
            or starts.shape != (settings["dimension"] + 1,)
            or not rows.shape == weights.shape == (settings["postings"],)
            or starts[0] != 0
            or starts[-1] != settings["postings"]
            or (np.diff(starts) < 0).any()
            or (verify and not _searchable(starts, rows, weights, len(ids)))
        ):
            raise ValueError(
                f"{directory}: its arrays are not those of {settings['passages']} passages of dimension "
                f"{settings['dimension']} with {settings['postings']} non-zeros; build and save the index again"
            )
        return cls(starts, rows, weights, ids, built_by=settings["built_by"])


def _read_only(array: np.ndarray) -> np.ndarray:
    """A plain view that can't be written to: mapped and unmapped arrays then search by one compiled function."""
    import numpy as np

    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def _searchable(starts: np.ndarray, rows: np.ndarray, weights: np.ndarray, passages: int) -> bool:
    """Whether lists name passages that are there, rising, with weights that are finite and above 0."""
    import numpy as np

    from tct_hf.retrieval.inverted_lists import are_lists

    step = 1 << 20  # weights that are looked at together
    parts = (weights[first : first + step] for first in range(0, len(weights), step))
    return bool(are_lists(*map(_read_only, (starts, rows)), passages)) and all(
        bool((np.isfinite(part) & (part > 0)).all()) for part in parts
    )
