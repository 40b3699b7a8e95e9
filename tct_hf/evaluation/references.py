"""The systems a training run is measured by, searched exactly: BM25, the base, stock, the teacher, the students.

Corpora are encoded in memory, and models loaded when they are searched with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from transformers import AutoConfig

from tct_hf.encoding.build import build_colbert, build_student
from tct_hf.encoding.kinds import kind_of
from tct_hf.evaluation.maxsim import late_interaction_run, rerank_run
from tct_hf.evaluation.systems import System
from tct_hf.hub_client import resolve_model
from tct_hf.retrieval.dense import DenseIndex
from tct_hf.retrieval.encode import encode_texts, is_sparse_encoder
from tct_hf.retrieval.negatives import collection_bm25
from tct_hf.retrieval.runs import Run, rank
from tct_hf.retrieval.sparse import SparseIndex
from tct_hf.teachers import mixture

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection

BM25, BASE_NATIVE, OWN_MAXSIM, STOCK, STUDENT, TEACHER = (
    *("bm25", "base-native", "base-maxsim"),
    *("stock", "student", "teacher"),
)
# Titles of students by their keys; another key is its own title.
STUDENT_TITLES = {STUDENT: "student", "unlabelled": "student without labels", "labelled": "student with labels"}
_BASE_TITLE, _MAXSIM_TITLE = "base as it is", "base reranked by its own MaxSim, untrained"
# Passages of each list that own MaxSim puts in order.
RERANKED = 100


def dense_runs(
    model: SentenceTransformer | SparseEncoder,
    corpus_ids: Sequence[str],
    corpus_texts: Sequence[str],
    queries: Mapping[str, str],
    *,
    dims: Sequence[int | None] = (None,),
    k: int = 100,
    bf16: bool = False,
) -> list[Run]:
    """Search exactly, in memory, once with each number of first dimensions (None: all); texts are encoded once."""
    if model.similarity_fn_name not in ("dot", "cosine"):
        raise ValueError(f"The model compares by {model.similarity_fn_name!r}: only dot and cosine can be searched.")
    check_dims(dims, model.get_embedding_dimension())
    passages = encode_texts(model, corpus_texts, task="document", bf16=bf16)
    vectors = encode_texts(model, list(queries.values()), task="query", bf16=bf16)
    if is_sparse_encoder(model):
        return [SparseIndex.build(passages, list(corpus_ids)).run(list(queries), vectors, k)]
    cosine = model.similarity_fn_name == "cosine"
    return [
        DenseIndex.build(_cut(passages, size, cosine), list(corpus_ids)).run(
            list(queries), _cut(vectors, size, cosine), k
        )
        for size in dims
    ]


def dense_run(model: Any, corpus_ids: Any, corpus_texts: Any, queries: Mapping[str, str], **options: Any) -> Run:
    """The run of `dense_runs` with all dimensions."""
    [run] = dense_runs(model, corpus_ids, corpus_texts, queries, **options)
    return run


def _cut(whole: Any, size: int | None, cosine: bool) -> Any:
    """Vectors, cut to their first dimensions, whose products are the model's scores."""
    sliced = np.ascontiguousarray(whole[:, :size])
    return sliced / np.linalg.norm(sliced, axis=1, keepdims=True).clip(1e-12) if cosine else sliced


def check_dims(dims: Sequence[int | None], dimension: int | None) -> None:
    """Refuse sizes that are not between 1 and the dimensions of a student's vectors."""
    for size in dims:
        if size is not None and dimension is not None and not 0 < size <= dimension:
            raise ValueError(f"dims: {size} is not between 1 and the {dimension} dimensions of the vectors.")


def dense_system(
    collection: Collection, key: str, title: str, load: Callable[[], Any], *, depth: int, bf16: bool
) -> System:
    """Exact search with a model of one vector a text, dense or sparse, loaded when it is searched with."""
    ids, texts = collection.corpus["id"], collection.corpus["text"]
    return System(key, title, lambda queries: dense_run(load(), ids, texts, queries, k=depth, bf16=bf16))


def sparse_system(collection: Collection, key: str, model: str, *, depth: int, bf16: bool) -> System:
    """Exact search of a collection with a sparse student (folder)."""
    title = f"{STUDENT_TITLES.get(key, key)} (weights of words)"
    return dense_system(collection, key, title, partial(SparseEncoder, model), depth=depth, bf16=bf16)


def teacher_system(collection: Collection, key: str, title: str, teacher: str, *, depth: int, bf16: bool) -> System:
    """Exhaustive MaxSim of a collection with a ColBERT (folder or Hub id)."""
    ids, texts = collection.corpus["id"], collection.corpus["text"]
    return System(
        key,
        title,
        lambda queries: late_interaction_run(MultiVectorEncoder(teacher), ids, texts, queries, k=depth, bf16=bf16),
    )


def student_systems(
    collection: Collection,
    load: Callable[[], SentenceTransformer],
    *,
    dims: Sequence[int] | None,
    depth: int,
    bf16: bool,
    key: str = STUDENT,
) -> list[System]:
    """A student's vectors whole, then cut to each size of `matryoshka_dims`, the largest first; one encoding."""
    ids, texts = collection.corpus["id"], collection.corpus["text"]
    sizes: list[int | None] = [None, *sorted(set(dims or []), reverse=True)]
    made: dict[int | None, Run] = {}

    def search(size: int | None, queries: Mapping[str, str]) -> Run:
        if size not in made:
            found = dense_runs(load(), ids, texts, queries, dims=sizes, k=depth, bf16=bf16)
            made.update(zip(sizes, found, strict=True))
        return made[size]

    title = STUDENT_TITLES.get(key, key)
    return [
        System(
            key if size is None else f"{key}-{size}",
            title if size is None else f"{title}, first {size} dimensions",
            partial(search, size),
        )
        for size in sizes
    ]


