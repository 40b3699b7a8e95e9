"""Hybrid retrieval: two or more runs made into one, and the weight between them tuned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tct_hf.retrieval.runs import Run

if TYPE_CHECKING:
    import numpy as np

    Scores = Mapping[str, float]

# Weights tried at first, in units of (spread of dense scores) / (spread of sparse scores): none at all, and four a
# factor of ten from a hundredth to a hundred.
_GRID = (0.0, *(10 ** (step / 4) for step in range(-8, 9)))
# Then twice as many between the best one and its neighbours on either side, finer each time.
_REFINEMENTS = 2
_BETWEEN = 3


class TunedAlpha(float):
    """The weight that did best, which is a float, with how it was found.

    Attributes:
        measure: ir-measures name of what was maximised.
        value: its mean at this weight over the judged queries.
        curve: (weight, mean) of every weight tried, weights ascending.
        normalize: whether scores were normalised; fuse with the same.
        queries: ids of the judged queries, none of which may be reported on (`check_tuning_queries`).
    """

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


def fuse(
    sparse_run: Mapping[str, Scores],
    dense_run: Mapping[str, Scores],
    alpha: float,
    *,
    normalize: bool = False,
    k: int | None = None,
) -> Run:
    """Fuse a sparse and a dense run: `alpha * sparse + dense` over the union of their passages.

    A passage that one list lacks gets that list's lowest score for the query; a list that is empty, or lacks the
    query, gives 0 to all. With `normalize` every score s of a list becomes (s - (min + max) / 2) / (max - min), and 0
    where all scores of the list are equal. This is the rule of TCT-ColBERT's hybrid (arXiv 2010.11386, section 3.2,
    as in Pyserini's `HybridSearcher`).

    Args:
        sparse_run: query id to passage id to score, of BM25 for instance.
        dense_run: alike, of a student.
        alpha: weight of the sparse scores, 0 or more; see `tune_alpha`.
        normalize: bring both lists of a query to the range -0.5 to 0.5 first.
        k: passages a query, at most; None keeps the union.

    Returns:
        The fused run: every query of either run, passages best first, equal scores by id.

    Raises:
        ValueError: alpha is negative or not finite, a score is not finite, k is below 1, or the runs have no query
            in common.
    """
    _check_weight(alpha)
    _check_depth(k, "k")
    _check_common(sparse_run, dense_run)
    fused: Run = {}
    for query in dict.fromkeys([*sparse_run, *dense_run]):
        ids, sparse, dense = _aligned(query, sparse_run.get(query, {}), dense_run.get(query, {}), normalize)
        scores = alpha * sparse + dense
        order = _order(ids, scores)[:k]
        fused[query] = dict(zip([ids[at] for at in order.tolist()], scores[order].tolist(), strict=True))
    return fused


def reciprocal_rank_fusion(runs: Sequence[Mapping[str, Scores]], k: int = 60, *, depth: int | None = None) -> Run:
    """Fuse runs by their ranks: a passage scores the sum of 1 / (k + rank) over the runs that have it.

    Ranks count from 1, score descending, equal scores by passage id (Cormack, Clarke and Büttcher, SIGIR 2009).

    Args:
        runs: query id to passage id to score, one or more.
        k: constant that lowers the weight of the first ranks; 60 in the paper.
        depth: passages a query, at most; None keeps the union.

    Returns:
        The fused run: every query of any run, passages best first, equal scores by id.

    Raises:
        ValueError: there is no run, k is negative or not finite, depth is below 1, or a score is NaN.
    """
    import numpy as np

    if isinstance(runs, Mapping) or not runs:
        raise ValueError("runs: pass a list of one or more runs")
    if not 0 <= k < math.inf:
        raise ValueError(f"k: {k} must be finite and 0 or more; 60 is usual")
    _check_depth(depth, "depth")
    fused: Run = {}
    for query in dict.fromkeys(query for run in runs for query in run):
        sums: dict[str, float] = {}
        for run in runs:
            scores = run.get(query, {})
            values = np.fromiter(scores.values(), np.float64, len(scores))
            if np.isnan(values).any():
                raise ValueError(_not_finite(query, scores))
            names = list(scores)
            shares = (1 / (k + np.arange(1, len(names) + 1))).tolist()
            ranked = zip([names[at] for at in _order(names, values).tolist()], shares, strict=True)
            if sums:
                so_far = sums.get
                for passage, share in ranked:
                    sums[passage] = so_far(passage, 0.0) + share
            else:
                sums = dict(ranked)
        ids, totals = list(sums), np.fromiter(sums.values(), np.float64, len(sums))
        order = _order(ids, totals)[:depth]
        fused[query] = dict(zip([ids[at] for at in order.tolist()], totals[order].tolist(), strict=True))
    return fused


def tune_alpha(
    sparse_run: Mapping[str, Scores],
    dense_run: Mapping[str, Scores],
    qrels: Mapping[str, Mapping[str, int]],
    measure: str = "RR@10",
    *,
    normalize: bool = False,
    relevance: int = 1,
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
        dense_run: alike.
        qrels: judgements of the tuning queries, query id to passage id to relevance; each of them counts.
        measure: ir-measures name of what to maximise.
        normalize: as for `fuse`.
        relevance: from which grade on a passage is relevant, as in `evaluate_run`.
        alphas: try exactly these weights in place of the grid.

    Returns:
        The best weight, with the curve.

    Raises:
        ValueError: no query is judged, both runs lack all that are, a weight is negative or not finite, or the measure
            is unknown.
    """
    from tct_hf.evaluation.effectiveness import cutoff_of, evaluate_run

    if not qrels:
        raise ValueError("qrels: no judged query to tune on; take dev or train queries with judgements")
    if qrels.keys().isdisjoint([*sparse_run, *dense_run]):
        raise ValueError("qrels: none of the judged queries is in the runs; take runs and judgements of one split")
    evaluate_run({}, qrels, [measure], relevance=relevance)  # an unknown measure fails before the work
    aligned = {
        query: _aligned(query, sparse_run.get(query, {}), dense_run.get(query, {}), normalize) for query in qrels
    }
    depth = cutoff_of(measure)
    found: dict[float, float] = {}

    def try_out(weights: Sequence[float]) -> None:
        for alpha in weights:
            if alpha in found:
                continue
            run: Run = {}
            for query, (ids, sparse, dense) in aligned.items():
                scores = alpha * sparse + dense
                order = _order(ids, scores, depth)
                run[query] = dict(zip([ids[at] for at in order.tolist()], scores[order].tolist(), strict=True))
            found[alpha] = evaluate_run(run, qrels, [measure], relevance=relevance).mean[measure]

    if alphas is not None:
        if not len(alphas):
            raise ValueError("alphas: no weight to try; name some, or leave it out for the grid")
        for alpha in alphas:
            _check_weight(alpha)
        try_out([float(alpha) for alpha in alphas])
    else:
        unit = 1.0 if normalize else equal_spread_alpha(sparse_run, dense_run, qrels)
        try_out([_rounded(unit * step) for step in _GRID])
        for _ in range(_REFINEMENTS):
            tried = sorted(found)
            at = tried.index(_best(found))
            near = tried[max(at - 1, 0) : at + 2]
            for low, high in itertools.pairwise(near):
                try_out(_between(low, high))
    alpha = _best(found)
    tuned = TunedAlpha(alpha)
    tuned.measure, tuned.value, tuned.normalize = measure, found[alpha], normalize
    tuned.curve, tuned.queries = sorted(found.items()), list(qrels)
    return tuned


