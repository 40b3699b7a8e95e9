"""What a student and BM25 need to search a collection: made once under a folder, opened from then on."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tct_hf.cache import default_cache_dir
from tct_hf.files import claim, write_json_atomic
from tct_hf.retrieval.bm25 import BM25Index
from tct_hf.retrieval.dense import DenseIndex
from tct_hf.retrieval.encode import is_sparse_encoder
from tct_hf.retrieval.rows import FirstColumns, UnitRows, finite_rows
from tct_hf.retrieval.sparse import SparseIndex

if TYPE_CHECKING:
    from accelerate import PartialState
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

    from tct_hf.data.collection import Collection
    from tct_hf.evaluation.report_settings import ExpansionSettings

Index = TypeVar("Index", BM25Index, DenseIndex, SparseIndex)
# Of the vectors and index of a sparse student beside a dense one, in the folder of the dense one's.
SPARSE_FOLDER = "sparse_student"
# Of those of the base as it is.
BASE_FOLDER = "base"
# Named in place of a ColBERT: the student's own token vectors.
OWN = "own"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Stored(Generic[Index]):
    """An index with what it costs.

    Args:
        index: opened.
        folder: on disk.
        memory_bytes: of its arrays and tables.
        build_seconds: that making it took, without the encoding; None where a stopped run had made it.
    """

    index: Index
    folder: Path
    memory_bytes: int
    build_seconds: float | None


class Stores:
    """The encoded corpus and the indexes of a collection and a student, each made when it is first asked for.

    Args:
        collection: to search.
        student: of one vector a text, compared by dot product or cosine; or a sparse one, compared by dot product.
        name: the student's, as it was given.
        folder: of `vectors` and `indexes`; None takes one of the cache, named by all that they depend on.
        precision: of encoding: "auto", "bf16" or "fp32".
        threads: of building indexes; one makes the same index every time.
        write: takes lines of progress.

    Raises:
        ValueError: the student compares otherwise, or the folder holds the work of another corpus, student or setting.
    """

    def __init__(
        self,
        collection: Collection,
        student: SentenceTransformer | SparseEncoder,
        name: str,
        folder: Path | None,
        *,
        precision: Any = "auto",
        threads: int = 1,
        write: Callable[[str], None] = print,
    ) -> None:
        from tct_hf.retrieval.encode import describe_model

        self.is_sparse = is_sparse_encoder(student)
        if student.similarity_fn_name not in (("dot",) if self.is_sparse else ("dot", "cosine")):
            can = "of a sparse student only dot" if self.is_sparse else "only dot and cosine"
            raise ValueError(f"student: {name} compares by {student.similarity_fn_name!r}: {can} can be searched.")
        self.collection, self.student, self.name = collection, student, name
        self.description = describe_model(student, name)
        self._precision, self._threads, self._write = precision, threads, write
        if folder is None:
            digest = hashlib.sha256(json.dumps(self.depends, sort_keys=True).encode()).hexdigest()
            folder = default_cache_dir() / f"search-{digest[:16]}"
        self.folder = folder
        self._compared = False  # whether the vectors that are there have been seen to be of this corpus
        self._manifest: dict[str, Any] | None = None
        self._vectors: tuple[list[str], Any] | None = None
        self._bm25: Stored[BM25Index] | None = None
        self._expanded: dict[str, Stored[BM25Index]] = {}
        self._dense: dict[str, Stored[DenseIndex]] = {}
        self._learned: Stored[SparseIndex] | None = None

    @property
    def built_by(self) -> dict[str, Any]:
        """The student, as its indexes record it."""
        model = self.description["model"]
        return {**model, "id": str(model["id"])}

    @property
    def depends(self) -> dict[str, Any]:
        """All that vectors and indexes depend on, JSON-ready."""
        return {
            "corpus": {key: value for key, value in self.collection.fingerprint.items() if key != "questions"},
            "student": {"weights": self.built_by["weights_sha256"], "encoding": self.description["encoding"]},
            "precision": self._precision,
        }

    @property
    def encoding_seconds(self) -> float | None:
        """What encoding the corpus took, scaled up from the part that was timed; None where nothing was."""
        from tct_hf.retrieval.encode import encoding_seconds

        return encoding_seconds(self.folder / "vectors")

    def encode(self, state: PartialState | None = None) -> dict[str, Any]:
        """Encode the corpus, or go on with it; `state` splits the work among processes.

        Returns:
            The manifest of `encode_corpus`.
        """
        from tct_hf.retrieval.encode import encode_corpus

        manifest = encode_corpus(
            self.student,
            self.collection.corpus,
            self.folder / "vectors",
            model_id=self.name,
            precision=self._precision,
            state=state,
            write=self._write,
        )
        self._compared = True
        return manifest

    def manifest(self) -> dict[str, Any]:
        """The manifest of the encoded corpus, which is encoded first where it is not there."""
        from tct_hf.retrieval.vectors import MANIFEST_FILE, read_manifest

        if self._manifest is None:
            there = (self.folder / "vectors" / MANIFEST_FILE).is_file()
            self._manifest = read_manifest(self.folder / "vectors") if there else self.encode()
        return self._manifest

    def vectors(self) -> tuple[list[str], Any]:
        """Passage ids and vectors `(passages, dim)`, on disk; encoded first, or compared with the corpus."""
        from tct_hf.retrieval.vectors import load_vectors

        if self._vectors is None:
            if not self._compared:
                self.encode()
            ids, vectors, _ = load_vectors(self.folder / "vectors", mmap=True)
            # Left on disk: an index reads them block by block.
            self._vectors = ids, vectors if self.student.similarity_fn_name == "dot" else UnitRows(vectors)
        return self._vectors

    def encode_queries(self, queries: Mapping[str, str]) -> Any:
        """Vectors of queries, id to text, as the index compares them: `(queries, dim)` float32, CSR if sparse.

        Raises:
            ValueError: a vector is NaN or infinite; names the query.
        """
        vectors = self.encode_texts(list(queries.values()))
        finite = finite_rows(vectors)
        if not finite.all():
            name = list(queries)[int(finite.argmin())]
            raise ValueError(
                f"query {name!r} has a NaN or infinite vector: check the weights of {self.name}, or set precision to "
                "fp32 in another folder."
            )
        return vectors

    def encode_texts(self, texts: Sequence[str]) -> Any:
        """Vectors of query texts, computed in the precision of the corpus; nothing is checked."""
        from tct_hf.retrieval.encode import encode_texts

        bf16 = self.manifest()["precision"] == "bf16"
        return self._comparable(encode_texts(self.student, texts, task="query", bf16=bf16))

    def bm25(self) -> Stored[BM25Index]:
        """BM25 with its default parameters."""
        if self._bm25 is None:
            corpus = self.collection.corpus
            self._bm25 = self._stored(
                "bm25", lambda: BM25Index.build(corpus["text"], corpus["id"]), BM25Index.load, _bm25_memory
            )
        return self._bm25

    def expanded(self, settings: ExpansionSettings) -> Stored[BM25Index]:
        """BM25 over the passages with their generated queries.

        Args:
            settings: with a path.
        """
        depends = settings.depends()
        key = json.dumps(depends, sort_keys=True)
        if key not in self._expanded:
            from tct_hf.retrieval.expanded import expanded_bm25

            assert settings.path is not None
            build = partial(
                expanded_bm25, self.collection.corpus, settings.path, **settings.kept(), k1=settings.k1, b=settings.b
            )
            self._expanded[key] = self._stored("bm25-expanded", build, BM25Index.load, _bm25_memory, depends)
        return self._expanded[key]

    def dense(
        self,
        factory: str,
        *,
        query_vectors: Any = None,
        tuned_on: str = "passages",
        recall: float = 0.97,
        k: int = 100,
    ) -> Stored[Any]:
        """The student's vectors in a Faiss index.

        Args:
            factory: "Flat", or a Faiss factory string whose search parameters are tuned.
            query_vectors: to tune on, passages where None.
            tuned_on: says which they are; an index that was tuned on others is refused.
            recall: to reach.
            k: passages a query that `recall` speaks of.
        """
        if factory not in self._dense:
            settings: dict[str, Any] = {"factory": factory}
            if factory != "Flat":
                settings |= {"recall": recall, "k": k, "tuned_on": tuned_on}

            def build() -> DenseIndex:
                ids, vectors = self.vectors()
                return DenseIndex.build(
                    vectors,
                    ids,
                    factory,
                    recall=recall,
                    k=k,
                    query_vectors=query_vectors,
                    built_by=self.built_by,
                    threads=self._threads,
                )

            name = "dense-" + re.sub(r"[^A-Za-z0-9]+", "-", factory).strip("-").lower()
            self._dense[factory] = self._stored(
                name, build, lambda place: DenseIndex.load(place, model=self.built_by), _dense_memory, settings
            )
        return self._dense[factory]

    def first_dims(self, size: int) -> Stored[DenseIndex]:
        """The first dimensions of the student's vectors, searched exactly: what `truncate_dim` gives.

        Args:
            size: how many.
        """
        from tct_hf.retrieval.encode import describe_model

        student: Any = self.student  # a dense one
        with student.truncate_embeddings(size):
            model = describe_model(student, self.name)["model"]
        built_by = {**model, "id": str(model["id"])}

        def build() -> DenseIndex:
            ids, vectors = self.vectors()
            return DenseIndex.build(self.sliced(vectors, size), ids, "Flat", built_by=built_by, threads=self._threads)

        return self._stored(
            f"dense-first-{size}",
            build,
            lambda place: DenseIndex.load(place, model=built_by),
            _dense_memory,
            {"first_dims": size},
        )

    def sliced(self, vectors: Any, size: int) -> Any:
        """The first `size` dimensions of vectors `(rows, dim)`, as the student's similarity compares them."""
        first = FirstColumns(vectors, size)
        return first if self.student.similarity_fn_name == "dot" else UnitRows(first)

    def sparse(self) -> Stored[SparseIndex]:
        """The sparse student's vectors in inverted lists."""
        if self._learned is None:

            def build() -> SparseIndex:
                ids, vectors = self.vectors()
                return SparseIndex.build(vectors, ids, built_by=self.built_by)

            self._learned = self._stored(
                "learned-sparse",
                build,
                lambda place: SparseIndex.load(place, model=self.built_by),
                lambda index, folder: index.nbytes,
            )
        return self._learned

    def exact(self) -> Stored[Any]:
        """The index by which the student is searched exactly."""
        return self.sparse() if self.is_sparse else self.dense("Flat")

    def _comparable(self, vectors: Any) -> Any:
        """Vectors whose inner product is the student's similarity."""
        return vectors if self.student.similarity_fn_name == "dot" else UnitRows(vectors)[:]

    def _stored(
        self,
        name: str,
        build: Callable[[], Index],
        load: Callable[[Path], Index],
        memory: Callable[[Index, Path], int],
        settings: Mapping[str, Any] | None = None,
    ) -> Stored[Index]:
        parent = self.folder / "indexes" / name
        folder, seconds_file = parent / "index", parent / "build_seconds.json"
        # Indexes of words know no student.
        depends = {"corpus": self.depends["corpus"]} if name.startswith("bm25") else self.depends
        claim(parent, {**depends, **(settings or {}), "build_threads": self._threads})
        if not folder.is_dir():
            begun = time.perf_counter()
            index = build()
            seconds = time.perf_counter() - begun
            # First: an index that is there then has its time beside it.
            write_json_atomic(seconds_file, {"seconds": seconds})
            index.save(folder)
        opened = load(folder)
        taken = json.loads(seconds_file.read_text(encoding="utf-8"))["seconds"] if seconds_file.is_file() else None
        return Stored(opened, folder, memory(opened, folder), taken)


