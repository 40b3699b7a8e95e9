"""Dense retrieval: inner product search over passage vectors with Faiss."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.retrieval.runs import Run
from tct_hf.retrieval.sparse import check_ids

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_SETTINGS_FILE = "tct_dense.json"
_INDEX_FILE = "index.faiss"
_IDS_FILE = "ids.json"
_FORMAT = 1


class DenseIndex:
    """A Faiss inner product index that answers query vectors with passage ids; make one with `build` or `load`.

    Equal scores among the passages found are ordered by passage id.
    """

    def __init__(self, engine: Any, ids: list[str], factory: str) -> None:
        self._engine = engine
        self.ids = ids
        self.factory = factory

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return int(self._engine.d)

    @classmethod
    def build(cls, vectors: npt.ArrayLike, ids: Iterable[str], factory: str = "auto") -> DenseIndex:
        """Index passage vectors.

        Args:
            vectors: (passages, dimension), converted to float32.
            ids: passage ids, one a row, each once.
            factory: "auto" (exact search, `Flat`), or any Faiss factory string, for instance "HNSW32" or
                "IVF256,Flat"; an index that needs training is trained on these vectors.

        Returns:
            The index.

        Raises:
            ValueError: a wrong shape, NaN or infinite components, ids that don't fit, or a factory string that Faiss
                refuses.
        """
        import faiss

        matrix = _matrix(vectors, "vectors")
        id_list = list(ids)
        check_ids(id_list, len(matrix), "vectors")
        description = "Flat" if factory == "auto" else factory
        try:
            engine = faiss.index_factory(matrix.shape[1], description, faiss.METRIC_INNER_PRODUCT)
            if not engine.is_trained:
                engine.train(matrix)
            engine.add(matrix)
        except RuntimeError as error:
            raise ValueError(
                f"factory: Faiss can't make {description!r} of {len(matrix)} vectors of dimension {matrix.shape[1]} "
                f'({_faiss_reason(error)}); use "auto" for exact search'
            ) from error
        return cls(engine, id_list, description)

    def search(self, query_vectors: npt.ArrayLike, k: int = 100) -> tuple[list[list[str]], list[np.ndarray]]:
        """Find the passages with the greatest inner product.

        Args:
            query_vectors: (queries, dimension), converted to float32.
            k: passages a query, at most.

        Returns:
            Ids and float32 scores, one list and one array a query, best first.

        Raises:
            ValueError: k is below 1, a wrong shape, or NaN or infinite components.
        """
        import numpy as np

        if k < 1:
            raise ValueError(f"k: {k} is below 1; ask for at least one passage")
        matrix = _matrix(query_vectors, "query_vectors")
        if matrix.shape[1] != self.dimension:
            raise ValueError(
                f"query_vectors: dimension {matrix.shape[1]} where the index has {self.dimension}; "
                "encode queries with the model that encoded the passages"
            )
        all_scores, all_rows = self._engine.search(matrix, min(k, len(self.ids)))
        ids: list[list[str]] = []
        scores: list[np.ndarray] = []
        for values, rows in zip(all_scores, all_rows, strict=True):
            # Approximate indexes mark with -1 the places they could not fill.
            found = [(float(value), self.ids[row]) for value, row in zip(values, rows, strict=True) if row >= 0]
            found.sort(key=lambda item: (-item[0], item[1]))
            ids.append([passage_id for _, passage_id in found])
            scores.append(np.array([value for value, _ in found], dtype=np.float32))
        return ids, scores

    def run(self, query_ids: Sequence[str], query_vectors: npt.ArrayLike, k: int = 100) -> Run:
        """Search and return a run.

        Args:
            query_ids: query ids, one a row of `query_vectors`, each once.
            query_vectors: (queries, dimension).
            k: passages a query, at most.

        Returns:
            Query id to passage id to score.

        Raises:
            ValueError: ids that don't fit the vectors; see `search` for the rest.
        """
        matrix = _matrix(query_vectors, "query_vectors")
        names = list(query_ids)
        if len(names) != len(matrix) or len(set(names)) != len(names):
            raise ValueError(
                f"query_ids: {len(names)} ids, {len(set(names))} of them distinct, for {len(matrix)} vectors; "
                "pass one id for each, each once"
            )
        ids, scores = self.search(matrix, k)
        return {
            name: dict(zip(found, values.tolist(), strict=True))
            for name, found, values in zip(names, ids, scores, strict=True)
        }

    def save(self, directory: str | Path) -> None:
        """Write the index to a folder; an index that is there is replaced whole.

        Args:
            directory: the folder.

        Raises:
            OSError: it can't be written, or it holds something else.
        """
        import faiss

        from tct_hf.retrieval.storage import write_directory

        def fill(staging: Path) -> None:
            faiss.write_index(self._engine, str(staging / _INDEX_FILE))
            (staging / _IDS_FILE).write_text(json.dumps(self.ids, ensure_ascii=False), encoding="utf-8")
            settings = {
                "format": _FORMAT,
                "factory": self.factory,
                "passages": len(self.ids),
                "dimension": self.dimension,
            }
            (staging / _SETTINGS_FILE).write_text(json.dumps(settings, indent=1), encoding="utf-8")

        write_directory(directory, fill, _SETTINGS_FILE)

    @classmethod
    def load(cls, directory: str | Path) -> DenseIndex:
        """Open an index that `save` wrote.

        Args:
            directory: the folder.

        Returns:
            The index.

        Raises:
            FileNotFoundError: there is no such index.
            ValueError: it was written by another version or is damaged.
        """
        import faiss

        from tct_hf.retrieval.storage import read_settings

        directory = Path(directory)
        settings = read_settings(directory, _SETTINGS_FILE, _FORMAT, "dense index")
        try:
            engine = faiss.read_index(str(directory / _INDEX_FILE))
            ids = json.loads((directory / _IDS_FILE).read_text(encoding="utf-8"))
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"{directory}: damaged dense index ({error}); build and save it again") from error
        if not len(ids) == engine.ntotal == settings["passages"] or engine.d != settings["dimension"]:
            raise ValueError(
                f"{directory}: {len(ids)} ids, {engine.ntotal} vectors of dimension {engine.d} where "
                f"{settings['passages']} of {settings['dimension']} are announced; build and save the index again"
            )
        return cls(engine, ids, settings["factory"])


def _matrix(vectors: npt.ArrayLike, what: str) -> np.ndarray:
    import numpy as np

    matrix = np.ascontiguousarray(vectors, dtype=np.float32)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{what}: shape {matrix.shape} where (rows, dimension) is needed; stack vectors as rows")
    # By blocks: a mask of the whole matrix would add a quarter to its memory.
    for start in range(0, len(matrix), 65536):
        finite = np.isfinite(matrix[start : start + 65536]).all(axis=1)
        if not finite.all():
            row = start + int(np.flatnonzero(~finite)[0])
            raise ValueError(f"{what}: row {row} has a NaN or infinite component; check the model and its dtype")
    return matrix


def _faiss_reason(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1].split("Error: ")[-1] if str(error).strip() else repr(error)
