"""The systems a training run is measured by, searched exactly: BM25, the base, stock, the teacher, the students.

Corpora are encoded in memory, and models loaded when they are searched with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from transformers import AutoConfig

from tct_hf.encoding.build import build_colbert, build_student
from tct_hf.encoding.kinds import kind_of
from tct_hf.evaluation.maxsim import late_interaction_run
from tct_hf.evaluation.systems import System
from tct_hf.evaluation.workspace import Workspace
from tct_hf.hub_client import resolve_model
from tct_hf.retrieval.negatives import collection_bm25
from tct_hf.retrieval.runs import Run, rank
from tct_hf.teachers.cached import CachedTeacher
from tct_hf.teachers.colbert import ColBERTTeacher, DenseTeacher, VectorTeacher
from tct_hf.teachers.mixture import dense_run, lists_scores

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection

BM25, BASE_NATIVE, OWN_MAXSIM, STOCK, STUDENT, TEACHER = (
    *("bm25", "base-native", "base-maxsim"),
    *("stock", "student", "teacher"),
)
# Titles of students by their keys; another key is its own title.
STUDENT_TITLES = {STUDENT: "student", "unlabelled": "student without labels", "labelled": "student with labels"}
# Passages of each list that own MaxSim puts in order.
RERANKED = 100


def exact_systems(
    collection: Collection,
    key: str,
    title: str,
    load: Callable[[], Any],
    *,
    depth: int,
    bf16: bool,
    dims: Sequence[int] = (),
) -> list[System]:
    """Search with a model's vectors whole, then cut to each size of `dims`, the largest first; one encoding."""
    sizes: list[int | None] = [None, *sorted(set(dims), reverse=True)]
    found: dict[int | None, Run] = {}

    def search(size: int | None, queries: Mapping[str, str]) -> Run:
        if size not in found:  # all at once: the model and the vectors are then let go
            precision = "bf16" if bf16 else "fp32"
            workspace = Workspace(collection, load(), key, precision=precision, in_memory=True)
            found.update({one: workspace.search(queries, collection.reach(depth), one) for one in sizes})
        return found[size]

    return [
        System(
            key if size is None else f"{key}-{size}",
            title if size is None else f"{title}, first {size} dimensions",
            partial(search, size),
        )
        for size in sizes
    ]


def student_systems(
    collection: Collection, students: Mapping[str, str], *, depth: int, bf16: bool, dims: Sequence[int] | None = None
) -> list[System]:
    """Exact search with the students (folders) of a training run by their keys, dense or sparse."""
    systems, exact = [], partial(exact_systems, collection, depth=depth, bf16=bf16)
    for key, student in students.items():
        title = STUDENT_TITLES.get(key, key)
        if kind_of(student) == "sparse":
            title = f"{title} (weights of words)"
            systems += exact(key, title, partial(SparseEncoder, student))
        else:
            # The largest size is often the whole vector.
            sizes = [size for size in dims if size != AutoConfig.from_pretrained(student).hidden_size] if dims else ()
            systems += exact(key, title, partial(SentenceTransformer, student), dims=sizes)
    return systems


def teacher_system(collection: Collection, key: str, title: str, teacher: str, *, depth: int, bf16: bool) -> System:
    """Exhaustive MaxSim of a collection with a ColBERT (folder or Hub id)."""
    corpus = collection.corpus

    def search(queries: Mapping[str, str]) -> Run:
        model = MultiVectorEncoder(teacher)
        return late_interaction_run(model, corpus["id"], corpus["text"], queries, k=collection.reach(depth), bf16=bf16)

    return System(key, title, search)


def reference_systems(
    collection: Collection,
    *,
    base_model: str | None,
    teacher: str | None,
    depth: int,
    bf16: bool,
    stock: str | None = None,
    students: Mapping[str, str] | None = None,
    dims: Sequence[int] | None = None,
    prompts: Mapping[str, str] | None = None,
    lengths: Mapping[str, int] | None = None,
    vectors: str | None = None,
) -> list[System]:
    """The students (folders) of a training run and what they are measured against, in the order of the table.

    The base's vectors are read from the folder `vectors`, where a mixture has left them, or computed.
    """
    systems = [System(BM25, "BM25", lambda queries: collection_bm25(collection).run(queries, collection.reach(depth)))]
    exact = partial(exact_systems, collection, depth=depth, bf16=bf16)
    if base_model is not None:
        base, reads = resolve_model(base_model), dict[str, Any]({"prompts": prompts, **(lengths or {})})
        systems += _base_systems(collection, base, reads, depth=collection.reach(depth), bf16=bf16, vectors=vectors)
    if stock is not None:
        systems += exact(STOCK, "stock fine-tuning of the base", partial(SentenceTransformer, stock))
    systems += student_systems(collection, students or {}, depth=depth, bf16=bf16, dims=dims)
    if teacher is not None:
        title = "ColBERT teacher (one vector a token)"
        systems.append(teacher_system(collection, TEACHER, title, teacher, depth=depth, bf16=bf16))
    return systems


def _base_systems(
    collection: Collection, base: str, reads: Mapping[str, Any], *, depth: int, bf16: bool, vectors: str | None
) -> list[System]:
    """The base as it is, and the best passages of BM25 and of it in the order of MaxSim of its own tokens."""
    ids, texts = collection.corpus["id"][:], collection.corpus["text"][:]
    dtype: Any = "bfloat16" if bf16 else "float32"

    def kept(teacher: VectorTeacher) -> VectorTeacher | CachedTeacher:
        return teacher if vectors is None else CachedTeacher(teacher, vectors)

    def search(queries: Mapping[str, str]) -> Run:
        return dense_run(kept(DenseTeacher(build_student(base, **reads), dtype=dtype)), ids, texts, queries, depth)

    def rerank(queries: Mapping[str, str], *runs: Run) -> Run:
        tokens, of = (
            kept(ColBERTTeacher(build_colbert(base, **reads), dtype=dtype)),
            dict(zip(ids, texts, strict=True)),
        )
        pools = [
            list(dict.fromkeys(one for run in runs for one, _ in rank(run.get(name, {}))[:RERANKED]))
            for name in queries
        ]
        found = lists_scores(tokens, list(queries.values()), [[of[one] for one in pool] for pool in pools])
        return {
            name: dict(rank(dict(zip(pool, scores, strict=True)))[:depth])
            for name, pool, scores in zip(queries, pools, found, strict=True)
        }

    title = "base reranked by its own MaxSim, untrained"
    return [
        System(BASE_NATIVE, "base as it is", search),
        System(OWN_MAXSIM, title, rerank, of=(BM25, BASE_NATIVE)),
    ]
