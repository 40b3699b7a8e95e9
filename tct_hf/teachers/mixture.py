"""The mixture of free teachers, which searches a corpus before training, and the scales of a teacher's members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tct_hf.data.near_duplicates import folded
from tct_hf.data.qrels import ids_are_shared
from tct_hf.encoding.build import build_colbert, build_student
from tct_hf.files import write_json_atomic
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


# A query's candidates: member scores (members, candidates) and which candidates are positives, (candidates,) bool.
Lists = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Reading:
    """How well a distribution over candidates fits the judgements, averaged over queries.

    Attributes:
        cross_entropy: minus the log of the probability that all positives have together, in nats.
        entropy: entropy in nats.
        positive_on_top: share of the queries whose best candidate is a positive.
    """

    cross_entropy: float
    entropy: float
    positive_on_top: float


@dataclass(frozen=True)
class Calibration:
    """The scales of a teacher's members, and what they are worth.

    Attributes:
        weights: scale of each member's scores, by name.
        queries: how many queries they were found on.
        before: reading of the teacher with the scales it had.
        after: reading of the teacher with these.
        alone: reading of each member by itself, at its own best scale.
        student: reading of the student about to learn, at its own best scale; None where none was given.
        lead: by how many nats the teacher's cross-entropy is below the student's, scales found on one half of the
            queries and read on the other; None where no student was given.
    """

    weights: dict[str, float]
    queries: int
    before: Reading
    after: Reading
    alone: dict[str, Reading]
    student: Reading | None = None
    lead: float | None = None

    def save(self, folder: str | Path) -> None:
        """Write it into a folder, as JSON."""
        write_json_atomic(Path(folder) / "tct_calibration.json", asdict(self))

    def summary(self) -> str:
        """A few lines for people; says so where the teacher is no better than the student."""
        rows: list[tuple[str, float | None, Reading]]
        rows = [("teacher, before", None, self.before), ("teacher, after", None, self.after)]
        rows += [(f"{name} alone", self.weights[name], reading) for name, reading in self.alone.items()]
        rows += [("student", None, self.student)] if self.student is not None else []
        width = max(len(title) for title, _, _ in rows)
        lines = [
            f"calibrated on {self.queries} judged queries, each among its best candidates",
            f"{'':{width}}  weight  cross-entropy  entropy  positive on top",
        ]
        for title, weight, one in rows:
            shown = "" if weight is None else f"{weight:.3g}"
            figures = f"{one.cross_entropy:13.3f}  {one.entropy:7.3f}  {one.positive_on_top:15.1%}"
            lines.append(f"{title:{width}}  {shown:>6}  {figures}")
        if self.lead is not None and self.lead <= 0:
            lines.append("The teacher knows no more than the student about to learn from it: expect no gain.")
        return "\n".join(lines)


def calibrate(
    teacher: Teacher,
    collection: Collection,
    *,
    depth: int = 30,
    most: int = 300,
    student: Teacher | None = None,
) -> Calibration:
    """Find the scale of every member of a teacher, and set it.

    Scales are those under which the judged positives are most likely among each query's best candidates: there a
    ranking is decided. Among random passages, which are easy, a member that separates the best ones gets no weight.

    Args:
        teacher: a TeacherEnsemble with normalize="none", whose weights are set; or any other teacher, whose
            training_scale is set, so that a temperature of 1 / training_scale is calibrated.
        collection: collection with judgements of the split dev.
        depth: candidates a query, the best of the teacher (of BM25, where the teacher can't search).
        most: number of judged queries, drawn by a hash of their ids: the same ones whatever the order.
        student: the student about to learn, for comparison; a DenseTeacher of it.

    Raises:
        ValueError: no query has a positive among its candidates, an ensemble that normalises scores, or one with a
            weight that is not above 0.

    Source: listwise maximum likelihood (Cao et al., ICML 2007), all positives as one target.
    """
    if isinstance(teacher, TeacherEnsemble) and teacher.normalize != "none":
        raise ValueError('calibrate sets weights of raw scores: make the TeacherEnsemble with normalize="none".')
    members, start = members_of(teacher), weights_of(teacher)
    for name, weight in zip(members, start, strict=True):
        if not weight > 0:
            raise ValueError(f"calibrate starts from weights above 0, but that of {name} is {weight}.")
    given = collection.splits["dev"]
    judged = replace(given, queries={name: given.queries[name] for name in given.qrels})
    asked = replace(collection, splits={"dev": judged}, also={}).part(queries=most).splits["dev"].queries
    best = search_mixture(teacher, collection, asked, keep=depth)
    rows = {name: row for row, name in enumerate(collection.corpus["id"])}
    texts = collection.corpus["text"][:]
    same_ids = ids_are_shared(judged.qrels)
    lists, of_student = [], []
    for name, query in asked.items():
        # The query itself, as in ArguAna and Quora, is the best of its candidates to every member.
        itself = folded(query)
        found = {one: texts[rows[one]] for one in best.get(name, ()) if one != name or not same_ids}
        passages = [one for one, text in found.items() if folded(text) != itself]
        positive = torch.tensor([judged.qrels[name].get(passage, 0) > 0 for passage in passages], dtype=torch.bool)
        if not positive.any():
            continue
        told = [found[passage] for passage in passages]
        lists.append((torch.stack([one.list_scores(query, told) for one in members.values()]), positive))
        if student is not None:
            of_student.append((student.list_scores(query, told)[None], positive))
    if not lists:
        raise ValueError(
            f"calibrate: none of the {len(asked)} dev queries has a judged positive among its candidates: judge more."
        )
    weights = fit_scales(lists, start)
    if isinstance(teacher, TeacherEnsemble):
        teacher.weights = weights
    else:
        [teacher.training_scale] = weights
    return Calibration(
        weights=dict(zip(members, weights, strict=True)),
        queries=len(lists),
        before=read(lists, start),
        after=read(lists, weights),
        alone={
            name: best_reading([(scores[place : place + 1], positive) for scores, positive in lists])
            for place, name in enumerate(members)
        },
        student=best_reading(of_student) if of_student else None,
        lead=held_out(of_student, [1.0]) - held_out(lists, start) if len(of_student) > 1 else None,
    )


def fit_scales(lists: Lists, start: Sequence[float]) -> list[float]:
    """The scales under which the positives are most likely, by L-BFGS on their logarithms from positive ones."""
    log_scales = torch.tensor(start, dtype=torch.float64).log().requires_grad_(True)
    optimizer = torch.optim.LBFGS([log_scales], max_iter=100, line_search_fn="strong_wolfe")
    ready = [(scores.double(), positive) for scores, positive in lists]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([_cross_entropy(log_scales.exp() @ scores, positive) for scores, positive in ready]).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return log_scales.detach().exp().tolist()


def held_out(lists: Lists, start: Sequence[float]) -> float:
    """Cross-entropy of queries whose judgements the scales were not found on: each half by the other's scales."""
    halves = (lists[::2], lists[1::2])
    folds = [(one, read(one, fit_scales(other, start)).cross_entropy) for one, other in (halves, halves[::-1])]
    return sum(len(one) * found for one, found in folds) / len(lists)


def best_reading(lists: Lists) -> Reading:
    """What one member by itself is worth at its best scale."""
    spread = torch.stack([scores.double().std() for scores, _ in lists]).mean().clamp(min=1e-6)
    return read(lists, fit_scales(lists, [float(1 / spread)]))


def read(lists: Lists, weights: Sequence[float]) -> Reading:
    """How well a weighted sum of the members' scores fits the judgements."""
    scale = torch.tensor(weights, dtype=torch.float64)
    pairs = [(scale @ scores.double(), positive) for scores, positive in lists]
    entropy = [torch.distributions.Categorical(logits=one).entropy() for one, _ in pairs]
    return Reading(
        cross_entropy=float(torch.stack([_cross_entropy(one, positive) for one, positive in pairs]).mean()),
        entropy=float(torch.stack(entropy).mean()),
        positive_on_top=sum(bool(positive[one.argmax()]) for one, positive in pairs) / len(pairs),
    )


def _cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    return logits.logsumexp(0) - logits[positive].logsumexp(0)