def open_student(name: str, device: str | None = None) -> SentenceTransformer | SparseEncoder:
    """Load a model of one vector a text, a sparse one where its configuration says so.

    A bare TCT checkpoint, of which sentence-transformers would give wrong vectors without a word, is converted first.

    Args:
        name: folder, Hub id or bundled model.
        device: to put it on; the library chooses when None.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is a multi-vector model.
        OSError: it can't be loaded.
    """
    from sentence_transformers import SentenceTransformer, SparseEncoder

    from tct_hf.encoding.kinds import TCT_CHECKPOINTS, kind_of

    place = _place(name, "student")
    kind = "tct" if place in TCT_CHECKPOINTS else kind_of(place)
    if kind == "tct":
        from tct_hf.encoding.convert import load_student

        return load_student(place, device=device)
    if kind == "colbert":
        raise ValueError(
            f"student: {name} has one vector a token, and no student is: name the folder or Hub id of a model of one "
            "vector a text (beside a teacher of recipes/train.py that is the folder student)."
        )
    try:
        return SparseEncoder(place, device=device) if kind == "sparse" else SentenceTransformer(place, device=device)
    except OSError as error:
        raise _not_loaded("student", name, error) from error


def open_beside(stores: Stores, name: str, device: str | None = None) -> SparseEncoder:
    """Load the sparse student that is to be searched beside a dense one.

    Args:
        stores: of the dense one.
        name: folder or Hub id of the sparse one.
        device: to put it on; the library chooses when None.

    Raises:
        ValueError: the first is sparse too, or the second is not; and as `open_student`.
    """
    if stores.is_sparse:
        raise ValueError(
            f"sparse_student: {name} beside the student {stores.name}, which is sparse itself; name one sparse "
            "student, alone as student or beside a dense one"
        )
    model = open_student(name, device)
    if not is_sparse_encoder(model):
        raise ValueError(f"sparse_student: {name} is no SparseEncoder; name it as student, or name a sparse student")
    return model  # type: ignore[return-value]


