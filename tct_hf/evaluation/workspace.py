"""What a student and BM25 need to search a collection: vectors and indexes, made once and opened from then on."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

import numpy as np
import torch
from accelerate import PartialState
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Transformer

from tct_hf.cache import default_cache_dir
from tct_hf.data.collection import Collection
from tct_hf.data.shards import MANIFEST_FILE
from tct_hf.encoding.build import build_colbert, has_tct_encoding
from tct_hf.encoding.convert import load_student
from tct_hf.encoding.encoders import load_model
from tct_hf.encoding.engine import OpenVINOEngine
from tct_hf.encoding.kinds import TCT_CHECKPOINTS, kind_of
from tct_hf.evaluation.cost import Footprint, bytes_on_disk
from tct_hf.evaluation.settings import EngineSettings, ExpansionSettings
from tct_hf.evaluation.tune_alpha import TuningQueries
from tct_hf.files import claim, command, json_digest, working_in, write_json_atomic
from tct_hf.hub_client import check_model_folder, resolve_model
from tct_hf.retrieval.bm25 import BM25Index, expanded_bm25
from tct_hf.retrieval.dense import DenseIndex
from tct_hf.retrieval.encode import encode_texts, find_engine
from tct_hf.retrieval.encode_corpus import describe_model, encode_corpus, read_seconds
from tct_hf.retrieval.engines import engine_of
from tct_hf.retrieval.faiss_tools import factory_for
from tct_hf.retrieval.runs import Run
from tct_hf.retrieval.sparse import SparseIndex
from tct_hf.retrieval.vectors import FirstColumns, UnitRows, finite_rows, load_vectors, read_manifest
from tct_hf.teachers.colbert import ColBERTTeacher

Model = TypeVar("Model")
Index = TypeVar("Index", BM25Index, DenseIndex, SparseIndex)
# Folders of the vectors and indexes of a sparse student beside a dense one, and of the base as it is.
SPARSE_FOLDER, BASE_FOLDER = "sparse_student", "base"
# Instead of a ColBERT: the student's own token vectors.
OWN = "own"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Stored(Generic[Index]):
    """An index with what it costs, the encoding apart."""

    index: Index
    footprint: Footprint


class Workspace:
    """The encoded corpus and the indexes of a collection and a student, each made when it is first asked for.

    Args:
        name: the student's, in records and messages.
        folder: of vectors and indexes; one in the cache when None.
        precision: to encode in: "auto", "bf16" or "fp32".
        threads: CPU threads that build indexes.
        in_memory: write nothing; `precision` is then "bf16" or "fp32".
        indexes: those that are there already, by their names in `indexes`.
        stored: in memory: folders of vectors, of which that of the student's passages is read.
        backend: what encodes queries, as in `encode_corpus`; None: what encoded the passages, if it is installed.
        remembered: single queries whose vectors are kept in memory, the last ones asked.
    """

    def __init__(
        self,
        collection: Collection,
        student: SentenceTransformer | SparseEncoder,
        name: str,
        folder: Path | None = None,
        *,
        precision: Any = "auto",
        threads: int = 1,
        in_memory: bool = False,
        indexes: Mapping[str, Any] | None = None,
        stored: Sequence[Path] = (),
        backend: Literal["auto", "torch", "openvino"] | None = None,
        remembered: int = 0,
        write: Callable[[str], None] = print,
    ) -> None:
        self.is_sparse = isinstance(student, SparseEncoder)
        if student.similarity_fn_name not in (("dot",) if self.is_sparse else ("dot", "cosine")):
            can = "of a sparse student only dot" if self.is_sparse else "only dot and cosine"
            raise ValueError(f"student: {name} compares by {student.similarity_fn_name!r}: {can} can be searched.")
        self.collection, self.student, self.name = collection, student, name
        self._precision, self._threads, self._in_memory, self._write = precision, threads, in_memory, write
        self._stored_vectors = stored
        if folder is None and not in_memory:
            folder = default_cache_dir() / f"search-{json_digest(self.depends)[:16]}"
        self.folder = folder or Path()
        self._backend, self._engines = backend, dict[int, OpenVINOEngine | None]()
        self._one = lru_cache(remembered)(lambda text: self._encoded([text], "query"))
        self._compared = False  # whether the vectors on disk are known to be of this corpus
        self._elsewhere = False  # whether an engine has the vectors, so that searching needs none here
        self._made: dict[str, Stored[Any]] = {key: Stored(one, Footprint()) for key, one in (indexes or {}).items()}

    @property
    def indexes(self) -> dict[str, Any]:
        """The indexes that have been asked for, by name."""
        return {name: stored.index for name, stored in self._made.items()}

    @cached_property
    def description(self) -> dict[str, Any]:
        """What the vectors depend on, of the student."""
        return describe_model(self.student, self.name)

    @property
    def built_by(self) -> dict[str, Any]:
        """The student, as its indexes record it."""
        return self.description["model"]

    @property
    def weights(self) -> str:
        """Digest of the student's weights, of those that only queries go through too."""
        return str({**self.built_by, **self.description}["weights_sha256"])

    @property
    def depends(self) -> dict[str, Any]:
        """All that vectors and indexes depend on, JSON-ready."""
        return {
            "corpus": {key: value for key, value in self.collection.fingerprint.items() if key != "questions"},
            "student": {"weights": self.weights, "encoding": self.description["encoding"]},
            "precision": self._precision,
        }

    def encode(self, state: PartialState | None = None) -> dict[str, Any]:
        """Encode the corpus, or go on with it, shared among the processes of `state`; its manifest."""
        how: dict[str, Any] = {"model_id": self.name, "precision": self._precision, "write": self._write}
        manifest = encode_corpus(self.student, self.collection.corpus, self.folder / "vectors", state=state, **how)
        self._compared = True
        return manifest

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the encoded corpus, which is encoded first where it is not there."""
        there = (self.folder / "vectors" / MANIFEST_FILE).is_file()
        return read_manifest(self.folder / "vectors") if there else self.encode()

    @cached_property
    def vectors(self) -> tuple[list[str], Any]:
        """Passage ids and vectors `(passages, dim)`, on disk; encoded first, or compared with the corpus."""
        if self._in_memory:
            corpus = self.collection.corpus
            ids = list(corpus["id"])
            for folder in self._stored_vectors:
                of = read_manifest(folder)["model"]
                if all(of.get(key) == self.built_by[key] for key in ("weights_sha256", "encoding")):
                    names, vectors, _ = load_vectors(folder, mmap=True)
                    if set(names) == set(ids):
                        return names, self._as_dot(vectors)
            vectors = self._encoded(corpus["text"], "document")
        else:
            if not self._compared:
                self.encode()
            # Left on disk: an index reads them block by block.
            ids, vectors, _ = load_vectors(self.folder / "vectors", mmap=True)
        return ids, self._as_dot(vectors)

    def _encoded(self, texts: Sequence[str], task: str) -> Any:
        own = self._in_memory or (self._elsewhere and not (self.folder / "vectors" / MANIFEST_FILE).is_file())
        made = {"precision": self._precision, "backend": "torch"} if own else self.manifest
        engine = self._engine(made["precision"], made["backend"] == "openvino") if task == "query" else None
        bf16 = engine is None and made["precision"] == "bf16"
        return encode_texts(self.student, texts, task=task, bf16=bf16, engine=engine)

    def _engine(self, precision: str, of_passages: bool) -> OpenVINOEngine | None:
        """What computes queries in place of the student, with torch's threads, if anything does."""
        threads, student = torch.get_num_threads(), cast(SentenceTransformer, self.student)
        if threads not in self._engines:
            some = [text[:100] for text in self.collection.corpus[:1000]["text"]]
            backend = self._backend or ("auto" if of_passages else "torch")
            self._engines[threads], _ = find_engine(student, some, backend, precision, low_latency=True)
        return self._engines[threads]

    def _as_dot(self, vectors: Any) -> Any:  # vectors whose dot products are the student's scores
        return vectors if self.student.similarity_fn_name == "dot" else UnitRows(vectors)

    def encode_queries(self, queries: Mapping[str, str], size: int | None = None) -> Any:
        """Vectors of queries, id to text, as an index compares them: `(queries, size or dim)`, CSR if sparse."""
        texts = list(queries.values())
        vectors = self._as_dot(self._one(texts[0]) if len(texts) == 1 else self._encoded(texts, "query"))[:]
        finite = finite_rows(vectors)
        if not finite.all():
            name = list(queries)[int(finite.argmin())]
            raise ValueError(
                f"query {name!r} has a NaN or infinite vector: check the weights of {self.name}, or set precision to "
                "fp32 in another folder."
            )
        return vectors if size is None else self._as_dot(FirstColumns(vectors, size))[:]

    def search(self, queries: Mapping[str, str], depth: int, size: int | None = None, factory: str = "Flat") -> Run:
        """Search, exactly if not said otherwise, with the first `size` dimensions of a dense student if given."""
        index = self.exact().index if self.is_sparse else self.dense(factory, size).index
        return index.run(list(queries), self.encode_queries(queries, size), depth)

    def bm25(self) -> Stored[BM25Index]:
        """BM25 with its default parameters."""
        corpus, words = self.collection.corpus, self.collection.words
        return self._stored("bm25", lambda: BM25Index.build(corpus["text"], corpus["id"], **words), BM25Index.load)

    def expanded(self, settings: ExpansionSettings) -> Stored[BM25Index]:
        """BM25 over the passages with their generated queries."""
        assert settings.path is not None
        options = {**settings.kept(), **self.collection.words, "k1": settings.k1, "b": settings.b}
        build = partial(expanded_bm25, self.collection.corpus, settings.path, **options)
        return self._stored("bm25-expanded", build, BM25Index.load, **settings.depends())

    @property
    def factory(self) -> str:
        """The Faiss factory string of the index that so many vectors of the student are best searched by."""
        dimension = self.student.get_embedding_dimension() or self.vectors[1].shape[1]
        return factory_for(len(self.collection.corpus), dimension)

    def dense(
        self, factory: str, size: int | None = None, *, tuning: TuningQueries | None = None, recall: float = 0.97
    ) -> Stored[DenseIndex]:
        """The student's vectors in a Faiss index, tuned for Recall@100 unless it is "Flat".

        `size` takes their first dimensions, which is what `truncate_dim` gives. It is tuned on the queries of
        `tuning`, on passages where that is None; an index tuned on others is refused.
        """
        settings: dict[str, Any] = {"factory": factory}
        if factory != "Flat":
            on = "passages" if tuning is None else f"{len(tuning.queries)} {tuning.split} queries"
            settings |= {"recall": recall, "k": 100, "tuned_on": on}
        built_by, student = self.built_by, cast(SentenceTransformer, self.student)
        if size is not None:
            check_dims([size], student.get_embedding_dimension())
            settings["first_dims"] = size
            with student.truncate_embeddings(size):
                built_by = describe_model(student, self.name)["model"]

        def build() -> DenseIndex:
            queries = None if tuning is None or factory == "Flat" else self.encode_queries(tuning.queries, size)
            how: dict[str, Any] = {"recall": recall, "query_vectors": queries, "threads": self._threads}
            ids, vectors = self.vectors
            vectors = vectors if size is None else self._as_dot(FirstColumns(vectors, size))
            return DenseIndex.build(vectors, ids, factory, built_by=built_by, **how)

        return self._stored(dense_name(factory, size), build, partial(DenseIndex.load, model=built_by), **settings)

    def sparse(self) -> Stored[SparseIndex]:
        """The sparse student's vectors in inverted lists."""

        def build() -> SparseIndex:
            ids, vectors = self.vectors
            return SparseIndex.build(vectors, ids, built_by=self.built_by)

        return self._stored("learned-sparse", build, partial(SparseIndex.load, model=self.built_by))

    def exact(self) -> Stored[Any]:
        """The index by which the student is searched exactly."""
        return self.sparse() if self.is_sparse else self.dense("Flat")

    def engine(self, settings: EngineSettings) -> Stored[Any]:
        """A table of the student's vectors that `push` filled; refused where it is not of this student and corpus."""
        assert settings.name is not None
        index = engine_of(settings.url).open(settings.url, settings.name, model=self.built_by)
        index.ef_search, self._elsewhere = settings.ef_search, True
        some = index.vectors((ids := self.collection.corpus["id"])[:100])
        if len(index) != len(ids) or len(some) < len(ids[:100]):
            raise ValueError(
                f"engine.name: the {len(index):,} passages of table {settings.name} are not the {len(ids):,} of "
                f"{self.collection.name}; push its vectors again, or name another table"
            )
        lengths = np.linalg.norm([*some.values()], axis=1)
        if self.student.similarity_fn_name == "cosine" and not np.allclose(lengths, 1, atol=1e-2):
            raise ValueError(
                f"engine.name: {self.name} compares by cosine, and table {settings.name} has vectors of other lengths "
                "than 1; give the student a Normalize module, encode and push again"
            )
        return Stored(index, Footprint(index.nbytes))

    def _stored(
        self, name: str, build: Callable[[], Index], load: Callable[[Path], Index], **settings: Any
    ) -> Stored[Index]:
        if self._in_memory:
            self._made[name] = self._made.get(name) or Stored(build(), Footprint())
            return self._made[name]
        parent = self.folder / "indexes" / name
        folder, seconds_file = parent / "index", parent / "build_seconds.json"
        # Indexes of words know no student.
        depends = {"corpus": self.depends["corpus"]} if name.startswith("bm25") else self.depends
        wanted = {**depends, **settings, "build_threads": self._threads}
        claim(parent, wanted, {"student.weights": self.name} if "student" in depends else None)
        if name in self._made:
            return self._made[name]
        if not folder.is_dir():
            with working_in(parent):
                if not folder.is_dir():  # nor built by the process that was waited for
                    begun = time.perf_counter()
                    index = build()
                    # First: an index on disk then has its time beside it.
                    write_json_atomic(seconds_file, {"seconds": time.perf_counter() - begun})
                    index.save(folder)
        opened = load(folder)
        size = Footprint(bytes_on_disk(folder), _memory(opened, folder), read_seconds(seconds_file))
        return self._made.setdefault(name, Stored(opened, size))


