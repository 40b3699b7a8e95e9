"""The systems a training run is measured by, searched exactly; models are loaded when they are searched with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

from tct_hf.encoding.build import build_colbert, build_student
from tct_hf.encoding.kinds import kind_of
from tct_hf.evaluation.cost import BYTES, MILLISECONDS, TOTAL, bytes_on_disk
from tct_hf.evaluation.maxsim import late_interaction_run
from tct_hf.evaluation.settings import CostSettings
from tct_hf.evaluation.systems import System, measure_cost, student_system
from tct_hf.evaluation.workspace import Workspace, dense_name, said_of
from tct_hf.hub_client import resolve_model
from tct_hf.retrieval.negatives import collection_bm25
from tct_hf.retrieval.runs import Run, rank
from tct_hf.teachers.cached import CachedTeacher
from tct_hf.teachers.colbert import ColBERTTeacher, DenseTeacher, VectorTeacher
from tct_hf.teachers.mixture import dense_run, lists_scores

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection

BM25, BASE_NATIVE, OWN_MAXSIM = "bm25", "base-native", "base-maxsim"
STOCK, STUDENT, TEACHER = "stock", "student", "teacher"
# Titles of students by their keys; another key is its own title.
STUDENT_TITLES = {
    STUDENT: "student",
    "untrained": "student before training",
    "unlabelled": "student without labels",
    "labelled": "student with labels",
}
# Passages of each list that own MaxSim puts in order.
RERANKED = 100


@dataclass(frozen=True)
class References:
    """What a training run is measured by on a collection: exact search, `depth` passages a query.

    Models whose passage vectors are in one of the folders `stored`, those of query towers, encode no passage.

    Args:
        costs: filled with what each system costs when it is searched with, by its key: MILLISECONDS and BYTES; not
            measured when None.
    """

    collection: Collection
    depth: int
    bf16: bool
    stored: Sequence[Path] = ()
    costs: dict[str, dict[str, float]] | None = None

    def model(
        self,
        key: str,
        title: str,
        load: Callable[[], Any],
        dims: Sequence[int] | None = None,
        codes: Sequence[str] | None = None,
    ) -> list[System]:
        """Search with a model's vectors, then with each size of `dims`, the largest first; one encoding.

        At each size exactly, then by each Faiss factory of `codes`.
        """
        sizes: list[int | None] = [None, *sorted(set(dims or ()), reverse=True)]
        parts, found = [*product(sizes, ["Flat", *(codes or ())])], dict[Any, Run]()

        def search(size: int | None, code: str, queries: Mapping[str, str]) -> Run:
            if not found:  # all at once: the model and the vectors are then let go
                precision, depth = "bf16" if self.bf16 else "fp32", self.collection.reach(self.depth)
                how: dict[str, Any] = {"in_memory": True, "stored": self.stored}
                workspace = Workspace(self.collection, load(), key, precision=precision, **how)
                found.update({part: workspace.search(queries, depth, *part) for part in parts})
                for name, (first, factory) in zip(names, parts if self.costs is not None else (), strict=False):
                    stored = workspace.exact() if workspace.is_sparse else workspace.dense(factory, first)
                    timed = student_system(name, name, workspace, stored, depth, size=first)
                    self.time(timed, stored.index, queries)
            return found[size, code]

        names = [key, *(dense_name(code, size).replace("dense", key, 1) for size, code in parts[1:])]
        return [
            System(name, title + said_of(code, size), partial(search, size, code))
            for name, (size, code) in zip(names, parts, strict=True)
        ]

    def students(
        self, students: Mapping[str, str], dims: Sequence[int] | None = None, codes: Sequence[str] | None = None
    ) -> list[System]:
        """The students (folders) of a training run by their keys, dense or sparse, as :meth:`model`."""
        systems = []
        for key, student in students.items():
            title = STUDENT_TITLES.get(key, key)
            if kind_of(student) == "sparse":
                systems += self.model(key, f"{title} (weights of words)", partial(SparseEncoder, student))
            else:
                # The largest size is often the whole vector, and of an arm of fewer dimensions more than it.
                whole = SentenceTransformer(student).get_embedding_dimension() if dims else None
                sizes = [size for size in dims or () if whole is None or size < whole]
                systems += self.model(key, title, partial(SentenceTransformer, student), sizes, codes)
        return systems

    def time(self, system: System, index: Any, queries: Mapping[str, str]) -> None:
        """Put what a system costs, by one index and one CPU thread, into `costs`."""
        assert self.costs is not None
        passages = len(self.collection.corpus)
        took = measure_cost(system, queries, passages, CostSettings(queries=50)).latency[TOTAL].p50
        with TemporaryDirectory() as folder:
            index.save(folder)
            self.costs[system.key] = {MILLISECONDS: took, BYTES: bytes_on_disk(folder) / passages}

    def teacher(self, key: str, title: str, teacher: str) -> System:
        """Exhaustive MaxSim of a collection with a ColBERT (folder or Hub id)."""
        corpus, depth = self.collection.corpus, self.collection.reach(self.depth)

        def search(queries: Mapping[str, str]) -> Run:
            model = MultiVectorEncoder(teacher)
            return late_interaction_run(model, corpus["id"], corpus["text"], queries, k=depth, bf16=self.bf16)

        return System(key, title, search)

    def systems(
        self,
        *,
        base_model: str | None,
        teacher: str | None,
        stock: str | None = None,
        students: Mapping[str, str] | None = None,
        dims: Sequence[int] | None = None,
        codes: Sequence[str] | None = None,
        prompts: Mapping[str, str] | None = None,
        lengths: Mapping[str, int] | None = None,
        vectors: str | None = None,
    ) -> list[System]:
        """The students (folders) of a training run and what they are measured against, in the order of the table.

        The base's vectors are read from the folder `vectors`, where a mixture has left them, or computed.
        """
        collection, depth = self.collection, self.collection.reach(self.depth)
        systems = [System(BM25, "BM25", lambda queries: collection_bm25(collection).run(queries, depth))]
        if base_model is not None:
            systems += self._base(resolve_model(base_model), {"prompts": prompts, **(lengths or {})}, vectors)
        if stock is not None:
            systems += self.model(STOCK, "stock fine-tuning of the base", partial(SentenceTransformer, stock))
        systems += self.students(students or {}, dims, codes)
        if teacher is not None:
            systems.append(self.teacher(TEACHER, "ColBERT teacher (one vector a token)", teacher))
        return systems

    def _base(self, base: str, reads: Mapping[str, Any], vectors: str | None) -> list[System]:
        """The base as it is, and the best passages of BM25 and of it in the order of MaxSim of its own tokens."""
        ids, texts = self.collection.corpus["id"][:], self.collection.corpus["text"][:]
        dtype: Any = "bfloat16" if self.bf16 else "float32"
        depth = self.collection.reach(self.depth)

        def kept(teacher: VectorTeacher) -> VectorTeacher | CachedTeacher:
            return teacher if vectors is None else CachedTeacher(teacher, vectors)

        def search(queries: Mapping[str, str]) -> Run:
            return dense_run(kept(DenseTeacher(build_student(base, **reads), dtype=dtype)), ids, texts, queries, depth)

        def rerank(queries: Mapping[str, str], *runs: Run) -> Run:
            tokens = kept(ColBERTTeacher(build_colbert(base, **reads), dtype=dtype))
            of = dict(zip(ids, texts, strict=True))
            pools = [
                list(dict.fromkeys(one for run in runs for one, _ in rank(run.get(name, {}))[:RERANKED]))
                for name in queries
            ]
            found = lists_scores(tokens, list(queries.values()), [[of[one] for one in pool] for pool in pools])
            scored = (dict(zip(*pair, strict=True)) for pair in zip(pools, found, strict=True))
            return {name: dict(rank(scores)[:depth]) for name, scores in zip(queries, scored, strict=True)}

        reranked = System(OWN_MAXSIM, "base reranked by its own MaxSim, untrained", rerank, of=(BM25, BASE_NATIVE))
        return [System(BASE_NATIVE, "base as it is", search), reranked]