def open_teacher(name: str) -> MultiVectorEncoder:
    """Load a model of one vector a token; arguments and errors as `open_student`."""
    from tct_hf.teachers.colbert import ColBERTTeacher

    try:
        return ColBERTTeacher(_place(name, "teacher")).model
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _not_loaded("teacher", name, error) from error


def has_own_maxsim(student: SentenceTransformer | SparseEncoder) -> bool:
    """Whether a student's own token vectors can be compared: not a sparse one's, and not in TCT encoding.

    Args:
        student: as `open_student` loads it.
    """
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer

    from tct_hf.encoding.build import has_tct_encoding

    if isinstance(student, SparseEncoder) or not isinstance(student[0], Transformer):
        return False
    return not has_tct_encoding(student)


def open_reranker(name: str, stores: Stores) -> MultiVectorEncoder:
    """Load what puts found passages in order by MaxSim.

    Args:
        name: folder or Hub id of a ColBERT; or OWN, the student's own token vectors.
        stores: of the student.

    Raises:
        ValueError: OWN, of a student that has none to compare; and as `open_teacher`.
    """
    if name != OWN:
        return open_teacher(name)
    if not has_own_maxsim(stores.student):
        raise ValueError(
            f"{OWN}: the token vectors of {stores.name} can't be compared, it is a sparse student or one in TCT "
            "encoding; name the folder or Hub id of a ColBERT"
        )
    from tct_hf.encoding.build import build_colbert

    return build_colbert(_place(stores.name, "student"), encoding="own")


