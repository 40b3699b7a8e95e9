"""The mixture of free teachers: a base model's own vectors, its own token vectors and BM25, none of them trained.

It searches a whole corpus before training, so that questions without judgements have candidates, and a first passage
to learn from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.encoding.build import build_colbert, build_student
from tct_hf.retrieval.negatives import collection_bm25
from tct_hf.retrieval.runs import Run, rank
from tct_hf.teachers.base import Dtype, Teacher
from tct_hf.teachers.bm25 import BM25Teacher
from tct_hf.teachers.cached import CachedTeacher, encode_together
from tct_hf.teachers.colbert import TEXTS_AT_ONCE, ColBERTTeacher, DenseTeacher, VectorTeacher
from tct_hf.teachers.ensemble import TeacherEnsemble

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from tct_hf.data.collection import Collection
    from tct_hf.retrieval.bm25 import BM25Index

# Weights of the pooled vectors' cosine, BM25 and the mean over the query's tokens of own MaxSim, where there are no
# judgements to calibrate with: about what calibration finds on SciFact, SQuAD sentences and API documentation.
DEFAULT_WEIGHTS = (6.0, 0.33, 12.0)
_SCORES_AT_ONCE = 1 << 25


def free_mixture(
    base: str | Path,
    index: BM25Index,
    *,
    weights: Sequence[float] = DEFAULT_WEIGHTS,
    reads: Mapping[str, Any] | None = None,
    dtype: Dtype = "auto",
    cache_dir: str | Path | None = None,
) -> TeacherEnsemble:
    """The log-linear mixture of a base model as it is, BM25 and the base model's own MaxSim.

    Args:
        base: folder or Hub id of an embedding model.
        index: BM25 over the corpus.
        weights: weights of the pooled vectors, BM25 and own MaxSim.
        reads: lengths and prompts of the base model, arguments of `build_student`; its own when None.
        dtype: what the base model computes in, see :class:`~tct_hf.ColBERTTeacher`.
        cache_dir: folder for the base model's vectors, which are then computed once.
    """
    pooled: Any = DenseTeacher(by_cosine(build_student(str(base), **(reads or {}))), dtype=dtype)
    tokens: Any = ColBERTTeacher(build_colbert(str(base), **(reads or {})), dtype=dtype)
    if cache_dir is not None:
        pooled, tokens = (CachedTeacher(one, cache_dir) for one in (pooled, tokens))
    members = zip((pooled, BM25Teacher(index), tokens), weights, strict=True)
    return TeacherEnsemble(list(members), normalize="none")


def by_cosine(model: SentenceTransformer) -> SentenceTransformer:
    """A model that compares by cosine from now on: the scale of dot products is every model's own."""
    model.similarity_fn_name = "cosine"
    return model


def members_of(teacher: Teacher) -> dict[str, Teacher]:
    """The members of an ensemble by the names of their scores; a teacher that is none is its only member."""
    members = teacher.teachers if isinstance(teacher, TeacherEnsemble) else [teacher]
    named: dict[str, Teacher] = {}
    for one in members:
        name, same = one.score_kind, sum(other.score_kind == one.score_kind for other in named.values())
        named[name if not same else f"{name} {same + 1}"] = one
    return named


def weights_of(teacher: Teacher) -> list[float]:
    """The scales of a teacher's members."""
    return list(teacher.weights) if isinstance(teacher, TeacherEnsemble) else [teacher.training_scale]


def set_weights(teacher: Teacher, weights: Sequence[float]) -> None:
    """Set the scales of a teacher's members."""
    if isinstance(teacher, TeacherEnsemble):
        teacher.weights = list(weights)
    else:
        [teacher.training_scale] = weights