def reference_systems(
    collection: Collection,
    *,
    base_model: str | None,
    teacher: str | None,
    depth: int,
    bf16: bool,
    stock: str | None = None,
    prompts: Mapping[str, str] | None = None,
    lengths: Mapping[str, int] | None = None,
    vectors: str | None = None,
) -> list[System]:
    """The systems that students are measured against, in the order of the table, the teacher last."""
    systems = [System(BM25, "BM25", lambda queries: collection_bm25(collection).run(queries, depth))]
    dense = partial(dense_system, collection, depth=depth, bf16=bf16)
    if base_model is not None:
        base, reads = resolve_model(base_model), dict[str, Any]({"prompts": prompts, **(lengths or {})})
        if vectors is not None:
            systems += _kept_systems(collection, base, vectors, depth=depth, bf16=bf16, reads=reads)
        else:
            load: Any = partial(build_student, base, **reads)
            rerank = partial(_own_maxsim, collection, base, reads, depth, bf16)
            systems += [
                dense(BASE_NATIVE, _BASE_TITLE, load),
                System(OWN_MAXSIM, _MAXSIM_TITLE, rerank, of=(BM25, BASE_NATIVE)),
            ]
    if stock is not None:
        systems.append(dense(STOCK, "stock fine-tuning of the base", partial(SentenceTransformer, stock)))
    if teacher is not None:
        title = "ColBERT teacher (one vector a token)"
        systems.append(teacher_system(collection, TEACHER, title, teacher, depth=depth, bf16=bf16))
    return systems


def _pool(query: str, lists: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(one for run in lists for one, _ in rank(run.get(query, {}))[:RERANKED]))


def _own_maxsim(
    collection: Collection,
    base: str,
    reads: Mapping[str, Any],
    depth: int,
    bf16: bool,
    queries: Mapping[str, str],
    *lists: Run,
) -> Run:
    """The best passages of some lists, pooled, in the order of MaxSim of the base's own tokens."""
    pools = {query: dict.fromkeys(_pool(query, lists), 0.0) for query in queries}
    model = build_colbert(base, encoding="own", **reads)
    found = rerank_run(model, pools, collection.corpus, queries, RERANKED * len(lists), bf16=bf16)
    return {query: dict(rank(hits)[:depth]) for query, hits in found.items()}


def _kept_systems(
    collection: Collection, base: str, vectors: str, *, depth: int, bf16: bool, reads: Mapping[str, Any]
) -> list[System]:
    """The base as it is and its own MaxSim, with vectors that a mixture has left on disk."""
    ids, texts = collection.corpus["id"][:], collection.corpus["text"][:]

    def members() -> list[Any]:
        dtype: Any = "bfloat16" if bf16 else "float32"
        bm25 = collection_bm25(collection)
        mixed = mixture.free_mixture(base, bm25, reads=reads, dtype=dtype, cache_dir=vectors)
        return list(mixture.members_of(mixed).values())

    def rerank(queries: Mapping[str, str], *lists: Run) -> Run:
        tokens, of = members()[-1], dict(zip(ids, texts, strict=True))
        found: Run = {}
        for query, text in queries.items():
            pool = _pool(query, lists)
            scores = mixture.list_scores(tokens, text, [of[one] for one in pool]).tolist()
            found[query] = dict(rank(dict(zip(pool, scores, strict=True)))[:depth])
        return found

    return [
        System(BASE_NATIVE, _BASE_TITLE, lambda queries: mixture.dense_run(members()[0], ids, texts, queries, depth)),
        System(OWN_MAXSIM, _MAXSIM_TITLE, rerank, of=(BM25, BASE_NATIVE)),
    ]


def own_systems(
    collection: Collection, students: Mapping[str, str], *, depth: int, bf16: bool, dims: Sequence[int] | None = None
) -> list[System]:
    """Exact search with the students (folders) of a training run by their keys, dense or sparse."""
    own = []
    for key, student in students.items():
        if kind_of(student) == "sparse":
            own.append(sparse_system(collection, key, student, depth=depth, bf16=bf16))
            continue
        # The largest size is often the whole vector.
        sizes = [size for size in dims if size != AutoConfig.from_pretrained(student).hidden_size] if dims else None
        load = partial(SentenceTransformer, student)
        own += student_systems(collection, load, dims=sizes, depth=depth, bf16=bf16, key=key)
    return own


def training_systems(
    collection: Collection,
    *,
    students: Mapping[str, str],
    depth: int,
    bf16: bool,
    dims: Sequence[int] | None = None,
    **reference: Any,
) -> list[System]:
    """The :func:`reference_systems` of a training run, with its students before the teacher."""
    others = reference_systems(collection, depth=depth, bf16=bf16, **reference)
    last = [others.pop()] if others[-1].key == TEACHER else []
    return [*others, *own_systems(collection, students, depth=depth, bf16=bf16, dims=dims), *last]