def _place(name: str, role: str) -> str:
    from tct_hf.hub_client import resolve_model

    place = resolve_model(name)
    if not Path(place).is_dir() and (Path(place).exists() or not _HUB_ID.fullmatch(place)):
        raise FileNotFoundError(
            f"{role}: there is no folder {name}, and it is no Hub id (owner/name) either; recipes/train.py makes one, "
            "or give the right path"
        )
    return place


def _not_loaded(role: str, name: str, error: OSError) -> OSError:
    first = (str(error).strip().splitlines() or [repr(error)])[0]
    return OSError(f"{role}: {name} is no folder here and can't be loaded from the Hub either ({first})")


def _bm25_memory(index: BM25Index, folder: Path) -> int:
    """Its posting lists, and its words and ids with the tables that hold them."""
    arrays = sum(getattr(part, "nbytes", 0) for part in index._engine.scores.values())
    words = index._engine.vocab_dict
    tables = sys.getsizeof(words) + sum(sys.getsizeof(word) + sys.getsizeof(at) for word, at in words.items())
    return int(arrays + tables + sys.getsizeof(index.ids) + sum(map(sys.getsizeof, index.ids)))


def _dense_memory(index: DenseIndex, folder: Path) -> int:
    """What Faiss holds, which is what it writes, and the table of ids."""
    return (folder / "index.faiss").stat().st_size + int(getattr(index.ids, "nbytes", 0))