def equal_spread_alpha(
    sparse_run: Mapping[str, Scores], dense_run: Mapping[str, Scores], queries: Collection[str] | None = None
) -> float:
    """The weight at which both lists count the same, found without judgements.

    Args:
        sparse_run: query id to passage id to score.
        dense_run: alike.
        queries: ids of the queries to look at; all when None.

    Returns:
        The median over queries of the dense list's spread (max - min) over that of the sparse list; 1 where no query
        has both.
    """
    import statistics

    ratios = []
    for query in sparse_run if queries is None else queries:
        sparse, dense = sparse_run.get(query), dense_run.get(query)
        if sparse and dense:
            spread = max(sparse.values()) - min(sparse.values())
            if spread > 0 and max(dense.values()) > min(dense.values()):
                ratios.append((max(dense.values()) - min(dense.values())) / spread)
    return statistics.median(ratios) if ratios else 1.0


def check_tuning_queries(
    tuned_on: Collection[str], reported: Collection[str], *, what: str = "alpha", setting: str = "tune_on"
) -> None:
    """Refuse to report on queries that something was tuned on.

    Args:
        tuned_on: ids of the tuning queries, or {id: text}.
        reported: ids of the queries to report on, or {id: text}; where both have texts, the same text under another
            id is found too.
        what: was tuned, for the message.
        setting: names the tuning queries, for the message.

    Raises:
        ValueError: a query is on both sides; the message counts them and names some.
    """
    shared = sorted(set(tuned_on) & set(reported))
    if shared:
        raise ValueError(
            f"{setting}: {what} would be tuned on {len(shared)} of the queries that are reported ({_some(shared)}); "
            "tune on dev or train queries"
        )
    if isinstance(tuned_on, Mapping) and isinstance(reported, Mapping):
        texts = {" ".join(str(text).casefold().split()) for text in tuned_on.values()}
        same = [query for query, text in reported.items() if " ".join(str(text).casefold().split()) in texts]
        if same:
            raise ValueError(
                f"{setting}: the texts of {len(same)} reported queries ({_some(same)}) are among those that {what} "
                "would be tuned on, under other ids; take them out of the tuning queries"
            )