def dense_name(factory: str, size: int | None = None) -> str:
    """The name of an index of the first `size` dimensions of a student's vectors, or of all."""
    code = "-" + re.sub(r"[^A-Za-z0-9]+", "-", factory).strip("-").lower()
    return f"dense{code}" if size is None else f"dense-first-{size}" + ("" if factory == "Flat" else code)


def said_of(factory: str, size: int | None) -> str:
    """The same in words, after the title of a student."""
    return ("" if size is None else f", first {size} dimensions") + ("" if factory == "Flat" else f", {factory}")


def check_dims(dims: Sequence[int], dimension: int | None) -> None:
    """Refuse sizes that are not between 1 and the dimensions of a student's vectors."""
    for size in dims:
        if dimension is not None and not 0 < size <= dimension:
            raise ValueError(f"dims: {size} is not between 1 and the {dimension} dimensions of the vectors.")


def _memory(index: Any, folder: Path) -> int:
    """Bytes that an index holds: of Faiss what it writes, and the table of ids; of BM25 its lists, words and ids."""
    if isinstance(index, DenseIndex):
        return (folder / "index.faiss").stat().st_size + int(getattr(index.ids, "nbytes", 0))
    if isinstance(index, SparseIndex):
        return index.nbytes
    arrays, words = index._engine.scores.values(), index._engine.vocab_dict
    tables = chain([words, index.ids], words, words.values(), index.ids)
    return int(sum(getattr(part, "nbytes", 0) for part in arrays) + sum(map(sys.getsizeof, tables)))


