"""Dense retrieval: inner product search over passage vectors with Faiss."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.data.ids import IdTable
from tct_hf.retrieval.bm25 import check_ids
from tct_hf.retrieval.built_by import check_model, described
from tct_hf.retrieval.dense_tuning import SLICE, choose_parameters, exact_neighbours, stand_ins
from tct_hf.retrieval.faiss_tools import (
    clipped_rows,
    factory_for,
    faiss_threads,
    is_flat,
    make_engine,
    parameter_names,
    search_engine,
    search_flat,
    set_parameters,
    train_engine,
    training_rows,
)
from tct_hf.retrieval.pinned import PinnedIndex
from tct_hf.retrieval.runs import Run, one_id_a_vector, run_of
from tct_hf.retrieval.vector_blocks import BLOCK, as_matrix, as_rows, blocks, choose_rows, draw, ranges

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from sentence_transformers import SentenceTransformer

_SETTINGS_FILE = "tct_dense.json"
_INDEX_FILE = "index.faiss"
_FORMAT = 2


class DenseIndex(PinnedIndex):
    """A Faiss inner product index that answers query vectors with passage ids; make one with `build` or `load`.

    Equal scores are ordered by passage id: among all passages with exact search ("Flat"), otherwise among those found.
    Scores are exact inner products, except where the
    factory compresses what it scores last: with Refine(SQ8), one byte a component, they are off by about 0.1%.

    Attributes:
        ids: passage ids, one a row.
        factory: the Faiss factory string it was made with.
        parameters: the search parameters set, such as {"nprobe": 24, "k_factor": 3.0}; empty for exact search.
        tuning: how they were chosen: recall wanted and measured, k, what stood for queries; None if they were not.
        built_by: {"id", "weights_sha256", "encoding"} of the model that encoded the passages, where it was given; from
            the Hub also "revision".
    """

    def __init__(
        self,
        engine: Any,
        ids: Sequence[str],
        factory: str,
        *,
        parameters: Mapping[str, float] | None = None,
        tuning: dict[str, Any] | None = None,
        built_by: Mapping[str, Any] | None = None,
        mapped: bool = False,
    ) -> None:
        self._engine = engine
        self._mapped = mapped
        self.ids: Sequence[str] = ids
        self.factory = factory
        self.parameters = dict(parameters or {})
        self.tuning = tuning
        self.built_by = dict(built_by) if built_by else None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return int(self._engine.d)

    @classmethod
    def build(
        cls,
        vectors: npt.ArrayLike,
        ids: Iterable[str],
        factory: str = "auto",
        *,
        recall: float | None = 0.97,
        k: int = 100,
        query_vectors: npt.ArrayLike | None = None,
        parameters: Mapping[str, float] | None = None,
        built_by: Mapping[str, Any] | None = None,
        seed: int = 0,
        threads: int | None = None,
    ) -> DenseIndex:
        """Index passage vectors, as they are: nothing is normalised.

        "auto" is exact search up to 50,000 vectors, a graph (HNSW) up to 500,000, and beyond that inverted lists with
        codes of one bit a component (RaBitQ, read by fast scan) whose best are scored again with a byte a component.

        The search parameters of an index that is not exact are the cheapest that reach `recall` on a held-out slice.
        Give `query_vectors` for it when there are any (of training queries, say). Without, vectors made of held-out
        passages stand for queries: they are easier to find than queries are, so that the recall measured on them is
        too good. Part of the misses allowed is kept back for that, but that is no promise for queries unlike any
        passage.

        Args:
            vectors: (passages, dimension), any floating type; read in blocks, so that `np.load(path, mmap_mode="r")`
                needs no memory of its own.
            ids: passage ids, one a row, each once.
            factory: "auto", or any Faiss factory string, for instance "HNSW32" or "IVF256,Flat".
            recall: wanted mean Recall@k against exact search; None leaves the parameters as Faiss sets them.
            k: passages a query that `recall` speaks of.
            query_vectors: (queries, dimension) to choose the parameters with; not the queries that are reported.
            parameters: search parameters to set instead: nprobe, efSearch, k_factor.
            built_by: {"id", "weights_sha256", "encoding"} of the model that encoded the passages, kept with the index:
                "model" in the manifest of `encode_corpus`.
            seed: of the training sample, the clustering and the held-out slice.
            threads: for building; None leaves Faiss's own setting. One thread makes the same bytes of the same
                vectors; several make a graph that differs from one time to the next.

        Returns:
            The index.

        Raises:
            ValueError: a wrong shape, NaN or infinite components, ids that don't fit, a setting out of range, or a
                factory string that Faiss refuses.
        """
        matrix = as_rows(vectors, "vectors")
        id_list = list(ids)
        check_ids(id_list, len(matrix), "vectors")
        if recall is not None and not 0 < recall < 1:
            raise ValueError(f'recall: {recall} is not between 0 and 1; for exact search pass factory="Flat"')
        _check_k(k)
        queries = None if query_vectors is None else as_matrix(query_vectors, "query_vectors")
        if queries is not None and (queries.shape[1] != matrix.shape[1] or not len(queries)):
            raise ValueError(
                f"query_vectors: shape {queries.shape} for passages of dimension {matrix.shape[1]}; "
                "encode queries with the model that encoded the passages"
            )
        description = factory_for(len(matrix)) if factory == "auto" else factory
        with faiss_threads(threads):
            try:
                engine = make_engine(matrix.shape[1], description)
                low, high = ranges(matrix)
                held_out, training = draw(len(matrix), SLICE, training_rows(engine, len(matrix)), seed)
                if not engine.is_trained:
                    train_engine(engine, as_matrix(matrix[training], "vectors"), low, high, seed)
                for block in blocks(matrix):
                    engine.add(block)
            except RuntimeError as error:
                raise ValueError(
                    f"factory: Faiss can't make {description!r} of {len(matrix)} vectors of dimension "
                    f'{matrix.shape[1]} ({_faiss_reason(error)}); use "auto"'
                ) from error
            tuning = None
            if parameters is not None:
                set_parameters(engine, parameters)
            elif recall is not None and parameter_names(engine):
                source = "passages" if queries is None else "queries"
                queries = (
                    stand_ins(as_matrix(matrix[held_out], "vectors"), seed)
                    if queries is None
                    else queries[choose_rows(len(queries), SLICE, seed)]
                )
                exact = exact_neighbours(queries, matrix, min(k, len(matrix)))
                tuning = choose_parameters(engine, exact, recall, source, k)
                parameters = tuning.pop("parameters")
        return cls(engine, IdTable.of(id_list), description, parameters=parameters, tuning=tuning, built_by=built_by)

    def add(self, vectors: npt.ArrayLike, ids: Iterable[str]) -> None:
        """Add passages.

        What was learned from the first vectors (clusters, ranges, search parameters) stays: build anew when the
        collection has become another. Codes of some bits a component (SQ8, Refine(SQ8), as in "auto" from 500,000
        vectors) reach no further than the greatest and least value they were trained on: what lies beyond is stored
        as if it lay there, which is warned of.

        Args:
            vectors: (passages, dimension).
            ids: their ids, none of them in the index yet.

        Raises:
            ValueError: vectors or ids that don't fit, an index that was loaded with `mmap`, or one of a kind that
                can't grow (NSG).
        """
        if self._mapped:
            raise ValueError("add: this index is mapped from its files; load it with mmap=False to add passages")
        matrix = as_rows(vectors, "vectors")
        if matrix.shape[1] != self.dimension:
            raise ValueError(f"vectors: dimension {matrix.shape[1]} where the index has {self.dimension}")
        new = list(ids)
        check_ids(new, len(matrix), "vectors")
        everything = [*self.ids, *new]
        check_ids(everything, len(everything), "vectors")
        # All blocks are looked at before the first is added: a refused call leaves the index as it was.
        outside: list[int] = []
        for number, block in enumerate(blocks(matrix)):
            outside += (number * BLOCK + clipped_rows(self._engine, block)).tolist()
        if outside:
            warnings.warn(
                f"vectors: row {outside[0]} (passage {new[outside[0]]!r}) lies outside the range that the codes of "
                f"{self.factory} were trained on, as {len(outside)} of {len(new)} rows do, and is clipped to it: its "
                "scores will be off; build the index anew from all vectors",
                stacklevel=2,
            )
        try:
            for block in blocks(matrix):
                self._engine.add(block)
        except RuntimeError as error:
            raise ValueError(
                f"add: Faiss can't add to {self.factory} ({_faiss_reason(error)}); build the index anew from all "
                "vectors, or as another kind, such as HNSW32"
            ) from error
        self.ids = IdTable.of(everything)

    def search(
        self, query_vectors: npt.ArrayLike, k: int = 100, *, threads: int | None = None
    ) -> tuple[list[list[str]], list[np.ndarray]]:
        """Find the passages with the greatest inner product.

        Args:
            query_vectors: (queries, dimension), converted to float32.
            k: passages a query, at most.
            threads: of Faiss, for this call; None leaves its own setting.

        Returns:
            Ids and float32 scores, one list and one array a query, best first.

        Raises:
            ValueError: k is below 1, a wrong shape, NaN or infinite components, or a score that float32 can't hold.
        """
        import numpy as np

        _check_k(k)
        matrix = as_matrix(query_vectors, "query_vectors")
        if matrix.shape[1] != self.dimension:
            raise ValueError(
                f"query_vectors: dimension {matrix.shape[1]} where the index has {self.dimension}; "
                "encode queries with the model that encoded the passages"
            )
        depth = min(k, len(self.ids))
        if "k_factor" in self.parameters:
            # The best few are found by scoring as many candidates again as for the k that was tuned.
            tuned = min((self.tuning or {}).get("k", depth), len(self.ids))
            factor = self.parameters["k_factor"] * max(1.0, tuned / depth)
            set_parameters(self._engine, {"k_factor": factor})
        exact = is_flat(self._engine)
        with faiss_threads(threads):
            found_by: Any = search_flat if exact else search_engine
            all_scores, all_rows = found_by(self._engine, matrix, depth)
        ids: list[list[str]] = []
        scores: list[np.ndarray] = []
        for values, rows in zip(all_scores, all_rows, strict=True):
            if len(rows) < depth or (exact and rows[-1] < 0) or not np.isfinite(values[rows >= 0]).all():
                raise ValueError(
                    f"query_vectors: row {len(ids)} has a score that is NaN or infinite: its products with passages "
                    "leave the range of float32; check the model, or scale its vectors down"
                )
            if rows[-1] < 0:
                # Approximate indexes mark with -1 the places they could not fill.
                values, rows = values[rows >= 0], rows[rows >= 0]
            found = [self.ids[row] for row in rows.tolist()]
            if (values[1:] >= values[:-1]).any():
                order = sorted(range(len(found)), key=lambda at: (-values[at], found[at]))
                found, values = [found[at] for at in order], values[order]
            ids.append(found[:depth])
            scores.append(np.array(values[:depth]))
        return ids, scores

    def run(
        self, query_ids: Sequence[str], query_vectors: npt.ArrayLike, k: int = 100, *, threads: int | None = None
    ) -> Run:
        """Search and return a run.

        Args:
            query_ids: query ids, one a row of `query_vectors`, each once.
            query_vectors: (queries, dimension).
            k: passages a query, at most.
            threads: of Faiss, for this call; None leaves its own setting.

        Returns:
            Query id to passage id to score.

        Raises:
            ValueError: ids that don't fit the vectors; see `search` for the rest.
        """
        matrix = as_matrix(query_vectors, "query_vectors")
        names = one_id_a_vector(query_ids, len(matrix))
        return run_of(names, *self.search(matrix, k, threads=threads))

    def save(self, directory: str | Path) -> None:
        """Write the index to a folder; an index that is there is replaced whole.

        Args:
            directory: the folder.

        Raises:
            OSError: it can't be written, or it holds something else.
        """
        import faiss

        from tct_hf.retrieval.storage import write_directory

        ids = self.ids if isinstance(self.ids, IdTable) else IdTable.of(self.ids)

        def fill(staging: Path) -> None:
            # As set, not as the last search left it: saving depends on nothing but the index.
            set_parameters(self._engine, self.parameters)
            faiss.write_index(self._engine, str(staging / _INDEX_FILE))
            ids.save(staging)

        settings = {
            "format": _FORMAT,
            "factory": self.factory,
            "parameters": self.parameters,
            "tuning": self.tuning,
            "passages": len(self.ids),
            "dimension": self.dimension,
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
        model: SentenceTransformer | Mapping[str, Any] | None = None,
    ) -> DenseIndex:
        """Open an index that `save` wrote.

        Args:
            directory: the folder.
            mmap: leave vectors, codes and ids on disk and map them, where Faiss can; nothing can be added then.
            verify: compare the files' checksums, which reads each once; their sizes are always compared.
            model: that will encode queries, or its {"id", "weights_sha256", "encoding"}, to be compared with the one
                that built the index: by weights where both are known, otherwise by id; and by the digests of prompt,
                tokenizer, lengths and modules where both are known.

        Returns:
            The index.

        Raises:
            FileNotFoundError: there is no such index.
            ValueError: it was written by another version or built by another model, or a file is missing, truncated or
                altered.
        """
        import faiss

        from tct_hf.retrieval.storage import read_settings

        directory = Path(directory)
        settings = read_settings(directory, _SETTINGS_FILE, _FORMAT, "dense index", verify=verify)
        if model is not None:
            check_model(directory, settings["built_by"], model if isinstance(model, Mapping) else described(model))
        factory = settings["factory"]
        flags = 0
        if mmap:
            lists = factory.startswith("IVF") and "Refine" not in factory
            flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if lists else faiss.IO_FLAG_MMAP_IFC
        try:
            engine = faiss.read_index(str(directory / _INDEX_FILE), flags)
            ids = IdTable.load(directory, mmap=mmap)
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"{directory}: damaged dense index ({error}); build and save it again") from error
        if not len(ids) == engine.ntotal == settings["passages"] or engine.d != settings["dimension"]:
            raise ValueError(
                f"{directory}: {len(ids)} ids, {engine.ntotal} vectors of dimension {engine.d} where "
                f"{settings['passages']} of {settings['dimension']} are announced; build and save the index again"
            )
        set_parameters(engine, settings["parameters"])
        return cls(
            engine,
            ids,
            factory,
            parameters=settings["parameters"],
            tuning=settings["tuning"],
            built_by=settings["built_by"],
            mapped=mmap,
        )


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k: {k} is below 1; ask for at least one passage")


def _faiss_reason(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1].split("Error: ")[-1] if str(error).strip() else repr(error)
