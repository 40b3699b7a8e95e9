"""Dense retrieval: inner product search over passage vectors with Faiss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from tct_hf.retrieval.checks import check_ids, check_k
from tct_hf.retrieval.faiss_tools import (
    factory_for,
    faiss_threads,
    filled_engine,
    parameter_names,
    parts,
    search_all,
    search_flat,
    set_parameters,
    tune,
)
from tct_hf.retrieval.index import VectorIndex, best_first, id_array
from tct_hf.retrieval.vectors import as_matrix, as_rows

_INDEX_FILE = "index.faiss"
_TRUST = (
    "Faiss can't check the file that it reads, and a forged one can harm this process. Pass trust_faiss=True if you "
    "trust who published it, or build the index of your own vectors."
)


class DenseIndex(VectorIndex):
    """A Faiss inner product index that answers query vectors with passage ids; make one with `build` or `load`.

    Equal scores are ordered by passage id: among all passages with exact search ("Flat"), otherwise among those found.
    Scores are exact inner products, except where the factory compresses what it scores last: with Refine(SQ8), one
    byte a component, they are off by about 0.1%.

    Attributes:
        factory: the Faiss factory string it was made with.
        parameters: the search parameters set, such as {"nprobe": 24, "k_factor": 3.0}; empty for exact search.
        tuning: how they were chosen: recall wanted and measured, k, what stood for queries; None if they were not.
    """

    kind, title, tags = "dense index", "A Faiss index", ("faiss",)
    settings_file, format, hub_options = "tct_dense.json", 5, ", trust_faiss=True"
    _rows_of = staticmethod(as_matrix)

    def __init__(
        self,
        engine: Any,
        ids: Sequence[str],
        factory: str,
        *,
        parameters: Mapping[str, float] | None = None,
        tuning: dict[str, Any] | None = None,
        built_by: Mapping[str, Any] | None = None,
    ) -> None:
        self._engine, self.ids, self.factory, self.tuning = engine, ids, factory, tuning
        self._refine, _, _ = parts(engine)
        self._exact = isinstance(faiss.downcast_index(engine), faiss.IndexFlat)
        self.parameters = dict(parameters or {})
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

        "auto" is exact search up to 50,000 vectors, and beyond that inverted lists with codes of two bits a component
        (PQ, read by fast scan) whose best are scored again with a byte a component.

        The search parameters of an index that is not exact are the cheapest that reach `recall` on some of
        `query_vectors`, with a margin that shrinks with their number. Without these, vectors made of held-out passages
        stand for queries. They are easier to find: two fifths of the misses allowed are kept back; that is no promise
        for queries unlike any passage.

        Args:
            vectors: (passages, dimension), any floating type; read in blocks, so that `np.load(path, mmap_mode="r")`
                needs no memory of its own.
            ids: passage ids, one a row, each once.
            factory: "auto", or any Faiss factory string, for instance "IVF256,Flat" or "HNSW32".
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
        k = check_k(k)
        queries = None if query_vectors is None else as_matrix(query_vectors, "query_vectors")
        if queries is not None and (queries.shape[1] != matrix.shape[1] or not len(queries)):
            raise ValueError(
                f"query_vectors: shape {queries.shape} for passages of dimension {matrix.shape[1]}; "
                "encode queries with the model that encoded the passages"
            )
        description = factory_for(*matrix.shape) if factory == "auto" else factory
        with faiss_threads(threads):
            try:
                engine, held_out = filled_engine(matrix, description, seed)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1].split("Error: ")[-1]
                raise ValueError(
                    f"factory: Faiss can't make {description!r} of {len(matrix)} vectors of dimension "
                    f'{matrix.shape[1]} ({reason}); use "auto"'
                ) from error
            tuning = None
            if parameters is not None:
                set_parameters(engine, parameters)
            elif recall is not None and parameter_names(engine):
                tuning = tune(engine, matrix, held_out, queries, recall, k, seed)
                parameters = tuning.pop("parameters")
        kept: dict[str, Any] = {"parameters": parameters, "tuning": tuning, "built_by": built_by}
        return cls(engine, id_array(id_list), description, **kept)

    def _search(self, queries: np.ndarray, k: int) -> tuple[list[list[str]], list[np.ndarray]]:
        if "k_factor" in self.parameters:
            # The best few are found by scoring as many candidates again as for the k that was tuned.
            tuned = min((self.tuning or {}).get("k", k), len(self.ids))
            self._refine.k_factor = self.parameters["k_factor"] * max(1.0, tuned / k)
        found_by: Any = search_flat if self._exact else search_all
        all_scores, all_rows = found_by(self._engine, queries, k)
        ids: list[list[str]] = []
        scores: list[np.ndarray] = []
        for values, rows in zip(all_scores, all_rows, strict=True):
            if len(rows) < k or rows.min() < 0 or not np.isfinite(values).all():
                raise ValueError(
                    f"query_vectors: row {len(ids)} has a score that is NaN or infinite: its products with passages "
                    "leave the range of float32; check the model, or scale its vectors down"
                )
            found = self._names(rows)
            if (values[1:] >= values[:-1]).any():
                found, values = best_first(found, values, k)
            ids.append(found[:k])
            scores.append(np.array(values[:k]))
        return ids, scores

    @classmethod
    def from_hub(cls, repo_id: str, *, trust_faiss: bool = False, **options: Any) -> DenseIndex:
        """Download and open an index that `push_to_hub` pushed; see `Index.from_hub`.

        Args:
            repo_id: dataset repository.
            trust_faiss: read the Faiss file; a forged one can harm this process.
            **options: the other arguments of `Index.from_hub` and `load`.

        Raises:
            ValueError: `trust_faiss` is not set, or the index is damaged.
        """
        if not trust_faiss:
            raise ValueError(f"{repo_id}: {_TRUST}")
        return super().from_hub(repo_id, trust_faiss=True, **options)

    @classmethod
    def load(cls, directory: str | Path, *, trust_faiss: bool = False, **options: Any) -> DenseIndex:
        """Open an index that you saved, and refuse it where `model` did not build it.

        Args:
            directory: its folder. One that huggingface_hub or git downloaded is refused; of one that was copied from
                elsewhere nothing tells who made it: load only what you trust.
            trust_faiss: read the Faiss file of a downloaded folder; see :meth:`from_hub`.
            **options: `model`, the encoder of queries; `mmap`, leave the index on disk; `verify`, compare checksums
                (true by default).

        Raises:
            FileNotFoundError: there is no index.
            ValueError: a downloaded folder without `trust_faiss`, another model, or the index is damaged.
        """
        if not trust_faiss and _is_downloaded(Path(directory)):
            raise ValueError(f"{directory}: a downloaded index. {_TRUST}")
        return super().load(directory, **options)

    def _settings(self) -> dict[str, Any]:
        names = ("factory", "parameters", "tuning", "built_by")
        return {name: getattr(self, name) for name in names}

    def _write(self, folder: Path) -> None:
        # As set, not as the last search left it: saving depends on nothing but the index.
        set_parameters(self._engine, self.parameters)
        faiss.write_index(self._engine, str(folder / _INDEX_FILE))

    @classmethod
    def _open(cls, folder: Path, settings: dict[str, Any], ids: Any, *, mmap: bool, verify: bool) -> DenseIndex:
        kinds = {"factory": (str,), "parameters": (dict,), "tuning": (dict, NoneType), "built_by": (dict, NoneType)}
        if wrong := [name for name, kind in kinds.items() if not isinstance(settings[name], kind)]:
            raise ValueError(f"{wrong[0]}: {settings[wrong[0]]!r} can't be used")
        flags = 0
        if mmap:
            on_disk = settings["factory"].startswith("IVF") and "Refine" not in settings["factory"]
            flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if on_disk else faiss.IO_FLAG_MMAP_IFC
        engine = faiss.read_index(str(folder / _INDEX_FILE), flags)
        if engine.ntotal != len(ids) or engine.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(f"{engine.ntotal} vectors, or no inner products, where {len(ids)} ids are given")
        _, ivf, _ = parts(engine)
        lists: Any = None if ivf is None else faiss.downcast_InvertedLists(ivf.invlists)
        if isinstance(lists, faiss.OnDiskInvertedLists):
            # Threads that read ahead: a child process would wait for those of its parent. Search is faster without.
            lists.prefetch_nthread = 0
        set_parameters(engine, settings["parameters"])
        return cls(engine, ids, **settings)

    def _facts(self) -> list[tuple[str, str]]:
        tuned = self.tuning or {}
        rows = [("Faiss factory", f"`{self.factory}`"), *((name, f"{at:g}") for name, at in self.parameters.items())]
        if "measured" in tuned:
            rows.append((f"Recall@{tuned['k']} against exact search", f"{tuned['measured']:.4f} on {tuned['source']}"))
        return rows


def _is_downloaded(folder: Path) -> bool:
    """Whether huggingface_hub's cache or metadata, or a clone of git, shows that an index came from the Hub."""
    file = folder.resolve() / _INDEX_FILE
    metadata = Path(".cache", "huggingface", "download")
    return (folder / ".git").exists() or any(
        (parent.name == "snapshots" and "--" in parent.parent.name)
        or (parent / metadata / f"{file.relative_to(parent)}.metadata").is_file()
        for parent in file.parents
    )