def search_mixture(
    teacher: Teacher,
    collection: Collection,
    queries: Mapping[str, str],
    *,
    depth: int = 100,
    keep: int = 30,
) -> Run:
    """Search a whole corpus with a mixture, before training: too slow at query time.

    The best `depth` of each member that can search a corpus (BM25, pooled vectors) are scored by all of these, and
    the best `depth` of that sum by all members.

    Args:
        teacher: an ensemble, or one teacher; BM25 searches for what can't search itself.
        collection: collection whose corpus is searched.
        queries: query id to text.
        depth: passages a query that all members score.
        keep: passages a query in the run.

    Returns:
        The run; scores are the mixture's, logits.
    """
    if not queries:
        return {}
    members = list(zip(members_of(teacher).values(), weights_of(teacher), strict=True))
    searchers = [
        pair for pair in members if isinstance(getattr(pair[0], "teacher", pair[0]), (BM25Teacher, DenseTeacher))
    ]
    rerankers = [pair for pair in members if pair not in searchers]
    ids, texts = collection.corpus["id"][:], collection.corpus["text"][:]
    rows = {name: row for row, name in enumerate(ids)}
    dense = [one for one, _ in searchers if not isinstance(one, BM25Teacher)]
    kept = [[one for one, _ in some if isinstance(one, CachedTeacher)] for some in (searchers, rerankers)]
    if all(kept) and len(texts) <= len(queries) * depth:  # then most passages will be scored by all
        encode_together(kept[0][0], kept[1][0], texts)
    found = [collection_bm25(collection).run(dict(queries), depth)]
    found += [dense_run(one, ids, texts, queries, depth) for one in dense]
    unions = {name: list({one: None for hits in found for one in hits.get(name, ())}) for name in queries}
    names = [name for name, union in unions.items() if union]
    asked = [queries[name] for name in names]

    def add(members: Sequence[tuple[Teacher, float]], runs: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        lists = [[texts[rows[one]] for one in run] for run in runs]
        totals = [list(run.values()) for run in runs]
        for teacher, weight in members:
            for total, scores in zip(totals, lists_scores(teacher, asked, lists), strict=True):
                total[:] = [one + weight * score for one, score in zip(total, scores, strict=True)]
        return [dict(zip(run, total, strict=True)) for run, total in zip(runs, totals, strict=True)]

    scored = add(searchers, [dict.fromkeys(unions[name], 0.0) for name in names])
    best = add(rerankers, [dict(rank(run)[:depth]) for run in scored])
    return {name: dict(rank(run)[:keep]) for name, run in zip(names, best, strict=True)}


def lists_scores(teacher: Any, queries: Sequence[str], lists: Sequence[Sequence[str]]) -> list[list[float]]:
    """A teacher's scores of each query's passages, as :meth:`Teacher.list_scores` gives them.

    Passage by passage, where the teacher compares vectors or words: each passage is read once, not once a query.
    """
    compares_vectors = isinstance(teacher, (VectorTeacher, CachedTeacher))
    if not compares_vectors and not isinstance(teacher, BM25Teacher):
        return [teacher.list_scores(query, texts).tolist() for query, texts in zip(queries, lists, strict=True)]
    places: dict[str, list[tuple[int, int]]] = {}
    for row, texts in enumerate(lists):
        for column, text in enumerate(texts):
            places.setdefault(text, []).append((row, column))
    asked = teacher.vectors(queries, "query") if compares_vectors else queries
    found, passages = [[0.0] * len(texts) for texts in lists], list(places)
    for start in range(0, len(passages), TEXTS_AT_ONCE):
        part = passages[start : start + TEXTS_AT_ONCE]
        for text, passage in zip(part, teacher.vectors(part, "document") if compares_vectors else part, strict=True):
            scores = teacher.scores([asked[row] for row, _ in places[text]], [passage])[:, 0].tolist()
            for (row, column), score in zip(places[text], scores, strict=True):
                found[row][column] = score
    return found


def dense_run(teacher: Any, ids: Sequence[str], texts: Sequence[str], queries: Mapping[str, str], depth: int) -> Run:
    """Search `depth` passages a query exactly with a DenseTeacher, cached or not."""
    passages, names = teacher.vectors(texts, "document"), list(queries)
    vectors = teacher.vectors(list(queries.values()), "query")
    block = max(1, _SCORES_AT_ONCE // len(passages))
    run: Run = {}
    for start in range(0, len(names), block):
        best = teacher.scores(vectors[start : start + block], passages).topk(min(depth, len(passages)), dim=1)
        for name, scores, rows in zip(names[start : start + block], *(part.tolist() for part in best), strict=True):
            run[name] = {ids[row]: score for row, score in zip(rows, scores, strict=True)}
    return run
