"""Dense retrieval: inner product search over passage vectors with Faiss."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from tct_hf.retrieval.faiss_tools import (
    SLICE,
    draw,
    factory_for,
    faiss_threads,
    make_engine,
    parameter_names,
    search_engine,
    search_flat,
    set_parameters,
    train_engine,
    training_rows,
    tune,
)
from tct_hf.retrieval.index import VectorIndex, check_ids, id_array
from tct_hf.retrieval.rows import as_matrix, as_rows, blocks

_INDEX_FILE = "index.faiss"
_LIMITS_FILE = "limits.npy"


class DenseIndex(VectorIndex):
    """A Faiss inner product index that answers query vectors with passage ids; make one with `build` or `load`.

    Equal scores are ordered by passage id: among all passages with exact search ("Flat"), otherwise among those found.
    Scores are exact inner products, except where the factory compresses what it scores last: with Refine(SQ8), one
    byte a component, they are off by about 0.1%.

    Attributes:
        factory: the Faiss factory string it was made with.
        parameters: the search parameters set, such as {"nprobe": 24, "k_factor": 3.0}; empty for exact search.
        tuning: how they were chosen: recall wanted and measured, k, what stood for queries; None if they were not.
        limits: (2, dimension) float32, least and greatest value of each component that it was built with.
    """

    kind, title, tags = "dense index", "A Faiss index", ("faiss",)
    settings_file, format = "tct_dense.json", 3

    def __init__(
        self,
        engine: Any,
        ids: Sequence[str],
        factory: str,
        limits: np.ndarray,
        *,
        parameters: Mapping[str, float] | None = None,
        tuning: dict[str, Any] | None = None,
        built_by: Mapping[str, Any] | None = None,
        mapped: bool = False,
    ) -> None:
        self._engine = engine
        self._mapped = mapped
        self.ids = ids
        self.factory = factory
        self.limits = limits
        self.parameters = dict(parameters or {})
        self.tuning = tuning
        self.built_by = dict(built_by) if built_by else None

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

        The search parameters of an index that is not exact are the cheapest that reach `recall` on a held-out slice of
        `query_vectors`. Without these, vectors made of held-out passages stand for queries. They are easier to find:
        part of the misses allowed is kept back; that is no promise for queries unlike any passage.

        Args:
            vectors: (passages, dimension), any floating type; read in blocks, so that `np.load(path, mmap_mode="r")`
                needs no memory of its own.
            ids: passage ids, one a row, each once.
            factory: "auto", or any Faiss factory string, for instance "HNSW32" or "IVF256,Flat".
            recall: wanted mean Recall@k against exact search; None leaves the parameters as Faiss sets them.
            k: passages a query that `recall` speaks of.
            query_vectors: (queries, dimension) to choose the parameters with; not the queries that are reported.
            parameters: search parameters to set instead: nprobe, efSearch, k_factor.
            built_by: the model that encoded the passages, "model" in the manifest of `encode_corpus`.
            seed: seed of the training sample, the clustering and the held-out slice.
            threads: threads to build with; None leaves Faiss's own setting. One thread makes the same bytes of the
                same vectors; several make a graph that differs from one time to the next.

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
                extremes = [(block.min(axis=0), block.max(axis=0)) for block in blocks(matrix)]
                limits = np.stack([np.min([low for low, _ in extremes], 0), np.max([high for _, high in extremes], 0)])
                held_out, training = draw(len(matrix), SLICE, training_rows(engine, len(matrix)), seed)
                if not engine.is_trained:
                    train_engine(engine, as_matrix(matrix[training], "vectors"), limits, seed)
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
                tuning = tune(engine, matrix, held_out, queries, recall, k, seed)
                parameters = tuning.pop("parameters")
        return cls(
            engine,
            id_array(id_list),
            description,
            limits,
            parameters=parameters,
            tuning=tuning,
            built_by=built_by,
        )

    def add(self, vectors: npt.ArrayLike, ids: Iterable[str]) -> None:
        """Add passages (passages, dimension) with ids that are not in the index yet.

        What was learned from the first vectors (clusters, ranges, search parameters) stays: build anew when the
        collection has become another. Codes of some bits a component (SQ8, Refine(SQ8), as in "auto" from 500,000
        vectors) reach no further than the greatest and least value they were trained on: what lies beyond is stored
        as if it lay there, which is warned of.

        Raises:
            ValueError: vectors or ids that don't fit, or an index that can't grow (loaded with `mmap`, or NSG).
        """
        if self._mapped:
            raise ValueError("add: this index is mapped from its files; load it with mmap=False to add passages")
        matrix = as_rows(vectors, "vectors")
        if matrix.shape[1] != self.dimension:
            raise ValueError(f"vectors: dimension {matrix.shape[1]} where the index has {self.dimension}")
        new = list(ids)
        check_ids(new, len(matrix), "vectors")
        everything = [*self.ids.to_pylist(), *new]
        check_ids(everything, len(everything), "vectors")
        # All blocks are looked at before the first is added: a refused call leaves the index as it was.
        slack = (self.limits[1] - self.limits[0]) / 255
        low, high = self.limits[0] - slack, self.limits[1] + slack
        beyond = np.concatenate([((block < low) | (block > high)).any(axis=1) for block in blocks(matrix)])
        outside = np.flatnonzero(beyond)
        if len(outside) and re.search(r"SQ\d", self.factory):
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
        self.ids = id_array(everything)

    def search(  # type: ignore[override]
        self, query_vectors: npt.ArrayLike, k: int = 100, *, threads: int | None = None
    ) -> tuple[list[list[str]], list[np.ndarray]]:
        """Find the passages with the greatest inner product.

        Args:
            query_vectors: (queries, dimension).
            k: passages a query, at most.
            threads: threads of Faiss for this call; None leaves its own setting.

        Returns:
            Ids and float32 scores, one list and one array a query, best first.

        Raises:
            ValueError: k is below 1, a wrong shape, NaN or infinite components, or a score that float32 can't hold.
        """
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
        exact = isinstance(faiss.downcast_index(self._engine), faiss.IndexFlat)
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
            found = self._names(rows)
            if (values[1:] >= values[:-1]).any():
                order = sorted(range(len(found)), key=lambda at: (-values[at], found[at]))
                found, values = [found[at] for at in order], values[order]
            ids.append(found[:depth])
            scores.append(np.array(values[:depth]))
        return ids, scores

    def _settings(self) -> dict[str, Any]:
        names = ("factory", "parameters", "tuning", "dimension", "built_by")
        return {name: getattr(self, name) for name in names}

    def _write(self, folder: Path) -> None:
        # As set, not as the last search left it: saving depends on nothing but the index.
        set_parameters(self._engine, self.parameters)
        faiss.write_index(self._engine, str(folder / _INDEX_FILE))
        np.save(folder / _LIMITS_FILE, self.limits)

    @classmethod
    def _open(cls, folder: Path, settings: dict[str, Any], ids: Any, *, mmap: bool, verify: bool) -> DenseIndex:
        flags = 0
        if mmap:
            lists = settings["factory"].startswith("IVF") and "Refine" not in settings["factory"]
            flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if lists else faiss.IO_FLAG_MMAP_IFC
        engine = faiss.read_index(str(folder / _INDEX_FILE), flags)
        dimension = settings.pop("dimension")
        if len(ids) != engine.ntotal or engine.d != dimension:
            raise ValueError(
                f"{engine.ntotal} vectors of dimension {engine.d} where {len(ids)} of {dimension} are announced"
            )
        set_parameters(engine, settings["parameters"])
        return cls(engine, ids, limits=np.load(folder / _LIMITS_FILE), mapped=mmap, **settings)

    def _card(self) -> tuple[str, list[tuple[str, str]]]:
        of_what, model = self._model_card()
        tuned = self.tuning or {}
        rows = [
            ("dimension", str(self.dimension)),
            ("Faiss factory", f"`{self.factory}`"),
            *((name, f"{value:g}") for name, value in self.parameters.items()),
            model,
        ]
        if "recall" in tuned and "measured" in tuned:
            rows.append((f"Recall@{tuned['k']} against exact search", f"{tuned['measured']:.4f} on {tuned['source']}"))
        return of_what, rows


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k: {k} is below 1; ask for at least one passage")


def _faiss_reason(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1].split("Error: ")[-1] if str(error).strip() else repr(error)