def _aligned(query: str, sparse: Scores, dense: Scores, normalize: bool) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The union of two lists: ids, sparse scores and dense scores (passages,) float64, each missing one filled in."""
    import numpy as np

    values = []
    for scores in (sparse, dense):
        # Rows are fused as arrays, so that tuning adds and multiplies exactly as fusing does.
        array = np.fromiter(scores.values(), np.float64, len(scores))
        if not np.isfinite(array).all():
            raise ValueError(_not_finite(query, scores))
        if normalize and len(array):
            array = _normalized(array)
        values.append(array)
    sparse_values, dense_values = values
    sparse_low = float(sparse_values.min()) if len(sparse_values) else 0.0
    dense_low = float(dense_values.min()) if len(dense_values) else 0.0
    # One look-up a passage: what is left after the sparse list's passages are taken out is in the dense list only.
    rest = dict(zip(dense, dense_values.tolist(), strict=True))
    take = rest.pop
    shared = [take(passage, dense_low) for passage in sparse]
    sparse_all = np.concatenate([sparse_values, np.full(len(rest), sparse_low)])
    dense_all = np.array([*shared, *rest.values()], np.float64)
    return [*sparse, *rest], sparse_all, dense_all


def _normalized(scores: np.ndarray) -> np.ndarray:
    import numpy as np

    low, high = scores.min(), scores.max()
    if low == high:
        return np.zeros_like(scores)
    return (scores - (low + high) / 2) / (high - low)


def _order(ids: Sequence[str], scores: np.ndarray, depth: int | None = None) -> np.ndarray:
    """Rows best first, equal scores by id, the first `depth` of them: `rank` for arrays."""
    import numpy as np

    rows = np.arange(len(scores))
    if depth is not None and depth < len(scores):
        # All that equal the last one kept come along, for the ids to decide among.
        rows = np.flatnonzero(scores >= np.partition(scores, -depth)[-depth])
    order = rows[np.argsort(-scores[rows], kind="stable")]
    ordered = scores[order]
    equal = ordered[1:] == ordered[:-1]
    if equal.any():
        # Borders between groups of equal scores; only groups of two and more need sorting.
        borders = np.concatenate([[0], np.flatnonzero(~equal) + 1, [len(order)]])
        groups = np.flatnonzero(np.diff(borders) > 1)
        listed = order.tolist()
        for start, end in zip(borders[groups].tolist(), borders[groups + 1].tolist(), strict=True):
            listed[start:end] = sorted(listed[start:end], key=ids.__getitem__)
        order = np.array(listed, np.int64)
    return order[:depth]


def _between(low: float, high: float) -> list[float]:
    """Weights between two: by equal factors, or by equal steps from 0."""
    if low == 0:
        return [_rounded(high * step / (_BETWEEN + 1)) for step in range(1, _BETWEEN + 1)]
    return [_rounded(low * (high / low) ** (step / (_BETWEEN + 1))) for step in range(1, _BETWEEN + 1)]


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _best(found: Mapping[float, float]) -> float:
    highest = max(found.values())
    best = sorted(alpha for alpha, value in found.items() if value == highest)
    return best[(len(best) - 1) // 2]


def _check_weight(alpha: float) -> None:
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: {alpha} must be finite and 0 or more; tune_alpha finds a good one")


def _check_depth(depth: int | None, name: str) -> None:
    if depth is not None and depth < 1:
        raise ValueError(f"{name}: {depth} is below 1; ask for at least one passage, or None for all")


def _check_common(first: Mapping[str, Scores], second: Mapping[str, Scores]) -> None:
    if first and second and first.keys().isdisjoint(second):
        raise ValueError(
            f"sparse_run, dense_run: no query in common (for instance {next(iter(first))!r} and "
            f"{next(iter(second))!r}); take runs of one split, with the same ids"
        )


def _not_finite(query: str, scores: Scores) -> str:
    passage = next(passage for passage, score in scores.items() if not math.isfinite(score))
    return (
        f"run: query {query!r}, passage {passage!r}: score {scores[passage]!r} is not finite; "
        "look for NaN in the vectors or the scores that made it"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
