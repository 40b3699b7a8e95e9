"""What all engines share: a table filled shard by shard from encode's folder, pinned to the model behind it."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from uuid import uuid4

import numpy as np

from tct_hf.data import shards
from tct_hf.data.shards import digest_of
from tct_hf.files import file_digest
from tct_hf.progress import PassageProgress, print_at_once
from tct_hf.retrieval.checks import check_ids, check_k, check_model, described
from tct_hf.retrieval.index import VectorSearch
from tct_hf.retrieval.vectors import as_matrix, load_vectors, read_manifest

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Self

FORMAT = 2
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,39}")


class Rows(NamedTuple):
    """Passages to store: ids, vectors `(passages, dimension)` float32, and texts and metadata where there are any."""

    ids: Sequence[str]
    vectors: np.ndarray
    texts: Sequence[str | None]
    metadata: Sequence[Mapping[str, Any] | None]


class EngineIndex(VectorSearch):
    """Passage vectors in a table of an engine, found by inner product; make one with `push`, come back with `open`.

    Args:
        name: of the table.
        about: what is stored of it: "dimension", "half", "built_by" and the graph's options.

    Attributes:
        exact: search every passage instead of the engine's graph.
        ef_search: candidates that the graph looks at; the more, the better and slower.
        where: a condition in the engine's language that every passage found meets.
    """

    _rows_of = staticmethod(as_matrix)
    engine: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {"m": 16, "ef_construction": 64}  # of the graph, with their defaults

    def __init__(self, name: str, about: Mapping[str, Any]) -> None:
        self.name, self.about, self.exact = name, dict(about), False
        self.ef_search, self.where = 100, ""

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return int(self.about["dimension"])

    def _at_most(self, k: int) -> int:
        return k  # counting its rows would take an engine longer than the search

    @property
    def digest(self) -> str:
        """Identifies what is stored: another after each push that stores something, upsert or delete."""
        return digest_of(map(str, [*sorted(self._digests().items()), sorted(self.about.items())]))

    # An engine connects, making its tables where they are missing; says what is stored of a table, and stores it
    # where nothing is; and then, of a table: the digests of its shards and, by a number below 0, of the last change of
    # other rows; one shard, stored whole or not at all in place of whatever it was (None: rows of no shard); and the
    # graph, made where it is missing.
    @classmethod
    @abstractmethod
    def _connected(cls, url: str | None, name: str, about: Mapping[str, Any] | None) -> Self: ...

    @abstractmethod
    def _digests(self) -> dict[int, str]: ...

    @abstractmethod
    def _store(self, number: int | None, digest: str, rows: Rows) -> None: ...

    @abstractmethod
    def _forget(self, numbers: Iterable[int]) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...

    @abstractmethod
    def vectors(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """The stored vectors `(dimension,)` float32 of those of the passages that are there, by id."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the table and its graph take in the engine."""

    @abstractmethod
    def uses_graph(self) -> bool:
        """Whether a search goes through the engine's graph, by its own account."""

    def upsert(
        self,
        ids: Sequence[str],
        vectors: Any,
        texts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Store passages, in place of those with the same ids."""
        matrix, names = as_matrix(vectors, "vectors"), list(ids)
        check_ids(names, len(matrix), "vectors")
        if matrix.shape[1] != self.dimension:
            raise ValueError(f"vectors: dimension {matrix.shape[1]} where table {self.name} has {self.dimension}")
        self._store(None, uuid4().hex, _checked(names, matrix, texts, metadata))

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> None:
        """Remove passages; ids that are not there are passed over."""

    @abstractmethod
    def drop(self) -> None:
        """Remove the table and all that is stored of it."""

    @classmethod
    def push(
        cls,
        vectors_folder: str | Path,
        url: str | None = None,
        name: str = "passages",
        *,
        corpus: Dataset | None = None,
        half: bool = False,
        write: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Self:
        """Fill a table with what `encode_corpus` wrote, one shard at a time; what is stored already is left.

        Called again after an interruption it goes on; of a corpus that was encoded anew, shards that have changed are
        replaced.

        Args:
            vectors_folder: folder of `encode_corpus`, of dense vectors.
            url: of the engine; by default that of its environment variables.
            name: of the table, made where it is missing: lower-case letters, digits and underscores.
            corpus: the passages in the order in which they were encoded: its column text is stored, and its other
                columns as metadata.
            half: store vectors in half precision.
            write: takes a line of progress; prints it when None.
            **options: see the engine.

        Raises:
            ValueError: sparse vectors, a damaged shard, another corpus than was encoded, an unknown option, or a table
                of another model or other options.
            OSError: the engine can't be reached, or refuses.
        """
        folder, manifest = Path(vectors_folder), read_manifest(vectors_folder)
        if manifest.get("layout") == "sparse":
            raise ValueError(f"{folder}: sparse vectors, which {cls.engine} does not search; use a SparseIndex")
        if corpus is not None and len(corpus) != manifest["count"]:
            raise ValueError(f"corpus: {len(corpus)} passages where {folder} has vectors of {manifest['count']}")
        if unknown := [key for key in options if key not in cls.options]:
            raise ValueError(f"{unknown[0]}: no option of {cls.engine}; use {', '.join(cls.options)}")
        built_by = manifest["model"]
        about = {"format": FORMAT, "dimension": manifest["dim"], "half": half, **cls.options, **options}
        index = cls._connected(url, name, {**about, "built_by": built_by})
        check_model(f"{cls.engine} table {name}", index.about["built_by"], built_by)
        if different := [key for key in ("format", "dimension", "half", *options) if index.about[key] != about[key]]:
            raise ValueError(
                f"{different[0]}: table {name} has {index.about[different[0]]}, and this would be "
                f"{about[different[0]]}; name another table, or drop this one"
            )
        done = index._digests()
        write = write or print_at_once
        progress = PassageProgress(manifest["count"], None, write, 10.0)
        start = 0
        for number, entry in enumerate(manifest["shards"]):
            file = shards.shard_file(folder, number)
            stop = start + entry["count"]
            # With the columns stored, so that texts can be added to vectors that are there.
            digest = " ".join([entry["sha256"], *(corpus.column_names if corpus is not None else [])])
            if done.get(number, "").startswith(digest):
                progress.skipped(entry["count"])
            else:
                table = shards.read_shard(folder, number)
                if file_digest(file) != entry["sha256"]:
                    raise ValueError(f"{file}: damaged or altered (its checksum differs); encode again")
                vectors = table["vector"].chunk(0).flatten().to_numpy().reshape(len(table), -1).astype(np.float32)
                index._store(number, digest, _rows(table["id"].to_pylist(), vectors, corpus, start))
                progress.encoded(entry["count"])
            start = stop
        index._forget(number for number in done if number >= len(manifest["shards"]))
        write("  building the index")
        index._finish()
        progress.finish(start)
        return index

    @classmethod
    def open(cls, url: str | None = None, name: str = "passages", *, model: Any = None) -> Self:
        """Come back to a table that `push` filled; refused where `model` did not encode its passages."""
        index = cls._connected(url, name, None)
        if model is not None:
            found = model if isinstance(model, Mapping) else described(model)
            check_model(f"{cls.engine} table {name}", index.about["built_by"], found)
        return index

    def verify(self, vectors_folder: str | Path, *, k: int = 100, sample: int = 100, seed: int = 0) -> dict[str, Any]:
        """Compare the table with the folder it was filled from.

        Args:
            vectors_folder: the folder.
            k: passages a query.
            sample: passages drawn, to be read back and, as queries, searched for.
            seed: of the draw.

        Returns:
            "passages" and "expected", "sample" and "equal" (vectors that are the same bit for bit), "recall" (of the
            graph at k against exact search), "uses_graph".
        """
        k = check_k(k)
        ids, vectors, _ = load_vectors(vectors_folder, mmap=True)
        drawn = np.sort(np.random.default_rng(seed).choice(len(ids), min(sample, len(ids)), replace=False))
        names, wanted = [ids[row] for row in drawn], np.asarray(vectors[drawn])
        if self.about["half"]:
            wanted = wanted.astype(np.float16).astype(np.float32)
        kept = self.vectors(names)
        equal = sum(name in kept and np.array_equal(kept[name], row) for name, row in zip(names, wanted, strict=True))
        before, found = self.exact, {}
        for self.exact in (False, True):
            found[self.exact] = self.search(wanted, k)[0]
        self.exact = before
        pairs = zip(found[False], found[True], strict=True)
        recall = float(np.mean([len({*some} & {*every}) / max(len(every), 1) for some, every in pairs]))
        figures = {"passages": len(self), "expected": len(ids), "sample": len(names), "equal": equal}
        return {**figures, "k": k, "recall": recall, "uses_graph": self.uses_graph()}


def check_name(name: str) -> None:
    """Refuse a table's name that engines would not take as it is."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: {name!r}; use up to 40 lower-case letters, digits and underscores, no digit first")


def _rows(ids: list[str], vectors: np.ndarray, corpus: Dataset | None, start: int) -> Rows:
    if corpus is None:
        return _checked(ids, vectors)
    batch = dict(corpus[start : start + len(ids)])
    if (found := batch.pop("id")) != ids:
        at = next(row for row, pair in enumerate(zip(found, ids, strict=True)) if pair[0] != pair[1])
        raise ValueError(f"corpus: row {start + at} is {found[at]!r} where {ids[at]!r} was encoded; give that corpus")
    texts = batch.pop("text")
    metadata = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)] if batch else None
    return _checked(ids, vectors, texts, metadata)


def _checked(
    ids: Sequence[str],
    vectors: np.ndarray,
    texts: Sequence[str] | None = None,
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> Rows:
    """Passages to store; refused where a text or metadata is missing, or can't be stored."""
    none = [None] * len(ids)
    for what, given in (("texts", texts), ("metadata", metadata)):
        if given is not None and len(given) != len(ids):
            raise ValueError(f"{what}: {len(given)} of {len(ids)} passages; give one for each, or leave them out")
    for name, more in zip(ids, none if metadata is None else metadata, strict=True):
        try:
            json.dumps(more, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata of passage {name!r}: {error}; leave that column out") from None
    return Rows(ids, vectors, none if texts is None else texts, none if metadata is None else metadata)
