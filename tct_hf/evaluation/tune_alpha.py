"""The weight of the sparse scores in a hybrid, found on judged queries that are never reported."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tct_hf.data.collection import Collection
from tct_hf.data.ids import hash_of
from tct_hf.data.near_duplicates import folded
from tct_hf.evaluation.measures import cutoff_of, evaluate_run, find_themselves
from tct_hf.evaluation.settings import HybridSettings
from tct_hf.retrieval.fusion import Scores, align, check_weight, equal_spread_alpha, order_of
from tct_hf.retrieval.runs import Run, without_own

# Weights tried at first, in units of (spread of dense scores) / (spread of sparse scores): none at all, and four a
# factor of ten from a hundredth to a hundred.
_GRID = (0.0, *(10 ** (step / 4) for step in range(-8, 9)))
# Then three between the best one and each of its neighbours, twice.
_REFINEMENTS, _BETWEEN = 2, 3


class TunedAlpha(float):
    """The weight that did best, which is a float, with how it was found."""

    measure: str
    value: float
    curve: list[tuple[float, float]]
    normalize: bool
    queries: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values, without the query ids."""
        return {
            "alpha": float(self),
            "measure": self.measure,
            "value": self.value,
            "curve": [list(point) for point in self.curve],
            "normalize": self.normalize,
            "queries": len(self.queries),
        }


def tune_alpha(
    sparse_run: Mapping[str, Scores],
    dense_run: Mapping[str, Scores],
    qrels: Mapping[str, Mapping[str, int]],
    measure: str = "RR@10",
    *,
    normalize: bool = False,
    relevance: int = 1,
    ignore_identical_ids: bool | None = None,
    alphas: Sequence[float] | None = None,
) -> TunedAlpha:
    """Find the weight of the sparse scores that is best for judged queries: those of dev or train, never of test.

    Weights depend on the scale of both systems' scores. Without `alphas`, the unit is the median over queries of the
    dense lists' spread (max - min) over that of the sparse lists', or 1 with `normalize`, and the weights tried are 0
    and 0.01 to 100 units, four a factor of ten; then, twice, three on either side between the best and its
    neighbours. They are rounded to three significant digits, so that the weight reported is the weight used. Of
    several weights that do equally well the middle one is taken.

    Args:
        sparse_run: query id to passage id to score.
        dense_run: query id to passage id to score.
        qrels: judgements of the tuning queries, query id to passage id to relevance; each query counts.
        measure: ir-measures name of the measure to maximise.
        normalize: bring both lists of a query to one range first, as in `fuse`.
        relevance: lowest relevant grade, as in `evaluate_run`.
        ignore_identical_ids: as in `evaluate_run`; None decides for both runs together.
        alphas: weights to try instead of the grid.

    Returns:
        The best weight, with the curve.

    Raises:
        ValueError: no query is judged, a run has queries but none that is, a weight is negative or not finite, or the
            measure is unknown.
    """
    if not qrels:
        raise ValueError("qrels: no judged query to tune on; take dev or train queries with judgements")
    if any(run and qrels.keys().isdisjoint(run) for run in (sparse_run, dense_run)) or not (sparse_run or dense_run):
        raise ValueError("qrels: none of the judged queries is in one run; take runs and judgements of one split")
    evaluate_run({}, qrels, [measure], relevance=relevance)  # an unknown measure fails before the work
    if ignore_identical_ids is None:
        ignore_identical_ids = find_themselves(qrels, sparse_run, dense_run)
    if ignore_identical_ids:
        sparse_run, dense_run = without_own(sparse_run), without_own(dense_run)
    aligned = {query: align(query, sparse_run.get(query, {}), dense_run.get(query, {}), normalize) for query in qrels}
    depth, found = cutoff_of(measure), dict[float, float]()

    def try_out(weights: Sequence[float]) -> None:
        for alpha in weights if alphas is not None else [float(f"{alpha:.3g}") for alpha in weights]:
            if alpha in found:
                continue
            run: Run = {}
            for query, (ids, sparse, dense) in aligned.items():
                scores = alpha * sparse + dense
                order = order_of(ids, scores, depth)
                run[query] = dict(zip([ids[at] for at in order.tolist()], scores[order].tolist(), strict=True))
            rules: dict[str, Any] = {"relevance": relevance, "ignore_identical_ids": False}  # they are out already
            found[alpha] = evaluate_run(run, qrels, [measure], **rules).mean[measure]

    if alphas is not None:
        if not len(alphas):
            raise ValueError("alphas: no weight to try; name some, or leave it out for the grid")
        for alpha in alphas:
            check_weight(alpha)
        try_out([float(alpha) for alpha in alphas])
    else:
        unit = 1.0 if normalize else equal_spread_alpha(sparse_run, dense_run, qrels)
        try_out([unit * step for step in _GRID])
        for _ in range(_REFINEMENTS):
            tried = sorted(found)
            at = tried.index(_best(found))
            for low, high in itertools.pairwise(tried[max(at - 1, 0) : at + 2]):
                # By equal factors, or by equal steps from 0.
                parts = [step / (_BETWEEN + 1) for step in range(1, _BETWEEN + 1)]
                try_out([low * (high / low) ** part if low else high * part for part in parts])
    tuned = TunedAlpha(_best(found))
    tuned.measure, tuned.value, tuned.normalize = measure, found[tuned], normalize
    tuned.curve, tuned.queries = sorted(found.items()), list(qrels)
    return tuned


@dataclass(frozen=True)
class TuningQueries:
    """Judged queries to tune on, and how many of their split were left out for being reported."""

    split: str
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    left_out: int


def tuning_queries(collection: Collection, settings: HybridSettings) -> TuningQueries | None:
    """Choose the queries to tune on: of dev, of train where there is no dev.

    Queries with the text of a reported one are left out; of the others, those kept are drawn by a hash of the id.
    None where `tune_on` is "auto" and there is none; a split with a reported query, by its id, is refused.
    """
    if settings.tune_queries < 1:
        raise ValueError(f"hybrid.tune_queries: {settings.tune_queries} is below 1; set hybrid.alpha to tune nothing")
    reported = collection.splits["test"].queries if "test" in collection.splits else {}
    also = {query: text for split in collection.also.values() for query, text in split.queries.items()}
    known = {folded(text) for queries in (reported, also) for text in queries.values()}
    for name in ("dev", "train") if settings.tune_on == "auto" else (settings.tune_on,):
        split = collection.splits.get(name)
        if split is None or not split.queries:
            continue
        if shared := sorted(split.queries.keys() & reported.keys()):
            raise ValueError(
                f"hybrid.tune_on: alpha would be tuned on {len(shared)} of the queries that are reported "
                f"({', '.join(map(repr, shared[:3]))}); tune on dev or train queries"
            )
        free = [query for query, text in split.queries.items() if query not in also and folded(text) not in known]
        if free:
            kept = sorted(free, key=hash_of)[: settings.tune_queries]
            queries = {query: split.queries[query] for query in kept}
            judged = {query: split.qrels[query] for query in kept}
            return TuningQueries(name, queries, judged, len(split.queries) - len(free))
    if settings.tune_on != "auto":
        there = ", ".join(name for name in collection.splits if name != "test") or "none"
        raise ValueError(
            f"hybrid.tune_on: {collection.name} has no {settings.tune_on} query to tune on (splits besides test: "
            f"{there}); name another split, or set hybrid.alpha"
        )
    return None


def _best(found: Mapping[float, float]) -> float:
    highest = max(found.values())
    best = sorted(alpha for alpha, value in found.items() if value == highest)
    return best[(len(best) - 1) // 2]