def open_student(name: str, device: str | None = None) -> SentenceTransformer | SparseEncoder:
    """Load a model of one vector a text, dense or sparse.

    A bare TCT checkpoint, of which sentence-transformers would give wrong vectors without a word, is converted first.
    """

    def load(place: str) -> SentenceTransformer | SparseEncoder:
        kind = "tct" if place in TCT_CHECKPOINTS else kind_of(place)
        if kind == "tct":
            return load_student(place, device=device)
        if kind == "colbert":
            raise ValueError(f"student: {name} has one vector a token, and no student is: name one of a vector a text")
        return load_model(SparseEncoder if kind == "sparse" else SentenceTransformer, place, device=device)

    return _load("student", name, load)


def open_beside(workspace: Workspace, name: str, device: str | None = None) -> SparseEncoder:
    """Load the sparse student to be searched beside the dense one of `workspace`."""
    if workspace.is_sparse:
        raise ValueError(f"sparse_student: beside {workspace.name}, which is sparse itself; name one of them alone")
    if not isinstance(model := open_student(name, device), SparseEncoder):
        raise ValueError(f"sparse_student: {name} is no SparseEncoder; name it as student, or name a sparse student")
    return model


def open_teacher(name: str) -> MultiVectorEncoder:
    """Load a model of one vector a token; arguments and errors as `open_student`."""
    return _load("teacher", name, lambda place: ColBERTTeacher(place).model)


def has_own_maxsim(model: SentenceTransformer | SparseEncoder) -> bool:
    """Whether a student's own token vectors can be compared: not a sparse one's, and not in TCT encoding."""
    return isinstance(model[0], Transformer) and not (isinstance(model, SparseEncoder) or has_tct_encoding(model))


def open_reranker(name: str, workspace: Workspace) -> MultiVectorEncoder:
    """Load the model that reranks by MaxSim: a ColBERT (folder or Hub id), or OWN, the student's own token vectors."""
    if name != OWN:
        return open_teacher(name)
    student = workspace.name
    if not has_own_maxsim(workspace.student):
        raise ValueError(f"{OWN}: the token vectors of {student} can't be compared (sparse or TCT): name a ColBERT")
    return _load("student", student, lambda place: build_colbert(place, encoding="own"))


def _load(role: str, name: str, load: Callable[[str], Model]) -> Model:
    place = resolve_model(name)
    if not Path(place).is_dir() and (Path(place).exists() or not _HUB_ID.fullmatch(place)):
        raise FileNotFoundError(
            f"{role}: there is no folder {name}, and no Hub id (owner/name) either; {command('train')} makes one, "
            "or give the right path"
        )
    check_model_folder(place)
    return load(place)
